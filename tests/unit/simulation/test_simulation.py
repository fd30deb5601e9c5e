"""The simulation under a virtual clock: results in closed form, and training that equals the engine's."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.config.cluster_model import ClusterModel
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError, PolicyError
from lte_ray.layout import Adapted, Plan, Replica
from lte_ray.merging.policy import Decision, Pending, Roster, Wait
from lte_ray.simulation.api import simulate_time, simulate_training
from lte_ray.simulation.clock import Clock
from lte_ray.simulation.cost_model import CostModel, named_plan
from lte_ray.simulation.delivery import StalenessQueue
from lte_ray.simulation.network import Link
from lte_ray.simulation.record import KINDS, SimulationRecord
from lte_ray.transfer.codec import min_contribution_bytes
from tests.support.numerics import assert_near
from tests.support.tiny_worker import NaNLosses, Tiny, make_settings

FREE = ClusterModel(step_seconds=1.0, bandwidth=0, latency=0, message_seconds=0, merge_flops=0, merge_memory=0)
"""Nothing but steps takes time: one second each."""

PLAN = Plan((Adapted("w", (30, 20), 2, 1.0), Adapted("v", (20, 30), 2, 1.0)), (Replica("b", (30,)),))


def settings(heads: int, steps: int = 40, seed: int = 0, **merge: object) -> Settings:
    return Settings("virtual", LTEConfig(num_heads=heads), MergeConfig(**merge), TrainConfig(steps=steps, seed=seed))  # type: ignore[arg-type]


def timed(heads: int, cluster: ClusterModel, steps: int = 40, **merge: object) -> SimulationRecord:
    return simulate_time([PLAN], settings(heads, steps, **merge), cluster)


def test_a_barrier_costs_what_the_slowest_head_takes() -> None:
    """If only steps take time, heads of speeds 1, 1, 1, 4 train 1/4, 1/4, 1/4 and all of the time."""
    run = timed(4, dataclasses.replace(FREE, speeds=(1, 1, 1, 4)))
    assert run.seconds == 160
    assert [head.utilisation for head in run.heads] == [0.25, 0.25, 0.25, 1]
    assert [head.steps for head in run.heads] == [40] * 4
    assert [(m.at, m.contributions, m.max_lag) for m in run.merges] == [(40, 4, 0), (80, 4, 0), (120, 4, 0), (160, 4, 0)]


def test_rounds_follow_a_schedule() -> None:
    """In a run of 40 steps: every step in the first tenth, every 10 steps until a half, then every 20; also without waiting."""
    run = timed(2, dataclasses.replace(FREE, speeds=(1, 4)), merge_schedule="0:1 0.1:10 0.5:20")
    assert [m.steps // 2 for m in run.merges] == [1, 1, 1, 1, 10, 10, 20 - 4]
    shared = timed(2, FREE, merge_schedule="0:1 0.5:10", wait=False, when="arrival")
    assert {m.steps for m in shared.merges if m.version <= 30} == {1}
    assert max(m.steps for m in shared.merges) == 10


def test_heads_that_do_not_wait_train_all_the_time() -> None:
    """The same heads on arrival and without waiting take 160 steps together, each as fast as it can."""
    run = timed(4, dataclasses.replace(FREE, speeds=(1, 1, 1, 4)), wait=False, when="arrival")
    assert sum(head.steps for head in run.heads) == run.steps == 160
    assert min(head.utilisation for head in run.heads) == 1
    assert [head.steps for head in run.heads] == [49, 49, 49, 13]
    assert run.seconds == 52  # at 48 s the slow head began the last step of all
    assert run.max_lag <= 4


def test_the_same_budget_each_lets_the_slow_head_finish_alone() -> None:
    """With its own budget each head takes 40 steps: the fast ones leave after 40 seconds, the slow one after 160."""
    own = settings(4, wait=False, when="arrival")
    own = dataclasses.replace(own, train=dataclasses.replace(own.train, budget="each"))
    run = simulate_time([PLAN], own, dataclasses.replace(FREE, speeds=(1, 1, 1, 4)))
    assert [head.ended for head in run.heads] == [40, 40, 40, 160]
    assert run.versions == 16


def test_matched_speeds_contribute_together() -> None:
    """Once speeds are known, after the first round, fast heads take 4 times the steps and none waits."""
    run = timed(4, dataclasses.replace(FREE, speeds=(1, 1, 1, 4)), 400, match_speed=True)
    assert run.merges[0].at == 40
    assert {m.at - b.at for b, m in zip(run.merges[:-2], run.merges[1:-1], strict=True)} == {40}
    assert {m.steps for m in run.merges[1:-1]} == {130}
    assert run.utilisation > 0.9


def test_merge_every_gives_each_head_the_steps_of_that_time() -> None:
    """With 20 s between contributions a head of speed 4 takes 5 steps, one of speed 1 takes 20."""
    run = timed(2, dataclasses.replace(FREE, speeds=(1, 4)), 100, merge_every="20s")
    assert {m.steps for m in run.merges[1:-1]} == {25}


def test_one_contribution_and_answer_take_what_their_bytes_take() -> None:
    """One head: each round is 10 steps, the way up, the message, the merge, and the way down."""
    cluster = ClusterModel(
        step_seconds=0.5, bandwidth=1000, latency=0.25, message_seconds=0.125, merge_flops=1e5, merge_memory=2e5
    )
    run = timed(1, cluster, send_down="dense")
    sizes = CostModel([PLAN], MergeConfig(send_down="dense"))
    up, down = 4 * (4 * 50 + 30), 4 * (1200 + 30)
    merging = 2 * 1200 * 4 / 1e5 + 16 * (230 + 1230) / 2e5
    assert (sizes.contribution_bytes(0), sizes.update_bytes(0)) == (up, (down, 0))
    assert sizes.merge_seconds(cluster, 1) == pytest.approx(merging)
    assert (run.bytes_up, run.bytes_down) == (4 * up, 4 * down)
    send, wait, fetch = up / 1000 + 0.25, 0.125 + merging, down / 1000 + 0.25
    found = run.heads[0].seconds
    assert [found[kind] for kind in KINDS] == pytest.approx([20, 4 * send, 4 * wait, 4 * fetch, 0])
    assert run.seconds == pytest.approx(4 * (5 + send + wait + fetch))
    assert run.rows[0].spans[0].end == 5
    assert run.rows[1].name == "coordinator"
    assert [span.kind for span in run.rows[1].spans] == ["merge"] * 4


def test_factors_go_down_where_they_are_fewer_bytes() -> None:
    """Three heads of rank 2 get the others' factors, 100 values a layer, instead of 600; the replicas are dense."""
    assert CostModel([PLAN] * 3, MergeConfig()).update_bytes(2) == (4 * 30, 4 * 2 * 200)
    assert CostModel([PLAN] * 4, MergeConfig(transfer="bf16")).update_bytes(5) == (4 * 30, 2 * 5 * 200)
    assert CostModel([PLAN] * 30, MergeConfig()).update_bytes(29) == (4 * 1230, 0)


