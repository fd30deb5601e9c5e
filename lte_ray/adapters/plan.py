"""Decides which parameters of a user's model get factors and which train as replicas, by names, kinds and settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from lte_ray.adapters.layer_kinds import NORM, kind_of
from lte_ray.adapters.user_parameter import check_hooks
from lte_ray.config import LTEConfig, Resolved, flag, suggest
from lte_ray.config.layer_rules import parse_rules
from lte_ray.errors import ConfigError, WorkerError
from lte_ray.layout import Adapted, Plan, Replica


@dataclass(frozen=True)
class ParameterUse:
    """How one layer uses a parameter. A shared parameter has several uses.

    Attributes:
        layer: the layer's name.
        role: the parameter's role in the layer: weight, bias, packed biases or, if unknown, "".
        kind: the layer's kind in `LTEConfig.adapt`; None for layers that can't have factors.
        transposed: whether the layer stores its weight as in x out.
        sparse: whether the layer's gradients are sparse.
    """

    layer: str
    role: str
    kind: str | None = None
    transposed: bool = False
    sparse: bool = False


WEIGHT_FIELDS = ("rank", "scaling", "lr", "base_dtype")
"""Settings on which all layers that share an adapted weight must agree."""

BIAS_ROLES = ("bias", "packed biases")


def make_plan(model: nn.Module, lte: LTEConfig, head: int = 0) -> Plan:
    """Decides for one head which parameters of an unconverted model are trained, and how.

    A weight is adapted if it trains and each layer that uses it is of a kind in `lte.adapt` and isn't excluded. So a weight
    tied to an embedding is a replica unless embeddings are adapted too, and a shared weight is adapted once. `lora_bias`
    decides about the bias of a layer with LoRA. Each other parameter that trains is a replica, with `lte.others` "frozen" only
    if a setting names it; the rest stays as it is.

    With `lte.full_rank` the same weights are found, and train as replicas (`Replica.weight`); there may be none. With no kind
    in `lte.adapt`, everything that trains is a replica.

    Raises:
        ConfigError: a pattern matches nothing, layers that share a weight have different settings, or `lte.strict` is set and a
            parameter is left over.
        WorkerError: no parameter trains, none is adapted though kinds are named, or one can't be merged (sparse, complex,
            integer, no shape).
    """
    uses_by_id = _find_uses(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    settings = _LayerSettings(model, lte, head, uses_by_id)
    for name, parameter in parameters.items():
        _check_parameter(name, parameter)

    weights = {}
    for name, parameter in parameters.items():
        uses = uses_by_id[id(parameter)]
        adapt = all(use.role == "weight" and settings.resolve(use, name).adapt for use in uses)
        if adapt and parameter.numel() and len({use.transposed for use in uses}) == 1:
            weights[name] = uses
    lora_layers = {use.layer for uses in weights.values() for use in uses}
    lora_parameters = {n for n, p in parameters.items() if any(use.layer in lora_layers for use in uses_by_id[id(p)])}
    settings.check_rules_apply(lora_layers | lora_parameters, {use.kind for uses in weights.values() for use in uses})
    adapted, replicas, leftover = [], [], []
    for name, parameter in parameters.items():
        uses, shape = uses_by_id[id(parameter)], tuple(parameter.shape)
        is_lora_bias = all(use.role in BIAS_ROLES and use.layer in lora_layers for use in uses)
        fields = WEIGHT_FIELDS if name in weights else ("bias", "lr") if is_lora_bias else ("lr",)
        chosen = settings.resolve_shared(name, uses, fields)
        bias = chosen.bias if is_lora_bias else None
        named = any(settings.is_unadapted(use, name) for use in uses)
        if bias == "lora" and any(use.role != "bias" for use in uses):
            bias = "replica"  # packed biases are added after the projections
        if name in weights:
            if lte.full_rank:
                _check_gradient(name, uses, full_rank=True)
            else:
                check_hooks(name, parameter)
            spec = Adapted(name, shape, 1, chosen.scaling, uses[0].transposed, chosen.lr, chosen.base_dtype)
            # With rank min(out, in), a product can be any matrix. The scaling remains that of the configured rank.
            adapted.append(replace(spec, rank=1 if parameter.ndim == 1 else min(chosen.rank, *spec.matrix)))
        elif bias == "lora":
            check_hooks(name, parameter)
            adapted.append(Adapted(name, shape, 1, chosen.scaling, lr=chosen.lr))
        elif bias != "frozen" and (lte.others != "frozen" or bias or named):
            _check_gradient(name, uses)
            replicas.append(Replica(name, shape, chosen.lr))
            if bias is None and not named and not any(use.kind == NORM.name for use in uses):
                leftover.append(name)
    statistics = list(_running_statistics(model))
    replicas += statistics + _merged_buffers(model, lte.merge_buffers, {r.name for r in statistics})
    if lte.strict and leftover and (adapted or lte.adapt):  # without any kind to adapt, all are meant to be replicas
        raise ConfigError(_leftover_message(leftover))
    _check_plan(adapted, parameters, lte)
    _check_memory(model, {*parameters, *(replica.name for replica in replicas)})
    plan = Plan(tuple(adapted), tuple(replicas))
    return plan.full_rank() if lte.full_rank else plan


def make_plans(model: nn.Module, lte: LTEConfig) -> tuple[Plan, ...]:
    """Returns each head's plan; plans differ only in ranks and scaling.

    Raises:
        ConfigError, WorkerError: as `make_plan`.
    """
    per_head = isinstance(lte.lora_r, tuple) or isinstance(lte.lora_alpha, tuple)
    if not per_head and not any(isinstance(v, tuple) for rule in parse_rules(lte.layers) for v in vars(rule.settings).values()):
        return (make_plan(model, lte),) * lte.num_heads
    return tuple(make_plan(model, lte, head) for head in range(lte.num_heads))


def requested_ranks(model: nn.Module, lte: LTEConfig, plan: Plan, head: int = 0) -> dict[str, int]:
    """Returns the rank that the settings ask for, by name, of each adapted matrix of a head's plan; the plan may have less.

    Args:
        model: the unconverted model.
        plan: that of `make_plan` with the same settings and head.
    """
    uses_by_id = _find_uses(model)
    settings, parameters = _LayerSettings(model, lte, head, uses_by_id), dict(model.named_parameters())
    return {
        spec.name: settings.resolve_shared(spec.name, uses_by_id[id(parameters[spec.name])], ("rank",)).rank
        for spec in plan.adapted
        if len(spec.shape) > 1
    }


def match_patterns(patterns: Sequence[str], names: Sequence[str], what: str, flag: str) -> dict[str, set[str]]:
    """Returns, for each pattern, the names that it matches and all names below these.

    Raises:
        ConfigError: a pattern matches nothing.
    """
    matches = {}
    for pattern in patterns:
        matched = {n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n, pattern + ".*")}
        if not matched:
            known = (
                f"Its {what}s are: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}." if names else "It has none."
            )
            raise ConfigError(f"{flag} {pattern!r} matches no {what} of the model.{suggest(pattern, names)} {known}")
        matches[pattern] = matched
    return matches


class _LayerSettings:
    """The settings for each use of a parameter. Matches the patterns of --exclude and --layers once."""

    def __init__(self, model: nn.Module, lte: LTEConfig, head: int, uses_by_id: dict[int, list[ParameterUse]]) -> None:
        self._lte, self._head = lte, head
        kinds = {use.layer: use.kind for uses in uses_by_id.values() for use in uses}
        layers = {name: kinds[name] for name, _ in model.named_modules(remove_duplicate=False) if name in kinds}
        names = [*dict.fromkeys([*(n for n in layers if n), *(n for n, _ in model.named_parameters())])]
        listed = [n for n in names if n in layers] or names
        adaptable = {name for name, kind in layers.items() if kind}
        adaptable |= {name for name, p in model.named_parameters() if any(use.kind for use in uses_by_id[id(p)])}
        self._excluded: set[str] = set()
        self._adapt_false: set[str] = set()
        for pattern in lte.exclude:
            self._excluded |= _match_layers(pattern, names, listed, "--exclude")
        self._scopes: list[set[str] | str] = []  # of each rule: names of layers and parameters, or a kind
        for rule, text in zip(parse_rules(lte.layers), lte.layers, strict=True):
            if rule.kind is None:
                matched = _match_layers(rule.pattern, names, listed, "--layers")
                self._scopes.append(matched)
                if rule.settings.adapt is False:
                    self._adapt_false |= matched
                if rule.settings.adapt and not matched & adaptable:
                    raise ConfigError(
                        f"--layers {text!r} adapts what can't have factors: {', '.join(sorted(matched)[:5])}. "
                        "They are replicas: factors are for linear, convolution, embedding and norm layers and attention, of "
                        "torch's own classes."
                    )
            elif rule.kind not in layers.values():
                raise ConfigError(
                    f"--layers {rule.pattern!r} matches no layer of the model: it has none of kind {rule.kind}. "
                    f"It has: {', '.join(sorted({k for k in layers.values() if k})) or 'no kind that can have LoRA'}."
                )
            else:
                self._scopes.append(rule.kind)
                if rule.settings.adapt is False:
                    self._adapt_false |= {name for name, kind in layers.items() if kind == rule.kind}

    def resolve(self, use: ParameterUse, parameter: str = "") -> Resolved:
        """Returns the settings for one use of a parameter."""
        matching = tuple(
            use.kind == scope if isinstance(scope, str) else use.layer in scope or parameter in scope for scope in self._scopes
        )
        resolved = self._lte.resolve(use.kind or "", matching, self._head)
        adapt = resolved.adapt and use.kind is not None and not self._is_excluded(use, parameter)
        return Resolved(adapt, resolved.rank, resolved.scaling, resolved.bias, resolved.lr, resolved.base_dtype)

    def resolve_shared(self, name: str, uses: list[ParameterUse], fields: Sequence[str]) -> Resolved:
        """Returns the settings of a parameter; all its uses must agree on `fields`."""
        layers = {self.resolve(use, name): use.layer for use in uses}
        chosen, *others = layers
        for other in others:
            differing = [f for f in fields if getattr(other, f) != getattr(chosen, f)]
            if differing:
                raise ConfigError(
                    f"{layers[chosen]} and {layers[other]} share the parameter {name}, but --layers gives them different "
                    f"settings ({', '.join(differing)}). A shared parameter has only one setting: give both layers the same."
                )
        return chosen

    def check_rules_apply(self, adapted: set[str], kinds: set[str | None]) -> None:
        """Raises ConfigError for a rule with a setting for factors that applies to no layer with factors.

        Args:
            adapted: names of the layers with factors, and of their parameters.
            kinds: the kinds of these layers.
        """
        for rule, scope, text in zip(parse_rules(self._lte.layers), self._scopes, self._lte.layers, strict=True):
            wanted = [f for f in ("lora_r", "lora_alpha", "lora_bias", "base_dtype") if getattr(rule.settings, f) is not None]
            frozen = self._lte.others == "frozen"
            if rule.settings.lora_bias == "replica" and not frozen:  # a bias without LoRA is a replica anyway
                wanted.remove("lora_bias")
            if rule.settings.lr is not None and frozen:
                wanted.append("lr")
            applies = scope in kinds if isinstance(scope, str) else bool(scope & adapted)
            if wanted and not applies and rule.settings.adapt is not False:
                described = f"kind {scope}" if isinstance(scope, str) else ", ".join(sorted(scope)[:5])
                way = "is frozen (--others frozen)" if frozen else "trains as replicas"
                raise ConfigError(
                    f"--layers {text!r} sets {', '.join(wanted)} for what has no LoRA ({described}) and {way}. "
                    f"Write adapt=true in the rule{', or adapt=false to train it in full' * frozen}, or leave it out."
                )

    def is_unadapted(self, use: ParameterUse, parameter: str) -> bool:
        """Returns whether --exclude or a rule with adapt=false names the layer or the parameter."""
        return self._is_excluded(use, parameter) or use.layer in self._adapt_false or parameter in self._adapt_false

    def _is_excluded(self, use: ParameterUse, parameter: str) -> bool:
        """Returns whether --exclude names the layer or the parameter."""
        return use.layer in self._excluded or parameter in self._excluded


def _match_layers(pattern: str, names: list[str], listed: list[str], flag: str) -> set[str]:
    try:
        return match_patterns([pattern], names, "layer", flag)[pattern]
    except ConfigError:
        return match_patterns([pattern], listed, "layer", flag)[pattern]  # the error lists layers, not every parameter


def _find_uses(model: nn.Module) -> dict[int, list[ParameterUse]]:
    """Returns the uses of each parameter, by its id."""
    attention = {n for n, m in model.named_modules(remove_duplicate=False) if type(m) is nn.MultiheadAttention}
    uses_by_id: dict[int, list[ParameterUse]] = {}
    for layer, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            uses_by_id.setdefault(id(parameter), []).append(_describe_use(layer, module, name, attention))
    return uses_by_id


def _describe_use(layer: str, module: nn.Module, name: str, attention: set[str]) -> ParameterUse:
    if type(module) is nn.MultiheadAttention:  # its projections become layers of their own
        if name.endswith("proj_weight"):
            return ParameterUse(layer, "weight", "attention")
        role = "" if name != "in_proj_bias" else "bias" if module.in_proj_weight is not None else "packed biases"
        return ParameterUse(layer, role, "attention")
    parent, _, child = layer.rpartition(".")
    if child == "out_proj" and parent in attention:
        return ParameterUse(layer, name, "attention")
    kind = kind_of(module)
    if kind is None:
        return ParameterUse(layer, "", sparse=getattr(module, "sparse", False) is True)
    return ParameterUse(layer, name, kind.name, kind.transposed, getattr(module, "sparse", False) is True)


def _running_statistics(model: nn.Module) -> Iterator[Replica]:
    """Yields running means, variances and counts of batch normalization: replicas that no optimizer changes."""
    buffers = dict(model.named_buffers())
    for layer, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            for kind in ("running_mean", "running_var", "num_batches_tracked"):
                name = f"{layer}.{kind}".lstrip(".")
                if name in buffers:
                    _check_shape(name, buffers[name])
                    yield Replica(name, tuple(buffers[name].shape), buffer=True)


def _merged_buffers(model: nn.Module, patterns: Sequence[str], others: set[str]) -> list[Replica]:
    """The buffers that --merge-buffers names, apart from `others`: replicas, as running statistics are."""
    buffers = dict(model.named_buffers())
    matches = match_patterns([p for p in patterns if p not in ("auto", "none")], list(buffers), "buffer", "--merge-buffers")
    chosen = set().union(*matches.values()) if matches else set()
    for name in chosen:
        if buffers[name].is_complex():
            raise ConfigError(f"--merge-buffers: {name} has type {buffers[name].dtype}, which can't be averaged.")
    return [Replica(name, tuple(b.shape), buffer=True) for name, b in buffers.items() if name in chosen - others]


def _check_shape(name: str, tensor: torch.Tensor) -> None:
    if nn.parameter.is_lazy(tensor):
        raise WorkerError(f"{name} has no shape yet (a lazy layer). Pass one batch through the model in build_model().")


def _check_gradient(name: str, uses: list[ParameterUse], full_rank: bool = False) -> None:
    sparse = [use for use in uses if use.sparse]
    if sparse:
        adapt = " or adapt it: --adapt ... embedding." if all(use.kind for use in sparse) and not full_rank else "."
        how = "in full" if full_rank else "as a replica"
        raise WorkerError(
            f"Parameter {name} would train {how} with sparse gradients ({sparse[0].layer or 'the model'} has "
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


def _check_memory(model: nn.Module, changing: set[str]) -> None:
    """Refuses tensors of the model that share memory with one that training changes: a head couldn't change both at once."""
    named: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + _extent(tensor), name)
        for name, tensor in named.items()
        if not nn.parameter.is_lazy(tensor)
        and tensor.layout is torch.strided
        and tensor.numel()
        and tensor.device.type != "meta"
        and not isinstance(tensor, FakeTensor)
    )
    end, owner = 0, ""
    for begin, until, name in spans:
        if begin < end and not changing.isdisjoint((name, owner)):
            raise WorkerError(
                f"{owner} and {name} are two tensors on the same memory, so a change of one would be lost in the other. To tie "
                f"layers, give both the same parameter (b.weight = a.weight); use a transposed one in the forward pass "
                "(F.linear(x, a.weight.t())); or copy it: nn.Parameter(a.weight.detach().clone())."
            )
        if until > end:
            end, owner = until, name


