"""Pruned networks on disk: a bit per prunable weight and the kept weights, in one safetensors file.

A safetensors header costs about 100 bytes per tensor, so leaves are concatenated in the order of their paths:

| tensor | content |
|---|---|
| `layout` | uint8, deflated JSON: [path, shape, masked] of each leaf; the shape of an empty dict is null |
| `mask` | uint8, packed bits of the masked leaves, deflated if that is shorter |
| `values` | float32 or int8, kept weights of the masked leaves |
| `scales` | float32, with int8 values only: one per output channel |
| `dense` | float32, all other leaves |

The metadata has a single entry, named by `FORMAT`: JSON with the caller's metadata and a sha256 over it and the
tensors. Equal networks give equal files with the same zlib.
"""

import gzip
import hashlib
import json
import math
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from resnet_jax.tree import PyTree
from train.errors import RunError, UsageError

NAME, VERSION = "resnet-jax sparse", 1
FORMAT = f"{NAME} {VERSION}"

# Deflated data can grow a thousandfold: these limits bound the memory that a forged file can request.
MAX_MASKED = 2**28  # weights (1 GiB of float32), twice those of the largest of MODELS
MAX_LAYOUT = 2**20  # bytes of JSON, over 10 000 leaves

# int8 scales are normal numbers, so no device flushes them to zero, and their multiples up to 127 are finite.
LEVELS = 127
SCALES = np.finfo(np.float32).tiny, np.nextafter(np.finfo(np.float32).max / np.float32(LEVELS), np.float32(0))


