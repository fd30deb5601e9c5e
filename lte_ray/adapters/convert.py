"""Turns a user's model into one head's model: linear layers get factors, all else that trains is a replica."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from lte_ray.adapters.linear import Factors, LTELinear, draw_a
from lte_ray.config import LTEConfig, near
from lte_ray.errors import ConfigError, WorkerError
from lte_ray.layout import Adapted, Plan, Replica


def make_plan(model: nn.Module, lte: LTEConfig) -> Plan:
    """Decides which parameters of an unconverted model get factors, and which train as replicas.

    A weight is adapted if it trains and every module that holds it is an `nn.Linear` (that very class: subclasses
    such as `nn.MultiheadAttention`'s output projection may use their weight without calling `forward`) that
    `lte.exclude` doesn't name. So a weight tied to an embedding is a replica, and one shared by several linear
    layers is adapted once. Every other parameter that trains is a replica; what doesn't train is left alone.

    Raises:
        ConfigError: an exclude pattern matches no layer, or the rank is above min(out, in) of some layer.
        WorkerError: no parameter trains, none is adapted, or one isn't of a real floating-point type.
    """
    holders: dict[int, list[tuple[str, str, nn.Module]]] = {}
    for module_name, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(id(parameter), []).append((module_name, name, module))
    excluded = _excluded(model, lte.exclude)

    adapted, replicas = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise WorkerError(
                f"Parameter {name} has no shape yet (a lazy layer). Pass one batch through the model in build_model()."
            )
        if not parameter.is_floating_point():
            raise WorkerError(
                f"Parameter {name} trains and has type {parameter.dtype}; only real floating-point can be merged."
            )
        if all(
            type(module) is nn.Linear and own == "weight" and module_name not in excluded
            for module_name, own, module in holders[id(parameter)]
        ):
            out_features, in_features = parameter.shape
            adapted.append(Adapted(name, (out_features, in_features), lte.lora_r, lte.scaling))
        else:
            replicas.append(Replica(name, tuple(parameter.shape)))
    replicas += _running_statistics(model)
    _check(adapted, replicas, dict(model.named_parameters()), lte)
    return Plan(tuple(adapted), tuple(replicas))


def convert(model: nn.Module, lte: LTEConfig, *, seed: int = 0, head: int = 0) -> tuple[nn.Module, Plan]:
    """Converts `model` in place for one head and returns it with its plan; outputs are unchanged at first (B = 0).

    The returned model is `model` itself, unless that is a bare `nn.Linear`. Parameter names and objects stay as they
    are; factors are added beside them. A is drawn from (seed, head, name).

    Raises:
        ConfigError, WorkerError: as `make_plan`.
    """
    plan = make_plan(model, lte)
    parameters = dict(model.named_parameters())
    factors = {}
    for spec in plan.adapted:
        weight = parameters[spec.name]
        pair = Factors(weight, spec.rank, spec.scaling)
        with torch.no_grad():
            pair.A.copy_(draw_a((spec.rank, spec.shape[1]), seed, head, spec.name))
        factors[id(weight)] = pair

    made: dict[int, LTELinear] = {}

    def replacement(module: nn.Module) -> LTELinear | None:
        if type(module) is not nn.Linear or id(module.weight) not in factors:
            return None
        if id(module) not in made:
            made[id(module)] = LTELinear(module, factors[id(module.weight)])
        return made[id(module)]

    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            layer = None if child is None else replacement(child)
            if layer is not None:
                setattr(parent, child_name, layer)
    return replacement(model) or model, plan


def factors_of(model: nn.Module, plan: Plan) -> dict[str, nn.Parameter]:
    """The factors in a converted model, under their names in the contribution layout.

    They are found through the layer that holds each main weight, since a shared weight's factors are listed once.
    """
    by_weight = {id(m.weight): m.lora for m in model.modules() if isinstance(m, LTELinear)}
    parameters = dict(model.named_parameters())
    found = {}
    for spec in plan.adapted:
        pair = by_weight[id(parameters[spec.name])]
        found[spec.a], found[spec.b] = pair.A, pair.B
    return found


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All that a plan can name: parameters and buffers."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _running_statistics(model: nn.Module) -> list[Replica]:
    """Batch normalisation's mean and variance change in training too: replicas that no optimizer touches."""
    norms = {n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase) and m.track_running_stats}
    buffers = dict(model.named_buffers())
    names = [f"{n}.{kind}".lstrip(".") for n in norms for kind in ("running_mean", "running_var")]
    return [Replica(name, tuple(buffers[name].shape)) for name in names if name in buffers]


def _excluded(model: nn.Module, patterns: tuple[str, ...]) -> set[str]:
    names = [name for name, module in model.named_modules(remove_duplicate=False) if name and _leafy(module)]
    excluded: set[str] = set()
    for pattern in patterns:
        # A pattern also names all that lies below what it matches: 'blocks.0' excludes 'blocks.0.mlp.up'.
        hits = {n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n, pattern + ".*")}
        if not hits:
            raise ConfigError(
                f"--exclude {pattern!r} matches no layer of the model.{near(pattern, names)} "
                f"Its layers are: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}."
            )
        excluded |= hits
    return excluded


def _leafy(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _check(adapted: list[Adapted], replicas: list[Replica], parameters: dict[str, nn.Parameter], lte: LTEConfig) -> None:
    if not adapted and not any(r.name in parameters for r in replicas):
        raise WorkerError("The model has no parameter that trains (requires_grad): there is nothing to adapt.")
    if not adapted:
        raise WorkerError(
            "The model has nothing to adapt: no nn.Linear weight that trains"
            + (" is left by --exclude." if lte.exclude else ". LoRA heads need at least one.")
        )
    small = [a for a in adapted if a.rank > min(a.shape)]
    if small:
        widest = min(min(a.shape) for a in small)
        names = ", ".join(f"{a.name} ({a.shape[0]} x {a.shape[1]})" for a in small[:5])
        layers = " ".join(repr(a.name.removesuffix(".weight")) for a in small[:5] if "." in a.name)
        raise ConfigError(
            f"--lora-r is {lte.lora_r}, above min(out, in) of {len(small)} layer(s): {names}"
            f"{', ...' if len(small) > 5 else ''}. A rank above that adds nothing. Lower --lora-r to {widest}"
            + (f", or let these layers train as replicas: --exclude {layers}." if layers else ".")
        )
