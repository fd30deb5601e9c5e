"""What the driver does when the coordinator is lost or the loss has spiked: another coordinator begins, from another state."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import ray
import torch

from lte_ray import checkpoint
from lte_ray.engine.coordinator.ema import kept_share, mean_step
from lte_ray.engine.coordinator.recovery import Recovered, heads_in_checkpoint, recover
from lte_ray.engine.failure_policy import FailureDecision, FailurePolicy
from lte_ray.engine.prepare import Initial
from lte_ray.errors import CoordinatorLost, HeadLost, RunError, StorageError
from lte_ray.messages import RecoveryReport
from lte_ray.runtime.context import RunContext
from lte_ray.runtime.controller.coordinator_group import CoordinatorGroup
from lte_ray.runtime.controller.head_actors import HeadActorGroup, HeadActorSlot, SlotState
from lte_ray.runtime.controller.run_state import RunState
from lte_ray.runtime.coordinator_state import CoordinatorState, load_checkpoint, read_positions
from lte_ray.runtime.object_store import Handle, ObjectLost
from lte_ray.runtime.ray_errors import PROCESS_DIED

log = logging.getLogger("lte_ray")

REPORT_TIMEOUT = 10.0
"""Seconds that heads have to report when the coordinator is lost; those that don't are started again. Also the seconds
for each answer of a coordinator that a rollback replaces."""

FIRST_ANSWER = 0.5
"""Seconds that processes have which never answered before: they may just have started, or still wait for a place."""

NO_CHECKPOINT = -1
"""In place of a version to which the run went back: there was no checkpoint to go back to."""


def _was_restarted(slot: HeadActorSlot) -> bool:
    """Whether the slot's process is another one that starts only now, so that no merge must wait for its heads yet."""
    return slot.state is SlotState.TRAINING and slot.incarnation > 0 and not slot.has_answered


