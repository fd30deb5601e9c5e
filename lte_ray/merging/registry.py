"""The built-in merge policies by name, finding a user's own, and combining a merge rule and a trigger into a policy."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lte_ray.config import MergeConfig, suggest
from lte_ray.errors import ConfigError
from lte_ray.import_object import POLICIES as ENTRY_POINTS
from lte_ray.import_object import entry_points, from_entry_points, is_object_path, load_object
from lte_ray.merging.policies.gated import LossGate
from lte_ray.merging.policies.orthogonal import Orthogonal
from lte_ray.merging.policies.outer_optimizers import Adam, DelayedNesterov, Momentum, MomentumPolicy, Nesterov
from lte_ray.merging.policies.robust import Clip, Krum, Median, TrimmedMean
from lte_ray.merging.policies.schedule_free import ScheduleFree
from lte_ray.merging.policies.sparse import Dare, Ties
from lte_ray.merging.policies.trigger import ComposedPolicy, make_trigger
from lte_ray.merging.policies.weighted import Average, Samples, Stale
from lte_ray.merging.policy import MergePolicy
from lte_ray.merging.policy_args import REQUIRED, check_arguments, check_range, list_arguments
from lte_ray.redaction import mask_secrets


class Gated(LossGate):
    """Has each merge of another policy evaluated, and keeps it only if the metric doesn't rise by more than `max_rise`.

    `LossGate`, with the inner policy given by name, as flags give it.

    Args:
        policy: the policy that merges, by name or as module:Class.
        args: its arguments, as name=value.
        max_rise: how far the metric may rise, in its own unit.
        metric: name of the metric in the worker's evaluate(); by default its first.
        higher_is_better: whether the metric is one that should rise, as an accuracy; then it may fall by `max_rise`.
    """

    def __init__(
        self,
        *,
        policy: str = "average",
        args: tuple[str, ...] = (),
        max_rise: float = 0.0,
        metric: str = "",
        higher_is_better: bool = False,
    ) -> None:
        check_range("max_rise", max_rise, 0)
        self.policy, self.args = policy, tuple(args)
        named = _parse_assignments(self.args)
        try:
            inner = make_rule(policy, named)
        except ConfigError as error:
            raise ConfigError(f"In --policy.policy and --policy.args of gated: {error}") from error
        if isinstance(inner, LossGate) or (not hasattr(inner, "merge") and hasattr(inner, "decide")):
            raise ConfigError(f"--policy.policy is {policy!r}, but gated needs a policy that merges and no more.")
        super().__init__(inner, max_rise=max_rise, metric=metric, higher_is_better=higher_is_better)


def _parse_assignments(args: Sequence[str]) -> dict[str, Any]:
    """Reads ``("lr=0.5",)`` as ``{"lr": 0.5}``: a value is a Python literal if it reads as one, else text."""
    named: dict[str, Any] = {}
    for each in args:
        name, equals, text = each.partition("=")
        if not equals or not name:
            raise ConfigError(f"--policy.args has {each!r}, but each must be name=value.")
        try:
            named[name.replace("-", "_")] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            named[name.replace("-", "_")] = text
    return named


POLICIES: dict[str, type] = {
    "average": Average,
    "samples": Samples,
    "stale": Stale,
    "momentum": Momentum,
    "nesterov": Nesterov,
    "delayed_nesterov": DelayedNesterov,
    "schedule_free": ScheduleFree,
    "adam": Adam,
    "orthogonal": Orthogonal,
    "median": Median,
    "trimmed_mean": TrimmedMean,
    "clip": Clip,
    "krum": Krum,
    "ties": Ties,
    "dare": Dare,
    "gated": Gated,
}

PACKAGE = "lte_ray.merging"
RENAMED = {"Scheduled": "ComposedPolicy"}
"""Classes that had another name in an earlier release."""

RECORDED = {"ComposedPolicy", *(kind.__name__ for kind in POLICIES.values())}
"""Classes of the package that a run may record as its policy."""

WEIGHT_POLICIES = ("average", "samples", "stale", "momentum", "nesterov", "delayed_nesterov", "schedule_free")
"""Policies that don't look at tensors, and so can decide about tensors that are in shards."""

DENSE_POLICIES = (Adam, Orthogonal, Median, TrimmedMean, Ties, Dare)
"""Policies that compute a change of their own, which heads can't redo from factors."""


def may_merge_by_weights(policy: MergePolicy) -> bool:
    """Returns whether the policy may merge by weights; only of built-in policies is it known that they never do."""
    rule: Any = policy.rule if isinstance(policy, ComposedPolicy) else policy
    return not isinstance(rule.inner if isinstance(rule, LossGate) else rule, DENSE_POLICIES)


def saved_momentum(policy: MergePolicy, tensors: Mapping[str, Tensor], num_heads: int) -> Tensor | None:
    """Returns the momentum of the outer steps that is part of a policy's saved state; None if there is none.

    Before merges had steps, the policies with momentum kept it themselves.
    """
    rule: Any = policy.rule if isinstance(policy, ComposedPolicy) else policy
    if isinstance(rule, LossGate):
        rule, tensors = rule.inner, {name.removeprefix("inner."): tensor for name, tensor in tensors.items()}
    return rule.saved_momentum(tensors, num_heads) if isinstance(rule, MomentumPolicy) else None


