"""The page about runs: well formed, self-contained, honest about noise, and with the figures of the runs."""

import json
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="needs the extra plot")

from train import page
from train.drawing import new_figure
from train.report import blocks, charts
from train.report.__main__ import main
from train.report.records import Group, Run, differences, group_runs, read_run
from train.report.verdict import Comparison, comparable, compare_best, sentence

VOID = {"meta", "link", "img", "br", "wbr"}


class Parsed(HTMLParser):
    """The text, tables and tags of a page; fails if tags are not balanced."""

    def __init__(self, markup):
        super().__init__()
        self.open, self.tags, self.text, self.cells = [], [], "", []
        self.feed(markup)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, tag

    def handle_data(self, text):
        if self.open and self.open[-1] != "style":
            self.text += text.replace("\N{NO-BREAK SPACE}", " ")
            if self.open[-1] in ("td", "th"):
                self.cells[-1] += text


def make_run(folder, *, seed=0, lr=0.1, accuracy=0.9, finished=True, classes=("<b>", 'a "cat"', "dog"), **extra):
    """Write a run folder as the programs do."""
    folder.mkdir(parents=True)
    config = {
        "seed": seed,
        "epochs": 4,
        "batch": 32,
        "out": str(folder),
        "optim": {"name": "sgd", "lr": lr},
        "data": {"validation": 0.1},
    }
    about = {"config": {**config, **extra.pop("config", {})}, "classes": classes, "dataset": "digits"}
    about |= {"images": {"validation": {"count": 1000}}}
    (folder / "config.json").write_text(json.dumps(about))
    rows = []
    for epoch in range(1, 5):
        rows.append({"step": 10 * epoch, "epoch": epoch, "loss": 2 / epoch, "accuracy": 0.2 * epoch})
        rows[-1] |= {"grad_norm": 1, "seconds": 0.0 if epoch == 1 else epoch * 0.5}
        rows.append({"step": 10 * epoch, "epoch": epoch, "validation_accuracy": accuracy - 0.1 / epoch})
    rows = rows if finished else rows[:4]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        result = {"validation_accuracy": accuracy, "test_accuracy": accuracy - 0.01, "images_per_second": 1234.5}
        result |= {"test_per_class_accuracy": [0.5, 0.75, 1], "parameters": 75002, "seconds": 12.3, "epochs": 4}
        result |= {"seed": seed, "dataset": "digits", "command": "python -m train"}
        (folder / "result.json").write_text(json.dumps({**result, **extra}))
        confusion = {"classes": classes, "confusion": [[5, 1, 0], [0, 4, 2], [0, 0, 6]]}
        confusion["most_confused"] = [["<b>", "dog", 2]]
        (folder / "confusion.json").write_text(json.dumps(confusion))
    return folder


def read(*folders):
    return [read_run(folder, folders) for folder in folders]


def scored(name, *accuracies, images=1000):
    """A setting with runs of these scores."""
    record = {"config": {"optim": {"lr": 0.1}}, "history": [], "images": {"validation": {"count": images}}}
    return Group(name, tuple(Run(name, None, {**record, "validation_accuracy": a}, True) for a in accuracies))


def plain(markup):
    return re.sub("<[^>]*>", "", markup).replace("\N{NO-BREAK SPACE}", " ")


def test_page_is_well_formed_escaped_and_always_the_same():
    def build():
        drawing = new_figure(4, 3)
        drawing.subplots().plot([1, 2], [3, 4], "C0o-", label="x")
        drawing.axes[0].set_title("a <i> & b")
        image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
        return page.page(
            'A "<b>"',
            "<lead>",
            page.key_figures([page.KeyFigure("<1>", "<2>", "<3>")]),
            page.section(
                "One <x>", page.table(["<h>", "n"], [["<r>", 1.5], ["s", None]]), page.figure(drawing, "<cap>")
            ),
            page.section("Two", page.image_grid([(page.photograph(image, '"alt"', width=90), "<c>")])),
            page.section("Two", page.details("<more>", page.code("a\n<b>"), page.note("<n>")), page.heading("<t>")),
        )

    markup = build()
    assert markup == build()
    parsed = Parsed(markup)
    texts = ('A "<b>"', "<lead>", "<1><3>", "<h>", "<r>", "<cap>", "a <i> & b", "<c>", "<more>", "a\n<b>", "<n>", "<t>")
    for text in texts:
        assert text in parsed.text, text
    assert not {"i", "lead", "r", "x", "script"} & {tag for tag, _ in parsed.tags}
    ids = [found["id"] for _, found in parsed.tags if "id" in found]
    links = [found["href"] for tag, found in parsed.tags if tag == "a"]
    assert len({*ids}) == len(ids) and links == ["#one-x", "#two", "#two-3"] and {link[1:] for link in links} <= {*ids}
    # Nothing is fetched, and nothing tells when it was made.
    assert not re.search(r"https?:|//|url\((?!#)|@import|20\d\d-\d\d", re.sub(r'src="data:[^"]*"', "", markup))
    assert "var(--c0)" in markup and "#1f77b4" not in markup and "#000000" not in markup


