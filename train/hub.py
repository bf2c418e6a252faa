"""Models by name: their files, and what these say of the model and its images.

A name is that of a folder in `ZOO`, or on the Hugging Face hub `hf:OWNER/NAME` or `hf:OWNER/NAME@REVISION`. Only
safetensors and JSON files are read, never a pickle.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from resnet_jax.resnet import STAGES, BasicBlock
from train.errors import UsageError, suggestion
from train.paths import local_path
from train.reachable import connect

WEIGHTS = "model.safetensors"
CROP = 0.875  # timm's default
ZOO = Path(__file__).parent / "zoo"  # the models that come with this project, each laid out like a folder of the hub


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the files next to a model's weights say of it; None where they say nothing.

    Attributes:
      model: name in `MODELS`, or of an architecture that is not among them.
      classes: number of outputs; None for features.
      labels: name of each class, as the training set spells it; empty if unknown.
      resize, size: side in pixels of the square to resize an image's centre to, and of the centre crop of that.
      mean, std: of each channel, for pixels in [0, 1].
    """

    model: str
    classes: int | None = None
    labels: tuple[str, ...] = ()
    resize: int | None = None
    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __str__(self) -> str:
        sides = [f"{self.size} pixels cropped from {self.resize}"] if self.size else []
        channels = {"mean": self.mean, "std": self.std}
        moments = [f"{name} {' '.join(f'{x:g}' for x in values)}" for name, values in channels.items() if values]
        return ", ".join([self.model, *sides, *moments])


def make_card(model: str, classes: int | None, size: int | None, crop: float | None, mean: Any, std: Any) -> Card:
    """Make a card from the side of the images, and the fraction of the resized images that it is."""
    resize = int(size / (crop or CROP)) if size else None
    moments: dict[str, Any] = {"mean": tuple(mean) if mean else None, "std": tuple(std) if std else None}
    return Card(model=model, classes=classes or None, resize=resize, size=size, **moments)


def is_hub_name(source: str | Path) -> bool:
    """Whether a source of weights is a name on the hub."""
    return re.match("(hf|hf-hub|hf_hub):", str(source), re.IGNORECASE) is not None


def source_path(source: str | Path) -> Path:
    """Make the path of a source of weights: what is there, else the folder of the model of that name in `ZOO`.

    A name on the hub stays one, which `is_hub_name` knows.

    Raises:
      UsageError: see `local_path`; or nothing is there, and the name of a model in `ZOO` is similar.
    """
    if is_hub_name(source):
        return Path(source)
    path, name = local_path(source), str(source)
    if path.exists() or path.name != name:
        return path
    names = [folder.name for folder in ZOO.iterdir()]
    if name not in names and (hint := suggestion(name, names)):
        raise UsageError(f"no folder, file or model here is called {name}: {hint.strip()}")
    return ZOO / name if name in names else path


def download(name: str, file: str) -> Path:
    """Find a file of a model on the hub: in the local cache, else it is downloaded.

    Raises:
      UsageError: a malformed name, no such model or file, no network, or huggingface_hub is not installed.
    """
    match = re.fullmatch(r"[\w-]+:/{0,2}([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?", name)
    if match is None:
        raise UsageError(f"{name} is not of the form hf:OWNER/NAME or hf:OWNER/NAME@REVISION")
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError:
        raise UsageError(f'{name} needs huggingface_hub: pip install -e ".[hub]"') from None
    repository, revision = match.groups()
    try:
        # Without the test, huggingface_hub tries for half a minute.
        return Path(hf_hub_download(repository, file, revision=revision, local_files_only=not _reachable()))
    except errors.GatedRepoError:
        reason = "is gated: accept its terms on the hub, then log in (hf auth login)"
    except errors.RepositoryNotFoundError:
        reason = "does not exist, or is private: log in (hf auth login)"
    except errors.RevisionNotFoundError:
        reason = f"has no revision {revision}"
    except errors.LocalEntryNotFoundError:
        reason = f"cannot be reached (no network, or offline), and {file} is not in the local cache"
    except errors.EntryNotFoundError:
        reason = f"has no {file}; pickles are not read"
    except Exception as error:  # any of several HTTP libraries, a full disk, a read-only cache
        reason = f"cannot be read: {' '.join(str(error).split())[:200]}"
    raise UsageError(f"{name} {reason}")


def _reachable() -> bool:
    """Whether the hub, or the proxy on the way to it, takes connections."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    hub = urlsplit(constants.ENDPOINT)
    proxies = {} if proxy_bypass(hub.hostname or "") else getproxies()
    try:
        connect(proxies.get(hub.scheme, proxies.get("all", constants.ENDPOINT)))
    except OSError:
        return False
    return True


def read_card(source: str | Path) -> Card | None:
    """Read the card of a model in `ZOO` or on the hub, or of a folder laid out like one; None for other sources.

    Raises:
      UsageError: see `download`.
    """
    folder = source_path(source)
    folder = folder if folder.is_dir() else folder.parent

    def read(file: str) -> dict[str, Any]:
        path = download(str(source), file) if is_hub_name(source) else folder / file
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError):
            content = None
        return content if isinstance(content, dict) else {}

    config = read("config.json")
    try:
        if "pretrained_cfg" in config:
            return _timm_card(config)
        if config.get("model_type") == "resnet":
            return _transformers_card(config, read("preprocessor_config.json"))
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UsageError(f"the config.json of {source} is not understood: {error!r}") from None
    if is_hub_name(source):
        raise UsageError(f"{source} is not a model of timm, nor a ResNet of transformers: its config.json names none")
    return None


def _timm_card(config: dict[str, Any]) -> Card:
    about = config["pretrained_cfg"]
    classes = config.get("num_classes", about.get("num_classes"))
    size = about["input_size"][-1] if "input_size" in about else None
    card = make_card(config["architecture"], classes, size, about.get("crop_pct"), about.get("mean"), about.get("std"))
    labels = tuple(config.get("label_names") or ())
    return replace(card, labels=labels) if len(labels) == classes else card


def _transformers_card(config: dict[str, Any], images: dict[str, Any]) -> Card:
    shape = tuple(config["depths"]), config["layer_type"] == "basic"
    depths = {(stages, block is BasicBlock): depth for depth, (stages, block) in STAGES.items()}
    known = shape in depths and not config.get("downsample_in_bottleneck")
    model = f"resnet{depths[shape]}" if known else f"ResNet of {config['depths']} {config['layer_type']} blocks"
    size = images.get("size")
    size = size.get("shortest_edge", size.get("height")) if isinstance(size, dict) else size
    crop, mean, std = (images.get(name) for name in ("crop_pct", "image_mean", "image_std"))
    return make_card(model, len(config.get("id2label", ())), size, crop, mean, std)
