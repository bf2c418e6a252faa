"""Weights of torchvision's detectors, without PyTorch."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from resnet_jax.torch_weights import from_torch, to_array, to_layout
from resnet_jax.tree import PyTree, abbreviate, map_with_path

BODY = "backbone.body."
# Layers here, and their names in torchvision; `#` stands for a number, which torchvision counts from 0.
LAYERS = {
    "pyramid/lateral#": "backbone.fpn.inner_blocks.#.0",
    "pyramid/output#": "backbone.fpn.layer_blocks.#.0",
    "pyramid/coarser1": "backbone.fpn.extra_blocks.p6",
    "pyramid/coarser2": "backbone.fpn.extra_blocks.p7",
    "rpn/hidden": "rpn.head.conv.0.0",
    "rpn/objectness": "rpn.head.cls_logits",
    "rpn/deltas": "rpn.head.bbox_pred",
    "box_head/hidden1": "roi_heads.box_head.fc6",
    "box_head/hidden2": "roi_heads.box_head.fc7",
    "box_head/logits": "roi_heads.box_predictor.cls_score",
    "box_head/deltas": "roi_heads.box_predictor.bbox_pred",
    "dense_head/class#": "head.classification_head.conv.#.0",
    "dense_head/box#": "head.regression_head.conv.#.0",
    "dense_head/logits": "head.classification_head.cls_logits",
    "dense_head/deltas": "head.regression_head.bbox_reg",
}
# Names in files from before torchvision 0.13.
OLDER = (
    (r"^(backbone\.fpn\.\w+_blocks\.\d+)\.(weight|bias)$", r"\1.0.\2"),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"rpn.head.conv.0.0.\1"),
    (r"^(head\.\w+_head\.conv)\.(\d+)\.(weight|bias)$", lambda m: f"{m[1]}.{int(m[2]) // 2}.0.{m[3]}"),
)


def torchvision_name(path: str) -> str:
    """The name in torchvision of a parameter outside the backbone: `rpn.head.cls_logits.weight` for
    `rpn/objectness/conv/kernel`.

    Raises:
      ValueError: torchvision has no such layer.
    """
    layer, _, leaf = path.replace("/conv/kernel", "/kernel").rpartition("/")
    number = re.search(r"\d+$", layer)
    name = LAYERS.get(layer)
    if name is None and number is not None:
        name = LAYERS.get(f"{layer[: number.start()]}#", "").replace("#", str(int(number[0]) - 1))
    if not name:
        raise ValueError(f"torchvision's detectors have no {path}")
    return f"{name}.{'weight' if leaf == 'kernel' else leaf}"


def from_torchvision(state_dict: Mapping[str, Any], variables: PyTree, *, epsilon: float = 1e-5) -> PyTree:
    """Return a detector's `variables` with all values replaced from the state dict of torchvision's detector.

    It is torchvision's `fasterrcnn_resnet50_fpn` for a `FasterRCNN`, and `retinanet_resnet50_fpn` for a `RetinaNet`, or
    one of these with a different backbone. Class k here is class k + 1 of torchvision's Faster R-CNN, whose class 0 is
    the background; its box of the background is never used, and is left out.

    Losses and detections equal torchvision's if the sides of images are multiples of the coarsest level's stride. For
    other sides, torchvision's anchors on that level are closer together: 800 pixels give 13 cells, 61 pixels apart
    instead of 64.

    Args:
      epsilon: that of the source's norms; 0 for torchvision's weights `COCO_V1`. Variances are shifted to give the same
        values with the epsilon of the norms here.

    Raises:
      ValueError: tensors are missing, unexpected, or have a different shape; the message names the first ones.
    """
    source = {_newer(name): x for name, x in state_dict.items() if not name.endswith("num_batches_tracked")}
    body = {name.removeprefix(BODY): x for name, x in source.items() if name.startswith(BODY)}
    backbone = {kind: tree["backbone"] for kind, tree in variables.items()}
    loaded = from_torch(body, backbone)
    shift = epsilon - 1e-5
    stats = map_with_path(lambda path, x: x + shift if path.endswith("/var") else x, loaded["batch_stats"])
    heads = {name: layer for name, layer in variables["params"].items() if name != "backbone"}
    missing, shapes, used = [], [], set()

    def load_leaf(path: str, leaf: Any) -> Any:
        name = torchvision_name(path)
        if name not in source:
            missing.append(name)
            return leaf
        used.add(name)
        x = _to_ours(path, to_array(source[name]), variables["params"])
        if x.shape != leaf.shape:
            shapes.append(f"{name} {list(np.shape(source[name]))} (here {list(x.shape)}, not {list(leaf.shape)})")
            return leaf
        return jnp.array(x, leaf.dtype)

    params = map_with_path(load_leaf, heads)
    unexpected = [name for name in source if not name.startswith(BODY) and name not in used]
    problems = {"missing": missing, "unexpected": unexpected, "of a different shape": shapes}
    if any(problems.values()):
        listed = "; ".join(f"{kind} {abbreviate(names)}" for kind, names in problems.items() if names)
        raise ValueError(f"the state dict does not fit the detector: {listed}")
    return {"params": {"backbone": loaded["params"], **params}, "batch_stats": {"backbone": stats}}


def _newer(name: str) -> str:
    for pattern, replacement in OLDER:
        name = re.sub(pattern, replacement, name)
    return name


def _to_ours(path: str, x: np.ndarray, params: PyTree) -> np.ndarray:
    if path.startswith("box_head/deltas/"):
        x = x[4:]  # without the background's box
    if path == "box_head/hidden1/kernel":
        # Regions are flattened from [C, S, S] there, from [S, S, C] here.
        channels = params["pyramid"]["output1"]["bias"].shape[0]
        side = round((x.shape[1] / channels) ** 0.5)
        if channels * side**2 == x.shape[1]:
            return x.reshape(len(x), channels, side, side).transpose(2, 3, 1, 0).reshape(-1, len(x))
    return to_layout(path, x)
