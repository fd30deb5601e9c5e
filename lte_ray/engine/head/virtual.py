"""Virtual heads: several heads in one process that share copies of the main weights.

Each is a complete `Head` with its own data, factors, replicas, optimizer and reference; only the frozen weights are shared.
They train in turns, concurrently in threads (`ThreadedHeads`), or as one batched computation (`VmappedHeads`).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lte_ray.adapters.effective_parameter import computing_loss
from lte_ray.adapters.factors import Factors
from lte_ray.config import TrainConfig
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.optimization import autocast, check_loss
from lte_ray.engine.head.rng import watch_draws
from lte_ray.engine.process_tuning import torch_threads
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError
from lte_ray.layout import Plan
from lte_ray.messages import Contribution
from lte_ray.worker import Batch, Worker


class ThreadedHeads:
    """Takes local steps of all heads: the heads of one lane in turn and the lanes at once.

    Batches are read one at a time, each under its head's generators, as in turns. What else runs at once mustn't draw from
    the global generators, since lanes can't have one each. Two calls, in part in turns, show whether it does, and a third
    whether lanes are faster: they aren't for small models, whose threads wait for Python. If not, all go on in turns, and
    `note` says why. The results don't depend on it, unless something begins to draw after the first round.

    Args:
        lanes: each lane's heads, which share main weights; heads of different lanes don't.
        threads: that torch uses in each lane.
    """

    def __init__(self, groups: Sequence[Sequence[Head]], threads: int) -> None:
        self._groups, self._threads = groups, threads
        self._read_lock = Lock()
        self._pool = ThreadPoolExecutor(len(groups), "lane", torch.set_num_threads, (threads,))
        self._rounds, self._sequential_seconds = 0, 0.0  # seconds of one head's step in turns
        self._sequential_is_faster = False
        self.sequential_reason = ""

    def train(self, todo: Mapping[Head, int]) -> None:
        """Takes each head's local steps.

        Raises:
            WorkerFailed: as `Head.train`; the other lanes have taken their steps, too.
        """
        if self.sequential_reason:
            self._train_sequentially(todo, self._threads if self._sequential_is_faster else torch.get_num_threads())
            return
        self._rounds += 1
        apart = dict(list(todo.items())[:2] if self._rounds <= 2 else [])  # the first time warms up
        rest = {head: steps for head, steps in todo.items() if head not in apart}
        self._train_sequentially(apart, self._threads)
        if self.sequential_reason:
            self._train_sequentially(rest, torch.get_num_threads())
            return
        begun = time.perf_counter()
        self._train_concurrently(rest)
        if self._rounds == 3 and time.perf_counter() - begun > self._sequential_seconds * sum(rest.values()):
            self._sequential_is_faster, self.sequential_reason = (
                True,
                "the heads train in turns, which is faster for this model",
            )

    def _train_sequentially(self, todo: Mapping[Head, int], threads: int) -> None:
        with torch_threads(threads):
            for head, steps in todo.items():
                begun = time.perf_counter()
                head.train(steps)
                self._sequential_seconds = (time.perf_counter() - begun) / steps
                self._check(head.loss_draws)

    def _train_concurrently(self, todo: Mapping[Head, int]) -> None:
        if not todo:
            return
        with watch_draws(next(iter(todo)).device) as changed:
            futures = [self._pool.submit(self._train, {h: todo[h] for h in lane if h in todo}) for lane in self._groups]
            wait(futures)
            self._check(changed())
        for future in futures:
            future.result()

    def _check(self, drew: bool) -> None:
        if drew:
            self.sequential_reason = "the heads train in turns, since computing the loss draws random numbers"

    def _train(self, todo: Mapping[Head, int]) -> None:
        for head, steps in todo.items():
            head.train(steps, self._read, 1 / len(self._groups))

    @contextmanager
    def _read(self, head: Head) -> Iterator[None]:
        with self._read_lock, head.rng.swapped_in():
            yield


class Unstackable(ConfigError):
    """These heads can't be computed as one batch; they can in turns."""


def check_stackable(train: TrainConfig, plans: Sequence[Plan]) -> None:
    """Raises Unstackable if the settings of heads rule out that they are computed as one batch."""
    if train.compile:
        raise Unstackable("--compile and --stack-heads always don't go together: a compiled model runs one head at a time.")
    if train.checkpoint_activations:
        raise Unstackable(
            "--checkpoint-activations and --stack-heads always don't go together: activations can be computed again for one "
            "head at a time only."
        )
    if len(set(plans)) > 1:
        raise Unstackable(
            "--stack-heads always needs heads of equal rank and alpha; --lora-r, --lora-alpha or a rule gives several."
        )


