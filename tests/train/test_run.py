"""`python -m train` from end to end: the run folder, resuming after a kill, presets, every error."""

import dataclasses
import json
import os
import signal
from functools import partial

import jax
import numpy as np
import pytest

from train.__main__ import main
from train.cli import parse
from train.config import TrainConfig, from_dict
from train.data.batches import batch_like
from train.from_config import make_model, make_objective, make_state, make_tx, train_augment
from train.loop import read_rows
from train.presets import PRESETS
from train.run import run
from train.run_folder import read_config
from train.steps import train_step

# A run of seconds: 20 batches of 64 in an epoch of the digits' 1,293 training images.
QUICK = "digits --model resnet8 --width 8 --kernels plain --steps 45 --batch 64 --eval-every 1 --log-every 5"


def quick(out, *more):
    return [*QUICK.split(), "--out", str(out), *more]


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """(completed process, run folder) of one quick run through the real command line."""
    out = tmp_path_factory.mktemp("runs") / "quick"
    return command("train", *quick(out)), out


def test_run_leaves_what_it_promises(finished):
    done, out = finished
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((out / "result.json").read_text())
    assert result["preset"] == "digits" and result["steps"] == 45 and result["seed"] == 0
    assert result["test_accuracy"] > 0.5 and result["test_images"] == 360
    assert len(result["params_digest"]) == 64 and result["images_per_second"] > 0
    assert result["command"].startswith("python -W error -m train digits --model resnet8")
    assert result["versions"]["jax"] == jax.__version__ and result["devices"] == "1 x cpu"
    assert "images/s" in done.stderr and "left" in done.stderr and "validation accuracy" in done.stderr

    rows = read_rows(out / "metrics.jsonl")
    assert [r["step"] for r in rows if "loss" in r] == list(range(5, 46, 5))
    assert [r["step"] for r in rows if "validation_accuracy" in r] == [20, 40, 45]
    assert rows[0]["learning_rate"] == pytest.approx(0.1 * 5 / 41, rel=1e-3)  # on the way up
    assert json.loads((out / "config.json").read_text())["classes"] == [str(d) for d in range(10)]
    confusion = json.loads((out / "confusion.json").read_text())["confusion"]
    assert sum(map(sum, confusion)) == 360


def test_same_command_again(finished, capsys, fails):
    """A finished run only prints its result; other settings need a different folder."""
    done, out = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    main(quick(out))
    assert capsys.readouterr().out == done.stdout.splitlines()[-1] + "\n"
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    line = fails(2, main, quick(out, "--optim.lr", "0.2", "--batch", "32"))
    assert "different settings (optim.lr 0.1 -> 0.2, batch 64 -> 32); choose a different --out" in line


@pytest.mark.slow
def test_killed_again_and_again_it_ends_bit_equal(finished, command, killed, tmp_path):
    """SIGKILL at two moments after a save, then in the middle of one: the last start ends where the first run did."""
    _, whole = finished
    out = tmp_path / "killed"
    arguments = quick(out, "--save-steps", "3")

    def checkpoints(pattern):
        return list((out / "checkpoints").glob(pattern))

    def newest():
        return max((int(p.name) for p in checkpoints("[0-9]*") if p.name.isdigit()), default=0)

    def saved(had):
        return newest() > had

    def in_a_save(had):
        return saved(had) and checkpoints("*tmp*")  # not one that an earlier kill left: a start removes those

    for when, after in ((saved, 0.02), (saved, 0.15), (in_a_save, 0)):  # seconds
        assert killed("train", *arguments, when=partial(when, newest()), after=after) == -signal.SIGKILL
    assert checkpoints("*tmp*"), "the kill was to hit a save"

    last = command("train", *arguments)
    assert last.returncode == 0, last.stderr
    assert "resuming from step" in last.stderr
    assert not checkpoints("*tmp*")
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, out)]
    assert results[0]["params_digest"] == results[1]["params_digest"]
    assert results[0]["test_loss"] == results[1]["test_loss"]
    steps = [row["step"] for row in read_rows(out / "metrics.jsonl")]
    assert steps == sorted(steps)


class Interrupted(Exception):
    """Stands for whatever stops a process."""


def short_config(out, **options):
    return TrainConfig(out=str(out), width=8, steps=12, batch=64, save_steps=4, eval_every=100, **options)


