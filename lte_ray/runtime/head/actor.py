"""The actor of one head or several: it trains them to the end, around the engine's `HeadGroup`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import ray
import torch
from torch import Tensor

from lte_ray import fault_injection, storage
from lte_ray.checkpoint import FileEntry
from lte_ray.config.profile_window import parse_window
from lte_ray.engine.gpu_memory import explaining_limit, limit_gpu_memory
from lte_ray.engine.head.early_end import EarlyEnd
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
from lte_ray.runtime.tracing import Tracer
from lte_ray.storage import RUN

T = TypeVar("T")

MAX_DROPPED = 8
"""Contributions that a head has dropped as harmful and that its status lists: the newest."""

POLL_SECONDS = 0.2
"""Seconds after which a waiting head checks for requests."""


@dataclass(frozen=True)
class HeadHost:
    """How an actor computes.

    Attributes:
        threads: torch's, for each head that trains concurrently.
        concurrent_heads: how many heads train concurrently.
        gpu: whether the actor has a GPU.
        stack_heads: as `HeadGroup`.
        gpu_memory: part of the GPU's memory that the actor may use; 1: no limit.
    """

    threads: int
    concurrent_heads: int
    gpu: bool
    stack_heads: str = "auto"
    gpu_memory: float = 1.0


@dataclass(frozen=True)
class HeadsEnd:
    """How the heads of a process have ended.

    Attributes:
        statuses: their last ones.
        moves: whether they have steps left, and have left only to go on on another node.
        states: of those that move, the files of their states.
    """

    statuses: tuple[HeadStatus, ...]
    moves: bool = False
    states: Mapping[int, FileEntry] = field(default_factory=dict)


class HeadActor:
    """Hosts one head or several. `run` trains to the end; all other methods answer meanwhile, in other threads.

    Args:
        context: the run's.
        plans: each head's.
        numbers: of the heads of this actor.
        host: how it computes.
        incarnation: how often these heads were started before.
        moved: what `HeadsEnd.states` of their last process says, if they have moved here from another node; else None.
    """

    def __init__(
        self,
        context: RunContext,
        plans: tuple[Plan, ...],
        numbers: tuple[int, ...],
        host: HeadHost,
        incarnation: int = 0,
        moved: Mapping[int, FileEntry] | None = None,
    ) -> None:
        fault_injection.arm(context.fault_script)
        inject("begins", head=numbers[0], incarnation=incarnation)
        self._context, self._plans, self._numbers, self._host = context, plans, numbers, host
        self._incarnation, self._has_moved = incarnation, moved is not None
        self._device = "cuda:0" if host.gpu else "cpu"  # Ray shows each actor its own GPUs only, counted from 0
        self._group: HeadGroup | None = None
        self._client: CoordinatorClient | None = None
        self._stub: ReconnectingStub | None = None
        self._newest_coordinator: tuple[Any, int] | None = None  # its handle, and its epoch
        self._checkpointer = HeadCheckpointer(context.directory, moved or {})
        self._early_end = EarlyEnd()
        window = parse_window(context.settings.train.profile) if numbers[0] == 0 else None
        self._tracer = Tracer(context.directory, "head-0", window)
        self._left: set[int] = set()
        self._quarantined: dict[int, str] = {}  # and why
        self._round_steps = dict.fromkeys(numbers, context.settings.merge.steps_between(0))
        self._refused = dict.fromkeys(numbers, 0)
        self._dropped: dict[int, tuple[tuple[int, int], ...]] = dict.fromkeys(numbers, ())
        self._missing_state = ""  # what the heads had to start without, in words

    def run(self, coordinator: Any, epoch: int = 0) -> HeadsEnd:
        """Trains all local steps of the heads, contributing and rebasing on the way; ends before if the heads must leave.

        Args:
            coordinator: its handle; `connect` passes another one.
            epoch: how many coordinators there were before it.

        Raises:
            WorkerFailed: the worker's code raised.
            PolicyError: the merge policy failed.
        """
        torch.set_num_threads(self._host.concurrent_heads * self._host.threads)
        keep_freed_memory()
        self._stub = stub = ReconnectingStub(coordinator, epoch)
        if self._newest_coordinator is not None and self._newest_coordinator[1] > epoch:  # `connect` came before `run`
            stub.connect(*self._newest_coordinator)
        overlap = not self._context.settings.merge.wait
        client = self._client = CoordinatorClient(self._context, self._plans, self._numbers, stub, overlap)
        with explaining_limit(self._host.gpu_memory, "This process of heads"):
            return self._train(client)

    def _train(self, client: CoordinatorClient) -> HeadsEnd:
        group = self._group = self._start_heads(client)
        self._leave_if_ended(group, client)
        while any(not self._has_ended(head) or client.awaits_reply(head) for head in group.heads):
            self._run_once(group, client)
            self._leave_if_ended(group, client)
        self._tracer.end()
        self._checkpointer.end_training(group, client)
        moves = self._early_end.leaving and any(not self._has_ended(head, for_good=True) for head in group.heads)
        return HeadsEnd(self._statuses(group, client), moves, self._checkpointer.moved_states())

    # -- starting --------------------------------------------------------------------------------------------------------

    def _start_heads(self, client: CoordinatorClient) -> HeadGroup:
        first = self._numbers[0]
        group = self._build_group()
        for head in group.heads:
            head.interrupted = partial(self._is_interrupted, head)
        group.heads[0].interrupted = self._before_step
        inject("built", head=first)
        received = client.join({head.number: head.plan for head in group.heads}, self._incarnation, self._has_moved)
        assert received.base is not None
        base, reply = self._copy_if_kept(group, received.base), received.reply
        for head in group.heads:
            self._missing_state = self._checkpointer.start_head(head, reply, base, self._context) or self._missing_state
            client.record_start(head)
        client.release_base(group.heads[0])
        self._apply_directives(group, reply)
        release_freed_memory()
        inject("started", head=first)
        return group

    def _build_group(self) -> HeadGroup:
        context, host, where = self._context, self._host, f"head {self._numbers[0]}"
        if self._device != "cpu" and not torch.cuda.is_available():
            reason = "Ray gave this head a GPU, but the torch installed on its node can't use it (no CUDA)."
            raise WorkerFailed(where, None, reason)
        limit_gpu_memory(host.gpu_memory, torch.device(self._device))
        try:
            worker = context.worker.load()
        except WorkerError as error:
            raise WorkerFailed(where, None, str(error)) from error
        if not context.directory.exists(RUN):
            reason = (
                f"{context.directory.display} isn't seen from the node of this head. On several nodes --storage must be a "
                "place that all of them share (s3://, gs://, NFS)."
            )
            raise WorkerFailed(where, None, reason)
        try:
            return HeadGroup(
                worker,
                context.settings,
                self._numbers,
                device=self._device,
                stack_heads=host.stack_heads,
                concurrent_heads=host.concurrent_heads,
                threads=host.threads,
                incarnation=self._incarnation,
            )
        except Unstackable as error:
            raise WorkerFailed(where, None, str(error)) from error

    def _before_step(self) -> bool:
        """Called before every step of the first head; returns whether to leave the rest of the round for later."""
        if self._group is not None:
            self._tracer.before_step(self._group.heads[0].step)
            return self._is_interrupted(self._group.heads[0])
        return self._checkpointer.snapshot_requested

    def _is_interrupted(self, head: Head) -> bool:
        return self._checkpointer.snapshot_requested or self._early_end.interrupts(head)

    # -- the loop --------------------------------------------------------------------------------------------------------

    def _run_once(self, group: HeadGroup, client: CoordinatorClient) -> None:
        """Adopts what was received, trains the heads that may train, sends contributions, or waits if nothing else is to do.

        Heads that wait for merges take a round of steps at once. Others take one step, so that they adopt between two steps;
        but several heads that share main weights take a round, since each round begins by putting weights in place.
        """
        merge, leaving = self._context.settings.merge, self._early_end.leaving
        self._adopt_replies(group, client, client.received_replies())
        self._checkpointer.take_requested_snapshots(group, client)
        alone, steps = len(group.heads) == 1, dict[int, int]()
        for head in group.heads:
            if leaving or self._has_ended(head) or (merge.wait and (head.outstanding or client.awaits_reply(head))):
                continue
            in_round = self._round_steps[head.number]
            steps[head.number] = max(0, in_round - head.steps_since_contribution) if merge.wait else 1 if alone else in_round
        group.train(steps)
        if not (merge.wait or leaving):
            client.request_newer_base(group.heads[0], group.heads[0].version + self._context.settings.max_lag)
        for head in group.heads:
            if steps.get(head.number):
                inject("stepped", head=head.number, step=head.step)
            self._contribute_if_due(head, client)
            self._save_if_moving(head, client)
        active = [head for head in group.heads if not self._has_ended(head) or client.awaits_reply(head)]
        if active and all(self._waits(head, client) for head in active):
            self._wait_for_reply(group, client, active)

    def _save_if_moving(self, head: Head, client: CoordinatorClient) -> None:
        """Has the state of a head saved that must leave, once all that it has trained is in a contribution."""
        if self._early_end.has_contributed(head) and not self._has_ended(head, for_good=True):
            self._checkpointer.save_to_move(head, client)

    def _waits(self, head: Head, client: CoordinatorClient) -> bool:
        """Whether the head can do nothing until a reply comes."""
        if self._early_end.leaving:
            return head.outstanding or client.awaits_reply(head)
        return head.outstanding if self._context.settings.merge.wait else head.steps_left == 0

    def _contribute_if_due(self, head: Head, client: CoordinatorClient) -> None:
        at_end = head.steps_left == 0 and not head.finished
        due = head.steps_since_contribution >= self._round_steps[head.number] or at_end or self._early_end.is_due(head)
        if due and not self._has_ended(head) and not head.outstanding and not client.awaits_reply(head):
            contribution = head.contribute()
            self._early_end.record_contribution(head)
            inject("contributes", head=head.number, step=head.step)
            with head.timer.measure("publish"):
                client.send(head, contribution)

    def _wait_for_reply(self, group: HeadGroup, client: CoordinatorClient, heads: list[Head]) -> None:
        """Waits until a reply comes, or until it is time to check for requests."""
        with ExitStack() as waiting:
            for head in heads:  # they wait together: the actor's time counts once
                waiting.enter_context(head.timer.measure("wait", 1 / len(heads)))
            received = client.received_replies(timeout=POLL_SECONDS)
        self._adopt_replies(group, client, received)
        # A head whose contribution was merged with that of another head here knows that already; its reply comes at once.
        while any(client.awaits_reply(head) and not head.outstanding for head in heads) and self._context.settings.merge.wait:
            self._adopt_replies(group, client, client.received_replies(timeout=POLL_SECONDS))

    def _has_ended(self, head: Head, for_good: bool = False) -> bool:
        """Whether the head trains no more, at least in this process."""
        return head.finished or head.number in self._quarantined or (not for_good and self._early_end.has_left(head))

    def _leave_if_ended(self, group: HeadGroup, client: CoordinatorClient) -> None:
        """Tells the coordinator of heads that have ended, so that it doesn't wait for them."""
        for head in group.heads:
            if self._has_ended(head) and head.number not in self._left and not client.awaits_reply(head):
                self._save_if_moving(head, client)
                inject("leaving", head=head.number)
                client.leave(head.number)
                self._left.add(head.number)
                head.mark_done()

    # -- replies ---------------------------------------------------------------------------------------------------------

    def _adopt_replies(self, group: HeadGroup, client: CoordinatorClient, all_received: list[ReceivedReply]) -> None:
        for received in all_received:
            self._adopt_reply(group, client, received)

    def _adopt_reply(self, group: HeadGroup, client: CoordinatorClient, received: ReceivedReply) -> None:
        """Follows a reply: all heads here adopt its version, each with what that version holds of it."""
        reply, base, first = received.reply, received.base, group.heads[0]
        inject("adopts", head=first.number, step=first.step, version=reply.version)
        self._checkpointer.request_snapshots(reply.checkpoint_requests, group, client)
        self._checkpointer.take_requested_snapshots(group, client)  # before the heads adopt the new version
        self._apply_directives(group, reply)
        if reply.result is not None:
            self._handle_refusal(group.get(reply.result.head), reply.result)
        if base is not None:
            base = self._copy_if_kept(group, base)
            for head in group.heads:
                accepted = head.outstanding and reply.includes(head.number, head.sequence)
                result = ContributionResult(head.number, head.sequence, True, reply.version) if accepted else None
                head.adopt(result, reply.version, base, received.staged if accepted == received.accepted else None)
            client.release_base(first)
        inject("adopted", head=first.number, step=first.step, version=reply.version)

    def _apply_directives(self, group: HeadGroup, reply: CoordinatorReply) -> None:
        for head in group.heads:
            if head.number in self._left:  # it contributes nothing any more
                continue
            head.apply_directive(reply.directives[head.number])
            self._round_steps[head.number] = reply.directives[head.number].steps

    def _handle_refusal(self, head: Head, result: ContributionResult) -> None:
        """Settles a refused contribution: its progress is part of the next one, or the head has dropped it."""
        if result.accepted or not head.outstanding or result.sequence != head.sequence:
            return
        head.adopt(result, head.version, None)
        if result.discarded:  # by the policy
            return
        self._refused[head.number] += 1
        if result.harmful and self._stub is not None:
            dropped = (*self._dropped[head.number], (self._stub.epoch, result.sequence))
            self._dropped[head.number] = dropped[-MAX_DROPPED:]
        if result.quarantined:
            self._quarantined[head.number] = (
                f"quarantined, since its contributions were refused again and again: {result.reason}"
            )

    def _copy_if_kept(self, group: HeadGroup, base: Tensor) -> Tensor:
        """Copies a base that heads keep and the replica writes to: heads that take turns on their main weights keep it."""
        groups = self._context.groups
        return base.clone() if len(group.heads) > 1 and (len(groups) > 1 or groups[0].redone) else base

    def _statuses(self, group: HeadGroup, client: CoordinatorClient) -> tuple[HeadStatus, ...]:
        count, replica = len(group.heads), client.base_replica
        waiting = self._stub.seconds_waiting if self._stub is not None else 0.0
        note = f"no coordinator for {waiting:.0f} s" if waiting > 1 else ""
        note = note or storage.pending_problem() or self._missing_state or group.sequential_reason
        statuses = []
        for head in group.heads:
            status = head.status()
            statuses.append(
                replace(
                    status,
                    state="quarantined" if head.number in self._quarantined else status.state,
                    bytes_up=client.bytes_up[head.number],
                    bytes_down=replica.bytes_fetched // count,
                    resyncs=replica.resyncs,
                    refused=self._refused[head.number],
                    untrained=group.untrained_reason,
                    dropped=self._dropped[head.number],
                    note=self._quarantined.get(head.number) or note,
                )
            )
        return tuple(statuses)

    # -- called from other processes -------------------------------------------------------------------------------------

    @ray.method(concurrency_group="ctl")
    def status(self) -> tuple[HeadStatus, ...]:
        """The heads' progress, at any time."""
        if self._group is None or self._client is None:
            return tuple(HeadStatus(head=number, device=self._device) for number in self._numbers)
        return self._statuses(self._group, self._client)

    @ray.method(concurrency_group="ctl")
    def end_round(self) -> None:
        """Has the heads end the round that they are in: others must not wait for them now."""
        if self._group is not None:
            self._early_end.request_round_end(self._numbers)

    @ray.method(concurrency_group="ctl")
    def leave(self) -> None:
        """Has the heads contribute what they have trained, save their states and end, so that they can move to another node."""
        self._early_end.request_leave()

    @ray.method(concurrency_group="ctl")
    def save(self, request: CheckpointRequest) -> bool:
        """Requests the heads' states for a checkpoint, between their next two steps; returns whether there are heads yet."""
        if self._group is None or self._client is None:
            return False
        self._checkpointer.request_snapshots([request], self._group, self._client)
        return True

    @ray.method(concurrency_group="ctl")
    def report(self, epoch: int) -> RecoveryReport | None:
        """What this process knows of the run (None if nothing); replies of coordinators before `epoch` are void from now on."""
        group, client = self._group, self._client
        if client is None:
            if self._stub is not None:
                self._stub.disconnect(epoch)
            return None
        progress = {}
        for head in group.heads if group is not None else []:
            stream = head.batch_stream
            revocation_id = stream.revoked.id if stream.revoked else 0
            progress[head.number] = HeadReport(head.step, head.step_limit, stream.assignment_id, revocation_id)
        return client.build_report(progress, epoch)

    @ray.method(concurrency_group="ctl")
    def connect(self, coordinator: Any, epoch: int) -> None:
        """Connects the heads with another coordinator."""
        self._newest_coordinator = (coordinator, epoch)
        if self._stub is not None:
            self._stub.connect(coordinator, epoch)

    @ray.method(concurrency_group="ctl")
    def inspect(self, function: Callable[[HeadGroup], T]) -> T | None:
        """Applies `function` to the engine's heads (for tests and debugging); None before there are any."""
        return None if self._group is None else function(self._group)
