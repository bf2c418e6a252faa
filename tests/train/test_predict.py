"""Using a run: predictions by path, bytes and array, from the command line and from Python; fine-tuning from it."""

import io
import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from resnet_jax.torch_weights import to_torch
from resnet_jax.tree import leaves
from tests.reference.compare import assert_equal
from train.config import AugmentConfig, DataConfig, OptimConfig, TrainConfig
from train.data.sets import load as load_data
from train.errors import UsageError
from train.predict import load, main
from train.run import run
from train.run_folder import load_state
from train.state import forward
from train.weights import load_weights, read_state_dict

pytestmark = pytest.mark.usefixtures("one_device_for_all")


def config(out, **options):
    base = {"data": DataConfig(name="synthetic", image_size=8), "optim": OptimConfig(lr=0.05), "batch": 64}
    return TrainConfig(out=str(out), width=8, **({"steps": 25, "eval_every": 100} | base | options))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on `synthetic` and its test split."""
    out = tmp_path_factory.mktemp("trained") / "run"
    return run(config(out)), out, load_data("synthetic", image_size=8).test


@pytest.fixture(scope="module")
def predict(trained):
    return load(trained[1])


def png(array):
    encoded = io.BytesIO()
    Image.fromarray(array).save(encoded, "PNG")
    return encoded.getvalue()


def test_predictions_are_the_evaluation_s(trained):
    """On the test split, top-1 is right exactly as often as the run's result says."""
    result, out, test = trained
    found = load(out, top=3)(list(test.images))
    assert all(len(row) == 3 for row in found)
    right = np.mean([int(row[0][0]) == label for row, label in zip(found, test.labels, strict=True)])
    assert right == pytest.approx(result["test_accuracy"])
    assert all(row[0][1] >= row[1][1] >= row[2][1] > 0 for row in found)


def test_paths_bytes_arrays_and_the_command_line_agree(trained, predict, tmp_path, capsys):
    _, out, test = trained
    image, path = test.images[0], tmp_path / "image.png"
    path.write_bytes(png(image))
    by_array = predict(image)
    assert by_array == predict(png(image)) == predict(path) == predict(str(path))
    assert predict([image]) == [by_array]
    main([str(out), str(path), "--top", "2"])
    said = capsys.readouterr()
    assert json.loads(said.out) == [{"image": str(path), "top": [list(pair) for pair in by_array[:2]]}]
    assert f"{path}: {by_array[0][0]} " in said.err


def test_lists_of_any_length(trained, monkeypatch):
    """Images are computed in chunks of few shapes, so few programs are compiled, and memory does not grow."""
    images, rows = list(trained[2].images[:71]), []

    def counted(model, variables, x):
        rows.append(len(x))
        return forward(model, variables, x)

    monkeypatch.setattr("train.predict.forward", counted)
    predict = load(trained[1], top=2)
    lists = {count: predict(images[:count]) for count in (71, 70, 33, 7, 5, 1, 0)}
    assert sorted(rows) == [1, 8, 32]  # traced once each
    for count, found in lists.items():
        assert [row[0][0] for row in found] == [row[0][0] for row in lists[71][:count]]
    with pytest.raises(UsageError, match="must be at least 1, got 0"):
        load(trained[1], top=0)


def test_broken_images_are_named_and_cost_nothing_else(trained, predict, tmp_path, fails, capsys):
    image = trained[2].images[0]
    for name, content in {"good": png(image), "cut": png(image)[:60], "text": b"no image"}.items():
        (tmp_path / f"{name}.png").write_bytes(content)
    paths = [str(tmp_path / f"{name}.png") for name in ("text", "good", "cut")]
    with pytest.raises(UsageError, match=rf"^cannot read image {paths[0]}: not an image \(and 1 more of 3 images\)$"):
        main([str(trained[1]), *paths])
    text, good, cut = json.loads(capsys.readouterr().out)
    assert good == {"image": paths[1], "top": [list(pair) for pair in predict(image)]}
    assert text == {"image": paths[0], "error": f"cannot read image {paths[0]}: not an image"}
    assert cut["error"].startswith(f"cannot read image {paths[2]}: ") and "0x" not in cut["error"]
    assert fails(2, main, [str(trained[1]), paths[2]]).endswith(cut["error"])


