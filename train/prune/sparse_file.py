"""Pruned networks on disk: a bit per prunable weight, and the kept weights, in a safetensors container.

A safetensors header costs about 100 bytes a tensor, so a file holds a few long vectors and not a tensor a leaf:

| tensor | what |
|---|---|
| `layout` | uint8, deflated JSON: [path, shape, masked] of every leaf, sorted by path |
| `mask` | uint8, the bits of all masked leaves, packed; deflated where that is smaller |
| `values` | float32 or int8, the kept weights of all masked leaves |
| `scales` | float32, of int8 values: one per output channel |
| `dense` | float32, all other leaves |

The safetensors metadata has one entry, named by `FORMAT`: JSON with the caller's metadata, and a sha256 over it and all
tensors. Equal networks make equal files, byte for byte, with the same zlib.
"""

import gzip
import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from resnet_jax.tree import PyTree
from train.errors import RunError, UsageError

NAME, VERSION = "resnet-jax sparse", 1
FORMAT = f"{NAME} {VERSION}"

# Masks and JSON inflate a thousandfold: what a small forged file could ask for ends here.
MAX_MASKED = 2**28  # weights, twice those of the largest of MODELS: 1 GiB of float32
MAX_LAYOUT = 2**20  # bytes of JSON: over 10 000 leaves, ten times those of the deepest

# int8 scales are normal numbers, so that no device flushes them to zero, whose multiples up to 127 are finite.
LEVELS = 127
SCALES = np.finfo(np.float32).tiny, np.nextafter(np.finfo(np.float32).max / np.float32(LEVELS), np.float32(0))


class Leaf(NamedTuple):
    """One leaf of the layout: its keys, its shape (None for an empty dict), whether it has a mask of that shape."""

    path: tuple[str, ...]
    shape: tuple[int, ...] | None
    masked: bool


def save_sparse(
    path: Path,
    variables: dict[str, PyTree],
    masks: PyTree,
    *,
    values: Literal["float32", "int8"] = "float32",
    metadata: Mapping[str, str] = {},
) -> None:
    """Write a pruned network in one piece: readers see the old file or the new one.

    Args:
      variables: {"params": ..., "batch_stats": ...}, nested dicts of float32 arrays.
      masks: boolean tree like `params`, 0-d True where a leaf is never pruned. What it keeps is written, zeros too;
        what it prunes must be zero, and loads as +0.0.
      values: of kept weights of masked leaves, all other leaves being float32. "float32" is exact; "int8" is symmetric,
        with a scale max|w| / 127 for each output channel (the last axis; one scale for a leaf of fewer than two axes),
        and off by at most half a scale, up to float32's rounding.
      metadata: what `load_sparse` shall give back.

    Raises:
      ValueError: a pruned weight is not zero; masks not shaped like `params`; a leaf that is not float32, or for int8
        not finite; a network too large for the format. The message names the leaf.
      RunError: the disk is full or refuses.
    """
    if values not in ("float32", "int8"):
        raise ValueError(f"values must be float32 or int8, got {values!r}")
    if not _are_texts(metadata):
        raise ValueError("metadata must map strings to strings")
    tensors = _encode(variables, masks, values)
    head = {"metadata": dict(metadata), "sha256": _digest(metadata, tensors)}
    # In one entry: safetensors writes several in random order (https://github.com/safetensors/safetensors/issues/584).
    content = save(tensors, {FORMAT: json.dumps(head, sort_keys=True)})
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise RunError(f"cannot write {path}: {error}") from None


def load_sparse(path: Path) -> tuple[dict[str, PyTree], PyTree, dict[str, str]]:
    """(variables, masks, metadata) as they were saved: nested dicts of NumPy arrays, float32 and bool.

    Raises:
      UsageError: no such file, one of another kind or version, or a damaged one.
    """
    metadata, tensors = _read(path)
    try:
        return *_decode(tensors), metadata
    except (ValueError, TypeError, KeyError, RecursionError, zlib.error) as error:
        raise UsageError(f"{path} is damaged: its parts do not fit together ({error})") from None


