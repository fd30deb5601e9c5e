"""Schedules merges of a one-process LTE model; `cond_fn` can hold a schedule of the user's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lte_ray.config import suggest
from lte_ray.errors import ConfigError

METHODS = ("step",)


class MergeCondition:
    """Merges a model's heads every `merge_steps` calls of `step()`.

    Call `step()` once after each step of the optimizer.

    Args:
        model: the model, possibly wrapped in DistributedDataParallel, or None to pass it to `register_model` later.
        merge_steps: steps between merges.
        method: the unit that is counted; only "step" exists.

    Attributes:
        clock: steps counted so far.
        cond_fn: called by each `step()` after the clock advanced: merges if due, and returns whether it merged.
        reset_opt: True; unused, as in the authors' library.

    Raises:
        ConfigError: the method is unknown, or merge_steps is below 1.
    """

    def __init__(self, model: nn.Module | None, merge_steps: int = 1, method: str = "step") -> None:
        if method not in METHODS:
            raise ConfigError(f"method = {method!r} is unknown; known: {', '.join(METHODS)}.{suggest(str(method), METHODS)}")
        if merge_steps < 1:
            raise ConfigError(f"merge_steps = {merge_steps} must be at least 1 (merge after every step).")
        self.model, self.merge_steps, self.method = model, merge_steps, method
        self.clock, self.reset_opt = 0, True
        self.cond_fn: Callable[[], bool] = self.step_condition

    def register_model(self, model: nn.Module) -> None:
        """Sets the model to merge."""
        self.model = model

    def peek(self) -> bool:
        """Whether the next `step()` will merge."""
        return (self.clock + 1) % self.merge_steps == 0

    def step(self) -> bool:
        """Counts one step and merges if it is due; returns whether it merged.

        Raises:
            ConfigError: no model was registered.
        """
        self._get_model()
        self.clock += 1
        return self.cond_fn()

    def step_condition(self) -> bool:
        """Merges if the clock is a multiple of `merge_steps`; returns whether it merged."""
        due = self.clock % self.merge_steps == 0
        if due:
            self.merge()
        return due

    def merge(self) -> None:
        """Calls `merge_parameters()` of every module that has it (LTE and replica layers), once each and without gradients.

        Raises:
            ConfigError: no model was registered.
        """
        with torch.no_grad():
            for module in list(self._get_model().modules()):
                merge_parameters = getattr(module, "merge_parameters", None)
                if callable(merge_parameters):
                    merge_parameters()

    def _get_model(self) -> nn.Module:
        if self.model is None:
            raise ConfigError("This MergeCondition has no model to merge; pass one, or call register_model(model) first.")
        return self.model