def test_other_sizes_and_modes_are_brought_to_the_run_s(trained, predict):
    image = Image.fromarray(trained[2].images[0])
    grey = np.asarray(image.convert("L"))
    for array in (np.asarray(image.resize((48, 32))), grey, grey[..., None]):
        assert len(predict(array)) == 5


def test_whatever_holds_an_image(trained, predict, tmp_path, monkeypatch):
    """Open files, Pillow images, buffers, arrays of paths, generators; a palette's indices are not colours."""
    image, path = trained[2].images[0], tmp_path / "image.png"
    path.write_bytes(png(image))
    want = predict(image)
    palette = Image.fromarray(image).quantize(64)
    monkeypatch.setenv("HOME", str(tmp_path))
    with Image.open(path) as opened, path.open("rb") as file:
        for same in (opened, file, bytearray(png(image)), np.str_(path), jax.numpy.asarray(image)):
            assert predict(same) == want
    assert predict("~/image.png") == want
    assert predict(palette) == predict(np.asarray(palette.convert("RGB")))
    for many in (np.asarray([str(path)] * 2), (path for _ in range(2)), {path: 1, str(path): 2}, [path, image]):
        assert [[name for name, _ in found] for found in predict(many)] == [[name for name, _ in want]] * 2
    assert predict([]) == predict(np.asarray([], str)) == []
    row = np.zeros((1, 8, 3), np.uint8)
    assert predict(row) == predict(png(row))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("nowhere.png", "^cannot read image nowhere.png: No such file or directory$"),
        (b"no image", "^cannot read image: not an image$"),
        ([png(np.zeros((8, 8, 3), np.uint8)), b"no image"], "^cannot read image number 1: not an image$"),
        (np.zeros((8, 8, 3)), "must be uint8"),
        (np.zeros((2, 2, 2, 2), np.uint8), "cannot read image.*pass several images as a list"),
        (np.zeros((3, 8, 8), np.uint8), "cannot read image.*moveaxis"),
        (np.ones((8, 8, 3), np.float32), r"must be uint8 \[H, W, C\], not float32 .*multiply by 255"),
        (np.zeros((8, 8, 7), np.uint8), "must be uint8"),
        (np.zeros((0, 0, 3), np.uint8), "must be uint8"),
        (Image.new("RGB", (0, 5)), "it has no pixels"),
        (None, "must be uint8"),
    ],
)
def test_images_that_cannot_be_read(predict, image, message):
    with pytest.raises(UsageError, match=message):
        predict(image)


