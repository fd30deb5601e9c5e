"""A head that continues from its snapshot and the base trains, bit for bit, as the head that was never stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lte_ray.engine.head.head import Head
from lte_ray.engine.head.snapshot import SavedState, StateMissed, rejoin, restore, snapshot
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import StorageError
from lte_ray.messages import CheckpointRequest, Contribution, ContributionResult
from lte_ray.transfer.codec import Codec
from lte_ray.transfer.groups import make_groups
from tests.support.head_states import through_file
from tests.support.tiny_worker import Tiny, make_settings


@dataclass
class Low(Tiny):
    """Tiny with all its parameters in another type; its loss in float32."""

    dtype: str = "float32"

    def build_model(self) -> nn.Module:
        return super().build_model().to(getattr(torch, self.dtype))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        words, following = batch
        return nn.functional.cross_entropy(model(words).float(), following)


CASES: dict[str, tuple[Callable[[], Tiny], dict[str, Any]]] = {
    "momentum, float64": (Tiny, {}),
    "dropout, AdamW": (lambda: Tiny(dropout=0.5, optimizer="adamw"), {}),
    "float32": (lambda: Low(optimizer="adamw"), {}),
    "bfloat16": (lambda: Low(dtype="bfloat16"), {}),
    "int8": (lambda: Low(optimizer="adamw"), {"transfer": "int8"}),
    "int8, few replicas": (Low, {"transfer": "int8", "replica_topk": 0.25}),
    "bfloat16, int8": (lambda: Low(dtype="bfloat16", dropout=0.5), {"transfer": "int8"}),
}


@dataclass
class Run:
    """One head, the bases that it may adopt, and the transfer format that it uses."""

    worker: Tiny
    settings: Settings
    merging: torch.dtype

    @classmethod
    def of(cls, case: str, reset: str = "none") -> Run:
        make, merge = CASES[case]
        settings = make_settings(steps=90, reset=reset)  # an epoch is 12 batches of each of two heads
        return cls(make(), replace(settings, merge=replace(settings.merge, **merge)), _merging(case))

    def head(self, incarnation: int = 0) -> Head:
        return Head(self.worker, self.settings, 1, dtype=self.merging, incarnation=incarnation)

    def base(self, version: int) -> Tensor:
        """Version 0, and later ones that low precision can't represent."""
        base = prepare(self.worker, self.settings, self.merging).base
        noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(version), dtype=torch.float64)
        return base if version == 0 else base + (0.05 * noise).to(self.merging)

    def contribute(self, head: Head) -> Contribution:
        """The contribution, with what receivers decode as its buffer."""
        contribution = head.contribute()
        if self.merging == torch.float32:
            head.encode(contribution, Codec(head.plan, make_groups([head.plan], self.settings.merge), self.settings.merge))
        return replace(contribution, buffer=head.state.pending.clone())


def _merging(case: str) -> torch.dtype:
    return torch.float64 if case in ("momentum, float64", "dropout, AdamW") else torch.float32


def started(run: Run) -> Head:
    head = run.head()
    head.start(0, run.base(0))
    return head


def settle(head: Head, accepted: bool, version: int, base: Tensor | None) -> None:
    head.adopt(ContributionResult(head.number, head.sequence, accepted, version, "" if accepted else "a test"), version, base)


def restored(run: Run, state: SavedState, version: int) -> Head:
    """Another process's head, which trained something else before it was restored."""
    head = run.head()
    restore(head, through_file(state), run.base(version))
    return head


def everything(head: Head) -> dict[str, Tensor]:
    """All parameters and buffers of the head's model, main weights included."""
    return {name: t.detach().clone() for name, t in (*head.model.named_parameters(), *head.model.named_buffers())}


