"""What the driver does about processes that die or hang, so that the others needn't notice."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import ray

from lte_ray import checkpoint
from lte_ray.engine.coordinator.recovery import heads_in_checkpoint, recover
from lte_ray.engine.hang_detector import ProcessHealth
from lte_ray.errors import CoordinatorLost, HeadLost, LTEError, RunError, StorageError, WorkerFailed
from lte_ray.messages import RecoveryReport
from lte_ray.runtime.controller.head_actors import HeadActorSlot
from lte_ray.runtime.coordinator_state import CoordinatorState, load_checkpoint
from lte_ray.runtime.placement import Reservation
from lte_ray.runtime.ray_errors import PROCESS_DIED, to_lte_error

if TYPE_CHECKING:
    from lte_ray.runtime.controller.controller import TrainController

ANSWER = 10.0
"""Seconds that heads have to say what they know when the coordinator is lost; who doesn't is started anew."""

STARTED = 0.5
"""Seconds that those have beside that which haven't answered yet at all: they may be there, or still wait for a place."""

GROW = 15.0
"""Seconds between two looks whether the cluster has room for another head."""


log = logging.getLogger("lte_ray")


class FailureHandler:
    """Restarts heads and the coordinator of one session.

    Args:
        session: whose processes they are.
        places: where heads are.
    """

    def __init__(self, session: TrainController, places: Reservation) -> None:
        self._session, self._places = session, places
        self._asked: tuple[Any, float] | None = None  # the coordinator's status that isn't answered yet, and since when
        self._pulse = ProcessHealth()
        self._late: tuple[set[int], float] = (set(), 0.0)  # heads that wait for data, as the coordinator said when it was asked
        self._spike: tuple[str, int] | None = None  # and whether the loss has spiked
        self._grown = time.monotonic()
        self._began, self._stuck = -1, 0  # the version from which the last coordinator began, and how often in a row
        self._without_place: list[tuple[int, ...]] = []  # heads of processes that were dropped since they had no place
        self._failed: set[int] = set()  # heads that were dropped since they died too often: they don't come again
        self._rolled: set[int] = set()  # versions that the run has gone back to

    def look(self) -> None:
        """Looks after all of it once: the coordinator first, since heads go on from what it says."""
        session = self._session
        why = self._coordinator_trouble() or session.hub.sick_shard(session.crew.deadlines.silence)
        if why:
            self.recover(why)
        self._turn_away(*self._late)
        if self._spike is not None:
            self._roll_back(*self._spike)
        for member, hung in session.crew.hung():
            self._head_lost(member, HeadLost(f"The process of {member.name} hangs: {hung}"), event="head_hung")
        for member, seconds in session.crew.without_place(self._places.patience):
            self._do_without(member, seconds)
        now = time.monotonic()
        for member in session.crew.members:
            if member.due is not None and member.due <= now:
                session.crew.start(member)
                session.log.record_event("head_restarts", heads=list(member.numbers), incarnation=member.incarnation)
        self._grow(now)

    def look_at_end(self) -> None:
        """Looks after those that have ended their work, while the last version is saved.

        Raises:
            CoordinatorLost: the coordinator or a shard of it died, or hangs.
        """
        session = self._session
        why = self._coordinator_trouble() or session.hub.sick_shard(session.crew.deadlines.silence)
        if why:
            raise CoordinatorLost(why)
        for member in session.crew.gone():
            session.log.record_event("head_lost", heads=list(member.numbers), why="it had ended", remedy="none")
            session.crew.clear(member)
            self._lose([member], drop=False)  # the checkpoint does without it

    def _coordinator_trouble(self) -> str:
        """Why the coordinator doesn't answer; empty if it does, or may still."""
        session, deadlines, now = self._session, self._session.crew.deadlines, time.monotonic()
        self._pulse.begun = self._pulse.begun or now  # it reserves nothing, so it needn't wait for a place
        if self._asked is None:
            self._asked = (session.hub.coordinator.status.remote(session.seen), now)
        ref, asked = self._asked
        if not ray.wait([ref], timeout=0.2)[0]:
            return deadlines.hung(self._pulse, time.monotonic(), asked)
        self._asked = None
        try:
            status = ray.get(ref)
        except PROCESS_DIED as error:
            return str(to_lte_error(error, "the coordinator"))
        except ray.exceptions.RayTaskError as error:
            raise to_lte_error(error, "the coordinator") from error
        deadlines.note(self._pulse, time.monotonic(), asked, status.version, idle=True, stepped=False, head=False)
        session.take(status)
        self._late, self._spike = (set(status.without_data), asked), status.spike
        return ""

    # -- heads ---------------------------------------------------------------------------------------------------------

    def head_ended(self, member: HeadActorSlot, error: LTEError) -> None:
        """A process of heads has ended with this error.

        Raises:
            LTEError: the run can't, or mustn't, go on.
        """
        if isinstance(error, CoordinatorLost):
            self.recover(str(error))
        if not isinstance(error, WorkerFailed | HeadLost | CoordinatorLost):
            raise error  # the policy's, or the coordinator's own: all heads say the same
        self._head_lost(member, error)

    def check_quarantined(self, member: HeadActorSlot) -> None:
        """A process has ended its work; says so if that is since its contributions were refused.

        A coordinator that began meanwhile, from an earlier version, doesn't know that yet: it mustn't wait for these heads.
        """
        session = self._session
        for number in member.numbers:
            status, coordinator = session.statuses[number], session.hub.coordinator
            if status.state == "quarantined":
                session.log.record_event("head_quarantined", head=number, why=status.note)
                coordinator.lose.remote({number: member.incarnation + 1}, True)
            else:
                coordinator.leave.remote(number)
        session.check_heads()

    def _head_lost(self, member: HeadActorSlot, error: LTEError, event: str = "head_lost") -> None:
        session, crew = self._session, self._session.crew
        statuses = [session.statuses[n] for n in member.numbers if n in session.statuses]
        step = max((s.step for s in statuses), default=0)
        merged = sum(n in record.heads for record in session.merges for n in member.numbers)
        raised = error.traceback.strip().splitlines()[-1] if isinstance(error, WorkerFailed) else ""
        cause = error.__cause__
        remedy = session.failures.head(
            member.numbers,
            merged,
            error.step or step if isinstance(error, WorkerFailed) else step,
            others=sum(len(other.numbers) for other in crew.members if other is not member),
            raised=raised,
            preempted=bool(getattr(cause, "preempted", False)),
            ever_trained=any(s.step for s in session.statuses.values()),
        )
        why = str(error).strip().splitlines()
        session.log.record_event(
            event,
            heads=list(member.numbers),
            incarnation=member.incarnation,
            step=step,
            why=f"{why[0]} {raised}".strip()[:300],
            remedy=remedy.action,
            delay=remedy.delay,
        )
        crew.clear(member)
        session.is_now(member.numbers, "lost")
        with contextlib.suppress(ray.exceptions.RayError):  # the next coordinator learns it otherwise
            ray.get(self._lose([member], remedy.action == "drop"), timeout=ANSWER)
        if remedy.action == "stop":
            if remedy.why and isinstance(error, HeadLost):
                raise HeadLost(remedy.said(str(error))) from error
            raise error
        if remedy.action == "drop":
            self._leave(member)
            self._failed |= set(member.numbers)
            session.log.record_event("head_dropped", heads=list(member.numbers), why=remedy.why)
            return
        member.due = time.monotonic() + remedy.delay

    def _turn_away(self, waiting: set[int], asked: float) -> None:
        """Heads that wait for data are given up where all others have ended: nobody is left to give them any.

        Those that ended last may have given them some: what was asked before says nothing.
        """
        session, crew = self._session, self._session.crew
        late = [member for member in crew.members if not member.over]
        if (
            asked <= crew.changed
            or not late
            or len(late) == len(crew.members)
            or not all(set(member.numbers) <= waiting for member in late)
        ):
            return
        for member in late:
            session.log.record_event("head_turned_away", heads=list(member.numbers), why="all others had ended when it came")
            self._drop(member)

    def _do_without(self, member: HeadActorSlot, seconds: float) -> None:
        """The cluster has no place for a process; those that have one may go on without it, until there is room again."""
        session = self._session
        others = sum(len(other.numbers) for other in session.crew.training if other.pulse.answered is not None)
        remedy = session.failures.no_place(others, seconds)
        if remedy.action != "drop":
            if not member.said:
                session.log.record_event("waits_for_place", heads=list(member.numbers), why=remedy.why)
                log.warning("%s waits: %s. The others go on.", member.name, remedy.why)
                session.is_now(member.numbers, "without a place")
            member.said = True
            return
        self._drop(member)
        self._without_place.append(member.numbers)
        session.log.record_event("head_dropped", heads=list(member.numbers), why=remedy.why)

    def _lose(self, members: list[HeadActorSlot], drop: bool) -> Any:
        """Tells the coordinator that what was at these places is gone."""
        nexts = {number: member.incarnation for member in members for number in member.numbers}
        return self._session.hub.coordinator.lose.remote(nexts, drop)

    def _drop(self, member: HeadActorSlot) -> None:
        """What is there, or was to be, is ended, and others get its data."""
        self._session.crew.clear(member)
        self._lose([member], drop=True)
        self._leave(member)

    def _leave(self, member: HeadActorSlot) -> None:
        """The place is free."""
        self._session.crew.drop(member)
        self._places.release_bundle(member.strategy)
        for number in member.numbers:
            self._session.statuses.pop(number, None)

    def _grow(self, now: float) -> None:
        """Takes back heads that had no place, or adds one where the run may have more, once the cluster has room.

        Not when some are about to start again, or have taken all their steps: then the run is at its end.
        """
        session = self._session
        if now - self._grown < GROW or any(m.due or (m.over and not self._quarantined(m)) for m in session.crew.members):
            return
        taken = {n for member in session.crew.members for n in member.numbers} | self._failed
        free = [n for n in range(len(session.initial.plans)) if n not in taken]
        numbers = self._without_place[0] if self._without_place else tuple(free[:1])
        may = self._without_place or len(taken - self._failed) < session.failure.max_heads
        if not numbers or not may:
            return
        self._grown = now
        strategy = self._places.add_bundle()
        if strategy is None:
            return
        self._without_place = self._without_place[1:]
        session.crew.add(numbers, strategy)
        for number in numbers:
            session.log.record_event("head_added", head=number)

    def _quarantined(self, member: HeadActorSlot) -> bool:
        statuses = self._session.statuses
        return all(n in statuses and statuses[n].state == "quarantined" for n in member.numbers)

    # -- the coordinator -----------------------------------------------------------------------------------------------

    def recover(self, why: str) -> None:
        """Another coordinator goes on from what the heads know.

        Raises:
            RunError: it died too often.
        """
        session, hub, crew = self._session, self._session.hub, self._session.crew
        remedy = session.failures.other()
        session.log.record_event("coordinator_lost", why=why.splitlines()[0][:300], version=session.seen, remedy=remedy.action)
        self._stop()
        if remedy.action == "stop":
            raise CoordinatorLost(remedy.said(why))
        epoch = hub.epoch + 1
        reports = self._reports(epoch)
        start, astray = self._start(reports, epoch)
        self._check_progress(start.version, why)
        self._begin(start)
        again = [member for member in crew.members if self._undone(member, start, reports)]
        for member in [*again, *(m for m in crew.training if set(m.numbers) & astray)]:
            crew.clear(member)
            member.over, member.due = False, time.monotonic()
        for member in [m for m in crew.members if m.actor is not None]:
            member.actor.connect.remote(hub.coordinator, epoch)
            member.asked, now = None, time.monotonic()  # they have just answered, and what was asked before is old
            if member.pulse.answered is not None:
                member.pulse.answered = member.pulse.moved = now
        self._lose([member for member in crew.members if member.run is None and not member.over], drop=False)
        for member in crew.members:
            for number in member.numbers if member.over else ():
                hub.coordinator.leave.remote(number)
        members = self._members()
        held = {str(h): asdict(standing) for h, standing in start.positions.items() if standing.sequence and h in members}
        session.log.record_event("coordinator_restarts", epoch=epoch, version=start.version, reports=len(reports), held=held)

    def _undone(self, member: HeadActorSlot, start: CoordinatorState, reports: list[RecoveryReport]) -> bool:
        """Whether these heads had ended, and died with the coordinator, so that nobody has the merges of their last steps."""
        if not member.over or set(member.numbers) & {number for report in reports for number in report.heads}:
            return False
        ends = {number: self._session.statuses[number] for number in member.numbers}
        merged = {number: start.position(number).step for number in member.numbers}
        return any(end.state != "quarantined" and merged[number] < end.step for number, end in ends.items())

    def _roll_back(self, why: str, good: int) -> None:
        """The loss has spiked: all heads start again from the newest checkpoint until `good`, with the data that comes next.

        Raises:
            RunError: from there it has spiked before.
        """
        session, hub, crew = self._session, self._session.hub, self._session.crew
        directory = session.common.directory
        found = [version for version in checkpoint.complete_versions(directory) if version <= good]
        if not found and -1 in self._rolled:
            return
        if not found:
            session.log.record_event("spike", why=why, remedy="none: there is no checkpoint from before")
            self._rolled.add(-1)
            return
        if found[-1] in self._rolled:
            raise RunError(
                f"The loss spiked again after the run had gone back to version {found[-1]}: {why}. Lower the learning rate or "
                "--lora-alpha, or raise --rollback-z."
            )
        before = self._from_checkpoint(found)
        try:
            ray.get(hub.coordinator.freeze.remote(False), timeout=ANSWER)
            standings, ledger = ray.get(hub.coordinator.data_positions.remote(), timeout=ANSWER)
        except (*PROCESS_DIED, ray.exceptions.GetTimeoutError) as error:
            self.recover(  # the next coordinator sees the spike, too, if it doesn't pass
                f"The process of the coordinator died or hung while the run went back: {error}"
            )
            return
        self._rolled.add(found[-1])
        self._stop()
        for member in crew.members:
            crew.clear(member)
            member.over, member.due = False, time.monotonic()
        skipped = sum(held.batches - before.position(head).batches for head, held in standings.items())
        now = {
            head: replace(held, batches=standings[head].batches, lanes=standings[head].lanes)
            for head, held in before.positions.items()
            if head in standings
        }
        start = replace(before, positions=now, assignments=ledger, exact_heads=frozenset(), epoch=hub.epoch + 1)
        checkpoint.remove_after(directory, start.version)
        session.checkpoint = start.version
        self._begin(start)
        session.log.record_event("rolled_back", why=why, version=start.version, skipped_batches=skipped)

    def _from_checkpoint(self, versions: list[int]) -> CoordinatorState:
        """The newest of these checkpoints that isn't damaged.

        Raises:
            StorageError: all are.
        """
        session = self._session
        for version in sorted(versions, reverse=True):
            try:
                return load_checkpoint(session.common, session.initial, version, session.common.settings.lte.num_heads)
            except StorageError as error:
                session.log.record_event("storage", why=str(error))
                if version == min(versions):
                    raise
        raise AssertionError("at least one was asked for")

    def _stop(self) -> None:
        """Ends what is left of the coordinator: what was asked of it won't be answered."""
        self._session.hub.stop()
        self._asked, self._pulse, self._late, self._spike = None, ProcessHealth(), (set(), 0.0), None

    def _begin(self, start: CoordinatorState) -> None:
        """Another coordinator begins there, with the heads that the run has now."""
        self._session.rewind(start.version)
        self._session.hub.begin(replace(start, members=self._members()))

    def _check_progress(self, version: int, why: str) -> None:
        """Waits, longer each time, where the last coordinator died before it merged anything.

        Raises:
            CoordinatorLost: so did those before it.
        """
        failures = self._session.failures
        self._stuck = self._stuck + 1 if version == self._began else 0
        self._began = version
        if 0 <= failures.config.head_failures < self._stuck:
            raise CoordinatorLost(f"{why} (it died {self._stuck + 1} times without a merge in between)")
        time.sleep(failures.delay(self._stuck))

    def _members(self) -> frozenset[int]:
        """The heads that belong to the run, whatever an earlier version says: not those that were dropped or quarantined."""
        session = self._session
        numbers = {(number, member.over) for member in session.crew.members for number in member.numbers}
        out = {number for number, status in session.statuses.items() if status.state == "quarantined"}
        return frozenset(number for number, over in numbers if not (over and number in out))

    def _reports(self, epoch: int) -> list[RecoveryReport]:
        """What the heads' processes know; those that don't answer are ended, so that they can't go on with the old one."""
        crew = self._session.crew
        there = [member for member in crew.members if member.actor is not None]
        asked = {member.actor.report.remote(epoch): member for member in there}
        known = [ref for ref, member in asked.items() if member.pulse.answered is not None]
        if known:
            ray.wait(known, num_returns=len(known), timeout=ANSWER)
        answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=STARTED) if asked else ([], [])
        reports = []
        for ref in answered:
            try:
                report = ray.get(ref)
            except ray.exceptions.RayError:
                continue  # its `run` says it, too
            if report is not None:
                reports.append(report)
        for ref in silent:
            member = asked[ref]
            if member.pulse.answered is not None and not member.over:
                self._head_lost(member, HeadLost(f"The process of {member.name} didn't say what it knows within {ANSWER:g} s"))
        return reports

    def _start(self, reports: list[RecoveryReport], epoch: int) -> tuple[CoordinatorState, frozenset[int]]:
        """From where to go on, and the heads that must start anew."""
        session = self._session
        saved = session.checkpoint
        found = recover(reports)
        if found is None or (saved is not None and saved > found.version):
            if saved is None or saved == session.start.version:
                return replace(session.start, epoch=epoch), frozenset()
            start = self._from_checkpoint(
                [v for v in checkpoint.complete_versions(session.common.directory) if v <= saved] or [saved]
            )
            return replace(start, epoch=epoch), frozenset(n for report in reports for n in report.heads)
        references = dict(found.references)
        states: frozenset[int] = frozenset()
        guard: dict[str, Any] = {}
        if saved is not None:
            with contextlib.suppress(StorageError, KeyError, ValueError):
                manifest = checkpoint.read_manifest(session.common.directory, saved)
                states, guard = frozenset(manifest.heads), manifest.facts.get("guard") or {}
                fit = heads_in_checkpoint(found, manifest.facts.get("standings", {}))
                known = checkpoint.read_references(session.common.directory, manifest, session.initial.plans)
                references |= {h: session.common.transport.publish(factors) for h, factors in known.items() if h in fit}
        exact = session.start.exact_heads - found.granted.keys() if found.version == session.start.version else frozenset()
        start = CoordinatorState.from_recovered(
            found,
            references,
            checkpoint_version=saved,
            exact_heads=exact,
            saved_heads=states,
            outlier_filter=guard,
            epoch=epoch,
        )
        return start, found.astray