def save_sparse(
    path: Path,
    variables: dict[str, PyTree],
    masks: PyTree,
    *,
    values: Literal["float32", "int8"] = "float32",
    metadata: Mapping[str, str] = {},
) -> None:
    """Write a pruned network atomically: readers see the old file or the new one.

    Args:
      variables: {"params": ..., "batch_stats": ...}, nested dicts of float32 arrays.
      masks: boolean tree like `params`, 0-d True for leaves that are never pruned. Kept weights are stored even if they
        are zero; pruned weights must be zero, and load as +0.0.
      values: type of the kept weights; "int8" is symmetric with a scale max|w| / 127 per output channel (the last axis;
        one scale for a leaf of fewer than two axes), and differs by at most half a scale, up to float32 rounding.
      metadata: returned by `load_sparse`.

    Raises:
      ValueError: pruned weights that are not zero, masks not shaped like `params`, a leaf that is not float32 or, for
        int8, not finite (the message names it), or a network too large for the format.
      RunError: the file cannot be written.
    """
    if values not in ("float32", "int8"):
        raise ValueError(f"values must be float32 or int8, got {values!r}")
    tensors = _encode(variables, masks, values)
    head = {"metadata": dict(metadata), "sha256": _digest(metadata, tensors)}
    # safetensors writes several entries in random order (https://github.com/safetensors/safetensors/issues/584).
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
    """Load (variables, masks, metadata) as they were saved: nested dicts of NumPy arrays, float32 and bool.

    Raises:
      UsageError: no such file, a file of a different kind or version, or a damaged one.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            entries = file.metadata() or {}
            if FORMAT not in entries:
                newer = [name for name in entries if name.startswith(f"{NAME} ")]
                reason = f"has format {newer[0]!r}, not {FORMAT!r}: update" if newer else "is not a sparse file of"
                raise UsageError(f"{path} {reason} resnet-jax")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        head = json.loads(entries[FORMAT])
        if head["sha256"] != _digest(head["metadata"], tensors):
            raise ValueError("its checksum differs; export or copy it again")
        return *_decode(tensors), head["metadata"]
    except FileNotFoundError:
        raise UsageError(f"no sparse file at {path}") from None
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is damaged, or not a sparse file: {error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError, zlib.error) as error:
        raise UsageError(f"{path} is damaged: {error}") from None


def is_sparse_file(path: Path) -> bool:
    """Whether the metadata say that `save_sparse` of any version wrote this file; False if they cannot be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            return any(name.startswith(f"{NAME} ") for name in file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def sizes(path: Path, variables: dict[str, PyTree]) -> dict[str, float]:
    """Measured bytes: `file_bytes` of a sparse file; `dense_bytes` of `variables` in a float32 safetensors file with
    one tensor per leaf; `gzip_bytes` of that at level 9; and their `ratio`, `dense_bytes / file_bytes`.
    """
    flat = flatten_dict(variables)
    dense = save({"/".join(keys): np.ascontiguousarray(leaf, np.float32) for keys, leaf in flat.items()})
    found = {"file_bytes": path.stat().st_size, "dense_bytes": len(dense), "gzip_bytes": len(gzip.compress(dense, 9))}
    return {**found, "ratio": found["dense_bytes"] / found["file_bytes"]}


def _encode(variables: dict[str, PyTree], masks: PyTree, kind: str) -> dict[str, np.ndarray]:
    """Encode a network as the tensors of a file, each [n]."""
    flat = flatten_dict(variables, keep_empty_nodes=True)
    flat_masks = flatten_dict({"params": masks}, keep_empty_nodes=True)
    nodes = {(keys, leaf is empty_node) for keys, leaf in flat.items() if keys[0] == "params"}
    if unmatched := sorted(nodes ^ {(keys, mask is empty_node) for keys, mask in flat_masks.items()}):
        raise ValueError(f"masks are not shaped like params: {'/'.join(unmatched[0][0])} is not in both")

    # Concatenate leaves in the order of their paths: a tensor each would cost a header of about 100 bytes.
    layout: list[Any] = []
    bits, kept, scales, dense = ([np.empty(0, dtype)] for dtype in (bool, kind, np.float32, np.float32))
    for keys in sorted(flat):
        if flat[keys] is empty_node:
            layout.append((keys, None, False))
            continue
        name, array, mask = "/".join(keys), np.asarray(flat[keys]), np.asarray(flat_masks.get(keys, True))
        if array.dtype != np.float32 or mask.dtype != bool:
            raise ValueError(f"{name} is {array.dtype} and its mask {mask.dtype}, not float32 and bool")
        masked = mask.ndim > 0 or not mask
        layout.append((keys, array.shape, masked))
        if not masked:
            dense.append(array.ravel())
            continue
        if mask.shape != array.shape:
            raise ValueError(f"masks are not shaped like params: {name} is {array.shape} and its mask {mask.shape}")
        if array[~mask].any():
            raise ValueError(f"{name} has pruned weights that are not zero: apply the masks first")
        if kind == "int8":
            if not np.isfinite(array).all():
                raise ValueError(f"{name} has weights that are not finite, which int8 cannot hold")
            axes = tuple(range(array.ndim - 1)) if array.ndim > 1 else None
            largest = np.max(np.abs(array), axes, keepdims=True, initial=0)
            scale = np.clip(largest / np.float32(LEVELS), *SCALES)
            array = np.rint(array / scale).astype(np.int8)
            scales.append(scale.ravel())
        bits.append(mask.ravel())
        kept.append(array[mask])

    text = json.dumps(layout, separators=(",", ":")).encode()
    if len(text) > MAX_LAYOUT or sum(b.size for b in bits) > MAX_MASKED:
        raise ValueError(f"the network is too large: over {MAX_LAYOUT} bytes of layout or {MAX_MASKED} masked weights")
    packed = np.packbits(np.concatenate(bits)).tobytes()
    # Huffman codes only: the repeats that deflate finds in scattered bits cost more than they save.
    deflater = zlib.compressobj(9, strategy=zlib.Z_HUFFMAN_ONLY)
    tensors = {
        "layout": np.frombuffer(zlib.compress(text, 9), np.uint8),
        "mask": np.frombuffer(min(packed, deflater.compress(packed) + deflater.flush(), key=len), np.uint8),
        "values": np.concatenate(kept),
        "dense": np.concatenate(dense),
    }
    return tensors | ({"scales": np.concatenate(scales)} if kind == "int8" else {})


def _decode(tensors: dict[str, np.ndarray]) -> tuple[dict[str, PyTree], PyTree]:
    """Decode a file's tensors to (variables, masks); sizes are checked before memory is allocated."""
    int8 = "scales" in tensors
    wanted = {"layout": "uint8", "mask": "uint8", "values": "int8" if int8 else "float32", "dense": "float32"}
    wanted |= {"scales": "float32"} if int8 else {}
    if {name: x.dtype.name for name, x in tensors.items()} != wanted or any(x.ndim != 1 for x in tensors.values()):
        raise ValueError("it has the wrong tensors")
    layout = _layout(tensors["layout"])
    total = sum(math.prod(shape) for _, shape, masked in layout if masked)
    if total > MAX_MASKED:
        raise ValueError(f"{total} masked weights, more than {MAX_MASKED}")

    # A mask is deflated if it is shorter than its bits.
    packed, packed_bytes = tensors["mask"].tobytes(), -(-total // 8)
    packed = _inflate(packed, packed_bytes) if len(packed) < packed_bytes else packed
    if len(packed) != packed_bytes:
        raise ValueError("its mask has the wrong length")
    bits = np.unpackbits(np.frombuffer(packed, np.uint8), count=total).view(bool)
    values, scales = tensors["values"], tensors.get("scales", np.empty(0, np.float32))
    in_range = (values >= -LEVELS).all() and ((scales >= SCALES[0]) & (scales <= SCALES[1])).all()
    if values.size != np.count_nonzero(bits) or (int8 and not in_range):
        raise ValueError("its values do not match its mask, or are out of range")
    weights = np.zeros(total, values.dtype)
    weights[bits] = values

    rest = {"bits": bits, "weights": weights, "scales": scales, "dense": tensors["dense"]}

    def take(name: str, shape: tuple[int, ...]) -> np.ndarray:
        """Take the next leaf from a vector; ValueError if it is too short."""
        size = math.prod(shape)
        piece, rest[name] = rest[name][:size], rest[name][size:]
        return piece.reshape(shape)

    variables: dict[tuple[str, ...], Any] = {}
    masks: dict[tuple[str, ...], Any] = {}
    for keys, shape, masked in layout:
        array: Any = empty_node
        mask: Any = empty_node
        if masked:
            array, mask = take("weights", shape), take("bits", shape)
            if int8:
                array = np.asarray(array * take("scales", shape[-1:] if len(shape) > 1 else (1,) * len(shape)))
        elif shape is not None:
            array, mask = take("dense", shape), np.ones((), bool)
        variables[keys] = array
        if keys[0] == "params":
            masks[keys] = mask
    if any(vector.size for vector in rest.values()):
        raise ValueError("it has more numbers than its layout")
    return unflatten_dict(variables), unflatten_dict(masks)["params"]


def _layout(tensor: np.ndarray) -> list[tuple[Any, Any, bool]]:
    """(path, shape, masked) of each leaf; ValueError or TypeError if they do not form a tree with masks in `params`."""
    entries = json.loads(_inflate(tensor.tobytes(), MAX_LAYOUT))
    layout = [(tuple(keys), None if shape is None else tuple(shape), masked) for keys, shape, masked in entries]
    for keys, shape, masked in layout:
        good = keys and all(type(key) is str for key in keys) and all(type(n) is int and n >= 0 for n in shape or ())
        if not good or (masked and (keys[0] != "params" or shape is None)):
            raise ValueError(f"its layout has a malformed leaf {str(keys)[:80]}")
    # In sorted order, a leaf comes directly before anything that would lie under it.
    for (a, *_), (b, *_) in pairwise(layout):
        if a >= b or b[: len(a)] == a:
            raise ValueError(f"its layout has a path out of order {str(b)[:80]}")
    return layout


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 over metadata and tensors, each part after its length, so that different contents cannot read alike."""
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise ValueError("metadata must map strings to strings")
    sha, parts = hashlib.sha256(), [FORMAT.encode(), json.dumps(sorted(metadata.items())).encode()]
    for name, tensor in sorted(tensors.items()):
        parts += [f"{name} {tensor.dtype}".encode(), tensor.tobytes()]
    for part in parts:
        sha.update(len(part).to_bytes(8, "little") + part)
    return sha.hexdigest()


def _inflate(data: bytes, limit: int) -> bytes:
    """Inflate to at most `limit` bytes; ValueError or zlib.error if the result is longer or the data are cut short."""
    inflater = zlib.decompressobj()
    raw = inflater.decompress(data, limit + 1)  # one more, so that exactly `limit` bytes reach the end of the stream
    if len(raw) > limit or not inflater.eof or inflater.unused_data:
        raise ValueError("a deflated part has the wrong length")
    return raw