def assert_continue_alike(run: Run, one: Head, other: Head, version: int) -> None:
    """In three more rounds with merges, contributions, weights, losses and data are the same bits."""
    for number in range(version + 1, version + 4):
        assert one.batch_stream.partitions == other.batch_stream.partitions
        assert one.batch_stream.batches_taken == other.batch_stream.batches_taken
        for head in (one, other):
            head.train(2)
        mine, others = run.contribute(one), run.contribute(other)
        assert torch.equal(mine.buffer, others.buffer)
        numbers = {"incarnation": 0, "sequence": 0, "seconds": 0.0, "stall": 0.0, "base_error": 0.0}
        assert replace(mine, **numbers) == replace(others, **numbers)
        for head in (one, other):
            head.train(0 if run.settings.lte.reset == "B" else 1)
            settle(head, True, number, run.base(number))
        left, right = everything(one), everything(other)
        assert left.keys() == right.keys()
        assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.sweep
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_a_snapshot_between_two_merges(case: str, extra: int) -> None:
    """Nothing outstanding, in mid-round or right after a merge: the head continues from version 2 as it would have."""
    run = Run.of(case)
    head = started(run)
    for version in (1, 2):
        head.train(3)
        run.contribute(head)
        head.train(extra)  # part of the next contribution
        settle(head, True, version, run.base(version))
    head.train(extra)
    state = snapshot(head, CheckpointRequest(2, {0: 9, 1: 2}))
    assert_continue_alike(run, head, restored(run, state, 2), 2)


def with_pending(case: str, extra: int) -> tuple[Run, Head, Contribution]:
    """A head whose second contribution has no answer, and that has trained `extra` steps since."""
    run = Run.of(case)
    head = started(run)
    head.train(3)
    run.contribute(head)
    settle(head, True, 1, run.base(1))
    head.train(3)
    sent = run.contribute(head)
    head.train(extra)
    return run, head, sent


@pytest.mark.sweep
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("extra", [0, 1, 4])
def test_a_snapshot_of_a_version_that_holds_the_pending_contribution(case: str, extra: int) -> None:
    """The head doesn't know that version 3 holds its contribution: only what it trained since is in its next."""
    run, head, sent = with_pending(case, extra)
    state = snapshot(head, CheckpointRequest(3, {1: 2}))
    settle(head, True, 3, run.base(3))
    other = restored(run, state, 3)
    assert (other.sequence, other.state.merged.step, other.step) == (2, sent.step, sent.step + extra)
    assert_continue_alike(run, head, other, 3)


@pytest.mark.sweep
@pytest.mark.parametrize("case", CASES)
def test_a_head_that_moves_goes_on_exactly(case: str) -> None:
    """It has contributed all that it has trained, and saves its state before the result comes; its next process takes over."""
    run, head, _ = with_pending(case, extra=0)
    state = snapshot(head, CheckpointRequest(1, {1: 2}))
    settle(head, True, 3, run.base(3))
    other = run.head(incarnation=1)
    assert rejoin(other, head.state.merged, head.state.reference, 3, run.base(3), through_file(state)) == ""
    assert (other.sequence, other.step) == (2, head.step)
    assert_continue_alike(run, head, other, 3)


def test_a_state_of_another_incarnation_is_not_taken_as_this_position() -> None:
    """Its numbers may be the same, but after a rollback its head has trained something else: its generators don't go on."""
    run, head, _ = with_pending("dropout, AdamW", extra=0)
    state = through_file(snapshot(head, CheckpointRequest(1, {1: 2})))
    settle(head, True, 3, run.base(3))
    same, foreign = run.head(incarnation=1), run.head(incarnation=1)
    rejoin(same, head.state.merged, head.state.reference, 3, run.base(3), state)
    rejoin(foreign, replace(head.state.merged, incarnation=7), head.state.reference, 3, run.base(3), state)
    draws = []
    for each in (head, same, foreign):
        with each.rng.swapped_in():
            draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.sweep
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("extra", [0, 1, 4])
def test_a_snapshot_of_a_version_that_lacks_the_pending_contribution(case: str, extra: int) -> None:
    """All since the last merged contribution is in the next one, as if the pending one were refused."""
    run, head, _ = with_pending(case, extra)
    state = snapshot(head, CheckpointRequest(3, {1: 1}))
    settle(head, False, 3, run.base(3))
    other = restored(run, state, 3)
    assert (other.sequence, other.state.merged.step, other.step) == (1, 3, 6 + extra)
    assert_continue_alike(run, head, other, 3)


