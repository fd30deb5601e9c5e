"""Which parameters of a user's model get factors, and which train as replicas: decided by names, kinds and settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from lte_ray.adapters.layer_kinds import NORM, kind_of
from lte_ray.config import LTEConfig, Resolved, flag, suggest
from lte_ray.config.layer_rules import parse_rules
from lte_ray.errors import ConfigError, WorkerError
from lte_ray.layout import Adapted, Plan, Replica


@dataclass(frozen=True)
class ParameterUse:
    """Where a parameter is held: by the layer of this name, as its weight, bias, packed biases or something else ("").

    `kind` is the layer's kind in `LTEConfig.adapt`, None for layers that can't have factors. `sparse`: gradients are.
    """

    layer: str
    role: str
    kind: str | None = None
    transposed: bool = False
    sparse: bool = False


WEIGHT_FIELDS = ("rank", "scaling", "lr", "base_dtype")
"""Settings in which all layers that share an adapted weight must agree."""

BIAS_ROLES = ("bias", "packed biases")


def make_plan(model: nn.Module, lte: LTEConfig, head: int = 0) -> Plan:
    """Decides for one head what of an unconverted model is trained and how.

    A weight is adapted if it trains and every layer that holds it is of a kind that `lte.adapt` names and isn't excluded.
    So a weight tied to an embedding is a replica unless embeddings are adapted too; a shared one is adapted once. A bias
    of a layer with LoRA is what `lora_bias` says. Every other parameter that trains is a replica; what doesn't train is
    left alone.

    Raises:
        ConfigError: a pattern matches nothing, layers that share a weight have
            different settings, or `lte.strict` and something is left over.
        WorkerError: no parameter trains, none is adapted, or one can't be merged (sparse, complex, integer, no shape).
    """
    places = _find_uses(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    settings = _LayerSettings(model, lte, head, places)
    for name, parameter in parameters.items():
        _check_parameter(name, parameter)

    weights = {}
    for name, parameter in parameters.items():
        held = places[id(parameter)]
        if all(p.role == "weight" and settings.resolve(p, name).adapt for p in held) and len({p.transposed for p in held}) == 1:
            weights[name] = held
    with_factors = {p.layer for held in weights.values() for p in held}
    theirs = {name for name, p in parameters.items() if any(place.layer in with_factors for place in places[id(p)])}
    settings.check_used(with_factors | theirs, {p.kind for held in weights.values() for p in held})
    adapted, replicas, leftover = [], [], []
    for name, parameter in parameters.items():
        held, shape = places[id(parameter)], tuple(parameter.shape)
        of_factors = all(p.role in BIAS_ROLES and p.layer in with_factors for p in held)
        chosen = settings.resolve_shared(
            name, held, WEIGHT_FIELDS if name in weights else ("bias", "lr") if of_factors else ("lr",)
        )
        bias = chosen.bias if of_factors else None
        if bias == "lora" and any(p.role != "bias" for p in held):
            bias = "replica"  # packed biases are added behind the projections
        if name in weights:
            spec = Adapted(name, shape, 1, chosen.scaling, held[0].transposed, chosen.lr, chosen.base_dtype)
            # At min(out, in) a product can be any matrix. The scaling stays that of the rank asked for, as in other layers.
            adapted.append(replace(spec, rank=1 if parameter.ndim == 1 else min(chosen.rank, *spec.matrix)))
        elif bias == "lora":
            adapted.append(Adapted(name, shape, 1, chosen.scaling, lr=chosen.lr))
        elif bias != "frozen":
            _check_gradient(name, held)
            replicas.append(Replica(name, shape, chosen.lr))
            if bias is None and not any(p.kind == NORM.name or settings.is_unadapted(p, name) for p in held):
                leftover.append(name)
    replicas += _running_statistics(model)
    if lte.strict and leftover:
        raise ConfigError(_left_over(leftover))
    _check_plan(adapted, replicas, parameters, lte)
    return Plan(tuple(adapted), tuple(replicas))


def make_plans(model: nn.Module, lte: LTEConfig) -> tuple[Plan, ...]:
    """Every head's plan; they differ in ranks and scaling only.

    Raises:
        ConfigError, WorkerError: as `make_plan`.
    """
    per_head = isinstance(lte.lora_r, tuple) or isinstance(lte.lora_alpha, tuple)
    if not per_head and not any(isinstance(v, tuple) for rule in parse_rules(lte.layers) for v in vars(rule.settings).values()):
        return (make_plan(model, lte),) * lte.num_heads
    return tuple(make_plan(model, lte, head) for head in range(lte.num_heads))


def match_patterns(patterns: Sequence[str], names: Sequence[str], what: str, flag: str) -> dict[str, set[str]]:
    """For each pattern the names that it matches; a pattern also names all that lies below what it matches.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    found = {}
    for pattern in patterns:
        hits = {n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n, pattern + ".*")}
        if not hits:
            raise ConfigError(
                f"{flag} {pattern!r} matches no {what} of the model.{suggest(pattern, names)} "
                f"Its {what}s are: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}."
            )
        found[pattern] = hits
    return found


