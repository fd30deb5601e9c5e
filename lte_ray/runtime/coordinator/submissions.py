"""The event loop around the engine: contributions and other events go in, and their results go to the callers that wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from torch import Tensor

from lte_ray.engine.coordinator.coordinator import Coordinator, EventResult
from lte_ray.engine.process_tuning import torch_threads
from lte_ray.errors import LTEError
from lte_ray.fault_injection import inject
from lte_ray.messages import Contribution, ContributionResult
from lte_ray.runtime.context import RunContext
from lte_ray.runtime.coordinator.aggregators import Aggregator
from lte_ray.runtime.coordinator.background_tasks import BackgroundTasks
from lte_ray.runtime.coordinator.broadcast import Broadcaster
from lte_ray.runtime.object_store import ObjectLost
from lte_ray.runtime.ray_errors import PROCESS_DIED

POLL_SECONDS = 0.05
"""Seconds between two checks whether a contribution that was sent twice has arrived."""

STALE_SECONDS = 1.0
"""Seconds until a contribution that is refused by its numbers alone gets its answer."""


@dataclass(eq=False)
class _Submission:
    """A contribution whose head waits for the result, and the ticket under which its tensors are kept."""

    ticket: int
    contribution: Contribution
    result: asyncio.Future[ContributionResult]


class SubmissionLoop:
    """Drives the engine's coordinator on one event loop. Events are handled without blocking one another.

    Args:
        context: as for every actor.
        engine: decides.
        aggregator: holds the tensors.
        broadcaster: publishes merges.
        tasks: of this process.
    """

    def __init__(
        self,
        context: RunContext,
        engine: Coordinator,
        aggregator: Aggregator,
        broadcaster: Broadcaster,
        tasks: BackgroundTasks,
    ) -> None:
        self._engine, self._aggregator, self._broadcaster, self._tasks = engine, aggregator, broadcaster, tasks
        self._transport, self._threads = context.transport, context.merge_threads(engine.plan, engine.plan)
        self._tickets = 0
        self._undecided: dict[int, _Submission] = {}  # by head
        self._arriving: dict[int, tuple[int, int]] = {}  # by head, the incarnation and sequence of what is being fetched
        self._version_waits: list[tuple[int, asyncio.Future[None]]] = []
        self._evaluator: Any = None
        self._evaluator_ready = asyncio.Event()
        self._trying = False
        self._alarm: asyncio.TimerHandle | None = None
        self.closing = False
        """Once set, no further decisions are made; pending submissions stay pending."""

    async def submit(self, contribution: Contribution) -> ContributionResult:
        """The result of a contribution; one that is sent again is merged once.

        Args:
            contribution: its `buffer` holds a handle for each group.

        Raises:
            PolicyError: the merge policy failed; every waiting head gets this error.
        """
        c = contribution
        while (c.incarnation, c.sequence) == self._arriving.get(c.head):  # the same, sent before its reply was lost
            await asyncio.sleep(POLL_SECONDS)
        earlier = self._undecided.get(c.head)
        if earlier is not None and (c.incarnation, c.sequence) == (
            earlier.contribution.incarnation,
            earlier.contribution.sequence,
        ):
            return await asyncio.shield(earlier.result)
        merged = self._engine.merged_result(c)
        if merged is not None:
            return merged
        self._tickets += 1
        submission = _Submission(self._tickets, c, self._tasks.create_future())
        refusal = self._engine.refuse_by_numbers(c)
        if refusal is None:
            self._arriving[c.head] = (c.incarnation, c.sequence)
            try:
                await self._receive(submission)
            finally:
                self._arriving.pop(c.head, None)
        else:  # no need to fetch it; the head that has this number now isn't affected
            self.handle(lambda: refusal, submission)
            # A process that was given up while its network was cut doesn't know it: it would contribute again at once.
            await asyncio.sleep(STALE_SECONDS)
        return await submission.result

    async def _receive(self, submission: _Submission) -> None:
        """Fetches a contribution and gives it to the engine, which checks its numbers again: heads may have left meanwhile."""
        engine, c = self._engine, submission.contribution
        try:
            buffer = await self._aggregator.receive(submission.ticket, c.head, c.buffer, c.checksums)
            inject("arrived", version=engine.version)
        except ValueError as error:
            reason = f"it can't be decoded: {error}"
            self.handle(lambda: engine.reject(c, reason, harmful=False), submission)
        except ObjectLost as error:  # its head has died
            reason = f"it can't be fetched: {error}"
            self.handle(lambda: engine.refuse(c, reason), submission)
        else:
            self.handle(lambda: engine.receive(c, buffer), submission)

    async def wait_for_version(self, after: int) -> None:
        """Waits for a version newer than `after`."""
        if self._engine.version <= after:
            future = self._tasks.create_future()
            self._version_waits.append((after, future))
            await future

    def handle(self, event: Callable[[], EventResult], submission: _Submission | None = None) -> None:
        """Gives an event to the engine, and its results to the callers that wait for them.

        Args:
            event: a call of the engine.
            submission: the contribution that the event is about.
        """
        if self.closing:
            return
        try:
            if self._tasks.failure is not None:
                raise self._tasks.failure
            with torch_threads(self._threads):
                event_result = event()
            inject("decided", version=self._engine.version)
            self._deliver(event_result, submission)
            self._serve_policy()
        except Exception as error:
            self._tasks.fail(error)

    def _deliver(self, event_result: EventResult, submission: _Submission | None) -> None:
        results = list(event_result.results)
        if submission is not None:
            refusal = event_result.refusal(submission.contribution)
            if refusal is None:
                self._undecided[submission.contribution.head] = submission
            else:
                results.remove(refusal)
                self._aggregator.discard(submission.ticket)
                submission.result.set_result(refusal)
                self._broadcaster.record_refusal(refusal)
        decided = [(result, self._undecided.pop(result.head)) for result in results]
        if event_result.merges:
            buffers = {s.contribution.head: s.contribution.buffer for _, s in decided}
            self._broadcaster.publish_merges(event_result.merges, buffers, {s.contribution.head: s.ticket for _, s in decided})
            self._release_version_waits()
        for result, each in decided:
            if not result.accepted:
                self._aggregator.discard(each.ticket)
            if not each.result.done():  # else the run has failed
                each.result.set_result(result)

    def _release_version_waits(self) -> None:
        for version, future in self._version_waits:
            if version < self._engine.version and not future.done():
                future.set_result(None)
        self._version_waits = [(version, future) for version, future in self._version_waits if not future.done()]

    # -- what the policy waits for -----------------------------------------------------------------------------------

    @property
    def needs_evaluator(self) -> bool:
        """Whether the policy tries a base and there is no evaluator."""
        return self._trying and self._evaluator is None

    def use_evaluator(self, evaluator: Any) -> None:
        """Sets the run's evaluator."""
        self._evaluator = evaluator
        self._evaluator_ready.set()

    def _serve_policy(self) -> None:
        """Sets the alarm for the time at which the policy wants to be asked, and has the base that it tries evaluated."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if self._engine.wakes_at is not None:
            delay = max(0.0, self._engine.wakes_at - time.monotonic())
            self._alarm = asyncio.get_running_loop().call_later(delay, self.handle, self._engine.tick)
        if self._engine.candidate is not None and not self._trying:
            self._trying = True
            self._tasks.start(self._evaluate(self._engine.candidate))

    async def _evaluate(self, candidate: Tensor) -> None:
        handle = self._transport.publish(candidate)
        await self._evaluator_ready.wait()
        try:
            values = await self._evaluator.evaluate.remote(handle)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, LTEError) else error) from None
        except PROCESS_DIED:  # the driver starts another
            self._evaluator = None
            self._evaluator_ready.clear()
            await self._evaluate(candidate)
            return
        self._trying = False
        self.handle(lambda: self._engine.receive_evaluation(values))
