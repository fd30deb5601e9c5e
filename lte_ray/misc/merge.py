"""When the layers of a one-process LTE model merge; one's own schedule can take its place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from lte_ray.config import near
from lte_ray.errors import ConfigError

METHODS = ("step",)


class MergeCondition:
    """Merges a model's heads every `merge_steps` calls of `step()`.

    Call `step()` once after each step of the optimizer.

    Args:
        model: the model, also one wrapped in DistributedDataParallel; may be given later (`register_model`).
        merge_steps: steps from one merge to the next.
        method: what is counted. Only "step" is known.

    Attributes:
        clock: steps counted so far.
        cond_fn: called by each step, with the clock moved on: merges if it is time, and returns whether it did.
        reset_opt: True. Nothing reads it, as there.

    Raises:
        ConfigError: an unknown method, or merge_steps below 1.
    """

    def __init__(self, model: nn.Module | None, merge_steps: int = 1, method: str = "step") -> None:
        if method not in METHODS:
            raise ConfigError(f"method = {method!r} is unknown; known: {', '.join(METHODS)}.{near(str(method), METHODS)}")
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
            ConfigError: there is no model.
        """
        self._registered()
        self.clock += 1
        return self.cond_fn()

    def step_condition(self) -> bool:
        """Merges if the clock stands at a multiple of `merge_steps`; returns whether it merged."""
        due = self.clock % self.merge_steps == 0
        if due:
            self.merge()
        return due

    def merge(self) -> None:
        """Calls `merge_parameters()` of every module that has one (LTE and replica layers), each once, without gradients.

        Raises:
            ConfigError: there is no model.
        """
        with torch.no_grad():
            for module in list(self._registered().modules()):
                merge_parameters = getattr(module, "merge_parameters", None)
                if callable(merge_parameters):
                    merge_parameters()

    def _registered(self) -> nn.Module:
        if self.model is None:
            raise ConfigError("This MergeCondition has no model to merge; pass one, or call register_model(model) first.")
        return self.model
