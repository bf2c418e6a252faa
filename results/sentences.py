"""Figures in the documentation's prose: for each page, templates of its sentences and the values of their fields.

A template is found in its page whatever numbers stand in its fields and however its lines are broken. So the page stays
plain Markdown, and a figure that a run file does not support cannot stand in one of these sentences.
"""

import re
import string
from collections.abc import Callable, Iterator
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from results.figures import AGAINST_TORCH, PRUNE, SIMCLR, minutes, percent, rounded, run, runs
from train.errors import UsageError

Sentence = tuple[Any, ...]  # a template of str.format and its values
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


def readme() -> Iterator[Sentence]:
    slower = run("speed/torch_jax010")["rows"][2]["time_over_torch"]["ours"]["value"]
    yield "and {:.0f} % slower for ResNet-50", 100 * (slower - 1)

    ten = run(f"{AGAINST_TORCH}/jax_10_epochs_seed0")
    figures = percent(ten, "validation"), percent(ten, "test")
    yield (
        "{:.0f} epochs in {:.0f} minutes on two CPU cores, {} % on validation, {} % on test.",
        *training(ten),
        *figures,
    )

    yield "one image is {:.2f} points", 100 / run("digits/seed0")["test_images"]
    one, supervised = run(f"{SIMCLR}/simclr"), run(f"{SIMCLR}/supervised")
    figures = [percent(one, name) for name in ("knn", "linear", "random_knn", "random_linear")]
    yield "{:.0f} epochs in {:.0f} minutes on one CPU core", one["epochs"], minutes(one)
    yield "kNN {} % and linear probe {} % on test, against {} % and {} % with random weights", *figures
    yield "with the same number of forward and backward passes reaches {} %.", percent(supervised, "test")

    latency = run("speed/prune_resnet18_cifar_half_channels")["latency"]
    speedups = [latency[batch]["after"]["speedup"]["value"] for batch in ("64", "1")]
    yield "is {:.1f} times as fast at batch 64 on two CPU cores, {:.1f} times at batch 1.", *speedups
    masking = run("speed/prune-resnet20-128x32")["masking_overhead"]["value"]
    yield "Masks that change during training cost {:.1f} % of a ResNet-20's step.", 100 * (masking - 1)
    sparse = run(f"{PRUNE}/gradual_magnitude_0.9")
    yield "at 90 % the file is {:.1f} times smaller than dense float32.", sparse["dense_bytes"] / sparse["pruned_bytes"]
    long = [percent(run(f"{PRUNE}/long_{name}_0.95"), "pruned") for name in ("gradual", "one_shot")]
    yield "with six epochs gradual pruning reaches {} %, one-shot {} %.", *long
    yield "a 90 % sparse network reaches {} %, from fresh weights {} %, the dense network {} %.", *rewinding()

    start = run("speed/train-resnet20-128x32")["start"]
    yield "so compiling takes {:.0f} % of the time at the second start", cached(start)


