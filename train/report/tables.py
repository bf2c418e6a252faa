"""The tables of the page: runs, settings, and what differs between their configurations."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from train.page import Cell, Html, Number, details, table
from train.report.records import MISSING, Group, Run, differences

# (title, key of the result, how it is shown, which is best) by kind of run; a column without values is left out.
Column = tuple[str, str, Callable[[float], str], Literal["max", "min"] | None]


def share(value: float) -> str:
    """A share in [0, 1] in percent."""
    return f"{100 * value:.2f}"


def whole(value: float) -> str:
    """A number without decimals."""
    return f"{value:,.0f}"


def per_second(value: float) -> str:
    """A number without decimals, or with one below 10."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}"


def brief(value: float) -> str:
    """A number with at most four digits."""
    return f"{value:.4g}"


COST: tuple[Column, ...] = (
    ("epochs", "epochs", brief, None),
    ("images/s", "images_per_second", per_second, None),
    ("seconds", "seconds", whole, None),
    ("parameters", "parameters", whole, None),
    ("seed", "seed", whole, None),
)
SUPERVISED: tuple[Column, ...] = (
    ("validation, %", "validation_accuracy", share, "max"),
    ("test, once, %", "test_accuracy", share, None),
    ("test loss", "test_loss", brief, None),
)
COLUMNS: dict[str, tuple[Column, ...]] = {
    "training": (*SUPERVISED, *COST),
    "pruning": (
        ("sparsity, %", "sparsity", share, None),
        *SUPERVISED[:2],
        ("dense, test, %", "dense_accuracy", share, None),
        ("bytes before", "dense_bytes", whole, None),
        ("bytes after", "pruned_bytes", whole, None),
        *COST,
    ),
    "pretraining": (
        ("linear probe, validation, %", "validation_linear_accuracy", share, "max"),
        ("kNN, validation, %", "validation_knn_accuracy", share, None),
        ("linear probe, test, %", "linear_accuracy", share, None),
        ("kNN, test, %", "knn_accuracy", share, None),
        ("random weights, linear, %", "random_linear_accuracy", share, None),
        ("random weights, kNN, %", "random_knn_accuracy", share, None),
        ("effective rank", "health.effective_rank", brief, None),
        *COST,
    ),
    "detection": (
        ("AP, validation, %", "validation_ap", share, "max"),
        ("AP50, validation, %", "validation_ap50", share, None),
        ("AP, test, once, %", "test_ap", share, None),
        ("AP50, test, once, %", "test_ap50", share, None),
        ("sparsity, %", "sparsity", share, None),
        *COST,
    ),
}


def runs_table(groups: Sequence[Group], *, mark: bool) -> Html:
    """One row per run, by setting, and with `mark` the best one; the test split was evaluated once, at the end."""
    runs = [run for group in groups for run in group.runs]
    columns = [c for c in COLUMNS[runs[0].kind] if any(_value(run, c[1]) is not None for run in runs)]
    rows = [[run.name, *(cell(_value(run, key), form) for _, key, form, _ in columns)] for run in runs]
    best = {title: which for title, _, _, which in columns if which and mark}
    unfinished = [run for run in runs if not run.finished]
    head = ["run", *(title for title, *_ in columns)]
    if unfinished:
        head.insert(1, "state")
        for row, run in zip(rows, runs, strict=True):
            row.insert(1, "finished" if run.finished else progress(run))
    return table(head, rows, best=best)


def progress(run: Run) -> str:
    """How far an unfinished run has come."""
    row: dict[str, Any] = max(run.record["history"], key=lambda row: row.get("step", 0), default={})
    length = f"{run.settings['steps']} steps" if run.settings.get("steps") else f"{run.settings.get('epochs')} epochs"
    return f"unfinished: step {row.get('step', 0):,}, epoch {row.get('epoch', 0):.3g} of {length}"


def _value(run: Run, key: str) -> float | None:
    group, _, last = key.rpartition(".")
    record = run.record.get(group, {}) if group else run.record
    value = record.get(last) if run.finished or last == "seed" else None
    return run.settings.get("seed") if value is None and last == "seed" else value


def cell(value: float | None, form: Callable[[float], str]) -> Cell:
    """A number in a table, as `form` shows it; None is an empty cell."""
    return None if value is None else Number(value, form(value))


def settings_table(groups: Sequence[Group], title: str, *, mark: bool) -> Html:
    """One row per setting: mean and standard deviation of the score over seeds, with `mark` the best mean."""
    rows: list[list[Cell]] = []
    for group in groups:
        if group.scores:
            spread = None if group.spread is None else Number(group.spread, share(group.spread))
            rows.append([group.name, len(group.scores), Number(group.score, share(group.score)), spread])
    mean = f"{title}, mean, %"
    return table(["setting", "runs", mean, "deviation, points"], rows, best={mean: "max"} if mark else {})


def differences_table(groups: Sequence[Group]) -> Html | None:
    """Settings that differ, a row per field and a column per setting (a row per setting if there are many); or None."""
    fields = {**differences(groups), **_surroundings(groups)}
    if not fields:
        return None
    names = [group.name for group in groups]
    if len(groups) > max(4, len(fields)):
        rows = [[name, *(text(values[at]) for values in fields.values())] for at, name in enumerate(names)]
        return table(["setting", *fields], rows)
    return table(["field", *names], [[field, *map(text, values)] for field, values in fields.items()])


def _surroundings(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """Where the settings were run, if that differs: commit, version of JAX, devices, and the machine."""
    firsts = [group.runs[0].record for group in groups]
    places = {
        "commit": [str(record.get("commit") or MISSING)[:8] for record in firsts],
        "jax": [record.get("versions", {}).get("jax", MISSING) for record in firsts],
        "devices": [record.get("devices", MISSING) for record in firsts],
        "host": [record.get("host", MISSING) for record in firsts],
    }
    return {name: values for name, values in places.items() if len({*values}) > 1}


def text(value: Any) -> str:
    """A setting as the command line takes it."""
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
        case list() | tuple():
            return " ".join(map(text, value)) or "none"
    return str(value)


def configuration(group: Group) -> Html:
    """Command and full configuration of a setting, hidden until opened."""
    run = group.runs[0]
    rows = [[name, text(value)] for name, value in run.settings.items()]
    command = run.record.get("command")
    return details(f"Configuration of {group.name}", *([command] if command else []), table(["field", "value"], rows))
