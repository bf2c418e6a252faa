"""The house rules that code can check: imports point down, importing has no effect, files stay readable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from train.__main__ import main

ROOT = Path(__file__).parent.parent
PACKAGES = ("resnet_jax", "train", "pretrain")
# Layer by layer: what a package may import of the project, and (for layer 0) of the world.
ALLOWED = {
    "resnet_jax": {"resnet_jax"},
    "train": {"resnet_jax", "train"},
    "pretrain": {"resnet_jax", "train", "pretrain"},
}
LAYER_0 = {"jax", "numpy", "flax"}
LINEN_FILES = {"resnet.py", "layers.py", "network.py", "cascading.py"}
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path):
    """Imported modules, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down(package):
    for path in (ROOT / package).rglob("*.py"):
        assert path.name not in ("utils.py", "common.py", "helpers.py", "misc.py")
        for module in imports(path):
            top = module.split(".")[0]
            if top in (*PACKAGES, "tests", "colab"):
                assert top in ALLOWED[package], f"{path} imports {module}"
            elif package == "resnet_jax":
                assert top in LAYER_0 or top in sys.stdlib_module_names, f"{path} imports {module}"
                linen = path.name in LINEN_FILES or {"detection", "onednn"} & {*path.parts}
                assert linen or not module.startswith("flax"), f"{path} imports {module}"


def test_importing_the_library_is_cheap_and_has_no_effect():
    """`import resnet_jax` pulls in jax, numpy and flax alone, sets no flag, asks for no device."""
    program = """
import os, sys, warnings
before = dict(os.environ)
import resnet_jax.resnet, resnet_jax.augment, resnet_jax.parallel, resnet_jax.losses, resnet_jax.torch_weights
import resnet_jax.explain
import jax
# flax itself imports optax and parts of orbax; nothing else may.
heavy = {"tensorflow", "tensorflow_datasets", "grain", "tyro", "torch", "PIL", "sklearn"}
print(sorted(heavy & set(sys.modules)))
print(before == dict(os.environ), jax._src.xla_bridge.backends_are_initialized())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "True False"]


def test_help_lists_fields_and_presets(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "--optim.lr" in shown and "cifar10_resnet18_50ep" in shown


def test_only_one_module_makes_markup():
    page = ROOT / "train" / "page.py"
    assert [path for path in FILES if "Html(" in path.read_text()] == [page]


def test_public_functions_say_what_they_do():
    """Every module, public class and public function has a docstring."""
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or not tree.body, path
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"
