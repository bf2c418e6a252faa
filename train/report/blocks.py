"""The parts of the page about runs of one kind on one data set: answer, runs, differences, curves, errors, cost."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from train.errors import UsageError
from train.page import Html, KeyFigure, details, figure, figures, join, key_figures, note, paragraph, table
from train.report import charts
from train.report.records import SCORES, Group, Run, differences, group_runs
from train.report.tables import configuration, differences_table, per_second, progress, runs_table, settings_table, text
from train.report.verdict import Verdict, comparable, compare_best, percent, sentence, spread_of

Part = tuple[str, Html]  # title, content


class Block:
    """Runs of one kind on one data set, and the parts that show them.

    Attributes:
      groups: the runs by setting, by comparison and then best score first; this rank gives a setting its colour.
      comparisons, verdicts: the sets of comparable settings, the largest first, and the best of each.
      pictures: the drawings made so far by name, also for files of their own.
    """

    def __init__(self, runs: Sequence[Run], pictures: dict[str, Any], prefix: str = "") -> None:
        self.groups, self.pictures, self.prefix = group_runs(runs), pictures, prefix
        self.kind, self.dataset = runs[0].kind, runs[0].dataset
        self.score = SCORES[self.kind][1]
        self.comparisons = comparable(self.groups)
        ranked = [group for comparison in self.comparisons for group in comparison.groups]
        self.groups = ranked + [group for group in self.groups if not group.scores]
        self.verdicts = [compare_best(comparison) for comparison in self.comparisons]

    @property
    def title(self) -> str:
        return f"{self.kind} on {self.dataset}"

    def show(self, name: str, drawing: Any, caption: object, alt: str) -> Html:
        """A drawing on the page, which is kept for a file of its own."""
        self.pictures[self.prefix + name] = drawing
        return figure(drawing, caption, alt=alt)

    def parts(self) -> list[Part]:
        """All parts that these runs have something for."""
        makers: list[tuple[str, Callable[[], list[Html]]]] = [
            ("Result", self.result),
            *([("Sparsity", self.pruning)] if self.kind == "pruning" else []),
            *([("Features", self.features)] if self.kind == "pretraining" else []),
            ("Runs", self.runs),
            ("What differs", self.what_differs),
            ("Curves", self.curves),
            ("Errors by class", self.errors),
            ("Speed", self.speed),
        ]
        found = [(title, maker()) for title, maker in makers]
        return [(title, join(*pieces)) for title, pieces in found if pieces]

    def result(self) -> list[Html]:
        """The other verdicts, the figures of the first one, reasons, and a chart of all scores."""
        pieces: list[Html] = []
        if self.verdicts:
            pieces.append(key_figures(self.figures(self.verdicts[0])))
            pieces += [paragraph(reason) for reason in self.reasons(self.verdicts[0])]
        shown: list[Html] = []
        scored = self.comparisons[0].groups if self.comparisons else []
        if len(scored) > 1 or any(len(group.scores) > 1 for group in scored):
            drawing = charts.draw_scores(scored, self.score)
            caption = f"One point per run{self.verdicts[0].where}; the bar and the number are the mean of a setting."
            shown.append(self.show("scores", drawing, caption, f"{self.score} by setting"))
        name, title = {
            "pretraining": ("validation_knn_accuracy", "kNN, validation (%)"),
            "detection": ("validation_ap", "AP, validation (%)"),
        }.get(self.kind, ("validation_accuracy", "Validation accuracy (%)"))
        over_time = self.curve(name, title, 100, zoom=True, dots=True)
        shown += [over_time] if over_time else []
        pieces += [figures(*shown)] if shown else []
        others = [paragraph(sentence(verdict)) for verdict in self.verdicts[1:]]
        pieces += others if len(others) < 5 else [details(f"{len(others)} more comparisons", *others)]
        return pieces

    def figures(self, verdict: Verdict) -> list[KeyFigure]:
        """The large figures below the answer."""
        best = verdict.best
        seeds = f"mean of {len(best.scores)} seeds, {spread_of(best)}" if best.spread is not None else best.name
        cards = [KeyFigure(percent(best.score), verdict.score, seeds)]
        if verdict.second is not None:
            remark = {"clear": "more than chance", "tie": "could be chance", "unconfirmed": "one run each: unconfirmed"}
            margin, label = f"+{100 * verdict.margin:.2f}", f"points ahead of {verdict.second.name}"
            cards.append(KeyFigure(margin, label, remark[verdict.finding]))
        test = "linear_accuracy" if self.kind == "pretraining" else "test_accuracy"
        for key, form, label in (
            (test, percent, "test accuracy, measured once"),
            ("test_ap", percent, "test AP, measured once"),
            ("test_ap50", percent, "test AP50"),
            ("sparsity", lambda x: f"{100 * x:.3g} %", "weights removed"),
            ("random_linear_accuracy", percent, "random weights, test"),
            ("images_per_second", per_second, "images per second"),
        ):
            if (value := best.mean(key)) is not None:
                cards.append(KeyFigure(form(value), label))
        return cards

    def reasons(self, verdict: Verdict) -> list[str]:
        """What may explain the margin: the settings that differ, and how well both fitted their training images."""
        best, second = verdict.best, verdict.second
        if second is None:
            return []
        fields = differences([best, second])
        listed = [f"{name} ({text(a)} against {text(b)})" for name, (a, b) in fields.items()]
        more = f" and {len(listed) - 5} more settings" if len(listed) > 6 else ""
        reasons = [f"They differ in {', '.join(listed[: 5 if more else 6])}{more}."] if listed else []
        # Training accuracies are comparable only under equal augmentation.
        ours, theirs = (_last(group, "accuracy") for group in (best, second))
        alike = not any(name.startswith(("augment", "data")) for name in fields)
        if alike and ours is not None and theirs is not None:
            fit = f"on training images {best.name} ends at {percent(ours)} and {second.name} at {percent(theirs)}"
            if verdict.finding != "tie":
                fit += ": the gap begins in training" if ours > theirs else ": the gap is one of generalisation"
            reasons.append(f"{fit[0].upper()}{fit[1:]}.")
        return reasons

    def runs(self) -> list[Html]:
        """The table of all runs; unfinished ones are named."""
        pieces = [
            note(f"{run.name} is {progress(run)}. It takes no part in the comparison.")
            for group in self.groups
            for run in group.runs
            if not run.finished
        ]
        if any(len(group.scores) > 1 for group in self.groups):
            pieces.append(settings_table(self.groups, self.score, mark=len(self.comparisons) == 1))
        everything = runs_table(self.groups, mark=len(self.comparisons) == 1)
        many = sum(len(group.runs) for group in self.groups) > 12
        pieces.append(details("All runs", everything) if many and len(pieces) else everything)
        return pieces

    def what_differs(self) -> list[Html]:
        """The configurations: what differs, and each in full."""
        found = differences_table(self.groups) if len(self.groups) > 1 else None
        every = [configuration(group) for group in self.groups]
        return [*([found] if found else []), *(every if len(every) < 4 else [details("All configurations", *every)])]

    def curves(self) -> list[Html]:
        """Figures by epoch."""
        named = [
            ("loss", "Training loss (nats)", 1, {}),
            ("accuracy", "Training accuracy (%)", 100, {"zoom": True}),
            ("validation_loss", "Validation loss (nats)", 1, {"zoom": True, "dots": True}),
            ("class_loss", "Loss of the classes (nats)", 1, {}),
            ("box_loss", "Loss of the boxes", 1, {}),
            ("validation_ap50", "AP50, validation (%)", 100, {"zoom": True, "dots": True}),
        ]
        shown = [self.curve(name, title, scale, **options) for name, title, scale, options in named]
        more = [
            self.curve(name, title, scale)
            for name, title, scale in (
                ("learning_rate", "Learning rate", 1),
                ("grad_norm", "Norm of the gradient", 1),
                ("validation_calibration_error", "Calibration error, validation (%)", 100),
            )
        ]
        bands = any(len(group.runs) > 1 for group in self.groups)
        about = "Lines are means over seeds, bands go from the lowest seed to the highest. " if bands else ""
        if len(self.groups) > charts.MOST:
            about += f"The best {charts.MOST} settings have colours, the others are grey. "
        kept = [piece for piece in shown if piece]
        hidden = [piece for piece in more if piece]
        pieces = [paragraph(about)] if about and kept else []
        pieces += [figures(*kept)] if kept else []
        return [*pieces, details("More curves", figures(*hidden))] if hidden else pieces

    def curve(self, name: str, title: str, scale: float, **options: Any) -> Html | None:
        """One chart of a figure by epoch; None without values."""
        drawing = charts.draw_curves(self.groups, name, title, scale=scale, **options)
        return None if drawing is None else self.show(name, drawing, "", f"{title} by epoch")

    def errors(self) -> list[Html]:
        """Accuracy by class, the confusion matrix of the best run, and its most frequent errors."""
        best = self.verdicts[0].best.runs[0] if self.verdicts else None
        if best is None or not best.class_scores:
            return []
        pieces: list[Html] = []
        count, classes = len(best.class_scores), [name for name, _ in best.class_scores]
        if 1 < count <= 30:
            pair = [g for g in (self.verdicts[0].best, self.verdicts[0].second) if g and g.runs[0].class_scores]
            score = "AP" if self.kind == "detection" else "accuracy"
            drawing = charts.draw_classes(pair, [self.groups.index(g) for g in pair], f"test {score} of the class (%)")
            caption = f"Test {score} by class, the hardest class on top."
            pieces.append(self.show("classes", drawing, caption, f"test {score} by class"))
        confusion = best.record.get("confusion", {})
        if count <= 20 and "confusion" in confusion:
            matrix = np.array(confusion["confusion"])
            drawing = charts.draw_confusion(np.column_stack([*np.nonzero(matrix), matrix[matrix > 0]]), classes)
            caption = f"Confusion matrix of {best.name} on the test split: errors are orange."
            pieces.append(self.show("confusion", drawing, caption, "confusion matrix"))
        if confusion.get("most_confused"):
            rows = [[str(true), str(guess), number] for true, guess, number in confusion["most_confused"][:10]]
            worst = table(["true class", "predicted", "images"], rows, caption=f"Most frequent errors of {best.name}")
            return [figures(*pieces), worst]
        return [figures(*pieces)] if pieces else []

    def speed(self) -> list[Html]:
        """Throughput by setting, and over time where the history has it."""
        rates = [(at, group, rate) for at, group in enumerate(self.groups) if (rate := group.mean("images_per_second"))]
        if not rates:
            return []
        ranks, groups, values = zip(*rates, strict=True)
        drawing = charts.draw_bars([g.name for g in groups], values, "images per second", per_second, ranks)
        runs = [run.record for group in groups for run in group.runs if run.finished]
        machines = dict.fromkeys(f"{run.get('devices')}, {run.get('host')}" for run in runs)
        caption = f"Mean rate of training without compilation, on {' and on '.join(machines)}."
        shown = [self.show("speed", drawing, caption, "images per second by setting")]
        shown += [over_time] if (over_time := self.curve("images_per_second", "Images per second", 1)) else []
        warning = note("The machines differ, so these rates do not compare settings.")
        return [figures(*shown), *([warning] if len(machines) > 1 else [])]

    def pruning(self) -> list[Html]:
        """Accuracy by sparsity, and what was kept of each layer of the best run."""
        from train.prune.report import curves_of, plot_curves, plot_layers

        finished = [run for group in self.groups for run in group.runs if run.finished]
        if not finished:
            return []
        drawing = charts.new_figure(charts.WIDTH, charts.HEIGHT + 0.3)
        dense = fmean(run.record["dense_accuracy"] for run in finished)
        plot_curves(drawing.subplots(), curves_of([dict(run.record) for run in finished]), dense)
        caption = "Test accuracy by sparsity; the dotted line is the dense network."
        pieces = [self.show("sparsity", drawing, caption, "test accuracy by sparsity")]
        rows = layers_of(finished[0])
        if rows:
            drawing = charts.new_figure(charts.WIDTH, 1.2 + 0.2 * len(rows))
            plot_layers(drawing.subplots(), rows, ["C0"] * len(rows))
            caption = f"Weights of each layer that {finished[0].name} kept."
            pieces.append(self.show("layers", drawing, caption, "kept weights by layer"))
        return [figures(*pieces)]

    def features(self) -> list[Html]:
        """Frozen features over time: kNN and online probe against random weights, and the measures of collapse."""
        named = [
            ("validation_online_linear_accuracy", "Linear probe online, validation (%)", 100),
            ("effective_rank", "Effective rank of the features", 1),
            ("dead_fraction", "Dead dimensions (%)", 100),
            ("positive_similarity", "Similarity of two views of an image", 1),
            ("negative_similarity", "Similarity of different images", 1),
        ]
        shown = [self.curve(name, title, scale, dots=True) for name, title, scale in named]
        verdicts = [
            paragraph(f"{run.name}: {run.record['verdict']}.")
            for group in self.groups
            for run in group.runs
            if run.finished and run.record.get("verdict")
        ]
        about = paragraph("At epoch 0 the weights are random. Losses of different objectives do not compare.")
        health = verdicts if len(verdicts) < 7 else [details("Health of each run", *verdicts)]
        return [*health, about, figures(*(piece for piece in shown if piece))]


def layers_of(run: Run) -> list[dict[str, Any]]:
    """Rows of `train.prune.measure.compare` for a run in a folder; none if its networks are no longer there."""
    from train.prune.measure import measure

    if run.path.is_file():
        return []
    try:
        return measure(run.path, steps=0)["layers"]
    except UsageError:
        return []


def _last(group: Group, name: str) -> float | None:
    """Mean over seeds of the last value of a figure in the history."""
    values = [curve[-1][1] for run in group.runs if run.finished and (curve := run.curve(name))]
    return fmean(values) if values else None