def test_heads_that_cannot_redo_merges_receive_the_base() -> None:
    """As in a run: a policy that computes with all contributions gives no weights to redo them with."""
    average, orthogonal = (timed(3, FREE, policy=policy).bytes_down for policy in ("average", "orthogonal"))
    merges = 4
    assert average == merges * 3 * 4 * (30 + 2 * 200)
    assert orthogonal == merges * 3 * 4 * 1230


@given(st.sampled_from(["fp32", "bf16", "int8"]), st.sampled_from([1.0, 0.3, 0.01]))
def test_a_contribution_has_the_bytes_of_the_codec(transfer: str, topk: float) -> None:
    """A simulated contribution is as large as a real one: the minimum, plus int8's scales."""
    merge = MergeConfig(transfer=transfer, replica_topk=topk)  # type: ignore[arg-type]
    plan = named_plan("gpt2-124m", 32, 64.0)
    least = min_contribution_bytes(plan, merge)
    assert least <= CostModel([plan, plan], merge).contribution_bytes(1) <= 1.01 * least


def test_shards_share_the_products_and_links_the_bytes() -> None:
    """Two shards merge a model of equal layers without large replicas in about half the time."""
    layers = tuple(Adapted(f"w{n}", (64, 64), 4, 1.0) for n in range(8))
    plan = Plan(layers, (Replica("b", (4,)),))
    one, two = (CostModel([plan] * 4, MergeConfig(shards=n)).merge_seconds(ClusterModel(), 4) for n in (1, 2))
    assert one / 2 <= two <= 0.52 * one


