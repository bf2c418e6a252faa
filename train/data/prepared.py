"""TFDS sets prepared as ArrayRecord: where they are, and their records, read without TensorFlow."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.data.prepare import prepare
from train.errors import UsageError
from train.paths import is_folder, local_path


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A prepared set: its `folder` and TFDS `features`, and by split encoded `records` and the paths of `files`."""

    folder: Path
    features: Any
    records: dict[str, Any]
    files: dict[str, list[str]]


def open_prepared(name: str, data_dir: Path | None, *, reader: str = "folder") -> Prepared:
    """Open a prepared set by name (`NAME`, `NAME/VERSION` or `NAME/CONFIG/VERSION`); nothing is decoded or parsed.

    `reader` is the prefix of names of plain images, for the messages. The splits are train and, where the set has
    them, validation and test.

    Raises:
      UsageError: no such set, no training split, a format without random access.
    """
    import tensorflow_datasets as tfds

    # Only `digits` can be prepared on demand: the others need TensorFlow and a download.
    root = data_dir or default_data_dir()
    folder = prepared_folder(name, root) or (prepare(name, root) if name == "digits" else None)
    if folder is None:
        have = sorted(p.name for p in root.glob("*") if prepared_folder(p.name, root)) if root.is_dir() else []
        if is_folder(name):
            raise UsageError(f"no prepared set {name!r}, but a folder of this name: did you mean {reader}:{name}?")
        if meant := re.fullmatch(r"(?:image)?folder[:/=](.+)", name, re.IGNORECASE):
            raise UsageError(f"no prepared set {name!r}: did you mean {reader}:{meant[1]}?")
        raise UsageError(
            f"no prepared set {name!r} in {root} (there: {', '.join(have) or 'none'}); 'python -m train.data prepare "
            f"{name}' prepares a stock TFDS set, --data.dir names a different folder, {reader}:DIR reads plain images"
        )
    builder = tfds.builder_from_directory(folder)
    known = [s for s in ("train", "validation", "test") if s in builder.info.splits]
    if "train" not in known:
        raise UsageError(f"{name} has no split named train (there: {', '.join(builder.info.splits)})")
    # TFDS's own parser takes as long as decoding a small image.
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    try:
        records = {split: builder.as_data_source(split, deserialize_method=raw) for split in known}
    except NotImplementedError:
        raise UsageError(
            f"{folder} is stored in a format without random access: prepare it as array_record, "
            f"with 'python -m train.data prepare {name}' and a different --dir"
        ) from None
    files = {split: [str(path) for path in builder.info.splits[split].filepaths] for split in known}
    return Prepared(folder=folder, features=builder.info.features, records=records, files=files)


def default_data_dir() -> Path:
    """TFDS's data_dir: `TFDS_DATA_DIR`, else tensorflow_datasets in the user's home."""
    return local_path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def prepared_folder(name: str, root: Path) -> Path | None:
    """Find the folder of a prepared set's newest version, or of the version that `name` ends with, else None."""
    if Path(name).name in ("", ".."):
        return None  # it would match any set
    folder = local_path(root / name)
    paths = (folder, *folder.glob("*"), *folder.glob("*/*"))
    versions = [p for p in paths if re.fullmatch(r"\d+\.\d+\.\d+", p.name) and (p / "dataset_info.json").is_file()]
    return max(versions, key=lambda path: tuple(map(int, path.name.split("."))), default=None)
