"""Heads that never merge: N independent adapters on one base that stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lte_ray.config import FailureConfig, LTEConfig, MergeConfig, TrainConfig
from lte_ray.config.independent import check_failures
from lte_ray.engine.coordinator.broadcast_log import MAX_DELTAS, BroadcastLog
from lte_ray.engine.coordinator.validation import OutlierFilter
from lte_ray.engine.default_policy import choose_policy
from lte_ray.engine.head.base_replica import BaseReplica
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.snapshot import rejoin, restore
from lte_ray.engine.in_process import evaluate_base, run_in_process
from lte_ray.engine.independent import head_weights
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError
from lte_ray.messages import CoordinatorReply, MergeDelta
from lte_ray.transfer.codec import Codec
from lte_ray.transfer.groups import make_groups
from tests.support.dense_reference import DenseHead
from tests.support.head_states import head_state, through_file
from tests.support.numerics import assert_near
from tests.support.tiny_worker import NaNLosses, Tiny, make_settings
from workers.regression import Regression

HEADS = 3


def never(steps: int = 12, *, lte: Mapping[str, Any] | None = None, **merge: Any) -> Settings:
    """Settings of three independent adapters, which contribute every 3 steps."""
    given = make_settings(heads=HEADS, steps=steps)
    merge = {"merge_iter": 3, "never_merge": True} | merge
    return replace(given, lte=replace(given.lte, others="frozen", **lte or {}), merge=MergeConfig(**merge))


def factors(head: Head) -> dict[str, Tensor]:
    return {name: factor.detach().clone() for name, factor in head.state.factors.items()}


def lone(worker: Tiny, settings: Settings, number: int, steps: int) -> Head:
    """A head that trains alone and contributes to nobody."""
    initial = prepare(worker, settings, torch.float64)
    head = Head(worker, initial.complete(settings), number, dtype=torch.float64)
    head.start(0, initial.base)
    head.train(steps)
    return head


def assert_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("when", ["barrier", "quorum", "arrival"])
@pytest.mark.parametrize("transfer", ["fp32", "int8"])
def test_each_head_trains_as_if_it_were_alone(when: str, transfer: str) -> None:
    """Bit for bit, with AdamW and dropout, whenever versions are made and however contributions travel."""
    worker, settings = Tiny(dropout=0.3, optimizer="adamw"), never(when=when, transfer=transfer)
    done = run_in_process(worker, settings, torch.float64)
    for head in done.heads:
        assert head.finished
        assert_equal(factors(head), factors(lone(worker, settings, head.number, 12)))


def test_each_head_trains_as_the_dense_formula_says() -> None:
    """W_0 + s B A with W_0 and all else frozen, computed without adapters."""
    worker, settings = Tiny(), never()
    for head in run_in_process(worker, settings, torch.float64).heads:
        dense = DenseHead(worker, Head(worker, settings, head.number, dtype=torch.float64))
        dense.train(12)
        for spec in head.plan.adapted:
            trained = spec.scaling * head.state.factors[spec.b_name] @ head.state.factors[spec.a_name]
            assert_near(trained, dense.product(spec.name), 1e-12)


@pytest.mark.parametrize(("stack", "tolerance"), [("never", 0.0), ("always", 1e-12)])
def test_heads_of_one_process_share_the_base_and_train_alone(stack: str, tolerance: float) -> None:
    """In turns bit for bit; as one batch up to rounding."""
    worker, settings = Tiny(), never()
    done = run_in_process(worker, settings, torch.float64, heads_per_actor=HEADS, stack_heads=stack)
    for head in done.heads:
        expected = factors(lone(worker, settings, head.number, 12))
        for name, factor in factors(head).items():
            assert_near(factor, expected[name], tolerance)


def test_a_quantized_base_stays_as_it_was_quantized() -> None:
    """int8 main weights: each head still trains as if it were alone."""
    worker, settings = Regression(width=8), never(lte={"base_dtype": "int8"})
    done = run_in_process(worker, settings)
    other = run_in_process(worker, replace(settings, merge=replace(settings.merge, merge_iter=12)))
    for head, same in zip(done.heads, other.heads, strict=True):
        assert_equal(factors(head), factors(same))


def test_the_base_stays_and_versions_hold_what_each_head_contributed() -> None:
    """There is a version for each round, with each head's loss, and no weights by which anything was merged."""
    worker, settings = Tiny(), never()
    done = run_in_process(worker, settings, torch.float64)
    assert torch.equal(done.base, prepare(worker, settings, torch.float64).base)
    assert [(m.version, m.heads, m.weights, sorted(m.losses)) for m in done.merges] == [
        (version, (0, 1, 2), {}, [0, 1, 2]) for version in range(1, 5)
    ]
    for head in done.heads:
        assert torch.equal(done.coordinator.reference(head.number), head.state.gather_contribution())  # type: ignore[arg-type]


