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


def public_names(package):
    return importlib.import_module(package).__all__


@pytest.mark.parametrize("package", hooks.PACKAGES)
def test_page_documents_exactly_the_public_names(package):
    entries = re.findall(r"^::: (\S+)$", hooks.api_page(package), re.M)
    programs = hooks.PROGRAMS[package]
    names = [entry.rpartition(".")[2] for entry in entries if entry not in programs]
    assert sorted(names) == sorted(public_names(package))
    assert set(programs) <= {*entries}


@pytest.mark.parametrize("program", [program for some in hooks.PROGRAMS.values() for program in some])
def test_program_is_documented(program):
    module, _, name = program.rpartition(".")
    assert inspect.getdoc(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("package", hooks.PACKAGES)
def test_page_is_in_the_site(package):
    assert f"docs/api/{package}.md" in (ROOT / "mkdocs.yml").read_text()
    assert (ROOT / package / "py.typed").exists()


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package in hooks.PACKAGES for name in public_names(package)]
)
def test_name_is_documented_and_unambiguous(package, name):
    _, docstring = hooks.definition(package, name)
    assert docstring and docstring.strip()
    # Importing the module `train.run` sets the attribute `run` of `train`, so a function of that name would disappear.
    value = getattr(importlib.import_module(package), name)
    assert inspect.ismodule(value) == (importlib.util.find_spec(f"{package}.{name}") is not None)
    assert not (inspect.ismodule(value) and hasattr(value, name)), f"{package}.{name} is a module and a name in it"
