"""MkDocs hooks: lay the site out like the repository, and write an API page from each package's `__all__`."""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]
PACKAGES = ("resnet_jax", "resnet_jax.explain", "resnet_jax.detection", "train", "pretrain")
# Programs are functions of modules whose names they share, so a package cannot export them.
PROGRAMS = {
    "resnet_jax": [],
    "resnet_jax.explain": [],
    "resnet_jax.detection": [],
    "train": [
        "train.run.run",
        "train.predict.load",
        "train.prune.run.run",
        "train.explain.run.explain",
        "train.bench.bench",
        "train.search.run.run",
        "train.detect.run.run",
        "train.detect.predict.load",
        "train.detect.explain.explain",
    ],
    "pretrain": ["pretrain.run.run", "pretrain.evaluate.evaluate"],
}
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "results/README.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#:]+)\)")


def on_files(files, config):
    """Replace the pages of docs/ by all pages, the files that they link to, and the API pages."""
    from mkdocs.structure.files import File  # only the site needs it; tests import this file without it

    for file in list(files):
        if file.src_dir == config.docs_dir and file.src_uri not in config.extra_css:
            files.remove(file)
    linked = {(page.parent / link).resolve() for page in PAGES for _, link in LINK.findall(page.read_text())}
    for path in [*PAGES, *sorted(path for path in linked - {*PAGES} if path.is_file())]:
        files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    for package in PACKAGES:
        files.append(File.generated(config, f"docs/api/{package}.md", content=api_page(package)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turn links to folders, which have no page, into plain text."""
    folder = ROOT / Path(page.file.src_uri).parent
    return LINK.sub(lambda link: link[1] if (folder / link[2]).is_dir() else link[0], markdown)


def api_page(package):
    """Markdown with a mkdocstrings entry for each name in `package.__all__`, grouped by defining module."""
    module = importlib.import_module(package)
    sections = {}
    for name in module.__all__:
        home, _ = definition(package, name)
        sections.setdefault(home, []).append(name)
    text = f"# {package}\n\n{inspect.getdoc(module)}\n\nImport these names from `{package}`.\n"
    for home, names in sorted(sections.items()):
        summary = inspect.getdoc(sys.modules[home]).split("\n\n")[0]
        text += f"\n## {home}\n\n{summary}\n\n" + "\n".join(f"::: {home}.{name}" for name in names) + "\n"
    if PROGRAMS[package]:
        entries = "\n".join(f"::: {entry}" for entry in PROGRAMS[package])
        text += f"\n## Programs\n\nImport these from their modules.\n\n{entries}\n"
    return text


def definition(package, name):
    """Name of the module that defines a public name, and the name's docstring or None.

    A constant's docstring is the string literal after its assignment.

    Raises:
      LookupError: no module of this project defines it.
    """
    value = getattr(importlib.import_module(package), name)
    if isinstance(value, ModuleType):
        return value.__name__.rpartition(".")[0], value.__doc__
    for module in sorted(key for key in sys.modules if key.split(".")[0] in PACKAGES):
        if vars(sys.modules[module]).get(name) is value:
            body = ast.parse(inspect.getsource(sys.modules[module])).body
            for node, following in zip(body, [*body[1:], None], strict=True):
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
                    return module, ast.get_docstring(node)
                targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
                if name in [getattr(target, "id", None) for target in targets]:
                    literal = getattr(getattr(following, "value", None), "value", None)
                    return module, literal if isinstance(literal, str) else None
    raise LookupError(f"{package}.{name} is not defined in {', '.join(PACKAGES)}")
