"""Supervised training: `python -m train`, and its pieces for your own scripts.

The names in `__all__` are the public interface, each loaded on first use. Entry points are functions of their modules,
such as `train.run.run` and `train.predict.load`.
"""

import importlib
from collections.abc import Callable
from typing import Any


def lazy_names(package: str, modules: dict[str, str]) -> tuple[list[str], Callable[[str], Any]]:
    """Make `__all__` and `__getattr__` of a package from its modules' public names, separated by spaces."""
    homes = {name: module for module, names in modules.items() for name in names.split()}

    def load(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return sorted(homes), load


__all__, __getattr__ = lazy_names(
    "train",
    {
        "checkpoint": "Checkpoints",
        "chunks": "CHUNK_LAYOUT many_steps",
        "config": "AugmentConfig DataConfig OptimConfig TrainConfig",
        "data.batches": "eval_batches train_batches",
        "data.sets": "Dataset from_arrays",
        "errors": "DivergedError RunError UsageError",
        "loop": "Progress evaluate fit",
        "optim": "make_optimizer make_schedule",
        "pretrained": "from_pretrained",
        "run": "Pieces Training make_pieces start_state",
        "run_folder": "load_state",
        "session": "Session open_session",
        "spaces": "Choice Integers LogUniform Uniform",
        "state": "TrainState digest forward init_state init_variables",
        "steps": "Objective classify eval_step summarize train_step update",
        "weights": "load_masks load_weights",
    },
)