def test_a_link_transmits_one_message_after_another() -> None:
    """A message that is sent while the link is busy leaves after those before it."""
    link = Link(10)
    assert [link.transmit(0, 20), link.transmit(1, 10), link.transmit(9, 10)] == [2, 3, 10]
    assert (link.busy, link.bytes) == (4, 40)
    assert Link(0).transmit(5, 10**9) == 5


def test_the_clock_keeps_the_order_of_scheduling() -> None:
    """Actions of one time run in the order in which they were scheduled, also those scheduled meanwhile."""
    clock, seen = Clock(), []
    clock.schedule_at(2, seen.append, "c")
    clock.schedule_at(1, lambda: (seen.append("a"), clock.schedule_after(0, seen.append, "b")))
    clock.schedule_at(2, seen.append, "d")
    clock.run()
    assert (seen, clock.now, clock.events) == (["a", "b", "c", "d"], 2, 4)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=40), st.integers(0, 4))
def test_stale_heads_are_those_more_than_max_lag_behind(events: list[tuple[int, int]], most: int) -> None:
    """Compared with a search through all heads, for any order of adoptions and merges."""
    queue, at, version = StalenessQueue(most), dict.fromkeys(range(6), 0), 0
    for head in at:
        queue.record_adopted(head, 0)
    for head, merges in events:
        version += merges
        expected = sorted(h for h, v in at.items() if v is not None and version - v > most)
        assert sorted(queue.pop_stale(version)) == expected
        at.update(dict.fromkeys(expected))
        at[head] = version
        queue.record_adopted(head, version)


def test_a_head_too_far_behind_is_sent_the_newest_base() -> None:
    """With max_lag 2 the slow head adopts in mid-round, and no contribution is more than 3 versions behind."""
    cluster = dataclasses.replace(FREE, speeds=(1, 1, 1, 8))
    close, far = (timed(4, cluster, 200, wait=False, when="arrival", max_lag=lag) for lag in (2, 1000))
    assert close.max_lag <= 3
    assert far.max_lag > 10
    assert close.bytes_down > far.bytes_down
    assert close.steps == far.steps == 800


def test_a_busy_coordinator_limits_the_rate_of_versions() -> None:
    """Fifty heads on arrival, and half a second a message: two versions a second, and the coordinator is always busy."""
    cluster = dataclasses.replace(FREE, message_seconds=0.5)
    run = timed(50, cluster, wait=False, when="arrival", max_lag=1000)
    assert run.coordinator_busy > 0.8
    assert run.versions / run.seconds == pytest.approx(2, rel=0.2)


def test_faults_lose_only_what_was_not_contributed() -> None:
    """Heads die and come back: every head's steps are merged or lost, and lost steps are trained again."""
    cluster = ClusterModel(step_seconds=1.0, faults_per_hour=20, restart_seconds=30)
    for merge in ({}, {"wait": False, "when": "arrival"}, {"when": "quorum", "quorum": 2}):
        run = timed(4, cluster, 300, **merge)
        assert sum(head.deaths for head in run.heads) > 3
        assert run.lost_steps > 0
        assert run.steps == 4 * 300
        assert sum(head.steps for head in run.heads) == run.steps + run.lost_steps
        assert run.share("dead") > 0.02
        assert all(sum(h.seconds.values()) == pytest.approx(h.ended) for h in run.heads)


def test_stragglers_and_jitter_slow_a_barrier_more_than_arrival() -> None:
    """A barrier waits for the slowest of each round; heads that don't wait lose only their own slow rounds."""
    cluster = dataclasses.replace(FREE, jitter=0.3, straggler_rate=0.1, straggler_factor=5)
    barrier, free = timed(8, cluster, 200), timed(8, cluster, 200, wait=False, when="arrival", max_lag=100)
    assert barrier.utilisation < 0.6
    assert free.utilisation > 0.98
    assert free.seconds < 0.7 * barrier.seconds


def test_jitter_keeps_the_mean() -> None:
    """A lognormal step time of mean 1: 10,000 steps take 10,000 seconds, within four standard errors."""
    run = timed(1, dataclasses.replace(FREE, jitter=0.5), 10_000)
    error = math.sqrt(math.expm1(0.25) / 10_000)
    assert abs(run.seconds / 10_000 - 1) < 4 * error


def test_the_same_seed_gives_the_same_record_and_another_does_not() -> None:
    """The complete record, spans included."""
    cluster = ClusterModel(jitter=0.2, straggler_rate=0.1, faults_per_hour=100, restart_seconds=1)
    first, again, other = (simulate_time([PLAN], settings(3, seed=seed, wait=False), cluster).to_json() for seed in (1, 1, 2))
    assert json.dumps(first) == json.dumps(again) != json.dumps(other)


