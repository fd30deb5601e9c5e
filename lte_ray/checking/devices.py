"""Mistakes that only a GPU would show, found without one: torch's fake tensors have devices, but no values."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from lte_ray.checking.explanation import explain
from lte_ray.checking.model import Examined
from lte_ray.checking.report import Findings
from lte_ray.engine.head.loss import compute_loss
from lte_ray.engine.head.worker_state import own_worker
from lte_ray.planning.shapes import without_values
from lte_ray.worker import copy_batch, evaluate, evaluates, to_device

PART = "devices"

OTHER = "meta"
"""The device that stands for a GPU: each torch has it."""

MIXED = re.compile(r"same device|two different devices|at least two devices", re.IGNORECASE)
"""Texts of errors about tensors of several devices."""

ADVICE = {
    "loss()": "Make tensors where the batch is (device=x.device), and let the model keep its own as buffers (register_buffer).",
    "evaluate()": "Move its data to the model's device: next(model.parameters()).device.",
}


def check_devices(made: Examined, evaluator: Any, evaluated: nn.Module | None, findings: Findings) -> None:
    """Computes the loss and the evaluation with a model that isn't on the CPU, without values.

    Args:
        evaluator: the worker that evaluates.
        evaluated: the model that it has built, if it could.
    """
    known = []
    if made.model is not None and made.reads is not None and not findings.has_failed("loss"):
        batch = copy_batch(made.batch)

        def loss(worker: Any, model: nn.Module) -> object:
            return compute_loss(worker, model.train(), to_device(batch, torch.device(OTHER)))

        known.append(_try("loss()", own_worker(copy.copy(made.worker)), made.model, loss, findings))
    if evaluated is not None and evaluates(evaluator) and not findings.has_failed("evaluation"):
        known.append(_try("evaluate()", copy.copy(evaluator), evaluated, evaluate, findings))
    if any(known) and not any(finding.part == PART for finding in findings.all):
        findings.ok(PART, "No tensors of the CPU meet those of a GPU, as far as this can be told without one.")


def _try(what: str, worker: Any, model: nn.Module, compute: Callable[[Any, nn.Module], object], findings: Findings) -> bool:
    """Returns whether anything is known. Errors that aren't about devices may come from missing values: they tell nothing.

    Args:
        worker: a copy, which may change.
        model: that it has built.
        compute: what may mix devices.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        other = _on_other_device(worker, model, mode)
        with warnings.catch_warnings(), mode:
            warnings.simplefilter("ignore")
            compute(worker, other)
    except Exception as error:
        if not MIXED.search(str(error)):
            return isinstance(error, DataDependentOutputException)
        _, details = explain(error)
        text = f"{what} mixes tensors of the CPU with those of the model's device, which fails on a GPU. {ADVICE[what]}"
        findings.warn(PART, text, details)
    return True


def _on_other_device(worker: Any, model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of the model on the other device, without values. All that refers to its tensors, or to it, refers to the copy."""
    tensors = [*model.parameters(), *model.buffers()]
    copies: dict[int, Any] = {id(tensor): without_values(tensor, mode, OTHER) for tensor in tensors}
    other = copy.deepcopy(model, copies)
    for name, value in vars(worker).items() if hasattr(worker, "__dict__") else ():
        if value is model:
            setattr(worker, name, other)
    return other
