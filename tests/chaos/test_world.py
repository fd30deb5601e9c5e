"""The whole protocol under chaos: whatever dies, is late, repeated, lost or poisoned, nothing is lost or counted twice.

`python -m benchmarks.chaos --schedules 5000` explores more of the same.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.chaos.parts import MODES
from tests.chaos.traffic import CALM
from tests.chaos.world import KINDS, World
from tests.support import LONG_RUN

MANY = 60 if LONG_RUN else 1
"""Factor by which `make test-all` and `make chaos` try more schedules: some thousands."""

pytestmark = pytest.mark.timeout(1200)

Schedule = list[tuple[str, int, int]]


def schedules(kinds: tuple[str, ...], amount: int = 6) -> st.SearchStrategy[Schedule]:
    """Schedules of events of these kinds."""
    return st.lists(st.tuples(st.sampled_from(kinds), st.integers(0, 63), st.integers(1, amount)), max_size=40)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=5 * MANY)
@given(events=schedules(KINDS))
def test_nothing_is_lost_or_counted_twice(mode: str, events: Schedule) -> None:
    """After every event the accounts of weights and batches balance; without further faults the run ends, all of it merged."""
    world = World(MODES[mode])
    for event in events:
        world.do(*event)
    world.settle()


@pytest.mark.parametrize("mode", ["barrier", "barrier momentum", "barrier momentum redone", "barrier reset"])
@settings(max_examples=4 * MANY)
@given(events=schedules((*CALM, "cut", "cut", "ask", "ask", "crash", *["go"] * 6), amount=4))
def test_a_barrier_run_that_is_killed_and_resumed_ends_bit_for_bit_as_one_that_is_not(mode: str, events: Schedule) -> None:
    """Killed at any points, even with a checkpoint in mid-round, it ends with the same base and the same batches."""
    calm, killed = World(MODES[mode]), World(MODES[mode])
    for event in events:
        killed.do(*event)
    for world in (calm, killed):
        world.settle()
    assert calm.coordinator is not None
    assert killed.coordinator is not None
    assert torch.equal(killed.coordinator.engine.base, calm.coordinator.engine.base)
    assert killed.account.merged.keys() == calm.account.merged.keys()


def test_a_head_whose_first_answer_after_a_resume_was_lost_begins_on_the_base_that_it_gets() -> None:
    """Others have merged meanwhile, so its saved state, which belongs to the checkpoint's base, can't be used."""
    world = World(MODES["arrival no-wait"])
    begun = [("go", 37, 6), ("fetch", 24, 3), ("cut", 6, 2), ("go", 49, 3), ("cut", 59, 6), ("go", 59, 1), ("go", 53, 6)]
    resumed = [("go", 3, 5), ("crash", 42, 4), ("go", 20, 3), ("go", 8, 1), ("go", 12, 2), ("go", 1, 1), ("lose_answer", 38, 5)]
    for event in begun + resumed:
        world.do(*event)
    assert world.coordinator is not None
    assert world.coordinator.engine.version > world.start.version
    assert [call.kind for process in world.processes for call in process.calls if call.place == "wire"] == ["join"]
    world.settle()


def test_a_run_that_dropped_a_head_resumes_with_as_many_as_before() -> None:
    """The new head of that number starts with B = 0: the checkpoint's factors are those of the dropped head."""
    world = World(MODES["barrier"])
    for version, faults in ((1, ("kill", "drop")), (2, ("cut",))):
        for turn in range(200):
            if world.coordinator is not None and world.coordinator.engine.version >= version:
                break
            world.do("go", turn, 1)
        assert all(world.do(kind, 0) for kind in faults)
    for turn in range(200):
        world.do("go", turn, 1)
        world.do("ask")
    assert world.disk.checkpoints
    assert world.do("crash", 2 * world.settings.lte.num_heads, 1)
    world.settle()


@pytest.mark.parametrize("mode", ["barrier momentum", "barrier momentum redone"])
def test_momentum_survives_the_coordinator_where_heads_know_it(mode: str) -> None:
    """Otherwise it restarts at 0: either way the account of the merges that follow is right."""
    world = World(MODES[mode])
    for turn in range(400):
        if min(process.version for process in world.processes) >= 2:
            break
        world.do("go", turn, 1)
    assert world.do("kill_hub", 0)
    assert world.do("recover", 0)
    assert world.coordinator is not None
    assert world.coordinator.engine.version == 2
    assert (world.coordinator.momentum() is not None) == world.mode.redo
    world.settle()
    assert world.coordinator.engine.version > 2
