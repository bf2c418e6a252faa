"""Every public name resolves, has a docstring, and appears once on its package's API page."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
hooks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hooks)


@pytest.mark.parametrize("package", hooks.PACKAGES)
def test_page_documents_exactly_the_public_names(package):
    entries = re.findall(r"^::: (\S+)$", hooks.api_page(package), re.M)
    programs = hooks.PROGRAMS[package]
    names = [entry.rpartition(".")[2] for entry in entries if entry not in programs]
    assert sorted(names) == sorted(importlib.import_module(package).__all__)
    assert set(programs) <= {*entries}
    for program in programs:
        module, _, name = program.rpartition(".")
        assert inspect.getdoc(getattr(importlib.import_module(module), name)), program
    assert f"docs/api/{package}.md" in (ROOT / "mkdocs.yml").read_text()
    assert (ROOT / package.split(".")[0] / "py.typed").exists()


@pytest.mark.parametrize("package", hooks.PACKAGES)
def test_names_are_documented_and_unambiguous(package):
    for name in importlib.import_module(package).__all__:
        _, docstring = hooks.definition(package, name)
        assert docstring and docstring.strip(), name
        # Importing the module `train.run` sets the attribute `run` of `train`: a function of that name would disappear.
        value = getattr(importlib.import_module(package), name)
        assert inspect.ismodule(value) == (importlib.util.find_spec(f"{package}.{name}") is not None)
        assert not (inspect.ismodule(value) and hasattr(value, name)), f"{package}.{name} is a module and a name in it"
