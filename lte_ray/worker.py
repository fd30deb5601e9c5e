"""The worker: the user's program that every head runs."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import random
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lte_ray.data.shard import Shard
from lte_ray.errors import WorkerError

Batch = Any
"""What the worker's `train_batches` yields: a tensor, or any container of tensors (`to_device`)."""


class Worker(Protocol):
    """What to train: a model, its data, its loss, and its evaluation. See `workers/` for examples to copy.

    A worker is made once, in the driver, and is pickled to every process. So its constructor should keep settings only; its
    methods make what is large (data, model).
    """

    def build_model(self) -> nn.Module:
        """Builds the unconverted model, on the CPU. Called under a fixed seed, once in each process."""
        ...

    def train_batches(self, shard: Shard) -> Iterator[Batch]:
        """Yields this head's batches, from `shard.cursor` on. When it ends, it is called again with a later cursor."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor | tuple[Tensor, Mapping[str, float | Tensor]]:
        """The mean loss over the batch, a scalar. Tensors in the batch are already on the model's device.

        It may be returned with figures of the batch, by name: numbers, or tensors without dimensions.
        """
        ...

    # Optional:
    #   evaluate(model) -> dict[str, float]        figures of the merged weights, in an unconverted model in eval mode, without
    #                                            gradients
    #   build_optimizer(params) -> Optimizer       params: parameter groups, named "lora" and "replica"
    #                                            (in full rank "weight" and "replica")
    #   build_schedule(optimizer, total_steps)     -> a torch learning-rate scheduler, stepped after every local step
    #   default_lr_factor                          multiplies the default rates of a worker without build_optimizer, not
    #                                            those of flags: 0.1 to fine-tune
    #   save_files(folder)                         writes what belongs to the model into an empty folder, such as a
    #                                            tokenizer: kept with the run, and part of exports for transformers and PEFT
    #   describe_data() -> str                     the training data in words that change with them: a resumed run warns
    #   state_dict(), load_state_dict(state)       what the worker counts or collects: each head's own, kept in checkpoints
    #   tokens_per_sample                          a number, or a method that returns it: for --tokens and tokens per second
    #   flops_per_sample                           likewise, of operations forward and backward: for MFU
    #   batches_per_epoch                          likewise, for --epochs, where shard.indices doesn't say it
    #   sample(model) -> str                       shown at the end of the run, e.g. generated text


REQUIRED = ("build_model", "train_batches", "loss")


def check_worker(worker: object) -> None:
    """Raises WorkerError unless `worker`, an object or a class, has all methods of a Worker."""
    kind = worker if isinstance(worker, type) else type(worker)
    missing = [name for name in REQUIRED if not callable(getattr(worker, name, None))]
    if missing:
        raise WorkerError(
            f"{kind.__name__} can't be used as a worker: it lacks {', '.join(f'{m}()' for m in missing)}. "
            f"A worker needs {', '.join(f'{m}()' for m in REQUIRED)} (see lte_ray.Worker)."
        )


def evaluates(worker: object) -> bool:
    """Whether the worker has an `evaluate` method."""
    return callable(getattr(worker, "evaluate", None))


def evaluate(worker: Any, model: nn.Module) -> dict[str, float]:
    """Returns the worker's figures of an unconverted model, which stays in eval mode; empty if it has no `evaluate`.

    Raises:
        TypeError: it returned something else than numbers by name.
    """
    if not evaluates(worker):
        return {}
    with torch.no_grad():
        values = worker.evaluate(model.eval())
    try:
        return {str(name): float(value) for name, value in values.items()}
    except (AttributeError, TypeError, ValueError):
        raise TypeError(f"evaluate() must return a dict of names and numbers, but returned {values!r}") from None


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_model(worker: Worker, seed: int) -> nn.Module:
    """Builds the worker's model under `seed`, so that every process starts from equal weights.

    Raises:
        WorkerError: it isn't an `nn.Module`.
    """
    seed_everything(seed)
    model = worker.build_model()
    if not isinstance(model, nn.Module):
        raise WorkerError(f"{type(worker).__name__}.build_model() returned a {type(model).__name__}, not a torch.nn.Module.")
    return model


def endless_batches(worker: Worker, shard: Shard) -> Iterator[Batch]:
    """Yields the worker's batches from `shard.cursor` on; at the end of an iterator, calls `train_batches` again.

    Raises:
        WorkerError: an iterator ended without a batch.
    """
    cursor = shard.cursor
    while True:
        before = cursor
        batches = worker.train_batches(shard.at(cursor))
        if not isinstance(batches, Iterable):
            raise WorkerError(f"{type(worker).__name__}.train_batches() returned a {type(batches).__name__}, not an iterator.")
        for batch in batches:
            cursor += 1
            yield batch
        if cursor == before:
            raise WorkerError(
                f"{type(worker).__name__}.train_batches() ended at once, without a batch, for head {shard.head} of "
                f"{shard.num_heads} at cursor {cursor}. It must yield at least one batch for every shard."
            )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with all its tensors on `device`, in containers of the types that it has.

    Looks into tuples, named tuples, lists, mappings and dataclasses. An object that has a method `to`, as packed sequences,
    graphs and transformers' encodings have, moves itself.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, nn.utils.rnn.PackedSequence):  # a named tuple whose batch_sizes must stay on the CPU
        return batch.to(device)  # type: ignore[arg-type]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(item, device) for item in batch))
    if isinstance(batch, list):
        items = copy.copy(batch)
        items[:] = [to_device(item, device) for item in batch]
        return items
    if isinstance(batch, tuple):
        parts = tuple(to_device(item, device) for item in batch)
        return parts if type(batch) is tuple else _rebuilt(batch, parts)
    if isinstance(batch, Mapping):
        moved = {key: to_device(value, device) for key, value in batch.items()}
        if not isinstance(batch, MutableMapping):
            return moved
        copied = copy.copy(batch)
        copied.update(moved)
        return copied
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        changed = copy.copy(batch)
        for field in dataclasses.fields(batch):
            object.__setattr__(changed, field.name, to_device(getattr(batch, field.name), device))
        return changed
    if callable(getattr(batch, "to", None)) and not isinstance(batch, type | nn.Module):
        elsewhere = batch.to(device)
        return batch if elsewhere is None else elsewhere  # some move in place
    return batch


def _rebuilt(batch: tuple[Any, ...], parts: tuple[Any, ...]) -> Batch:
    """A tuple of the type of `batch`; a plain one, if that type is made in another way."""
    try:
        return type(batch)(parts)
    except TypeError:
        return parts


def copy_batch(batch: Batch) -> Batch:
    """A copy that may be changed; the batch itself if it can't be copied."""
    try:
        return copy.deepcopy(batch)
    except Exception:  # whatever its parts raise
        return batch