def is_sparse_file(path: Path) -> bool:
    """Whether `path` is a file that `save_sparse` of any version wrote, by its metadata; False if it cannot be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            return any(name.startswith(f"{NAME} ") for name in file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def sizes(path: Path, variables: dict[str, PyTree]) -> dict[str, float]:
    """Measured bytes of a sparse file, and of what it stands for.

    Returns:
      `file_bytes`; `dense_bytes` of a float32 safetensors file of `variables`, a tensor a leaf; `gzip_bytes` of that,
      gzipped at level 9; `ratio`, `dense_bytes / file_bytes`.
    """
    flat = flatten_dict(variables)
    dense = save({"/".join(keys): np.ascontiguousarray(leaf, np.float32) for keys, leaf in flat.items()})
    file_bytes = path.stat().st_size
    return {
        "file_bytes": file_bytes,
        "dense_bytes": len(dense),
        "gzip_bytes": len(gzip.compress(dense, 9)),
        "ratio": len(dense) / file_bytes,
    }


def _encode(variables: dict[str, PyTree], masks: PyTree, kind: str) -> dict[str, np.ndarray]:
    """The tensors of a file, each [n]."""
    flat = flatten_dict(variables, keep_empty_nodes=True)
    flat_masks = flatten_dict({"params": masks}, keep_empty_nodes=True)
    unmatched = sorted({keys for keys in flat if keys[0] == "params"} ^ flat_masks.keys())
    if unmatched:
        raise ValueError(f"masks are not shaped like params: {'/'.join(unmatched[0])} is not in both")

    layout: list[Leaf] = []
    dense, bits, kept, scales = [], [], [], []
    for keys in sorted(flat):
        name = "/".join(keys)
        mask = _mask(name, flat[keys], flat_masks[keys]) if keys in flat_masks else None
        if flat[keys] is empty_node:
            layout.append(Leaf(keys, None, False))
            continue
        array = np.asarray(flat[keys])
        if array.dtype != np.float32:
            raise ValueError(f"{name} is {array.dtype}, not float32")
        layout.append(Leaf(keys, array.shape, mask is not None))
        if mask is None:
            dense.append(array.ravel())
            continue
        if array[~mask].any():
            raise ValueError(f"{name} has pruned weights that are not zero: apply the masks first")
        if kind == "int8":
            if not np.isfinite(array).all():
                raise ValueError(f"{name} has weights that are not finite, which int8 cannot hold")
            array, scale = _quantize(array)
            scales.append(scale.ravel())
        bits.append(mask.ravel())
        kept.append(array[mask])

    text = json.dumps(layout, separators=(",", ":")).encode()
    if len(text) > MAX_LAYOUT or sum(b.size for b in bits) > MAX_MASKED:
        raise ValueError(f"the network is too large: over {MAX_LAYOUT} bytes of layout or {MAX_MASKED} masked weights")
    packed = np.packbits(_join(bits, bool)).tobytes()
    tensors = {
        "layout": np.frombuffer(_deflate(text), np.uint8),
        # The shortest: repeats are found in structured masks, and only spoil the code of scattered ones. A reader knows
        # by the length whether it is deflated.
        "mask": np.frombuffer(
            min(packed, _deflate(packed), _deflate(packed, strategy=zlib.Z_HUFFMAN_ONLY), key=len), np.uint8
        ),
        "values": _join(kept, kind),
        "dense": _join(dense, np.float32),
    }
    return tensors | ({"scales": _join(scales, np.float32)} if kind == "int8" else {})


def _decode(tensors: dict[str, np.ndarray]) -> tuple[dict[str, PyTree], PyTree]:
    """(variables, masks) of a file's tensors; what they claim is checked before memory is asked for.

    Raises:
      ValueError, TypeError, KeyError, RecursionError, zlib.error: they do not fit together.
    """
    leaves = _layout(tensors["layout"])
    arrays: dict[tuple[str, ...], Any] = {leaf.path: empty_node for leaf in leaves if leaf.shape is None}
    masks: dict[tuple[str, ...], Any] = {keys: empty_node for keys in arrays if keys[0] == "params"}

    dense = [(leaf.path, leaf.shape) for leaf in leaves if leaf.shape is not None and not leaf.masked]
    for (keys, shape), vector in zip(dense, _split(tensors["dense"], [math.prod(s) for _, s in dense]), strict=True):
        arrays[keys] = vector.reshape(shape)
        if keys[0] == "params":
            masks[keys] = np.ones((), bool)

    masked = [(leaf.path, leaf.shape) for leaf in leaves if leaf.shape is not None and leaf.masked]
    counts = [math.prod(shape) for _, shape in masked]
    total = sum(counts)
    if total > MAX_MASKED:
        raise ValueError(f"{total} masked weights, more than {MAX_MASKED}")
    packed, packed_bytes = tensors["mask"].tobytes(), -(-total // 8)
    if len(packed) < packed_bytes:
        packed = _inflate(packed, packed_bytes)
    if len(packed) != packed_bytes:
        raise ValueError("mask of another length")
    bits = _split(np.unpackbits(np.frombuffer(packed, np.uint8), count=total).view(bool), counts)

    kept = _split(tensors["values"], [int(b.sum()) for b in bits])
    quantized = tensors["values"].dtype == np.int8
    if quantized and (tensors["values"] < -LEVELS).any():
        raise ValueError("values out of range")
    scales = _scales(tensors["scales"], [shape for _, shape in masked]) if quantized else []
    for i, (keys, shape) in enumerate(masked):
        masks[keys] = mask = bits[i].reshape(shape)
        arrays[keys] = array = np.zeros(shape, np.float32)
        array[mask] = kept[i] * np.broadcast_to(scales[i], shape)[mask] if quantized else kept[i]
    # In the order of the paths again, as dicts keep it.
    variables = unflatten_dict({leaf.path: arrays[leaf.path] for leaf in leaves})
    tree = unflatten_dict({leaf.path: masks[leaf.path] for leaf in leaves if leaf.path in masks})
    return variables, tree["params"]


def _read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """(metadata, tensors, each [n]) of a sparse file whose checksum is right; UsageError otherwise."""
    dtypes = {"layout": {"U8"}, "mask": {"U8"}, "values": {"F32", "I8"}, "scales": {"F32"}, "dense": {"F32"}}
    damaged = f"{path} is damaged"
    try:
        with safe_open(path, framework="numpy") as file:
            entries = file.metadata() or {}
            if FORMAT not in entries:
                raise _not_ours(path, entries)
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            for name, part in parts.items():
                if part.get_dtype() not in dtypes.get(name, ()) or len(part.get_shape()) != 1:
                    raise UsageError(f"{damaged}: {name!r} is no part of a sparse file")
            tensors = {name: file.get_tensor(name) for name in parts}
    except FileNotFoundError:
        raise UsageError(f"no sparse file at {path}") from None
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is damaged, or no sparse file: {error}") from None
    try:
        head = json.loads(entries[FORMAT])
        metadata, sha256 = head["metadata"], head["sha256"]
        readable = _are_texts(metadata)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        readable = False
    if not readable:
        raise UsageError(f"{damaged}: its metadata cannot be read")
    if sha256 != _digest(metadata, tensors):
        raise UsageError(f"{damaged}: its checksum differs; export or copy it again")
    needed = dtypes.keys() - ({"scales"} if tensors.get("values", np.empty(0)).dtype == np.float32 else set())
    if tensors.keys() != needed:
        raise UsageError(f"{damaged}: its parts are {', '.join(sorted(tensors))}")
    return metadata, tensors


def _not_ours(path: Path, entries: Mapping[str, str]) -> UsageError:
    versions = [name.removeprefix(NAME).strip() for name in entries if name.startswith(f"{NAME} ")]
    if versions:
        return UsageError(f"{path} is a sparse file of version {versions[0]}, not {VERSION}: update resnet-jax")
    return UsageError(f"{path} is a safetensors file, but no sparse file of resnet-jax")


def _are_texts(metadata: Mapping[str, Any]) -> bool:
    return all(isinstance(text, str) for item in metadata.items() for text in item)


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 over metadata and tensors; lengths go first, so that no two contents read alike."""
    sha = hashlib.sha256()
    parts = [FORMAT.encode(), json.dumps(sorted(metadata.items())).encode()]
    for name, tensor in sorted(tensors.items()):
        parts += [f"{name} {tensor.dtype}".encode(), tensor.tobytes()]
    for part in parts:
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()


