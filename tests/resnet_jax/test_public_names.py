"""No other names than the public ones leak into `resnet_jax`; `tests/test_api.py` checks those."""

import types
from pathlib import Path

import resnet_jax

ROOT = Path(resnet_jax.__file__).parent


def test_nothing_else_leaks():
    """Besides the public names only submodules, so that `resnet_jax.mix` is the module however it was imported."""
    names = {name for name in vars(resnet_jax) if not name.startswith("_")} - set(resnet_jax.__all__)
    rest = {name: getattr(resnet_jax, name) for name in names}
    assert all(isinstance(x, types.ModuleType) and x.__name__ == f"resnet_jax.{name}" for name, x in rest.items())
    assert not {path.stem for path in ROOT.iterdir()} & set(resnet_jax.__all__)
