"""Configuration of a search: that of a supervised run, plus what to search and for how long."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from train import presets
from train.config import TrainConfig, check, flat, unused
from train.errors import UsageError
from train.ranges import check_ranges
from train.spaces import Range, check_space, with_ranges


@dataclass(frozen=True, kw_only=True)
class SearchConfig(TrainConfig):
    """A search. Its first trial is the run that the other fields describe; `seed` is that of the search and its runs.

    `out` is the search's folder, by default runs/PRESET-search.
    """

    trials: int = 20
    """Trials to complete, including those that are stopped early or diverge; a larger number continues a search."""
    workers: int = 1
    """Processes that train trials at the same time, on one machine."""
    range: tuple[str, ...] = ()
    """Ranges to search, in place of or in addition to the preset's: FIELD=LOW:HIGH, FIELD=LOW:HIGH:log, FIELD=A,B,C;
    FIELD=fixed takes one out."""
    stop: Literal["median", "halving", "none"] = "median"
    """Stop trials early: below the median of earlier ones at the same epoch, by successive halving, or never."""


def _searched(preset: Callable[[], TrainConfig]) -> Callable[[], SearchConfig]:
    def search() -> SearchConfig:
        return SearchConfig(**vars(preset()))

    search.__doc__ = preset.__doc__
    return search


PRESETS = {name: _searched(preset) for name, preset in presets.PRESETS.items()}


def run_config(config: SearchConfig) -> TrainConfig:
    """The config of a run whose fields are not searched."""
    return TrainConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)})


def checked_space(config: SearchConfig, preset: str) -> dict[str, Range]:
    """The ranges of a search by field name: the preset's, and those of the config.

    Raises:
      UsageError: a config that cannot work, or a range that cannot be searched.
    """
    check_ranges(flat(config), {"[1, 100000]": "trials", "[1, 1000]": "workers"})
    base = run_config(config)
    check(base)
    if config.distributed is not None:
        raise UsageError("a search takes no --distributed: its trials are runs of one host")
    space = with_ranges(presets.SPACES.get(preset, {}), config.range, TrainConfig)
    check_space(space, base, check, unused)
    return space
