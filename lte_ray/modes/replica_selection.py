"""Selects what of a model gets factors and what trains as replicas: the plan of Ray heads, with the authors' switches."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from torch.nn.modules import batchnorm

from lte_ray.adapters.plan import make_plans, match_patterns
from lte_ray.config import LTEConfig
from lte_ray.config.layer_rules import format_rules, parse_rules
from lte_ray.errors import ConfigError
from lte_ray.layout import Adapted, Plan

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, batchnorm._NormBase)
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
ATTENTION_INPUTS = ("in_proj", "q_proj", "k_proj")
"""With the authors' attention scaling, layers whose name contains one of these get sqrt(alpha) as alpha."""


@dataclass(frozen=True)
class Selection:
    """What happens to a model's parameters.

    Attributes:
        specs: each head's entry in its plan, by the parameter's name.
        replicas: names of parameters that train without factors.
        modules: the modules that `replica_layers` names.
    """

    specs: dict[str, tuple[Adapted, ...]]
    replicas: tuple[str, ...]
    modules: tuple[nn.Module, ...]


class Location(NamedTuple):
    """Where a parameter is held: `module`, which the model calls `layer`, holds it as `part`."""

    layer: str
    module: nn.Module
    part: str

    @property
    def name(self) -> str:
        """The parameter's name in the model."""
        return f"{self.layer}.{self.part}"


def select_parameters(
    model: nn.Module,
    config: LTEConfig,
    replica_layers: Sequence[object],
    *,
    strict: bool,
    mode: str,
    special_attention_scaling: bool,
) -> Selection:
    """Selects for every parameter that trains whether it gets factors or trains as a replica.

    Args:
        special_attention_scaling: layers whose name contains in_proj, q_proj, or k_proj get sqrt(alpha) as alpha.

    Raises:
        ConfigError, WorkerError: as `make_plan` does; an item of `replica_layers` isn't part of the model; with `strict`, a
            parameter trains that nothing mentions; or a setting is for Ray heads only.
    """
    names, modules, parameters = _resolve_replica_layers(model, replica_layers)
    locations = _parameter_locations(model)
    bias_rules = {
        f"{layer}: lora_bias=replica"
        for name, parameter in parameters.items()
        for layer, _, part in locations[id(parameter)]
        if part.endswith("bias") and layer
    }
    full_config = dataclasses.replace(
        config,
        strict=False,
        exclude=(*config.exclude, *names, *parameters),
        layers=(*format_rules(config.layers), *sorted(bias_rules)),
    )
    plans = make_plans(model, full_config)
    if special_attention_scaling:
        root_plans = make_plans(model, _with_root_of_alpha(full_config))
        plans = tuple(_replace_attention_inputs(plan, root) for plan, root in zip(plans, root_plans, strict=True))
    _check_settings(plans[0])
    trained = {r.name for r in plans[0].replicas} & {n for n, _ in model.named_parameters()}
    selection = Selection(
        {spec.name: tuple(plan.adapted[i] for plan in plans) for i, spec in enumerate(plans[0].adapted)},
        tuple(r.name for r in plans[0].replicas if r.name in trained),
        modules,
    )
    if mode != "mhlora":
        _check_shared_biases(model, selection, locations)
    if mode != "mhlora" or strict:
        _check_unmentioned(model, selection, locations, full_config.exclude, strict)
    return selection


def _resolve_replica_layers(
    model: nn.Module, replica_layers: Sequence[object]
) -> tuple[list[str], tuple[nn.Module, ...], dict[str, nn.Parameter]]:
    """What `replica_layers` means: names of its outermost modules, these modules, and its parameters outside of them."""
    if isinstance(replica_layers, str | nn.Module | nn.Parameter):
        replica_layers = [replica_layers]
    all_modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if n}
    all_parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted: set[str] = set()
    for item in replica_layers:
        if isinstance(item, str):
            wanted |= match_patterns([item], [*all_modules, *all_parameters], "layer or parameter", "replica_layers")[item]
            continue
        names = {n for n, m in all_modules.items() if m is item} | {n for n, p in all_parameters.items() if p is item}
        if not names:
            raise ConfigError(
                f"replica_layers has {'the model itself' if item is model else repr(item)[:200]}, which is not a layer or "
                "parameter of the model that can be a replica. Pass modules or parameters of the model, or their names."
            )
        wanted |= names
    # Containers are never called, so their contents stand for them.
    containers = {n for n in wanted if isinstance(all_modules.get(n), CONTAINERS)}
    contents = [n for n in (*all_modules, *all_parameters) if any(n.startswith(f"{c}.") for c in containers)]
    wanted = {n for n in (*wanted, *contents) if not isinstance(all_modules.get(n), CONTAINERS)}
    outer = [n for n in all_modules if n in wanted and not any(n.startswith(f"{o}.") for o in wanted if o in all_modules)]
    lone = {n: p for n, p in all_parameters.items() if n in wanted and not any(n.startswith(f"{o}.") for o in outer)}
    return outer, tuple({id(all_modules[n]): all_modules[n] for n in outer}.values()), lone