class _LayerSettings:
    """The settings of each place, with the patterns resolved once."""

    def __init__(self, model: nn.Module, lte: LTEConfig, head: int, places: dict[int, list[ParameterUse]]) -> None:
        self._lte, self._head = lte, head
        kinds = {p.layer: p.kind for held in places.values() for p in held}
        layers = {name: kinds[name] for name, _ in model.named_modules(remove_duplicate=False) if name in kinds}
        names = [*dict.fromkeys([*(n for n in layers if n), *(n for n, _ in model.named_parameters())])]
        listed = [n for n in names if n in layers] or names
        adaptable = {name for name, kind in layers.items() if kind}
        adaptable |= {name for name, p in model.named_parameters() if any(place.kind for place in places[id(p)])}
        self._excluded: set[str] = set()
        self._adapt_false: set[str] = set()
        for pattern in lte.exclude:
            self._excluded |= _match_layers(pattern, names, listed, "--exclude")
        self._rules: list[set[str] | str] = []
        for rule, text in zip(parse_rules(lte.layers), lte.layers, strict=True):
            if rule.kind is None:
                hits = _match_layers(rule.pattern, names, listed, "--layers")
                self._rules.append(hits)
                if rule.settings.adapt is False:
                    self._adapt_false |= hits
                if rule.settings.adapt and not hits & adaptable:
                    raise ConfigError(
                        f"--layers {text!r} adapts what can't have factors: {', '.join(sorted(hits)[:5])}. They are replicas: "
                        "factors are for linear, convolution, embedding and norm layers and attention, of torch's own classes."
                    )
            elif rule.kind not in layers.values():
                raise ConfigError(
                    f"--layers {rule.pattern!r} matches no layer of the model: it has none of kind {rule.kind}. "
                    f"It has: {', '.join(sorted({k for k in layers.values() if k})) or 'no kind that can have LoRA'}."
                )
            else:
                self._rules.append(rule.kind)

    def resolve(self, place: ParameterUse, parameter: str = "") -> Resolved:
        """The settings that hold at `place`."""
        matching = tuple(
            place.kind == rule if isinstance(rule, str) else place.layer in rule or parameter in rule for rule in self._rules
        )
        found = self._lte.resolve(place.kind or "", matching, self._head)
        adapt = found.adapt and place.kind is not None and not self.is_excluded(place, parameter)
        return Resolved(adapt, found.rank, found.scaling, found.bias, found.lr, found.base_dtype)

    def check_used(self, adapted: set[str], kinds: set[str | None]) -> None:
        """Raises ConfigError for a rule that sets something of factors where there are none.

        Args:
            adapted: names of the layers with factors, and of their parameters.
            kinds: the kinds of these layers.
        """
        for rule, hits, text in zip(parse_rules(self._lte.layers), self._rules, self._lte.layers, strict=True):
            wanted = [f for f in ("lora_r", "lora_alpha", "lora_bias", "base_dtype") if getattr(rule.settings, f) is not None]
            if rule.settings.lora_bias == "replica":  # which it is anyway
                wanted.remove("lora_bias")
            used = hits in kinds if isinstance(hits, str) else bool(hits & adapted)
            if wanted and not used and rule.settings.adapt is not False:
                kind = f"kind {hits}" if isinstance(hits, str) else ", ".join(sorted(hits)[:5])
                raise ConfigError(
                    f"--layers {text!r} sets {', '.join(wanted)} for what has no LoRA ({kind}) and trains as replicas. Write "
                    "adapt=true in the rule, or leave it out."
                )

    def is_excluded(self, place: ParameterUse, parameter: str = "") -> bool:
        """Whether --exclude names the layer or the parameter."""
        return place.layer in self._excluded or parameter in self._excluded

    def is_unadapted(self, place: ParameterUse, parameter: str) -> bool:
        """Whether --exclude or a rule with adapt=false names the layer or the parameter."""
        return self.is_excluded(place, parameter) or place.layer in self._adapt_false or parameter in self._adapt_false

    def resolve_shared(self, name: str, held: list[ParameterUse], fields: Sequence[str]) -> Resolved:
        """The settings of a parameter, in which all places that hold it must agree on `fields`."""
        found = {self.resolve(place, name): place.layer for place in held}
        chosen, *others = found
        for other in others:
            differing = [f for f in fields if getattr(other, f) != getattr(chosen, f)]
            if differing:
                raise ConfigError(
                    f"{found[chosen]} and {found[other]} share the parameter {name}, but --layers gives them other settings "
                    f"({', '.join(differing)}). A shared parameter has one of each: give both the same."
                )
        return chosen


