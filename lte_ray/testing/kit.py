"""The conformance kit for merge policies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch

from lte_ray.config import MergeConfig
from lte_ray.merging.policies.trigger import ComposedPolicy
from lte_ray.merging.policy import MergePolicy
from lte_ray.merging.registry import make_policy
from lte_ray.testing.observed_policy import Violation
from lte_ray.testing.scenario import Scenario

SHOWN = 30
"""How many of the last events a failure shows."""


def check_policy(
    make: Callable[[], Any],
    *,
    when: Sequence[str] | None = None,
    heads: Iterable[int] = (1, 2, 5),
    seeds: Iterable[int] = range(8),
    events: int = 40,
) -> None:
    """Runs a policy through the engine in float64, with heads that contribute, fall behind, leave and send NaN at random.

    Requirements:

    - Each decision can be executed: it is about pending heads, with finite weights or a finite change in the base layout.
    - What is decided is what is merged: W_v - W_0 is the sum of all decisions, and merged contributions become references.
    - No contribution waits forever: if all live heads wait, the policy decides, or does so by a time that it gives.
    - The policy doesn't modify `pending`, nor a change that it has returned: merges are executed later.
    - The same events lead to the same decisions, bit for bit.
    - `state` and `load_state` cover all that the policy remembers: a policy resumed from a checkpoint decides as one that never
      stopped. A policy without them remembers nothing.

    Args:
        make: creates the policy: a class, or a function that returns a policy object, a function ``f(pending, roster)`` or a
            built-in name.
        when: the values of `MergeConfig.when` to test; by default all of them, or only the policy's own way if it has a
            `decide` method.
        heads: the numbers of heads to test.
        seeds: the seeds to test, one run each.
        events: the number of events in each run.

    Raises:
        AssertionError: a requirement is violated; names the policy and shows the events that led there.
        ConfigError: it isn't a policy.
    """
    decides_itself = not isinstance(_policy(make, "barrier"), ComposedPolicy)
    for trigger in when or (("barrier",) if decides_itself else ("barrier", "quorum", "arrival")):
        for num_heads in heads:
            for seed in seeds:
                _check(make, trigger, num_heads, seed, events)


def _policy(make: Callable[[], Any], when: str) -> MergePolicy:
    deadline = 1.5 if when == "quorum" else 0.0  # so that some merges happen by the clock
    return make_policy(MergeConfig(policy=make(), when=when, deadline=deadline))  # type: ignore[arg-type]  # a wrong `when` is a ConfigError


def _check(make: Callable[[], Any], when: str, num_heads: int, seed: int, events: int) -> None:
    policy = _policy(make, when)
    name = getattr(policy, "name", None) or type(policy).__name__
    setting = f"seed {seed}, {num_heads} heads, {events} events, when={when!r}"

    def run(policy: MergePolicy, resumed_at: int | None = None) -> Scenario:
        scene = Scenario(policy, lambda: _policy(make, when), num_heads, seed, resumed_at)
        try:
            scene.run(events)
        except Violation as violation:
            _fail(name, setting, str(violation), scene.trace, violation)
        return scene

    first, again = run(policy), run(_policy(make, when))
    if first.trace != again.trace or not torch.equal(first.base, again.base):
        _fail(name, setting, "the same events led to different decisions: " + _difference(first, again), again.trace)
    resumed = run(_policy(make, when), resumed_at=events // 2)
    if first.trace != resumed.trace or not torch.equal(first.base, resumed.base):
        what = (
            f"resumed from its state after event {events // 2}, it decided differently than without a break; state() must "
            "return all that it remembers, and load_state() must restore it: "
        )
        _fail(name, setting, what + _difference(first, resumed), resumed.trace)


def _difference(first: Scenario, other: Scenario) -> str:
    for one, two in zip(first.trace, other.trace, strict=False):
        if one != two:
            return f"first «{one}», then «{two}»"
    return "the merged weights differ"


def _fail(name: str, setting: str, what: str, trace: list[str], cause: Exception | None = None) -> NoReturn:
    events = "\n".join(f"  {line}" for line in trace[-SHOWN:])
    more = f" (the last {SHOWN} of {len(trace)})" if len(trace) > SHOWN else ""
    raise AssertionError(f"The merge policy {name} fails with {setting}: {what}\nEvents{more}:\n{events}") from cause
