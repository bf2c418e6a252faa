"""The command line as people type it: understood where it has one meaning, else one line that helps."""

import pytest

from train.cli import parse
from train.config import check, check_changes, flat
from train.errors import UsageError
from train.presets import PRESETS


def changes(words):
    """(preset, the fields that differ from it)."""
    name, config = parse("train", PRESETS, words, default="digits")
    usual = flat(PRESETS[name]())
    return name, {field: value for field, value in flat(config).items() if value != usual[field]}


STEP = ("--optim.schedule", "step")
UNDERSTOOD = {
    ("--seed", "1", "digits"): {"seed": 1},
    ("--seed=1", "digits"): {"seed": 1},
    ("digits", "--Seed", "1"): {"seed": 1},
    ("--preset", "digits", "--seed", "1"): {"seed": 1},
    ("--preset=digits",): {},
    ("digits", "--"): {},
    ("digits", "--", "--seed", "1"): {"seed": 1},
    ("\u2013\u2013seed", "1"): {"seed": 1},  # dashes that a text processor has joined
    ("\u2014seed=1",): {"seed": 1},
    ("seed=1",): {"seed": 1},
    ("--seed", "1", "--seed", "2"): {"seed": 2},
    ("--augment.flip",): {"augment.flip": True},
    ("--augment.flip", "True"): {"augment.flip": True},
    ("--augment.flip=1",): {"augment.flip": True},
    ("--augment.flip", "true", "digits"): {"augment.flip": True},
    ("--augment.flip", "digits"): {"augment.flip": True},
    ("--optim.nesterov", "False"): {"optim.nesterov": False},
    ("--optim.nesterov=off",): {"optim.nesterov": False},
    ("--optim.no-nesterov",): {"optim.nesterov": False},
    ("--no-optim.nesterov",): {"optim.nesterov": False},
    ("--optim.no_nesterov",): {"optim.nesterov": False},
    ("--no-sync_bn",): {"sync_bn": False},
    ("--batch", "1e2"): {"batch": 100},
    ("--batch", "32.0"): {"batch": 32},
    ("--data.image_size", "16"): {"data.image_size": 16},
    ("--steps", "none"): {},
    ("--optim.milestones", "0.3", "0.6"): {"optim.milestones": (0.3, 0.6)},
    ("--optim.milestones", "0.3", "0.6", "digits"): {"optim.milestones": (0.3, 0.6)},
    ("--optim.milestones", "0.3,0.6"): {"optim.milestones": (0.3, 0.6)},
    ("--optim.milestones=0.3,0.6",): {"optim.milestones": (0.3, 0.6)},
    ("--optim.milestones=0.3, 0.6",): {"optim.milestones": (0.3, 0.6)},
    ("--optim.milestones", "(0.3, 0.6)"): {"optim.milestones": (0.3, 0.6)},
    ("--optim.milestones", "[0.3,", "0.6]"): {"optim.milestones": (0.3, 0.6)},
    ("--augment.mean", "None"): {},
    ("--widths", "8", "16e0"): {"widths": (8, 16)},
    ("--widths", ""): {},
    ("--xla", "a=1,2", "b=3"): {"xla": ("a=1,2", "b=3")},
    ("--optim.lr", "-1e-3"): {"optim.lr": -0.001},
    ("--data.name", "digits", "--out=-x"): {"out": "-x"},
}


@pytest.mark.parametrize("words", UNDERSTOOD, ids=" ".join)
def test_understood(words):
    assert changes(words) == ("digits", UNDERSTOOD[words])


def test_preset_after_the_flags_is_that_preset():
    assert changes(["--seed", "1", "finetune"]) == ("finetune", {"seed": 1})


HELPED = {
    ("--lr", "0.1"): "unknown field '--lr': did you mean --optim.lr? --help lists all fields",
    ("-lr", "0.1"): "unknown field '--lr': did you mean --optim.lr? ",
    ("--learning_rate", "0.1"): "unknown field '--learning_rate': did you mean --optim.lr? ",
    ("--batch-size", "8"): "did you mean --batch? ",
    ("--data", "photos"): "unknown field '--data': did you mean --data.name or --data.dir or ",
    ("--optim.weight-decy", "0"): "did you mean --optim.weight-decay or ",
    ("--no-batch",): "unknown field '--no-batch': did you mean --batch? ",
    ("digits", "extra"): "'extra' belongs to no flag: only the preset, digits, comes without one",
    ("Digits",): "unknown preset 'Digits': did you mean digits? ",
    ("resnet50",): "; resnet50 is a model: --model resnet50",
    ("tests",): "; a folder of images is --data.name folder:tests",
    ("--optim.lr",): "--optim.lr needs a value",
    ("--optim.lr", "--seed", "1"): "--optim.lr needs a value",
    ("--out", ""): "--out is empty: give it a value or leave it out",
    ("--out=",): "--out is empty",
    ("--seed=",): "--seed is empty",
    ("--freeze=maybe",): "--freeze maybe: it is a switch, --freeze or --no-freeze",
    ("--batch", "64.5"): "--batch takes whole numbers, got '64.5'",
    ("--batch", "inf"): "--batch takes whole numbers, got 'inf'",
    ("--batch", "many"): "--batch takes whole numbers, got 'many'",
    ("--optim.lr", "fast"): "--optim.lr takes numbers, got 'fast'",
    ("--optim.milestones", "None"): "--optim.milestones takes numbers, got 'None'",
    ("--seed", "none"): "--seed takes whole numbers, got 'None'",
    ("--steps", "1e18"): "--steps must be at least 1 and below 2147483648, got 1000000000000000000",
    ("--epochs", "1e308"): "--epochs must be above 0 and at most 1000000000, got 1e+308",
    ("--width", "1e9"): "--width must be at least 1 and at most 65536, got 1000000000",
    ("--distributed", "localhost:1,2,2"): "INDEX counts the hosts from 0 to COUNT - 1",
    ("--distributed", "localhost:1"): "is neither auto nor COORDINATOR:PORT,COUNT,INDEX",
    ("~nobody-of-this-name",): "unknown preset '~nobody-of-this-name': choose",
    ("n" * 300,): "unknown preset",
    (
        "--dtype",
        "float16",
    ): "--dtype 'float16': did you mean bfloat16 or float32? choose one of auto, ",
    ("--optim.lr", "0.1,0.2"): "--optim.lr takes 1 value, got 2",
    ("--model", "ResNet18"): "unknown model 'ResNet18': did you mean resnet18? ",
    ("--model", "resnet-18"): "unknown model 'resnet-18': did you mean resnet18? ",
    ("--optim.name", "Adam"): "unknown optimizer 'Adam': did you mean optax.adam? ",
    ("--optim.name", "SGD"): "unknown optimizer 'SGD': did you mean sgd or optax.sgd? ",
    ("--optim.schedule", "Cosine"): "unknown schedule 'Cosine': did you mean cosine? ",
    ("--loss", "Softmax"): "unknown loss 'Softmax': did you mean softmax? ",
}


@pytest.mark.parametrize("words", HELPED, ids=" ".join)
def test_helped(words):
    with pytest.raises(UsageError) as refusal:
        name, config = parse("train", PRESETS, words, default="digits")
        check_changes(config, PRESETS[name]())
        check(config)
    assert HELPED[words] in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1
