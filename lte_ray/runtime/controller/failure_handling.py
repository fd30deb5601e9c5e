"""What the driver does about heads: about processes that died, hang or find no place, and about room for more heads."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence

import ray

from lte_ray.checkpoint import FileEntry
from lte_ray.engine.failure_policy import FailureDecision, FailurePolicy
from lte_ray.errors import ContributionRefused, HeadLost, LTEError, RunError, WorkerFailed
from lte_ray.run.error_log import reason, summarize
from lte_ray.runtime.controller.coordinator_group import CoordinatorGroup
from lte_ray.runtime.controller.head_actors import HeadActorGroup, HeadActorSlot, SlotState
from lte_ray.runtime.controller.run_state import RunState
from lte_ray.runtime.placement import Reservation
from lte_ray.runtime.ray_errors import ray_get

LOSE_TIMEOUT = 10.0
"""Seconds to wait until the coordinator knows that a head's process is gone."""

RELOCATE_EVERY = 5.0
"""Seconds that a process waits for its place before another place is tried, and between two tries."""

GROW_EVERY = 15.0
"""Seconds between two tries to add a head."""

log = logging.getLogger("lte_ray")


class FailureHandler:
    """Restarts heads or drops them, and adds heads where the run may have more.

    Args:
        state: of the run.
        heads: the processes.
        coordinator: which must know who is gone.
        policy: decides what to do about a death.
        reservation: places in the cluster.
        max_head_number: numbers of heads are below this.
        num_heads: heads that the run starts with; others are those by which it has grown.

    Attributes:
        ended_without: names of the processes that found no place until all others were done.
    """

    def __init__(
        self,
        state: RunState,
        heads: HeadActorGroup,
        coordinator: CoordinatorGroup,
        policy: FailurePolicy,
        reservation: Reservation,
        max_head_number: int,
        num_heads: int,
    ) -> None:
        self._state, self._heads, self._coordinator, self._policy = state, heads, coordinator, policy
        self._reservation, self._max_head_number, self._num_heads = reservation, max_head_number, num_heads
        self._tried_to_grow_at = time.monotonic()
        self._relocated_at = 0.0
        self._dropped_without_place: list[tuple[int, ...]] = []  # heads by process; they come back once there is room
        self.ended_without: list[str] = []
        self._given_up: set[int] = set()  # heads that died too often; they don't come back
        self._reported_waiting: set[tuple[tuple[int, ...], int, bool]] = (
            set()
        )  # heads, incarnation, whether all others are done

    def begin_without(self, missing: Sequence[tuple[int, ...]]) -> None:
        """The run starts without these heads, by process: others have their data until there is room for them."""
        for numbers in missing:
            ray.get(self._coordinator.lose_heads(dict.fromkeys(numbers, 0), drop=True), timeout=LOSE_TIMEOUT)
            self._dropped_without_place.append(numbers)
            why = f"the cluster has had no place for it for {self._reservation.patience:.0f} s"
            self._state.log.record_event("head_dropped", heads=list(numbers), why=why)

    # -- looked after again and again ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Deals with processes that hang or find no place, starts those that are due, and adds a head if there is room.

        Raises:
            LTEError: the run can't continue.
        """
        for slot, why in self._heads.hung():
            self.handle_loss(slot, HeadLost(f"The process of {slot.name} hangs: {why}"), event="head_hung")
        for slot, seconds in self._heads.without_place(self._reservation.patience):
            self._handle_no_place(slot, seconds)
        now = time.monotonic()
        self._relocate(now)
        for slot in self._heads.slots:
            if slot.state is SlotState.RESTARTING and slot.restart_at <= now:
                slot.strategy = self._reservation.relocate(slot.strategy)
                self._heads.start(slot)
                self._state.log.record_event("head_restarts", heads=list(slot.numbers), incarnation=slot.incarnation)
        self._grow(now)

    def _relocate(self, now: float) -> None:
        """Starts processes elsewhere that wait where their node drains or is gone, if there is another place now."""
        if now - self._relocated_at < RELOCATE_EVERY:
            return
        for slot, _ in self._heads.without_place(RELOCATE_EVERY):
            self._relocated_at = now
            strategy = self._reservation.relocate(slot.strategy)
            if strategy is not slot.strategy:
                slot.strategy = strategy
                self.handle_move(slot, {})

    def check_exited(self) -> None:
        """Deals with processes that had finished their heads' work and are gone: the last checkpoint does without them."""
        for slot in self._heads.exited():
            self._state.log.record_event("head_lost", heads=list(slot.numbers), why="it had ended", remedy="none")
            self._heads.end_process(slot)
            self._heads.lose([slot])

    def let_end(self, slot: HeadActorSlot) -> None:
        """Deals with a slot whose `run` call has ended while the run ends early: nothing starts again."""
        try:
            ray_get(slot.run, slot.name)
        except LTEError as error:
            self._state.log.record_event("head_lost", heads=list(slot.numbers), why=summarize(error)[:300], remedy="none")
            self._heads.end_process(slot)
            self._heads.lose([slot])
        else:
            self.handle_finish(slot)

    def drop_starved(self) -> None:
        """Drops heads that wait for data when all others have ended, since no head is left to give them any.

        Heads that ended last may have left them some, so a status that was requested before doesn't count.
        """
        slots = self._heads.slots
        waiting = self._coordinator.heads_without_data(after=self._heads.changed_at)
        late = [slot for slot in slots if not slot.ended]
        if not late or len(late) == len(slots) or not all(waiting.issuperset(slot.numbers) for slot in late):
            return
        for slot in late:
            self._state.log.record_event("head_turned_away", heads=list(slot.numbers), why="all others had ended when it came")
            self._drop(slot)

    # -- ends of processes ---------------------------------------------------------------------------------------------

    def handle_finish(self, slot: HeadActorSlot) -> None:
        """The slot's heads have ended their work, or were quarantined.

        This also tells the coordinator: one that replaced another meanwhile may not know, and must not wait for them.

        Raises:
            ContributionRefused: every head of the run is quarantined.
        """
        self._heads.finish(slot)
        for number in slot.numbers:
            if self._state.is_quarantined(number):
                note = self._state.statuses[number].note
                self._state.log.record_event("head_quarantined", head=number, why=note)
                log.warning("Head %d trains no more: %s", number, note)
                self._coordinator.lose_heads({number: slot.incarnation + 1}, drop=True)
            else:
                self._coordinator.actor.leave.remote(number)
        numbers = self._heads.heads
        if numbers and all(self._state.is_quarantined(number) for number in numbers):
            first = self._state.statuses[numbers[0]]
            raise ContributionRefused(
                f"Head {first.head} was {first.note}, and so were all others. If the loss diverged, lower the learning rate "
                "or --lora-alpha."
            )

    def handle_move(self, slot: HeadActorSlot, states: Mapping[int, FileEntry]) -> None:
        """The slot's heads have left a node that drains, or its process has waited for a place: they go on elsewhere.

        This is no failure. If the cluster has no other place, they wait for one as heads that were lost do.

        Args:
            states: files of the states that they have left for their next process.
        """
        state, heads = self._state, self._heads
        step = max((state.statuses[n].step for n in slot.numbers if n in state.statuses), default=0)
        seconds = 0.0 if slot.leaves_since is None else time.monotonic() - slot.leaves_since
        state.log.record_event(
            "head_moves", heads=list(slot.numbers), incarnation=slot.incarnation, step=step, seconds=round(seconds, 2)
        )
        moved = slot.moved if slot.leaves_since is None else {**(slot.moved or {}), **states}
        heads.end_process(slot)
        state.set_head_state(slot.numbers, "moving")
        with contextlib.suppress(ray.exceptions.RayError):  # as in `handle_loss`
            ray.get(heads.lose([slot]), timeout=LOSE_TIMEOUT)
        slot.moved = moved
        heads.restart(slot)

    def handle_loss(self, slot: HeadActorSlot, error: LTEError, event: str = "head_lost") -> None:
        """A process of heads died, or is ended since it hangs: restarts it, or drops its heads.

        Raises:
            LTEError: the run can't continue.
        """
        state, heads = self._state, self._heads
        step = max((state.statuses[n].step for n in slot.numbers if n in state.statuses), default=0)
        raised = reason(error.traceback) if isinstance(error, WorkerFailed) else ""
        failed_at = error.step or 0 if isinstance(error, WorkerFailed) else 0
        decision = self._policy.decide_head(
            slot.numbers,
            merged=sum(n in record.heads for record in state.merges for n in slot.numbers),
            step=failed_at or step,
            others=sum(len(other.numbers) for other in heads.slots if other is not slot),
            raised=raised,
            preempted=bool(getattr(error.__cause__, "preempted", False)) or (slot.leaves_since is not None and not raised),
            # Steps may be faster than polls: a head that fails in its second step has taken one.
            ever_trained=failed_at > 1 or any(status.step for status in state.statuses.values()),
        )
        state.log.record_event(
            event,
            heads=list(slot.numbers),
            incarnation=slot.incarnation,
            step=step,
            why=summarize(error)[:300],
            remedy=decision.action,
            delay=decision.delay,
        )
        self._report_loss(slot, error, decision)
        heads.end_process(slot)
        state.set_head_state(slot.numbers, "lost")
        with contextlib.suppress(ray.exceptions.RayError):  # if the coordinator is gone as well, recovery tells the next one
            ray.get(heads.lose([slot], drop=decision.action == "drop"), timeout=LOSE_TIMEOUT)
        if decision.action == "stop":
            if decision.why and isinstance(error, HeadLost):
                raise HeadLost(decision.explain(str(error))) from error
            raise error
        if decision.action == "drop":
            self._vacate(slot)
            self._given_up |= set(slot.numbers)
            state.log.record_event("head_dropped", heads=list(slot.numbers), why=decision.why)
            return
        heads.restart(slot, decision.delay)

    def _report_loss(self, slot: HeadActorSlot, error: LTEError, decision: FailureDecision) -> None:
        """Writes the whole error into the run's folder, and one line of it to the console. What ends the run is shown there."""
        place = self._state.errors.record(error, f"{slot.name}, process {slot.incarnation}")
        if decision.action == "stop":
            return
        if decision.action == "drop":
            then = f"The run continues without {slot.name}: {decision.why}"
        else:
            then = f"{slot.name.capitalize()} {slot.verb} started again" + f" in {decision.delay:.0f} s" * (decision.delay > 0)
        details = f" Details: {place}" if place else ""
        log.warning("%s. %s.%s", summarize(error).rstrip(".:"), then, details)

    def _handle_no_place(self, slot: HeadActorSlot, seconds: float) -> None:
        """The cluster has no place for a process: the others may train without it until there is room again.

        Raises:
            RunError: no head of the run has had a place for as long as a run waits that does nothing else.
        """
        others = sum(len(other.numbers) for other in self._heads.training if other.has_answered)
        decision = self._policy.decide_no_place(others, seconds)
        added = min(slot.numbers) >= self._num_heads  # a run that has grown shrinks again
        if decision.action == "drop" or (added and others):
            self._drop(slot)
            self._dropped_without_place.append(slot.numbers)
            self._state.log.record_event("head_dropped", heads=list(slot.numbers), why=decision.why)
            log.warning("The run continues without %s, until there is room again: %s.", slot.name, decision.why)
            return
        alone, limit = self._is_left(slot), self._reservation.last_patience
        if alone and seconds > limit and not any(other.ended for other in self._heads.slots):
            raise RunError(
                f"No head has had a place in the cluster for {limit:.0f} s (--resource-timeout), so the run ends. Continue it "
                "with --resume when there is room."
            )
        if alone and seconds > limit:
            self.ended_without.append(slot.name)
            self._given_up |= set(slot.numbers)
            self._state.log.record_event("head_dropped", heads=list(slot.numbers), why=decision.why)
            log.warning("The run ends without %s: %s, and all others are done.", slot.name, decision.why)
            # A run that may not do without them has their steps left when it is resumed.
            self._drop(slot, for_good=self._policy.config.exhausted == "drop")
        elif (slot.numbers, slot.incarnation, alone) not in self._reported_waiting:
            self._reported_waiting.add((slot.numbers, slot.incarnation, alone))
            self._state.log.record_event("waits_for_place", heads=list(slot.numbers), why=decision.why)
            if any(other.ended for other in self._heads.slots):
                ends = f"All others are done: the run ends without {slot.name} after {limit:.0f} s (--resource-timeout)"
            else:
                ends = f"No head has a place: the run ends after {limit:.0f} s (--resource-timeout)"
            then = ends if alone else "The others continue"
            log.warning("%s %s: %s. %s.", slot.name.capitalize(), slot.waits, decision.why, then)
            self._state.set_head_state(slot.numbers, "without a place")

    def _is_left(self, slot: HeadActorSlot) -> bool:
        """Whether nothing but this process, or others that have no place either, keeps the run from its end."""
        unplaced = [other for other, _ in self._heads.without_place(self._reservation.patience)]
        return all(other.ended or other in unplaced for other in self._heads.slots if other is not slot)

    def _drop(self, slot: HeadActorSlot, for_good: bool = True) -> None:
        """Ends the slot's process, if there is one. `for_good`: others get its heads' data and take their steps."""
        self._heads.end_process(slot)
        self._heads.lose([slot], drop=for_good)
        self._vacate(slot)

    def _vacate(self, slot: HeadActorSlot) -> None:
        self._heads.drop(slot)
        self._reservation.release_bundle(slot.strategy)
        self._state.forget_heads(slot.numbers)

    # -- growing -------------------------------------------------------------------------------------------------------

    def _grow(self, now: float) -> None:
        """Takes back heads that had no place, or adds one where the run may have more, once the cluster has room.

        Not while some are about to start again. Nor once some have taken all their steps: then the run is near its end.
        """
        slots = self._heads.slots
        if now - self._tried_to_grow_at < GROW_EVERY or any(self._blocks_growth(slot) for slot in slots):
            return
        taken = {*self._heads.heads, *self._given_up}
        free = [number for number in range(self._max_head_number) if number not in taken]
        numbers = self._dropped_without_place[0] if self._dropped_without_place else tuple(free[:1])
        allowed = self._dropped_without_place or len(taken - self._given_up) < self._policy.config.max_heads
        if not numbers or not allowed:
            return
        self._tried_to_grow_at = now
        strategy = self._reservation.add_bundle()
        if strategy is None:
            return
        self._dropped_without_place = self._dropped_without_place[1:]
        self._heads.add(numbers, strategy)
        for number in numbers:
            self._state.log.record_event("head_added", head=number)

    def _blocks_growth(self, slot: HeadActorSlot) -> bool:
        if slot.ended:
            return not all(self._state.is_quarantined(number) for number in slot.numbers)
        return slot.state is SlotState.RESTARTING
