"""A process of one head or several: a thin shell around `engine.HeadGroup`. `ray.remote` is applied in `session`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray
import torch
from torch import Tensor

from lte_ray import checkpoint
from lte_ray.engine.group import HeadGroup
from lte_ray.engine.head import Head
from lte_ray.engine.memory import keep_freed_memory, release_freed_memory
from lte_ray.engine.stack import Unstackable
from lte_ray.errors import ContributionRefused, WorkerError, WorkerFailed
from lte_ray.layout import Plan
from lte_ray.messages import HeadStatus, Update, Verdict
from lte_ray.runtime.common import Common
from lte_ray.runtime.courier import Arrived, Courier, asking
from lte_ray.storage import RUN

MOST_REFUSALS = 3
"""Contributions of one head that may be refused in a row before the run ends."""

T = TypeVar("T")


@dataclass(frozen=True)
class Host:
    """How an actor computes: torch's threads in each lane, lanes, whether it has a GPU, and whether its heads are stacked."""

    threads: int
    lanes: int
    gpu: bool
    stack: str = "auto"


class HeadActor:
    """Hosts one head or several. `run` trains to the end; `status` answers meanwhile, from another thread."""

    def __init__(self, common: Common, plans: tuple[Plan, ...], numbers: tuple[int, ...], host: Host) -> None:
        self._common, self._plans, self._numbers, self._host = common, plans, numbers, host
        self._device = "cuda:0" if host.gpu else "cpu"  # Ray shows each actor its own GPUs only, counted from 0
        self._group: HeadGroup | None = None
        self._courier: Courier | None = None
        self._left: set[int] = set()
        self._asked: dict[int, Any] = {}  # heads that wait for an answer
        self._every = dict.fromkeys(numbers, common.settings.merge.merge_iter)  # local steps of a round
        self._refusals = dict.fromkeys(numbers, 0)  # in a row

    def run(self, coordinator: Any) -> tuple[HeadStatus, ...]:
        """Trains all local steps of its heads, contributing and rebasing on the way.

        Raises:
            WorkerFailed: the worker's code raised.
            ContributionRefused: the coordinator refused contribution after contribution.
            CoordinatorLost: its process died.
            PolicyError: the merge policy failed.
        """
        torch.set_num_threads(self._host.lanes * self._host.threads)
        keep_freed_memory()
        courier = self._courier = Courier(self._common, self._plans, self._numbers, coordinator)
        group = self._group = self._start(courier)
        self._leave(group, coordinator)
        while any(not head.finished or head.head in self._asked or courier.carries(head) for head in group.heads):
            if self._common.settings.merge.wait:
                self._round(group, courier, coordinator)
            else:
                self._steps(group, courier, coordinator)
            self._leave(group, coordinator)
        return self._statuses(group, courier)

    def _statuses(self, group: HeadGroup, courier: Courier) -> tuple[HeadStatus, ...]:
        count, mirror = len(group.heads), courier.mirror
        return tuple(
            replace(
                head.status(),
                bytes_up=courier.bytes_up[head.head],
                bytes_down=mirror.bytes // count,
                resyncs=mirror.resyncs,
                note=group.note,
            )
            for head in group.heads
        )

    def _start(self, courier: Courier) -> HeadGroup:
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
            )
        except Unstackable as error:
            raise WorkerFailed(f"head {first}", None, str(error)) from error
        arrived = courier.join({head.head: head.plan for head in group.heads})
        assert arrived.base is not None
        base, version = self._own(group, arrived.base), arrived.update.version
        for head in group.heads:
            if common.resume is not None and head.head in common.resume.heads:
                head.load_state(*checkpoint.read_head(common.directory, common.resume, head.head), base)
            else:
                head.start(version, base)
        courier.adopted(group.heads[0])
        self._take_orders(group, arrived.update)
        release_freed_memory()
        return group

    def _leave(self, group: HeadGroup, coordinator: Any) -> None:
        """Heads that have taken all their steps, and whose steps are all merged, leave, so that nobody waits for them."""
        leaving = [head for head in group.heads if head.finished and head.head not in self._left]
        with asking():
            ray.get([coordinator.leave.remote(head.head) for head in leaving])
        for head in leaving:
            self._left.add(head.head)
            head.end()

    def _round(self, group: HeadGroup, courier: Courier, coordinator: Any) -> None:
        """Trains the heads that don't wait, contributes, and waits until some head's contribution is answered."""
        ready = {head.head: head for head in group.heads if not head.finished and head.head not in self._asked}
        group.train({number: self._every[number] for number in ready})
        for number, head in ready.items():
            contribution = head.contribute()
            with head.timed("publish"):
                self._asked[number] = courier.offer(head, contribution)
        with ExitStack() as waiting, asking():
            for number in self._asked:  # they wait together: the actor's time counts once
                waiting.enter_context(group.of(number).timed("wait", 1 / len(self._asked)))
            first: Update = ray.get(ray.wait(list(self._asked.values()))[0][0])
            merged = [n for n in self._asked if first.accepted.get(n) == group.of(n).sequence]  # theirs come at once
            answered = {n: ref for n, ref in self._asked.items() if n in merged or ray.wait([ref], timeout=0)[0]}
            updates: dict[int, Update] = dict(zip(answered, ray.get(list(answered.values())), strict=True))
        for number, update in sorted(updates.items(), key=lambda answered: answered[1].version):
            del self._asked[number]
            with group.of(number).timed("fetch"):
                arrived = courier.take(update)
            self._adopt(group, courier, arrived, coordinator)

    def _steps(self, group: HeadGroup, courier: Courier, coordinator: Any) -> None:
        """Trains, and hands over contributions and adopts what comes between two steps, without waiting."""
        merge = self._common.settings.merge
        for arrived in courier.arrived():
            self._adopt(group, courier, arrived, coordinator)
        alone = len(group.heads) == 1  # several take turns on the same main weights, so they change rounds, not steps
        group.train({number: 1 if alone else every for number, every in self._every.items()})
        courier.watch(group.heads[0], group.heads[0].version + merge.max_lag)
        for head in group.heads:
            due = head.since_offered >= self._every[head.head] or (head.left == 0 and not head.finished)
            if due and not head.outstanding and not courier.carries(head):
                courier.send(head, head.contribute())
        if all(head.left == 0 for head in group.heads) and any(courier.carries(head) for head in group.heads):
            with group.heads[0].timed("wait"):  # nothing is left but to wait
                waited = courier.arrived(patience=1.0)
            for arrived in waited:
                self._adopt(group, courier, arrived, coordinator)

    def _adopt(self, group: HeadGroup, courier: Courier, arrived: Arrived, coordinator: Any) -> None:
        """Takes an update: all heads here follow its version, each with what that holds of its own."""
        update, base = arrived.update, arrived.base
        self._take_orders(group, update)
        if update.verdict is not None:
            self._judge(group.of(update.verdict.head), update.verdict)
        if base is not None:
            base = self._own(group, base)
            for head in group.heads:
                accepted = head.outstanding and update.accepted.get(head.head) == head.sequence
                verdict = Verdict(head.head, head.sequence, True, update.version) if accepted else None
                head.adopt(verdict, update.version, base, arrived.staged if accepted == arrived.accepted else None)
            courier.adopted(group.heads[0])
        if update.checkpoint and update.verdict is not None:
            head = group.of(update.verdict.head)
            with head.timed("checkpoint"):
                entry = checkpoint.write_head(self._common.directory, update.version, head.head, *head.state())
            coordinator.saved.remote(update.version, head.head, entry)

    def _take_orders(self, group: HeadGroup, update: Update) -> None:
        for head in group.heads:
            head.follow(update.orders[head.head])
            self._every[head.head] = update.orders[head.head].steps

    def _judge(self, head: Head, verdict: Verdict) -> None:
        """A refused contribution is settled: what it held rides in the next one."""
        if verdict.accepted:
            self._refusals[head.head] = 0
            return
        head.adopt(verdict, head.version, None)
        if verdict.discarded:  # as the policy wants it
            return
        self._refusals[head.head] += 1
        if self._refusals[head.head] >= MOST_REFUSALS:
            raise ContributionRefused(
                f"Head {head.head} had {MOST_REFUSALS} contributions refused in a row, the last at step {head.step}: "
                f"{verdict.reason}. If the loss diverged, lower the learning rate or --lora-alpha."
            )

    def _own(self, group: HeadGroup, base: Tensor) -> Tensor:
        """The base as the heads may keep it: heads that take turns do, and the mirror writes to its own."""
        groups = self._common.groups
        return base.clone() if len(group.heads) > 1 and (len(groups) > 1 or groups[0].by_factors) else base

    @ray.method(concurrency_group="ctl")
    def status(self) -> tuple[HeadStatus, ...]:
        """The heads' progress, at any time."""
        if self._group is None or self._courier is None:
            return tuple(HeadStatus(head=number, device=self._device) for number in self._numbers)
        return self._statuses(self._group, self._courier)

    @ray.method(concurrency_group="ctl")
    def inspect(self, function: Callable[[HeadGroup], T]) -> T | None:
        """What `function` says of the engine's heads (for tests and debugging); None before there are any."""
        return None if self._group is None else function(self._group)