def test_python_of_the_documentation_runs():
    namespace = {}
    (block,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "report.md").read_text(), re.S)
    exec(block, namespace)
    assert "a is better than b" in Parsed(namespace["html"]).text


def test_table_aligns_numbers_and_marks_the_best():
    rows = [["a", page.Number(0.5, "50 %"), 1200, 3.0], ["b", page.Number(0.7, "70 %"), None, 3.0]]
    markup = page.table(["run", "accuracy", "images", "same"], rows, best={"accuracy": "max", "same": "min"})
    assert re.findall(r'<td class="num best">([^<]*)<', markup) == ["70 %"]
    assert re.findall(r'<td class="num">([^<]*)<', markup) == ["50 %", "1,200", "3", "", "3"]


@pytest.mark.parametrize("scores, finding, words", [
    (([0.95, 0.951, 0.952], [0.90, 0.901, 0.902]), "clear", "a is better than b"),
    (([0.95, 0.93, 0.91], [0.94, 0.92, 0.9]), "tie", "No clear winner"),
    (([0.951], [0.95]), "tie", "so few images cannot tell them apart"),
    (([0.95], [0.80]), "unconfirmed", "one run of each"),
    (([0.95, 0.951],), "only", "a reaches 95.05 % validation accuracy (mean of 2 seeds"),
])  # fmt: skip
def test_verdict_weighs_the_margin_against_the_noise(scores, finding, words):
    verdict = compare_best(Comparison("", [scored(name, *values) for name, values in zip("ab", scores, strict=False)]))
    assert verdict.finding == finding and words in plain(sentence(verdict))


def test_p_is_that_of_a_t_test():
    from scipy.stats import ttest_ind

    ours, theirs = [0.95, 0.93, 0.94], [0.92, 0.935, 0.91]
    verdict = compare_best(Comparison("", [scored("a", *ours), scored("b", *theirs)]))
    assert verdict.p == pytest.approx(ttest_ind(ours, theirs).pvalue)


def test_only_comparable_runs_are_ranked(tmp_path):
    """Pruned networks are compared at equal sparsity, and runs on the same validation images."""
    prune = {"config": {"prune": {"sparsity": 0.5}}}
    runs = [
        make_run(tmp_path / f"half{at}", accuracy=0.9 + at / 100, sparsity=0.5, lr=at + 1, **prune) for at in (0, 1)
    ]
    runs.append(make_run(tmp_path / "dense", accuracy=0.99, sparsity=0.1, **prune))
    found = comparable(group_runs(read(*runs)))
    assert [(where, [group.name for group in groups]) for where, groups in found] == [
        (" at 50 % sparsity", ["half1", "half0"]),
        (" at 10 % sparsity", ["dense"]),
    ]
    small = make_run(tmp_path / "small", config={"data": {"validation": 0.002}})
    assert len(comparable(group_runs(read(make_run(tmp_path / "usual"), small)))) == 2


def test_runs_are_grouped_by_setting(tmp_path):
    runs = [make_run(tmp_path / f"high-seed{seed}", seed=seed, accuracy=0.9) for seed in range(3)]
    runs.append(make_run(tmp_path / "low", lr=0.01, accuracy=0.95))
    runs.append(make_run(tmp_path / "half", finished=False))
    groups = group_runs(read(*runs))
    assert [(group.name, len(group.runs)) for group in groups] == [("low", 1), ("high", 3), ("half", 1)]
    assert differences(groups[:2]) == {"optim.lr": [0.01, 0.1]}
    # The first rate is that of 10 steps of 32 images in the second from the first row to the second.
    assert groups[0].runs[0].curve("images_per_second") == [(2, 320), (3, 640), (4, 640)]


