"""The tables of the documentation: each function yields a table's lines, the header first, `cell | cell`.

Figures come from the run files. Those that others published are literals, in a column or with a word that says so.
"""

from collections.abc import Callable, Iterator
from statistics import fmean

from results.figures import interval, mean, milliseconds, minutes, percent, rounded, run, runs
from train.errors import UsageError


def presets() -> Iterator[str]:
    def test(pattern: str, digits: int = 2) -> str:
        group = runs(pattern)
        return f"{mean(group, 'test', digits)} %, {len(group)} seed{'s'[: len(group) - 1]}"

    yield "preset | recipe | test accuracy, measured | published by others"
    yield f"`digits` | resnet8, 40 epochs, 8x8 grey | {test('digits/seed?', 1)} | "
    yield f"`cifar10_resnet20` | He et al. 2015, 64,000 updates | {test('cifar10_resnet20/seed?')} | 91.25 % (paper)"
    yield "`cifar10_resnet18` | 3x3 stem, 200 epochs | | 95.3 % (peers)"
    headline, more_images = (test(f"cifar10_resnet18_50ep/lr0.4_wd1e-3{name}_seed?") for name in ("", "_49900_images"))
    yield f"`cifar10_resnet18_50ep` | 50 epochs, cutout, averaged parameters | {headline} | "
    yield f" | the same, `--data.validation 0.002`: 49,900 images | {more_images} | "
    yield "`cifar100_resnet18` | 3x3 stem, 200 epochs | | 75.6 % (peer)"
    photographs = test("imagenette_resnet18/seed?", 1)
    yield f"`imagenette_resnet18` | 2,700 photographs, 25 epochs, 128 px | {photographs} | "
    yield "`imagenet_resnet50` | 90 epochs, 224 px | | 76.5-77.1 % (peers)"
    yield '`imagenet_resnet50_rsb` | A2 of "ResNet strikes back", 300 epochs | | 79.8 % (paper)'
    yield "`finetune` | your own folder of images, from pretrained weights | | "


def pretraining() -> Iterator[str]:
    yield "method | kNN | linear, offline | linear, online | training, s"
    # Random weights do not depend on the method: any one has them once per seed.
    random = runs("digits_pretraining/simclr_seed?")
    yield f"random weights | {mean(random, 'random_knn')} | {mean(random, 'random_linear')} | | "
    methods = {"simclr": "SimCLR", "mocov2": "MoCo v2", "mocov3": "MoCo v3", "byol": "BYOL", "simsiam": "SimSiam"}
    methods |= {"barlow": "Barlow Twins", "vicreg": "VICReg", "nnclr": "NNCLR", "swav": "SwAV"}
    methods |= {"dino": "DINO (AdamW)", "supcon": "SupCon (uses labels)"}
    for method, name in methods.items():
        group = runs(f"digits_pretraining/{method}_seed?")
        figures = " | ".join(mean(group, figure) for figure in ("knn", "linear", "online_linear"))
        yield f"{name} | {figures} | {fmean(60 * minutes(run) for run in group):.0f}"


def torch_cpu() -> Iterator[str]:
    yield "net, batch, side | PyTorch | ours | ours / PyTorch | plain XLA with options / PyTorch"
    for row in run("speed/torch_jax010")["rows"]:
        torch, ours = row["torch"]["step_ms"], row["ours"]["step_ms"]
        ratio, plain = (interval(row["time_over_torch"][name]) for name in ("ours", "ours plain"))
        times = f"{torch:,.0f} ms | {ours:,.0f} ms ({1000 * row['batch'] / ours:.0f} images/s)"
        yield f"{row['model']}, {row['batch']}, {row['side']} px | {times} | **{ratio}** | {plain}"


def gpu() -> Iterator[str]:
    yield "ResNet-50, 224 px, bfloat16 | batch | step (quartiles) | images/s, each step waited for | one step ahead"
    for batch in (256, 512):
        one = run(f"speed/gpu_resnet50_{batch}")["steady"]
        step = f"{one['step_ms']:.1f} ms ({one['step_ms_q1']:.1f}-{one['step_ms_q3']:.1f})"
        rates = f"{one['images_per_second']:,.0f} | {one['pipelined_images_per_second']:,.0f}"
        yield f"ours, augmentation in the step | {batch} | {step} | {rates}"
    torch = run("speed/gpu_torch_resnet50_256")
    for key, name in (("eager", "eager"), ("compiled", "`torch.compile`")):
        one = torch[key]
        low, high = one["step_ms_quartiles"]
        step = f"{one['step_ms_median']:.1f} ms ({low:.1f}-{high:.1f})"
        what = f"PyTorch {one['torch'].split('+')[0]}, {name}, no augmentation"
        yield f"{what} | 256 | {step} | {one['images_per_second']:,.0f} | "


