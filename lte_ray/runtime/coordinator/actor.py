"""The coordinator's process: a thin shell around `engine.Coordinator`, as an asyncio actor.

No head's call blocks another's: each awaits its own future. The event loop decides by numbers; products are computed in another
thread, or in shards. `status` runs on a loop of its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray

from lte_ray import checkpoint, fault_injection, storage
from lte_ray.config.profile_window import parse_window
from lte_ray.data.assignment import PartitionAssignor
from lte_ray.engine.coordinator.coordinator import Coordinator, EventResult
from lte_ray.errors import HeadLost, WorkerFailed
from lte_ray.fault_injection import inject
from lte_ray.layout import Plan
from lte_ray.messages import (
    CheckpointRequest,
    CommittedPosition,
    Contribution,
    ContributionResult,
    CoordinatorReply,
    JoinReply,
    MergeRecord,
)
from lte_ray.runtime.context import PickledObject, RunContext
from lte_ray.runtime.coordinator.aggregators import Aggregator, LocalAggregator, ShardedAggregator
from lte_ray.runtime.coordinator.background_tasks import BackgroundTasks
from lte_ray.runtime.coordinator.broadcast import Broadcaster
from lte_ray.runtime.coordinator.checkpointing import CheckpointManager
from lte_ray.runtime.coordinator.submissions import SubmissionLoop
from lte_ray.runtime.coordinator_state import CoordinatorState
from lte_ray.runtime.object_store import Handle, at_construction
from lte_ray.runtime.tracing import Tracer

FINISH_PATIENCE = 600.0
"""Seconds to wait at the end of a run for checkpoints that are being written."""

POLL_SECONDS = 0.01
"""Seconds between two checks of what a head that joins waits for."""


@dataclass(frozen=True)
class CoordinatorStatus:
    """What the driver learns when it polls.

    Attributes:
        version: the newest.
        waiting_for: what the merge policy waits for.
        merges: those since the driver last asked.
        checkpoint: the newest complete one.
        needs_evaluator: whether the policy needs the evaluator, and there is none.
        without_data: heads of the run that have joined and wait for data.
        storage_problem: what is wrong with storage; empty if nothing is.
        checkpoint_requests: what heads must write that a reply may not have delivered.
        spike: why the loss counts as having spiked, and the last version before it did.
        refusals: the newest contributions that couldn't be merged, numbered.
    """

    version: int
    waiting_for: str
    merges: tuple[MergeRecord, ...]
    checkpoint: int | None
    needs_evaluator: bool = False
    without_data: tuple[int, ...] = ()
    storage_problem: str = ""
    checkpoint_requests: tuple[CheckpointRequest, ...] = ()
    spike: tuple[str, int] | None = None
    refusals: tuple[tuple[int, ContributionResult], ...] = ()


class CoordinatorActor:
    """Merges, replies to heads, and completes checkpoints.

    Args:
        context: as for every actor.
        plans: each head's, of the model that the driver built.
        policy: the merge policy.
        state: from where the run starts or continues.
        shards: the `ShardActor`s by their number, where merging is spread over several.
    """

    def __init__(
        self,
        context: RunContext,
        plans: tuple[Plan, ...],
        policy: PickledObject,
        state: CoordinatorState,
        shards: Sequence[Any] = (),
    ) -> None:
        fault_injection.arm(context.fault_script)
        inject("coordinator begins", epoch=state.epoch)
        self._context, self._state = context, state
        self._engine = engine = load_engine(context, plans, policy, state, local=not shards)
        self._aggregator: Aggregator = (
            ShardedAggregator(shards, context.codecs(plans), state.version) if shards else LocalAggregator(context, engine)
        )
        self._checkpoints = CheckpointManager(context, plans[0], state.checkpoint_version, state.saved_heads)
        self._tasks = BackgroundTasks(on_failure=self._checkpoints.abandon_all)
        has_momentum = state.momentum is not None
        self._broadcaster = Broadcaster(context, engine, self._aggregator, self._checkpoints, self._tasks, has_momentum)
        self._broadcaster.reachable_heads |= state.step_limits.keys()  # heads that an earlier coordinator had
        self._submissions = SubmissionLoop(context, engine, self._aggregator, self._broadcaster, self._tasks)
        self._tracer = Tracer(context.directory, "coordinator", parse_window(context.settings.train.profile))
        self._joined: set[int] = set()
        # By head, the incarnation that joins, and its call: a call of a process that is gone must not continue.
        self._joining: dict[int, tuple[int, object]] = {}
        # Heads start together where the first would otherwise take the others' steps, or leave the version of their states.
        self._start_together = state.epoch == 0 and (engine.shares_steps or bool(state.exact_heads))
        # Exact states belong to the version that they were saved at: no head trains until all of these have its base.
        self._exact_heads = set(state.exact_heads) if state.epoch == 0 else set()

    # -- heads -----------------------------------------------------------------------------------------------------

    async def join(self, plans: Mapping[int, Plan], incarnation: int, moved: bool = False) -> CoordinatorReply:
        """Heads ask where to start.

        Args:
            plans: of the models that they built, by head.
            incarnation: how often these heads were started before.
            moved: whether they continue on one node what they did on another, so that they keep their factors.

        Raises:
            WorkerFailed: one isn't the model that the driver built.
            HeadLost: the process of these heads was given up meanwhile.
        """
        self._check_plans(plans)
        engine, heads = self._engine, plans.keys()
        call = (incarnation, object())
        self._joining |= dict.fromkeys(heads, call)

        def given_up() -> bool:
            return any(self._joining.get(head) is not call for head in heads)

        async def wait_until(condition: Callable[[], bool]) -> None:
            await self._wait_until(lambda: condition() or given_up())
            if given_up():
                raise HeadLost(f"The process of head {min(heads)} was given up while it joined")

        await wait_until(lambda: not heads & set(engine.pending_heads))  # of a predecessor's: it is still merged
        fresh = incarnation > 0 and self._context.rejoin == "fresh" and not moved
        fresh_heads = {head for head in heads if engine.join(head, incarnation, fresh)}
        for head in fresh_heads:
            self._aggregator.forget_head(head)
        self._joined |= heads
        await wait_until(lambda: not self._start_together or self._joined >= engine.live)
        self._start_together = False
        await wait_until(lambda: all(engine.has_data(head) for head in heads))
        exact, replies = await self._start_heads(heads, incarnation, fresh_heads)
        await wait_until(lambda: True)
        self._broadcaster.reachable_heads |= heads
        reply = replace(await self._broadcaster.reply(tuple(heads), -1), join_replies=replies)
        if exact and reply.version != self._state.version:  # others have just continued
            return await self.join(plans, incarnation, moved)
        self._exact_heads -= heads
        await wait_until(lambda: not self._exact_heads & engine.live)
        return reply

    def _check_plans(self, plans: Mapping[int, Plan]) -> None:
        for head, plan in plans.items():
            expected = self._engine.plans[head]
            if plan != expected:
                differing = sorted(str(e) for e in {*plan.base.entries} ^ {*expected.base.entries})[:4]
                reason = f"build_model() gives another model here than in the driver; they differ in {differing}."
                raise WorkerFailed(f"head {head}", None, reason)

    async def _start_heads(
        self, heads: Collection[int], incarnation: int, fresh_heads: Collection[int]
    ) -> tuple[set[int], dict[int, JoinReply]]:
        """Where each of these heads starts, and those that continue exactly from a checkpoint's state.

        Such a state belongs to that version's base: a head that asks again, since the reply was lost, after others have
        continued starts from what the base holds of it.
        """
        engine, state = self._engine, self._state
        first = incarnation == 0 and state.epoch == 0 and engine.version == state.version
        exact = {head for head in heads if first and head in state.exact_heads}
        starts = {head: engine.positions[head] if head in exact else engine.start_head(head) for head in heads}
        newest, saved = self._checkpoints.newest, self._checkpoints.heads_saved
        saved_in = {head: newest for head in heads if head in saved and head not in fresh_heads}
        replies = {head: JoinReply(starts[head], checkpoint=state.checkpoint_version, exact=True) for head in exact}
        for head in set(heads) - exact:
            reference = await self._broadcaster.publish_reference(head) if starts[head].sequence else None
            replies[head] = JoinReply(starts[head], reference, saved_in.get(head))
        return exact, replies

    async def submit(self, contribution: Contribution, numbers: tuple[int, ...], have: int) -> CoordinatorReply:
        """A head's contribution; the reply comes when it is merged or refused.

        Args:
            contribution: its `buffer` holds a handle for each group.
            numbers: the heads of its process, which follows one version with all of them.
            have: the version from which it can redo merges.

        Raises:
            PolicyError: the merge policy failed; every waiting head gets this error.
        """
        self._tracer.begin(contribution.step - contribution.steps + 1, contribution.step)
        result = await self._submissions.submit(contribution)
        inject("answers", version=self._engine.version)
        reply = replace(await self._broadcaster.reply(numbers, have), result=result)
        self._tracer.end(contribution.step)
        return reply

    async def wait_for_version(self, numbers: tuple[int, ...], version: int, have: int) -> CoordinatorReply:
        """Replies as soon as there is a version newer than `version`, whatever the results of the heads' contributions."""
        await self._submissions.wait_for_version(version)
        return await self._broadcaster.reply(numbers, have)

    async def leave(self, head: int) -> None:
        """A head has ended."""
        self._submissions.handle(lambda: self._engine.leave(head))

    async def lose(self, next_incarnations: Mapping[int, int], drop: bool) -> None:
        """Processes of heads are gone.

        Args:
            next_incarnations: by head, the incarnation after the one that is gone. If that has joined already, this call
                comes too late and changes nothing.
            drop: whether they are gone for good.
        """
        gone = [head for head, following in next_incarnations.items() if self._joining.get(head, (-1, None))[0] < following]
        for head in gone:
            self._broadcaster.reachable_heads.discard(head)
            self._joining.pop(head, None)
            lose: Callable[[int], EventResult] = self._engine.drop if drop else self._engine.lose
            self._submissions.handle(lambda head=head, lose=lose: lose(head))  # type: ignore[misc]
            if drop:
                self._aggregator.forget_head(head)
        for head in gone:
            self._tasks.start(self._checkpoints.drop_head(head))

    async def add_checkpoint_part(self, version: int, head: int, entry: checkpoint.FileEntry | None, why: str = "") -> None:
        """A head has written its part of a checkpoint, or has none to write (`entry` is None), or can't, because of `why`."""
        self._tasks.start(self._checkpoints.add_part(version, head, entry, why))

    # -- the run ---------------------------------------------------------------------------------------------------

    async def use_evaluator(self, evaluator: Any) -> None:
        """Sets the run's evaluator, which the driver starts when it is needed."""
        self._submissions.use_evaluator(evaluator)

    async def freeze(self, early: bool) -> tuple[CheckpointRequest, ...]:
        """Stops merging; heads wait where they are.

        Args:
            early: whether heads are in the middle of a round, so that their states differ from those in a checkpoint of the
                last version.

        Returns:
            The checkpoints that the driver must ask heads to write, including the last version's.
        """
        self._submissions.closing = True
        if self._tasks.failure is not None:
            return ()
        return await self._broadcaster.checkpoint_last_version(early)

    async def data_positions(self) -> tuple[dict[int, CommittedPosition], dict[str, Any]]:
        """What is merged of each head, and which head owns which batches."""
        return dict(self._engine.positions), self._engine.assignment_state()

    async def wait_for_checkpoints(self, limit: float) -> bool:
        """Waits up to `limit` seconds for checkpoints that are being written. Returns whether all are complete."""
        return await self._checkpoints.wait_until_complete(limit)

    async def finish(self) -> tuple[int, Handle, Handle | None, dict[int, Handle], str]:
        """Called when all heads have ended: waits for the last checkpoint.

        Returns:
            The final version, its base, its moving average (None if there is none), by head the adapters where nothing is
            merged, and what was wrong with the last
            checkpoint (empty if nothing).

        Raises:
            PolicyError: the merge policy failed.
        """
        version, checkpoints, tasks = self._engine.version, self._checkpoints, self._tasks
        inject("finishes", version=version)
        self._tracer.end()
        independent = self._context.settings.merge.never_merge
        published = await self._aggregator.publish_base(complete=independent)
        end = time.monotonic() + FINISH_PATIENCE
        while (tasks.busy or checkpoints.unfinished) and tasks.failure is None and time.monotonic() < end:
            await asyncio.sleep(POLL_SECONDS)
        if tasks.failure is not None:
            raise tasks.failure
        problem = checkpoints.problem
        if checkpoints.unfinished:
            problem = (
                f"The checkpoints of versions {checkpoints.unfinished} weren't complete within {FINISH_PATIENCE:g} s: a head's "
                f"part is missing, or {self._context.directory.display} is too slow."
            )
        adapters = published.references if independent else {}
        return version, published.parts[-1], published.ema.get(-1), adapters, problem

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            if self._tasks.failure is not None:
                raise self._tasks.failure
            await asyncio.sleep(POLL_SECONDS)

    @ray.method(concurrency_group="ctl")
    async def status(self, seen: int) -> CoordinatorStatus:
        """What has happened after version `seen`. Merges are forgotten here once they are seen.

        Runs in another thread than the event loop, so it only reads, and remembers which heads the driver asks.
        """
        engine, broadcaster, reachable = self._engine, self._broadcaster, self._broadcaster.reachable_heads
        return CoordinatorStatus(
            version=engine.version,
            waiting_for=engine.waiting_for,
            merges=broadcaster.merges_after(seen),
            checkpoint=self._checkpoints.newest,
            needs_evaluator=self._submissions.needs_evaluator,
            without_data=tuple(h for h in tuple(self._joined) if h in engine.members and not engine.has_data(h)),
            storage_problem=storage.pending_problem() or self._checkpoints.problem,
            checkpoint_requests=self._checkpoints.requests_by_driver(heads=reachable - engine.live, late=reachable),
            spike=broadcaster.spike,
            refusals=tuple(broadcaster.refusals),
        )


