"""What of a change PEFT can hold as LoRA, and what must travel in full, as a copy of the layer that holds it.

PEFT computes LoRA in layers that are called: linear ones, transformers' Conv1D, plain convolutions, embeddings. Its other
means are a copy of a whole module (`modules_to_save`) and the bias of a layer with LoRA (`bias="lora_only"`). It names
modules to save by the ends of their names, so a name that is the end of another one matches both.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from lte_ray.adapters.layer_kinds import CONV, EMBEDDING, LINEAR, TRANSPOSED_LINEAR, kind_of
from lte_ray.errors import UserError

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules that PEFT can't copy, since they aren't called."""

LORA_LAYER_PARTS = (
    "base_layer",
    "lora_dropout",
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)
"""Modules that PEFT's layers with LoRA have: a module whose name one of these ends with can't be copied beside them."""

ALTERNATIVE = "Export the whole weights instead: --to safetensors or --to pretrained."


@dataclass(frozen=True)
class PeftTargets:
    """How PEFT holds a change.

    Attributes:
        lora: the layers that get LoRA, each with the name of its weight, be its change of low rank or not.
        full: the modules that travel as copies.
        bias: whether a bias of a layer with LoRA has changed.
    """

    lora: dict[str, str]
    full: tuple[str, ...]
    bias: bool


def plan_targets(
    model: nn.Module, matrices: Collection[str], low_rank: Collection[str], values: Collection[str]
) -> PeftTargets:
    """Decides how PEFT holds a change of `model`.

    Args:
        matrices: names of all weights that are known as factors.
        low_rank: those of them that have changed.
        values: names of all else that has changed (parameters and buffers).

    Raises:
        UserError: PEFT can't hold it.
    """
    held, able = tensor_owners(model), _PeftCapabilities(model)
    weights = {able.first_name(layer): name for name, all_held in held.items() for layer, part in all_held if part == "weight"}
    lora: dict[str, str] = {}
    used: set[str] = set()
    biases: set[str] = set()
    full: set[str] = set()

    def hold(layer: str, part: str) -> None:
        """As LoRA of full rank where a copy can't be, as the bias of a layer with LoRA, or as a copy."""
        own = able.first_name(layer)
        if _clashes(layer) and able.can_hold_lora(layer):
            lora[own] = weights[own]
            used.add(own)
        if part == "bias" and own in lora:
            biases.add(own)
        elif own not in lora or part != "weight":
            full.add(able.copyable_module(layer))

    for name in matrices:
        (layer, part), *others = held[name]
        if part == "weight" and able.can_hold_lora(layer):
            lora[able.first_name(layer)] = name
        else:
            others = held[name]
        if name in low_rank:  # where layers share a weight, one gets LoRA: merging it into several would add it several times
            used |= {own for own, weight in lora.items() if weight == name}
            for where in others:
                hold(*where)
    for name in values:
        for where in held[name]:
            hold(*where)
    _check_copies(full, [n for n in [*low_rank, *values] if any(able.copyable_module(layer) == "" for layer, _ in held[n])])
    chosen = used | biases or set(list(lora)[:1])
    full = _with_name_collisions(set(able.modules), full, chosen)
    kept = {layer: lora[layer] for layer in lora if layer in chosen and not _within(layer, full)}
    _check_mostly_lora(model, chosen, set(kept), full)
    return PeftTargets(kept, tuple(sorted(m for m in full if not _within(m, full - {m}))), bool(biases & set(kept)))


def _check_copies(full: set[str], lone: list[str]) -> None:
    """Refuses what PEFT can't copy."""
    if "" in full:
        raise UserError(
            f"PEFT has no place for what the model itself holds: {', '.join(sorted(lone))}. It can only adapt layers, and copy "
            f"modules below the model. Give them a module of their own. {ALTERNATIVE}"
        )
    clashing = sorted(filter(_clashes, full))
    if clashing:
        raise UserError(
            f"PEFT can't copy {', '.join(clashing)}: it goes by the ends of names, and parts of its own layers end so "
            f"({', '.join(p for p in LORA_LAYER_PARTS if p.endswith(tuple(clashing)))}). {ALTERNATIVE}"
        )