def make_policy(merge: MergeConfig) -> MergePolicy:
    """Returns the policy that the settings specify: `policy` with its `policy_args`, and `when` unless it decides that itself.

    Raises:
        ConfigError: the policy can't be found or constructed, isn't one, or contradicts `when` or `shards`.
    """
    rule = make_rule(merge.policy, merge.policy_args or {})
    if merge.shards > 1 and type(rule) in [kind for name, kind in POLICIES.items() if name not in WEIGHT_POLICIES]:
        raise ConfigError(
            f"--policy {_display_name(merge.policy)} looks at the heads' tensors in one process, so it needs --shards 1, but "
            f"--shards is {merge.shards}. Leave --shards out, or choose a policy that gives weights: "
            f"{', '.join(WEIGHT_POLICIES)}."
        )
    if callable(getattr(rule, "decide", None)):
        if merge.when != "barrier":
            raise ConfigError(
                f"--policy {_display_name(merge.policy)} has a decide method, so it decides itself when to merge, and --when "
                f"{merge.when} contradicts it. Leave --when out, or give the policy a merge method instead of decide."
            )
        return rule  # type: ignore[no-any-return]
    return ComposedPolicy(rule, make_trigger(merge), _display_name(merge.policy))


def make_rule(policy: Any, arguments: Mapping[str, Any] | None = None) -> Any:
    """Constructs what `MergeConfig.policy` names: an object with a `merge` or `decide` method, or a function.

    Args:
        policy: a built-in name, an entry point of the group ``lte_ray.policies``, ``module:Class``, ``file.py:Class`` (or a
            function or object there), a class, a function ``f(pending, roster)``, or a policy object.
        arguments: for the class's constructor, or keywords for the function.

    Raises:
        ConfigError: as `make_policy`.
    """
    found, name, arguments = find_policy(policy), _display_name(policy), arguments or {}
    if isinstance(found, type):
        if not _has_methods(found):
            raise ConfigError(_lacks_methods(name, found.__name__))
        values = check_arguments(found, arguments, name)
        try:
            return found(**values)
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(f"--policy {name}: {found.__name__}() raised {type(error).__name__}: {error}") from error
    if inspect.isroutine(found):
        _check_two_arguments(found, name)
        values = check_arguments(found, arguments, name)
        return functools.partial(found, **values) if values else found
    if not _has_methods(found) and not (isinstance(found, functools.partial) and callable(found)):
        raise ConfigError(_lacks_methods(name, type(found).__name__))
    if arguments:
        raise ConfigError(
            f"--policy {name} is a policy object already, so it can't take policy_args: {mask_secrets(arguments)}."
        )
    return found


def resolved_arguments(merge: MergeConfig) -> dict[str, Any]:
    """Returns the policy's arguments including defaults, for ``run.toml``; values of other than basic types as text.

    For a policy object, reads the attributes with the names of its constructor's arguments.
    """
    found, arguments = find_policy(merge.policy), merge.policy_args or {}
    if isinstance(found, type) or inspect.isroutine(found):
        defaults = {name: a.default for name, a in list_arguments(found).items() if a.default is not REQUIRED}
        return {name: _plain(value) for name, value in {**defaults, **arguments}.items()}
    return {name: _plain(getattr(found, name)) for name in list_arguments(type(found)) if hasattr(found, name)}


def find_policy(policy: Any) -> Any:
    """Returns the class, function or object that a name means; anything but text is returned as it is.

    Raises:
        ConfigError: there is no policy with that name.
    """
    if not isinstance(policy, str):
        return policy
    policy = stable_name(policy)
    if policy == "auto":  # until it is known what the heads train with (`engine.default_policy`)
        return Average
    if policy in POLICIES:
        return POLICIES[policy]
    if is_object_path(policy):
        return load_object(policy, what="--policy", error=ConfigError, functions=True)
    installed = entry_points(ENTRY_POINTS)
    if policy in installed:
        spec = from_entry_points(policy, installed, what="--policy", error=ConfigError)
        return load_object(spec, what="--policy", error=ConfigError, functions=True)
    others = f" Installed packages add: {', '.join(sorted(installed))}." if installed else ""
    raise ConfigError(
        f"--policy is {policy!r}, but the built-in policies are: {', '.join(sorted(POLICIES))}.{others}"
        f"{suggest(policy, {*POLICIES, *installed})} Give your own as module:Class or path/to/file.py:Class."
    )


def stable_name(policy: str) -> str:
    """Names a class of `lte_ray.merging` by the package instead of its module: ``lte_ray.merging:Nesterov``.

    ``run.toml`` and checkpoints record policies by name, and an earlier release had each class in another module. Any other
    name is returned as it is.
    """
    module, _, name = policy.rpartition(":")
    name = RENAMED.get(name, name)
    return f"{PACKAGE}:{name}" if f"{module}.".startswith(f"{PACKAGE}.") and name in RECORDED else policy


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_plain(each) for each in value)
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def _has_methods(policy: Any) -> bool:
    return callable(getattr(policy, "decide", None)) or callable(getattr(policy, "merge", None))


def _check_two_arguments(function: Any, name: str) -> None:
    try:
        inspect.signature(function).bind_partial(None, None)
    except (TypeError, ValueError):
        raise ConfigError(_lacks_methods(name, "function with other arguments")) from None


def _lacks_methods(name: str, kind: str) -> str:
    return (
        f"--policy {name} is a {kind} without a merge(pending, roster) or decide(pending, roster) method; a merge policy "
        "needs one of them (lte_ray.MergePolicy), or is a function f(pending, roster)."
    )


def _display_name(policy: Any) -> str:
    return policy if isinstance(policy, str) else getattr(policy, "__name__", None) or type(policy).__name__