def test_page_shows_the_figures_of_the_runs(tmp_path, capsys):
    accuracies = {0: 0.9123, 1: 0.9234, 2: 0.9345}
    runs = [make_run(tmp_path / f"<hot>-seed{s}", seed=s, accuracy=a) for s, a in accuracies.items()]
    runs += [make_run(tmp_path / f"cold-seed{s}", seed=s, accuracy=a - 0.2, lr=0.01) for s, a in accuracies.items()]
    runs.append(make_run(tmp_path / "half", lr=0.5, finished=False))
    main([*map(str, runs), "--html", str(tmp_path / "page.html")])
    assert "page.html" in capsys.readouterr().out
    markup = (tmp_path / "page.html").read_text()
    parsed = Parsed(markup)
    assert "<hot> is better than cold: 92.3 % against 72.3 % validation accuracy" in parsed.text
    assert "They differ in optim.lr (0.1 against 0.01)." in parsed.text
    assert "half is unfinished: step 20, epoch 2 of 4 epochs" in parsed.text
    for accuracy in accuracies.values():
        assert {f"{100 * accuracy:.2f}", f"{100 * (accuracy - 0.01):.2f}"} <= {*parsed.cells}
    assert {"75,002", "1,234", "12"} <= {*parsed.cells} and 'a "cat"' in parsed.text
    assert "<hot>-seed2" in parsed.text and "<hot>" not in markup
    assert not re.search(r"https?://", markup)
    pictures = {path.name for path in (tmp_path / "page").iterdir()}
    assert {
        "scores.png",
        "validation_accuracy.png",
        "loss.png",
        "classes.png",
        "confusion.png",
        "speed.png",
    } <= pictures
    with Image.open(tmp_path / "page" / "scores.png") as image:
        assert image.width > 500


def test_class_without_test_images_comes_last(tmp_path):
    run = make_run(tmp_path / "run", test_per_class_accuracy=[None, 0.75, 0.5])  # JSON has no nan
    main([str(run)])
    axes = charts.draw_classes(group_runs(read(run)), [0], "").axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["dog", 'a "cat"', "<b>"]


@pytest.mark.slow
def test_confusion_shows_counts_of_the_classes_with_the_most_errors():
    counts = np.array([[0, 0, 90], [0, 1, 10], [1, 1, 1200], [2, 0, 7]])
    axes = charts.draw_confusion(counts, ["cat", "dog", "owl"]).axes[0]
    assert {(*text.get_position(), text.get_text()) for text in axes.texts} == {
        (0, 0, "90"),
        (1, 0, "10"),
        (1, 1, "1,200"),
        (0, 2, "7"),
    }
    blue = {patch.get_xy(): patch.get_alpha() for patch in axes.patches}
    assert blue[-0.5, -0.5] == pytest.approx(0.35 * 0.9) and blue[0.5, -0.5] == pytest.approx(0.9 * 0.1**0.5)
    # Of very many classes the two that are confused are among those shown, in the order of classes.
    right = np.stack([np.arange(50_000)] * 2 + [np.ones(50_000, int)], axis=1)
    many = charts.draw_confusion(np.concatenate([right, [[40_007, 12, 3]]]), [f"c{at}" for at in range(50_000)]).axes[0]
    names = [text.get_text() for text in many.get_yticklabels()]
    assert len(names) == charts.CONFUSED and names[-1] == "c40007" and "c12" in names
    assert len(many.texts) == charts.CONFUSED + 1


