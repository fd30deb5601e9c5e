"""Decides how PEFT can represent a change: which layers get LoRA, and which modules must be copied in full.

PEFT computes LoRA in layers that are called: linear layers, Conv1D of transformers, plain convolutions and embeddings. Apart
from that, it can copy an entire module (`modules_to_save`) and change the bias of a layer with LoRA (`bias="lora_only"`). It
compares modules to save with the ends of names, so a name that is the end of another matches both.
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
"""Types of modules that PEFT can't copy, since they aren't called."""

LORA_LAYER_PARTS = (
    "base_layer",
    "lora_dropout",
    "lora_A",
    "lora_B",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)
"""Submodules of PEFT's LoRA layers. If one of these names ends with a module's name, PEFT can't copy that module."""

ALTERNATIVE = "Export all weights instead: --to safetensors or --to pretrained."


@dataclass(frozen=True)
class PeftTargets:
    """How PEFT represents a change.

    Attributes:
        lora: the layers that get LoRA, each with the name of its weight, whether its change is of low rank or not.
        full: the modules to copy in full.
        bias: whether a bias of a layer with LoRA has changed.
    """

    lora: dict[str, str]
    full: tuple[str, ...]
    bias: bool


def plan_targets(
    model: nn.Module, matrices: Collection[str], low_rank: Collection[str], values: Collection[str]
) -> PeftTargets:
    """Decides how PEFT represents a change of `model`.

    Args:
        model: the model to adapt.
        matrices: names of all weights for which factors are known.
        low_rank: names of those that have changed.
        values: names of all other changed parameters and buffers.

    Raises:
        UserError: PEFT can't represent the change.
    """
    owners, peft = tensor_owners(model), _PeftCapabilities(model)
    weights = {peft.first_name(layer): name for name, uses in owners.items() for layer, part in uses if part == "weight"}
    lora: dict[str, str] = {}
    used: set[str] = set()
    biases: set[str] = set()
    full: set[str] = set()

    def represent(layer: str, part: str) -> None:
        """Uses LoRA of full rank if PEFT can't copy the layer; else the bias of a layer with LoRA, or a copy."""
        target = peft.first_name(layer)
        if _clashes(layer) and peft.can_hold_lora(layer):
            lora[target] = weights[target]
            used.add(target)
        if part == "bias" and target in lora:
            biases.add(target)
        elif target not in lora or part != "weight":
            full.add(peft.copyable_module(layer))

    for name in matrices:
        (layer, part), *others = owners[name]
        if part == "weight" and peft.can_hold_lora(layer):
            lora[peft.first_name(layer)] = name
        else:
            others = owners[name]
        if name in low_rank:  # one layer of a shared weight gets LoRA: merging several adapters would add it several times
            used |= {target for target, weight in lora.items() if weight == name}
            for use in others:
                represent(*use)
    for name in values:
        for use in owners[name]:
            represent(*use)
    _check_copies(full, [n for n in [*low_rank, *values] if any(peft.copyable_module(layer) == "" for layer, _ in owners[n])])
    chosen = used | biases or set(list(lora)[:1])
    full = _with_name_collisions(set(peft.modules), full, chosen)
    kept = {layer: lora[layer] for layer in lora if layer in chosen and not _within(layer, full)}
    _check_mostly_lora(model, chosen, set(kept), full)
    return PeftTargets(kept, tuple(sorted(m for m in full if not _within(m, full - {m}))), bool(biases & set(kept)))


def _check_copies(full: set[str], direct: list[str]) -> None:
    """Raises UserError for what PEFT can't copy."""
    if "" in full:
        raise UserError(
            f"PEFT can't represent the model's direct parameters: {', '.join(sorted(direct))}. It can only adapt layers, and "
            f"copy modules below the model. Move them into a module of their own. {ALTERNATIVE}"
        )
    clashing = sorted(filter(_clashes, full))
    if clashing:
        raise UserError(
            f"PEFT can't copy {', '.join(clashing)}: it compares the ends of names, and parts of its own layers end so "
            f"({', '.join(p for p in LORA_LAYER_PARTS if p.endswith(tuple(clashing)))}). {ALTERNATIVE}"
        )


