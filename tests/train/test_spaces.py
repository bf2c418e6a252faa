"""Ranges of hyper-parameters: read from text, checked before anything runs."""

import pytest

from train.config import TrainConfig, check, flat, unused
from train.errors import UsageError
from train.presets import PRESETS, SPACES
from train.spaces import Choice, Integers, LogUniform, Uniform, as_text, check_space, contains, with_ranges


def checked(space, config=None):
    config = config or TrainConfig()
    check_space(space, config, check, unused)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_ranges_that_hold_its_own_values(preset):
    config = PRESETS[preset]()
    checked(SPACES[preset], config)
    assert all(contains(span, flat(config)[name]) for name, span in SPACES[preset].items())
    texts = tuple(f"{name}={as_text(span)}" for name, span in SPACES[preset].items())
    assert with_ranges({}, texts, TrainConfig) == SPACES[preset]


def test_text_gives_ranges_of_the_fields_type():
    texts = ("--optim.lr=1e-3:1:log", "optim.weight-decay=0:0.1", "augment.cutout=0:4", "batch=32,64", "epochs=1:8:log")
    texts += ("augment.flip=true,no", "model=resnet8,resnet14", "ema=none,0.9", "width=8:64:log")
    found = with_ranges({}, texts[:5] + texts[6:], TrainConfig)
    assert found == {
        "optim.lr": LogUniform(1e-3, 1),
        "optim.weight_decay": Uniform(0, 0.1),
        "augment.cutout": Integers(0, 4),
        "batch": Choice(32, 64),
        "epochs": LogUniform(1, 8),
        "model": Choice("resnet8", "resnet14"),
        "ema": Choice(None, 0.9),
        "width": Integers(8, 64, log=True),
    }
    checked(found | {"model": Choice("resnet8", "resnet20")})
    assert with_ranges(found, ("batch=fixed", "optim.lr=0.5:1"), TrainConfig).keys() == found.keys() - {"batch"}
    with pytest.raises(UsageError, match="the field must be true or false, got 'no'"):
        with_ranges({}, texts[5:6], TrainConfig)


REFUSED = {
    "optim.lr": "--range 'optim.lr' is not of the form FIELD=LOW:HIGH",
    "optim.lr=": "is not of the form",
    "lr=0.1:1": "unknown field 'lr': did you mean optim.lr? ",
    "optim.lr=1:0.1": "optim.lr=1:0.1 is empty: the lower bound must be below the upper one",
    "optim.lr=0.1:0.1": "is empty",
    "optim.lr=0:1:log": "the lower bound of a logarithmic range must be above 0",
    "optim.lr=-1:1": "optim.lr=-1:1: --optim.lr must be at least 0, got -1",
    "optim.lr=0.1:inf": "optim.lr=0.1:inf: --optim.lr must be at least 0 and finite, got inf",
    "optim.lr=a:1": "the field must be a number, got 'a'",
    "optim.lr=0.1:1:lin": "write LOW:HIGH or LOW:HIGH:log",
    "optim.lr=0.1": "leaves no choice",
    "batch=32,32": "lists a value twice",
    "batch=1.5:3": "the field must be a whole number, got '1.5'",
    "label_smoothing=0.5:1": "--label-smoothing must be at least 0 and below 1, got 1",
    "model=resnet8:resnet20": "the field must be text: list its values as A,B,C",
    "model=resnet8,resnet": "unknown model 'resnet'",
    "optim.factor=0.1:0.5": "optim.factor has no effect with --optim.schedule cosine; leave it out with",
    "optim.milestones=0.5,0.75": "the field must be a list of numbers, got '0.5'",
    "data.validation=0.1:0.2": "a search keeps data.validation fixed",
    "seed=0:9": "a search keeps seed fixed",
    "batch=fixed": "there is nothing to search",
}


@pytest.mark.parametrize("text", REFUSED)
def test_refused_in_one_line(text):
    with pytest.raises(UsageError) as refusal:
        checked(with_ranges({}, (text,), TrainConfig))
    assert REFUSED[text] in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    "space, message",
    [
        ({"optim.l": Uniform(0, 1)}, "unknown field 'optim.l' in a range: did you mean optim.lr"),
        ({"batch": Uniform(32, 64)}, "the field must be a whole number, not Uniform"),
        ({"batch": Choice("32", "64")}, "the field must be a whole number, not Choice"),
        ({"augment.mean": Choice((0.5,), (0.6,))}, "lists cannot be searched"),
    ],
)
def test_declared_ranges_are_checked_too(space, message):
    with pytest.raises(UsageError, match=message):
        checked(space)


def test_field_may_depend_on_one_that_is_searched():
    factor = {"optim.factor": Uniform(0.1, 0.5)}
    checked(factor | {"optim.schedule": Choice("cosine", "step")})
    with pytest.raises(UsageError, match="has no effect"):
        checked(factor | {"optim.schedule": Choice("cosine", "linear")})