def test_all_kinds_meet_on_one_page(tmp_path, monkeypatch, capsys):
    looks = [
        {"step": s, "epoch": s, "validation_knn_accuracy": 0.1 + s / 10, "effective_rank": 5 + s} for s in range(4)
    ]
    pretrained = make_run(
        tmp_path / "simclr",
        config={"objective": {"name": "simclr"}},
        validation_linear_accuracy=0.8765,
        linear_accuracy=0.8654,
        knn_accuracy=0.8543,
        random_knn_accuracy=0.3,
        random_linear_accuracy=0.4320,
        health={"effective_rank": 38.04},
        verdict="representations are healthy",
    )
    (pretrained / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in looks))
    pruned = make_run(
        tmp_path / "pruned",
        config={
            "prune": {"schedule": "gradual", "score": "magnitude", "scope": "global", "structure": "x", "start": "y"}
        },
        sparsity=0.9,
        dense_accuracy=0.91,
        pruned_accuracy=0.89,
        dense_bytes=1000,
        pruned_bytes=123,
    )
    detected = make_run(
        tmp_path / "detected",
        config={"detector": "faster_rcnn"},
        validation_ap=0.4321,
        validation_ap50=0.7654,
        test_ap=0.4109,
        test_per_class={"cat": {"ap": 0.61, "ap50": 0.9}, "cow": {"ap": 0.21, "ap50": 0.5}, "rare": {"ap": None}},
    )
    (detected / "confusion.json").unlink()
    # The network of a real run is measured in tests/train/prune.
    row = {"path": "stem/conv/kernel", "parameters": 100, "kept": 10, "sparsity": 0.9}
    monkeypatch.setattr(blocks, "layers_of", lambda run: [row])
    monkeypatch.chdir(tmp_path)
    main([str(make_run(tmp_path / "plain")), str(pretrained), str(pruned), str(detected)])
    assert capsys.readouterr().out.startswith("report.html\n")
    parsed = Parsed((tmp_path / "report.html").read_text())
    for text in ("Training on digits", "Pruning on digits", "Pretraining on digits", "Detection on digits"):
        assert text in parsed.text
    assert "representations are healthy" in parsed.text and "test AP of the class (%)" in parsed.text
    assert {"43.21", "76.54", "41.09"} <= {*parsed.cells}
    assert {"87.65", "86.54", "85.43", "43.20", "38.04", "90.00", "123"} <= {*parsed.cells}
    assert (
        "Effective rank of the features" in parsed.text
        and "sparsity (%)" in parsed.text
        and "90.0%" not in parsed.text
        and "10.0%" in parsed.text
    )


def test_unfinished_run_and_default_place(tmp_path, capsys):
    run = make_run(tmp_path / "half", finished=False)
    main([str(run)])
    assert capsys.readouterr().out.startswith(str(run / "report.html"))
    assert "No run is finished yet: half is unfinished: step 20" in Parsed((run / "report.html").read_text()).text


def test_refusals(tmp_path, fails, monkeypatch):
    run = make_run(tmp_path / "run")
    assert "holds no run: config.json is missing" in fails(2, main, [str(tmp_path)])
    assert "is not a folder" in fails(2, main, [str(run), "--html", str(tmp_path / "no" / "x.html")])
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"config": 3}')
    assert "is not a run" in fails(2, main, [str(tmp_path / "broken")])
    (tmp_path / "page").write_text("a file where the pictures go")
    assert "cannot write" in fails(2, main, [str(run), "--html", str(tmp_path / "page.html")])
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert 'pip install -e ".[plot]"' in fails(2, main, [str(run)])


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def chromium(*options):
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome on PATH")
@pytest.mark.parametrize("dark", [False, True])
def test_browser_shows_the_page(tmp_path, dark):
    runs = [make_run(tmp_path / f"a_rather_long_name_of_a_run_{s}", seed=s, accuracy=0.9 + s / 100) for s in range(3)]
    runs.append(make_run(tmp_path / "other", lr=0.01, classes=[f"class {'long ' * 8}{at}" for at in range(3)]))
    main([*map(str, runs), "--html", str(tmp_path / "page.html")])
    markup = (tmp_path / "page.html").read_text()
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"

    shot = tmp_path / "shot.png"
    shown = chromium(
        scheme,
        f"--screenshot={shot}",
        "--window-size=1200,900",
        "--enable-logging=stderr",
        f"file://{tmp_path}/page.html",
    )
    assert "CONSOLE" not in shown.stderr, shown.stderr
    with Image.open(shot) as image:
        corner = sum(image.convert("RGB").getpixel((3, 3)))
        colours = len(image.convert("RGB").getcolors(1 << 20))
    assert (corner < 120) if dark else (corner > 700)
    assert colours > 100  # text and drawings are there

    # Headless windows have at least 500 pixels: a frame has the width of a phone.
    frame = (
        f'<meta name="color-scheme" content="light dark"><iframe width="390" height="800" srcdoc="{escape(markup)}">'
    )
    script = """</iframe><script>
    onload = () => {
      const root = document.querySelector("iframe").contentDocument.documentElement
      const plots = [...root.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect())
      document.title = [root.clientWidth, root.scrollWidth, Math.max(...plots.map(box => box.right)),
        Math.min(...plots.filter(box => box.width).map(box => box.width))].join(" ")
    }</script>"""
    (tmp_path / "phone.html").write_text(f"<!DOCTYPE html><title></title>{frame}{script}")
    dumped = chromium(scheme, "--dump-dom", "--virtual-time-budget=5000", f"file://{tmp_path}/phone.html").stdout
    width, scrolled, right, narrowest = map(float, re.search(r"<title>([^<]*)</title>", dumped)[1].split())
    assert width == scrolled and 370 <= width <= 390 and right <= width and narrowest > 300