class CoordinatorRecovery:
    """Replaces the coordinator.

    After a loss, the controller calls `stop_and_collect`, deals with the heads that stayed silent, and calls `restart`.

    Args:
        state: of the run.
        heads: its processes of heads.
        coordinator: what is replaced.
        policy: decides whether another coordinator may start.
        context, initial, start: the run's context, its model, and where this process started it.
    """

    def __init__(
        self,
        state: RunState,
        heads: HeadActorGroup,
        coordinator: CoordinatorGroup,
        policy: FailurePolicy,
        context: RunContext,
        initial: Initial,
        start: CoordinatorState,
    ) -> None:
        self._state, self._heads, self._coordinator, self._policy = state, heads, coordinator, policy
        self._context, self._initial, self._start = context, initial, start
        self._last_version = -1  # from which the last coordinator began
        self._without_progress = 0  # coordinators in a row that began from that version
        self._rolled_back_to: set[int] = set()
        self._moves = False  # whether the coordinator that was ended last only moves

    # -- a coordinator that is lost ------------------------------------------------------------------------------------

    def stop_and_collect(
        self, why: str, moves: bool = False
    ) -> tuple[list[RecoveryReport], list[tuple[HeadActorSlot, HeadLost]]]:
        """Ends what is left of the coordinator, and asks the heads' processes what they know.

        Args:
            why: it is ended, or was lost.
            moves: whether it only moves to another node, which is no failure.

        Returns:
            The reports, and the slots that should have reported but stayed silent, with an error each. Their processes must be
            ended before `restart`, so that they don't continue from what the lost coordinator sent them.

        Raises:
            CoordinatorLost: it was lost too often.
        """
        decision = FailureDecision("restart") if moves else self._policy.decide_other()
        first_line = why.splitlines()[0][:300]
        event = "coordinator_moves" if moves else "coordinator_lost"
        self._state.log.record_event(event, why=first_line, version=self._state.newest_version, remedy=decision.action)
        self._coordinator.stop()
        if decision.action == "stop":
            raise CoordinatorLost(decision.explain(why))
        log.warning("%s. Another one is started.", first_line.rstrip(".:"))
        self._moves = moves
        slots = {slot.actor.report.remote(self._coordinator.epoch + 1): slot for slot in self._heads.slots if slot.has_process}
        expected = [ref for ref, slot in slots.items() if slot.has_answered]
        if expected:
            ray.wait(expected, num_returns=len(expected), timeout=REPORT_TIMEOUT)
        answered, silent = ray.wait(list(slots), num_returns=len(slots), timeout=FIRST_ANSWER) if slots else ([], [])
        reports = []
        for ref in answered:
            try:
                report = ray.get(ref)
            except ray.exceptions.RayError:
                continue  # its `run` call fails, too
            if report is not None:
                reports.append(report)
        late = [slot for slot in (slots[ref] for ref in silent) if slot.has_answered and not slot.ended]
        return reports, [
            (slot, HeadLost(f"The process of {slot.name} didn't say what it knows within {REPORT_TIMEOUT:g} s"))
            for slot in late
        ]

    def restart(self, reports: Sequence[RecoveryReport], why: str) -> None:
        """Another coordinator continues from what the heads know, or from a checkpoint if that is newer.

        Raises:
            CoordinatorLost: several coordinators in a row were lost before they merged anything.
            StorageError: the checkpoints that are needed are damaged.
        """
        coordinator, heads = self._coordinator, self._heads
        epoch = coordinator.epoch + 1
        state, astray = self._state_after(reports, epoch)
        if not self._moves:
            self._check_progress(state.version, why)
        self._begin(state)
        reporting = {number for report in reports for number in report.heads} - astray
        unmerged = [slot for slot in heads.slots if self._ended_unmerged(slot, state, reporting)]
        for slot in [*unmerged, *(slot for slot in heads.training if astray.intersection(slot.numbers))]:
            heads.end_process(slot)
            heads.restart(slot)
        for slot in [slot for slot in heads.slots if slot.has_process]:
            slot.actor.connect.remote(coordinator.actor, epoch)
            slot.status_request, now = None, time.monotonic()  # a request from before the recovery says nothing
            if slot.has_answered:
                slot.health.answered = slot.health.moved = now  # it has just reported
        heads.lose([slot for slot in heads.slots if slot.state is SlotState.RESTARTING or _was_restarted(slot)])
        for slot in heads.slots:
            for number in slot.numbers if slot.ended else ():
                coordinator.actor.leave.remote(number)
        members = self._members()
        positions = {str(h): asdict(position) for h, position in state.positions.items() if position.sequence and h in members}
        self._state.log.record_event(
            "coordinator_restarts", epoch=epoch, version=state.version, reports=len(reports), held=positions
        )

    def _ended_unmerged(self, slot: HeadActorSlot, state: CoordinatorState, reporting: set[int]) -> bool:
        """Whether these heads had ended and their process is gone, and the state lacks the merges of their last steps."""
        if not slot.ended or reporting.intersection(slot.numbers):
            return False
        return any(
            not self._state.is_quarantined(number) and state.position(number).step < self._state.statuses[number].step
            for number in slot.numbers
        )

    def _check_progress(self, version: int, why: str) -> None:
        """Waits, longer each time, if the coordinators before began from the same version.

        Raises:
            CoordinatorLost: too many in a row did.
        """
        self._without_progress = self._without_progress + 1 if version == self._last_version else 0
        self._last_version = version
        if 0 <= self._policy.config.head_failures < self._without_progress:
            raise CoordinatorLost(f"{why} (it died {self._without_progress + 1} times without a merge in between)")
        time.sleep(self._policy.delay(self._without_progress))

    def _state_after(self, reports: Sequence[RecoveryReport], epoch: int) -> tuple[CoordinatorState, frozenset[int]]:
        """Returns the state to continue from, and the heads that must start again since they are ahead of it."""
        saved, start = self._state.checkpoint, self._start
        recovered = recover(reports)
        everyone = frozenset(number for report in reports for number in report.heads)
        lost = recovered is not None and self._lost_adapters(recovered, saved)
        if recovered is None or lost or (saved is not None and saved > recovered.version):
            if saved is None or saved == start.version:
                return replace(start, epoch=epoch), everyone if lost else frozenset()
            versions = [version for version in checkpoint.complete_versions(self._context.directory) if version <= saved]
            state = self._load_newest(versions or [saved])
            return replace(state, epoch=epoch), everyone
        references = dict(recovered.references)
        saved_heads: frozenset[int] = frozenset()
        outlier_filter: dict[str, Any] = {}
        if saved is not None:
            with contextlib.suppress(StorageError, KeyError, ValueError):
                manifest = checkpoint.read_manifest(self._context.directory, saved)
                saved_heads, outlier_filter = frozenset(manifest.heads), manifest.facts.get("guard") or {}
                matching = heads_in_checkpoint(recovered, manifest.facts.get("standings", {}))
                factors = checkpoint.read_references(self._context.directory, manifest, self._initial.plans)
                publish = self._context.transport.publish
                references |= {head: publish(tensor) for head, tensor in factors.items() if head in matching}
        at_start = recovered.version == start.version
        state = CoordinatorState.from_recovered(
            recovered,
            references,
            self._momentum_after(recovered, saved),
            ema=self._ema_after(recovered, saved),
            checkpoint_version=saved,
            exact_heads=start.exact_heads - recovered.step_limits.keys() if at_start else frozenset(),
            saved_heads=saved_heads,
            outlier_filter=outlier_filter,
            epoch=epoch,
        )
        return state, recovered.restart_heads

    def _lost_adapters(self, recovered: Recovered, saved: int | None) -> bool:
        """Whether a head's independent adapter is lost: the head died together with the coordinator.

        Nothing else holds what that head has trained, so the run goes back to its newest checkpoint.
        """
        if not self._context.settings.merge.never_merge or not recovered.heads_without_factors:
            return False
        if saved is None:
            return True
        manifest = checkpoint.read_manifest(self._context.directory, saved)
        return recovered.heads_without_factors > heads_in_checkpoint(recovered, manifest.facts.get("standings", {}))

    def _momentum_after(self, recovered: Recovered, saved: int | None) -> Handle | None:
        """Returns the momentum of the recovered version: that of a checkpoint of this version, or what the heads know.

        Heads know it of the layers whose merges they redo from factors. What nobody knows restarts at 0, and an event says so.
        """
        version, context = recovered.version, self._context
        if version == self._start.version:
            return self._start.momentum
        if version == saved:
            with contextlib.suppress(StorageError):
                manifest = checkpoint.read_manifest(context.directory, version)
                momentum = checkpoint.read_momentum(
                    context.directory, manifest, self._initial.plan, context.settings.merge.policy
                )
                return None if momentum is None else context.transport.publish(momentum)
        steps = [merge.outer_step for merge in self._state.merges if merge.version <= version]
        used = self._start.momentum is not None or any(step is not None and step.uses_momentum for step in steps)
        known = recovered.momentum is not None
        if used and not (known and all(group.by_factors for group in context.groups)):
            where = "in layers that heads receive as the base" if known else "everywhere"
            self._state.log.record_event("momentum_restarts", version=version, where=where)
            log.warning("The outer momentum restarts at 0 %s: it was lost with the coordinator.", where)
        return recovered.momentum

    def _ema_after(self, recovered: Recovered, saved: int | None) -> Handle | None:
        """Returns the moving average of the bases up to the recovered version; None if there is none, or it begins there.

        It is exact if a checkpoint of that version, or of the one before, has it. Otherwise the bases between the newest
        checkpoint, or the version from which this process started the run, and the recovered one are lost. Then the average
        moves to the recovered base at once, as if there had been one merge in between, and an event says so.
        """
        context, start, version, decay = self._context, self._start, recovered.version, self._context.settings.train.ema
        if not decay:
            return None
        since, positions, handle = start.version, start.positions, start.ema or start.base
        if saved is not None:
            with contextlib.suppress(StorageError, KeyError, ValueError, TypeError):
                manifest = checkpoint.read_manifest(context.directory, saved)
                ema = checkpoint.read_ema(context.directory, manifest, self._initial.plan)
                if ema is not None:
                    positions = read_positions(manifest, {}, context.settings.lte.num_heads)
                    since, handle = saved, context.transport.publish(ema)
        if since == version:
            return handle
        if version > since + 1:
            self._state.log.record_event("ema_gap", version=version, since=since)
            lost = f"{since + 1} to {version - 1}"
            log.warning("The moving average (--ema) lacks versions %s, which were lost with the coordinator.", lost)
        members = self._members()
        before, after = mean_step(positions, members), mean_step(recovered.positions, members)
        keep = kept_share(decay, before, max(before, after))
        try:
            ema, base = context.transport.fetch(handle), context.transport.fetch(recovered.base)
        except ObjectLost:  # the coordinator that is to start can't fetch the base either
            return None
        return context.transport.publish(torch.lerp(ema, base, 1 - keep))

    # -- a loss that has spiked ----------------------------------------------------------------------------------------

    def roll_back(self, why: str, last_good: int) -> None:
        """The loss has spiked: all heads start again from the newest checkpoint up to `last_good`, with the data that follows.

        If there is no such checkpoint, the run continues as it is.

        Raises:
            CoordinatorLost: the coordinator died or hangs. The next one sees the spike again if it persists.
            RunError: the loss spiked before from that checkpoint.
            StorageError: all checkpoints up to it are damaged.
        """
        state, heads, coordinator = self._state, self._heads, self._coordinator
        versions = [version for version in checkpoint.complete_versions(self._context.directory) if version <= last_good]
        if not versions:
            if NO_CHECKPOINT not in self._rolled_back_to:
                state.log.record_event("spike", why=why, remedy="none: there is no checkpoint from before")
                self._rolled_back_to.add(NO_CHECKPOINT)
            return
        if versions[-1] in self._rolled_back_to:
            raise RunError(
                f"The loss spiked again after the run had gone back to version {versions[-1]}: {why}. Lower the learning "
                "rate or --lora-alpha, or raise --rollback-z."
            )
        before = self._load_newest(versions)
        try:
            ray.get(coordinator.actor.freeze.remote(False), timeout=REPORT_TIMEOUT)
            positions, assignment_state = ray.get(coordinator.actor.data_positions.remote(), timeout=REPORT_TIMEOUT)
        except (*PROCESS_DIED, ray.exceptions.GetTimeoutError) as error:
            raise CoordinatorLost(f"The process of the coordinator died or hung while the run went back: {error}") from error
        self._rolled_back_to.add(versions[-1])
        coordinator.stop()
        for slot in heads.slots:
            heads.end_process(slot)
            heads.restart(slot)
        skipped = sum(position.batches - before.position(head).batches for head, position in positions.items())
        state_before = replace(
            before,
            positions={
                head: replace(position, batches=positions[head].batches, lanes=positions[head].lanes)
                for head, position in before.positions.items()
                if head in positions
            },
            assignment_state=assignment_state,
            exact_heads=frozenset(),
            epoch=coordinator.epoch + 1,
        )
        checkpoint.remove_after(self._context.directory, before.version)
        state.checkpoint = before.version
        self._begin(state_before)
        state.log.record_event("rolled_back", why=why, version=before.version, skipped_batches=skipped)

    # -- both ----------------------------------------------------------------------------------------------------------

    def _load_newest(self, versions: list[int]) -> CoordinatorState:
        """Loads the newest of these checkpoints that isn't damaged.

        Raises:
            StorageError: all are.
        """
        num_heads = self._context.settings.lte.num_heads
        for version in sorted(versions, reverse=True):
            try:
                return load_checkpoint(self._context, self._initial.plans, version, num_heads, self._coordinator.policy.load())
            except StorageError as error:
                self._state.log.record_event("storage", why=str(error))
                if version == min(versions):
                    raise
        raise AssertionError("at least one version is needed")

    def _begin(self, state: CoordinatorState) -> None:
        """Another coordinator begins from this state, with the heads that the run has now."""
        self._state.rewind(state.version)
        self._coordinator.begin(replace(state, members=self._members()))

    def _members(self) -> frozenset[int]:
        """The heads that belong to the run, whatever an earlier version says: not those that were dropped or quarantined."""
        return frozenset(
            number
            for slot in self._heads.slots
            for number in slot.numbers
            if not (slot.ended and self._state.is_quarantined(number))
        )
