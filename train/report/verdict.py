"""Which setting is better, and whether seeds could explain the difference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from train.page import Html, join, strong
from train.report.records import SCORES, Group
from train.report.tables import text

Finding = Literal["only", "clear", "tie", "unconfirmed"]


@dataclass(frozen=True)
class Verdict:
    """The best of several comparable settings.

    Attributes:
      where: the condition, such as " at 90 % sparsity"; empty where there is only one comparison.
      score: what is compared, in words.
      best, second: the two best settings; no second if there is only one.
      margin: difference of their mean scores, in [0, 1].
      spread: standard deviation over seeds of one setting, pooled; None without repeated seeds.
      p: chance of a margin this large between equal settings (two-sided t-test on seeds); None without repeated seeds.
      images: number of validation images, if known.
      finding: "clear" (p below 0.05), "tie" (the margin is explained by seeds or by the number of images),
        "unconfirmed" (no repeated seeds), "only" (one setting).
    """

    where: str
    score: str
    best: Group
    second: Group | None
    margin: float
    spread: float | None
    p: float | None
    images: int | None
    finding: Finding
    settings: int


class Comparison(NamedTuple):
    """Settings that may be compared, best first, and the condition in words where several comparisons differ in it."""

    where: str
    groups: list[Group]


def comparable(groups: Sequence[Group]) -> list[Comparison]:
    """Split groups of one kind and data set by validation images and, for pruning, by sparsity; most runs first.

    Groups without a score are left out.
    """
    sorts: dict[tuple[float | None, str], list[Group]] = {}
    for group in groups:
        if group.scores:
            sparsity = group.mean("sparsity") if group.runs[0].kind == "pruning" else None
            split = text([group.runs[0].settings.get(f"data.{name}") for name in ("validation", "split_seed")])
            sorts.setdefault((None if sparsity is None else round(sparsity, 3), split), []).append(group)
    found = []
    for (sparsity, split), members in sorts.items():
        where = "" if sparsity is None else f" at {100 * sparsity:g} % sparsity"
        if any(other != split for _, other in sorts):
            where += f" with validation split {split}"
        found.append(Comparison(where if len(sorts) > 1 else "", members))
    return sorted(found, key=lambda comparison: -sum(len(group.scores) for group in comparison.groups))


def compare_best(comparison: Comparison) -> Verdict:
    """Compare the best setting with the next one."""
    where, groups = comparison
    best, second = groups[0], groups[1] if len(groups) > 1 else None
    images = best.runs[0].validation_images
    spread, freedom = pooled(groups)
    p, margin = None, 0.0
    finding: Finding = "only"
    if second is not None:
        margin = best.score - second.score
        if spread is None:
            # Without repeated seeds only the number of images bounds the noise from below.
            chance = math.sqrt(sum(g.score * (1 - g.score) for g in (best, second)) / images) if images else 0.0
            finding = "tie" if margin <= 1.96 * chance else "unconfirmed"
        else:
            # Accuracies are counts: equal ones over seeds do not mean that seeds never differ.
            smallest = 1 / (images or 10_000) / math.sqrt(12)
            error = max(spread, smallest) * math.sqrt(1 / len(best.scores) + 1 / len(second.scores))
            p = _two_sided(margin / error, freedom)
            finding = "clear" if p < 0.05 else "tie"
    score = SCORES[best.runs[0].kind][1]
    return Verdict(where, score, best, second, margin, spread, p, images, finding, len(groups))


def pooled(groups: Sequence[Group]) -> tuple[float | None, int]:
    """(Standard deviation over the seeds of a setting, degrees of freedom).

    Taken from the first two groups if they have six runs, else from all groups.
    """
    enough = sum(len(group.scores) for group in groups[:2]) >= 6
    pair = groups[:2] if enough else groups
    freedom = sum(len(group.scores) - 1 for group in pair if group.scores)
    if not freedom:
        return None, 0
    squares = sum(float(np.sum((np.array(group.scores) - group.score) ** 2)) for group in pair if group.scores)
    return math.sqrt(squares / freedom), freedom


def _two_sided(t: float, freedom: int) -> float:
    from scipy.stats import t as student

    return float(2 * student.sf(abs(t), freedom))


def sentence(verdict: Verdict) -> Html:
    """The verdict in words, the answer first."""
    best, second, score, where = verdict.best, verdict.second, verdict.score, verdict.where
    if second is None:
        seeds = f" (mean of {len(best.scores)} seeds, {spread_of(best)})" if best.spread is not None else ""
        return join(strong(best.name), f" reaches {percent(best.score)} {score}{seeds}{where}.", by="")
    # Two decimals only where one would not show the difference.
    digits = 1 if verdict.margin >= 0.01 else 2
    first, other = percent(best.score, digits), percent(second.score, digits)
    pair = f"{first} against {other} {score}"
    apart = f"{points(verdict.margin, digits)}{_images(verdict)}"
    if verdict.settings > 2:
        pair = f"{first} {score}; next is {second.name} with {other}"
    chance = "" if verdict.p is None else f"p = {verdict.p:.2g}" if verdict.p >= 0.001 else "p < 0.001"
    match verdict.finding:
        case "clear":
            many = f"the best of {verdict.settings} settings" if verdict.settings > 2 else f"better than {second.name}"
            title = f"{best.name} is {many}{where}"
            rest = f": {pair}. The margin of {apart} is more than the spread between seeds explains ({chance})."
        case "tie":
            title = f"No clear winner{where}"
            if verdict.spread is None:
                reason = "so few images cannot tell them apart"
            elif verdict.margin > 2 * verdict.spread:
                reason = f"so few runs do not rule out chance ({chance})"
            else:
                reason = f"seeds alone differ by {points(verdict.spread, digits)} (standard deviation; {chance})"
            rest = f": {best.name} leads {second.name} by {apart}, but {reason}. {best.name} has {pair}."
        case _:
            many = f"leads {verdict.settings} settings" if verdict.settings > 2 else f"is ahead of {second.name}"
            title = f"{best.name} {many}{where}"
            rest = f": {pair}. There is one run of each, so whether {apart} is more than chance is unknown."
    return join(strong(title), rest, by="")


def percent(share: float, digits: int = 2) -> str:
    """A share in [0, 1] in percent."""
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def points(share: float, digits: int = 2) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * share:.{digits}f} points"


def spread_of(group: Group) -> str:
    """Standard deviation over the seeds of a setting, in words; empty with one seed."""
    return "" if group.spread is None else f"standard deviation {points(group.spread)}"


def _images(verdict: Verdict) -> str:
    """How many images of a small validation split the margin is."""
    if verdict.images is None or verdict.images > 2000:
        return ""
    count = verdict.margin * verdict.images
    return f" ({count:.2g} of {verdict.images} images)"
