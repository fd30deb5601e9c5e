"""How the driver replaces a coordinator, with fakes in place of Ray's processes."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from lte_ray import FailureConfig, checkpoint
from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.coordinator.ema import kept_share
from lte_ray.engine.failure_policy import FailurePolicy
from lte_ray.engine.hang_detector import HangDetector
from lte_ray.errors import CoordinatorLost
from lte_ray.messages import CommittedPosition, HeadReport, HeadStatus, MergeRecord, OuterStep, RecoveryReport, StepCoefficients
from lte_ray.runtime.controller import coordinator_recovery
from lte_ray.runtime.controller.coordinator_recovery import CoordinatorRecovery
from lte_ray.runtime.controller.head_actors import HeadActorGroup, SlotState
from lte_ray.runtime.controller.run_state import RunState
from lte_ray.runtime.coordinator.actor import CoordinatorStatus
from lte_ray.runtime.coordinator_state import CoordinatorState
from lte_ray.storage import RunDirectory
from lte_ray.transfer.groups import EntryGroup
from tests.support.plans import plan_from_shapes, random_flat

PLAN = plan_from_shapes([(6, 5, 2)], [(4,)])

SILENT = 2
"""The head whose process doesn't report."""


class Actor:
    """A process that takes any call, and answers each with its heads' numbers."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: (self.numbers, name))


class Run:
    """Three heads train, and the coordinator of epoch 0 is lost."""

    def __init__(self, path: Path, config: FailureConfig, start: CoordinatorState | None = None, ema: float = 0.0) -> None:
        self.began: list[CoordinatorState] = []
        coordinator: Any = SimpleNamespace(
            actor=Actor(),
            epoch=0,
            stop=lambda: None,
            begin=self.began.append,
            lose_heads=lambda next_incarnations, drop: self.lost.append(set(next_incarnations)),
        )
        self.lost: list[set[int]] = []
        launcher: Any = SimpleNamespace(launch_heads=lambda numbers, *_: Actor(*numbers), end=lambda actor: None)
        self.heads = HeadActorGroup(coordinator, launcher, HangDetector())
        directory = RunDirectory.open(str(path), "run")
        directory.create()
        start = start or CoordinatorState(0, None)
        self.state = RunState(directory, 3, start)
        self.state.record_heads([HeadStatus(head, step=5, state="training") for head in range(3)], epoch=0)
        self.context: Any = SimpleNamespace(
            directory=directory,
            groups=[EntryGroup(("w0",), 0, True)],
            settings=SimpleNamespace(
                merge=MergeConfig(policy="nesterov"), lte=LTEConfig(num_heads=3), train=TrainConfig(ema=ema)
            ),
            transport=SimpleNamespace(publish=lambda tensor: tensor, fetch=lambda tensor: tensor),
        )
        initial: Any = SimpleNamespace(plan=PLAN, plans=[PLAN] * 3)
        self.recovery = CoordinatorRecovery(
            self.state, self.heads, coordinator, FailurePolicy(config), self.context, initial, start
        )
        self.heads.launch_all([((head,), None) for head in range(3)])
        for slot in self.heads.slots:
            self.heads.start(slot)
            slot.health.answered = slot.health.moved = time.monotonic()


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are answered at once, but for those to the silent head; what heads know is nothing."""

    def wait(refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        return [ref for ref in refs if SILENT not in ref[0]], [ref for ref in refs if SILENT in ref[0]]

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", lambda ref: None)
    monkeypatch.setattr(coordinator_recovery.time, "sleep", lambda seconds: None)


@pytest.mark.usefixtures("no_ray")
def test_heads_that_stay_silent_are_returned_and_left_to_the_caller(tmp_path: Path) -> None:
    """Recovery decides nothing about heads; one that never answered, or has finished, isn't expected to report."""
    run = Run(tmp_path, FailureConfig())
    reports, silent = run.recovery.stop_and_collect("it died")
    assert reports == []
    assert [(slot.numbers, slot.state) for slot, _ in silent] == [((SILENT,), SlotState.TRAINING)]
    run.heads.slots[SILENT].health.answered = None
    assert run.recovery.stop_and_collect("it died")[1] == []


@pytest.mark.usefixtures("no_ray")
def test_another_coordinator_learns_which_processes_are_gone(tmp_path: Path) -> None:
    """Of heads that are about to start again; heads that had ended, and whose last steps aren't merged, start again, too."""
    run = Run(tmp_path, FailureConfig())
    first, second, third = run.heads.slots
    run.heads.end_process(first)
    run.heads.restart(first, delay=60.0)
    run.heads.finish(second)
    run.recovery.restart([], "it died")
    (state,) = run.began
    assert (state.epoch, state.version, state.members) == (1, 0, {0, 1, 2})
    assert [slot.state for slot in (first, second, third)] == [SlotState.RESTARTING, SlotState.RESTARTING, SlotState.TRAINING]
    assert run.lost == [{0, 1}]


@pytest.mark.usefixtures("no_ray")
def test_coordinators_that_are_lost_without_progress_end_the_run(tmp_path: Path) -> None:
    """After `head_failures` in a row that began from the same version."""
    run = Run(tmp_path, FailureConfig(head_failures=1))
    run.recovery.restart([], "it died")
    run.recovery.restart([], "it died")
    with pytest.raises(CoordinatorLost, match="it died 3 times without a merge in between"):
        run.recovery.restart([], "it died")


@pytest.mark.usefixtures("no_ray")
def test_one_death_too_many_ends_the_run(tmp_path: Path) -> None:
    """`max_failures` counts the coordinator's deaths, too."""
    run = Run(tmp_path, FailureConfig(max_failures=1))
    run.recovery.stop_and_collect("it died")
    with pytest.raises(CoordinatorLost, match=r"it died \(--max-failures is 1\)"):
        run.recovery.stop_and_collect("it died")


STEP = OuterStep(*[StepCoefficients(0.5, 1.0, 0.7, 0.35)] * 2)


def merge_with_momentum(run: Run) -> None:
    """The driver has seen that the merge to version 4 added to the momentum."""
    record = MergeRecord(4, 0.0, (0,), 1, 1, {0: 1.0}, 0, 0, step=5, weights={0: 1.0}, outer_step=STEP)
    run.state.record_coordinator(CoordinatorStatus(4, "", (record,), None), 0)


def events(run: Run, name: str) -> list[dict[str, Any]]:
    run.state.log.close()
    rows = map(json.loads, (Path(run.context.directory.path) / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row.get("event") == name]


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("known", "redone", "used", "lost"),
    [
        (True, [True], True, []),
        (True, [True, False], True, ["in layers that heads receive as the base"]),
        (False, [True], True, ["everywhere"]),
        (False, [True], False, []),
    ],
)
def test_momentum_comes_from_the_heads_and_what_they_dont_know_restarts_at_0(
    tmp_path: Path, known: bool, redone: list[bool], used: bool, lost: list[str]
) -> None:
    """An event says so; none where no merge had momentum. Of two processes with one version, the one that knows it counts."""
    run = Run(tmp_path, FailureConfig())
    run.context.groups = [EntryGroup((f"w{i}",), 0, by_factors) for i, by_factors in enumerate(redone)]
    if used:
        merge_with_momentum(run)
    report = RecoveryReport(4, "base", {}, {}, {})
    run.recovery.restart([report, replace(report, momentum="momentum" if known else None)], "it died")
    (state,) = run.began
    assert (state.version, state.momentum) == (4, "momentum" if known else None)
    assert [event["where"] for event in events(run, "momentum_restarts")] == lost


@pytest.mark.usefixtures("no_ray")
def test_momentum_of_a_checkpoint_of_the_recovered_version_is_used(tmp_path: Path) -> None:
    """It is complete, whatever the heads know; that of an older checkpoint isn't this version's."""
    for version in (4, 3):
        run = Run(tmp_path / str(version), FailureConfig())
        merge_with_momentum(run)
        directory, momentum = run.context.directory, random_flat(PLAN.base.size, 1).float()
        files = [
            checkpoint.write_base(directory, version, PLAN, momentum),
            checkpoint.write_momentum(directory, version, PLAN, "nesterov", momentum),
        ]
        checkpoint.commit(directory, version, (), files, {})
        run.state.checkpoint = version
        run.recovery.restart([RecoveryReport(4, "base", {}, {}, {})], "it died")
        assert run.began[0].momentum is None if version == 3 else torch.equal(run.began[0].momentum, momentum)
        assert len(events(run, "momentum_restarts")) == (version == 3)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(("saved", "since"), [(None, 0), (2, 2), (3, None), (4, None)])
def test_the_moving_average_continues_from_the_newest_that_is_kept(
    tmp_path: Path, saved: int | None, since: int | None
) -> None:
    """That of a checkpoint, or of the start. It moves to the recovered base in one step, and an event names what it lacks.

    Nothing is lacking if it is the average of the recovered version or of the one before.
    """
    initial, average, recovered = (random_flat(PLAN.base.size, seed).float() for seed in (1, 2, 3))
    run = Run(tmp_path, FailureConfig(), CoordinatorState(0, initial), ema=0.9)
    steps = 10 * (saved or 0)
    if saved is not None:
        files = [
            checkpoint.write_base(run.context.directory, saved, PLAN, initial),
            checkpoint.write_ema(run.context.directory, saved, PLAN, average),
        ]
        standings = {str(head): {"step": steps, "lanes": []} for head in range(3)}
        checkpoint.commit(run.context.directory, saved, (), files, {"standings": standings})
        run.state.checkpoint = saved
    positions = {head: CommittedPosition(step=40) for head in range(3)}
    run.recovery.restart([RecoveryReport(4, recovered, positions, {}, {})], "it died")
    keep = kept_share(0.9, steps, 40)
    expected = torch.lerp(initial if saved is None else average, recovered, 1 - keep)
    assert keep == 1 if saved == 4 else keep < 0.5
    assert torch.equal(run.began[0].ema, expected)
    assert [event["since"] for event in events(run, "ema_gap")] == ([] if since is None else [since])


@pytest.mark.usefixtures("no_ray")
def test_a_run_without_a_moving_average_recovers_none(tmp_path: Path) -> None:
    """And it says nothing of one."""
    run = Run(tmp_path, FailureConfig())
    run.recovery.restart([RecoveryReport(4, "base", {}, {}, {})], "it died")
    assert run.began[0].ema is None
    assert events(run, "ema_gap") == []


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(("sequence", "version"), [(1, 3), (2, 4)])
def test_an_adapter_that_nobody_knows_takes_the_run_back_to_a_checkpoint(tmp_path: Path, sequence: int, version: int) -> None:
    """Where heads never merge, and one died with the coordinator; unless the checkpoint has what it contributed last."""
    run = Run(tmp_path, FailureConfig())
    run.context.settings = SimpleNamespace(
        merge=MergeConfig(policy="average", never_merge=True), train=run.context.settings.train
    )
    directory, factors = run.context.directory, random_flat(PLAN.factors_size, 1).float()
    files = [
        checkpoint.write_base(directory, 3, PLAN, random_flat(PLAN.base.size, 1).float()),
        checkpoint.write_references(directory, 3, {1: factors}),
    ]
    checkpoint.commit(directory, 3, (), files, {"standings": {"1": {"sequence": sequence}}})
    run.state.checkpoint = 3
    loaded = CoordinatorState(3, "saved base")
    run.recovery._load_newest = lambda versions: loaded if versions == [3] else None  # type: ignore[assignment,return-value]
    positions = {head: CommittedPosition(0, 2, 4, 20) for head in (0, 1)}
    run.heads.finish(run.heads.slots[0])
    run.recovery.restart([RecoveryReport(4, "base", positions, {}, {0: HeadReport(20, 30, factors={2: "f0"})})], "it died")
    (state,) = run.began
    assert state.version == version
    if version == 4:
        assert state.references[0] == "f0"
        assert torch.equal(state.references[1], factors)
    # A head that had ended is behind its own adapter, too, once the run has gone back.
    assert (run.heads.slots[0].state is SlotState.RESTARTING) == (version == 3)
