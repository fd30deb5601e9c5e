"""The settings of a sweep: which flags of a training vary and over which values, and which trainings may end early."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from lte_ray.config.validation import check_at_least, check_choice, check_integers, is_integer, setting
from lte_ray.errors import ConfigError

RESULTS = "sweep.json"
"""The file in a sweep's folder that has the results."""

DEFAULT_TRIALS = 20
"""Configurations of a sweep over a range, unless --num-trials says another number."""

SCHEDULERS = ("auto", "asha", "none")

EXAMPLES = "lora-r=8,16,32 for values, lr=0.001:0.1 for a range, or lr=log:0.0001:0.1 for one on a logarithmic scale"

_RANGE = re.compile(r"(?P<log>log:)?(?P<low>[^:,\s]+):(?P<high>[^:,\s]+)")

Values = tuple[tuple[str, str], ...]
"""A configuration: flags without dashes, and what is written after each."""


@dataclass(frozen=True)
class Axis:
    """A flag and the values that it takes.

    Attributes:
        flag: without its dashes, as ``lora-r`` or ``worker.width``.
        values: to choose from; empty for a range.
        low, high: of the range.
        log: whether its logarithms are spread evenly.
        whole: whether it has whole numbers only.
    """

    flag: str
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def at(self, part: float) -> str:
        """Returns the value of a range at this part of it, in [0, 1), with four significant digits."""
        if self.whole and not self.log:
            return str(min(int(self.high), int(self.low + part * (self.high - self.low + 1))))
        if self.log:
            value = math.exp(math.log(self.low) + part * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + part * (self.high - self.low)
        value = min(self.high, max(self.low, float(f"{value:.4g}")))
        return str(round(value)) if self.whole else f"{value:g}"

    @property
    def ends(self) -> tuple[str, ...]:
        """All values of a list; the lowest and the highest of a range."""
        return self.values or tuple(str(int(end)) if self.whole else f"{end:g}" for end in (self.low, self.high))


def parse_axis(text: str) -> Axis:
    """Reads what ``--over`` gives: ``lora-r=8,16,32``, ``lr=0.001:0.1`` or ``lr=log:1e-4:1e-1``.

    Raises:
        ConfigError: it has another form.
    """
    given, equals, spec = text.partition("=") if isinstance(text, str) else ("", "", "")
    flag, spec = given.strip().lstrip("-").replace("_", "-"), spec.strip()
    if not equals or not flag or not spec:
        raise ConfigError(f"--over is {text!r}, but it must be a flag, =, and its values: {EXAMPLES}.")
    match = _RANGE.fullmatch(spec)
    ends = [_number(match[name]) for name in ("low", "high")] if match else []
    if match is None or None in ends:
        if spec.startswith("log:"):
            raise ConfigError(f"--over is {text!r}, but a range needs two numbers, as in {flag}=log:0.0001:0.1.")
        values = [value.strip() for value in spec.split(",")]
        if not all(values):
            raise ConfigError(f"--over is {text!r}, but a value between its commas is missing.")
        return Axis(flag, tuple(dict.fromkeys(values)))
    low, high = (float(end) for end in ends if end is not None)
    if not low < high:
        raise ConfigError(f"--over is {text!r}, but a range must begin with its lower end.")
    if match["log"] and low <= 0:
        raise ConfigError(f"--over is {text!r}, but a range on a logarithmic scale must begin above 0.")
    whole = all(re.fullmatch(r"[+-]?\d+", match[name]) for name in ("low", "high"))
    return Axis(flag, (), low, high, bool(match["log"]), whole)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def choose_configurations(axes: Sequence[Axis], number: int | None, seed: int) -> list[Values]:
    """Returns the configurations of a sweep. A larger `number` adds to those of a smaller one.

    All combinations of lists are taken in a random order, each once before any is repeated. Values of ranges come from an
    additive recurrence with a random start, which covers a range more evenly than independent draws do (Roberts, "The
    unreasonable effectiveness of quasirandom sequences", 2018).

    Args:
        number: of configurations; None: all combinations, or `DEFAULT_TRIALS` if there is a range.

    Raises:
        ConfigError: there are fewer combinations.
    """
    grid = list(itertools.product(*(axis.values for axis in axes if axis.values)))
    ranges = [axis for axis in axes if not axis.values]
    if not ranges and number is not None and number > len(grid):
        raise ConfigError(
            f"--num-trials is {number}, but --over has {len(grid)} combinations of values. Lower it, or give a range."
        )
    wanted = number or (DEFAULT_TRIALS if ranges else len(grid))
    chosen: dict[Values, None] = {}
    for index, (combination, parts) in enumerate(zip(_shuffled(grid, seed), _parts(len(ranges), seed), strict=False)):
        values, of_ranges = iter(combination), iter(parts)
        chosen[tuple((axis.flag, next(values) if axis.values else axis.at(next(of_ranges))) for axis in axes)] = None
        if len(chosen) == wanted or index >= 100 * wanted:  # ranges of whole numbers may have few combinations
            break
    return list(chosen)


def _shuffled(grid: list[tuple[str, ...]], seed: int) -> Iterator[tuple[str, ...]]:
    generator = random.Random(f"lists {seed}")
    while True:
        yield from generator.sample(grid, len(grid))


def _parts(dimensions: int, seed: int) -> Iterator[list[float]]:
    """Points in the unit cube: multiples of 1/p, 1/p^2, ... modulo 1, where p^(d+1) = p + 1, from a random start."""
    base = 2.0
    for _ in range(50):
        base = (1 + base) ** (1 / (dimensions + 1))
    generator = random.Random(f"ranges {seed}")
    start = [generator.random() for _ in range(dimensions)]
    for index in itertools.count():
        yield [(first + index * base ** -(axis + 1)) % 1.0 for axis, first in enumerate(start)]


@dataclass(frozen=True)
class SweepConfig:
    """Which flags vary, over which values, and which trainings end early."""

    over: tuple[str, ...] = dataclasses.field(
        default=(),
        metadata={
            "help": f"A flag and its values: {EXAMPLES}. Any flag of train can vary, also --worker.NAME and --policy.NAME. "
            "Give several, or --over again. Spaces separate the values of a flag that takes several: 'lora-r=8 8,16 4'.",
            "metavar": "FLAG=VALUES",
            "repeat": True,
        },
    )
    num_trials: int | None = setting(
        None, f"Configurations to try; by default all combinations of the values, or {DEFAULT_TRIALS} if there is a range."
    )
    scheduler: Literal["auto", "asha", "none"] = setting(
        "auto",
        "Which trainings end early: those that are worse than others after as many samples (asha), or none; auto: asha for "
        "more than --asha-factor configurations that are evaluated meanwhile.",
    )
    asha_start: float = setting(0.1, "Part of the samples that every training takes before it may end.")
    asha_factor: int = setting(
        3, "At each comparison one training in this many goes on. The next comparison is after this many times the samples."
    )
    seeds: tuple[int, ...] = setting(
        (), "Seeds; by default --seed. All configurations are tried with the first one, and --finalists with the others, too."
    )
    finalists: int = setting(3, "The number of best configurations that are trained with all --seeds.")
    max_concurrent: int = setting(0, "Trainings at the same time, at most; 0: as many as the cluster has room for.")

    def __post_init__(self) -> None:
        for name in ("over", "seeds"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list | tuple) else (value,))
        check_choice(self, "scheduler", SCHEDULERS)
        check_integers(
            self, "asha_factor", "finalists", "max_concurrent", *(["num_trials"] if self.num_trials is not None else [])
        )
        check_at_least(self, 2, "asha_factor")
        check_at_least(self, 1, "finalists", *(["num_trials"] if self.num_trials is not None else []))
        check_at_least(self, 0, "max_concurrent", "asha_start")
        if not 0 < self.asha_start < 1:
            raise ConfigError(f"--asha-start is {self.asha_start}, but it must be above 0 and below 1.")
        if not all(is_integer(seed) and seed >= 0 for seed in self.seeds):
            raise ConfigError(f"--seeds is {list(self.seeds)}, but each must be a whole number, at least 0.")
        object.__setattr__(self, "seeds", tuple(dict.fromkeys(self.seeds)))
        flags = [axis.flag for axis in self.axes]
        if repeated := [flag for flag in flags if flags.count(flag) > 1]:
            raise ConfigError(f"--over has {repeated[0]} twice. Give all its values once: {repeated[0]}=VALUE,VALUE.")

    @property
    def axes(self) -> list[Axis]:
        """What ``--over`` gives. Raises ConfigError if it has another form."""
        return [parse_axis(text) for text in self.over]