def test_each_head_is_evaluated_and_the_mean_is_the_run_s_figure() -> None:
    """`loss` is the mean of `head_0_loss` ..., each of W_0 + s B A of what the head contributed last."""
    worker, settings, seen = Tiny(), never(steps=6), []
    done = run_in_process(worker, settings, torch.float64, on_merge=lambda record, evaluate: seen.append(evaluate()))
    initial = prepare(worker, settings, torch.float64)
    expected = [
        evaluate_base(worker, initial, head_weights(head.plan, initial.base, head.state.reference))["loss"]
        for head in done.heads
    ]
    assert seen[-1] == {"loss": sum(expected) / 3} | {f"head_{n}_loss": loss for n, loss in enumerate(expected)}
    assert len(set(expected)) == 3


def test_before_the_first_contribution_all_heads_are_the_base() -> None:
    """With --when arrival, the first version's figures of the other heads are those of W_0."""
    worker, settings, seen = Tiny(), never(steps=3, when="arrival"), []
    run_in_process(worker, settings, torch.float64, on_merge=lambda record, evaluate: seen.append(evaluate()))
    initial = prepare(worker, settings, torch.float64)
    untrained = evaluate_base(worker, initial, initial.base)["loss"]
    assert [seen[0][f"head_{n}_loss"] == untrained for n in range(3)] == [False, True, True]


# -- resuming ----------------------------------------------------------------------------------------------------------


def started(worker: Tiny, settings: Settings, incarnation: int = 0) -> tuple[Head, Tensor]:
    initial = prepare(worker, settings, torch.float64)
    return Head(worker, initial.complete(settings), 1, dtype=torch.float64, incarnation=incarnation), initial.base


def test_a_resumed_head_continues_exactly() -> None:
    """From a checkpoint's state, through its formats; its reference isn't subtracted from the base."""
    worker = Tiny(dropout=0.3, optimizer="adamw")
    half = run_in_process(worker, never(steps=6), torch.float64)
    head, base = started(worker, never())
    restore(head, through_file(head_state(half.heads[1])), base)
    head.train(6)
    assert_equal(factors(head), factors(lone(worker, never(), 1, 12)))


def test_a_head_that_died_loses_nothing_that_it_had_contributed() -> None:
    """It starts from B A = B' A' on W_0, with its optimizer's state and the data that follow."""
    worker = Tiny(optimizer="adamw")
    half = run_in_process(worker, never(steps=6), torch.float64)
    head, base = started(worker, never(), incarnation=1)
    coordinator = half.coordinator
    saved = through_file(head_state(half.heads[1]))
    assert rejoin(head, coordinator.positions[1], coordinator.reference(1), coordinator.version, base, saved) == ""
    assert_equal(factors(head), factors(half.heads[1]))
    head.train(6)
    assert_equal(factors(head), factors(lone(worker, never(), 1, 12)))


def test_a_head_that_leaves_keeps_its_adapter_and_its_data() -> None:
    """Its last contribution stays, and no other head gets its batches."""
    settings = replace(never(), merge=MergeConfig(policy="average", never_merge=True))
    done = run_in_process(Tiny(), settings, torch.float64)
    coordinator, kept = done.coordinator, done.coordinator.reference(0)
    assert kept is not None
    before = coordinator.assignment_state()
    coordinator.drop(0)
    assert coordinator.reference(0) is kept
    assert coordinator.assignment_state() == before
    assert coordinator.members == {0, 1, 2}
    assert coordinator.live == set()


def test_a_head_whose_loss_is_nan_ends_and_the_others_go_on() -> None:
    """It is refused three times and leaves, with what it contributed before; the others train on, with their data."""
    worker, settings = NaNLosses(bad_batches=tuple(range(6, 99))), never(steps=24)
    done = run_in_process(worker, settings, torch.float64)
    bad = done.coordinator.reference(1)
    assert bad is not None
    assert torch.isfinite(bad).all()
    assert done.coordinator.positions[1].step == 6
    for number in (0, 2):
        assert done.heads[number].finished
        assert_equal(factors(done.heads[number]), factors(lone(Tiny(), settings, number, 24)))


def test_heads_are_no_example_for_each_other() -> None:
    """No contribution is refused for a norm that is unusual for other heads'."""
    for never_merge in (False, True):
        outliers = OutlierFilter(MergeConfig(never_merge=never_merge))
        for _ in range(64):
            outliers.record_merge(0, 1.0, 1)
        assert bool(outliers.check(1, 1e6, 1)) is not never_merge


# -- what is sent ------------------------------------------------------------------------------------------------------