def stop(state):
    raise Interrupted


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 3, 8])
def test_stopped_twice_with_several_steps_in_a_call(most, tmp_path, tfds_dir, one_device):
    """Its checkpoints lie inside chunks, and so do the stops: bit-equal. The run keeps its number."""
    config = short_config(tmp_path / "whole", kernels="plain", steps_per_call=most)
    whole = run(config)
    config = dataclasses.replace(config, out=str(tmp_path / "stopped"))
    for at in (5, 10):
        with pytest.raises(Interrupted):
            run(config, hooks=[(at, stop)])
        config = dataclasses.replace(config, steps_per_call=None)
    assert run(config)["params_digest"] == whole["params_digest"]
    assert read_config(tmp_path / "stopped", TrainConfig)[0].steps_per_call == most


@pytest.mark.slow
def test_first_update_does_not_depend_on_steps_per_call(tmp_path, tfds_dir, one_device):
    states = []
    for most in (1, 3, 8):
        out = tmp_path / str(most)
        run(
            dataclasses.replace(short_config(out), steps=1, steps_per_call=most, kernels="plain"),
            hooks=[(1, states.append)],
        )
    for state in states[1:]:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), state.params, states[0].params)


@pytest.mark.slow
def test_restores_from_eight_devices_to_one(tmp_path, tfds_dir, request):
    """A run that stops on 8 devices goes on, on one, to the result of one."""
    config = short_config(tmp_path / "eight")

    with pytest.raises(Interrupted):
        run(config, hooks=[(10, stop)])
    assert jax.device_count() == 8
    request.getfixturevalue("one_device")
    resumed = run(config)
    single = run(dataclasses.replace(config, out=str(tmp_path / "single")))
    assert resumed["test_loss"] == pytest.approx(single["test_loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_modes_reach_the_same_result(mode, tmp_path, tfds_dir):
    results = [run(short_config(tmp_path / m, mode=m)) for m in ("jit", mode)]
    assert results[0]["test_loss"] == pytest.approx(results[1]["test_loss"], rel=1e-4)
    assert results[0]["validation_accuracy"] == results[1]["validation_accuracy"]


@pytest.mark.slow
def test_options_of_a_run(tmp_path, tfds_dir):
    """Averaged parameters, the best checkpoint, mixing, accumulation and stochastic depth, all in one run."""
    options = "--steps 24 --eval-every 0.4 --select best --ema 0.9 --accumulate 2 --drop-path 0.1 --augment.flip"
    options += " --augment.mixup 0.2 --augment.cutmix 1.0 --augment.cutout 2 --augment.erasing 0.5"
    options += " --xla xla_cpu_enable_fast_min_max=true"
    _, config = parse("train", PRESETS, quick(tmp_path, *options.split()), default="digits")
    result = run(config)
    rows = read_rows(tmp_path / "metrics.jsonl")
    measured = {r["step"]: r["validation_accuracy"] for r in rows if "validation_accuracy" in r}
    assert list(measured) == [8, 16, 24]
    best = max(measured, key=lambda step: (measured[step], step))
    assert result["selected_step"] == best
    assert result["validation_accuracy"] == pytest.approx(measured[best])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_complete(name):
    """Each has its docstring's parts, survives JSON, and its step traces on its own shapes."""
    about = PRESETS[name].__doc__
    assert f"python -m train{'' if name == 'digits' else ' ' + name}" in about
    assert "Command:" in about and "Hardware:" in about
    config = PRESETS[name]()
    assert from_dict(TrainConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config

    assert make_model(config, 10).num_classes == 10
    size = config.data.image_size or (8 if name == "digits" else 32)
    channels = 1 if name == "digits" else 3
    if name == "digits":
        config = dataclasses.replace(config, augment=dataclasses.replace(config.augment, mean=(0.5,), std=(0.5,)))
    model = make_model(dataclasses.replace(config, model="resnet8"), 10)  # is traced faster
    tx, _ = make_tx(config.optim, 100, 10.0)
    state = jax.eval_shape(lambda: make_state(config, model, tx, (size, size, channels)))
    objective, augment = make_objective(config, 10), train_augment(config.augment)
    step = partial(train_step, model=model, tx=tx, objective=objective, augment=augment, ema_decay=config.ema)
    batch = batch_like(4, (size, size, channels))
    new, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert set(metrics) == {"loss", "accuracy", "grad_norm"}


BAD_INPUT = {
    "preset": (["digit"], "unknown preset 'digit': did you mean digits?"),
    "field": (["--optim.learning-rate", "1"], "unknown field '--optim.learning-rate': "),
    "kind of value": (["--batch", "many"], "error: --batch takes whole numbers, got 'many'"),
    "model": (["--model", "resnet19"], "unknown model 'resnet19': did you mean resnet"),
    "dataset": (["--data.name", "cifar11"], "no prepared set 'cifar11'"),
    "optimizer": (["--optim.name", "sdg"], "unknown optimizer 'sdg': did you mean sgd?"),
    "schedule": (["--optim.schedule", "cosinus"], "unknown schedule 'cosinus': did you mean cosine?"),
    "narrow": (
        ["--model", "resnet18d", "--width", "1"],
        "resnet18d is too narrow with --width 1: a layer",
    ),
    "before data": (["--data.name", "folder:nowhere", "--optim.name", "sdg"], "unknown optimizer 'sdg'"),
    "loss": (["--loss", "hinge"], "unknown loss 'hinge'"),
    "range": (["--ema", "1.5"], "--ema must be at least 0 and below 1, got 1.5"),
    "devices": (["--batch", "60"], "a batch of 60 is not divisible by 8 devices"),
    "large batch": (["--batch", "8000"], "a batch of 8000 is larger than the 1293 training images"),
    "crop": (["--augment.resized-crop", "64"], "--augment.resized-crop 64 is larger than the images, 8x8"),
    "parts": (["--accumulate", "3"], "--accumulate 3 does not divide the 8 images per device"),
    "folder": (["--data.name", "folder:nowhere"], "there is no folder nowhere"),
    "weights": (["--init", "nowhere.pth", "--width", "8"], "no weights at nowhere.pth"),
    "frozen nothing": (["--freeze"], "needs a pretrained backbone: pass --init"),
    "statistics": (["--augment.mean", "0.5", "0.5", "0.5", "--augment.std", "1", "1", "1"], "need 1 values each"),
    "local statistics": (["--no-sync-bn"], "--no-sync-bn needs --mode shard_map or pmap"),
    "compiler option": (["--xla", "fast"], "--xla 'fast' is not of the form NAME=VALUE"),
    "validation": (["--data.validation", "0"], "--data.validation must be above 0 and below 1, got 0.0"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_in_one_line(case, fails, tmp_path, tfds_dir):
    arguments, message = BAD_INPUT[case]
    out = [] if case == "preset" else ["--out", str(tmp_path / "run")]
    assert message in fails(2, main, arguments + out)
    assert not (tmp_path / "run").exists()


def test_compiler_option_that_xla_does_not_know(fails, tmp_path, tfds_dir, one_device):
    """Nothing of it is kept: the corrected command starts from scratch."""
    assert "--xla no_such_option=1: " in fails(2, main, quick(tmp_path, "--xla", "no_such_option=1"))
    assert not (tmp_path / "config.json").exists()


def test_folders_that_hold_no_run(fails, tmp_path, tfds_dir, one_device, finished):
    """The options are those of the finished run, whose programs are in the cache."""
    (tmp_path / "file").write_text("")
    assert "cannot create the run folder" in fails(2, main, quick(tmp_path / "file" / "run"))
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)
    assert "holds checkpoints but no config.json" in fails(2, main, quick(tmp_path))
    (tmp_path / "config.json").write_text("{")
    assert "config.json cannot be read" in fails(2, main, quick(tmp_path))


def test_loss_that_is_not_finite_stops_the_run(fails, tmp_path, tfds_dir, one_device):
    """Exit code 1, the step is named, the checkpoints before it stay."""
    arguments = quick(tmp_path, "--optim.schedule", "constant", "--optim.lr", "1e20", "--optim.warmup-epochs", "0")
    line = fails(1, main, [*arguments, "--save-steps", "1"])
    assert "is not finite" in line and "at step" in line and "keeps checkpoint 1" in line


@pytest.mark.slow
def test_full_disk(command, tmp_path, finished):
    """A file-size limit stands for the disk: one line, exit code 1, and a later start with room finishes the run."""
    arguments = quick(tmp_path / "run", "--save-steps", "20")

    limit = ["sh", "-c", 'ulimit -f 40 && exec "$@"', "sh"]  # 20 kB
    done = command("train", *arguments, before=limit, env={"JAX_ENABLE_COMPILATION_CACHE": "false"})
    assert done.returncode == 1, done.stderr
    assert "cannot write a checkpoint" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    again = command("train", *arguments)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["params_digest"] == json.loads(finished[0].stdout)["params_digest"]
    assert os.path.getsize(tmp_path / "run" / "result.json") > 0