def results() -> Iterator[Sentence]:
    folder = "cifar10_resnet18_50ep"
    preset, larger_rate, chosen, more_images = (
        runs(f"{folder}/{name}_seed?") for name in ("preset", "lr0.4", "lr0.4_wd1e-3", "lr0.4_wd1e-3_49900_images")
    )
    test = [fmean(percents(group, "test")) for group in (preset, larger_rate, chosen, more_images)]
    missed = 95.2 - test[3], 95.2 - max(test[:3]), 95.2 - min(test[:3])
    yield "is missed**, by {:.1f} points with 49,900 images and by {:.1f} to {:.1f} with 45,000.", *missed
    yield "10,000 test images give a standard error of {:.2f} points", standard_error(test[3])
    fits = [100 * fmean(trained(one, "accuracy")[-1] for one in group) for group in (preset, chosen)]
    yield "({:.1f} % of augmented batches at the end of the preset, {:.1f} % of the chosen recipe)", *fits
    yield "The larger rate gains {:.1f} points on test", test[1] - test[0]
    steps = 100 * (more_images[0]["steps"] / chosen[0]["steps"] - 1)
    yield "(with the {:.0f} % more steps that come with them) {:.1f} more", steps, test[3] - test[2]
    gaps = [100 * (one["validation_accuracy"] - one["test_accuracy"]) for one in (*preset, *larger_rate, *chosen)]
    yield "Test is {:.1f} to {:.1f} points below validation in all six runs", min(gaps), max(gaps)

    for one, cache in zip(preset, ("an empty compile cache", "a filled one"), strict=False):
        times = one["process_seconds"], one["compile_seconds"], one["seconds"]
        link = f"[seed {one['seed']}]({folder}/preset_seed{one['seed']}.json)"
        yield f"**{{:.1f}} s** with {cache} ({link}: compiling {{:.1f}} s, training {{:.1f}} s)", *times
    rates = [round(one["images_per_second"], -2) for one in (*preset[:2], larger_rate[0])]
    yield "without them the loop processed {:,.0f} and {:,.0f} images/s", *rates[:2]
    times = larger_rate[0]["process_seconds"], larger_rate[0]["seconds"]
    yield "it took {:.1f} s, {:.1f} s of them training, at {:,.0f} images/s", *times, rates[2]

    whole = run("cifar10_resnet20/seed0")
    yield "validation {} %, test **{} %**; the paper", percent(whole, "validation", 2), percent(whole, "test", 2)
    yield "its {:.0f} s of training are not a speed measurement", whole["seconds"]
    again = whole["network_float32_cpu"]
    yield "they reach {} % on validation and {} % on test", percent(again, "validation", 2), percent(again, "test", 2)

    ours, theirs = (runs(f"{AGAINST_TORCH}/{name}_seed?") for name in ("jax", "torch"))
    a, b = percents(ours, "test"), percents(theirs, "test")
    yield (
        "the means over three seeds differ by {:.1f} points on test, with a standard error of {:.1f}.",
        *(fmean(a) - fmean(b), sqrt(stdev(a) ** 2 / len(a) + stdev(b) ** 2 / len(b))),
    )
    losses = [fmean(trained(one, "loss", after=one["epochs"] - 1)) for one in ours]
    losses += [one["history"][-1]["train_loss"] for one in theirs]
    yield (
        "Training losses of the last epoch are {:.3f}, {:.3f}, {:.3f} against PyTorch's {:.3f}, {:.3f}, {:.3f}.",
        *losses,
    )
    ten = run(f"{AGAINST_TORCH}/jax_10_epochs_seed0")
    yield "Ten epochs took {:.1f} minutes of training, at {:.0f} images/s", training(ten)[1], ten["images_per_second"]
    for page in ("There are {} test images, so one image", "Test accuracy in percent; one of the {} images"):
        images = run("digits/seed0")["test_images"]
        yield f"{page} is {{:.2f}} points", images, 100 / images

    yield "on one core of an AMD EPYC at {:.0f} images/s", run(f"{SIMCLR}/simclr")["images_per_second"]
    knn, linear = (
        {
            method: fmean(percents(runs(f"digits_pretraining/{method}_seed?"), name))
            for method in ("simclr", "byol", "simsiam")
        }
        for name in ("knn", "linear")
    )
    behind = [figures["simclr"] - figures[method] for figures in (knn, linear) for method in ("byol", "simsiam")]
    yield "their kNN is {:.1f} and {:.1f} points behind SimCLR's, their linear probe {:.1f} and {:.1f}.", *behind

    dense = run(f"{PRUNE}/dense")
    yield "(standard error {:.1f} from 10,000 images", standard_error(100 * dense["test_accuracy"])
    trained_on = percent(run(f"{PRUNE}/dense_trained_on"), "pruned")
    yield "trained for two more epochs without pruning, reaches {}.", trained_on
    gradual, magnitude, random = (
        {share: 100 * run(f"{PRUNE}/{name}_{share}")["pruned_accuracy"] for share in (0.5, 0.8, 0.9, 0.95)}
        for name in ("gradual_magnitude", "one_shot_magnitude", "one_shot_random")
    )
    gains = [magnitude[share] - random[share] for share in (0.5, 0.9, 0.95)]
    yield "by {:.0f} points at 50 %, {:.0f} at 90 % and {:.0f} at 95 %.", *gains
    within = max(abs(gradual[share] - magnitude[share]) for share in (0.5, 0.8, 0.9))
    ahead = gradual[0.95] - magnitude[0.95]
    yield "at 50 to 90 % the two are within {:.1f} points, at 95 % gradual is ahead by {:.1f}.", within, ahead
    long = [run(f"{PRUNE}/long_{name}_0.95") for name in ("gradual", "one_shot")]
    gains = [100 * (long[0][name] - long[1][name]) for name in ("test_accuracy", "validation_accuracy")]
    yield "With six epochs at 95 % it is ahead by {:.1f} on test and {:.1f} on validation", *gains
    for name, one in zip(("gradual", "one-shot"), long, strict=True):
        yield f"[{name} {{}}]({PRUNE}/long_{name.replace('-', '_')}_0.95.json)", percent(one, "test")
    sparse = run(f"{PRUNE}/gradual_magnitude_0.9")
    sizes = sparse["pruned_bytes"], sparse["dense_bytes"], sparse["dense_bytes"] / sparse["pruned_bytes"]
    yield "at 90 % has {:,} bytes, the dense float32 one {:,}: {:.1f} times smaller.", *sizes
    yield "Gzip compresses the dense file with its zeros to {:,}.", sparse["dense_gzip_bytes"]
    yield (
        f"after one epoch [{{}} %]({PRUNE}/rewind_0.9.json), from fresh weights under the same masks "
        f"[{{}} %]({PRUNE}/reinit_0.9.json), the dense run itself {{}} %.",
        *rewinding(),
    )


