"""Virtual heads: several heads in one process that share copies of the main weights.

Each is a whole `Head` with its own data, factors, replicas, optimizer and reference; only the frozen weights are shared.
They train in turns, in lanes that run at the same time, or all at once as one stacked, batched computation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lte_ray.engine.head import Head
from lte_ray.engine.lanes import Lanes
from lte_ray.engine.settings import Settings
from lte_ray.engine.stack import Stack, Unstackable
from lte_ray.messages import Contribution
from lte_ray.worker import Batch, Worker


class HeadGroup:
    """The heads of one actor; one head alone is trained as it always is.

    Args:
        worker, settings, device, dtype: as for `Head`.
        numbers: the heads' numbers.
        stack: "always", "never", or "auto": stacked on a GPU, where small operations leave it idle; not on CPUs, where they
            don't, and a head's own activations fit the cache.
        lanes: heads that may train at the same time on CPUs (see `Lanes`), each lane with a copy of the main weights.
        threads: that torch uses in each lane.
        incarnation: how often these heads were started before.
    """

    def __init__(
        self,
        worker: Worker,
        settings: Settings,
        numbers: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        stack: str = "auto",
        lanes: int = 1,
        threads: int = 1,
        incarnation: int = 0,
    ) -> None:
        several, insist = len(numbers) > 1, stack == "always"
        together = several and (insist or (stack == "auto" and torch.device(device).type == "cuda"))
        serial = together or settings.train.compile or settings.train.checkpoint_activations
        lanes = 1 if serial or torch.device(device).type != "cpu" else max(1, min(lanes, len(numbers)))
        self.heads: list[Head] = []
        for index, number in enumerate(numbers):
            share = self.heads[index % lanes] if index >= lanes else None
            alone = index + lanes >= len(numbers) and share is None
            self.heads.append(
                Head(
                    worker,
                    settings,
                    number,
                    device=device,
                    dtype=dtype,
                    incarnation=incarnation,
                    hold=together,
                    share=share,
                    alone=alone,
                )
            )
        self._note = ""
        self._lanes = Lanes([self.heads[n::lanes] for n in range(lanes)], threads) if lanes > 1 else None
        self._insist = insist
        self._stack: Stack | None = None
        if together:
            try:
                self._stack = Stack(worker, self.heads)
            except Unstackable as reason:
                self._give_up(reason)

    @property
    def stacked(self) -> bool:
        """Whether the heads train as one batch."""
        return self._stack is not None

    @property
    def note(self) -> str:
        """Why the heads train in turns, if they might have trained at once."""
        return self._note or (self._lanes.note if self._lanes else "")

    @property
    def done(self) -> bool:
        """Whether all local steps were taken."""
        return all(head.done for head in self.heads)

    def of(self, number: int) -> Head:
        """The head with this number."""
        return next(head for head in self.heads if head.head == number)

    def train_round(self, waiting: Collection[int] = ()) -> list[Contribution]:
        """`merge_iter` local steps of every head that isn't done (fewer at the end), and their contributions.

        Args:
            waiting: heads that don't train, since their last contribution isn't answered.

        Raises:
            WorkerFailed: the worker's code raised; names the head and the step.
        """
        active = [head for head in self.heads if not head.done and head.head not in waiting]
        self.train({head.head: head.settings.merge.merge_iter for head in active})
        return [head.contribute() for head in active]

    def train(self, steps: Mapping[int, int]) -> None:
        """Takes each named head's local steps, fewer at the end of the run.

        Raises:
            WorkerFailed: the worker's code raised; names the head and the step.
        """
        active = {head: min(steps.get(head.head, 0), head.left) for head in self.heads}
        active = {head: todo for head, todo in active.items() if todo}
        for head in active:
            head.catch_up()
        if self._stack is None or len(active) < len(self.heads) or len(set(active.values())) > 1:
            self._one_by_one(active)
            return
        for head in self.heads:
            head.begin()
        with self.heads[0].timed("train"):
            for _ in range(active[self.heads[0]]):
                if self.heads[0].interrupted():
                    break
                for head, loss in zip(self.heads, self._train_step(), strict=True):
                    head.add_loss(loss)

    def _one_by_one(self, todo: Mapping[Head, int]) -> None:
        if self._lanes is not None:
            self._lanes.train(todo)
            return
        for head, steps in todo.items():
            head.train(steps)

    def _train_step(self) -> Tensor:
        """One local step of all heads; gives their losses."""
        accumulate = self.heads[0].settings.train.accumulate
        losses = torch.stack([self._backward([self._next_batch(head) for head in self.heads]) for _ in range(accumulate)])
        for head in self.heads:
            with head.blame(head.step + 1):
                head.finish_step()
        return losses.mean(0)

    def _next_batch(self, head: Head) -> Batch:
        with head.rng.swapped_in(), head.blame(head.step + 1):
            return head.next_batch()

    def _backward(self, batches: list[Batch]) -> Tensor:
        if self._stack is not None:
            first = self.heads[0]
            try:
                with first.rng.swapped_in():
                    return self._stack.backward(batches)
            except Unstackable as reason:
                self._give_up(reason)
        losses = []
        for head, batch in zip(self.heads, batches, strict=True):
            with head.rng.swapped_in(), head.blame(head.step + 1):
                losses.append(head.backward(batch))
        return torch.stack(losses)

    def _give_up(self, reason: Unstackable) -> None:
        """Goes on in turns, unless stacking was insisted on."""
        if self._insist:
            raise reason
        self._stack, self._note = None, str(reason)