def _clashes(module: str) -> bool:
    return module != "" and any(part.endswith(module) for part in LORA_LAYER_PARTS)


def _check_mostly_lora(model: nn.Module, chosen: set[str], kept: set[str], full: set[str]) -> None:
    """Raises UserError if LoRA covers less than half of the changed layers' parameters."""
    sizes = {layer: sum(p.numel() for p in model.get_submodule(layer).parameters()) for layer in chosen}
    if not kept or 2 * sum(sizes[layer] for layer in kept) < sum(sizes.values()):
        copied = sorted(m for m in full if not _within(m, full - {m}))
        raise UserError(
            f"PEFT can represent {'little' if kept else 'none'} of this change as LoRA: it must copy {', '.join(copied[:5])}"
            f"{', ...' if len(copied) > 5 else ''} in full, since parts of them change that LoRA can't represent. {ALTERNATIVE}"
        )


def target_modules(layers: Collection[str], model: nn.Module) -> list[str] | str:
    """Returns `target_modules` that select exactly these layers in PEFT: last names, full names, or a pattern."""
    names = [name for name, _ in model.named_modules() if name]
    for candidate in (sorted({layer.rpartition(".")[2] for layer in layers}), sorted(layers)):
        if {n for n in names for f in candidate if n == f or n.endswith(f".{f}")} == set(layers):
            return candidate
    return "|".join(re.escape(layer) for layer in sorted(layers))


class _PeftCapabilities:
    """What PEFT can do with each module of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self._first = {id(module): name for name, module in model.named_modules()}
        self._parent_counts = Counter(id(child) for module in model.modules() for child in module._modules.values())
        # These use the weights of layers that they don't call.
        kinds = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
        self._uncalled = [name for name, module in self.modules.items() if isinstance(module, kinds)]

    def first_name(self, layer: str) -> str:
        """Returns the name that PEFT uses for a layer with several names."""
        name: str = self._first[id(self.modules[layer])]
        return name

    def can_hold_lora(self, layer: str) -> bool:
        """Returns whether PEFT's LoRA in this layer computes what ours does."""
        module = self.modules[layer]
        kind = kind_of(module)
        if (
            not layer
            or self._parent_counts[id(module)] > 1
            or any(layer.startswith(f"{name}.") or not name for name in self._uncalled)
        ):
            return False
        if kind is CONV:  # PEFT's A supports neither groups nor dilation nor padding other than zeros
            plain = module.groups == 1 and set(module.dilation) == {1}
            return plain and module.padding_mode == "zeros"
        return kind in (LINEAR, TRANSPOSED_LINEAR, EMBEDDING)

    def copyable_module(self, layer: str) -> str:
        """Returns the smallest module that contains this one and that PEFT can copy; "" if that is the model."""
        while layer and (isinstance(self.modules[layer], CONTAINERS) or self._is_part(layer)):
            layer = layer.rpartition(".")[0]
        return layer

    def _is_part(self, layer: str) -> bool:
        """Returns whether the layer is the output projection of attention, which is never called."""
        return isinstance(self.modules[layer.rpartition(".")[0]], nn.MultiheadAttention)


def tensor_owners(model: nn.Module) -> dict[str, list[tuple[str, str]]]:
    """Returns the layers that have each parameter or buffer, as (layer, name in it), by the tensor's name in the model."""
    names = {id(t): name for name, t in [*model.named_buffers(), *model.named_parameters()]}
    owners: dict[str, list[tuple[str, str]]] = {name: [] for name in names.values()}
    for layer, module in model.named_modules(remove_duplicate=False):
        for part, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                owners[names[id(tensor)]].append((layer, part))
    return owners


def _with_name_collisions(modules: set[str], full: set[str], lora: set[str]) -> set[str]:
    """Returns `full` with the LoRA layers that PEFT would copy too, because a name in `full` is the end of theirs."""
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
    return any(re.match(rf"(^|.*\.){m}($|\..*)", layer) for m in full)  # as in PEFT