def _layout(tensor: np.ndarray) -> list[Leaf]:
    """The leaves in a `layout`; ValueError or TypeError unless they make a tree with shapes and masks in `params`."""
    leaves = []
    for keys, shape, masked in json.loads(_inflate(tensor.tobytes(), MAX_LAYOUT)):
        leaf = Leaf(tuple(keys), None if shape is None else tuple(shape), masked)
        good_keys = leaf.path and all(type(key) is str for key in leaf.path)
        good_shape = all(type(n) is int and n >= 0 for n in leaf.shape or ())
        if not good_keys or not good_shape or (masked and (leaf.path[0] != "params" or shape is None)):
            raise ValueError(f"odd leaf {str(leaf.path)[:80]}")
        leaves.append(leaf)
    # Sorted: a leaf comes right before what would lie under it.
    for (a, *_), (b, *_) in pairwise(leaves):
        if a >= b or b[: len(a)] == a:
            raise ValueError(f"path out of order {str(b)[:80]}")
    return leaves


def _mask(name: str, leaf: Any, mask: Any) -> np.ndarray | None:
    """A mask as NumPy's, or None if it is a 0-d True; ValueError unless it is boolean and of the leaf's shape."""
    if (leaf is empty_node) != (mask is empty_node):
        raise ValueError(f"masks are not shaped like params: {name} is empty in one of them")
    if mask is empty_node:
        return None
    mask, shape = np.asarray(mask), np.shape(leaf)
    if mask.dtype != bool:
        raise ValueError(f"the mask of {name} is {mask.dtype}, not bool")
    if mask.shape == () and mask:
        return None
    if mask.shape != shape:
        raise ValueError(f"masks are not shaped like params: {name} is {shape} and its mask {mask.shape}")
    return mask