def _match_layers(pattern: str, names: list[str], listed: list[str], flag: str) -> set[str]:
    try:
        return match_patterns([pattern], names, "layer", flag)[pattern]
    except ConfigError:
        return match_patterns([pattern], listed, "layer", flag)[pattern]  # the error lists layers, not every parameter


def _find_uses(model: nn.Module) -> dict[int, list[ParameterUse]]:
    """Where each parameter is held, by its id."""
    attention = {n for n, m in model.named_modules(remove_duplicate=False) if type(m) is nn.MultiheadAttention}
    places: dict[int, list[ParameterUse]] = {}
    for layer, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append(_describe_use(layer, module, name, attention))
    return places


def _describe_use(layer: str, module: nn.Module, name: str, attention: set[str]) -> ParameterUse:
    if type(module) is nn.MultiheadAttention:  # its projections become layers of their own
        if name.endswith("proj_weight"):
            return ParameterUse(layer, "weight", "attention")
        part = "" if name != "in_proj_bias" else "bias" if module.in_proj_weight is not None else "packed biases"
        return ParameterUse(layer, part, "attention")
    parent, _, own = layer.rpartition(".")
    if own == "out_proj" and parent in attention:
        return ParameterUse(layer, name, "attention")
    kind = kind_of(module)
    if kind is None:
        return ParameterUse(layer, "", sparse=getattr(module, "sparse", False) is True)
    return ParameterUse(layer, name, kind.name, kind.transposed, getattr(module, "sparse", False) is True)


def _running_statistics(model: nn.Module) -> Iterator[Replica]:
    """Batch normalisation's mean and variance change in training too: replicas that no optimizer touches."""
    buffers = dict(model.named_buffers())
    for layer, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            for kind in ("running_mean", "running_var"):
                name = f"{layer}.{kind}".lstrip(".")
                if name in buffers:
                    _check_shape(name, buffers[name])
                    yield Replica(name, tuple(buffers[name].shape), buffer=True)


def _check_shape(name: str, tensor: torch.Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise WorkerError(f"{name} has no shape yet (a lazy layer). Pass one batch through the model in build_model().")


def _check_gradient(name: str, held: list[ParameterUse]) -> None:
    sparse = [p for p in held if p.sparse]
    if sparse:
        adapt = " or adapt it: --adapt ... embedding." if all(p.kind for p in sparse) else "."
        raise WorkerError(
            f"Parameter {name} would train as a replica with sparse gradients ({sparse[0].layer or 'the model'} has "
            f"sparse=True), which most optimizers and clipping can't use. Build it with sparse=False{adapt}"
        )


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    _check_shape(f"Parameter {name}", parameter)
    if parameter.layout is not torch.strided:
        raise WorkerError(f"Parameter {name} is sparse ({parameter.layout}); only dense ones can be merged. Use .to_dense().")
    if not parameter.is_floating_point():
        raise WorkerError(
            f"Parameter {name} trains and has type {parameter.dtype}; only real floating-point can be merged."
            + (" Keep its real and imaginary parts as two parameters." if parameter.is_complex() else "")
        )


def _left_over(names: list[str]) -> str:
    return (
        f"--strict: {len(names)} parameter(s) have no LoRA and would train as replicas: {', '.join(names)}. "
        f"Name them in --exclude (replicas, averaged at merges), add their kind of layer "
        f"to {flag('adapt')}, freeze them (requires_grad_(False)), or leave --strict out."
    )


def _check_plan(adapted: list[Adapted], replicas: list[Replica], parameters: dict[str, nn.Parameter], lte: LTEConfig) -> None:
    if not parameters:
        raise WorkerError("The model has no parameter that trains (requires_grad): there is nothing to adapt.")
    if not adapted:
        kinds = ", ".join(lte.adapt)
        raise WorkerError(
            f"The model has nothing to adapt: no weight that trains in a layer of the kinds {kinds}"
            + (" is left by --exclude and --layers." if lte.exclude or lte.layers else ". LoRA heads need at least one.")
        )
