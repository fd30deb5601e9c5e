"""What of a model is adapted and what trains as replicas in one process: the Ray heads' plan, with the authors' switches."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.modules import batchnorm

from lte_ray.adapters.plan import make_plans, match
from lte_ray.config import LTEConfig
from lte_ray.config.layer_rules import rules, written
from lte_ray.errors import ConfigError
from lte_ray.layout import Adapted, Plan

NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, batchnorm._NormBase)
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
ATTENTION_INPUTS = ("in_proj", "q_proj", "k_proj")
"""Parts of layers' names whose alpha the authors take the root of."""


@dataclass(frozen=True)
class Choice:
    """What is done with a model's parameters.

    Attributes:
        specs: each head's entry in its plan, by the parameter's name.
        replicas: names of parameters that train without factors.
        modules: the modules that `replica_layers` names.
    """

    specs: dict[str, tuple[Adapted, ...]]
    replicas: tuple[str, ...]
    modules: tuple[nn.Module, ...]


def choose(
    model: nn.Module, config: LTEConfig, replica_layers: Sequence[object], *, strict: bool, mode: str, rooted: bool
) -> Choice:
    """Decides on every parameter that trains.

    Args:
        rooted: layers whose name contains in_proj, q_proj or k_proj get the root of alpha as alpha.

    Raises:
        ConfigError, WorkerError: as `make_plan`; something in `replica_layers` isn't the model's; `strict` and a parameter
            trains of which nothing was said; or a setting is for Ray heads only.
    """
    names, modules, parameters = _named(model, replica_layers)
    places = _places(model)
    biases = {
        f"{layer}: lora_bias=replica"
        for name, parameter in parameters.items()
        for layer, _, part in places[id(parameter)]
        if part.endswith("bias") and layer
    }
    config = dataclasses.replace(
        config,
        strict=False,
        exclude=(*config.exclude, *names, *parameters),
        layers=(*written(config.layers), *sorted(biases)),
    )
    plans = make_plans(model, config)
    if rooted:
        plans = tuple(_with_roots(p, q) for p, q in zip(plans, make_plans(model, _root_of_alpha(config)), strict=True))
    _check_settings(plans[0])
    trained = {r.name for r in plans[0].replicas} & {n for n, _ in model.named_parameters()}
    choice = Choice(
        {spec.name: tuple(plan.adapted[i] for plan in plans) for i, spec in enumerate(plans[0].adapted)},
        tuple(r.name for r in plans[0].replicas if r.name in trained),
        modules,
    )
    if mode != "mhlora":
        _check_biases(model, choice, places)
    if mode != "mhlora" or strict:
        _check_left_over(model, choice, places, config.exclude, strict)
    return choice


def _named(
    model: nn.Module, replica_layers: Sequence[object]
) -> tuple[list[str], tuple[nn.Module, ...], dict[str, nn.Parameter]]:
    """Names of the modules that `replica_layers` means, the outermost of these modules, and parameters outside of them."""
    if isinstance(replica_layers, str | nn.Module | nn.Parameter):
        replica_layers = [replica_layers]
    of_modules = {n: m for n, m in model.named_modules(remove_duplicate=False) if n}
    of_parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted: set[str] = set()
    for given in replica_layers:
        if isinstance(given, str):
            wanted |= match([given], [*of_modules, *of_parameters], "layer or parameter", "replica_layers")[given]
            continue
        found = {n for n, m in of_modules.items() if m is given} | {n for n, p in of_parameters.items() if p is given}
        if not found:
            raise ConfigError(
                f"replica_layers has {'the model itself' if given is model else repr(given)[:200]}, which is no layer or "
                "parameter of the model that can be a replica. Give its modules, parameters, or names of these."
            )
        wanted |= found
    containers = {n for n in wanted if isinstance(of_modules.get(n), CONTAINERS)}  # they are never called: what is in them is
    below = [n for n in (*of_modules, *of_parameters) if any(n.startswith(f"{c}.") for c in containers)]
    wanted = (wanted | set(below)) - {n for n in (*wanted, *below) if isinstance(of_modules.get(n), CONTAINERS)}
    outer = [n for n in of_modules if n in wanted and not any(n.startswith(f"{o}.") for o in wanted if o in of_modules)]
    alone = {n: p for n, p in of_parameters.items() if n in wanted and not any(n.startswith(f"{o}.") for o in outer)}
    return outer, tuple({id(of_modules[n]): of_modules[n] for n in outer}.values()), alone