def _quantize(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(int8 in [-127, 127] like `array`, float32 scales that broadcast against it); zeros stay zero."""
    axes = tuple(range(array.ndim - 1)) if array.ndim > 1 else None
    scale = np.clip(np.max(np.abs(array), axes, keepdims=True, initial=0) / np.float32(LEVELS), *SCALES)
    return np.rint(array / scale).astype(np.int8), scale


def _scales(vector: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """`_quantize`'s scales for each of `shapes` out of one vector; ValueError if they could not be."""
    if not ((vector >= SCALES[0]) & (vector <= SCALES[1])).all():
        raise ValueError("scales out of range")
    channels = [(*[1] * (len(shape) - 1), shape[-1]) if len(shape) > 1 else (1,) * len(shape) for shape in shapes]
    pieces = _split(vector, [math.prod(c) for c in channels])
    return [piece.reshape(c) for piece, c in zip(pieces, channels, strict=True)]


def _join(vectors: list[np.ndarray], dtype: Any) -> np.ndarray:
    """One vector out of any number of them."""
    return np.concatenate([np.empty(0, dtype), *vectors])


def _split(vector: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    """Pieces of a vector that they use up; ValueError if they would not."""
    if sum(counts) != vector.size:
        raise ValueError(f"{vector.size} numbers for {sum(counts)}")
    return np.split(vector, np.cumsum(counts, dtype=int))[:-1]


def _deflate(data: bytes, *, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    deflater = zlib.compressobj(9, strategy=strategy)
    return deflater.compress(data) + deflater.flush()


def _inflate(data: bytes, limit: int) -> bytes:
    """zlib's inflation of at most `limit` bytes; ValueError or zlib.error if it is longer, or cut short."""
    inflater = zlib.decompressobj()
    # One byte more, so that what is exactly `limit` long comes to its end.
    raw = inflater.decompress(data, limit + 1)
    if len(raw) > limit or not inflater.eof or inflater.unused_data:
        raise ValueError("deflated part of another length")
    return raw