@given(
    st.integers(1, 5),
    st.sampled_from(["barrier", "quorum", "arrival"]),
    st.booleans(),
    st.sampled_from([0.0, 0.4]),
    st.sampled_from([0.0, 200.0]),
    st.integers(0, 5),
    st.integers(1, 33),
)
def test_every_step_is_merged_or_lost(
    heads: int, when: str, wait: bool, jitter: float, faults: float, max_lag: int, steps: int
) -> None:
    """For any settings all steps end in a merge, times add up, and no head waits forever."""
    cluster = ClusterModel(speeds=(1, 2, 3), jitter=jitter, faults_per_hour=faults, restart_seconds=1.0)
    run = timed(heads, cluster, steps, when=when, wait=wait, max_lag=max_lag, deadline=0.5 if when == "quorum" else 0)
    assert run.steps == heads * steps
    assert sum(h.steps for h in run.heads) == run.steps + run.lost_steps
    assert sum(run.lags.values()) == sum(m.contributions for m in run.merges) <= run.arrivals
    assert [m.version for m in run.merges] == list(range(1, run.versions + 1))
    for head in run.heads:
        assert sum(head.seconds.values()) == pytest.approx(head.ended, abs=1e-9)
    assert all(a.end <= b.start for row in run.rows for a, b in zip(row.spans, row.spans[1:], strict=False))


NESTEROV = {"lr": 1.2, "momentum": 0.5, "replica_lr": 0.8, "final_lr": 0.5, "warmup": 2}


@pytest.mark.parametrize(("reset", "policy"), [("none", "average"), ("B", "average"), ("none", "nesterov")])
def test_equal_heads_that_wait_are_the_barrier_bit_for_bit(reset: str, policy: str) -> None:
    """Training under the virtual clock equals `run_in_process`, which equals a barrier run on Ray."""
    same = make_settings(heads=3, reset=reset)
    arguments = NESTEROV if policy == "nesterov" else None
    same = dataclasses.replace(same, merge=dataclasses.replace(same.merge, policy=policy, policy_args=arguments))
    run, reference = simulate_training(Tiny(), same, ClusterModel(), torch.float64), run_in_process(Tiny(), same, torch.float64)
    assert torch.equal(run.base, reference.base)
    assert [m.loss for m in run.record.merges] == [sum(m.losses.values()) / 3 for m in reference.merges]
    assert run.record.evaluation["loss"] < Tiny().evaluate(prepare(Tiny(), same).model)["loss"]


