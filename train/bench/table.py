"""A result as a table for people."""

from typing import Any


def render(result: dict[str, Any]) -> str:
    """The lines that a terminal shows for a result."""
    kinds = {"gate": _gate, "augments": _augments, "pipelines": _inputs}
    lines = next((show for name, show in kinds.items() if name in result), _step)(result)
    if "counts" in result:
        counts = (f"{name} {one['repeats']} x {one['steps']}" for name, one in result["counts"].items())
        lines.append(f"{'timed':<14}{', '.join(counts)} (blocks x steps)")
    load = result["load_average"]
    busy = "" if load is None else f", load {load:.1f} at the start"
    lines.append(f"on {result['devices']}, {result['host']}, jax {result['versions']['jax']}{busy}")
    if "file" in result:
        lines.append(f"written to {result['file']}")
    return "\n".join(lines)


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 100 else f"{value:,.0f} ms"


def _s(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _size(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"


def _step(r: dict[str, Any]) -> list[str]:
    start, steady, work, memory, c = r["start"], r["steady"], r["work"], r["memory"], r["ceilings"]
    remark = f" ({r['kernels_remark']})" if r["kernels_remark"] else ""
    rows = {
        "start": (
            f"trace {_s(start['trace_s'])}, lower {_s(start['lower_s'])}, compile {_s(start['compile_cold_s'])} cold",
            f"{_s(start['compile_warm_s'])} from cache ({start['cache_hits']} hit, {start['cache_misses']} missed)",
            f"first run {_s(start['first_run_s'])}",
            f"program {_size(start['executable_bytes'])}, traced {r['traces']}x",
        ),
        "step": (
            f"{_ms(steady['step_ms'])} (quartiles {_ms(steady['step_ms_q1'])}, {_ms(steady['step_ms_q3'])}; "
            f"{_ms(steady['step_ms_min'])} to {_ms(steady['step_ms_max'])}; spread {steady['spread']:.1%})",
            f"dispatch {_ms(steady['dispatch_ms'])}",
        ),
        "images/s": (
            f"{r['images_per_second']:,.0f}",
            f"{steady['images_per_second_per_device']:,.0f} per device",
            f"{steady['pipelined_images_per_second']:,.0f} one step ahead",
        ),
        "time in": (", ".join(f"{name} {share:.0%}" for name, share in r.get("shares", {}).items()),),
        "work": (
            f"{work['analytic_flops_per_image'] / 1e6:,.1f} MFLOP per image",
            f"{work['achieved_tflops']:.3g} TFLOP/s, {r['mfu']:.1%} of the peak",
            f"bound by {work.get('bound', '?')}",
        ),
        "ceilings": (f"{c['peak_tflops']:.3g} TFLOP/s ({c['peak_source']})", f"{c['copy_gb_s']:.3g} GB/s"),
        "memory": (
            f"planned {_size(memory['planned_bytes'])} (arguments {_size(memory['arguments_bytes'])}, "
            f"temporaries {_size(memory['temporaries_bytes'])})",
            f"peak {_size(memory['peak_bytes'])} ({memory['peak_source']})",
        ),
    }
    if "latency_ms" in r:
        rows["latency"] = (f"{_ms(r['latency_ms']['p50'])}, p95 {_ms(r['latency_ms']['p95'])} (batch 1)",)
    if "masking_overhead" in r:
        over = r["masking_overhead"]
        times = f"{over['value']:.3f}x the dense step ({over['low']:.3f}-{over['high']:.3f})"
        rows["masking"] = (times, f"new masks {_ms(r['new_masks_ms'])}")
    if "versus" in r:
        b = r["versus"]["result"]
        rows["B"] = (
            f"{b['task']} {b['model']}, batch {b['batch']}, {b['dtype']}, {b['mode']}, {b['kernels']}",
            f"{_ms(b['step_ms'])}, {b['images_per_second']:,.0f} images/s",
        )
        rows["verdict"] = (r["versus"]["verdict"],)
    side = f"{r['image_size']}x{r['image_size']}"
    return [
        f"{r['task']} {r['model']} ({r['parameters']:,} parameters), batch {r['batch']} of {side}, "
        f"{r['dtype']}, {r['mode']}, {r['kernels']} kernels{remark}",
        *(f"{name:<14}{'  '.join(cells)}" for name, cells in rows.items() if any(cells)),
    ]


def _gate(r: dict[str, Any]) -> list[str]:
    return ["limits recorded" if r["config"]["gate_record"] else "every pipeline passes"]


def _augments(r: dict[str, Any]) -> list[str]:
    lines = [f"augmentation of {r['image_size']}x{r['image_size']} images, batch {r['batch']}, {r['mode']}"]
    lines.append(f"{'':<22}{'images/s':>12}{'us/image':>11}{'spread':>9}")
    for name, a in r["augments"].items():
        lines.append(f"{name:<22}{a['images_per_second']:>12,.0f}{a['us_per_image']:>11.2f}{a['spread']:>9.1%}")
    return lines


def _inputs(r: dict[str, Any]) -> list[str]:
    side = f"{r['image_size']}x{r['image_size']}"
    lines = [f"input of {side} images, batch {r['batch']}, {r['cores']} cores, JPEGs of {_size(r['jpeg_bytes'])}"]
    lines.append(f"{'':<12}{'images/s':>12}{'per core':>10}{'vs Pillow':>12}{'fed step':>12}{'waiting':>9}")
    for name, p in r["pipelines"].items():
        line = f"{name:<12}{p['images_per_second']:>12,.0f}{p['images_per_second_per_core']:>10,.0f}"
        if "wait_share" in p:
            line += f"{p['speedup_over_plain_pil']:>11.2f}x{_ms(p['fed_step_ms']):>12}{p['wait_share']:>9.1%}"
        lines.append(line)
    return [*lines, f"the training step of {r['model']} alone takes {_ms(r['train_step_ms'])}"]
