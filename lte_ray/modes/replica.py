"""Modules that train as one copy for each head, averaged at merges."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from lte_ray.modes.base import average
from lte_ray.modes.chunks import HEAD, each_head, moved
from lte_ray.modes.dmp import device_of
from lte_ray.modes.guard import CALLED, check_not_merged, refuse, stand_in


class HeadParameters:
    """Each replica parameter's copies, one for each head: made once, so that what is tied stays tied."""

    def __init__(self, num_heads: int) -> None:
        self.num_heads = num_heads
        self._copies: dict[int, tuple[nn.Parameter, list[nn.Parameter]]] = {}  # the original is held: its id is the key

    def of(self, parameter: nn.Parameter) -> list[nn.Parameter]:
        """The copies of a parameter that trains; it becomes the merged one, which gets no gradient. Others stand for all."""
        if id(parameter) not in self._copies:
            if not parameter.requires_grad:
                return [parameter] * self.num_heads
            made = [nn.Parameter(parameter.detach().clone()) for _ in range(self.num_heads)]
            parameter.requires_grad_(False)
            self._copies[id(parameter)] = (parameter, made)
        return self._copies[id(parameter)][1]

    def all(self) -> set[int]:
        """Ids of the parameters that have copies."""
        return set(self._copies)


class ReplicaLayer(nn.Module):
    """What all modules are of which something trains as copies: `isinstance(module, ReplicaLayer)` finds them."""


class MultiheadReplicaLayer(ReplicaLayer):
    """H copies of a module, each of which computes one head's part of the batch in training.

    Every tensor among the arguments whose first dimension is the batch's is cut into H parts, in any nesting; outputs are laid
    end to end. Evaluation uses the merged module alone. Other attributes are the merged module's, or the active head's.

    Args:
        module: it becomes the merged one.
        num_heads: H.
        mode: "ddp", or "dmp" where copies are spread over CUDA devices.
        parameters: copies of parameters that other modules hold too.

    Attributes:
        replicas: the copies.
        main: the merged module.
    """

    def __init__(self, module: nn.Module, num_heads: int, mode: str = "ddp", parameters: HeadParameters | None = None) -> None:
        super().__init__()
        self.num_heads, self.mode = num_heads, mode
        parameters = parameters or HeadParameters(num_heads)
        own = {id(p): (p, parameters.of(p)) for p in module.parameters()}
        replicas = []
        for head in range(num_heads):
            memo: dict[int, Any] = {key: copies[head] for key, (_, copies) in own.items()}
            replica = copy.deepcopy(module, memo)
            for part in replica.modules():
                part.__dict__.pop("lte_merged", None)  # another replica layer may hold the same part
            homes = [p.device for p in module.parameters()] if mode == "dmp" else []
            replicas.append(replica.to(device_of(head, homes[0])) if homes else replica)
        self.replicas = nn.ModuleList(replicas)
        self.main = module
        self.lte_name = module.__dict__.get("lte_name") or type(module).__name__  # for errors
        for name, part in module.named_modules():
            part.__dict__.setdefault("lte_merged", f"{self.lte_name}.{name}".rstrip("."))
            part.register_forward_pre_hook(check_not_merged)
        self.train(module.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return self.main(*args, **kwargs)
        head = HEAD.get()
        if head is not None:
            return self._one(head, args, kwargs)
        return each_head(self.main, self._one, args, kwargs, self.num_heads)

    def _one(self, head: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        replica = self.replicas[head]
        home = next((p.device for p in self.main.parameters()), None)
        there = next((p.device for p in replica.parameters()), None)
        if home is None or there is None or home == there:
            return replica(*args, **kwargs)
        args, kwargs = moved((args, kwargs), there)
        return moved(replica(*args, **kwargs), home)

    @torch.no_grad()
    def merge_parameters(self) -> None:
        """All copies and the merged module get the copies' mean: parameters and running statistics."""
        mains, owns = self.main.state_dict(keep_vars=True), [r.state_dict(keep_vars=True) for r in self.replicas]
        for name, main in mains.items():
            tensors = [own[name] for own in owns]
            if isinstance(main, torch.Tensor) and any(t is not main for t in tensors):
                average([main, *tensors], of=tensors)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "main" not in self.__dict__.get("_modules", {}):
                raise
        head = HEAD.get() if self.training else None
        value = getattr(self.main if head is None else self.replicas[head], name)
        if head is not None or not (self.training and CALLED.get()) or value is self.replicas[0]._parameters.get(name, value):
            return value
        return stand_in(value, partial(refuse, f"{self.lte_name}.{name}"))