def on_two_cores() -> Iterator[str]:
    step, jpeg = run("speed/train-resnet20-128x32"), run("speed/input-resnet18-16x224")["pipelines"]
    start, share = step["start"], {name: 100 * share for name, share in step["shares"].items()}
    views = run("speed/augment-resnet20-128x32")["augments"]["simclr_two_views"]["us_per_image"]
    augmentation = 100 * run("speed/contrastive-resnet18_cifar-64x32")["shares"]["augmentation"]
    yield "on the same 2 cores | "
    compiled = (
        f"compiled in {start['compile_cold_s']:.1f} s, or loaded from the cache in {start['compile_warm_s']:.1f} s"
    )
    yield f"start of {step['model']}, batch {step['batch']} | traced in {start['trace_s']:.1f} s, {compiled}"
    parts = f"forward takes {share['forward']:.0f} %, backward {share['backward']:.0f} %"
    rest = f"augmentation and input {share['augmentation'] + share['input']:.1f} %"
    yield f"its step | {100 * step['mfu']:.0f} % of the speed of matrix products; {parts}, {rest}"
    yield f"SimCLR's two views, 32 px | {views:.0f} microseconds per image: {augmentation:.1f} % of a ResNet-18 step"
    core, plain = jpeg["encoded"]["images_per_second_per_core"], jpeg["plain_pil"]["images_per_second"]
    waits = f"the step waits {100 * jpeg['encoded']['wait_share']:.0f} % of the time"
    yield f"decoding JPEG, 224 px | {core:,.0f} images/s per core, {plain:,.0f} in a plain Pillow loop; {waits}"


def feeding() -> Iterator[str]:
    rates = "on the device | decoded ahead from JPEG, 2 cores | plain loop, 1 core"
    yield f"images | {rates} | share of a fed step that waits"
    for name in ("input-resnet20-128x32", "input-resnet18-16x224"):
        bench = run(f"speed/{name}")
        device, jpeg, plain = (bench["pipelines"][kind] for kind in ("resident", "encoded", "plain_pil"))
        rates = [f"{pipeline['images_per_second']:,.0f}/s" for pipeline in (device, jpeg, plain)]
        rates[1] += f" ({jpeg['images_per_second_per_core']:,.0f} per core)"
        fed = f"feeding {bench['model']} ({bench['train_step_ms']:.0f} ms)"
        waits = f"{100 * device['wait_share']:.1f} %; from JPEG {100 * jpeg['wait_share']:.1f} %"
        yield f"{bench['image_size']} px, batch {bench['batch']}, {fed} | {' | '.join(rates)} | {waits}"


def loop() -> Iterator[str]:
    yield "run | up to 8 steps per call, median (range) | one step per call"
    for bench in runs("speed/loop_*"):
        figures = (bench["over_single_step"][name] for name in ("run", "run_one_step_per_call"))
        cells = " | ".join(f"{one['median']:.2f} ({one['min']:.2f}-{one['max']:.2f})" for one in figures)
        epochs = f"{bench['epochs']:g} epoch{'s'[: bench['epochs'] != 1]}"
        yield f"`{bench['preset']}`, batch {bench['batch']}, {epochs} | {cells}"


def resnet18_50ep() -> Iterator[str]:
    yield "recipe | images | seed | validation | test | run"
    for name, recipe in {
        "lr0.2": "lr 0.2, decay 5e-4",
        "lr0.4": "lr 0.4, decay 5e-4",
        "lr0.4_wd1e-3": "lr 0.4, decay 1e-3: chosen on validation, preset `cifar10_resnet18_50ep`",
        "lr0.4_wd1e-3_49900_images": "the preset with `--data.validation 0.002`",
    }.items():
        group = runs(f"cifar10_resnet18_50ep/{name}_seed?")
        held_back = group[0]["config"]["data"]["validation"]
        enough = held_back >= 0.1  # 100 images of validation are too few for a figure
        label = f"{recipe} | {50_000 * (1 - held_back):,.0f}"
        for one in group:
            link = f"[run](cifar10_resnet18_50ep/{name}_seed{one['seed']}.json)"
            validation = percent(one, "validation", 2) if enough else ""
            yield f"{label} | {one['seed']} | {validation} | {percent(one, 'test', 2)} | {link}"
            label = "|"
        validation = mean(group, "validation", 2) if enough else "(100 images: not a figure)"
        yield f" | | mean (sd) | {validation} | **{mean(group, 'test', 2)}** | "


