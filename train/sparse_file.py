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

import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax.traverse_util import empty_node, flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from resnet_jax.tree import PyTree
from train.errors import UsageError
from train.paths import replace_file

SPARSE = "sparse.safetensors"  # the file's name in a run folder
NAME = "resnet-jax sparse"
FORMAT = f"{NAME} 1"

# Deflated data can grow a thousandfold: these limits bound the memory that a file can request.
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
    """Write a pruned network atomically, see `replace_file`.

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
    tensors = _encode(variables, masks, values)
    head = {"metadata": dict(metadata), "sha256": _digest(metadata, tensors)}
    # safetensors writes several entries in random order (https://github.com/safetensors/safetensors/issues/584).
    replace_file(path, save(tensors, {FORMAT: json.dumps(head, sort_keys=True)}))


def load_sparse(path: Path) -> tuple[dict[str, PyTree], PyTree, dict[str, str]]:
    """Load (variables, masks, metadata) as they were saved: nested dicts of NumPy arrays, float32 and bool.

    Raises:
      UsageError: no such file, a file of a different kind or version, or a damaged one.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            entries = file.metadata() or {}
            if FORMAT not in entries:
                raise UsageError(f"{path} does not have the format {FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        head = json.loads(entries[FORMAT])
        if head["sha256"] != _digest(head["metadata"], tensors):
            raise ValueError("its checksum differs; export or copy it again")
        return *_decode(tensors), head["metadata"]
    except UsageError:
        raise
    except FileNotFoundError:
        raise UsageError(f"no sparse file at {path}") from None
    except Exception as error:  # a damaged file can raise anything
        raise UsageError(f"{path} is damaged, or not a sparse file: {error}") from None


def is_sparse_file(path: Path) -> bool:
    """Whether the metadata say that `save_sparse` of any version wrote this file; False if they cannot be read."""
    try:
        with safe_open(path, framework="numpy") as file:
            return any(name.startswith(f"{NAME} ") for name in file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def _encode(variables: dict[str, PyTree], masks: PyTree, kind: str) -> dict[str, np.ndarray]:
    """Encode a network as the tensors of a file, each [n]."""
    flat = flatten_dict(variables, keep_empty_nodes=True)
    flat_masks = flatten_dict({"params": masks}, keep_empty_nodes=True)
    if unmatched := sorted(flat_masks.keys() ^ {keys for keys in flat if keys[0] == "params"}):
        raise ValueError(f"masks are not shaped like params: {'/'.join(unmatched[0])} is not in both")
    layout: list[Any] = []
    bits, kept, scales, dense = ([np.empty(0, dtype)] for dtype in (bool, kind, np.float32, np.float32))
    for keys in sorted(flat):
        if flat[keys] is empty_node:
            layout.append((keys, None, False))
            continue
        name, array, mask = "/".join(keys), np.asarray(flat[keys]), np.asarray(flat_masks.get(keys, True))
        if array.dtype != np.float32 or mask.dtype != bool or mask.shape not in ((), array.shape):
            raise ValueError(
                f"{name} must be float32 with a bool mask of its shape, not {array.dtype} {array.shape} with "
                f"{mask.dtype} {mask.shape}"
            )
        masked = mask.ndim > 0 or not mask
        layout.append((keys, array.shape, masked))
        if not masked:
            dense.append(array.ravel())
            continue
        mask = np.broadcast_to(mask, array.shape)
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
    layout = json.loads(_inflate(tensors["layout"], MAX_LAYOUT))
    total = sum(math.prod(shape) for _, shape, masked in layout if masked)
    if total > MAX_MASKED:
        raise ValueError(f"{total} masked weights, more than {MAX_MASKED}")
    packed, packed_bytes = tensors["mask"], -(-total // 8)
    if packed.size < packed_bytes:
        packed = np.frombuffer(_inflate(packed, packed_bytes), np.uint8)
    bits = np.unpackbits(packed, count=total).view(bool)
    weights = np.zeros(total, tensors["values"].dtype)
    weights[bits] = tensors["values"]
    rest = {**tensors, "bits": bits, "weights": weights}

    def take(name: str, shape: Sequence[int]) -> np.ndarray:
        """Take the next leaf from a vector."""
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
            if "scales" in tensors:
                array = np.asarray(array * take("scales", shape[-1:] if len(shape) > 1 else [1] * len(shape)))
        elif shape is not None:
            array, mask = take("dense", shape), np.ones((), bool)
        variables[tuple(keys)] = array
        if keys[0] == "params":
            masks[tuple(keys)] = mask
    return unflatten_dict(variables), unflatten_dict(masks)["params"]


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 over metadata and tensors, each part after its length, so that different contents cannot read alike."""
    parts = [FORMAT.encode(), json.dumps(sorted(metadata.items())).encode()]
    for name, tensor in sorted(tensors.items()):
        parts += [f"{name} {tensor.dtype}".encode(), tensor.tobytes()]
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little") + part)
    return sha.hexdigest()


def _inflate(data: np.ndarray, limit: int) -> bytes:
    """Inflate to at most `limit` bytes (or one more, so that exactly `limit` bytes reach the end of the stream).

    Raises:
      ValueError: the result is longer, or the data are cut short.
    """
    inflater = zlib.decompressobj()
    raw = inflater.decompress(data.tobytes(), limit + 1)
    if not inflater.eof:
        raise ValueError("a deflated part has the wrong length")
    return raw
