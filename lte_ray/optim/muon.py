"""Muon: steps of one spectral norm for whole weight matrices, and AdamW for all other parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lte_ray.errors import ConfigError
from lte_ray.optim.adamw import adamw_step
from lte_ray.optim.groups import check_groups, check_range
from lte_ray.optim.orthogonalization import orthogonalize
from lte_ray.optim.precision import exact_products


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for groups named "weight", AdamW for all others.

    A weight of two or more dimensions counts as a matrix W (out x in), in being the product of all dimensions but the first.
    With its gradient G, momentum mu and rate lr::

        M <- mu M + G
        W <- (1 - lr weight_decay) W - lr sqrt(max(1, out / in)) msign(G + mu M)

    msign(U S V^T) = U V^T (`orthogonalize`), so lr is the spectral norm of a step of a matrix that is no taller than wide.
    Without `nesterov` it is msign(M). The momentum is stored, and the step computed, in float32 at least.

    Args:
        params: parameter groups with names, as `build_optimizer` gets them. A group's own "lr" comes first.
        lr: rate of the groups that are orthogonalized.
        momentum: mu.
        nesterov: whether to look ahead along the momentum.
        replica_lr: rate of AdamW, for all other groups.
        betas, eps: of AdamW.
        weight_decay: the part of a parameter, relative to the rate, that a step removes.

    Raises:
        ConfigError: the groups have no names, or a weight has fewer than two dimensions.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        replica_lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **defaults: Any,
    ) -> None:
        check_range("lr", lr, 0)
        check_range("replica_lr", replica_lr, 0)
        check_range("momentum", momentum, 0, 1)
        check_range("weight_decay", weight_decay, 0)
        super().__init__(
            check_groups(type(self).__name__, params),
            {
                "lr": lr, "momentum": momentum, "nesterov": nesterov, "replica_lr": replica_lr, "betas": betas, "eps": eps,
                "weight_decay": weight_decay, **defaults,
            },
        )  # fmt: skip

    def orthogonalizes(self, group: dict[str, Any]) -> bool:
        """Whether the group's steps are orthogonalized, not those of AdamW."""
        return group.get("name") == "weight"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        param_group.setdefault("lr", self.defaults["lr" if self.orthogonalizes(param_group) else "replica_lr"])
        super().add_param_group(param_group)
        if self.orthogonalizes(param_group):
            check_range("lr times weight_decay", float(param_group["lr"]) * param_group["weight_decay"], 0, 1)
        if param_group.get("name") == "weight":
            for p in param_group["params"]:
                if p.ndim < 2:
                    raise ConfigError(
                        f"{type(self).__name__} orthogonalizes matrices, but the group 'weight' has a parameter of shape "
                        f"{tuple(p.shape)}. Put it into the group 'replica'."
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if self.orthogonalizes(group) and group["params"]:
                with exact_products(group["params"][0].device.type):
                    self.step_orthogonalized(group)
            else:
                adamw_step(self.state, group)
        return loss

    def step_orthogonalized(self, group: dict[str, Any]) -> None:
        """Takes the step of a group that is orthogonalized. Weights of one shape are computed at once."""
        batches: dict[Any, list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is not None:
                batches.setdefault((p.shape, p.dtype, p.device), []).append(p)
        for (shape, _, _), parameters in batches.items():
            directions = torch.stack(self.update_momentum(parameters, group))
            out, in_features = shape[0], math.prod(shape[1:])
            signs = orthogonalize(directions.reshape(len(parameters), out, in_features)).reshape(directions.shape)
            rate = float(group["lr"])
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
            torch._foreach_add_(parameters, list(signs.unbind()), alpha=-rate * width_ratio(out, in_features))

    def update_momentum(self, parameters: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Adds the gradients to the parameters' momenta; returns the momenta, or with `nesterov` G + mu M."""
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p, dtype=wide(p.dtype))
        momenta = [self.state[p]["momentum"] for p in parameters]
        gradients = [p.grad.to(m.dtype) for p, m in zip(parameters, momenta, strict=True) if p.grad is not None]
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, gradients)
        return list(torch._foreach_add(gradients, momenta, alpha=group["momentum"])) if group["nesterov"] else momenta

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a saved state exactly: torch would cast the momentum to the parameter's type."""
        super().load_state_dict(state_dict)
        saved = [state_dict["state"].get(index, {}) for group in state_dict["param_groups"] for index in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for p, entries in zip(parameters, saved, strict=True):
            if "momentum" in entries:
                self.state[p]["momentum"] = entries["momentum"].to(device=p.device, dtype=wide(p.dtype), copy=True)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: float32, or the parameter's if that has more bits."""
    return torch.promote_types(dtype, torch.float32)


def width_ratio(out: int, in_features: int) -> float:
    """sqrt(max(1, out / in)): the spectral norm of a step, relative to the rate, that changes outputs alike at any width."""
    return math.sqrt(max(1.0, out / in_features))
