"""Mistakes that only a GPU would show, found without one: torch's fake tensors have devices, but no values."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lte_ray.checking.explanation import explain
from lte_ray.checking.model import Examined
from lte_ray.checking.report import Finding, Findings
from lte_ray.engine.head.loss import compute_loss
from lte_ray.engine.head.worker_state import own_worker
from lte_ray.planning.shapes import forget_values
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


def check_devices(made: Examined, worker: Any, findings: Findings) -> None:
    """Computes the loss and the evaluation with a model that isn't on the CPU, without values.

    Args:
        worker: that evaluates.
    """
    if made.model is None or made.reads is None:
        return
    computed = []
    if not findings.has_failed("loss"):
        own, batch = own_worker(copy.copy(made.worker)), copy_batch(made.batch)

        def loss(model: nn.Module) -> object:
            return compute_loss(own, model.train(), to_device(batch, torch.device(OTHER)))

        computed.append(_try("loss()", made, loss, findings))
    if evaluates(worker) and not findings.has_failed("evaluation"):
        computed.append(_try("evaluate()", made, lambda model: evaluate(copy.copy(worker), model), findings))
    if any(computed) and not any(finding.part == PART for finding in findings.all):
        findings.ok(PART, "No tensors of the CPU meet those of a GPU, as far as this can be told without one.")


def _try(what: str, made: Examined, compute: Callable[[nn.Module], object], findings: Findings) -> bool:
    """Returns whether anything is known. Errors that aren't about devices may come from missing values: they tell nothing."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        model = copy.deepcopy(made.model)
        assert model is not None
        forget_values(model, mode, OTHER)
        with warnings.catch_warnings(), mode:
            warnings.simplefilter("ignore")
            compute(model)
    except Exception as error:
        if not MIXED.search(str(error)):
            return type(error).__name__ == "DataDependentOutputException"
        _, details = explain(error)
        text = f"{what} mixes tensors of the CPU with those of the model's device, which fails on a GPU. {ADVICE[what]}"
        findings.all.append(Finding(PART, "warning", text, details))
    return True