def test_heads_receive_nothing() -> None:
    """A process follows any number of versions without fetching anything, and its base stays equal bit for bit."""
    settings = never()
    initial = prepare(Tiny(), settings)
    groups = make_groups(initial.plans, settings.merge)
    assert [group.by_factors for group in groups] == [True]
    codecs = [Codec(plan, groups, settings.merge) for plan in initial.plans]
    base = initial.base.float()
    replica = BaseReplica(codecs, "none", fetch=lambda handle: handle)
    replica.acquire(CoordinatorReply(None, 0, {0: base}))
    replica.release()
    fetched = replica.bytes_fetched
    log = BroadcastLog(groups, [base.nbytes], [codec.buffer_sizes for codec in codecs], 0)
    for version in range(1, 6):
        log.append(MergeDelta(version, {}, {}))
    assert log.bytes_down((0, 1, 2), 3) == 0
    deltas = log.deltas_since(0)
    assert deltas is not None
    followed = replica.acquire(CoordinatorReply(None, 5, {}, deltas))
    replica.release()
    assert followed is not None
    assert torch.equal(followed, base)
    assert replica.bytes_fetched == fetched


def test_versions_that_change_nothing_are_not_kept_forever() -> None:
    """Of many, a process that is further behind gets the base."""
    settings = never()
    groups = make_groups(prepare(Tiny(), settings).plans, settings.merge)
    log = BroadcastLog(groups, [1], [[1]] * HEADS, 0)
    for version in range(1, MAX_DELTAS + 11):
        log.append(MergeDelta(version, {}, {}))
    assert log.deltas_since(5) is None
    assert len(log.deltas_since(10) or ()) == MAX_DELTAS


# -- bad settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lte", "merge", "train", "given"),
    [
        ({"reset": "B"}, {}, {}, "--reset B contradict each other: B is reset at a merge"),
        ({"full_rank": True}, {}, {}, "--full-rank contradict each other: heads train no adapters then"),
        ({}, {"policy": "nesterov"}, {}, "--policy nesterov contradict each other: there is nothing to decide about"),
        ({}, {"send_down": "bf16"}, {}, "--send-down bf16 contradict each other: heads receive no weights"),
        ({}, {"shards": 2}, {}, "--shards 2 contradict each other: shards share the merging"),
        ({}, {"rollback_z": 4.0}, {}, "--rollback-z 4 contradict each other: one head's loss would set back all heads"),
        ({}, {}, {"ema": 0.99}, "--ema 0.99 contradict each other: the base doesn't move"),
        ({}, {}, {"baseline": True}, "--baseline contradict each other: ordinary training has no heads"),
        (
            {},
            {},
            {"budget": "shared"},
            "--budget shared contradict each other: each head trains its own adapter for all --steps",
        ),
    ],
)
def test_settings_of_what_heads_share_are_refused(
    lte: dict[str, Any], merge: dict[str, Any], train: dict[str, Any], given: str
) -> None:
    """One sentence names both flags and says why."""
    with pytest.raises(ConfigError) as raised:
        Settings("r", LTEConfig(**lte), MergeConfig(never_merge=True, **merge), TrainConfig(**train))
    assert str(raised.value) == f"--never-merge and {given}. Leave one of them out."


@pytest.mark.parametrize(
    ("failure", "given"),
    [
        ({"exhausted": "drop"}, "--exhausted drop contradict each other: the data of a lost head would go into other adapters"),
        ({"rejoin": "fresh"}, "--rejoin fresh contradict each other: a restarted head would lose its adapter"),
        ({"max_heads": 4}, "--max-heads 4 contradict each other: a new head would take the data of others"),
    ],
)
def test_reactions_to_failures_that_mix_adapters_are_refused(failure: dict[str, Any], given: str) -> None:
    """Those that give data to other heads, or drop factors."""
    with pytest.raises(ConfigError) as raised:
        check_failures(FailureConfig(**failure), 3)
    assert str(raised.value) == f"--never-merge and {given}. Leave one of them out."
    check_failures(FailureConfig(max_heads=3), 3)


def test_what_trains_without_lora_is_refused() -> None:
    """An adapter couldn't hold it; the first names are given."""
    settings = never()
    with pytest.raises(
        ConfigError, match=r"but scale, embed\.weight, up\.bias, \.\.\. would train without LoRA\. Add --others"
    ):
        prepare(Tiny(), replace(settings, lte=replace(settings.lte, others="replica")))
    with pytest.raises(ConfigError, match=r"but up\.weight, up\.bias would train without LoRA"):
        prepare(Tiny(), replace(settings, lte=replace(settings.lte, exclude=("up",))))


def test_running_statistics_are_refused() -> None:
    """Merges would average them; they belong to no adapter."""

    class Normed(Tiny):
        def build_model(self) -> Any:
            model = super().build_model()
            model.norm = torch.nn.BatchNorm1d(8).double()
            return model

    with pytest.raises(ConfigError, match=r"changes the buffers norm\.running_mean, norm\.running_var, .*use another norm"):
        prepare(Normed(), never())


def test_the_policy_is_the_average_for_any_optimizer() -> None:
    """LoRA-Muon's heads, too: the policy only says when there is a version."""
    settings = never()
    assert choose_policy(settings, prepare(Tiny(optimizer="lora-muon"), settings)).policy == "average"
