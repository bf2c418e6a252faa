"""A folder of decoded sets: the next start maps a set's file into memory instead of decoding its images again.

A file holds the checksum of all that follows, a line of JSON, and each split's pixels and labels. Its name is made of
three digests: of the set's name and place, of its content, and of how it is split and decoded.
"""

import contextlib
import hashlib
import json
import math
import os
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from train.data import decode
from train.data.sources import Arrays, Encoded

CAPACITY = 8 << 30  # bytes: beyond that the least recently used files go
SMALLEST = 4 << 20  # bytes: a smaller set is decoded in the time that it takes to find and check a file


def file_for(folder: Path, name: str, splits: Mapping[str, Encoded]) -> Path | None:
    """Return the path of a set's decoded splits in `folder`; None if it is not known which files they are read from.

    The path changes with the set's content (size and time of each file), with the images of each split and their
    order, with the shape that they are decoded to, and with what decodes them.
    """
    if not splits or any(source.files is None for source in splits.values()):
        return None
    splits = dict(sorted(splits.items()))
    files = list(dict.fromkeys(file for source in splits.values() for file in source.files or ()))
    try:
        stats = map(os.stat, files)
        content = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True)]
    except OSError:
        return None
    place = name, os.path.abspath(os.path.commonpath(files))
    labels = {split: None if x.labels is None else x.labels.tobytes() for split, x in splits.items()}
    form = [(split, x.size, x.channels, x.indices.tobytes(), labels[split]) for split, x in splits.items()]
    decoder = PIL.__version__, Path(decode.__file__).read_bytes()
    return folder / "-".join(map(_digest, (place, content, (form, decoder))))


def exists(folder: Path, name: str, splits: Mapping[str, Encoded]) -> bool:
    """Whether the set's decoded splits are in `folder`."""
    file = file_for(folder, name, splits)
    return file is not None and file.is_file()


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read(path: Path, name: str) -> tuple[dict[str, Arrays], list[str]] | None:
    """Map (splits, a line for each image that could not be decoded) of the set `name`; None if there is no good file.

    Says on stderr if the file is damaged, or if the set has changed since it was decoded, whose file is then removed.
    """
    place, content, _ = path.name.split("-")
    try:
        with path.open("rb") as file:
            file.readline(9)
            header = file.readline()
        data = np.asarray(np.memmap(path, np.uint8, "r"))
        if zlib.crc32(data[9:].data) != int(data[:8].tobytes(), 16):
            raise ValueError("checksum")
    except FileNotFoundError:
        stale = [p for p in path.parent.glob(f"{place}-*") if p.name.split("-")[1] != content]
        if stale:
            print(f"note: {name} has changed since it was decoded: decoding it again", file=sys.stderr)
        _remove(stale)
        return None
    except OSError:
        return None
    except ValueError:
        print(f"note: {path} is damaged: decoding the images again", file=sys.stderr)
        return None
    with contextlib.suppress(OSError):  # a folder that is shared, and read-only
        os.utime(path)
    about, start, splits = json.loads(header), 9 + len(header), {}
    for split, shape in about["shapes"].items():
        middle = start + math.prod(shape)
        end = middle + 4 * shape[0]
        labels = np.frombuffer(data[middle:end].tobytes(), np.int32)
        splits[split] = Arrays(images=data[start:middle].reshape(shape), labels=labels)
        start = end
    return splits, about["broken"]


def write(path: Path, splits: Mapping[str, Arrays], broken: Sequence[str]) -> None:
    """Write splits to a file in one piece, after making room for it; says on stderr if the folder takes none."""
    header = json.dumps({"shapes": {split: x.images.shape for split, x in splits.items()}, "broken": broken}).encode()
    header += b" " * (-(len(header) + 10) % 64) + b"\n"  # JAX can use aligned pixels in place
    parts = [memoryview(header)]
    for source in splits.values():
        parts += [np.ascontiguousarray(x).data for x in (source.images, source.labels.astype(np.int32))]
    if (size := sum(part.nbytes for part in parts)) > CAPACITY:
        return
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _make_room(path.parent, size)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            target = Path(scratch) / path.name
            with target.open("wb") as file:
                file.write(b"%08x\n" % checksum)
                file.writelines(parts)
            os.replace(target, path)  # atomic: two processes may decode the same set
    except OSError as error:
        print(f"note: the decoded images are not kept in {path.parent}: {error.strerror}", file=sys.stderr)


def _make_room(folder: Path, size: int) -> None:
    """Remove the least recently used files until one of `size` bytes fits."""
    with contextlib.suppress(OSError):  # another process may remove them too
        stats = {file: file.stat() for file in folder.rglob("*") if file.is_file()}
        excess = sum(stat.st_size for stat in stats.values()) + size - CAPACITY
        for file in sorted(stats, key=lambda file: stats[file].st_mtime):
            if excess > 0:
                _remove([file])
                excess -= stats[file].st_size


def _remove(files: Sequence[Path]) -> None:
    for file in files:
        with contextlib.suppress(OSError):
            file.unlink()
