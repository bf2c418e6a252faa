"""The whole page about several runs, of one kind or of several."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.drawing import new_figure, save_figure
from train.errors import UsageError
from train.page import Html, Section, heading, join, page, paragraph, section
from train.paths import check_file
from train.report import charts
from train.report.blocks import Block
from train.report.records import Run
from train.report.tables import progress
from train.report.verdict import sentence


def build(runs: Sequence[Run]) -> tuple[str, dict[str, Any]]:
    """Build (the page, its drawings by name), with the answer in its first sentence.

    Raises:
      UsageError: matplotlib is not installed.
    """
    new_figure(1, 1)  # says that matplotlib is missing
    sorts: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        sorts.setdefault((run.kind, run.dataset), []).append(run)
    pictures: dict[str, Any] = {}
    with charts.styled():
        several = len(sorts) > 1
        blocks = [
            Block(members, pictures, f"{kind}-{dataset}-".replace("/", "_") if several else "")
            for (kind, dataset), members in sorts.items()
        ]
        sections: list[Section] = []
        for block in blocks:
            parts = block.parts()
            if several:
                inside = [join(heading(name), body) for name, body in parts]
                sections.append(section(capital(block.title), paragraph(lead(block)), *inside))
            else:
                sections += [Section(*part) for part in parts]
        answers = [join(f"{capital(block.title)}: " if several else "", lead(block), by="") for block in blocks]
        title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(block.title for block in blocks)}"
        return page(title, join(*answers, by="<br>"), *sections), pictures


def capital(text: str) -> str:
    """A text with a capital letter at its start."""
    return text[:1].upper() + text[1:]


def lead(block: Block) -> Html:
    """The answer for one kind of runs, or why there is none."""
    if block.verdicts:
        return sentence(block.verdicts[0])
    unfinished = [run for group in block.groups for run in group.runs if not run.finished]
    if unfinished:
        states = ", ".join(f"{run.name} is {progress(run)}" for run in unfinished)
        return join(f"No run is finished yet: {states}.")
    return join("These runs have no score on validation that could rank them.")


def write(runs: Sequence[Run], html: Path) -> list[Path]:
    """Write the page, and its drawings as PNG files in a folder of the same name without suffix; return the paths.

    Raises:
      UsageError: a file cannot be written, or matplotlib is not installed.
    """
    check_file(html)
    text, pictures = build(runs)
    folder = html.with_suffix("")
    try:
        html.write_text(text, encoding="utf-8")
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write {error.filename}: {error.strerror}") from None
    with charts.styled():
        for name, drawing in pictures.items():
            save_figure(drawing, folder / f"{name}.png")
    return [html, *(folder / f"{name}.png" for name in pictures)]