@pytest.mark.sweep
@pytest.mark.parametrize("case", ["momentum, float64", "float32", "bfloat16", "int8"])
@pytest.mark.parametrize("outstanding", [False, True])
def test_a_snapshot_with_reset(case: str, outstanding: bool) -> None:
    """B is zero after each merge, and in the snapshot of a head that waits for one."""
    run = Run.of(case, reset="B")
    head = started(run)
    head.train(3)
    run.contribute(head)
    if not outstanding:
        settle(head, True, 1, run.base(1))
        head.train(2)
    state = snapshot(head, CheckpointRequest(1, {1: 1}))
    assert "reference" not in state[0]
    if outstanding:
        settle(head, True, 1, run.base(1))
    assert_continue_alike(run, head, restored(run, state, 1), 1)


def test_a_snapshot_of_a_head_that_was_never_merged() -> None:
    """Version 2 holds nothing of the head yet, which has trained on version 0."""
    run = Run.of("bfloat16")
    head = started(run)
    head.train(2)
    state = snapshot(head, CheckpointRequest(2, {1: 0}))
    head.adopt(None, 2, run.base(2))
    other = restored(run, state, 2)
    assert other.state.reference is None
    assert_continue_alike(run, head, other, 2)


@given(
    case=st.sampled_from(["momentum, float64", "bfloat16, int8"]),
    way=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.booleans(), st.booleans()), max_size=4),
    last=st.tuples(st.integers(0, 3), st.booleans(), st.booleans(), st.integers(0, 3)),
)
def test_a_snapshot_anywhere(case: str, way: list[tuple[int, int, bool, bool]], last: tuple[int, bool, bool, int]) -> None:
    """After any rounds (steps, steps meanwhile, merged or not, onto a newer base or not), at any step, of any version."""
    run = Run.of(case)
    head = started(run)
    merged, version = 0, 0
    for steps, beyond, accepted, newer in way:
        head.train(steps)
        run.contribute(head)
        head.train(beyond)
        version += accepted or newer
        merged = head.sequence if accepted else merged
        settle(head, accepted, version, run.base(version) if accepted or newer else None)
    steps, contributed, accepted, beyond = last
    head.train(steps)
    if contributed:
        run.contribute(head)
        head.train(beyond)
        merged = head.sequence if accepted else merged
    at = version + (contributed or beyond % 2)
    state = snapshot(head, CheckpointRequest(at, {1: merged}))
    if contributed:
        settle(head, accepted, at, run.base(at))
    elif at > version:
        head.adopt(None, at, run.base(at))
    assert_continue_alike(run, head, restored(run, state, at), at)


def test_a_snapshot_is_a_copy() -> None:
    """What the head trains while it is written doesn't change it."""
    run = Run.of("momentum, float64")
    head = started(run)
    head.train(3)
    tensors, meta = snapshot(head, CheckpointRequest(0, {1: 0}))
    before = {name: tensor.clone() for name, tensor in tensors.items()}, json.dumps(meta)
    head.train(2)
    assert json.dumps(meta) == before[1]
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in tensors.items())
    assert tensors["losses"].shape == (3,)


def test_a_snapshot_does_not_change_its_head() -> None:
    """A head of which snapshots are taken trains the same bits as one without."""
    run = Run.of("bfloat16, int8")
    one, other = started(run), started(run)
    one.train(2)
    other.train(2)
    run.contribute(one)
    run.contribute(other)
    snapshot(one, CheckpointRequest(1, {1: 1}))
    snapshot(one, CheckpointRequest(1, {1: 0}))
    for head in (one, other):
        settle(head, True, 1, run.base(1))
    assert_continue_alike(run, one, other, 1)


