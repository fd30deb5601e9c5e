"""A process of one head or several: a thin shell around `engine.HeadGroup`. `ray.remote` is applied in `session`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import ray
import torch

from lte_ray import checkpoint
from lte_ray.engine.group import HeadGroup
from lte_ray.engine.head import Head
from lte_ray.engine.memory import keep_freed_memory, release_freed_memory
from lte_ray.engine.stack import Unstackable
from lte_ray.errors import ContributionRefused, CoordinatorLost, LTEError, WorkerError, WorkerFailed
from lte_ray.messages import HeadStatus, Update
from lte_ray.runtime.common import Common
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

    def __init__(self, common: Common, numbers: tuple[int, ...], host: Host) -> None:
        self._common, self._numbers, self._host = common, numbers, host
        self._device = "cuda:0" if host.gpu else "cpu"  # Ray shows each actor its own GPUs only, counted from 0
        self._group: HeadGroup | None = None
        self._left: set[int] = set()

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
        group = self._group = self._start(coordinator)
        refusals = dict.fromkeys(self._numbers, 0)
        self._leave(group, coordinator)
        while not group.done:
            for head, update in self._round(group, coordinator):
                refusals[head.head] = 0 if update.verdict.accepted else refusals[head.head] + 1
                if refusals[head.head] >= MOST_REFUSALS:
                    raise ContributionRefused(
                        f"Head {head.head} had {MOST_REFUSALS} contributions refused in a row, the last at step {head.step}: "
                        f"{update.verdict.reason}. If the loss diverged, lower the learning rate or --lora-alpha."
                    )
            self._leave(group, coordinator)
        return tuple(head.status() for head in group.heads)

    def _start(self, coordinator: Any) -> HeadGroup:
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
        for head in group.heads:
            with _asking():
                update = ray.get(coordinator.join.remote(head.head, head.plan))
            base = common.transport.fetch(update.base)
            if common.resume is not None and head.head in common.resume.heads:
                head.load_state(*checkpoint.read_head(common.directory, common.resume, head.head), base)
            else:
                head.start(update.version, base)
        release_freed_memory()
        return group

    def _leave(self, group: HeadGroup, coordinator: Any) -> None:
        """Heads that have taken all their steps leave, so that nobody waits for them."""
        leaving = [head for head in group.heads if head.done and head.head not in self._left]
        with _asking():
            ray.get([coordinator.leave.remote(head.head) for head in leaving])
        for head in leaving:
            self._left.add(head.head)
            head.end()

    def _round(self, group: HeadGroup, coordinator: Any) -> list[tuple[Head, Update]]:
        """Trains, contributes, waits for the merges, rebases."""
        transport, asked = self._common.transport, {}
        heads = {head.head: head for head in group.heads}
        for contribution in group.train_round():
            with heads[contribution.head].timed("publish"):
                handle = transport.publish(contribution.buffer)
            asked[contribution.head] = coordinator.submit.remote(replace(contribution, buffer=handle))
        with ExitStack() as waiting, _asking():
            for number in asked:  # they wait together: the actor's time counts once
                waiting.enter_context(heads[number].timed("wait", 1 / len(asked)))
            updates: list[Update] = ray.get(list(asked.values()))
        answered = [(heads[number], update) for number, update in zip(asked, updates, strict=True)]
        for head, update in answered:
            with head.timed("fetch"):
                base = None if update.version == head.version else transport.fetch(update.base)
            head.adopt(update.verdict, update.version, base)
            if update.checkpoint:
                with head.timed("checkpoint"):
                    entry = checkpoint.write_head(self._common.directory, update.version, head.head, *head.state())
                coordinator.saved.remote(update.version, head.head, entry)
        return answered

    @ray.method(concurrency_group="ctl")
    def status(self) -> tuple[HeadStatus, ...]:
        """The heads' progress, at any time."""
        if self._group is None:
            return tuple(HeadStatus(head=number, device=self._device) for number in self._numbers)
        return tuple(head.status() for head in self._group.heads)

    @ray.method(concurrency_group="ctl")
    def inspect(self, function: Callable[[HeadGroup], T]) -> T | None:
        """What `function` says of the engine's heads (for tests and debugging); None before there are any."""
        return None if self._group is None else function(self._group)


@contextmanager
def _asking() -> Iterator[None]:
    """Turns Ray's errors about the coordinator into ours."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, LTEError) else error) from None
    except ray.exceptions.RayActorError as error:
        raise CoordinatorLost(f"The coordinator's process died: {error}") from error
