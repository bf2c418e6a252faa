"""What pruning did to a network: as JSON, as text for a terminal, as a picture."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn

from resnet_jax.tree import PyTree
from train.prune.layers import Row, aligned, layer_table, short, totals
from train.prune.layers import text as layers_text
from train.report import new_figure, save_figure

Report = dict[str, Any]

NAMED = 24  # curves that a legend can name and still be read
ABOVE: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 2, "fontsize": 8, "frameon": False}


@dataclass(frozen=True, kw_only=True)
class Network:
    """One side of a comparison: `accuracy` in [0, 1], `stored_bytes` of the file that it is kept in."""

    model: nn.Module
    variables: PyTree
    masks: PyTree
    accuracy: float
    stored_bytes: int


def describe(
    before: Network,
    after: Network,
    image_shape: Sequence[int],
    *,
    latency: Mapping[str, Mapping[str, Any]] | None = None,
    sensitivity: Mapping[str, Any] | None = None,
) -> Report:
    """All that `text` and `draw` tell, ready for JSON; images are (H, W, C).

    Args:
      latency: of models named `before` and `after`, from `train.prune.latency.latency`.
      sensitivity: `sparsities`; `accuracy`, what `train.prune.sensitivity.sensitivity` found for them; `baseline`, that
        of the network before on the same images.

    Returns:
      `before` and `after`: `accuracy`, `bytes`, `train.prune.layers.totals`, and by batch the median `latency_ms`.
      `layers`: rows of `layer_table` for the network before, with the weights and multiply-adds that are left after
      (masked or, where a network has become smaller, still there). `latency` and `sensitivity`, as given.
    """
    rows = [layer_table(net.model, net.variables, net.masks, image_shape) for net in (before, after)]
    sides = {
        name: {
            "accuracy": net.accuracy,
            "bytes": net.stored_bytes,
            **totals(own, net.variables),
            "latency_ms": {batch: timed[name]["step_ms"] for batch, timed in (latency or {}).items()},
        }
        for name, net, own in zip(("before", "after"), (before, after), rows, strict=True)
    }
    return {**sides, "layers": _left(*rows), "latency": latency, "sensitivity": sensitivity}


def _left(before: Sequence[Row], after: Sequence[Row]) -> list[Row]:
    """Rows of the network before, with what is left of each layer after; nothing of one that is gone."""
    left = {row["path"]: row for row in after}
    gone = {"kept": 0, "prunable": True, "nonzero_macs": 0}
    rows = [{**row, **{name: left.get(row["path"], gone)[name] for name in gone}} for row in before]
    return [{**row, "sparsity": 1 - row["kept"] / row["parameters"]} for row in rows]


def text(report: Report) -> str:
    """Before and after side by side, then the layers, then what pruning each alone costs; for a terminal 100 wide."""
    lines: list[Sequence[str]] = [("", "before", "after", "")]
    for (label, before, after, form), change in zip(_figures(report), _changes(report), strict=True):
        lines.append((label, form(before), form(after), change))
    parts = [aligned(lines, "<>><")]
    if report["after"]["nonzero_macs"] < report["after"]["macs"]:
        parts[0] += "\nZeros are multiplied like other weights: only smaller shapes compute less."
    parts.append("What is left of each layer\n" + layers_text(report["layers"]))
    if found := report["sensitivity"]:
        lines = [("layer", *(f"{100 * share:g}%" for share in found["sparsities"]))]
        lines += [(short(path), *(f"{100 * x:.1f}" for x in row)) for path, row in _curves(report).items()]
        parts.append("Accuracy (%) with one layer alone pruned to a sparsity of\n" + aligned(lines, "<"))
    return "\n\n".join(parts)


def _figures(report: Report) -> list[tuple[str, float, float, Callable[[float], str]]]:
    """(what, before, after, how it is written) of all that is compared."""
    sides = report["before"], report["after"]
    named = [
        ("accuracy", "accuracy", "{:.2%}".format),
        ("bytes stored", "bytes", "{:,}".format),
        ("parameters", "parameters", "{:,}".format),
        ("parameters kept", "kept_parameters", "{:,}".format),
        ("MACs an image", "macs", _millions),
        ("MACs of those kept", "nonzero_macs", _millions),
    ]
    figures = [(label, *(side[name] for side in sides), form) for label, name, form in named]
    for batch in report["before"]["latency_ms"]:
        times = [side["latency_ms"][batch] for side in sides]
        figures.append((f"latency, batch {batch}", *times, "{:,.2f} ms".format))
    return figures


def _millions(macs: float) -> str:
    return f"{macs / 1e6:,.3f} M"


def _changes(report: Report) -> list[str]:
    """What became of each of `_figures`, in words."""
    (_, *accuracy, _), *figures = _figures(report)
    changes = [f"{100 * (accuracy[1] - accuracy[0]):+.2f} points"]
    for _, before, after, _ in figures[: len(figures) - len(report["before"]["latency_ms"])]:
        if before == after:
            changes.append("the same")
        else:
            changes.append(f"{before / after:.2f}x less" if after < before else f"{after / before:.2f}x more")
    for timed in (report["latency"] or {}).values():
        speedup = timed["after"]["speedup"]
        changes.append(f"{speedup['value']:.2f}x as fast ({speedup['low']:.2f} to {speedup['high']:.2f})")
    return changes


def _curves(report: Report) -> dict[str, list[float]]:
    """Accuracies of `sensitivity` by path, in the order of the forward pass."""
    curves = report["sensitivity"]["accuracy"]
    return {row["path"]: curves[row["path"]] for row in report["layers"] if row["path"] in curves}


def draw(report: Report, picture: Path) -> None:
    """Kept weights by layer; before and after; accuracy by sparsity of each layer alone. Needs the extra `plot`.

    Raises:
      UsageError: matplotlib is not installed.
    """
    figure = new_figure(14, min(max(7.5, 1 + 0.18 * len(report["layers"])), 18))
    left, right = figure.subfigures(1, 2)
    _draw_layers(left.subplots(), report["layers"])
    if report["sensitivity"]:
        sides, curves = right.subplots(2, 1, height_ratios=(1, 1.5))
        _draw_sensitivity(curves, report)
        names = None if len(_curves(report)) <= NAMED else f"the {NAMED} most sensitive layers"
        handles = curves.get_legend_handles_labels()
        look: dict[str, Any] = {"fontsize": 7, "title_fontsize": 8, "handlelength": 1.5, "columnspacing": 1}
        right.legend(*handles, **look, ncols=4, title=names, loc="outside lower center")
    else:
        sides = right.subplots()
    _draw_sides(sides, report)
    for axes in figure.axes:
        axes.grid(alpha=0.3, axis="both" if axes.lines else "x")
        axes.set_axisbelow(True)
    save_figure(figure, picture)


def _draw_layers(axes: Any, rows: Sequence[Row]) -> None:
    """A bar of all weights and over it one of those kept, on a logarithmic scale, with the share in percent."""
    axes.barh(range(len(rows)), [row["parameters"] for row in rows], color="0.86", label="before")
    axes.barh(range(len(rows)), [row["kept"] for row in rows], color=_colours(len(rows)), label="after")
    for place, row in enumerate(rows):
        axes.text(row["parameters"], place, f" {100 * (1 - row['sparsity']):.3g}%", va="center", fontsize=7)
    axes.set_xscale("log")
    axes.set_xlim(max(min(row["kept"] for row in rows) / 3, 1), 5 * max(row["parameters"] for row in rows))
    axes.set_yticks(range(len(rows)), [short(row["path"]) for row in rows], fontsize=7.5)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set(xlabel="weights (logarithmic)", title="kept weights by layer")
    axes.legend(**ABOVE)


def _draw_sides(axes: Any, report: Report) -> None:
    """Bars relative to before, with the figures themselves beside them."""
    figures = _figures(report)
    shares = [100 * after / before if before else 100 for _, before, after, _ in figures]
    axes.barh(range(len(figures)), [100] * len(figures), color="0.86", label="before")
    axes.barh(range(len(figures)), shares, 0.5, color="C0", label="after")
    for place, (_, before, after, form) in enumerate(figures):
        told = f" {form(before)} \N{RIGHTWARDS ARROW} {form(after)}"
        axes.text(max(100, shares[place]), place, told, va="center", fontsize=7.5)
    axes.set_yticks(range(len(figures)), [label for label, *_ in figures], fontsize=8)
    axes.set_ylim(len(figures) - 0.4, -0.6)
    axes.set_xlim(0, 1.5 * max(100, *shares))
    axes.set(xlabel="% of before", title="before and after")
    axes.legend(**ABOVE)


def _draw_sensitivity(axes: Any, report: Report) -> None:
    """A curve a layer, in the colour of its bar; those that lose most have labels for a legend."""
    order = [row["path"] for row in report["layers"]]
    colours, curves = dict(zip(order, _colours(len(order)), strict=True)), _curves(report)
    named = sorted(curves, key=lambda path: sum(curves[path]))[:NAMED]
    shares = [100 * share for share in report["sensitivity"]["sparsities"]]
    for number, (path, accuracies) in enumerate(curves.items()):
        # Neighbours have much the same colour, so markers tell them apart.
        look = {"marker": "os^D"[number % 4], "label": short(path)} if path in named else {"alpha": 0.3}
        axes.plot(shares, [100 * accuracy for accuracy in accuracies], color=colours[path], ms=3.5, lw=1.2, **look)
    axes.axhline(100 * report["sensitivity"]["baseline"], color="grey", lw=0.8, ls=":")
    axes.set(xlabel="sparsity (%)", ylabel="accuracy (%)", title="accuracy with one layer alone pruned")


def _colours(number: int) -> list[Any]:
    """A colour for each layer, by depth."""
    from matplotlib import colormaps

    return [colormaps["turbo"](0.05 + 0.9 * i / max(number - 1, 1)) for i in range(number)]
