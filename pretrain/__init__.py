"""Self-supervised pretraining: objectives, one contrastive step, and evaluation of the encoders; built on `train`.

The names in `__all__` are the public interface, each loaded on first use. The programs are functions of their modules,
such as `pretrain.run.run` and `pretrain.evaluate.evaluate`.
"""

import importlib
from typing import Any

# Public name: the module that defines it.
_HOMES = {
    "Extractor": "features",
    "Features": "features",
    "MLP": "heads",
    "Network": "heads",
    "OBJECTIVES": "objectives",
    "Objective": "objectives",
    "PretrainConfig": "config",
    "PretrainState": "state",
    "Prototypes": "heads",
    "ViewConfig": "config",
    "Views": "objectives",
    "collapse_step": "health",
    "contrastive_step": "steps",
    "encoder_of": "state",
    "feature_step": "steps",
    "frozen_accuracy": "features",
    "init_pretrain_state": "state",
    "knn_accuracy": "knn",
    "linear_probe": "linear",
    "make_views": "views",
    "pretrain_digest": "state",
    "probe_accuracy": "linear",
    "verdict": "health",
    "view": "views",
    "view_step": "steps",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pretrain' has no attribute {name!r}")
    return getattr(importlib.import_module(f"pretrain.{_HOMES[name]}"), name)
