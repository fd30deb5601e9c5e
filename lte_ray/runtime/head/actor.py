"""A process of one head or several: a thin shell around `engine.HeadGroup`. `ray.remote` is applied in `crew`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray
import torch
from torch import Tensor

from lte_ray import fault_injection, storage
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.virtual import HeadGroup, Unstackable
from lte_ray.engine.process_tuning import keep_freed_memory, release_freed_memory
from lte_ray.errors import WorkerError, WorkerFailed
from lte_ray.fault_injection import inject
from lte_ray.layout import Plan
from lte_ray.messages import CheckpointRequest, ContributionResult, CoordinatorReply, HeadReport, HeadStatus, RecoveryReport
from lte_ray.runtime.context import RunContext
from lte_ray.runtime.head.checkpointing import HeadCheckpointer
from lte_ray.runtime.head.client import CoordinatorClient, ReceivedReply, ReconnectingStub
from lte_ray.storage import RUN

T = TypeVar("T")

MAX_DROPPED = 8
"""Contributions that were dropped as poison, of which a head's status tells."""

POLL_SECONDS = 0.2
"""Seconds after which a head that waits looks whether it is asked for anything."""


@dataclass(frozen=True)
class HeadHost:
    """How an actor computes: torch's threads in each lane, lanes, whether it has a GPU, and whether its heads are stacked."""

    threads: int
    concurrent_heads: int
    gpu: bool
    stack_heads: str = "auto"


