"""Complete runs in one process: deterministic, and equal to plain training where they should be."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.data.partition import are_disjoint, density
from lte_ray.engine.head.head import Head
from lte_ray.engine.in_process import InProcessRun, run_in_process
from lte_ray.engine.prepare import load_base, merged_state_dict, prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError, PolicyError, WorkerError
from lte_ray.merging import Decision, Discard, Merge, Pending, Roster, Wait
from lte_ray.merging.flat_buffer import views
from tests.support.dense_reference import DenseHead
from tests.support.numerics import assert_near
from tests.support.tiny_worker import NaNLosses, Tiny, make_settings
from workers.regression import Regression


def run(worker: Tiny | None = None, **changes: object) -> InProcessRun:
    return run_in_process(worker or Tiny(), make_settings(**changes), torch.float64)  # type: ignore[arg-type]


def initial_base(**changes: object) -> torch.Tensor:
    return prepare(Tiny(), make_settings(**changes), torch.float64).base  # type: ignore[arg-type]


@pytest.mark.parametrize("reset", ["none", "B"])
def test_the_same_run_twice_is_bitwise_the_same(reset: str) -> None:
    """Bases, losses and counts of two equal runs agree in every bit, with dropout; another seed's don't."""
    first, second = (run(Tiny(dropout=0.3, optimizer="adamw"), reset=reset) for _ in range(2))
    assert torch.equal(first.base, second.base)
    assert [m.losses for m in first.merges] == [m.losses for m in second.merges]
    assert not torch.equal(first.base, run(Tiny(dropout=0.3, optimizer="adamw"), reset=reset, seed=4).base)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_head_that_merges_every_step_trains_as_if_it_never_merged(optimizer: str) -> None:
    """N = 1 without reset: merges move s B A between W~ and the base; the effective weights train as in one dense run."""
    worker = Tiny(optimizer=optimizer)
    merged = run(worker, heads=1, steps=15, merge_iter=1)
    settings = make_settings(heads=1, steps=15)
    dense = DenseHead(worker, Head(worker, settings, 0, dtype=torch.float64))
    dense.train(15)
    weights = [w + dense.product(name) for name, w in dense.w.items()]
    expected = torch.cat([w.flatten() for w in [*weights, *dense.p.values()]])
    assert len(merged.merges) == 15
    assert not torch.allclose(merged.base, initial_base(heads=1), atol=1e-2)
    # 15 merges round W at float64's 1e-16 each; Adam divides by roots that may be small, which magnifies it.
    assert_near(merged.base, expected, {"sgd": 1e-13, "adamw": 1e-11}[optimizer])


def test_merging_often_differs_from_merging_once() -> None:
    """With several heads it matters whether they merge after each step, or once at the end."""
    often, once = run(merge_iter=1), run(merge_iter=12)
    assert (len(often.merges), len(once.merges)) == (12, 1)
    assert not torch.allclose(often.base, once.base, atol=1e-6)


@pytest.mark.parametrize(("steps", "merge_iter"), [(7, 3), (2, 5), (6, 3)])
def test_steps_that_merge_iter_does_not_divide_are_all_trained_and_merged(steps: int, merge_iter: int) -> None:
    """The last round is shorter; every step of every head is in exactly one merge."""
    result = run(steps=steps, merge_iter=merge_iter)
    rounds = [min(merge_iter, steps - done) for done in range(0, steps, merge_iter)]
    assert [m.steps for m in result.merges] == [2 * taken for taken in rounds]
    assert [m.version for m in result.merges] == list(range(1, math.ceil(steps / merge_iter) + 1))
    assert [(h.step, h.done, h.version) for h in result.heads] == [(steps, True, len(rounds))] * 2
    assert sum(m.samples for m in result.merges) == sum(h.samples for h in result.heads)


class Counting:
    """Merges each head as it arrives, with weight 0, and counts."""

    merged = 0

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        if not pending:
            return Wait()
        self.merged += len(pending)
        return Merge({p.head: 0.0 for p in pending})


def test_a_policy_object_decides_merges() -> None:
    """The user's own object is called, not a copy, and its weights count: with weight 0 the base never moves."""
    policy = Counting()
    result = run(policy=policy)
    assert (policy.merged, len(result.merges)) == (8, 8)
    assert torch.equal(result.base, initial_base())


