"""Modules that train as one copy for each head, averaged at merges."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lte_ray.adapters.effective_parameter import stand_in
from lte_ray.errors import ConfigError
from lte_ray.modes.base import average
from lte_ray.modes.batch_split import HEAD, each_head, moved, recomputing, refuse_recomputed
from lte_ray.modes.dmp import device_of
from lte_ray.modes.parameter_guard import CALLED, check_not_merged, refuse
from lte_ray.modes.state_dict_compat import ReplicaNames


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


class MultiheadReplicaLayer(ReplicaNames, ReplicaLayer):
    """H copies of a module, each of which computes one head's part of the batch in training.

    Every tensor among the arguments whose first dimension is the batch's is cut into H parts, in any nesting; outputs are laid
    end to end. Evaluation uses the merged module alone. Other attributes are the merged module's, or the active head's.

    Args:
        target_module: it becomes the merged one.
        num_heads: H.
        mode: "ddp", or "dmp" where copies are spread over CUDA devices.
        parameters: copies of parameters that other modules hold too.

    Attributes:
        replicas: the copies.
        main: the merged module.
    """

    def __init__(
        self, target_module: nn.Module, num_heads: int, mode: str = "ddp", parameters: HeadParameters | None = None
    ) -> None:
        super().__init__()
        module = target_module
        self.num_heads, self.mode = num_heads, mode
        parameters = parameters or HeadParameters(num_heads)
        own = {id(p): parameters.of(p) for p in module.parameters()}
        replicas = []
        for head in range(num_heads):
            memo: dict[int, Any] = {key: copies[head] for key, copies in own.items()}
            replica = copy.deepcopy(module, memo)
            for part in replica.modules():
                part.__dict__.pop("lte_merged", None)  # another replica layer may hold the same part
            replicas.append(replica)
        self.replicas = nn.ModuleList(replicas)
        self.main = module
        self.lte_name = module.__dict__.get("lte_name") or type(module).__name__  # for errors
        for name, part in module.named_modules():
            part.__dict__.setdefault("lte_merged", f"{self.lte_name}.{name}".rstrip("."))
            part.register_forward_pre_hook(check_not_merged)
        self.train(module.training)
        of_first = self.replicas[0].state_dict(keep_vars=True)
        self._frozen = {name for name, p in module.state_dict(keep_vars=True).items() if p is of_first[name]}
        self._spread()

    def _spread(self) -> None:
        """Moves copies to their heads' devices; what is frozen, and one for all on one device, is copied first."""
        home = _device(self.main)
        if self.mode != "dmp" or home is None:
            return
        shared = {id(p) for p in self.main.parameters()}
        for head, replica in enumerate(self.replicas):
            device = device_of(head, home)
            if _device(replica) == device:
                continue
            own: dict[int, nn.Parameter] = {}
            for part in replica.modules():
                for name, p in part._parameters.items():
                    if p is not None and id(p) in shared:
                        part._parameters[name] = own.setdefault(id(p), nn.Parameter(p.detach().to(device, copy=True), False))
            replica.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # .cuda() puts everything on one device
        self._spread()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return self.main(*args, **kwargs)
        head = HEAD.get()
        if head is not None:
            return self._one(head, args, kwargs)
        if isinstance(self.main, nn.RNNBase):
            return self._recurrent(*args, **kwargs)
        return each_head(self.main, self._one, args, kwargs, self.num_heads)

    def _recurrent(self, input: Any, hx: Any = None) -> Any:
        """(y (batch, time, width), states) of torch's recurrent layers, whose states are (layers, batch, width)."""
        if not isinstance(input, Tensor) or input.dim() != 3 or not self.main.batch_first:
            found = f"{tuple(input.shape)}" if isinstance(input, Tensor) else type(input).__name__
            raise ConfigError(
                f"{self.lte_name} got an input of {found} with batch_first={self.main.batch_first}: recurrent layers share out "
                "inputs of (batch, time, width) with batch_first=True only. Use these, or chunk='model' in "
                "prepare_model_for_lte, which runs the whole model once for each head."
            )

        def run(head: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            y, states = self._one(head, (args[0], _transposed(args[1])), kwargs)
            return y, _transposed(states)

        y, states = each_head(self.main, run, (input, _transposed(hx)), {}, self.num_heads)
        return y, _transposed(states)

    def _one(self, head: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        replica = self.replicas[head]
        home, there = _device(self.main), _device(replica)
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
            if isinstance(main, Tensor) and name not in self._frozen:
                average([main, *tensors], of=tensors, across=not isinstance(main, nn.Parameter))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "main" not in self.__dict__.get("_modules", {}):
                raise
        head = HEAD.get() if self.training else None
        value = getattr(self.main if head is None else self.replicas[head], name)
        recomputed = "lte_looped" in self.__dict__ and recomputing()
        if head is not None or not self.training or value is self.replicas[0]._parameters.get(name, value):
            return value
        if CALLED.get():
            return stand_in(value, partial(refuse, f"{self.lte_name}.{name}"))
        return stand_in(value, refuse_recomputed) if recomputed else value


def _device(module: nn.Module) -> torch.device | None:
    """Where a module's first parameter, or else its first buffer, lies."""
    return next((t.device for t in (*module.parameters(), *module.buffers())), None)


def _transposed(states: Any) -> Any:
    """Recurrent layers' states with batch and layers swapped."""
    return tree_map(lambda t: t.transpose(0, 1).contiguous() if isinstance(t, Tensor) and t.dim() == 3 else t, states)