def speed() -> Iterator[Sentence]:
    bench = run("speed/train-resnet20-128x32")
    start, steady, work, memory = (bench[part] for part in ("start", "steady", "work", "memory"))
    phases = [start[f"{name}_s"] for name in ("trace", "lower", "compile_cold", "compile_warm")]
    yield (
        "start trace {:.2f} s, lower {:.2f} s, compile {:.2f} s cold {:.2f} s from cache (1 hit, 1 missed) "
        "first run {:.2f} s",
        *(*phases, start["first_run_s"]),
    )
    times = [steady[f"step_ms{limit}"] for limit in ("", "_q1", "_q3", "_min", "_max")]
    yield (
        "step {:.0f} ms (quartiles {:.0f} ms, {:.0f} ms; {:.0f} ms to {:.0f} ms; spread {:.1f}%) dispatch {:.2f} ms",
        *(*times, 100 * steady["spread"], steady["dispatch_ms"]),
    )
    rates = [
        steady[f"{kind}images_per_second{each}"] for kind, each in (("", ""), ("", "_per_device"), ("pipelined_", ""))
    ]
    yield "images/s {:.0f} {:.0f} per device {:.0f} one step ahead", *rates
    shares = [100 * bench["shares"][name] for name in ("input", "augmentation", "forward", "backward", "optimizer")]
    yield (
        "time in input {:.0f}%, augmentation {:.0f}%, forward {:.0f}%, backward {:.0f}%, optimizer {:.0f}%",
        *shares,
    )
    speeds = work["analytic_flops_per_image"] / 1e6, work["achieved_tflops"], 100 * bench["mfu"]
    yield "work {:.1f} MFLOP per image {:.3f} TFLOP/s, {:.1f}% of the peak", *speeds
    ceilings = bench["ceilings"]["matmul_tflops"], bench["ceilings"]["copy_gb_s"]
    yield "ceilings {:.3f} TFLOP/s (measured matrix products) {:.1f} GB/s", *ceilings
    sizes = [memory[f"{name}_bytes"] / 2**20 for name in ("planned", "arguments", "temporaries", "peak")]
    yield (
        "planned {:.0f} MiB (arguments {:.2f} MiB, temporaries {:.0f} MiB) peak {:.2f} GiB",
        *(*sizes[:3], sizes[3] / 1024),
    )

    yield "ResNet-20 runs at {:.0f} % of the measured ceiling of matrix products", 100 * bench["mfu"]
    compiling = "compiling {:.2f} s cold or {:.2f} s ({:.0f} %) from the persistent cache."
    yield "tracing takes {:.2f} s, lowering {:.2f} s, and " + compiling, *phases, cached(start)
    times = {name: part["us_per_image"] for name, part in run("speed/augment-resnet20-128x32")["augments"].items()}
    names = ("random_crop", "random_flip", "gaussian_blur", "random_resized_crop", "color_jitter", "trivial_augment")
    yield (
        "crop {:.1f}, flip {:.1f}, blur {:.1f}, resized crop {:.1f}, colour jitter {:.0f}, TrivialAugment {:.0f}, "
        "RandAugment {:.0f} (both",
        *(*(times[name] for name in names), times["rand_augment"]),
    )
    yield "(crop, flip, normalise) {:.1f}, SimCLR's two views {:.0f} (", times["train"], times["simclr_two_views"]
    step = run("speed/contrastive-resnet18_cifar-64x32")
    per_image = round(1000 * step["step_ms"] / step["batch"], -3)
    views = 100 * step["shares"]["augmentation"]
    yield "takes {:,.0f} microseconds per image here, of which the views are {:.1f} %", per_image, views


