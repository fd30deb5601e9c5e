"""Finding and constructing a merge policy: by name, as an object, class or function, from a module or file, with arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from lte_ray.config import MergeConfig, flag
from lte_ray.errors import ConfigError, PolicyError
from lte_ray.merging import (
    POLICIES,
    Arrival,
    Average,
    Barrier,
    ComposedPolicy,
    Decision,
    Discard,
    Merge,
    MergeChange,
    MergePolicy,
    Nesterov,
    Pending,
    Quorum,
    Roster,
    Wait,
    make_policy,
)
from lte_ray.merging.registry import make_rule, may_merge_by_weights, resolved_arguments, stable_name
from tests.support.plans import make_contribution, random_flat
from tests.support.policies import PLAN, make_coordinator, make_pending, make_roster


def make(policy: Any, when: Any = "barrier", **arguments: Any) -> MergePolicy:
    return make_policy(MergeConfig(policy=policy, policy_args=arguments or None, when=when))


class Mine:
    """A user's policy that decides itself when to merge."""

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        return Wait()


class Rule:
    """A user's merge rule, with arguments of every kind.

    Args:
        alpha: a number.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        times: int = 2,
        kind: Literal["a", "b"] = "a",
        on: bool = False,
        names: tuple[str, ...] = (),
        limit: float | None = None,
        free: Any = None,
    ) -> None:
        self.alpha, self.times, self.kind, self.on, self.names, self.limit, self.free = (
            alpha,
            times,
            kind,
            on,
            names,
            limit,
            free,
        )

    def merge(self, pending: Sequence[Pending], roster: Roster) -> dict[int, float]:
        return {p.head: self.alpha / roster.num_heads for p in pending}


class Empty:
    """Not a policy."""


class Raising(Mine):
    """Can't be constructed."""

    def __init__(self) -> None:
        raise KeyError("no key")


class Asking(Mine):
    """Needs an argument."""

    def __init__(self, k: int) -> None:
        self.k = k


def halves(pending: Sequence[Pending], roster: Roster, share: float = 0.5) -> dict[int, float]:
    """A function that returns weights."""
    return {p.head: share / roster.num_heads for p in pending}


def ones(pending: Sequence[Pending], roster: Roster) -> torch.Tensor:
    """A function that returns a change."""
    return torch.ones(roster.layout.size, dtype=torch.float64)


def discards(pending: Sequence[Pending], roster: Roster) -> Discard:
    """A function that returns a decision."""
    return Discard([p.head for p in pending], "because")


a_policy, a_rule = Mine(), Rule(alpha=0.5)


@pytest.mark.parametrize("name", list(POLICIES))
def test_every_built_in_name_makes_its_policy(name: str) -> None:
    """Each is a new instance of its class, and waits as --when says."""
    policy = make(name)
    assert isinstance(policy, ComposedPolicy)
    assert isinstance(policy, MergePolicy)
    assert type(policy.rule) is POLICIES[name]
    assert policy.name == name
    assert make(name).rule is not policy.rule  # type: ignore[attr-defined]


def test_every_built_in_name_is_in_the_help() -> None:
    """And in the documentation's table."""
    told = MergeConfig.__dataclass_fields__["policy"].metadata["help"]
    page = (Path(__file__).parents[3] / "docs" / "merge-policies.md").read_text()
    for name in POLICIES:
        assert f" {name}," in told
        assert f"\n| `{name}` |" in page


def test_the_default_is_the_papers_average_at_a_barrier() -> None:
    """MergeConfig's defaults."""
    policy = make_policy(MergeConfig())
    assert isinstance(policy, ComposedPolicy)
    assert (type(policy.rule), type(policy.trigger)) == (Average, Barrier)


@pytest.mark.parametrize(("when", "kind"), [("barrier", Barrier), ("quorum", Quorum), ("arrival", Arrival)])
def test_a_rule_is_asked_when_the_settings_say(when: str, kind: type) -> None:
    """An object with `merge`, its class, and a function."""
    for policy in (a_rule, Rule, halves, "nesterov", f"{__name__}:Rule", f"{__name__}:halves", f"{__name__}:a_rule"):
        made = make(policy, when)
        assert isinstance(made, ComposedPolicy)
        assert type(made.trigger) is kind


def test_a_whole_policy_is_taken_as_it_is() -> None:
    """A policy object is used as it is; a class is constructed without arguments."""
    assert make(a_policy) is a_policy
    assert type(make(Mine)) is Mine


@pytest.mark.parametrize("when", ["quorum", "arrival"])
def test_a_whole_policy_decides_itself_when(when: str) -> None:
    """--when would be ignored, so it is refused."""
    with pytest.raises(ConfigError, match=f"--policy Mine has a decide method, .* and --when {when} contradicts it. Leave"):
        make(Mine, when)


