"""One head's process: a thin shell around `engine.Head`. `ray.remote` is applied in `session`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import ray
import torch

from lte_ray import checkpoint
from lte_ray.engine.head import Head
from lte_ray.engine.memory import keep_freed_memory
from lte_ray.errors import ContributionRefused, CoordinatorLost, LTEError, WorkerError, WorkerFailed
from lte_ray.messages import HeadStatus, Update
from lte_ray.runtime.common import Common
from lte_ray.storage import RUN

MOST_REFUSALS = 3
"""Contributions of one head that may be refused in a row before the run ends."""

T = TypeVar("T")


class HeadActor:
    """`run` trains to the end; `status` answers meanwhile, from another thread."""

    def __init__(self, common: Common, head: int, threads: int, gpu: bool) -> None:
        self._common, self._number, self._threads = common, head, threads
        self._device = "cuda:0" if gpu else "cpu"  # Ray shows each actor its own GPUs only, counted from 0
        self._head: Head | None = None

    def run(self, coordinator: Any) -> HeadStatus:
        """Trains all local steps, contributing and rebasing on the way.

        Raises:
            WorkerFailed: the worker's code raised.
            ContributionRefused: the coordinator refused contribution after contribution.
            CoordinatorLost: its process died.
            PolicyError: the merge policy failed.
        """
        torch.set_num_threads(self._threads)
        keep_freed_memory()
        head = self._head = self._start(coordinator)
        refusals = 0
        while not head.done:
            update = self._round(head, coordinator)
            refusals = 0 if update.verdict.accepted else refusals + 1
            if refusals >= MOST_REFUSALS:
                raise ContributionRefused(
                    f"Head {head.head} had {refusals} contributions refused in a row, the last at local step {head.step}: "
                    f"{update.verdict.reason}. If the loss diverged, lower the learning rate or --lora-alpha."
                )
        with _asking():
            ray.get(coordinator.leave.remote(self._number))
        head.end()
        return head.status()

    def _start(self, coordinator: Any) -> Head:
        common = self._common
        if self._device != "cpu" and not torch.cuda.is_available():
            reason = "Ray gave this head a GPU, but the torch installed on its node can't use it (no CUDA)."
            raise WorkerFailed(f"head {self._number}", None, reason)
        try:
            worker = common.worker.open()
        except WorkerError as error:
            raise WorkerFailed(f"head {self._number}", None, str(error)) from error
        if not common.directory.exists(RUN):
            reason = (
                f"{common.directory.display} isn't seen from the node of this head. On several nodes --storage must be a place "
                "that all of them share (s3://, gs://, NFS)."
            )
            raise WorkerFailed(f"head {self._number}", None, reason)
        head = Head(worker, common.settings, self._number, device=self._device)
        with _asking():
            update = ray.get(coordinator.join.remote(self._number, head.plan))
        base = common.transport.fetch(update.base)
        if common.resume is not None and self._number in common.resume.heads:
            head.load_state(*checkpoint.read_head(common.directory, common.resume, self._number), base)
        else:
            head.start(update.version, base)
        return head

    def _round(self, head: Head, coordinator: Any) -> Update:
        """Trains, contributes, waits for the merge, rebases."""
        transport = self._common.transport
        contribution = head.train_round()
        with head.timed("publish"):
            handle = transport.publish(contribution.buffer)
        with head.timed("wait"), _asking():
            update: Update = ray.get(coordinator.submit.remote(replace(contribution, buffer=handle)))
        with head.timed("fetch"):
            base = None if update.version == head.version else transport.fetch(update.base)
        head.adopt(update.verdict, update.version, base)
        if update.checkpoint:
            with head.timed("checkpoint"):
                entry = checkpoint.write_head(self._common.directory, update.version, head.head, *head.state())
            coordinator.saved.remote(update.version, head.head, entry)
        return update

    @ray.method(concurrency_group="ctl")
    def status(self) -> HeadStatus:
        """The head's progress, at any time."""
        return self._head.status() if self._head is not None else HeadStatus(head=self._number, device=self._device)

    @ray.method(concurrency_group="ctl")
    def inspect(self, function: Callable[[Head], T]) -> T | None:
        """What `function` says of the engine's head (for tests and debugging); None before there is one."""
        return None if self._head is None else function(self._head)


@contextmanager
def _asking() -> Iterator[None]:
    """Turns Ray's errors about the coordinator into ours."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, LTEError) else error) from None
    except ray.exceptions.RayActorError as error:
        raise CoordinatorLost(f"The coordinator's process died: {error}") from error
