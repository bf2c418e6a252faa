"""Supervised training: `python -m train`, and its pieces for your own scripts.

The names in `__all__` are the public interface, each loaded on first use. Entry points are functions of their modules,
such as `train.run.run` and `train.predict.load`.
"""

import importlib
from typing import Any

# Public name: the module that defines it.
_HOMES = {
    "AugmentConfig": "config",
    "Checkpoints": "checkpoint",
    "DataConfig": "config",
    "Dataset": "data.sets",
    "Objective": "steps",
    "OptimConfig": "config",
    "Pieces": "run",
    "Progress": "loop",
    "RunError": "errors",
    "Session": "session",
    "TrainConfig": "config",
    "TrainState": "state",
    "Training": "run",
    "UsageError": "errors",
    "classify": "steps",
    "digest": "state",
    "eval_batches": "data.batches",
    "eval_step": "steps",
    "evaluate": "loop",
    "fit": "loop",
    "forward": "state",
    "from_arrays": "data.sets",
    "init_state": "state",
    "init_variables": "state",
    "load_masks": "weights",
    "load_state": "run_folder",
    "load_weights": "weights",
    "make_optimizer": "optim",
    "make_pieces": "run",
    "make_schedule": "optim",
    "open_session": "session",
    "start_state": "run",
    "summarize": "steps",
    "train_batches": "data.batches",
    "train_step": "steps",
    "update": "steps",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"train.{_HOMES[name]}"), name)