def _places(model: nn.Module) -> dict[int, list[tuple[str, nn.Module, str]]]:
    """(layer, module, name there) of each place that holds a parameter, by the parameter's id."""
    places: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for layer, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((layer, module, name))
    return places


def _root_of_alpha(config: LTEConfig) -> LTEConfig:
    def root(alpha: float | tuple[float, ...]) -> float | tuple[float, ...]:
        return tuple(a**0.5 for a in alpha) if isinstance(alpha, tuple) else alpha**0.5

    layers = []
    for rule in rules(config.layers):
        alpha = rule.settings.lora_alpha
        settings = rule.settings if alpha is None else dataclasses.replace(rule.settings, lora_alpha=root(alpha))
        layers.append(f"{rule.pattern}: {settings}")
    return dataclasses.replace(config, lora_alpha=root(config.lora_alpha), layers=tuple(layers))


def _with_roots(plan: Plan, rooted: Plan) -> Plan:
    pairs = zip(plan.adapted, rooted.adapted, strict=True)
    return Plan(tuple(r if any(part in p.name for part in ATTENTION_INPUTS) else p for p, r in pairs), plan.replicas)


def _check_settings(plan: Plan) -> None:
    for spec in plan.adapted:
        if spec.base_dtype != "fp32":
            raise ConfigError(
                f"base_dtype is {spec.base_dtype} for {spec.name}: that is for Ray heads (lte_ray.LTETrainer). In one process "
                "leave base_dtype at fp32, and give the model itself the type that it should have (model.to(torch.bfloat16))."
            )
        if spec.lr != 1.0:
            raise ConfigError(
                f"lr is {spec.lr:g} for {spec.name}: that is for Ray heads (lte_ray.LTETrainer). In one process the optimizer "
                "is yours: leave lr out of the rules, and give it parameter groups."
            )


def _check_biases(model: nn.Module, choice: Choice, places: dict[int, list[tuple[str, nn.Module, str]]]) -> None:
    parameters = dict(model.named_parameters())
    adapted = {id(parameters[name]) for name in choice.specs}
    for name in choice.replicas:
        held = [(f"{layer}.{part}", m, part) for layer, m, part in places[id(parameters[name])]]
        of_adapted = [n for n, m, part in held if part == "bias" and id(m._parameters.get("weight")) in adapted]
        if of_adapted and len(of_adapted) < len(held):
            others = ", ".join(n for n, _, _ in held if n not in of_adapted)
            raise ConfigError(
                f"{of_adapted[0]} is the bias of a layer with LoRA and also {others}, which has none. In mode mhlora that "
                "works; in the others untie it, freeze it, or name both layers in replica_layers."
            )


def _check_left_over(
    model: nn.Module,
    choice: Choice,
    places: dict[int, list[tuple[str, nn.Module, str]]],
    excluded: Sequence[str],
    strict: bool,
) -> None:
    """Raises (`strict`) or warns if a parameter trains as a replica of which nothing was said."""
    parameters = dict(model.named_parameters())
    adapted = {id(parameters[name]) for name in choice.specs}
    names = [
        *(n for n, _ in model.named_modules(remove_duplicate=False) if n),
        *dict(model.named_parameters(remove_duplicate=False)),
    ]
    named = set().union(*match(excluded, names, "layer", "--exclude").values()) if excluded else set()

    def known(module: nn.Module, part: str) -> bool:
        weight = module._parameters.get(part.removesuffix("bias") + "weight")
        return (
            isinstance(module, NORMS)
            or (part.endswith("bias") and weight is not None and id(weight) in adapted)
            or (part == "in_proj_bias" and isinstance(module, nn.MultiheadAttention))
        )

    def was_named(layer: str, part: str) -> bool:
        return layer in named or f"{layer}.{part}".lstrip(".") in named

    left = []
    for name in choice.replicas:
        held = places[id(parameters[name])]
        if not any(was_named(layer, part) for layer, _, part in held) and not all(known(m, part) for _, m, part in held):
            left.append(name)
    if not left:
        return
    message = f"{len(left)} parameter(s) train without LoRA, of which nothing was said: {', '.join(left)}. "
    if strict:
        raise ConfigError(
            f"{message}Name them in replica_layers=[...] (each head trains a copy, merges average), take their kind of layer "
            "into the config's adapt, freeze them (requires_grad_(False)), remove those of norms "
            "(lte_ray.misc.disable_norm_affine_parameters), or pass strict=False, which makes them replicas."
        )
    warnings.warn(f"{message}They train as replicas. Name them in replica_layers=[...] to say so.", stacklevel=4)
