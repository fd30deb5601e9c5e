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

from lte_ray.adapters.convert import Converted
from lte_ray.config import TrainConfig
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.loss import compute_loss
from lte_ray.engine.head.optimization import autocast
from lte_ray.engine.head.rng import watch_draws
from lte_ray.engine.head.worker_state import has_state
from lte_ray.engine.process_tuning import torch_threads
from lte_ray.engine.settings import Settings
from lte_ray.engine.spans import span
from lte_ray.errors import ConfigError, LTEError
from lte_ray.layout import Plan
from lte_ray.messages import Contribution
from lte_ray.worker import Batch, Worker

TRIAL_CALLS = 3
"""Calls of `ThreadedHeads.train` before it is settled whether heads train concurrently. The first warms up."""


class Unstackable(ConfigError):
    """These heads can't be computed as one batch; they can be computed in turns."""


class HeadGroup:
    """The heads of one actor. A single head trains as it would without a group.

    Args:
        worker, settings, device, dtype: as for `Head`.
        numbers: the heads' numbers.
        stack_heads: whether the heads train as one batch: "always", "never", or "auto", which means on a GPU. There small
            operations leave the device idle; on CPUs they don't, and a single head's activations fit the cache.
        concurrent_heads: how many heads may train concurrently on CPUs (`ThreadedHeads`), each with a copy of the main weights.
        threads: that torch uses for each of them.
        incarnation: how often these heads were started before.

    Raises:
        Unstackable: the heads must train as one batch, and can't.
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
        on_cpu, train = torch.device(device).type == "cpu", settings.train
        self._must_stack = stack_heads == "always"
        as_batch = len(numbers) > 1 and (self._must_stack or (stack_heads == "auto" and torch.device(device).type == "cuda"))
        in_turns = as_batch or train.compile or train.checkpoint_activations or not on_cpu
        copies = 1 if in_turns else max(1, min(concurrent_heads, len(numbers)))
        self.heads: list[Head] = []
        for index, number in enumerate(numbers):
            share_weights = self.heads[index % copies] if index >= copies else None
            self.heads.append(
                Head(
                    worker,
                    settings,
                    number,
                    device=device,
                    dtype=dtype,
                    incarnation=incarnation,
                    separate_reference=as_batch,
                    share_weights=share_weights,
                    alone=index + copies >= len(numbers) and share_weights is None,
                )
            )
        self._reason = ""
        self._threaded = ThreadedHeads([self.heads[n::copies] for n in range(copies)], threads) if copies > 1 else None
        self._vmapped: VmappedHeads | None = None
        if as_batch:
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
        """Why the heads train in turns, if they might have trained at once; else empty."""
        return self._reason or (self._threaded.sequential_reason if self._threaded else "")

    @property
    def untrained_reason(self) -> str:
        """Which weights got no gradient in the first round; empty if all did."""
        names = [name for name in self.heads[0].untrained_weights if all(name in h.untrained_weights for h in self.heads)]
        if not names:
            return ""
        some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        return f"no loss of the first round depends on {some}, so {'it does' if len(names) == 1 else 'they do'} not train"

    @property
    def done(self) -> bool:
        """Whether all local steps were taken."""
        return all(head.done for head in self.heads)

    def get(self, number: int) -> Head:
        """The head with this number."""
        return next(head for head in self.heads if head.number == number)

    def train_round(self, waiting: Collection[int] = ()) -> list[Contribution]:
        """Takes a round of every head that isn't done (shorter at the end); returns their contributions.

        Args:
            waiting: heads that don't train, since their last contribution has no answer.

        Raises:
            WorkerFailed: the worker's code raised; names the head and the step.
        """
        active = [head for head in self.heads if not head.done and head.number not in waiting]
        self.train({head.number: head.round_steps for head in active})
        return [head.contribute() for head in active]

    def train(self, steps: Mapping[int, int]) -> None:
        """Takes each named head's local steps, fewer at the end of the run.

        Raises:
            WorkerFailed: the worker's code raised; names the head and the step.
        """
        todo = {head: min(steps.get(head.number, 0), head.steps_left) for head in self.heads}
        todo = {head: count for head, count in todo.items() if count}
        for head in todo:
            head.catch_up()
        if self._vmapped is not None and len(todo) == len(self.heads) and len(set(todo.values())) == 1:
            self._train_as_batch(todo[self.heads[0]])
        elif self._threaded is not None:
            self._threaded.train(todo)
        else:
            for head, count in todo.items():
                head.train(count)

    def _train_as_batch(self, steps: int) -> None:
        for head in self.heads:
            head.prepare_to_train()
        with self.heads[0].timer.measure("train"):
            for _ in range(steps):
                if self.heads[0].interrupted():
                    break
                for head, loss in zip(self.heads, self._train_step(), strict=True):
                    head.record_loss(loss)

    def _train_step(self) -> Tensor:
        """Takes one local step of all heads; returns their losses."""
        accumulate = self.heads[0].settings.train.accumulate
        losses = torch.stack([self._loss_of_batches() for _ in range(accumulate)])
        for head in self.heads:
            with head.worker_errors(head.step + 1), span("optimizer step"):
                head.finish_step()
        return losses.mean(0)

    def _loss_of_batches(self) -> Tensor:
        with span("read batch"):
            batches = [self._next_batch(head) for head in self.heads]
        with span("forward and backward"):
            return self._backward(batches)

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
        """Trains in turns from now on; raises the reason instead if the heads must train as one batch."""
        if self._must_stack:
            raise reason
        self._vmapped, self._reason = None, str(reason)


class ThreadedHeads:
    """Trains heads concurrently on CPUs: sets of heads at once, the heads of one set in turns.

    On CPUs two heads on a core each are faster than one head on both: the threads of one operation wait for each other.

    Batches are read one at a time, each under its head's generators, as in turns. Everything else that runs at once must not
    draw from the global generators, of which there is one of each. The first two calls, partly in turns, find out whether it
    does; the third finds out whether threads are faster, which they aren't for small models, whose threads wait for Python.
    If either fails, all heads train in turns from then on, and `sequential_reason` says why. The results don't depend on it,
    unless the loss begins to draw after the first round.

    Args:
        sets: heads that share main weights, in each set; heads of different sets don't.
        threads: that torch uses in each set.

    Attributes:
        sequential_reason: why the heads train in turns; empty if they don't.
    """

    def __init__(self, sets: Sequence[Sequence[Head]], threads: int) -> None:
        self._sets, self._threads = sets, threads
        self._read_lock = Lock()
        self._pool = ThreadPoolExecutor(len(sets), "heads", torch.set_num_threads, (threads,))
        self._calls, self._sequential_seconds = 0, 0.0  # seconds of one head's step in turns
        self._sequential_is_faster = False
        self.sequential_reason = ""

    def train(self, todo: Mapping[Head, int]) -> None:
        """Takes each head's local steps.

        Raises:
            WorkerFailed: as `Head.train`; the other sets have taken their steps too.
        """
        if self.sequential_reason:
            self._train_sequentially(todo, self._threads if self._sequential_is_faster else torch.get_num_threads())
            return
        self._calls += 1
        first_two = dict(list(todo.items())[:2] if self._calls < TRIAL_CALLS else [])
        rest = {head: steps for head, steps in todo.items() if head not in first_two}
        self._train_sequentially(first_two, self._threads)
        if self.sequential_reason:
            self._train_sequentially(rest, torch.get_num_threads())
            return
        begin = time.perf_counter()
        self._train_concurrently(rest)
        if self._calls == TRIAL_CALLS and time.perf_counter() - begin > self._sequential_seconds * sum(rest.values()):
            self._sequential_is_faster = True
            self.sequential_reason = "the heads train in turns, which is faster for this model"

    def _train_sequentially(self, todo: Mapping[Head, int], threads: int) -> None:
        with torch_threads(threads):
            for head, steps in todo.items():
                begin = time.perf_counter()
                head.train(steps)
                self._sequential_seconds = (time.perf_counter() - begin) / steps
                self._stop_if_drawn(head.loss_draws)

    def _train_concurrently(self, todo: Mapping[Head, int]) -> None:
        if not todo:
            return
        with watch_draws(next(iter(todo)).device) as drew:
            futures = [self._pool.submit(self._train_set, {h: todo[h] for h in heads if h in todo}) for heads in self._sets]
            wait(futures)
            self._stop_if_drawn(drew())
        for future in futures:
            future.result()

    def _train_set(self, todo: Mapping[Head, int]) -> None:
        for head, steps in todo.items():
            head.train(steps, self._read_batch, 1 / len(self._sets))

    @contextmanager
    def _read_batch(self, head: Head) -> Iterator[None]:
        with self._read_lock, head.rng.swapped_in():
            yield

    def _stop_if_drawn(self, loss_draws: bool) -> None:
        if loss_draws:
            self.sequential_reason = "the heads train in turns, since computing the loss draws random numbers"


def check_stackable(train: TrainConfig, plans: Sequence[Plan]) -> None:
    """Raises Unstackable if the settings rule out that heads of these plans are computed as one batch."""
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
    """Computes several heads as one batch: `torch.func.vmap` of one head's loss, over the heads.

    Every head's own tensors become slices of stacked ones, in place, so that heads, optimizers and checkpoints continue to
    use them as they are. The frozen main weights aren't stacked: the heads share them.

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
        if has_state(worker):
            raise Unstackable(f"{type(worker).__name__} has a state_dict(), so each head needs its own loss")
        self._worker = worker
        own = [head.trained_parameters for head in heads]
        self._trained = {name: _stack_in_place([each[name] for each in own]) for name in own[0]}
        for head in heads:
            for main in head.converted.main_weights.values():
                main.factors.reserve_reference()
        buffers = [dict(_head_buffers(head.converted)) for head in heads]
        self._buffers = {name: _stack_in_place([b[name] for b in buffers]) for name in buffers[0]}
        masters = {name: master.parameter for name, master in first.converted.user_parameters.masters.items()}
        self._holders = _find_holders(first.converted, {**own[0], **buffers[0], **masters})
        self._stacked_ids = {id(tensor) for tensor in (*own[0].values(), *buffers[0].values(), *masters.values())}
        for stacked in self._trained.values():
            stacked.requires_grad_()

    def backward(self, batches: list[Batch]) -> Tensor:
        """Adds the gradients of each head's batch to its parameters' gradients; returns the losses, one for each head.

        The worker's figures are added to each head's.

        Raises:
            Unstackable: the batches differ in shape, or the model does something that can't be batched; no gradient changed.
        """
        train, device = self._heads[0].settings.train, self._heads[0].device
        try:
            flat = [pytree.tree_flatten(batch) for batch in batches]
            if any(spec != flat[0][1] for _, spec in flat):
                raise ValueError("the batches hold different containers")
            leaves = [_stack_leaves(each) for each in zip(*(leaves for leaves, _ in flat), strict=True)]
            tensors = {index: leaf for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}

            numbers: dict[str, float] = {}  # figures that aren't tensors, and so are equal in all heads

            def head_loss(
                trained: dict[str, Tensor], buffers: dict[str, Tensor], own: dict[int, Tensor]
            ) -> tuple[Tensor, dict[str, Tensor]]:
                batch = pytree.tree_unflatten([own.get(index, leaf) for index, leaf in enumerate(leaves)], flat[0][1])
                loss, figures = self._head_loss(trained, buffers, batch)
                numbers.update({name: value for name, value in figures.items() if not isinstance(value, Tensor)})
                return loss, {name: value.detach() for name, value in figures.items() if isinstance(value, Tensor)}

            users = self._heads[0].converted.user_parameters
            with users.track_functional(self._stacked_ids):
                with warnings.catch_warnings(), autocast(train, device):
                    warnings.filterwarnings("ignore", message="There is a performance drop")  # it is fast enough, and exact
                    losses, figures = torch.vmap(head_loss, randomness="different")(self._trained, self._buffers, tensors)
                users.end_forward()
                scaled = [head.optimizer_step.scale_loss(loss) for head, loss in zip(self._heads, losses, strict=True)]
                torch.autograd.backward(torch.stack(scaled).sum())  # in here since models may recompute activations themselves
        except (torch.OutOfMemoryError, LTEError):
            raise
        except Exception as error:  # if the worker is to blame, it raises again when heads are computed in turns
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise Unstackable(f"the heads can't be computed as one batch: {reason}") from error
        self._distribute_gradients()
        for head in self._heads:
            head.state.figures.add(numbers)
        for name, values in figures.items():
            for head, value in zip(self._heads, values.unbind(), strict=True):
                head.state.figures.add({name: value})
        return losses.detach()

    def _head_loss(
        self, trained: dict[str, Tensor], buffers: dict[str, Tensor], batch: Batch
    ) -> tuple[Tensor, dict[str, float | Tensor]]:
        """The loss of one head and the worker's figures, by the first head's model with these tensors instead of its own."""
        before = [holder[key] for holder, key, _ in self._holders]
        try:
            given = []
            for holder, key, name in self._holders:
                tensor = trained[name] if name in trained else buffers[name]
                holder[key] = tensor.to(holder[key].dtype)  # of 16-bit parameters, float32 values train
                given.append(holder[key])
            loss, figures = compute_loss(self._worker, self._heads[0].model, batch)
            if any(holder[key] is not tensor for (holder, key, _), tensor in zip(self._holders, given, strict=True)):
                raise NotImplementedError("the model replaces a parameter or buffer by another tensor")
            return loss, figures
        finally:
            for (holder, key, _), tensor in zip(self._holders, before, strict=True):
                holder[key] = tensor

    def _distribute_gradients(self) -> None:
        """Adds each head's slice of the gradients to its parameters' gradients."""
        for index, head in enumerate(self._heads):
            for name, parameter in head.trained_parameters.items():
                stacked = self._trained[name]
                if stacked.grad is not None:
                    gradient = stacked.grad[index]
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        for stacked in self._trained.values():
            stacked.grad = None


