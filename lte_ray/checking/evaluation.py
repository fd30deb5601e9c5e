"""The worker's evaluation of merged weights: its figures, and what it must leave as it was."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lte_ray.checking.report import Findings
from lte_ray.checking.words import join
from lte_ray.engine.prepare import named_tensors
from lte_ray.worker import Worker, evaluate, evaluates

PART = "evaluation"


def check_evaluation(worker: Worker, model: nn.Module | None, device: torch.device, findings: Findings) -> None:
    """Evaluates an unconverted model as the evaluator does.

    Args:
        worker: that built the model, and has read no batch: the evaluator doesn't read any.
        model: with the merged weights, if there are any; None if it can't be built.
        device: to evaluate on.
    """
    name = type(worker).__name__
    if not evaluates(worker):
        findings.skip(PART, f"{name} has no evaluate(model), so a run has no figures but its training loss.")
        return
    if model is None:
        findings.skip(PART, "Nothing was evaluated, since the model can't be built.")
        return
    model = model.to(device)
    before = {key: tensor.detach().clone() for key, tensor in named_tensors(model).items()}
    try:
        with findings.timing(PART):
            values = evaluate(worker, model)
    except Exception as error:
        findings.fail_with(PART, error, "evaluate()")
        _check_unchanged(name, model, before, findings)
        return
    wrong = {key: value for key, value in values.items() if not math.isfinite(value)}
    if wrong:
        shown = ", ".join(f"{key} = {value}" for key, value in wrong.items())
        findings.fail(PART, f"evaluate() returned {shown}, which isn't finite. Look for a mean of nothing and a division by 0.")
    elif not values:
        findings.warn(PART, "evaluate() returned no figures. Return a dict of names and numbers, such as {'loss': 2.3}.")
    unchanged = _check_unchanged(name, model, before, findings)
    if values and not wrong and unchanged:
        findings.ok(PART, ", ".join(f"{key} = {value:.5g}" for key, value in values.items()) + ".")


def _check_unchanged(name: str, model: nn.Module, before: dict[str, Tensor], findings: Findings) -> bool:
    """Whether the evaluation has left the model as it was."""
    now = named_tensors(model)
    written = [key for key, tensor in before.items() if key not in now or not _equal(now[key], tensor)]
    if written:
        findings.fail(
            PART,
            f"evaluate() changes the model: {join(written)}. Its figures would depend on earlier evaluations. Evaluate a copy "
            "(copy.deepcopy(model)), or leave the model in eval mode, in which batch normalization counts nothing.",
        )
    elif any(module.training for module in model.modules()):
        findings.warn(
            PART, "evaluate() leaves the model in training mode. The next evaluation sets eval mode again; leave it so."
        )
        return False
    return not written


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