@pytest.mark.parametrize("sequence", [0, 1])
def test_a_head_that_adopted_a_later_contribution_has_missed_it(sequence: int) -> None:
    """Once a later contribution is merged and adopted, the state at an earlier version is lost."""
    run = Run.of("momentum, float64")
    head = started(run)
    for version in (1, 2):
        head.train(1)
        run.contribute(head)
        settle(head, True, version, run.base(version))
    with pytest.raises(StateMissed):
        snapshot(head, CheckpointRequest(sequence, {1: sequence}))


def _without(tensors: dict[str, Tensor], meta: dict[str, Any], name: str) -> SavedState:
    return {n: t for n, t in tensors.items() if n != name}, {n: v for n, v in meta.items() if n != name}


HOSTILE: dict[str, Callable[[dict[str, Tensor], dict[str, Any]], SavedState]] = {
    "no factor": lambda t, m: _without(t, m, next(name for name in t if name.startswith("factor."))),
    "no replica": lambda t, m: _without(t, m, "replica.scale"),
    "no generator": lambda t, m: _without(t, m, "rng.torch"),
    "no optimizer": lambda t, m: _without(t, m, "optimizer"),
    "no position": lambda t, m: _without(t, m, "since"),
    "a factor of another shape": lambda t, m: (t | {next(n for n in t if n.startswith("factor.")): torch.zeros(5, 5)}, m),
    "a reference of another size": lambda t, m: (t | {"reference": torch.zeros(3, dtype=torch.float64)}, m),
    "a generator of another size": lambda t, m: (t | {"rng.torch": torch.zeros(3, dtype=torch.uint8)}, m),
    "momentum of another shape": lambda t, m: (t | {"optimizer.0.momentum_buffer": torch.zeros(1)}, m),
    "momentum of another parameter": lambda t, m: (t | {"optimizer.99.momentum_buffer": torch.zeros(1)}, m),
    "words for numbers": lambda t, m: (t, m | {"step": "many"}),
    "lanes that are none": lambda t, m: (t, m | {"lanes": 7}),
    "lanes of three numbers": lambda t, m: (t, m | {"lanes": [[1, 2, 3]]}),
    "a list for a record": lambda t, m: (t, m | {"optimizer": []}),
    "no record at all": lambda t, m: (t, []),  # type: ignore[return-value]
    "a grant of words": lambda t, m: (t, m | {"released": ["one", "two"]}),
}


@pytest.mark.parametrize("damage", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_state_that_cannot_be_used_is_an_error(damage: Callable[[dict[str, Tensor], dict[str, Any]], SavedState]) -> None:
    """The error names the head and what is wrong, whatever the file holds; no other error is raised."""
    run = Run.of("momentum, float64")
    head = started(run)
    head.train(3)
    run.contribute(head)
    settle(head, True, 1, run.base(1))
    state = through_file(snapshot(head, CheckpointRequest(1, {1: 1})))
    with pytest.raises(StorageError, match=r"The saved state of head 1 can't be used: .+"):
        restore(run.head(), damage(*state), run.base(1))


@pytest.mark.parametrize(
    ("key", "shape", "expected"), [("exp_avg_sq", (3, 3), "(2, 6)"), ("exp_avg", (), "(2, 6)"), ("step", (2,), "()")]
)
def test_an_optimizer_state_of_another_shape_is_refused_by_name(key: str, shape: tuple[int, ...], expected: str) -> None:
    """Also one that torch would broadcast: the error names the head, the parameter and both shapes."""
    run = Run.of("dropout, AdamW")
    head = started(run)
    head.train(3)
    tensors, meta = through_file(snapshot(head, CheckpointRequest(0, {1: 0})))
    with pytest.raises(StorageError) as raised:
        restore(run.head(), (tensors | {f"optimizer.0.{key}": torch.zeros(shape)}, meta), run.base(0))
    name = head.plan.adapted[0].a_name
    assert str(raised.value) == (
        f"The saved state of head 1 can't be used: ValueError: the optimizer's {key} of {name} has the shape {shape}, "
        f"expected {expected}."
    )
