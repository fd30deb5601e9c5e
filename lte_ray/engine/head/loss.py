"""The worker's loss, and the figures that it may return with it: checked, and averaged until the next contribution."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from lte_ray.worker import Batch, Worker

RESERVED = ("loss", "train_loss")
"""Names of the loss itself, which every run records."""

MAX_KEPT_BYTES = 4096
"""Storage of a value that is kept as it is. A value that is a part of a larger tensor is copied, so as not to keep that."""

Sums = dict[str, tuple[float, int]]
"""By figure, the sum of its values, and their number."""


def compute_loss(worker: Worker, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, float | Tensor]]:
    """Calls the worker's `loss`.

    Returns:
        The loss of the batch; and the worker's own figures by name, numbers or scalar tensors, which are empty if it returns a
        loss alone.

    Raises:
        TypeError: the loss isn't a scalar tensor that depends on what trains, or a figure isn't a named number.
    """
    returned: Any = worker.loss(model, batch)
    loss, figures = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
    return _check_loss(loss), _check_figures(figures)


def _check_loss(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.ndim:
        returned = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(
            f"loss() must return a scalar tensor, the mean over the batch, or (loss, figures); it returned {returned}"
        )
    if not loss.is_floating_point() or not (loss.requires_grad or torch._C._functorch.is_batchedtensor(loss)):
        returned = "without a gradient (a detached one?)" if loss.is_floating_point() else f"of type {loss.dtype}"
        raise TypeError(f"loss() must return a tensor that depends on what trains; it returned one {returned}")
    return loss


def _check_figures(figures: Any) -> dict[str, float | Tensor]:
    if not isinstance(figures, Mapping):
        raise TypeError(
            f"loss() returned (loss, {type(figures).__name__}); what comes after the loss must be a dict of figures, by name"
        )
    for name, value in figures.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"loss() returned a figure named {name!r}; its name must be text, such as 'accuracy'")
        if name in RESERVED:
            raise TypeError(f"loss() returned a figure named {name!r}, as the loss itself is called: leave it out or rename it")
        if isinstance(value, Tensor) and not value.ndim and not value.is_complex():
            continue
        if not isinstance(value, Real):
            shown = f"a tensor of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else repr(value)[:80]
            raise TypeError(
                f"loss() returned a figure {name!r} that isn't a number: {shown}. It must be a number or a tensor without "
                "dimensions, such as a mean"
            )
    return {name: value if isinstance(value, Tensor) else float(value) for name, value in figures.items()}


class Figures:
    """Means of a worker's figures over the batches since the last contribution; each counts the batches that had it.

    Nothing waits for the device before the means are asked for.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float | Tensor]] = {}
        self._sums: Sums = {}

    def add(self, values: Mapping[str, float | Tensor]) -> None:
        """Adds one batch's figures: numbers, or scalar tensors."""
        for name, value in values.items():
            self._values.setdefault(name, []).append(_kept(value) if isinstance(value, Tensor) else value)

    def sums(self) -> Sums:
        """The sums of all values so far."""
        for name, values in self._values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + _sum(values), count + len(values))
        self._values = {}
        return dict(self._sums)

    def load(self, sums: Sums) -> None:
        """Continues from other sums."""
        self._values, self._sums = {}, dict(sums)

    def close(self) -> dict[str, float]:
        """Returns the means, and begins again without values."""
        sums = self.sums()
        self.load({})
        return {name: total / count for name, (total, count) in sums.items()}


def _kept(value: Tensor) -> Tensor:
    """The value without its graph, and without the rest of a larger tensor that it is a part of."""
    return value.detach().clone() if value.untyped_storage().nbytes() > MAX_KEPT_BYTES else value.detach()


def _sum(values: list[float | Tensor]) -> float:
    numbers = [value for value in values if not isinstance(value, Tensor)]
    by_kind: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for value in values:
        if isinstance(value, Tensor):
            by_kind.setdefault((value.dtype, value.device), []).append(value)
    return sum(numbers) + sum(float(torch.stack(tensors).double().sum()) for tensors in by_kind.values())