def _modules(converted: Converted) -> list[nn.Module]:
    return [*converted.model.modules(), *(main.factors for main in converted.main_weights.values())]


def _find_holders(converted: Converted, tensors: Mapping[str, Tensor]) -> list[tuple[dict[str, Any], str, str]]:
    """Every dictionary and key in the model's modules that holds one of these tensors (a tied one has several), with its name.

    `torch.func.functional_call` replaces tensors by name, and fails for a module that occurs twice.
    """
    names = {id(tensor): name for name, tensor in tensors.items()}
    return [
        (holder, key, names[id(tensor)])
        for module in _modules(converted)
        for holder in (module._parameters, module._buffers)
        for key, tensor in holder.items()
        if id(tensor) in names
    ]


def _head_buffers(converted: Converted) -> list[tuple[str, Tensor]]:
    """The buffers that differ between heads: references, running statistics, and others that are merged."""
    modules: list[tuple[str, nn.Module]] = [(name, main.factors) for name, main in converted.main_weights.items()]
    modules += [(n, m) for n, m in converted.model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    own = {f"{name}.{key}".lstrip("."): b for name, module in modules for key, b in module.named_buffers(recurse=False)}
    tensors = converted.tensors()
    return list((own | {r.name: tensors[r.name] for r in converted.plan.replicas if r.buffer}).items())


@torch.no_grad()
def _stack_in_place(tensors: list[Tensor]) -> Tensor:
    """Stacks the tensors; each becomes a slice of the result, in place."""
    stacked = torch.stack([t.detach() for t in tensors])
    for tensor, part in zip(tensors, stacked, strict=True):
        tensor.data = part
    return stacked


def _stack_leaves(leaves: tuple[object, ...]) -> object:
    """Combines one leaf of all heads' batches: tensors are stacked; anything else must be the same for all heads."""
    if isinstance(leaves[0], Tensor):
        return torch.stack([leaf for leaf in leaves if isinstance(leaf, Tensor)])
    if any(leaf != leaves[0] for leaf in leaves):
        raise ValueError(f"the batches hold different values {leaves[:3]} that aren't tensors")
    return leaves[0]
