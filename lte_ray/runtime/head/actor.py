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

MOST_DROPPED = 8
"""Contributions that were dropped as poison, of which a head's status tells."""

LOOK = 0.2
"""Seconds after which a head that waits looks whether it is asked for anything."""


@dataclass(frozen=True)
class HeadHost:
    """How an actor computes: torch's threads in each lane, lanes, whether it has a GPU, and whether its heads are stacked."""

    threads: int
    lanes: int
    gpu: bool
    stack: str = "auto"


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
        self, common: RunContext, plans: tuple[Plan, ...], numbers: tuple[int, ...], host: HeadHost, incarnation: int = 0
    ) -> None:
        fault_injection.arm(common.faults)
        inject("begins", head=numbers[0], incarnation=incarnation)
        self._common, self._plans, self._numbers, self._host = common, plans, numbers, host
        self._incarnation = incarnation
        self._device = "cuda:0" if host.gpu else "cpu"  # Ray shows each actor its own GPUs only, counted from 0
        self._group: HeadGroup | None = None
        self._courier: CoordinatorClient | None = None
        self._line: ReconnectingStub | None = None
        self._newest: tuple[Any, int] | None = None  # the coordinator that answers, and how many there were before it
        self._saves = HeadCheckpointer(common.directory)
        self._left: set[int] = set()
        self._quarantined: dict[int, str] = {}  # and why
        self._every = dict.fromkeys(numbers, common.settings.merge.merge_iter)  # local steps of a round
        self._refused = dict.fromkeys(numbers, 0)
        self._dropped: dict[int, tuple[tuple[int, int], ...]] = dict.fromkeys(numbers, ())
        self._lacks = ""

    def run(self, coordinator: Any, epoch: int = 0) -> tuple[HeadStatus, ...]:
        """Trains all local steps of its heads, contributing and rebasing on the way.

        Args:
            coordinator: its handle; `connect` gives another one.
            epoch: how many there were before it.

        Raises:
            WorkerFailed: the worker's code raised.
            PolicyError: the merge policy failed.
        """
        torch.set_num_threads(self._host.lanes * self._host.threads)
        keep_freed_memory()
        wait = self._common.settings.merge.wait
        self._line = line = ReconnectingStub(coordinator, epoch)
        if self._newest is not None and self._newest[1] > epoch:  # it was connected before this began
            line.connect(*self._newest)
        courier = self._courier = CoordinatorClient(self._common, self._plans, self._numbers, line, beside=not wait)
        group = self._group = self._start(courier)
        self._leave(group, courier)
        while any(not self._over(head) or courier.carries(head) for head in group.heads):
            self._turn(group, courier)
            self._leave(group, courier)
        self._saves.idle(group, courier)
        return self._statuses(group, courier)

    def _over(self, head: Head) -> bool:
        return head.finished or head.head in self._quarantined

    def _statuses(self, group: HeadGroup, courier: CoordinatorClient) -> tuple[HeadStatus, ...]:
        count, mirror = len(group.heads), courier.mirror
        waiting = self._line.waiting if self._line is not None else 0.0
        note = f"no coordinator for {waiting:.0f} s" if waiting > 1 else storage.trouble() or group.note or self._lacks
        return tuple(
            replace(
                head.status(),
                state="quarantined" if head.head in self._quarantined else head.status().state,
                bytes_up=courier.bytes_up[head.head],
                bytes_down=mirror.bytes // count,
                resyncs=mirror.resyncs,
                refused=self._refused[head.head],
                dropped=self._dropped[head.head],
                note=self._quarantined.get(head.head) or note,
            )
            for head in group.heads
        )

    def _start(self, courier: CoordinatorClient) -> HeadGroup:
        common, first = self._common, self._numbers[0]
        if self._device != "cpu" and not torch.cuda.is_available():
            reason = "Ray gave this head a GPU, but the torch installed on its node can't use it (no CUDA)."
            raise WorkerFailed(f"head {first}", None, reason)
        try:
            worker = common.worker.open()
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
                stack=host.stack,
                lanes=host.lanes,
                threads=host.threads,
                incarnation=self._incarnation,
            )
        except Unstackable as error:
            raise WorkerFailed(f"head {first}", None, str(error)) from error
        for head in group.heads:
            head.interrupted = lambda: self._saves.asked
        inject("built", head=first)
        arrived = courier.join({head.head: head.plan for head in group.heads}, self._incarnation)
        assert arrived.base is not None
        base, update = self._own(group, arrived.base), arrived.update
        for head in group.heads:
            self._lacks = self._saves.begin(head, update, base, common) or self._lacks
            courier.begins(head, head.reference)
        courier.adopted(group.heads[0])
        self._take_orders(group, update)
        release_freed_memory()
        inject("started", head=first)
        return group

    def _leave(self, group: HeadGroup, courier: CoordinatorClient) -> None:
        """Heads that have taken all their steps, and whose steps are all merged, leave, so that nobody waits for them."""
        for head in group.heads:
            if self._over(head) and head.head not in self._left and not courier.carries(head):
                inject("leaving", head=head.head)
                courier.leave(head.head)
                self._left.add(head.head)
                head.end()

    def _turn(self, group: HeadGroup, courier: CoordinatorClient) -> None:
        """Takes what has come, trains the heads that may, hands over what is due, and waits if there is nothing else to do.

        Heads that wait take a whole round of steps; others one step, so that what comes is adopted in between. Several that
        share main weights take turns on them, so they change rounds, not steps.
        """
        merge = self._common.settings.merge
        self._take(group, courier, courier.arrived())
        self._saves.serve(group, courier)
        alone, todo = len(group.heads) == 1, {}
        for head in group.heads:
            if self._over(head) or (merge.wait and (head.outstanding or courier.carries(head))):
                continue
            every = self._every[head.head]
            todo[head.head] = max(0, every - head.since_offered) if merge.wait else 1 if alone else every
        group.train(todo)
        if not merge.wait:
            courier.watch(group.heads[0], group.heads[0].version + merge.max_lag)
        for head in group.heads:
            if todo.get(head.head):
                inject("stepped", head=head.head, step=head.step)
            due = head.since_offered >= self._every[head.head] or (head.left == 0 and not head.finished)
            if due and not self._over(head) and not head.outstanding and not courier.carries(head):
                contribution = head.contribute()
                inject("contributes", head=head.head, step=head.step)
                with head.timed("publish"):
                    courier.send(head, contribution)
        stands = [head for head in group.heads if not self._over(head) or courier.carries(head)]
        if stands and all(head.outstanding if merge.wait else head.left == 0 for head in stands):
            self._wait(group, courier, stands)

    def _wait(self, group: HeadGroup, courier: CoordinatorClient, heads: list[Head]) -> None:
        """Until something comes, or something is asked."""
        with ExitStack() as waiting:
            for head in heads:  # they wait together: the actor's time counts once
                waiting.enter_context(head.timed("wait", 1 / len(heads)))
            arrived = courier.arrived(patience=LOOK)
        self._take(group, courier, arrived)
        while any(courier.carries(head) and not head.outstanding for head in heads) and self._common.settings.merge.wait:
            self._take(group, courier, courier.arrived(patience=LOOK))  # merged with another's: theirs come at once

    def _take(self, group: HeadGroup, courier: CoordinatorClient, all_arrived: list[ReceivedReply]) -> None:
        for arrived in all_arrived:
            self._adopt(group, courier, arrived)

    def _adopt(self, group: HeadGroup, courier: CoordinatorClient, arrived: ReceivedReply) -> None:
        """Takes an update: all heads here follow its version, each with what that holds of its own."""
        update, base = arrived.update, arrived.base
        inject("adopts", head=group.heads[0].head, step=group.heads[0].step, version=update.version)
        for save in update.saves:
            self._saves.take(group, courier, save)
        self._take_orders(group, update)
        if update.verdict is not None:
            self._judge(group.of(update.verdict.head), update.verdict)
        if base is not None:
            base = self._own(group, base)
            for head in group.heads:
                accepted = head.outstanding and update.holds(head.head, head.sequence)
                verdict = ContributionResult(head.head, head.sequence, True, update.version) if accepted else None
                head.adopt(verdict, update.version, base, arrived.staged if accepted == arrived.accepted else None)
            courier.adopted(group.heads[0])
        inject("adopted", head=group.heads[0].head, step=group.heads[0].step, version=update.version)

    def _take_orders(self, group: HeadGroup, update: CoordinatorReply) -> None:
        for head in group.heads:
            if head.head in self._left:  # nobody takes anything of it any more
                continue
            head.follow(update.orders[head.head])
            self._every[head.head] = update.orders[head.head].steps

    def _judge(self, head: Head, verdict: ContributionResult) -> None:
        """A refused contribution is settled: what it held rides in the next one, or the head has dropped it."""
        if verdict.accepted or not head.outstanding or verdict.sequence != head.sequence:
            return
        head.adopt(verdict, head.version, None)
        if verdict.discarded:  # as the policy wants it
            return
        self._refused[head.head] += 1
        if verdict.poison and self._line is not None:
            self._dropped[head.head] = (*self._dropped[head.head], (self._line.epoch, verdict.sequence))[-MOST_DROPPED:]
        if verdict.quarantined:
            self._quarantined[head.head] = (
                f"quarantined, since its contributions were refused again and again: {verdict.reason}"
            )

    def _own(self, group: HeadGroup, base: Tensor) -> Tensor:
        """The base as the heads may keep it: heads that take turns do, and the mirror writes to its own."""
        groups = self._common.groups
        return base.clone() if len(group.heads) > 1 and (len(groups) > 1 or groups[0].by_factors) else base

    # -- asked from outside --------------------------------------------------------------------------------------------

    @ray.method(concurrency_group="ctl")
    def status(self) -> tuple[HeadStatus, ...]:
        """The heads' progress, at any time."""
        if self._group is None or self._courier is None:
            return tuple(HeadStatus(head=number, device=self._device) for number in self._numbers)
        return self._statuses(self._group, self._courier)

    @ray.method(concurrency_group="ctl")
    def save(self, save: CheckpointRequest) -> bool:
        """The heads are to write their state into this checkpoint as soon as they are between two steps; whether they can."""
        if self._group is None or self._courier is None:
            return False
        self._saves.ask(save, self._group, self._courier)
        return True

    @ray.method(concurrency_group="ctl")
    def report(self, epoch: int) -> RecoveryReport | None:
        """What this process knows of the run; None if that is nothing. Coordinators before `epoch` don't count any more."""
        group, courier = self._group, self._courier
        if courier is None:
            if self._line is not None:
                self._line.cut(epoch)
            return None
        positions = {
            head.head: HeadReport(head.step, head.limit, head.feed.grant, head.feed.released.id if head.feed.released else 0)
            for head in (group.heads if group is not None else [])
        }
        return courier.report(positions, epoch)

    @ray.method(concurrency_group="ctl")
    def connect(self, coordinator: Any, epoch: int) -> None:
        """Another coordinator answers from now on."""
        self._newest = (coordinator, epoch)
        if self._line is not None:
            self._line.connect(coordinator, epoch)

    @ray.method(concurrency_group="ctl")
    def inspect(self, function: Callable[[HeadGroup], T]) -> T | None:
        """What `function` says of the engine's heads (for tests and debugging); None before there are any."""
        return None if self._group is None else function(self._group)