def test_a_schedule_gives_the_same_rounds_without_a_clock() -> None:
    """`run_in_process` merges after the same steps, with the same result."""
    same = make_settings(heads=2, steps=12)
    same = dataclasses.replace(same, merge=dataclasses.replace(same.merge, merge_schedule="0:1 0.25:4 0.9:1"))
    run, reference = simulate_training(Tiny(), same, ClusterModel(), torch.float64), run_in_process(Tiny(), same, torch.float64)
    assert [m.steps // 2 for m in reference.merges] == [1, 1, 1, 4, 4, 1]
    assert torch.equal(run.base, reference.base)


def test_one_head_that_does_not_wait_equals_the_barrier_if_nothing_takes_time() -> None:
    """Its answer arrives before its next step."""
    s = make_settings(heads=1)
    free = dataclasses.replace(s, merge=dataclasses.replace(s.merge, when="arrival", wait=False))
    run = simulate_training(Tiny(), free, FREE, torch.float64)
    assert torch.equal(run.base, run_in_process(Tiny(), s, torch.float64).base)


def test_a_head_with_a_nan_continues_as_in_the_barrier() -> None:
    """One of its rounds is dropped; all else is as in `run_in_process`, bit for bit."""
    worker, same = NaNLosses(bad_batches=(4,)), make_settings()
    run, reference = simulate_training(worker, same, FREE, torch.float64), run_in_process(worker, same, torch.float64)
    assert [head.refused for head in run.record.heads] == [0, 1]
    assert torch.equal(run.base, reference.base)


@pytest.mark.parametrize("wait", [True, False])
def test_a_head_that_is_quarantined_leaves(wait: bool) -> None:
    """Its third contribution is its last; if heads share their steps, others take those that it hasn't begun."""
    made = dataclasses.replace(make_settings(heads=3), merge=MergeConfig(3, wait=wait))
    run = simulate_training(NaNLosses(), made, FREE, torch.float64).record
    assert [(head.contributions, head.refused) for head in run.heads][1] == (3, 3)
    assert [head.refused for head in run.heads] == [0, 3, 0]
    assert sum(merge.steps for merge in run.merges) == (24 if wait else 36 - run.heads[1].steps)


def test_asynchronous_training_loses_no_step_and_learns() -> None:
    """Speeds 1, 1, 4 with steps in flight: all samples are merged, and the merged weights are better than the first."""
    s = make_settings(heads=3, steps=60)
    merge = dataclasses.replace(s.merge, when="arrival", wait=False)
    run = simulate_training(Tiny(), dataclasses.replace(s, merge=merge), ClusterModel(speeds=(1, 1, 4)), torch.float64)
    assert run.record.steps == 180
    assert run.record.samples == 180 * 4
    assert run.record.max_lag > 0
    assert run.record.evaluation["loss"] < Tiny().evaluate(prepare(Tiny(), s).model)["loss"]


def test_a_run_with_faults_trains_to_its_end() -> None:
    """Heads restart from the base with B = 0, and nothing is counted twice."""
    s = make_settings(heads=2, steps=60)
    cluster = ClusterModel(step_seconds=1.0, faults_per_hour=150, restart_seconds=2)
    run = simulate_training(Tiny(), s, cluster, torch.float64)
    assert run.record.lost_steps > 0
    assert run.record.steps == 120
    assert run.record.evaluation["loss"] < Tiny().evaluate(prepare(Tiny(), s).model)["loss"]


def test_int8_contributions_are_rounded() -> None:
    """The base differs little from fp32's: what rounding leaves out is part of the next contribution."""
    s = make_settings(heads=2)
    coarse = dataclasses.replace(s, merge=dataclasses.replace(s.merge, transfer="int8"))
    exact, rounded = run_in_process(Tiny(), s, torch.float64), run_in_process(Tiny(), coarse, torch.float64)
    assert torch.equal(simulate_training(Tiny(), coarse, ClusterModel(), torch.float64).base, rounded.base)
    assert not torch.equal(exact.base, rounded.base)
    assert_near(rounded.base, exact.base, 1e-2)


class Patient:
    """Asks to be called again, forever."""

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        return Wait("for better times", until=roster.now + 1.0 if pending else None)


class Sulking:
    """Waits as long as it is allowed to."""

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        return Wait("for nothing")


@pytest.mark.parametrize(("policy", "message"), [(Patient(), "Patient waits for better times"), (Sulking(), "Sulking waits")])
def test_a_policy_that_never_decides_is_named(policy: object, message: str) -> None:
    """An error, instead of a simulation that never ends."""
    with pytest.raises(PolicyError, match=message):
        timed(2, FREE, policy=policy)


def test_a_policy_that_evaluates_needs_a_model() -> None:
    """Loss-gated merging can't decide without losses; with a model it can."""
    with pytest.raises(PolicyError, match="evaluates what it merges"):
        timed(2, FREE, policy="gated")
    s = make_settings(policy="gated", steps=30)
    run = simulate_training(Tiny(), s, dataclasses.replace(FREE, evaluate_seconds=7.0), torch.float64)
    assert run.record.versions > 0
    assert run.record.seconds >= 30 + 7 * run.record.versions


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"step_seconds": 0}, "--step-seconds is 0"),
        ({"speeds": (1, -1)}, r"--speeds \[1, -1\], but they must be above 0"),
        ({"latency": -1}, "--latency is -1, but it must be at least 0"),
        ({"straggler_rate": 1.5}, "--straggler-rate is 1.5, but it is a probability"),
    ],
)
def test_an_impossible_cluster_is_refused(values: dict[str, object], message: str) -> None:
    """An error for each setting out of range."""
    with pytest.raises(ConfigError, match=message):
        ClusterModel(**values)  # type: ignore[arg-type]


def test_a_thousand_heads_are_soon_simulated() -> None:
    """A barrier of 1,000 heads takes few events, and each contribution is decided once."""
    run = simulate_time([named_plan("gpt2-124m", 32, 64.0)], settings(1000, 20), ClusterModel())
    assert (run.versions, run.arrivals, len(run.rows)) == (2, 2000, 17)
    assert run.events < 20_000