def test_a_policy_is_found_in_a_module_or_a_file(tmp_path: Path) -> None:
    """By module:Class, module:object, module:function and path/to/file.py:Class."""
    assert type(make(f"{__name__}:Mine")) is Mine
    assert make(f"{__name__}:a_policy") is a_policy
    assert make(f"{__name__}:a_rule").rule is a_rule  # type: ignore[attr-defined]
    assert make(f"{__name__}:halves").rule is halves  # type: ignore[attr-defined]
    (tmp_path / "policy_h.py").write_text("class Own:\n    def decide(self, pending, roster): return 'own'")
    assert make(f"{tmp_path}/policy_h.py:Own").decide([], None) == "own"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (halves, Merge({0: 0.25, 1: 0.25})),
        (a_rule, Merge({0: 0.25, 1: 0.25})),
        (discards, Discard([0, 1], "because")),
        (lambda pending, roster: Wait("a while"), Wait("a while")),
    ],
)
def test_weights_and_decisions_are_taken_from_rules(rule: object, expected: Decision) -> None:
    """A dict becomes a Merge; a decision stays as it is."""
    assert make(rule).decide(make_pending(2), make_roster(2)) == expected


def test_a_tensor_is_the_change_of_all_that_were_due() -> None:
    """With all their heads."""
    decision = make(ones).decide(make_pending(2), make_roster(2))
    assert isinstance(decision, MergeChange)
    assert decision.heads == [0, 1]
    assert float(decision.change.sum()) == PLAN.base.size


def test_errors_call_a_scheduled_policy_by_its_own_name() -> None:
    """Not by that of ComposedPolicy."""
    for policy, name in ((lambda pending, roster: None, "<lambda>"), (f"{__name__}:nothing", f"{__name__}:nothing")):
        coordinator, _ = make_coordinator(make(policy), heads=1)
        with pytest.raises(PolicyError, match=f"The merge policy {name} decided None"):
            coordinator.receive(make_contribution(0), random_flat(PLAN.contribution.size, 1))


def nothing(pending: Sequence[Pending], roster: Roster) -> None:
    """Decides nothing."""


def test_arguments_go_to_the_constructor_or_the_function() -> None:
    """By name; integers are accepted for floats, and lists for tuples."""
    rule = make(Rule, alpha=3, kind="b", on=True, names=["x"], limit=2.0, free=object).rule  # type: ignore[attr-defined]
    assert (rule.alpha, rule.kind, rule.on, rule.names, rule.limit, rule.free) == (3.0, "b", True, ("x",), 2.0, object)
    assert type(rule.alpha) is float
    assert make(Asking, k=3).k == 3  # type: ignore[attr-defined]
    assert make(halves, share=1.0).decide(make_pending(1), make_roster(1)) == Merge({0: 1.0})
    assert make("nesterov", lr=0.25).rule.lr == 0.25  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("policy", "arguments", "message"),
    [
        (
            Rule,
            {"alhpa": 1.0},
            r"policy Rule has no argument --policy.alhpa. Did you mean alpha\? It has: --policy.alpha, --pol",
        ),
        ("nesterov", {"mu": 0.9}, r"policy nesterov has no argument --policy.mu. It has: --policy.lr, --policy.mo"),
        ("average", {"alpha": 1.0}, r"policy average has no argument --policy.alpha. It has none.$"),
        (halves, {"alpha": 1.0}, r"policy halves has no argument --policy.alpha. It has: --policy.share.$"),
        (halves, {"pending": 1.0}, "policy halves has no argument --policy.pending"),
        (Rule, {"alpha": "1"}, "^--policy.alpha is '1', but the policy Rule takes a number there.$"),
        (Rule, {"alpha": True}, "--policy.alpha is True, but the policy Rule takes a number there"),
        (Rule, {"times": 1.5}, "--policy.times is 1.5, but the policy Rule takes a whole number there"),
        (Rule, {"times": True}, "takes a whole number"),
        (Rule, {"kind": "c"}, "--policy.kind is 'c', but the policy Rule takes one of a, b there"),
        (Rule, {"on": 1}, "--policy.on is 1, but the policy Rule takes True or False there"),
        (Rule, {"names": "x"}, "--policy.names is 'x'"),
        (Rule, {"names": [1]}, r"--policy.names is \[1\]"),
        (Rule, {"limit": "none"}, "--policy.limit is 'none'"),
        (Asking, {}, r"^The policy Asking needs --policy.k.$"),
        (
            a_rule,
            {"alpha": 1.0},
            r"--policy Rule is a policy object already, so it can't take policy_args: \{'alpha': 1.0\}",
        ),
        ("nesterov", {"momentum": 2.0}, "^--policy.momentum is 2.0, but it must be at least 0 and below 1.$"),
    ],
)
def test_wrong_arguments_are_config_errors(policy: object, arguments: dict[str, Any], message: str) -> None:
    """Unknown names with similar ones and all others, wrong types with the accepted ones, and missing arguments."""
    with pytest.raises(ConfigError, match=message):
        make(policy, **arguments)


