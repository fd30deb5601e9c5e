"""Computes the worker's first loss on this machine, so that a mistake in it is found before any actor starts."""

from __future__ import annotations

import math
import re
import traceback

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lte_ray.config import TrainConfig
from lte_ray.engine.head.loss import compute_loss
from lte_ray.engine.head.trial import trial_conditions, trial_copies
from lte_ray.errors import WorkerError
from lte_ray.worker import Batch, Worker

MAX_OPERATIONS = 1e11
"""Operations that the check may take, as parameters times the elements of the batch: a few seconds on one core."""

OF_DEVICES = re.compile(
    r"\bray\b|cuda|gpu|device|nvidia|triton|xformers|flash|kernel|not implemented|not supported|unsupported|no operator|"
    r"out of memory",
    re.IGNORECASE,
)
"""Texts of errors that may come from where the loss is computed: heads may have another device, and Ray around them."""


def describe_first_loss(loss: Tensor | None) -> str:
    """Says that nothing can be learned from this first loss; empty if it is finite or isn't known."""
    if loss is None or math.isfinite(value := float(loss)):
        return ""
    return (
        f"The loss of the first batch is {value}, so nothing can be learned from it. Look for log(0), a division by 0, and "
        "values in the data that are too large or missing."
    )


def check_first_loss(worker: Worker, model: nn.Module, batch: Batch, train: TrainConfig) -> Tensor | None:
    """Computes the loss of the first batch with copies of the worker and of the model, in training mode on the CPU.

    It isn't computed if that would take long. Errors that may come from the device are left to the heads.

    Returns:
        The loss; None if it isn't known.

    Raises:
        WorkerError: the worker's code raised, or `loss` doesn't return a scalar that depends on the model.
    """
    elements = max((leaf.numel() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), default=1)
    if sum(p.numel() for p in model.parameters()) * max(1, elements) > MAX_OPERATIONS:
        return None
    try:
        copies = trial_copies(worker, model, batch)
    except Exception:  # what can't be copied can't be tried without changing it
        return None
    try:
        with trial_conditions(train):
            return compute_loss(*copies)[0].detach()
    except Exception as error:
        if not OF_DEVICES.search(f"{type(error).__name__} {error}"):
            raise WorkerError(
                f"{type(worker).__name__}.loss() can't be used, as its first batch shows:\n\n{traceback.format_exc()}"
            ) from error
    return None