def pruning() -> Iterator[Sentence]:
    bench = run("speed/prune-resnet20-128x32")
    ratio = bench["masking_overhead"]
    yield (
        "adds {:.1f} % to a ResNet-20's step at batch 128 (ratio to the dense step {:.3f}, interval {:.3f}-{:.3f}, on",
        *(100 * (ratio["value"] - 1), ratio["value"], ratio["low"], ratio["high"]),
    )
    yield "a step that makes new masks takes {:.0f} ms longer", bench["new_masks_ms"]


SENTENCES: dict[str, Callable[[], Iterator[Sentence]]] = {
    "README.md": readme,
    "results/README.md": results,
    "docs/speed.md": speed,
    "docs/pruning.md": pruning,
    "docs/pretraining.md": lambda: iter(()),
}


def percents(group: list[dict[str, Any]], name: str) -> list[float]:
    return [100 * one[f"{name}_accuracy"] for one in group]


def standard_error(accuracy: float) -> float:
    """Standard error in points of an accuracy in percent over 10,000 images."""
    return sqrt(accuracy * (100 - accuracy) / 10_000)


def training(one: dict[str, Any]) -> tuple[float, float]:
    """Epochs, and minutes with evaluations and checkpoints."""
    return one["epochs"], one["seconds"] / 60


def trained(one: dict[str, Any], name: str, after: float = 0) -> list[float]:
    """A figure of the training batches, logged after an epoch."""
    return [row[name] for row in one["history"] if name in row and row["epoch"] > after]


def rewinding() -> list[str]:
    rewind, fresh = (run(f"{PRUNE}/{name}_0.9") for name in ("rewind", "reinit"))
    return [percent(rewind, "pruned"), percent(fresh, "pruned"), percent(rewind, "dense")]


def cached(start: dict[str, float]) -> float:
    """Loading a program from the cache, in percent of compiling it."""
    return 100 * start["compile_warm_s"] / start["compile_cold_s"]


def replaced(page: str, text: str) -> str:
    """Return the text of a page with the figures of its sentences from the run files; its line breaks stay.

    Raises:
      UsageError: the page has not exactly one sentence for a template.
    """
    for template, *values in SENTENCES[page]():
        parts = list(string.Formatter().parse(template))
        words = [re.sub(r"(\\\s)+", r"\\s+", re.escape(words)) for words, *_ in parts]
        specs = [spec for _, field, spec, _ in parts if field is not None]
        words += [""] * (len(specs) + 1 - len(words))
        found = list(re.finditer(NUMBER.join(f"({part})" for part in words), text))
        if len(found) != 1:
            raise UsageError(f"{page} has {len(found)} sentences like {template!r}: change it or results/sentences.py")
        first, *others = found[0].groups()
        figures = [rounded(value, spec) for value, spec in zip(values, specs, strict=True)]
        sentence = first + "".join(figure + part for figure, part in zip(figures, others, strict=True))
        text = text[: found[0].start()] + sentence + text[found[0].end() :]
    return text
