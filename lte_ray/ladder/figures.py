"""The figures that a worker's `evaluate` returns, and the one by which trainings are compared."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from lte_ray.config import suggest
from lte_ray.config.best_figure import parse_best_by
from lte_ray.errors import ConfigError, LTEError, WorkerError, WorkerFailed
from lte_ray.worker import Worker
from lte_ray.worker import evaluate as worker_figures


@dataclass(frozen=True)
class Figure:
    """The figure that is compared.

    Attributes:
        name: in what `evaluate` returns.
        higher_is_better: whether the highest is best, as for an accuracy; otherwise the lowest is.
    """

    name: str
    higher_is_better: bool = False

    @classmethod
    def choose(cls, chosen: str, figures: Mapping[str, float], flag: str = "--figure") -> Figure:
        """Returns the figure that `chosen` names ("loss", or "-accuracy" if higher is better); by default the first.

        Args:
            figures: of the untrained model.
            flag: that has named it, for messages.

        Raises:
            WorkerError: there are no figures.
            ConfigError: there is no such figure.
        """
        if not figures:
            raise WorkerError(
                "evaluate() returns no figures, so trainings can't be compared. Return at least one number by name."
            )
        name, sign = parse_best_by(chosen)
        name = name or next(iter(figures))
        if name not in figures:
            raise ConfigError(f"{flag} is {chosen!r}, but evaluate() returns {', '.join(figures)}.{suggest(name, figures)}")
        return cls(name, sign < 0)

    def cost(self, value: float) -> float:
        """A number that is lower where the figure is better; infinity for a figure that isn't a number."""
        if math.isnan(value):
            return math.inf
        return -value if self.higher_is_better else value

    def ratio(self, value: float, reference: float) -> float:
        """value / reference; NaN unless both are above 0."""
        return value / reference if value > 0 and reference > 0 else math.nan

    def loss_against(self, value: float, reference: float) -> float:
        """How much worse a value is than the reference, relative to it: 0.05 for 5%. Negative if it is better."""
        if not math.isfinite(value):
            return math.inf
        return (self.cost(value) - self.cost(reference)) / abs(reference) if reference else math.nan


def evaluate(worker: Worker, model: nn.Module) -> dict[str, float]:
    """Returns the worker's evaluation of an unconverted model, in eval mode; the model stays in it.

    Raises:
        WorkerFailed: the worker's code raised, or returned something else than numbers by name.
    """
    return read_figures(lambda: worker_figures(worker, model))


def read_figures(evaluate: Callable[[], Mapping[str, float]]) -> dict[str, float]:
    """Returns the numbers by name that an evaluation gives.

    Raises:
        WorkerFailed: it raised.
    """
    try:
        return dict(evaluate())
    except LTEError:
        raise
    except Exception as error:
        raise WorkerFailed("the evaluation", None, traceback.format_exc()) from error
