"""The merging side of the coordinator's process: events go to the engine, and what it decides to those who wait for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from torch import Tensor

from lte_ray.engine.coordinator.coordinator import Coordinator, StepResult
from lte_ray.engine.process_tuning import torch_threads
from lte_ray.errors import LTEError
from lte_ray.fault_injection import inject
from lte_ray.messages import Contribution, ContributionResult
from lte_ray.runtime.coordinator.aggregators import Aggregator
from lte_ray.runtime.coordinator.background_tasks import BackgroundTasks
from lte_ray.runtime.coordinator.broadcast import Records
from lte_ray.runtime.object_store import Handle, ObjectLost, Transport
from lte_ray.runtime.ray_errors import PROCESS_DIED

AGAIN = 0.05
"""Seconds between two looks whether a contribution that was sent twice has arrived."""


@dataclass(eq=False)
class _Submission:
    """A contribution that a head waits to hear of: its ticket, its buffers, and the verdict."""

    ticket: int
    contribution: Contribution
    handles: tuple[Handle, ...]
    answer: asyncio.Future[ContributionResult]


class SubmissionLoop:
    """Drives the engine's coordinator on one event loop, where nobody's event waits for anybody else's.

    Args:
        engine: decides.
        masters: where the tensors are.
        records: makes merges known.
        waiters: of this process.
        transport: for what a policy tries.
        threads: that torch uses while the engine decides.
    """

    def __init__(
        self,
        engine: Coordinator,
        masters: Aggregator,
        records: Records,
        waiters: BackgroundTasks,
        transport: Transport,
        threads: int,
    ) -> None:
        self._engine, self._masters, self._records, self._waiters = engine, masters, records, waiters
        self._transport, self._threads = transport, threads
        self._tickets = 0
        self._undecided: dict[int, _Submission] = {}  # by head
        self._arriving: dict[int, tuple[int, int]] = {}  # by head, the incarnation and sequence of what is being fetched
        self._behind: list[tuple[int, asyncio.Future[None]]] = []  # who waits for a version
        self._evaluator: Any = None
        self._evaluator_there = asyncio.Event()
        self._trying = False
        self._alarm: asyncio.TimerHandle | None = None
        self.closing = False
        """Nothing is decided any more, and whoever waits waits on."""

    async def submit(self, contribution: Contribution) -> ContributionResult:
        """The verdict on a contribution (`buffer` holds a handle for each group); one that is sent again is merged once.

        Raises:
            PolicyError: the merge policy failed; every waiting head is told.
        """
        c = contribution
        while (c.incarnation, c.sequence) == self._arriving.get(c.head):  # the same, sent before its answer was lost
            await asyncio.sleep(AGAIN)
        before = self._undecided.get(c.head)
        if before is not None and (before.contribution.incarnation, before.contribution.sequence) == (
            c.incarnation,
            c.sequence,
        ):
            return await asyncio.shield(before.answer)
        settled = self._engine.merged_result(c)
        if settled is not None:
            return settled
        self._tickets += 1
        own = _Submission(self._tickets, contribution, contribution.buffer, self._waiters.create_future())
        refusal = self._engine.check_numbers(contribution)
        if refusal is not None:  # no need to fetch it; the head that holds that number now isn't affected
            self.handle(lambda: refusal, own)
            return await own.answer
        self._arriving[c.head] = (c.incarnation, c.sequence)
        try:
            arrived = await self._masters.receive(own.ticket, contribution.head, own.handles, contribution.checksums)
            inject("arrived", version=self._engine.version)
        except ValueError as error:
            reason = f"it can't be decoded: {error}"
            self.handle(lambda: self._engine.reject(contribution, reason, harmful=False), own)
        except ObjectLost as error:  # its head has died
            reason = f"it can't be fetched: {error}"
            self.handle(lambda: self._engine.refuse(contribution, reason), own)
        else:
            self.handle(lambda: self._engine.receive(contribution, arrived), own)
        finally:
            self._arriving.pop(c.head, None)
        return await own.answer

    async def wait_for_version(self, version: int) -> None:
        """Waits for a version newer than that."""
        if self._engine.version <= version:
            waiting = self._waiters.create_future()
            self._behind.append((version, waiting))
            await waiting

    def handle(self, event: Callable[[], StepResult], own: _Submission | None = None) -> None:
        """Gives an event to the engine; tells everybody whom its outcome concerns.

        Args:
            own: the contribution that the event is about.
        """
        if self.closing:
            return
        try:
            if self._waiters.failure is not None:
                raise self._waiters.failure
            with torch_threads(self._threads):
                outcome = event()
            inject("decided", version=self._engine.version)
            self._carry_out(outcome, own)
            self._wake()
        except Exception as error:
            self._waiters.fail(error)

    def _carry_out(self, outcome: StepResult, own: _Submission | None) -> None:
        settled = list(outcome.results)
        if own is not None:
            refused = outcome.refusal(own.contribution)
            if refused is None:
                self._undecided[own.contribution.head] = own
            else:
                settled.remove(refused)
                self._masters.discard(own.ticket)
                own.answer.set_result(refused)
                self._records.refused(refused)
        decided = [(verdict, self._undecided.pop(verdict.head)) for verdict in settled]
        if outcome.merges:
            self._note(outcome, [submission for _, submission in decided])
        for verdict, submission in decided:
            if not verdict.accepted:
                self._masters.discard(submission.ticket)
            if not submission.answer.done():  # else the run has failed
                submission.answer.set_result(verdict)

    def _note(self, outcome: StepResult, decided: Sequence[_Submission]) -> None:
        buffers = {s.contribution.head: s.handles for s in decided}
        self._records.note(outcome.merges, buffers, {s.contribution.head: s.ticket for s in decided})
        for version, waiting in self._behind:
            if version < self._engine.version and not waiting.done():
                waiting.set_result(None)
        self._behind = [(version, waiting) for version, waiting in self._behind if not waiting.done()]

    # -- what the policy waits for -----------------------------------------------------------------------------------

    @property
    def needs_evaluator(self) -> bool:
        """Whether the policy tries a base and nobody is there to judge it."""
        return self._trying and self._evaluator is None

    def use_evaluator(self, evaluator: Any) -> None:
        """The run's evaluator."""
        self._evaluator = evaluator
        self._evaluator_there.set()

    def _wake(self) -> None:
        """Sets the alarm for the time at which the policy wants to be asked, and publishes what it tries."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if self._engine.wakes_at is not None:
            left = max(0.0, self._engine.wakes_at - time.monotonic())
            self._alarm = asyncio.get_running_loop().call_later(left, self.handle, self._engine.tick)
        if self._engine.candidate is not None and not self._trying:
            self._trying = True
            self._waiters.start(self._try(self._engine.candidate))

    async def _try(self, candidate: Tensor) -> None:
        """Has the base that the policy tries evaluated."""
        handle = self._transport.publish(candidate)
        await self._evaluator_there.wait()
        try:
            values = await self._evaluator.evaluate.remote(handle)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, LTEError) else error) from None
        except PROCESS_DIED:  # the driver starts another
            self._evaluator = None
            self._evaluator_there.clear()
            await self._try(candidate)
            return
        self._trying = False
        self.handle(lambda: self._engine.receive_evaluation(values))