def _extent(tensor: torch.Tensor) -> int:
    """The bytes from a tensor's first element to its last."""
    return (sum((n - 1) * abs(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * tensor.element_size()


def _leftover_message(names: list[str]) -> str:
    return (
        f"--strict: {len(names)} parameter(s) have no LoRA and would train as replicas: {', '.join(names)}. "
        f"Name them in --exclude (replicas, averaged at merges), add their kind of layer "
        f"to {flag('adapt')}, freeze them (requires_grad_(False)), or leave --strict out."
    )


def _check_plan(adapted: list[Adapted], parameters: dict[str, nn.Parameter], lte: LTEConfig) -> None:
    if not parameters:
        raise WorkerError("The model has no parameter that trains (requires_grad): there is nothing to adapt.")
    if adapted or lte.full_rank:
        return
    if not lte.adapt:
        for name, default in (("reset", "none"), ("base_dtype", "fp32")):
            if getattr(lte, name) != default:
                raise ConfigError(
                    f"{flag(name)} is {getattr(lte, name)}, but --adapt none leaves no layer with factors, which it is for. "
                    "Leave one of them out."
                )
    else:
        kinds = ", ".join(lte.adapt)
        raise WorkerError(
            f"The model has nothing to adapt: no weight that trains in a layer of the kinds {kinds}"
            + (" is left by --exclude and --layers." if lte.exclude or lte.layers else ". LoRA heads need at least one.")
            + " To train everything as replicas (local SGD), give --adapt none."
        )