def test_folders_that_hold_no_run(trained, tmp_path, fails):
    arguments = [str(tmp_path), "image.png"]
    for more in ([], ["--least", "0.5"]):
        assert "is not a run folder: it has no config.json" in fails(2, main, [*arguments, *more])
    assert "argument --top: invalid int value: 'nan'; see --help" in fails(2, main, [*arguments, "--top", "nan"])
    saved = json.loads((trained[1] / "config.json").read_text())
    for changed, message in (
        (saved | {"config": saved["config"] | {"model": "resnet9"}}, "unknown model 'resnet9'"),
        ({"config": saved["config"]}, "config.json does not name the classes of the run"),
        (saved, "has no checkpoints yet"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        assert message in fails(2, main, arguments)
    (tmp_path / "checkpoints").mkdir()
    assert "has no checkpoints yet" in fails(2, main, arguments)


def save_photographs(root, count, shape):
    """A folder of two classes that colour tells apart."""
    rng = np.random.default_rng(0)
    for name, colour in {"blue": (40, 40, 200), "red": (200, 40, 40)}.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(rng.normal(colour, 30, shape), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def test_run_on_images_that_are_not_square(tmp_path):
    """The run keeps their shape, and brings other images to it."""
    save_photographs(tmp_path / "photos", 10, (12, 16, 3))
    (tmp_path / "photos" / "red" / "notes.txt").touch()
    data = DataConfig(name=f"folder:{tmp_path / 'photos'}", validation=0.2)
    run(config(tmp_path / "run", data=data, batch=8, steps=12))
    assert (tmp_path / "run" / "skipped.txt").read_text() == f"{tmp_path}/photos/red/notes.txt: .txt\n"
    predict, path = load(tmp_path / "run"), tmp_path / "photos" / "red" / "0.png"
    found = predict(path)
    assert found[0][0] == "red"
    with Image.open(path) as opened:
        assert found == predict(np.asarray(opened)) == predict(path.read_bytes()) == predict(opened)
        assert predict(opened.resize((31, 77)))[0][0] == "red"


# ---- fine-tuning ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return save_photographs(tmp_path_factory.mktemp("photographs"), 24, (20, 24, 3))


def finetune(trained, photographs, out, init, **options):
    data = DataConfig(name=f"folder:{photographs}", image_size=8, validation=0.2)
    return config(out, data=data, init=str(init), batch=16, steps=12, **options)


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [False, True])
def test_finetune_from_a_run(trained, photographs, tmp_path, freeze):
    _, source, _ = trained
    options = {"freeze": freeze, "optim": OptimConfig(lr=0.1), "augment": AugmentConfig(flip=True)}
    result = run(finetune(trained, photographs, tmp_path, source, **options))
    assert result["test_accuracy"] >= 0.9
    before, after = leaves(load_state(source).variables), leaves(load_state(tmp_path).variables)
    assert after["params/head/bias"].shape == (2,) and before["params/head/bias"].shape == (10,)
    same = [np.array_equal(before[p], after[p]) for p in before if "/head/" not in p]
    assert all(same) if freeze else not any(same)
    assert load(tmp_path)(photographs / "red" / "0.png")[0][0] == "red"


def test_finetune_from_torch_weights(trained, photographs, tmp_path):
    """A torchvision-style state dict in safetensors: the backbone arrives bit by bit, the head is new."""
    source = load_state(trained[1]).variables
    save_file(to_torch(source), tmp_path / "weights.safetensors")
    assert_equal(load_weights(tmp_path / "weights.safetensors", jax.tree.map(np.zeros_like, source)), source)
    result = run(finetune(trained, photographs, tmp_path / "run", tmp_path / "weights.safetensors"))
    assert result["test_accuracy"] >= 0.9


def test_wrapped_pth_file(trained, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    source = load_state(trained[1]).variables
    state = {name: torch.from_numpy(np.array(array)) for name, array in to_torch(source).items()}
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "weights.pth")
    assert_equal(load_weights(tmp_path / "weights.pth", source), source)


def test_pth_without_torch_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"PK\x03\x04")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(UsageError, match=r'pip install -e "\.\[parity\]"'):
        read_state_dict(tmp_path / "weights.pth")


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_damaged_weights(tmp_path, name):
    if name.endswith("pth"):
        pytest.importorskip("torch", reason="needs the extra parity")
    (tmp_path / name).write_bytes(b"no weights at all")
    with pytest.raises(UsageError, match="is not a readable"):
        read_state_dict(tmp_path / name)


def test_weights_of_another_model(trained, tmp_path):
    _, source, _ = trained
    wider = jax.tree.map(lambda x: np.concatenate([x, x]), load_state(source).variables)
    with pytest.raises(UsageError, match=r"different model: .* differ; the first is \d+ there and \d+ here"):
        load_weights(source, wider)
    save_file({"conv1.weight": np.zeros((3, 3, 3, 3), np.float32)}, tmp_path / "weights.safetensors")
    with pytest.raises(UsageError, match=r"weights.safetensors: "):
        load_weights(tmp_path / "weights.safetensors", load_state(source).variables)