def load_engine(
    context: RunContext, plans: tuple[Plan, ...], policy: PickledObject, state: CoordinatorState, local: bool
) -> Coordinator:
    """The engine's coordinator from that state; without tensors unless they are `local`."""
    with at_construction():  # copies: fetched tensors are shared and read-only
        base = context.transport.fetch(state.base).clone() if local else None
        momentum, residual, ema = (
            context.transport.fetch(handle).clone() if local and handle is not None else None
            for handle in (state.momentum, state.residual, state.ema)
        )
        factors = state.references.items() if local else ()
        references = {head: context.transport.fetch(handle).clone() for head, handle in factors}
    engine = Coordinator(
        context.settings,
        plans[0],
        base,
        policy.load(),
        plans=plans,
        version=state.version,
        references=references,
        momentum=momentum,
        residual=residual,
        ema=ema,
        taken=state.steps_by_head,
        granted=state.step_limits,
        positions=state.positions,
        fresh=set(range(len(plans))) - state.references.keys(),
        members=state.members,
        assignor=PartitionAssignor.from_state(state.assignment_state) if state.assignment_state else None,
    )
    if state.outlier_filter:
        engine.load_outlier_state(state.outlier_filter)
    if state.checkpoint_version is not None:
        manifest = checkpoint.read_manifest(context.directory, state.checkpoint_version)
        tensors = checkpoint.read_policy(context.directory, manifest, context.settings.merge.policy)
        if tensors:
            engine.load_policy_state(tensors)
    return engine