def against_torch() -> Iterator[str]:
    yield "epochs | seed | resnet-jax validation | test | PyTorch validation | test"
    ours, theirs = (runs(f"cifar10_resnet20_against_torch/{name}_seed?") for name in ("jax", "torch"))
    for pair in zip(ours, theirs, strict=True):
        figures = " | ".join(percent(one, split, 2) for one in pair for split in ("validation", "test"))
        yield f"{pair[0]['epochs']:.0f} | {pair[0]['seed']} | {figures}"
    figures = " | ".join(f"**{mean(group, split)}**" for group in (ours, theirs) for split in ("validation", "test"))
    yield f"**{ours[0]['epochs']:.0f}** | mean (sd) | {figures}"
    for one in runs("cifar10_resnet20_against_torch/jax_10_epochs_seed?"):
        figures = f"{percent(one, 'validation', 2)} | {percent(one, 'test', 2)} | not run | not run"
        yield f"{one['epochs']:.0f} | {one['seed']} | {figures}"


def digits() -> Iterator[str]:
    yield "seed | test accuracy | seconds of training"
    for one in runs("digits/seed?"):
        yield f"{one['seed']} | {percent(one, 'test', 2)} % | {one['seconds']:.0f}"


def simclr() -> Iterator[str]:
    yield " | kNN | linear, offline | linear, online | minutes of training"
    one, supervised = run("cifar10_simclr_resnet20/simclr"), run("cifar10_simclr_resnet20/supervised")
    yield f"random weights | {percent(one, 'random_knn')} | {percent(one, 'random_linear')} | | "
    figures = " | ".join(percent(one, figure) for figure in ("knn", "linear", "online_linear"))
    yield f"SimCLR | {figures} | {minutes(one):.1f}"
    yield f"supervised | | {percent(supervised, 'test')} (its own head) | | {minutes(supervised):.1f}"


def prune() -> Iterator[str]:
    shares = ("0.5", "0.8", "0.9", "0.95")
    yield " | ".join(["pruned", *(f"{100 * float(share):.0f} %" for share in shares)])
    for label, figure in (("not at all", "dense"), ("not at all, two more epochs", "pruned")):
        yield " | ".join([label, *[percent(run("cifar10_prune/dense_trained_on"), figure)] * len(shares)])
    for method in ("gradual_magnitude", "one_shot_magnitude", "one_shot_random"):
        figures = [percent(run(f"cifar10_prune/{method}_{share}"), "pruned") for share in shares]
        yield " | ".join([method.replace("one_shot", "one-shot").replace("_", " "), *figures])


def prune_digits() -> Iterator[str]:
    yield "seed | dense | 90 % pruned | bytes, dense | pruned"
    for one in runs("digits_prune/seed?"):
        size = f"{one['dense_bytes']:,} | {one['pruned_bytes']:,}"
        yield f"{one['seed']} | {percent(one, 'dense')} | {percent(one, 'pruned')} | {size}"


def half_of_channels() -> Iterator[str]:
    report = run("speed/prune_resnet18_cifar_half_channels")
    yield " | dense | half of the channels | "
    for label, name, form in (
        ("parameters", "parameters", "{:,}".format),
        ("multiply-adds per image", "macs", lambda macs: f"{macs / 1e6:,.1f} M"),
        ("file", "bytes", lambda size: f"{size / 1e6:.1f} MB"),
    ):
        before, after = report["before"][name], report["after"][name]
        yield f"{label} | {form(before)} | {form(after)} | {before / after:.2f}x less"
    for batch, timed in report["latency"].items():
        times = [timed[side]["step_ms"] for side in ("before", "after")]
        ratio, limits = interval(timed["after"]["speedup"]).split()
        yield f"latency, batch {batch} | {' | '.join(map(milliseconds, times))} | **{ratio}x as fast** {limits}"


def nt_xent() -> Iterator[str]:
    yield "batch | rows at a time | whole | in blocks | blocks / whole | memory, whole | memory, in blocks"
    for row in run("speed/nt_xent")["rows"]:
        at_once = f"{row['block']:,} " + ("(all)" if row["block"] == row["rows"] else f"of {row['rows']:,}")
        sides = row["plain"], row["blocks"]
        times = " | ".join(milliseconds(side["step_ms"]) for side in sides)
        sizes = [side["temp_bytes"] / 2**20 for side in sides]
        memory = " | ".join(f"{size:.{0 if size >= 10 else 1}f} MiB" for size in sizes)
        yield f"{row['batch']:,} | {at_once} | {times} | {interval(row['blocks_over_plain'])} | {memory}"


