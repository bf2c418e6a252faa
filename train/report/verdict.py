"""Which setting is better, and whether seeds could explain the difference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from train.page import Html, join, strong
from train.report.records import SCORES, Group

Finding = Literal["only", "clear", "tie", "unconfirmed"]


@dataclass(frozen=True)
class Verdict:
    """The best of several comparable settings.

    Attributes:
      about: what was compared, such as "training on digits".
      best, second: the two best settings; no second if there is only one.
      margin: difference of their mean scores, in [0, 1].
      spread: standard deviation over seeds of one setting, pooled; None without repeated seeds.
      p: chance of a margin this large between equal settings (two-sided t-test on seeds); None without repeated seeds.
      images: number of validation images, if known.
      finding: "clear" (p below 0.05), "tie" (the margin is explained by seeds or by the number of images),
        "unconfirmed" (no repeated seeds), "only" (one setting).
    """

    about: str
    score: str
    best: Group
    second: Group | None
    margin: float
    spread: float | None
    p: float | None
    images: int | None
    finding: Finding
    settings: int


def comparable(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Sort groups by what they may be compared on: kind, data and validation split, and for pruning the sparsity.

    The keys say it in words; groups without a score are left out.
    """
    sorts: dict[tuple[str, str, str, str], list[Group]] = {}
    for group in groups:
        run = group.runs[0]
        sparsity = group.mean("sparsity")
        pruned = f" at {100 * sparsity:.3g} % sparsity" if run.kind == "pruning" and sparsity is not None else ""
        split = str([run.settings.get(f"data.{name}") for name in ("validation", "split_seed")])
        if group.scores:
            sorts.setdefault((run.kind, run.dataset, pruned, split), []).append(group)
    words = {}
    for at, ((kind, dataset, pruned, split), members) in enumerate(sorts.items()):
        others = [key for key in sorts if key[:3] == (kind, dataset, pruned) and key[3] != split]
        share = members[0].runs[0].settings.get("data.validation")
        words[at] = f"{kind} on {dataset}{pruned}" + (f" (validation split {share:g})" if others and share else "")
    names = [words[at] if [*words.values()].count(words[at]) == 1 else f"{words[at]}, {at + 1}" for at in words]
    return dict(sorted(zip(names, sorts.values(), strict=True), key=lambda item: -sum(len(g.runs) for g in item[1])))


def judge(about: str, groups: Sequence[Group]) -> Verdict:
    """Compare the best setting with the next one; `groups` are comparable, best first, and have scores."""
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
    return Verdict(about, score, best, second, margin, spread, p, images, finding, len(groups))


def pooled(groups: Sequence[Group]) -> tuple[float | None, int]:
    """(Standard deviation over the seeds of a setting, degrees of freedom).

    Taken from the first two groups if both have repeated seeds, else from all groups.
    """
    pair = groups[:2] if all(len(group.scores) > 1 for group in groups[:2]) else groups
    freedom = sum(len(group.scores) - 1 for group in pair)
    if not freedom:
        return None, 0
    squares = sum(float(np.sum((np.array(group.scores) - group.score) ** 2)) for group in pair if group.scores)
    return math.sqrt(squares / freedom), freedom


def _two_sided(t: float, freedom: int) -> float:
    from scipy.stats import t as student

    return float(2 * student.sf(abs(t), freedom))


def sentence(verdict: Verdict) -> Html:
    """The verdict in words, the answer first."""
    best, second, score = verdict.best, verdict.second, verdict.score
    if second is None:
        seeds = f" (mean of {len(best.scores)} seeds, {spread_of(best)})" if best.spread is not None else ""
        return join(strong(best.name), f" reaches {percent(best.score)} {score}{seeds}.", by="")
    pair = f"{percent(best.score)} against {percent(second.score)} {score}"
    apart = f"{points(verdict.margin)}{_images(verdict)}"
    if verdict.settings > 2:
        title = f"{best.name} is the best of {verdict.settings} settings"
        pair = f"{percent(best.score)} {score}; next is {second.name} with {percent(second.score)}"
    else:
        title = f"{best.name} is better than {second.name}"
    match verdict.finding:
        case "clear":
            chance = f"p = {verdict.p:.2g}" if verdict.p and verdict.p >= 0.001 else "p < 0.001"
            rest = f": {pair}. The margin of {apart} is more than the spread between seeds explains ({chance})."
        case "tie":
            title = "No clear winner"
            reason = (
                f"the spread between seeds explains it (standard deviation {points(verdict.spread)})"
                if verdict.spread is not None
                else "so few images cannot tell them apart"
            )
            rest = f": {best.name} leads {second.name} by {apart} ({pair}), but {reason}."
        case _:
            title = title.replace(" is better than ", " is ahead of ").replace(" is the best of ", " leads ")
            rest = f": {pair}. There is one run of each, so whether {apart} is more than chance is unknown."
    return join(strong(title), rest, by="")


def percent(share: float) -> str:
    """A share in [0, 1] in percent, with two decimals."""
    return f"{100 * share:.2f} %"


def points(share: float) -> str:
    """A difference of shares in percentage points."""
    return f"{100 * share:.2f} points"


def spread_of(group: Group) -> str:
    """Standard deviation over the seeds of a setting, in words; empty with one seed."""
    return "" if group.spread is None else f"standard deviation {points(group.spread)}"


def _images(verdict: Verdict) -> str:
    """How many images of a small validation split the margin is."""
    if verdict.images is None or verdict.images > 2000:
        return ""
    count = verdict.margin * verdict.images
    return f", {count:.2g} of {verdict.images} images,"