class VmappedHeads:
    """The stacked tensors of some heads, and their common loss.

    Args:
        worker: the user's program.
        heads: heads that share their main weights.

    Raises:
        Unstackable: the heads have different ranks, are compiled, or checkpoint activations.
    """

    def __init__(self, worker: Worker, heads: Sequence[Head]) -> None:
        self._heads = heads
        first = heads[0]
        check_stackable(first.settings.train, [head.plan for head in heads])
        self._worker = worker
        models = [dict(head.model.named_parameters()) for head in heads]
        self._trained = {name: _stack_in_place([m[name] for m in models]) for name, p in models[0].items() if p.requires_grad}
        for head in heads:
            for module in head.model.modules():
                if isinstance(module, Factors):
                    module.reserve_reference()
        buffers = [dict(_head_buffers(head.model)) for head in heads]
        self._buffers = {name: _stack_in_place([b[name] for b in buffers]) for name in buffers[0]}
        self._tensor_slots = _find_slots(first.model, {**{n: models[0][n] for n in self._trained}, **buffers[0]})
        for stacked in self._trained.values():
            stacked.requires_grad_()

    def backward(self, batches: list[Batch]) -> Tensor:
        """Adds the gradients of each head's batch to its parameters' gradients; gives the losses, one a head.

        Raises:
            Unstackable: the batches differ in shape, or the model does something that can't be batched; no gradient changed.
        """
        train, device = self._heads[0].settings.train, self._heads[0].device
        try:
            batch = pytree.tree_map(lambda *leaves: _stack_leaves(leaves), *batches)
            with warnings.catch_warnings(), autocast(train, device), computing_loss():
                warnings.filterwarnings("ignore", message="There is a performance drop")  # it is fast enough, and exact
                losses = torch.vmap(self._head_loss, randomness="different")(self._trained, self._buffers, batch)
            scaled = [head.optimizer_step.scale_loss(loss) for head, loss in zip(self._heads, losses, strict=True)]
            torch.autograd.backward(torch.stack(scaled).sum())  # in here as models may compute activations again themselves
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            raise Unstackable(f"the heads can't be computed as one batch: {str(error).splitlines()[0]}") from error
        self._distribute_gradients()
        return losses.detach()

    def _head_loss(self, trained: dict[str, Tensor], kept: dict[str, Tensor], batch: Batch) -> Tensor:
        """The loss of one head: the first head's model, with another's tensors in the place of its own."""
        before = [place[key] for place, key, _ in self._tensor_slots]
        try:
            for place, key, name in self._tensor_slots:
                place[key] = trained[name] if name in trained else kept[name]
            return check_loss(self._worker.loss(self._heads[0].model, batch))
        finally:
            for (place, key, _), tensor in zip(self._tensor_slots, before, strict=True):
                place[key] = tensor

    def _distribute_gradients(self) -> None:
        """Gives every head's parameters their slice of the gradients, on top of what they have."""
        for index, head in enumerate(self._heads):
            for name, parameter in head.model.named_parameters():
                stacked = self._trained.get(name)
                if stacked is not None and stacked.grad is not None:
                    gradient = stacked.grad[index]
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        for stacked in self._trained.values():
            stacked.grad = None


def _find_slots(model: nn.Module, own: dict[str, Tensor]) -> list[tuple[dict[str, Any], str, str]]:
    """Every place in the model's modules that holds one of these tensors (a tied one has several), with its name.

    `torch.func.functional_call` goes by names, and trips over a module that is held twice.
    """
    names = {id(tensor): name for name, tensor in own.items()}
    return [
        (place, key, names[id(tensor)])
        for module in model.modules()
        for place in (module._parameters, module._buffers)
        for key, tensor in place.items()
        if id(tensor) in names
    ]


def _head_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers that differ between heads: references and running statistics."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Factors | nn.modules.batchnorm._NormBase):
            found += [(f"{name}.{key}".lstrip("."), b) for key, b in module.named_buffers(recurse=False)]
    return found


@torch.no_grad()
def _stack_in_place(tensors: list[Tensor]) -> Tensor:
    """The tensors as one, of which each becomes a slice, in place."""
    stacked = torch.stack([t.detach() for t in tensors])
    for tensor, part in zip(tensors, stacked, strict=True):
        tensor.data = part
    return stacked