def _parameter_locations(model: nn.Module) -> dict[int, list[Location]]:
    """All locations of each parameter, by its id."""
    locations: dict[int, list[Location]] = {}
    for layer, module in model.named_modules(remove_duplicate=False):
        for part, parameter in module._parameters.items():
            if parameter is not None:
                locations.setdefault(id(parameter), []).append(Location(layer, module, part))
    return locations


def _with_root_of_alpha(config: LTEConfig) -> LTEConfig:
    """The config with sqrt(alpha) for every alpha, also those of its layer rules."""

    def root(alpha: float | tuple[float, ...]) -> float | tuple[float, ...]:
        return tuple(a**0.5 for a in alpha) if isinstance(alpha, tuple) else alpha**0.5

    layers = []
    for rule in parse_rules(config.layers):
        alpha = rule.settings.lora_alpha
        settings = rule.settings if alpha is None else dataclasses.replace(rule.settings, lora_alpha=root(alpha))
        layers.append(f"{rule.pattern}: {settings}")
    return dataclasses.replace(config, lora_alpha=root(config.alpha), layers=tuple(layers))


def _replace_attention_inputs(plan: Plan, root_plan: Plan) -> Plan:
    """`plan` with the entries of `root_plan` for inputs of attention."""
    pairs = zip(plan.adapted, root_plan.adapted, strict=True)
    return Plan(tuple(r if any(part in p.name for part in ATTENTION_INPUTS) else p for p, r in pairs), plan.replicas)


def _check_settings(plan: Plan) -> None:
    """Raises ConfigError if a setting is for Ray heads only."""
    for spec in plan.adapted:
        if spec.base_dtype != "fp32":
            raise ConfigError(
                f"base_dtype is {spec.base_dtype} for {spec.name}: that is for Ray heads (lte_ray.LTETrainer). In one process "
                "leave base_dtype at fp32 and convert the model itself to the wanted type (model.to(torch.bfloat16))."
            )
        if spec.lr != 1.0:
            raise ConfigError(
                f"lr is {spec.lr:g} for {spec.name}: that is for Ray heads (lte_ray.LTETrainer). In one process the optimizer "
                "is yours: leave lr out of the rules and give the optimizer parameter groups."
            )


def _check_shared_biases(model: nn.Module, selection: Selection, locations: dict[int, list[Location]]) -> None:
    """Raises ConfigError if a bias that trains is shared by a layer with factors and one without."""
    parameters = dict(model.named_parameters())
    adapted = {id(parameters[name]) for name in selection.specs}
    for name in selection.replicas:
        holders = locations[id(parameters[name])]
        of_adapted = [h for h in holders if h.part == "bias" and id(h.module._parameters.get("weight")) in adapted]
        if of_adapted and len(of_adapted) < len(holders):
            adapted_names = [h.name for h in of_adapted]
            others = ", ".join(h.name for h in holders if h.name not in adapted_names)
            raise ConfigError(
                f"{adapted_names[0]} is the bias of a layer with LoRA and also {others}, which has none. Mode mhlora supports "
                "that; in the other modes untie it, freeze it, or name both layers in replica_layers."
            )


def _check_unmentioned(
    model: nn.Module,
    selection: Selection,
    locations: dict[int, list[Location]],
    excluded: Sequence[str],
    strict: bool,
) -> None:
    """Raises ConfigError (`strict`) or warns if a parameter that nothing mentions trains as a replica."""
    parameters = dict(model.named_parameters())
    adapted = {id(parameters[name]) for name in selection.specs}
    names = [
        *(n for n, _ in model.named_modules(remove_duplicate=False) if n),
        *dict(model.named_parameters(remove_duplicate=False)),
    ]
    mentioned = set().union(*match_patterns(excluded, names, "layer", "--exclude").values()) if excluded else set()

    def is_mentioned(holder: Location) -> bool:
        return holder.layer in mentioned or holder.name.lstrip(".") in mentioned

    def is_expected(holder: Location) -> bool:
        """Whether it is a norm's or the bias of an adapted layer, which always train as replicas."""
        module, part = holder.module, holder.part
        weight = module._parameters.get(part.removesuffix("bias") + "weight")
        return (
            isinstance(module, NORMS)
            or (part.endswith("bias") and weight is not None and id(weight) in adapted)
            or (part == "in_proj_bias" and isinstance(module, nn.MultiheadAttention))
        )

    unmentioned = []
    for name in selection.replicas:
        holders = locations[id(parameters[name])]
        if not any(is_mentioned(h) for h in holders) and not all(is_expected(h) for h in holders):
            unmentioned.append(name)
    if not unmentioned:
        return
    message = f"{len(unmentioned)} parameter(s) train without LoRA, but nothing mentions them: {', '.join(unmentioned)}. "
    if strict:
        raise ConfigError(
            f"{message}Name them in replica_layers=[...] (each head trains a copy, merges average), add their kind of layer "
            "to the config's adapt, freeze them (requires_grad_(False)), remove those of norms "
            "(lte_ray.misc.disable_norm_affine_parameters), or pass strict=False, which makes them replicas."
        )
    warnings.warn(f"{message}They train as replicas. Name them in replica_layers=[...] to silence this.", stacklevel=4)