class FirstTwo:
    """Merges as soon as two heads wait, or all that are left."""

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        if len(pending) < min(2, len(roster.live)) or not pending:
            return Wait("for a second head")
        return Merge({p.head: 1 / roster.num_heads for p in pending})


def test_a_quorum_brings_every_step_of_every_head_into_the_base() -> None:
    """With three heads that merge in twos, all 12 steps of each are merged, and the next merges hold the rest."""
    result = run(heads=3, policy=FirstTwo())
    assert sum(m.steps for m in result.merges) == 3 * 12
    assert all(len(m.heads) <= 2 for m in result.merges)
    assert all(h.done for h in result.heads)


class Fickle:
    """Discards every second contribution of head 1."""

    def __init__(self) -> None:
        self.turn = 0

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        if not pending:
            return Wait()
        self.turn += pending[0].head == 1
        if pending[0].head == 1 and self.turn % 2:
            return Discard([1], "every second one")
        return Merge({pending[0].head: 0.5})


def test_what_was_discarded_is_part_of_the_next_merge() -> None:
    """Head 1's merges count the steps of the discarded rounds before them, so none is lost."""
    result = run(policy=Fickle())
    assert [m.steps for m in result.merges if m.heads == (0,)] == [3, 3, 3, 3]
    assert [m.steps for m in result.merges if m.heads == (1,)] == [6, 6]


@pytest.mark.parametrize("heads_per_actor", [1, 2])
def test_a_head_with_a_nan_continues_from_its_last_merge(heads_per_actor: int) -> None:
    """Its second round is dropped, with the optimizer's state; all other rounds are merged."""
    worker = NaNLosses(bad_batches=(4,), optimizer="adamw")
    result = run_in_process(worker, make_settings(), torch.float64, heads_per_actor=heads_per_actor)
    held = [(m.head_steps[1], m.positions[1].step, m.positions[1].batches) for m in result.merges if 1 in m.heads]
    assert held == [(3, 3, 3), (3, 9, 9), (3, 12, 12)]
    assert sum(m.head_steps.get(0, 0) for m in result.merges) == 12
    assert bool(result.base.isfinite().all())
    assert {int(each["step"]) for each in result.heads[1].optimizer.state.values()} == {6}
    assert result.coordinator.live == set()


@pytest.mark.parametrize("heads_per_actor", [1, 3])
def test_a_head_with_nans_in_every_round_leaves_and_others_take_its_data(heads_per_actor: int) -> None:
    """It leaves after the third; then each of the others' contributions counts a half, and no batch is left out."""
    result = run_in_process(NaNLosses(), make_settings(heads=3), torch.float64, heads_per_actor=heads_per_actor)
    assert [head.step for head in result.heads] == [12, 9, 12]
    assert [m.heads for m in result.merges] == [(0, 2)] * 4
    assert {weight for m in result.merges for weight in m.weights.values()} == {1 / 2}
    owned = [partition for n in (0, 2) for partition in result.coordinator.positions[n].lanes]
    assert (are_disjoint(owned), density(owned)) == (True, 1)


