"""Two configs measured in turns in one process, and what may be said about them."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from train.bench.config import BenchConfig, from_stored
from train.bench.device import ceilings
from train.bench.prepared import described, prepare, time_steps
from train.bench.tasks import TASKS
from train.errors import UsageError
from train.from_config import compute_dtype
from train.run_folder import environment
from train.timing import ratio


def versus(a: BenchConfig, b: BenchConfig, mesh: Mesh, ceiling: dict[str, Any]) -> dict[str, Any]:
    """The figures of `a`, those of `b` under `versus`, and how they compare."""
    # A ceiling is one dtype's.
    same = compute_dtype(a.dtype) == compute_dtype(b.dtype)
    beside = ceiling if same else ceilings(mesh, compute_dtype(b.dtype), b.peak)
    sides = {name: prepare(config, mesh, TASKS[config.task](config)) for name, config in (("A", a), ("B", b))}
    time_steps(sides, a)
    seconds = {name: one.seconds["each"] for name, one in sides.items()}
    steps = ratio(seconds["A"], seconds["B"])
    # Images a second go the other way, and batches may differ.
    rates = ratio(seconds["B"] / b.batch, seconds["A"] / a.batch)
    compared = {
        "step_ms_ratio": steps,
        "images_per_second_ratio": rates,
        "confidence": 0.95,
        "verdict": verdict(rates),
        "result": described(sides["B"], beside),
    }
    return {**described(sides["A"], ceiling), "versus": compared}


def verdict(rates: dict[str, float]) -> str:
    """What a ratio of images a second, A to B, allows to say."""
    span = f"{rates['value']:.2f}x ({rates['low']:.2f}-{rates['high']:.2f})"
    if rates["low"] <= 1 <= rates["high"]:
        return f"no difference beyond noise: A is {span} as fast as B"
    return f"A is {span} as fast as B"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """An earlier benchmark's result, and its config as it will be measured again."""

    path: Path
    result: dict[str, Any]
    config: BenchConfig


def read_result(path: Path, config: BenchConfig) -> Stored:
    """The result in a file.

    Raises:
      UsageError: no such file, no JSON, or JSON that is no benchmark's result of a step.
    """
    try:
        result = json.loads(path.read_text())
        rate, values = result["images_per_second"], result["config"]
        if not isinstance(rate, int | float) or not isinstance(values, dict):
            raise TypeError("its fields are of other kinds")
        return Stored(path=path, result=result, config=from_stored(values, config))
    except OSError as error:
        raise UsageError(f"cannot read --compare {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--compare {path} is not a text file") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"--compare {path} is not JSON: {error}") from None
    except KeyError as error:
        raise UsageError(f"--compare {path} is not a benchmark's result of a step: it has no {error}") from None
    except (UsageError, TypeError, AttributeError) as error:
        raise UsageError(f"--compare {path} is not a benchmark's result of a step: {error}") from None


def against_stored(config: BenchConfig, stored: Stored, mesh: Mesh, ceiling: dict[str, Any]) -> dict[str, Any]:
    """The figures of `config`, beside those of the stored config measured anew and as they were."""
    elsewhere = foreign(stored.result)
    if elsewhere:
        print(f"warning: {stored.path} was measured elsewhere: {elsewhere}", file=sys.stderr)
    result = versus(config, stored.config, mesh, ceiling)
    now, then = result["versus"]["result"]["images_per_second"], stored.result["images_per_second"]
    result["versus"]["stored"] = {
        "file": str(stored.path),
        "commit": stored.result.get("commit"),
        "images_per_second": then,
        "images_per_second_now": now,
        "now_over_then": now / then,
        "measured_elsewhere": elsewhere,
    }
    return result


def foreign(result: dict[str, Any]) -> str | None:
    """In what a result's machine or software differs from this one's; None in nothing."""
    here = environment()
    names = ("host", "devices", "versions")
    differing = [f"{name} {result.get(name)} (here {here[name]})" for name in names if result.get(name) != here[name]]
    return "; ".join(differing) or None
