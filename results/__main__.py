"""Write the tables of the documentation from the run files: `python -m results [--check]`.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; results/tables.py has a function for each.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from results.tables import markdown
from train.errors import RunError, one_line

ROOT = Path(__file__).parents[1]
GUIDES = ("detection", "explanation", "pretraining", "pruning", "search", "speed")
PAGES = ("README.md", "results/README.md", *(f"docs/{name}.md" for name in GUIDES))
REGION = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.S)


def written(text: str) -> str:
    """Return the text of a page with its tables from the run files.

    Raises:
      UsageError: it names an unknown table, or a run file is missing.
    """
    return REGION.sub(lambda region: f"{region[1]}\n{markdown(region[2])}\n\n{region[3]}", text)


def main(argv: Sequence[str] | None = None) -> None:
    """Rewrite the pages, or with --check only report those that differ."""
    parser = argparse.ArgumentParser(prog="python -m results", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page differs")
    check = parser.parse_args(argv).check
    pages = {page: (ROOT / page).read_text() for page in PAGES}
    new = {page: written(text) for page, text in pages.items()}
    differ = [page for page in pages if new[page] != pages[page]]
    if check and differ:
        raise RunError(f"{', '.join(differ)} differ from the run files: run python -m results")
    for page in differ:
        (ROOT / page).write_text(new[page])
    print(f"written: {', '.join(differ)}" if differ else "all pages agree with the run files")


if __name__ == "__main__":
    with one_line():
        main()