class Typed(Tiny):
    """Tiny in another floating-point type."""

    dtype = torch.float32

    def build_model(self) -> torch.nn.Module:
        return super().build_model().to(self.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_models_of_any_floating_type_are_merged_in_float32(dtype: torch.dtype) -> None:
    """Heads compute in the worker's own type; the base is float32, and after the last merge heads hold it exactly."""
    worker = Typed()
    worker.dtype = dtype
    result = run_in_process(worker, make_settings())
    assert result.base.dtype == torch.float32
    assert len(result.merges) == 4
    scale = dict(result.heads[0].model.named_parameters())["scale"]
    assert scale.dtype == dtype
    assert torch.equal(result.heads[0].converted.replicas()["scale"].float(), views(result.plan.base, result.base)["scale"])


@pytest.mark.parametrize("reset", ["none", "B"])
def test_the_regression_worker_learns(reset: str) -> None:
    """Two heads on a small network reduce the merged weights' validation loss to less than half."""
    worker = Regression(width=8, batch_size=16, samples=512, lr=1e-2)
    lte = LTEConfig(num_heads=2, lora_r=4, lora_alpha=8.0, reset=reset)  # type: ignore[arg-type]
    settings = Settings("test", lte, MergeConfig(merge_iter=10), TrainConfig(steps=120))
    initial = prepare(worker, settings)
    before = worker.evaluate(initial.model)["validation_loss"]
    result = run_in_process(worker, settings)
    load_base(initial.model, result.plan, result.base)
    assert worker.evaluate(initial.model)["validation_loss"] < 0.5 * before
    losses = [sum(m.losses.values()) for m in result.merges]
    assert losses[-1] < 0.5 * losses[0]


def test_merged_weights_load_into_the_unconverted_model() -> None:
    """merged_state_dict has the model's own names, tied weights under each, in its own type, with the base's values."""
    initial = prepare(Tiny(), make_settings(), torch.float64)
    result = run()
    state = merged_state_dict(initial.model, initial.plan, result.base)
    fresh = Tiny().build_model()
    fresh.load_state_dict(state, strict=True)
    assert all(value.dtype == torch.float64 for value in state.values())
    assert torch.equal(state["logits.weight"], state["embed.weight"])
    assert state["logits.weight"].data_ptr() != state["embed.weight"].data_ptr()
    found = torch.cat([dict(fresh.named_parameters())[e.name].detach().flatten() for e in result.plan.base.entries])
    assert torch.equal(found, result.base)


class Broken:
    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        raise RuntimeError("no idea")


def test_a_run_ends_with_the_errors_of_a_run_on_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad input is rejected before any head trains; a policy that raises ends the run."""
    with pytest.raises(PolicyError, match="Broken raised RuntimeError: no idea"):
        run(policy=Broken())
    with pytest.raises(ConfigError, match="--exclude 'nothing' matches no layer"):
        run(exclude=("nothing",))
    with pytest.raises(ConfigError, match=r"--policy is 'avrage'.*Did you mean average"):
        run(policy="avrage")
    monkeypatch.setattr(Tiny, "loss", None)
    with pytest.raises(WorkerError, match=r"it lacks loss\(\)"):
        run()


def test_prepare_rejects_a_worker_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """What build_model and train_batches raise, also for the last head only, is a WorkerError with the traceback."""
    monkeypatch.setattr(Tiny, "build_model", lambda self: 1 / 0)
    with pytest.raises(WorkerError, match=r"(?s)Tiny.build_model\(\) raised:.*ZeroDivisionError"):
        prepare(Tiny(), make_settings())
    monkeypatch.undo()
    read = Tiny.train_batches
    monkeypatch.setattr(Tiny, "train_batches", lambda self, shard: read(self, shard) if shard.head < 2 else 1 / 0)
    prepare(Tiny(), make_settings(heads=2))
    with pytest.raises(WorkerError, match=r"(?s)Tiny.train_batches\(\) raised, for head 2:.*ZeroDivisionError"):
        prepare(Tiny(), make_settings(heads=3))
    monkeypatch.undo()
    monkeypatch.setattr("tests.support.tiny_worker.SAMPLES", 3)
    with pytest.raises(WorkerError, match=r"(?s)raised, for head 0:.*3 samples can't fill a batch of 4; use more data"):
        prepare(Tiny(), make_settings())


def test_batch_statistics_are_merged_with_the_weights() -> None:
    """The merged running mean is the average of the heads' means, so that the evaluated model is usable."""

    class Normed(Regression):
        def build_model(self) -> nn.Module:
            return nn.Sequential(nn.BatchNorm1d(self.width, momentum=0.5), nn.Linear(self.width, self.width))

    result = run_in_process(Normed(), make_settings(heads=2))
    merged = views(result.plan.base, result.base)
    each = [dict(head.model.named_buffers())["0.running_mean"] for head in result.heads]
    assert torch.equal(each[0], each[1])  # all adopted the last merge
    assert torch.equal(merged["0.running_mean"], each[0])
    assert float(merged["0.running_mean"].abs().max()) > 0.01