def search_digits() -> Iterator[str]:
    search = run("search_digits/search")
    yield "trial | learning rate | weight decay | batch | epochs | outcome | validation accuracy"
    for row in search["rows"]:
        lr, decay, batch = row["values"].values()
        accuracy = f"{100 * row['accuracy']:.1f} %"
        best = "**" if row["trial"] == search["best"]["trial"] else ""
        outcome = row["outcome"] + ", was killed and continued" * (row["restarts"] > 0)
        cells = f"{row['trial']} | {lr:.4f} | {decay:.1e} | {batch} | {row['epochs']:.0f} | {outcome}"
        yield f"{cells} | {best}{accuracy}{best}"


def explanations(of: str = "cifar10_resnet20") -> Iterator[str]:
    measured = run(f"explanations/{of}")
    seconds = measured.get("seconds_of_16", {})
    scores = "deletion (low is good) | insertion (high is good) | their difference, over a random map"
    yield f"method | {scores} | infidelity (low) | randomization (near 0)" + " | seconds for 16 images" * bool(seconds)
    for name, one in sorted(measured["methods"].items(), key=lambda item: -item[1]["gain"]):
        figures = " | ".join(f"{one[score]:.2f}" for score in ("deletion", "insertion"))
        over = "" if name == "random" else f"{one['over_random']:+.2f} ({1.96 * one['over_random_se']:.2f})"
        rest = f"{one['infidelity']:.3f} | {one['randomization']:z.2f}"
        cost = f" | {seconds[name]:{'.2g' if seconds[name] < 99.5 else '.0f'}}" if seconds else ""
        yield f"`{name}` | {figures} | {over} | {rest}{cost}"


def explanations_of_photographs() -> Iterator[str]:
    return explanations("imagenette_resnet18")


def detection() -> Iterator[str]:
    scores = "AP50, validation | AP | AP50, test | AP"
    yield f"set | trained by | backbone | {scores} | seconds of training | epochs"
    starts = {"shapes": "ResNet-20, CIFAR-10", "raccoon_random": "ResNet-18, random weights"}
    for name in ("shapes", "bccd", "raccoon", "raccoon_random", "raccoon_torchvision"):
        one = run(f"detection/{name}")
        who = "torchvision" if "torchvision" in name else f"`{one['preset']}`"
        start = starts.get(name, "ResNet-18, imagenette")
        names = [f"{split}_{score}" for split in ("validation", "test") for score in ("ap50", "ap")]
        figures = [rounded(100 * one[name], ".1f") for name in names]
        cost = f"{one['seconds']:.0f} | {one['epochs']:.0f}"
        yield f"`{one['dataset']}` | {who} | {start} | {' | '.join(figures)} | {cost}"


def detection_speed() -> Iterator[str]:
    yield "what | ours | torchvision | ours / torchvision"
    for row in run("speed/detection")["rows"]:
        what = row["task"].replace("_", " ")
        if "case" in row:
            size = "x".join(map(str, row["size"]))
            what = f"{what}, {row['model']}, {row['batch']} image{'s'[: row['batch'] - 1]} of {size}"
        times = " | ".join(milliseconds(row[who]["step_ms"]) for who in ("ours", "torchvision"))
        yield f"{what} | {times} | {interval(row['time_over_torchvision'])}"


TABLES: dict[str, Callable[[], Iterator[str]]] = {
    **{table.__name__: table for table in (presets, pretraining, torch_cpu, gpu, on_two_cores, feeding, loop)},
    **{table.__name__: table for table in (resnet18_50ep, against_torch, digits, simclr, prune, prune_digits)},
    **{table.__name__: table for table in (half_of_channels, nt_xent, search_digits)},
    **{table.__name__: table for table in (explanations, explanations_of_photographs)},
    **{table.__name__: table for table in (detection, detection_speed)},
}


def markdown(name: str) -> str:
    """Make the Markdown of the table `name`.

    Raises:
      UsageError: there is no such table, or a run file is missing.
    """
    if name not in TABLES:
        raise UsageError(f"there is no table {name!r}; choose one of {', '.join(TABLES)}")
    header, *lines = (f"| {' '.join(line.split())} |" for line in TABLES[name]())
    return "\n".join([header, "|" + "---|" * (header.count("|") - 1), *lines])