def _clashes(module: str) -> bool:
    return module != "" and any(part.endswith(module) for part in LORA_LAYER_PARTS)


def _check_mostly_lora(model: nn.Module, chosen: set[str], kept: set[str], full: set[str]) -> None:
    """Refuses what would hardly be an adapter any more."""
    sizes = {layer: sum(p.numel() for p in model.get_submodule(layer).parameters()) for layer in chosen}
    if not kept or 2 * sum(sizes[layer] for layer in kept) < sum(sizes.values()):
        whole = sorted(m for m in full if not _within(m, full - {m}))
        raise UserError(
            f"PEFT can hold {'little' if kept else 'none'} of this change as LoRA: it must copy {', '.join(whole[:5])}"
            f"{', ...' if len(whole) > 5 else ''} whole, for something there that LoRA can't change. {ALTERNATIVE}"
        )


def target_modules(layers: Collection[str], model: nn.Module) -> list[str] | str:
    """`target_modules` that PEFT matches with these layers and no other: last names, full names, or a pattern."""
    names = [name for name, _ in model.named_modules() if name]
    for form in (sorted({layer.rpartition(".")[2] for layer in layers}), sorted(layers)):
        if {n for n in names for f in form if n == f or n.endswith(f".{f}")} == set(layers):
            return form
    return "|".join(re.escape(layer) for layer in sorted(layers))


class _PeftCapabilities:
    """What PEFT can do with each module of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self._first = {id(module): name for name, module in model.named_modules()}
        self._parent_counts = Counter(id(child) for module in model.modules() for child in module._modules.values())
        # They use the weights of layers that they don't call.
        kinds = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
        self._uncalled = [name for name, module in self.modules.items() if isinstance(module, kinds)]

    def first_name(self, layer: str) -> str:
        """The name by which PEFT knows a layer that has several."""
        name: str = self._first[id(self.modules[layer])]
        return name

    def can_hold_lora(self, layer: str) -> bool:
        """Whether PEFT's LoRA in this layer computes what ours does."""
        module = self.modules[layer]
        kind = kind_of(module)
        if (
            not layer
            or self._parent_counts[id(module)] > 1
            or any(layer.startswith(f"{name}.") or not name for name in self._uncalled)
        ):
            return False
        if kind is CONV:  # PEFT's A knows neither groups nor dilation nor other padding than zeros
            plain = module.groups == 1 and set(module.dilation) == {1}
            return plain and module.padding_mode == "zeros"
        return kind in (LINEAR, TRANSPOSED_LINEAR, EMBEDDING)

    def copyable_module(self, layer: str) -> str:
        """The smallest module with this one that PEFT can copy; "" if that is the model."""
        while layer and (isinstance(self.modules[layer], CONTAINERS) or self._is_part(layer)):
            layer = layer.rpartition(".")[0]
        return layer

    def _is_part(self, layer: str) -> bool:
        """Whether it is the output projection of attention, which is never called."""
        return isinstance(self.modules[layer.rpartition(".")[0]], nn.MultiheadAttention)


def tensor_owners(model: nn.Module) -> dict[str, list[tuple[str, str]]]:
    """Where each parameter and buffer is held: (layer, name in it), by the model's own name for it."""
    names = {id(t): name for name, t in [*model.named_buffers(), *model.named_parameters()]}
    held: dict[str, list[tuple[str, str]]] = {name: [] for name in names.values()}
    for layer, module in model.named_modules(remove_duplicate=False):
        for part, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                held[names[id(tensor)]].append((layer, part))
    return held


def _with_name_collisions(modules: set[str], full: set[str], lora: set[str]) -> set[str]:
    """`full`, and the layers with LoRA that PEFT would copy too because a name in it is the end of theirs."""
    full = set(full)
    while True:
        copied = {m for m in modules if m.endswith(tuple(full))}
        more = {layer for layer in lora if not _within(layer, full) and (_within(layer, copied) or _excluded(layer, full))}
        if not more:
            return full
        full |= more


def _within(layer: str, modules: Collection[str]) -> bool:
    return any(layer == m or layer.startswith(f"{m}.") for m in modules)


def _excluded(layer: str, full: set[str]) -> bool:
    return any(re.match(rf"(^|.*\.){m}($|\..*)", layer) for m in full)  # as PEFT does it
