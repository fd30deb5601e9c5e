"""The settings of a ladder: which trainings are compared, at which rates and seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lte_ray.config.validation import check_at_least, check_booleans, check_choice, check_integers, is_integer, setting
from lte_ray.errors import ConfigError

RESULTS = "ladder.json"
"""The file in a ladder's folder that has the results."""

RUNGS = ("ordinary", "mhlora", "lte")
PLACES = ("process", "ray")
ORDINARY_OPTIMIZERS = ("auto", "adamw", "muon")


@dataclass(frozen=True)
class LadderConfig:
    """What is compared, and how."""

    rungs: tuple[Literal["ordinary", "mhlora", "lte"], ...] = setting(
        RUNGS,
        "What to compare: ordinary (training in full), mhlora (all heads learn from all batches in one process), lte (heads "
        "that merge, once for each of --merge-iters).",
    )
    merge_iters: tuple[int, ...] = setting(
        (), "Local steps between two merges, a rung of lte for each; by default 1, --merge-iter and five times that."
    )
    rates: tuple[float, ...] = setting(
        (0.5, 1.0, 2.0),
        "Multipliers of the worker's learning rates. Every rung is trained with each of them, and compared at its best.",
    )
    extend: bool = setting(True, "Try further rates, up to four a rung, while its best is the lowest or highest.")
    seeds: tuple[int, ...] = setting((), "Seeds to train with at the best rate; by default --seed.")
    tuning_seed: int | None = setting(
        None,
        "Seed of the sweep of rates; by default the first of --seeds. With another one, rates aren't chosen on the seeds that "
        "are compared.",
    )
    ordinary_optimizer: Literal["auto", "adamw", "muon"] = setting(
        "auto",
        "Optimizer of ordinary training, if the worker builds none: adamw, muon, or auto (--optimizer's counterpart for "
        "weights: adamw for lora-plus, muon for lora-muon; adamw if --optimizer is auto, too).",
    )
    figure: str = setting(
        "",
        "Figure of the evaluation that is compared; lowest is best, or highest with a dash: --figure=-accuracy. By default the "
        "first.",
    )
    on: Literal["process", "ray"] = setting(
        "process", "Where to train: process (in this process, on its CPUs) or ray (heads are actors, as in train)."
    )
    quick: bool = setting(
        False,
        "A first impression in minutes: a tenth of --steps, at least 50, without rungs that would merge less than five times.",
    )

    def __post_init__(self) -> None:
        check_booleans(self, "extend", "quick")
        check_choice(self, "on", PLACES)
        check_choice(self, "ordinary_optimizer", ORDINARY_OPTIMIZERS)
        for name in ("rungs", "merge_iters", "rates", "seeds"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list | tuple) else (value,))
        check_choice(self, "rungs", RUNGS)
        if not self.rungs or not self.rates:
            raise ConfigError(f"--{'rates' if self.rungs else 'rungs'} is empty: give at least one.")
        for name, least in (("merge_iters", 1), ("seeds", 0)):
            if not all(is_integer(value) and value >= least for value in getattr(self, name)):
                values = list(getattr(self, name))
                raise ConfigError(f"--{name.replace('_', '-')} is {values}, but each must be a whole number, at least {least}.")
        if self.tuning_seed is not None:
            check_integers(self, "tuning_seed")
            check_at_least(self, 0, "tuning_seed")
        if not all(isinstance(rate, int | float) and 0 < rate < float("inf") for rate in self.rates):
            raise ConfigError(f"--rates is {list(self.rates)}, but each must be a finite number above 0.")
        for name in ("rungs", "merge_iters", "rates", "seeds"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        if not isinstance(self.figure, str):
            raise ConfigError(f"--figure is {self.figure!r}, but it must be the name of a figure.")