def _stack_leaves(leaves: tuple[object, ...]) -> object:
    """One leaf of all heads' batches: tensors stacked; anything else must be the same for all."""
    if isinstance(leaves[0], Tensor):
        return torch.stack([leaf for leaf in leaves if isinstance(leaf, Tensor)])
    if any(leaf != leaves[0] for leaf in leaves):
        raise ValueError(f"the batches hold different values {leaves[:3]} that aren't tensors")
    return leaves[0]


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
        stack_heads: str = "auto",
        concurrent_heads: int = 1,
        threads: int = 1,
        incarnation: int = 0,
    ) -> None:
        several, insist = len(numbers) > 1, stack_heads == "always"
        together = several and (insist or (stack_heads == "auto" and torch.device(device).type == "cuda"))
        serial = together or settings.train.compile or settings.train.checkpoint_activations
        concurrent_heads = 1 if serial or torch.device(device).type != "cpu" else max(1, min(concurrent_heads, len(numbers)))
        self.heads: list[Head] = []
        for index, number in enumerate(numbers):
            share = self.heads[index % concurrent_heads] if index >= concurrent_heads else None
            alone = index + concurrent_heads >= len(numbers) and share is None
            self.heads.append(
                Head(
                    worker,
                    settings,
                    number,
                    device=device,
                    dtype=dtype,
                    incarnation=incarnation,
                    separate_reference=together,
                    share_weights=share,
                    alone=alone,
                )
            )
        self._note = ""
        self._threaded = (
            ThreadedHeads([self.heads[n::concurrent_heads] for n in range(concurrent_heads)], threads)
            if concurrent_heads > 1
            else None
        )
        self._must_stack = insist
        self._vmapped: VmappedHeads | None = None
        if together:
            try:
                self._vmapped = VmappedHeads(worker, self.heads)
            except Unstackable as reason:
                self._stop_stacking(reason)

    @property
    def vmapped(self) -> bool:
        """Whether the heads train as one batch."""
        return self._vmapped is not None

    @property
    def sequential_reason(self) -> str:
        """Why the heads train in turns, if they might have trained at once."""
        return self._note or (self._threaded.sequential_reason if self._threaded else "")

    @property
    def done(self) -> bool:
        """Whether all local steps were taken."""
        return all(head.done for head in self.heads)

    def get(self, number: int) -> Head:
        """The head with this number."""
        return next(head for head in self.heads if head.number == number)

    def train_round(self, waiting: Collection[int] = ()) -> list[Contribution]:
        """`merge_iter` local steps of every head that isn't done (fewer at the end), and their contributions.

        Args:
            waiting: heads that don't train, since their last contribution isn't answered.

        Raises:
            WorkerFailed: the worker's code raised; names the head and the step.
        """
        active = [head for head in self.heads if not head.done and head.number not in waiting]
        self.train({head.number: head.settings.merge.merge_iter for head in active})
        return [head.contribute() for head in active]

    def train(self, steps: Mapping[int, int]) -> None:
        """Takes each named head's local steps, fewer at the end of the run.

        Raises:
            WorkerFailed: the worker's code raised; names the head and the step.
        """
        active = {head: min(steps.get(head.number, 0), head.steps_left) for head in self.heads}
        active = {head: todo for head, todo in active.items() if todo}
        for head in active:
            head.catch_up()
        if self._vmapped is None or len(active) < len(self.heads) or len(set(active.values())) > 1:
            self._train_individually(active)
            return
        for head in self.heads:
            head.prepare_to_train()
        with self.heads[0].timer.measure("train"):
            for _ in range(active[self.heads[0]]):
                if self.heads[0].interrupted():
                    break
                for head, loss in zip(self.heads, self._train_step(), strict=True):
                    head.record_loss(loss)

    def _train_individually(self, todo: Mapping[Head, int]) -> None:
        if self._threaded is not None:
            self._threaded.train(todo)
            return
        for head, steps in todo.items():
            head.train(steps)

    def _train_step(self) -> Tensor:
        """One local step of all heads; gives their losses."""
        accumulate = self.heads[0].settings.train.accumulate
        losses = torch.stack([self._backward([self._next_batch(head) for head in self.heads]) for _ in range(accumulate)])
        for head in self.heads:
            with head.worker_errors(head.step + 1):
                head.finish_step()
        return losses.mean(0)

    def _next_batch(self, head: Head) -> Batch:
        with head.rng.swapped_in(), head.worker_errors(head.step + 1):
            return head.next_batch()

    def _backward(self, batches: list[Batch]) -> Tensor:
        if self._vmapped is not None:
            first = self.heads[0]
            try:
                with first.rng.swapped_in():
                    return self._vmapped.backward(batches)
            except Unstackable as reason:
                self._stop_stacking(reason)
        losses = []
        for head, batch in zip(self.heads, batches, strict=True):
            with head.rng.swapped_in(), head.worker_errors(head.step + 1):
                losses.append(head.backward(batch))
        return torch.stack(losses)

    def _stop_stacking(self, reason: Unstackable) -> None:
        """Goes on in turns, unless stacking was insisted on."""
        if self._must_stack:
            raise reason
        self._vmapped, self._note = None, str(reason)
