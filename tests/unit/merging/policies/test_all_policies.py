"""What all built-in merge policies have in common."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lte_ray.config import MergeConfig
from lte_ray.engine.in_process import run_in_process
from lte_ray.merging import POLICIES, Average, Try, make_policy
from lte_ray.merging.flat_buffer import views
from lte_ray.merging.policy_args import list_arguments
from lte_ray.testing import check_policy
from lte_ray.worker import build_model
from tests.support import LONG_RUN
from tests.support.numerics import assert_near
from tests.support.plans import make_contribution, random_flat
from tests.support.policies import (
    PLAN,
    change_from_decision,
    dense_change,
    dense_changes,
    make_coordinator,
    make_pending,
    make_roster,
)
from tests.support.tiny_worker import Tiny, make_settings

NEUTRAL: dict[str, dict[str, Any]] = {
    "average": {},
    "samples": {},
    "stale": {},
    "momentum": {"lr": 1.0, "momentum": 0.0},
    "nesterov": {"lr": 1.0, "momentum": 0.0},
    "delayed_nesterov": {"lr": 1.0, "momentum": 0.0},
    "schedule_free": {"lr": 1.0, "beta": 0.0},
    "median": {},
    "trimmed_mean": {},
    "clip": {},
    "krum": {},
    "ties": {"density": 1.0},
    "dare": {"drop": 0.0},
    "gated": {},
}
"""Arguments with which a policy does nothing but average where all contributions are equal; Adam has none."""


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(max_examples=10)
@given(
    st.sampled_from(["barrier", "quorum", "arrival"]),
    st.integers(1, 6),
    st.integers(0, 9999),
    st.integers(1, 60),
)
def test_every_built_in_policy_conforms(name: str, when: str, heads: int, seed: int, events: int) -> None:
    """The conformance kit passes: totals, determinism, resumption and liveness in runs of random events."""
    check_policy(POLICIES[name], when=[when], heads=[heads], seeds=[seed], events=events)


@pytest.mark.parametrize("inner", ["nesterov", "delayed_nesterov", "schedule_free", "adam", "stale", "clip"])
def test_gating_a_policy_that_remembers_conforms(inner: str) -> None:
    """Gated restores the inner policy's state after a merge that isn't kept, and saves it."""
    check_policy(lambda: POLICIES["gated"](policy=inner), seeds=range(6 if LONG_RUN else 3))


def test_every_policy_is_neutral_or_known_not_to_be() -> None:
    """The table above omits only Adam and the orthogonal step, which no arguments make the average."""
    assert set(POLICIES) - set(NEUTRAL) == {"adam", "orthogonal"}


@pytest.mark.parametrize("name", list(NEUTRAL))
@pytest.mark.parametrize(("num_heads", "contributing"), [(1, 1), (4, 4), (5, 3), (5, 1)])
def test_equal_contributions_merge_as_by_average(name: str, num_heads: int, contributing: int) -> None:
    """k of N equal changes D add k/N D with each policy: a value that replaces k contributions has their weight."""
    pending = make_pending(contributing, same=True)
    decision = POLICIES[name](**NEUTRAL[name]).merge(pending, make_roster(num_heads))
    merge = decision.merge if isinstance(decision, Try) else decision
    assert_near(
        change_from_decision(merge, pending), contributing / num_heads * dense_change(pending[0]), 1e-14
    )  # a few float64 sums


@pytest.mark.parametrize(
    ("name", "heads"), [(n, h) for n in NEUTRAL for h in (1, 2) if (n, h) not in {("ties", 2), ("clip", 2)}]
)
def test_one_or_two_contributions_merge_as_by_average(name: str, heads: int) -> None:
    """So few have no majority, so the robust policies average; TIES elects a sign among two, and Clip clips."""
    pending = make_pending(heads)
    decision = POLICIES[name](**NEUTRAL[name]).merge(pending, make_roster(4))
    merge = decision.merge if isinstance(decision, Try) else decision
    assert_near(change_from_decision(merge, pending), dense_changes(pending).sum(dim=0) / 4, 1e-14)  # a few float64 sums


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_the_order_of_arrival_leaves_no_trace_at_a_barrier(name: str) -> None:
    """Whichever head arrives last, the merged base is bitwise the same, in two rounds."""
    bases = []
    for order in itertools.permutations(range(3)):
        coordinator, _ = make_coordinator(make_policy(MergeConfig(policy=name)), heads=3)
        for sequence, head in itertools.product((1, 2), order):
            coordinator.receive(make_contribution(head, sequence), random_flat(PLAN.contribution.size, 10 * sequence + head))
            if coordinator.candidate is not None:
                coordinator.receive_evaluation({"loss": 1.0})
        assert coordinator.version == 2
        bases.append(coordinator.base)
    assert all(torch.equal(base, bases[0]) for base in bases)


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_policy_says_what_it_does_and_where_it_is_from(name: str) -> None:
    """Each argument is described, and so is the class; `help` is what `--help` shows."""
    assert POLICIES[name].__doc__
    for argument in list_arguments(POLICIES[name]).values():
        assert argument.help.endswith("."), argument.name


TRAINING: dict[str, dict[str, Any]] = {
    "nesterov": {"lr": 0.1},
    "delayed_nesterov": {"lr": 0.1},
    "adam": {"lr": 0.01, "eps": 0.01},
    "schedule_free": {"lr": 1.0},
}
"""Where defaults that are meant for more steps between merges overshoot or creep."""


FAMILIES = ("average", "gated", "median", "nesterov", "ties")
"""A policy of each family, which `make test` trains with; `make test-all` trains with all."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAMILIES else pytest.mark.slow) for name in sorted(POLICIES)]
)
def test_every_policy_trains(name: str) -> None:
    """Four heads, merged two at a time, bring the merged weights' loss from 1.8 below 0.2 in 120 local steps."""
    merge = MergeConfig(merge_iter=4, policy=name, policy_args=TRAINING.get(name), when="quorum")
    settings = dataclasses.replace(make_settings(heads=4, steps=120), merge=merge)
    worker = Tiny(optimizer="adamw")
    run = run_in_process(worker, settings, torch.float64)
    model = build_model(worker, settings.train.seed)
    with torch.no_grad():
        before = worker.evaluate(model)["loss"]
        for key, weight in views(run.plan.base, run.base).items():
            model.get_parameter(key).copy_(weight)
        after = worker.evaluate(model)["loss"]
    assert before > 1.8
    assert after < 0.2


def test_average_counts_each_contribution_once_however_many_there_are() -> None:
    """w = 1/N with the configured N, even if fewer heads are live or merge."""
    assert Average().merge(make_pending(2), make_roster(4)).weights == {0: 0.25, 1: 0.25}