@pytest.mark.parametrize("arguments", [3, ["alpha"], {1: 2}])
def test_arguments_are_a_dict_by_name(arguments: object) -> None:
    """Checked with the settings."""
    with pytest.raises(ConfigError, match=r"policy_args is .*, but it must be a dict of argument names and values"):
        MergeConfig(policy_args=arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("recorded", "name"),
    [
        ("lte_ray.merging.nesterov:Nesterov", "lte_ray.merging:Nesterov"),
        ("lte_ray.merging.policies.outer_optimizers:Nesterov", "lte_ray.merging:Nesterov"),
        ("lte_ray.merging.registry:Gated", "lte_ray.merging:Gated"),
        ("lte_ray.merging.scheduled:Scheduled", "lte_ray.merging:ComposedPolicy"),
        ("lte_ray.merging:Scheduled", "lte_ray.merging:ComposedPolicy"),
        ("lte_ray.merging_own:Nesterov", "lte_ray.merging_own:Nesterov"),
        ("lte_ray.merging.policy:Merge", "lte_ray.merging.policy:Merge"),
        ("mine.merging:Nesterov", "mine.merging:Nesterov"),
        ("nesterov", "nesterov"),
    ],
)
def test_what_an_earlier_release_recorded_is_found_by_a_stable_name(recorded: str, name: str) -> None:
    """Classes of the package are named by the package, whichever module defines or defined them."""
    assert stable_name(recorded) == name


def test_a_policy_is_found_where_an_earlier_release_had_it() -> None:
    """As in a run.toml that says module:Class."""
    assert type(make_rule("lte_ray.merging.nesterov:Nesterov", {"lr": 0.5})) is Nesterov


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("avrage", r"--policy is 'avrage', but the built-in policies are: .*average.* Did you mean average\? Give your own as"),
        ("zzz", r"--policy is 'zzz', but the built-in policies are: .*trimmed_mean. Give your own as module:Class or path"),
        ("", r"--policy is '', but the built-in policies are: adam, average"),
        ("nowhere_i:Own", "--policy 'nowhere_i:Own': there is no module nowhere_i"),
        ("lte_ray.merging.policies.weighted:Avrage", r"has no Avrage. Did you mean Average\?"),
        (f"{__name__}:Empty", r"is a Empty without a merge\(pending, roster\) or decide\(pending, roster\) method"),
        (Empty, "without a merge"),
        (Empty(), "without a merge"),
        (None, "is a NoneType without a merge"),
        (3, "is a int without a merge"),
        (Raising, r"Raising\(\) raised KeyError: 'no key'"),
        (f"{__name__}:Raising", r"--policy \S+:Raising: Raising\(\) raised KeyError: 'no key'"),
        (lambda pending: {}, "is a function with other arguments without a merge"),
    ],
)
def test_what_is_no_policy_is_a_config_error(policy: object, message: str) -> None:
    """The error names the flag, what was found, and what to use instead."""
    with pytest.raises(ConfigError, match=message) as raised:
        make(policy)
    assert flag("policy") in str(raised.value)


SAME_RATES = {"replica_lr": None, "replica_momentum": None, "final_lr": 1.0, "warmup": 0}
"""The other arguments of the policies with momentum, as they are by default."""


@pytest.mark.parametrize(
    ("policy", "arguments", "recorded"),
    [
        ("average", None, {}),
        ("nesterov", None, {"lr": 0.7, "momentum": 0.9, **SAME_RATES}),
        ("nesterov", {"lr": 0.5}, {"lr": 0.5, "momentum": 0.9, **SAME_RATES}),
        (Nesterov(lr=0.1), None, {"lr": 0.1, "momentum": 0.9, **SAME_RATES}),
        (halves, None, {"share": 0.5}),
        (halves, {"share": 0.25}, {"share": 0.25}),
        (Asking, {"k": 3}, {"k": 3}),
        (a_policy, None, {}),
        (
            Rule(free=[object], names=("a",)),
            None,
            {
                "alpha": 1.0,
                "times": 2,
                "kind": "a",
                "on": False,
                "names": ("a",),
                "limit": None,
                "free": ("<class 'object'>",),
            },
        ),
    ],
)
def test_what_a_run_records_of_its_policy_makes_it_again(policy: Any, arguments: Any, recorded: dict[str, Any]) -> None:
    """All arguments, including defaults; for an object, its attributes with these names."""
    merge = MergeConfig(policy=policy, policy_args=arguments)
    assert resolved_arguments(merge) == recorded
    if isinstance(policy, str):
        again = make_rule(policy, recorded)
        assert resolved_arguments(MergeConfig(policy=again)) == recorded


def test_policies_that_make_their_own_change_are_known() -> None:
    """Heads can't redo their merges from factors; nothing is known about a user's own policy."""
    for name in POLICIES:
        dense = name in ("adam", "orthogonal", "median", "trimmed_mean", "ties", "dare")
        assert may_merge_by_weights(make_policy(MergeConfig(policy=name))) != dense
    for inner in ("nesterov", "adam"):
        gated = make_policy(MergeConfig(policy="gated", policy_args={"policy": inner}))
        assert may_merge_by_weights(gated) == (inner == "nesterov")
    assert may_merge_by_weights(make_policy(MergeConfig(policy=lambda pending, roster: {})))
