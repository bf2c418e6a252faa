"""A result as a table for people."""

from typing import Any


def render(result: dict[str, Any]) -> str:
    """The lines that a terminal shows of a result."""
    if result["task"] == "all":
        lines = _every(result["all"])
    elif result["task"] == "gate":
        lines = [
            "every pipeline holds" if any(p["limit"] for p in result["gate"]["pipelines"].values()) else "recorded"
        ]
    elif "augments" in result:
        lines = _augments(result)
    elif "pipelines" in result:
        lines = _inputs(result)
    else:
        lines = _step(result)
    where = f"{result['devices']}, {result['host']}, jax {result['versions']['jax']}"
    load = result["load_average"]
    around = "" if load is None else f", load {load:.1f} at the start"
    tail = [f"written to {result['file']}"] if "file" in result else []
    return "\n".join([*lines, f"on {where}{around}", *tail])


def _row(name: str, *cells: str) -> str:
    return f"{name:<14}{'  '.join(cells)}"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g} ms" if value < 100 else f"{value:,.0f} ms"


def _s(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _size(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def _step(r: dict[str, Any]) -> list[str]:
    start, steady, work, memory = r["start"], r["steady"], r["work"], r["memory"]
    size = f"{r['image_size']}x{r['image_size']}"
    remark = f" ({r['kernels_remark']})" if r["kernels_remark"] else ""
    lines = [
        f"{r['task']} {r['model']} ({r['parameters']:,} parameters), batch {r['batch']} of {size}, "
        f"{r['dtype']}, {r['mode']}, {r['kernels']} kernels{remark}",
        _row(
            "start",
            f"trace {_s(start['trace_s'])}, lower {_s(start['lower_s'])}, compile {_s(start['compile_cold_s'])} cold",
            f"{_s(start['compile_warm_s'])} from cache ({start['cache_hits']} hit, {start['cache_misses']} missed)",
            f"first run {_s(start['first_run_s'])}",
            f"program {_size(start['executable_bytes'])}, traced {r['traces']}x",
        ),
        _row(
            "step",
            f"{_ms(steady['step_ms'])} (quartiles {_ms(steady['step_ms_q1'])}, {_ms(steady['step_ms_q3'])}; "
            f"{_ms(steady['step_ms_min'])} to {_ms(steady['step_ms_max'])}; spread {steady['spread']:.1%})",
            f"host {_ms(steady['dispatch_ms'])}",
        ),
        _row(
            "images/s",
            f"{r['images_per_second']:,.0f}",
            f"{steady['images_per_second_per_device']:,.0f} a device",
            f"{steady['pipelined_images_per_second']:,.0f} one step ahead",
        ),
    ]
    if "shares" in r:
        lines.append(_row("time in", ", ".join(f"{name} {share:.0%}" for name, share in r["shares"].items())))
    if r["mfu"] is not None:
        lines.append(
            _row(
                "work",
                f"{work['analytic_flops_per_image'] / 1e6:,.1f} MFLOP an image",
                f"{work['achieved_tflops']:.3g} TFLOP/s, {r['mfu']:.1%} of the peak",
                f"bound by {work.get('bound', '?')}",
            )
        )
    if "explained" in work:
        lines.append(_row("", f"XLA counts {work['ratio']:.2f}x: {work['explained']}"))
    if "ceilings" in r:
        c = r["ceilings"]
        lines.append(
            _row("ceilings", f"{c['peak_tflops']:.3g} TFLOP/s ({c['peak_source']})", f"{c['copy_gb_s']:.3g} GB/s")
        )
    known = "" if memory["peak_bytes"] > memory["peak_before_bytes"] else "at most "
    lines.append(
        _row(
            "memory",
            f"planned {_size(memory['planned_bytes'])} (arguments {_size(memory['arguments_bytes'])}, "
            f"temporaries {_size(memory['temporaries_bytes'])})",
            f"peak {known}{_size(memory['peak_bytes'])} ({memory['peak_source']})",
        )
    )
    if "latency_ms" in r:
        lines.append(_row("latency", f"{_ms(r['latency_ms']['p50'])}, p95 {_ms(r['latency_ms']['p95'])} (batch 1)"))
    if "masking_overhead" in r:
        over = r["masking_overhead"]
        span = f"{over['value']:.3f}x the dense step ({over['low']:.3f}-{over['high']:.3f})"
        lines.append(_row("masking", span, f"new masks {_ms(r['new_masks_ms'])}"))
    if "versus" in r:
        lines += _versus(r["versus"])
    return lines


def _versus(v: dict[str, Any]) -> list[str]:
    b = v["result"]
    lines = [
        _row("B", f"{b['task']} {b['model']}, batch {b['batch']}, {b['dtype']}, {b['mode']}, {b['kernels']}"),
        _row("", f"{_ms(b['step_ms'])}", f"{b['images_per_second']:,.0f} images/s"),
        _row("verdict", v["verdict"]),
    ]
    if "stored" in v:
        s = v["stored"]
        told = f"{s['images_per_second']:,.0f} images/s then, {s['images_per_second_now']:,.0f} now"
        lines.append(_row("stored", f"{told} ({s['now_over_then']:.2f}x)"))
    return lines


def _augments(r: dict[str, Any]) -> list[str]:
    lines = [f"augmentations of {r['image_size']}x{r['image_size']} images, batch {r['batch']}, {r['mode']}"]
    lines.append(f"{'':<22}{'images/s':>12}{'us/image':>11}{'spread':>9}")
    for name, a in r["augments"].items():
        lines.append(f"{name:<22}{a['images_per_second']:>12,.0f}{a['us_per_image']:>11.2f}{a['spread']:>9.1%}")
    return lines


def _inputs(r: dict[str, Any]) -> list[str]:
    size = f"{r['image_size']}x{r['image_size']}"
    lines = [f"input of {size} images, batch {r['batch']}, {r['cores']} cores, JPEGs of {_size(r['jpeg_bytes'])}"]
    lines.append(f"{'':<12}{'images/s':>12}{'a core':>10}{'beside PIL':>12}{'fed step':>12}{'waits':>8}")
    for name, p in r["pipelines"].items():
        line = f"{name:<12}{p['images_per_second']:>12,.0f}{p['images_per_second_per_core']:>10,.0f}"
        if "wait_share" in p:
            line += f"{p['speedup_over_plain_pil']:>11.2f}x{_ms(p['fed_step_ms']):>12}{p['wait_share']:>8.1%}"
        lines.append(line)
    lines.append(f"{r['model']}'s training step alone takes {_ms(r['train_step_ms'])}")
    return lines


def _every(results: dict[str, Any]) -> list[str]:
    lines = [f"{'task':<14}{'batch':>6}{'images/s':>12}{'step':>12}{'spread':>9}{'mfu':>8}{'compile':>10}"]
    for task, r in results.items():
        line = f"{task:<14}{r['batch']:>6}{r['images_per_second']:>12,.0f}{_ms(r['step_ms']):>12}"
        if "steady" in r:
            mfu = "-" if r["mfu"] is None else f"{r['mfu']:.1%}"
            line += f"{r['steady']['spread']:>9.1%}{mfu:>8}{_s(r['start']['compile_cold_s']):>10}"
        lines.append(line)
    return lines
