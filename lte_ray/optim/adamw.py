"""AdamW for the parameters that an optimizer doesn't orthogonalize."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def adamw_step(states: MutableMapping[Tensor, dict[str, Any]], group: dict[str, Any]) -> None:
    """Takes a step of torch's AdamW with a parameter group's ``lr``, ``betas``, ``eps`` and ``weight_decay``.

    Args:
        states: of the optimizer; gets the same entries as those of `torch.optim.AdamW`.
        group: parameters without a gradient are skipped.

    Raises:
        RuntimeError: a gradient is sparse.
    """
    parameters = [p for p in group["params"] if p.grad is not None]
    if any(p.grad.is_sparse for p in parameters):
        raise RuntimeError("AdamW doesn't support sparse gradients. Build the embedding with sparse=False.")
    for p in parameters:
        if not states[p]:
            states[p].update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    entries = [states[p] for p in parameters]
    adamw(
        parameters,
        [p.grad for p in parameters],
        [e["exp_avg"] for e in entries],
        [e["exp_avg_sq"] for e in entries],
        [],
        [e["step"] for e in entries],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
        has_complex=any(torch.is_complex(p) for p in parameters),
    )
