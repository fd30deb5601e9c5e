"""Modules that train as one copy for each head; merges average the copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lte_ray.errors import ConfigError
from lte_ray.modes.arithmetic import set_to_mean
from lte_ray.modes.batch_split import ACTIVE_HEAD, in_backward, move_tensors, refuse_recomputation, run_each_head
from lte_ray.modes.dmp import head_device
from lte_ray.modes.effective_parameter import effective_parameter
from lte_ray.modes.parameter_guard import MODEL_RUNNING, check_not_merged, refuse_use
from lte_ray.modes.state_dict_compat import ReplicaCompat


class ReplicaParameters:
    """The copies of every parameter that trains as replicas. Each is copied once, so that tied parameters stay tied."""

    def __init__(self, num_heads: int) -> None:
        self.num_heads = num_heads
        # By the original's id. The original is stored too: while it lives, its id isn't reused.
        self._copies: dict[int, tuple[nn.Parameter, list[nn.Parameter]]] = {}

    def copies_of(self, parameter: nn.Parameter) -> list[nn.Parameter]:
        """One copy for each head of a parameter that trains; the original becomes the merged one, without a gradient.

        A parameter that doesn't train is every head's.
        """
        if id(parameter) not in self._copies:
            if not parameter.requires_grad:
                return [parameter] * self.num_heads
            copies = [nn.Parameter(parameter.detach().clone()) for _ in range(self.num_heads)]
            parameter.requires_grad_(False)
            self._copies[id(parameter)] = (parameter, copies)
        return self._copies[id(parameter)][1]

    def ids(self) -> set[int]:
        """Ids of the parameters that have copies."""
        return set(self._copies)


class ReplicaLayer(nn.Module):
    """Base class of all modules in which something trains as replicas: `isinstance(module, ReplicaLayer)` finds them."""


class MultiheadReplicaLayer(ReplicaCompat, ReplicaLayer):
    """H copies of a module; in training, each computes one head's part of the batch.

    Every tensor among the arguments whose first dimension is the batch, in any nesting, is cut into H parts; outputs are
    concatenated. Evaluation uses the merged module alone. Other attributes are those of the merged module or, while a head is
    active, of that head's copy.

    Args:
        target_module: the module, which becomes the merged one.
        num_heads: H.
        mode: "ddp", or "dmp" to spread copies over CUDA devices.
        parameters: copies of parameters that other modules hold too.

    Attributes:
        replicas: the copies.
        main: the merged module.
    """

    def __init__(
        self, target_module: nn.Module, num_heads: int, mode: str = "ddp", parameters: ReplicaParameters | None = None
    ) -> None:
        super().__init__()
        module = target_module
        self.num_heads, self.mode = num_heads, mode
        parameters = parameters or ReplicaParameters(num_heads)
        copies_by_id = {id(p): parameters.copies_of(p) for p in module.parameters()}
        replicas = []
        for head in range(num_heads):
            memo: dict[int, Any] = {key: copies[head] for key, copies in copies_by_id.items()}
            replica = copy.deepcopy(module, memo)
            for part in replica.modules():
                part.__dict__.pop("lte_merged", None)  # set if another replica layer holds the same part
            replicas.append(replica)
        self.replicas = nn.ModuleList(replicas)
        self.main = module
        self.lte_name = module.__dict__.get("lte_name") or type(module).__name__  # for errors
        for name, part in module.named_modules():
            part.__dict__.setdefault("lte_merged", f"{self.lte_name}.{name}".rstrip("."))
            part.register_forward_pre_hook(check_not_merged)
        self.train(module.training)
        first_state = self.replicas[0].state_dict(keep_vars=True)
        self._frozen = {name for name, p in module.state_dict(keep_vars=True).items() if p is first_state[name]}
        self._move_to_head_devices()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return self.main(*args, **kwargs)
        head = ACTIVE_HEAD.get()
        if head is not None:
            return self._forward_head(head, args, kwargs)
        if isinstance(self.main, nn.RNNBase):
            return self._forward_recurrent(*args, **kwargs)
        return run_each_head(self.main, self._forward_head, args, kwargs, self.num_heads)

    def _forward_recurrent(self, input: Any, hx: Any = None) -> Any:
        """(y (batch, time, width), states) of torch's recurrent layers, whose states are (layers, batch, width)."""
        if not isinstance(input, Tensor) or input.dim() != 3 or not self.main.batch_first:
            given = f"{tuple(input.shape)}" if isinstance(input, Tensor) else type(input).__name__
            raise ConfigError(
                f"{self.lte_name} got an input of {given} with batch_first={self.main.batch_first}: recurrent layers can split "
                "only inputs of (batch, time, width) with batch_first=True over heads. Use these, or chunk='model' in "
                "prepare_model_for_lte, which runs the whole model once for each head."
            )

        def run(head: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            y, states = self._forward_head(head, (args[0], _swap_batch_and_layers(args[1])), kwargs)
            return y, _swap_batch_and_layers(states)

        y, states = run_each_head(self.main, run, (input, _swap_batch_and_layers(hx)), {}, self.num_heads)
        return y, _swap_batch_and_layers(states)

    def _forward_head(self, head: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One head's output for its part of the arguments, computed on its copy's device."""
        replica = self.replicas[head]
        main_device, replica_device = _module_device(self.main), _module_device(replica)
        if main_device is None or replica_device is None or main_device == replica_device:
            return replica(*args, **kwargs)
        args, kwargs = move_tensors((args, kwargs), replica_device)
        return move_tensors(replica(*args, **kwargs), main_device)

    @torch.no_grad()
    def merge_parameters(self) -> None:
        """Sets the copies and the merged module to the copies' mean: parameters and running statistics."""
        main_state, states = self.main.state_dict(keep_vars=True), [r.state_dict(keep_vars=True) for r in self.replicas]
        for name, main in main_state.items():
            tensors = [state[name] for state in states]
            if isinstance(main, Tensor) and name not in self._frozen:
                set_to_mean([main, *tensors], tensors, across_processes=not isinstance(main, nn.Parameter))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "main" not in self.__dict__.get("_modules", {}):
                raise
        head = ACTIVE_HEAD.get() if self.training else None
        value = getattr(self.main if head is None else self.replicas[head], name)
        recomputed = "lte_looped" in self.__dict__ and in_backward()
        if head is not None or not self.training or value is self.replicas[0]._parameters.get(name, value):
            return value
        if MODEL_RUNNING.get():
            return effective_parameter(value, partial(refuse_use, f"{self.lte_name}.{name}"))
        return effective_parameter(value, refuse_recomputation) if recomputed else value

    def _move_to_head_devices(self) -> None:
        """Moves copies to their heads' devices. Parameters shared with the merged module are copied before."""
        main_device = _module_device(self.main)
        if self.mode != "dmp" or main_device is None:
            return
        shared = {id(p) for p in self.main.parameters()}
        for head, replica in enumerate(self.replicas):
            device = head_device(head, main_device)
            if _module_device(replica) == device:
                continue
            copies: dict[int, nn.Parameter] = {}
            for part in replica.modules():
                for name, p in part._parameters.items():
                    if p is not None and id(p) in shared:
                        moved = nn.Parameter(p.detach().to(device, copy=True), False)
                        part._parameters[name] = copies.setdefault(id(p), moved)
            replica.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # .cuda() puts everything on one device
        self._move_to_head_devices()
        return self


def _module_device(module: nn.Module) -> torch.device | None:
    """The device of a module's first parameter, else of its first buffer, else None."""
    return next((t.device for t in (*module.parameters(), *module.buffers())), None)


def _swap_batch_and_layers(states: Any) -> Any:
    """Swaps the first two dimensions of recurrent layers' states: (layers, batch, width) <-> (batch, layers, width)."""
    return tree_map(lambda t: t.transpose(0, 1).contiguous() if isinstance(t, Tensor) and t.dim() == 3 else t, states)
