"""Every public name of the library resolves and is documented where it is defined; no other names leak."""

import ast
import types
from pathlib import Path

import resnet_jax

ROOT = Path(resnet_jax.__file__).parent


def documented():
    """Names defined at the top of a module, with a docstring or, for constants, a string below the assignment."""
    for path in ROOT.glob("*.py"):
        body = ast.parse(path.read_text()).body
        for node, following in zip(body, [*body[1:], None], strict=True):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
                yield node.name
            elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(following, ast.Expr):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if isinstance(following.value, ast.Constant) and isinstance(following.value.value, str):
                    yield from (target.id for target in targets if isinstance(target, ast.Name))


def test_public_names():
    names = resnet_jax.__all__
    assert len(names) == len(set(names)) > 100
    assert all(hasattr(resnet_jax, name) for name in names)
    assert not set(names) - set(documented())


def test_nothing_else_leaks():
    """Besides the public names only submodules, so that `resnet_jax.mix` is the module however it was imported."""
    names = {name for name in vars(resnet_jax) if not name.startswith("_")} - set(resnet_jax.__all__)
    rest = {name: getattr(resnet_jax, name) for name in names}
    assert all(isinstance(x, types.ModuleType) and x.__name__ == f"resnet_jax.{name}" for name, x in rest.items())
    assert not {path.stem for path in ROOT.iterdir()} & set(resnet_jax.__all__)


def test_version_and_marker():
    assert all(part.isdigit() for part in resnet_jax.__version__.split("."))
    assert (ROOT / "py.typed").read_bytes() == b""