class HeadActor:
    """Hosts one head or several. `run` trains to the end; all else is answered meanwhile, from another thread.

    Args:
        common: as every actor.
        plans: each head's.
        numbers: of the heads here.
        host: how it computes.
        incarnation: how often these heads were started before.
    """

    def __init__(
        self, context: RunContext, plans: tuple[Plan, ...], numbers: tuple[int, ...], host: HeadHost, incarnation: int = 0
    ) -> None:
        fault_injection.arm(context.fault_script)
        inject("begins", head=numbers[0], incarnation=incarnation)
        self._context, self._plans, self._numbers, self._host = context, plans, numbers, host
        self._incarnation = incarnation
        self._device = "cuda:0" if host.gpu else "cpu"  # Ray shows each actor its own GPUs only, counted from 0
        self._group: HeadGroup | None = None
        self._client: CoordinatorClient | None = None
        self._stub: ReconnectingStub | None = None
        self._newest_coordinator: tuple[Any, int] | None = (
            None  # the coordinator that answers, and how many there were before it
        )
        self._checkpointer = HeadCheckpointer(context.directory)
        self._left: set[int] = set()
        self._quarantined: dict[int, str] = {}  # and why
        self._round_steps = dict.fromkeys(numbers, context.settings.merge.merge_iter)  # local steps of a round
        self._refused = dict.fromkeys(numbers, 0)
        self._dropped: dict[int, tuple[tuple[int, int], ...]] = dict.fromkeys(numbers, ())
        self._missing_state = ""

    def run(self, coordinator: Any, epoch: int = 0) -> tuple[HeadStatus, ...]:
        """Trains all local steps of its heads, contributing and rebasing on the way.

        Args:
            coordinator: its handle; `connect` gives another one.
            epoch: how many there were before it.

        Raises:
            WorkerFailed: the worker's code raised.
            PolicyError: the merge policy failed.
        """
        torch.set_num_threads(self._host.concurrent_heads * self._host.threads)
        keep_freed_memory()
        wait = self._context.settings.merge.wait
        self._stub = stub = ReconnectingStub(coordinator, epoch)
        if self._newest_coordinator is not None and self._newest_coordinator[1] > epoch:  # it was connected before this began
            stub.connect(*self._newest_coordinator)
        client = self._client = CoordinatorClient(self._context, self._plans, self._numbers, stub, overlap=not wait)
        group = self._group = self._start_heads(client)
        self._leave_if_ended(group, client)
        while any(not self._has_ended(head) or client.awaits_reply(head) for head in group.heads):
            self._run_once(group, client)
            self._leave_if_ended(group, client)
        self._checkpointer.end_training(group, client)
        return self._statuses(group, client)

    def _has_ended(self, head: Head) -> bool:
        return head.finished or head.number in self._quarantined

    def _statuses(self, group: HeadGroup, client: CoordinatorClient) -> tuple[HeadStatus, ...]:
        count, mirror = len(group.heads), client.base_replica
        waiting = self._stub.seconds_waiting if self._stub is not None else 0.0
        note = (
            f"no coordinator for {waiting:.0f} s"
            if waiting > 1
            else storage.pending_problem() or group.sequential_reason or self._missing_state
        )
        return tuple(
            replace(
                head.status(),
                state="quarantined" if head.number in self._quarantined else head.status().state,
                bytes_up=client.bytes_up[head.number],
                bytes_down=mirror.bytes_fetched // count,
                resyncs=mirror.resyncs,
                refused=self._refused[head.number],
                dropped=self._dropped[head.number],
                note=self._quarantined.get(head.number) or note,
            )
            for head in group.heads
        )

    def _start_heads(self, client: CoordinatorClient) -> HeadGroup:
        common, first = self._context, self._numbers[0]
        if self._device != "cpu" and not torch.cuda.is_available():
            reason = "Ray gave this head a GPU, but the torch installed on its node can't use it (no CUDA)."
            raise WorkerFailed(f"head {first}", None, reason)
        try:
            worker = common.worker.load()
        except WorkerError as error:
            raise WorkerFailed(f"head {first}", None, str(error)) from error
        if not common.directory.exists(RUN):
            reason = (
                f"{common.directory.display} isn't seen from the node of this head. On several nodes --storage must be a place "
                "that all of them share (s3://, gs://, NFS)."
            )
            raise WorkerFailed(f"head {first}", None, reason)
        try:
            host = self._host
            group = HeadGroup(
                worker,
                common.settings,
                self._numbers,
                device=self._device,
                stack_heads=host.stack_heads,
                concurrent_heads=host.concurrent_heads,
                threads=host.threads,
                incarnation=self._incarnation,
            )
        except Unstackable as error:
            raise WorkerFailed(f"head {first}", None, str(error)) from error
        for head in group.heads:
            head.interrupted = lambda: self._checkpointer.snapshot_requested
        inject("built", head=first)
        arrived = client.join({head.number: head.plan for head in group.heads}, self._incarnation)
        assert arrived.base is not None
        base, update = self._copy_if_kept(group, arrived.base), arrived.reply
        for head in group.heads:
            self._missing_state = self._checkpointer.start_head(head, update, base, common) or self._missing_state
            client.record_start(head, head.state.reference)
        client.release_base(group.heads[0])
        self._apply_directives(group, update)
        release_freed_memory()
        inject("started", head=first)
        return group

    def _leave_if_ended(self, group: HeadGroup, client: CoordinatorClient) -> None:
        """Heads that have taken all their steps, and whose steps are all merged, leave, so that nobody waits for them."""
        for head in group.heads:
            if self._has_ended(head) and head.number not in self._left and not client.awaits_reply(head):
                inject("leaving", head=head.number)
                client.leave(head.number)
                self._left.add(head.number)
                head.mark_done()

    def _run_once(self, group: HeadGroup, client: CoordinatorClient) -> None:
        """Takes what has come, trains the heads that may, hands over what is due, and waits if there is nothing else to do.

        Heads that wait take a whole round of steps; others one step, so that what comes is adopted in between. Several that
        share main weights take turns on them, so they change rounds, not steps.
        """
        merge = self._context.settings.merge
        self._adopt_replies(group, client, client.received_replies())
        self._checkpointer.take_requested_snapshots(group, client)
        alone, todo = len(group.heads) == 1, {}
        for head in group.heads:
            if self._has_ended(head) or (merge.wait and (head.outstanding or client.awaits_reply(head))):
                continue
            every = self._round_steps[head.number]
            todo[head.number] = max(0, every - head.steps_since_contribution) if merge.wait else 1 if alone else every
        group.train(todo)
        if not merge.wait:
            client.request_newer_base(group.heads[0], group.heads[0].version + merge.max_lag)
        for head in group.heads:
            if todo.get(head.number):
                inject("stepped", head=head.number, step=head.step)
            due = head.steps_since_contribution >= self._round_steps[head.number] or (
                head.steps_left == 0 and not head.finished
            )
            if due and not self._has_ended(head) and not head.outstanding and not client.awaits_reply(head):
                contribution = head.contribute()
                inject("contributes", head=head.number, step=head.step)
                with head.timer.measure("publish"):
                    client.send(head, contribution)
        stands = [head for head in group.heads if not self._has_ended(head) or client.awaits_reply(head)]
        if stands and all(head.outstanding if merge.wait else head.steps_left == 0 for head in stands):
            self._wait_for_reply(group, client, stands)

    def _wait_for_reply(self, group: HeadGroup, client: CoordinatorClient, heads: list[Head]) -> None:
        """Until something comes, or something is asked."""
        with ExitStack() as waiting:
            for head in heads:  # they wait together: the actor's time counts once
                waiting.enter_context(head.timer.measure("wait", 1 / len(heads)))
            arrived = client.received_replies(timeout=POLL_SECONDS)
        self._adopt_replies(group, client, arrived)
        while any(client.awaits_reply(head) and not head.outstanding for head in heads) and self._context.settings.merge.wait:
            self._adopt_replies(
                group, client, client.received_replies(timeout=POLL_SECONDS)
            )  # merged with another's: theirs come at once

    def _adopt_replies(self, group: HeadGroup, client: CoordinatorClient, all_arrived: list[ReceivedReply]) -> None:
        for arrived in all_arrived:
            self._adopt_reply(group, client, arrived)

    def _adopt_reply(self, group: HeadGroup, client: CoordinatorClient, arrived: ReceivedReply) -> None:
        """Takes an update: all heads here follow its version, each with what that holds of its own."""
        update, base = arrived.reply, arrived.base
        inject("adopts", head=group.heads[0].number, step=group.heads[0].step, version=update.version)
        for save in update.checkpoint_requests:
            self._checkpointer.take_snapshot(group, client, save)
        self._apply_directives(group, update)
        if update.result is not None:
            self._handle_refusal(group.get(update.result.head), update.result)
        if base is not None:
            base = self._copy_if_kept(group, base)
            for head in group.heads:
                accepted = head.outstanding and update.includes(head.number, head.sequence)
                verdict = ContributionResult(head.number, head.sequence, True, update.version) if accepted else None
                head.adopt(verdict, update.version, base, arrived.staged if accepted == arrived.accepted else None)
            client.release_base(group.heads[0])
        inject("adopted", head=group.heads[0].number, step=group.heads[0].step, version=update.version)

    def _apply_directives(self, group: HeadGroup, update: CoordinatorReply) -> None:
        for head in group.heads:
            if head.number in self._left:  # nobody takes anything of it any more
                continue
            head.apply_directive(update.directives[head.number])
            self._round_steps[head.number] = update.directives[head.number].steps

    def _handle_refusal(self, head: Head, verdict: ContributionResult) -> None:
        """A refused contribution is settled: what it held rides in the next one, or the head has dropped it."""
        if verdict.accepted or not head.outstanding or verdict.sequence != head.sequence:
            return
        head.adopt(verdict, head.version, None)
        if verdict.discarded:  # as the policy wants it
            return
        self._refused[head.number] += 1
        if verdict.harmful and self._stub is not None:
            self._dropped[head.number] = (*self._dropped[head.number], (self._stub.epoch, verdict.sequence))[-MAX_DROPPED:]
        if verdict.quarantined:
            self._quarantined[head.number] = (
                f"quarantined, since its contributions were refused again and again: {verdict.reason}"
            )

    def _copy_if_kept(self, group: HeadGroup, base: Tensor) -> Tensor:
        """The base as the heads may keep it: heads that take turns do, and the mirror writes to its own."""
        groups = self._context.groups
        return base.clone() if len(group.heads) > 1 and (len(groups) > 1 or groups[0].by_factors) else base

    # -- asked from outside --------------------------------------------------------------------------------------------

    @ray.method(concurrency_group="ctl")
    def status(self) -> tuple[HeadStatus, ...]:
        """The heads' progress, at any time."""
        if self._group is None or self._client is None:
            return tuple(HeadStatus(head=number, device=self._device) for number in self._numbers)
        return self._statuses(self._group, self._client)

    @ray.method(concurrency_group="ctl")
    def save(self, save: CheckpointRequest) -> bool:
        """The heads are to write their state into this checkpoint as soon as they are between two steps; whether they can."""
        if self._group is None or self._client is None:
            return False
        self._checkpointer.request_snapshot(save, self._group, self._client)
        return True

    @ray.method(concurrency_group="ctl")
    def report(self, epoch: int) -> RecoveryReport | None:
        """What this process knows of the run; None if that is nothing. Coordinators before `epoch` don't count any more."""
        group, client = self._group, self._client
        if client is None:
            if self._stub is not None:
                self._stub.disconnect(epoch)
            return None
        positions = {
            head.number: HeadReport(
                head.step,
                head.step_limit,
                head.batch_stream.assignment_id,
                head.batch_stream.revoked.id if head.batch_stream.revoked else 0,
            )
            for head in (group.heads if group is not None else [])
        }
        return client.report(positions, epoch)

    @ray.method(concurrency_group="ctl")
    def connect(self, coordinator: Any, epoch: int) -> None:
        """Another coordinator answers from now on."""
        self._newest_coordinator = (coordinator, epoch)
        if self._stub is not None:
            self._stub.connect(coordinator, epoch)

    @ray.method(concurrency_group="ctl")
    def inspect(self, function: Callable[[HeadGroup], T]) -> T | None:
        """What `function` says of the engine's heads (for tests and debugging); None before there are any."""
        return None if self._group is None else function(self._group)