def count_samples(batch: Batch) -> int:
    """The number of samples in a batch: the first dimension of its first tensor that has one; 1 if there is none.

    A packed sequence has as many samples as sequences.
    """
    return next(_sizes(batch), 1)


def count_tokens(worker: Worker, batch: Batch) -> int | None:
    """The number of tokens in a batch: the worker's `tokens_per_sample` times its samples, else the size of its `input_ids`.

    None if neither is known.
    """
    each = getattr(worker, "tokens_per_sample", None)
    if each is not None:
        return int(each() if callable(each) else each) * count_samples(batch)
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else getattr(batch, "input_ids", None)
    return ids.numel() if isinstance(ids, Tensor) else None


def flops_per_sample(worker: Worker) -> float | None:
    """The operations that training takes for a sample, as the worker's `flops_per_sample` says; None if it doesn't.

    Raises:
        WorkerError: it isn't a number above 0, or a method that returns one.
    """
    given = getattr(worker, "flops_per_sample", None)
    value = given() if callable(given) else given
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise WorkerError(
            f"{type(worker).__name__}.flops_per_sample is {value!r}, but it must be a number above 0, or a method that returns "
            "one: the floating-point operations that a sample takes, forward and backward."
        )
    return float(value)


def _sizes(batch: Batch) -> Iterator[int]:
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch.size(0)
    elif isinstance(batch, nn.utils.rnn.PackedSequence):
        yield int(batch.batch_sizes[0])
    elif isinstance(batch, Mapping | list | tuple):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _sizes(item)
    elif hasattr(batch, "__dict__") and not isinstance(batch, type | nn.Module):  # a dataclass, or an object that moves itself
        for item in vars(batch).values():
            if isinstance(item, Tensor | Mapping | list | tuple):
                yield from _sizes(item)


@dataclass
class ShardReads:
    """What a worker has read of its shard.

    Attributes:
        names: of attributes and methods.
        epoch: batches of a pass through the data, as `Shard.indices` was asked for them; None if it wasn't.
    """

    names: set[str] = field(default_factory=set)
    epoch: int | None = None


def observe_shard(shard: Shard, reads: ShardReads) -> Shard:
    """A shard for which `Shard.at` gives one that adds to `reads` what the worker reads of it."""

    class Observed(Shard):
        def __getattribute__(self, name: str) -> Any:
            if name in ("head", "cursor", "lanes", "slots", "indices") and made:
                reads.names.add(name)
            return object.__getattribute__(self, name)

        def indices(self, size: int, batch_size: int) -> Iterator[NDArray[np.int64]]:
            batches = super().indices(size, batch_size)
            reads.epoch = reads.epoch or size // batch_size
            return batches

    class Observable(Shard):
        def at(self, cursor: int) -> Shard:
            observed = Observed(self.head, self.num_heads, self.seed, cursor)
            made.append(observed)
            return observed

    made: list[Shard] = []  # empty while the constructor of `Observed` reads
    return Observable(shard.head, shard.num_heads, shard.seed, shard.cursor)


def describe_unread_shard(worker: Worker, names: Collection[str]) -> str:
    """Says that a worker's batches don't depend on the shard, or not on the cursor; empty if they may.

    Args:
        names: of what it reads of its shard.
    """
    name = type(worker).__name__
    if not names:
        return (
            f"{name}.train_batches() doesn't read its shard, so every head trains on all the data, in its own order, and a "
            "resumed run repeats some of it. Take the batches of shard.indices(size, batch_size) or of shard.slots()."
        )
    if set(names) == {"head"}:
        return (
            f"{name}.train_batches() reads shard.head but not where the head is in its data, so a resumed run repeats it from "
            "the start. Begin at shard.cursor, or take the batches of shard.indices(size, batch_size) or of shard.slots()."
        )
    return ""


def worker_settings(worker: object) -> dict[str, Any]:
    """The worker's constructor arguments, read from its attributes of the same names, for ``run.toml``.

    A method of the worker that has the name of an argument is none.
    """
    parameters = inspect.signature(type(worker)).parameters
    values = {name: getattr(worker, name) for name in parameters if hasattr(worker, name)}
    return {name: value for name, value in values.items() if getattr(value, "__self__", None) is not worker}


def constructor_parameters(kind: type) -> dict[str, tuple[Any, Any]]:
    """The annotation and the default of each parameter that a worker's constructor accepts by name."""
    try:
        hints = typing.get_type_hints(kind if dataclasses.is_dataclass(kind) else kind.__init__)  # type: ignore[misc]
    except Exception:  # annotations that can't be resolved tell nothing
        hints = {}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: (hints.get(p.name, Any), p.default) for p in parameters if p.kind in by_name}
