"""Converts a user's model into one head's model, in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from lte_ray.adapters.factors import Factors, draw_initial_a
from lte_ray.adapters.layer import LTELayer, add_factors
from lte_ray.adapters.layer_kinds import kind_of
from lte_ray.adapters.plan import make_plan
from lte_ray.adapters.quantization import QuantizedWeight
from lte_ray.adapters.user_parameter import Master, UserParameter, UserParameters
from lte_ray.config import LTEConfig
from lte_ray.errors import WorkerError
from lte_ray.layout import Adapted, Plan
from lte_ray.merging.flat_buffer import as_matrix, copy_rounded
from lte_ray.merging.low_rank import fold_reference
from lte_ray.misc.attention import MultiheadAttention
from lte_ray.misc.convert import leave_fast_path


@dataclass(frozen=True)
class MainWeight:
    """A head's copy of one main weight: a tensor, or a quantized weight.

    With `separate_reference`, it is W_v itself, and the factors store the reference. Otherwise the reference is folded into it:
    W~ = W_v - s B' A'.
    """

    user: UserParameter

    @property
    def separate_reference(self) -> bool:
        return self.user.factors.separate_reference

    @property
    def spec(self) -> Adapted:
        return self.user.spec

    @property
    def stored(self) -> Tensor | QuantizedWeight:
        return self.user.stored

    @property
    def factors(self) -> Factors:
        return self.user.factors

    @torch.no_grad()
    def load(self, base: Tensor | None, reference: tuple[Tensor, Tensor] | None) -> float:
        """Loads W_v (`base`, in the stored shape) and the reference (A', B').

        Args:
            base: on any device. None if the weight is W_v already, since a head that shares it has loaded it; this needs a
                separate reference.
            reference: None if B' = 0.

        Returns:
            The relative error ||W - Q(W)|| / ||W|| of a quantized weight, 0 otherwise.
        """
        error = 0.0
        if base is None:
            assert self.separate_reference
        elif isinstance(self.stored, QuantizedWeight):
            error = self.stored.load(quantizer_input(self.spec, base))
        elif self.separate_reference or reference is None:
            self.stored.copy_(base)
        else:
            fold_reference(self.spec, self.stored, base.to(self.stored.device), reference[1], reference[0])
        if self.separate_reference:
            self.factors.set_reference(*(reference or (None, None)))
        return error

    @torch.no_grad()
    def stage(self, base: Tensor, reference: tuple[Tensor, Tensor] | None, into: Tensor | None) -> Tensor | None:
        """Computes the weight that `load` would set, in another tensor; None if only `load` can set it.

        That is the case for a quantized weight and for one with a separate reference.

        Args:
            base: W_v in the stored shape.
            reference: (A', B'); None if B' = 0.
            into: memory to use: an earlier weight that is no longer in use.
        """
        if isinstance(self.stored, QuantizedWeight) or self.separate_reference:
            return None
        staged = torch.empty_like(self.stored) if into is None else into
        if reference is None:
            staged.copy_(base)
        else:
            fold_reference(self.spec, staged, base.to(staged.device), reference[1], reference[0])
        return staged

    def swap(self, staged: Tensor) -> Tensor:
        """Puts a staged weight into use, and returns the previous one."""
        assert isinstance(self.stored, Tensor)
        before, self.stored.data = self.stored.data, staged
        self.user.hide()
        return before


@dataclass(frozen=True)
class Converted:
    """A head's model and its parts, under the unconverted model's names.

    Attributes:
        model: the model passed to `convert`, unless that is a bare `nn.MultiheadAttention`.
        plan: which of its parts are trained.
        parameters: all parameters of the unconverted model, except those whose weights are quantized.
        main_weights: the main weights.
        factors: A and B, under their names in the contribution layout.
        user_parameters: what the user's code sees of the main weights.
    """

    model: nn.Module
    plan: Plan
    parameters: dict[str, nn.Parameter]
    main_weights: dict[str, MainWeight]
    factors: dict[str, nn.Parameter]
    user_parameters: UserParameters

    def replicas(self) -> dict[str, Tensor]:
        """What trains without factors, or changes as buffers do: of 16-bit parameters their float32 values."""
        masters, tensors = self.user_parameters.masters, self.tensors()
        return {r.name: masters[r.name].values if r.name in masters else tensors[r.name] for r in self.plan.replicas}

    @torch.no_grad()
    def keep_buffers(self) -> None:
        """Puts the tensors of merged buffers back in place, with the values of those by which the model has replaced them.

        Raises:
            WorkerError: one has another shape, or is gone.
        """
        for module, key, name, tensor in self.merged_buffers:
            now = module._buffers.get(key)
            if now is tensor:
                continue
            if now is None or now.shape != tensor.shape:
                found = "removes" if now is None else f"gives the shape {tuple(now.shape)} to"
                raise WorkerError(
                    f"The model {found} its buffer {name}, which is merged and had the shape {tuple(tensor.shape)}."
                )
            copy_rounded(tensor, now)
            module._buffers[key] = tensor

    @cached_property
    def merged_buffers(self) -> list[tuple[nn.Module, str, str, Tensor]]:
        """Where the model has its merged buffers: module, key, name, and the tensor that is merged."""
        tensors = self.tensors()
        merged = {id(tensors[r.name]): r.name for r in self.plan.replicas if r.buffer}
        places = [(m, key, b) for m in self.model.modules() for key, b in m._buffers.items() if b is not None]
        return [(m, key, merged[id(b)], b) for m, key, b in places if id(b) in merged]

    def make_masters(self) -> None:
        """Gives 16-bit parameters that train without factors float32 values; to be called when the model is on its device."""
        for replica in self.plan.replicas:
            parameter = self.parameters.get(replica.name)
            if parameter is not None and parameter.dtype.itemsize < 4:
                self.user_parameters.masters[replica.name] = Master(parameter)

    @property
    def frozen(self) -> dict[str, nn.Parameter]:
        """Parameters that are neither trained nor main weights."""
        trained = {*self.main_weights, *(replica.name for replica in self.plan.replicas)}
        return {name: p for name, p in self.parameters.items() if name not in trained}

    def tensors(self) -> dict[str, Tensor]:
        """Returns all that a plan can name, as it is now: parameters and buffers."""
        return {**self.parameters, **dict(self.model.named_buffers())}


def convert(model: nn.Module, lte: LTEConfig, *, seed: int = 0, head: int = 0, separate_reference: bool = False) -> Converted:
    """Converts `model` in place for one head; at first, its outputs are unchanged (B = 0).

    The model keeps its parameter objects, and those that train still require gradients. It keeps its layers, too; the class of
    an adapted one becomes a subclass of `HeadLayer`. Each adapted `nn.MultiheadAttention` is replaced by one with plain
    projections, which has the same parameters. A is drawn from (seed, head, name).

    Args:
        model: the user's model.
        lte: which layers to adapt, and how.
        seed: the run's seed.
        head: the head's number.
        separate_reference: whether main weights stay W_v and the factors store the reference, so that heads can share them.

    Raises:
        ConfigError, WorkerError: as `make_plan`.
    """
    plan = make_plan(model, lte, head)
    parameters = dict(model.named_parameters())
    trained = {spec.name for spec in plan.adapted} | {replica.name for replica in plan.replicas}
    for name, parameter in parameters.items():
        if name not in trained:
            parameter.requires_grad_(False)
    users, group = {}, UserParameters()
    for spec in plan.adapted:
        weight = parameters[spec.name]
        factors = _draw_factors(spec, weight, seed, head, separate_reference=separate_reference or spec.base_dtype != "fp32")
        users[id(weight)] = UserParameter(spec, weight, factors)
        group.all.append(users[id(weight)])
    model, _ = split_attention_projections(model, set(users))
    for module in list(model.modules()):
        own = {name: users.get(id(getattr(module, name, None))) for name in ("weight", "bias")}
        if own["weight"] is not None and kind_of(module) is not None:
            add_factors(module, {name: user for name, user in own.items() if user is not None}, group)
    leave_fast_path(model, LTELayer)
    converted = Converted(model, plan, parameters, {}, {}, group)
    for user in group.all:
        converted.factors.update({user.spec.a_name: user.factors.A, user.spec.b_name: user.factors.B})
        converted.main_weights[user.spec.name] = MainWeight(user)
    _quantize_main_weights(converted)
    return converted


def quantizer_input(spec: Adapted, weight: Tensor) -> Tensor:
    """Returns a main weight in the shape in which it is quantized: linear ones as the matrix (out x in)."""
    return as_matrix(spec, weight).contiguous() if len(spec.shape) == 2 else weight


def _draw_factors(spec: Adapted, weight: Tensor, seed: int, head: int, *, separate_reference: bool) -> Factors:
    pair = Factors(spec, weight, separate_reference=separate_reference)
    with torch.no_grad():
        pair.A.copy_(draw_initial_a((spec.rank, spec.matrix[1]), seed, head, spec.name))
    return pair


def split_attention_projections(model: nn.Module, adapted: set[int]) -> tuple[nn.Module, list[MultiheadAttention]]:
    """Replaces each `nn.MultiheadAttention` that has an adapted weight (by `id`) by one whose projections are layers.

    Returns:
        The model, and the new modules.
    """
    new: dict[int, MultiheadAttention] = {}
    for module in list(model.modules()):
        if type(module) is nn.MultiheadAttention and any(id(p) in adapted for p in module.parameters()):
            new[id(module)] = MultiheadAttention.from_torch(module)
            hooks = {name: value for name, value in vars(module).items() if "_hook" in name}
            vars(new[id(module)]).update(hooks)
    replace_modules(model, new)
    return new.get(id(model), model), list(new.values())


def replace_modules(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Replaces each module by new[id(module)], everywhere in the model."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in new:
                parent._modules[name] = new[id(child)]


def _quantize_main_weights(converted: Converted) -> None:
    """Quantizes the main weights to the formats that the plan specifies."""
    for name, main in converted.main_weights.items():
        if main.spec.base_dtype == "fp32" or len(main.spec.shape) == 1:
            continue
        weight = converted.parameters.pop(name).detach()
        main.user.set_stored(QuantizedWeight.from_weight(quantizer_input(main.spec, weight), main.spec.base_dtype))


def share_frozen_weights(converted: Converted, share: Converted) -> None:
    """Makes `converted` use the main weights of `share` and its other parameters that aren't trained."""
    frozen = share.frozen
    shared = {id(converted.parameters[n]): p for n, p in frozen.items()}
    for module in converted.model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in shared:
                module._parameters[name] = shared[id(parameter)]
    converted.parameters.update(frozen)
    for name, main in converted.main_weights.items():
        main.user.set_stored(share.main_weights[name].stored)
