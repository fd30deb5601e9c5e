"""One function that gives a head its batches of any data set: `loader`."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler, default_collate

from lte_ray.data.prefetch import read_ahead
from lte_ray.data.records import check_columns, read_records
from lte_ray.data.shard import Shard
from lte_ray.errors import DataError

MAX_PARTS = 8
"""Tensors or arrays of a table that was given as a tuple or list, at most."""

Collate = Callable[[list[Any]], Any]


def loader(
    dataset: Any,
    shard: Shard,
    batch_size: int | None,
    *,
    collate: Collate | None = None,
    columns: Sequence[str] | None = None,
    num_workers: int = 0,
    prefetch: int = 0,
    pin_memory: bool | None = None,
) -> Iterator[Any]:
    """Yields a head's batches, from `shard.cursor` on, endlessly.

    A data set with a length and an index (`torch.utils.data.Dataset`, Hugging Face's `datasets.Dataset`, a list, files) is
    shuffled as by `Shard.indices`: f(seed, slot), in constant time from any cursor. While a batch is read, the global random
    generators are seeded by (seed, slot): random augmentation gives the same batch after a resume, on any head, and with any
    number of worker processes; and the head's own generators aren't touched.

    A stream (`IterableDataset`, `ray.data.Dataset`, any iterable) keeps its order: slot g has the items g B to (g + 1) B - 1 of
    a pass, without the last incomplete batch; then the next pass begins. Every head reads the whole stream and keeps its own
    slots, so batches are assigned exactly, also when heads leave or join. That holds only if the stream gives the same items
    each time. A resumed run reads the stream again from the start.

    Args:
        dataset: as above; or files as `lte_ray.data.records.read_records` takes them, by their path, pattern, URI or
            ``hf:NAME``; or a function ``f(epoch)`` that makes the stream of a pass.
        shard: the head's.
        batch_size: items in a batch; None for a stream whose items are batches.
        collate: makes a batch of a list of items; by default torch's `default_collate`.
        columns: of items that are mappings, keep only these.
        num_workers: processes that read a data set with an index.
        prefetch: batches that a thread reads ahead, which pays where reading waits for a disk or a network. The data must not
            draw from the global random generators then.
        pin_memory: whether batches are put into pinned memory; by default with CUDA, if processes or a thread read ahead.

    Raises:
        DataError: the data set is empty, smaller than one batch for each head, of a form that has no items, or has no such
            column; or the stream can be read only once, or its order isn't fixed.
    """
    if isinstance(dataset, str | Path):
        dataset = [record for _, record in read_records(str(dataset))]
    _check_arguments(batch_size, columns, num_workers, prefetch)
    if num_workers < 0 or prefetch < 0 or (num_workers and prefetch):
        raise DataError(
            f"num_workers is {num_workers} and prefetch is {prefetch}, but both must be at least 0, and one of them 0: "
            "processes read ahead themselves."
        )
    if pin_memory is None:
        pin_memory = bool(num_workers or prefetch) and torch.cuda.is_available()
    if _has_index(dataset):
        if batch_size is None:
            raise DataError(f"A {type(dataset).__name__} has single items: give batch_size.")
        read = _Read(dataset, collate or default_collate, tuple(columns or ()), shard.seed, seeds=not prefetch)
        check_size(len(dataset), batch_size, shard, "The data set")
        batches = _indexed(read, shard, batch_size, num_workers, pin_memory)
    else:
        if num_workers:
            raise DataError(
                f"num_workers is {num_workers}, but a {type(dataset).__name__} has no length and index, so processes can't "
                "share it. Use prefetch."
            )
        batches = _stream(dataset, shard, batch_size, collate, tuple(columns or ()))
    pin = _pinned if pin_memory and not num_workers else _same  # with processes, DataLoader has done it
    return _ahead(batches, prefetch, pin) if prefetch else map(pin, batches)


def _check_arguments(batch_size: Any, columns: Any, num_workers: Any, prefetch: Any) -> None:
    """Raises DataError for an argument of another type."""
    if isinstance(columns, str):
        raise DataError(f"columns is {columns!r}, but it must be a list of names, such as [{columns!r}].")
    numbers = {"batch_size": batch_size, "num_workers": num_workers, "prefetch": prefetch}
    for name, value in numbers.items():
        is_number = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not is_number and (name != "batch_size" or value is not None):
            raise DataError(f"{name} is {value!r}, but it must be a whole number.")


def check_size(size: int, batch_size: int, shard: Shard, what: str) -> None:
    """Raises DataError if there is less data than one batch for each head."""
    if not size:
        raise DataError(f"{what} is empty.")
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}, but it must be at least 1.")
    needed = batch_size * shard.num_heads
    if size < needed:
        raise DataError(
            f"{what} has {size} samples, fewer than one batch of {batch_size} for each of {shard.num_heads} heads: {needed}. "
            "Use more data, a smaller batch, or fewer heads."
        )


def _has_index(dataset: Any) -> bool:
    if isinstance(dataset, Mapping):
        raise DataError(f"This data set is a mapping of {', '.join(map(str, dataset))}. Give one of its values.")
    if _is_table(dataset):
        raise DataError(
            f"This data set is a {type(dataset).__name__} of {len(dataset)} tensors or arrays, which would be read as "
            f"{len(dataset)} items. Give torch.utils.data.TensorDataset(X, y), of tensors."
        )
    if hasattr(dataset, "iloc"):  # pandas: df[0] is a column, or the row with the label 0
        name = type(dataset).__name__
        change = 'df.to_dict("records")' if hasattr(dataset, "columns") else "its tolist()"
        raise DataError(
            f"A {name} of pandas isn't read by the numbers of its rows. Give {change}, or a data set that uses iloc."
        )
    if isinstance(dataset, DataLoader | IterableDataset):
        return False
    return hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")


def _is_table(dataset: Any) -> bool:
    """Whether this is (X, y) or [X, y]: a tuple of tensors or arrays, or a short list of equally many rows of other shapes."""
    if not isinstance(dataset, tuple | list) or not dataset or len(dataset) > MAX_PARTS:
        return False
    if not all(isinstance(part, torch.Tensor | np.ndarray) and part.ndim for part in dataset):
        return False
    shapes = {tuple(part.shape) for part in dataset}
    return isinstance(dataset, tuple) or (len(shapes) > 1 and len({shape[0] for shape in shapes}) == 1)


class _Read(Dataset[Any]):
    """Reads a batch, as f(seed, slot). In a thread it must not seed the generators, which belong to the whole process."""

    def __init__(self, dataset: Any, collate: Collate, columns: tuple[str, ...], seed: int, *, seeds: bool) -> None:
        self.dataset, self.collate, self.columns, self.seed, self.seeds = dataset, collate, columns, seed, seeds

    def __getitem__(self, place: tuple[int, list[int]]) -> Any:
        slot, rows = place
        with seeded(self.seed, slot) if self.seeds else nullcontext():
            many = getattr(self.dataset, "__getitems__", None)
            items = many(rows) if many is not None else [self.dataset[row] for row in rows]
            return self.collate(_select(items, self.columns, "The data set"))


def _select(items: Any, columns: tuple[str, ...], what: str) -> list[Any]:
    if not columns:
        return list(items)
    for item in items:
        if not isinstance(item, Mapping):
            raise DataError(f"{what} has items of the type {type(item).__name__}, which have no columns. Leave columns out.")
        check_columns(item, columns, what)
    return [{column: item[column] for column in columns} for item in items]


def _indexed(read: _Read, shard: Shard, batch_size: int, num_workers: int, pin_memory: bool) -> Iterator[Any]:
    places = ((slot, rows.tolist()) for slot, rows in _places(read, shard, batch_size))
    if not num_workers:
        return (read[place] for place in places)
    generator = torch.Generator().manual_seed(shard.seed)  # else it would draw from the head's
    return iter(
        DataLoader(
            read,
            batch_size=None,
            sampler=places,
            num_workers=num_workers,
            collate_fn=_same,
            pin_memory=pin_memory,
            generator=generator,
        )
    )


def _places(read: _Read, shard: Shard, batch_size: int) -> Iterator[tuple[int, Any]]:
    return zip(shard.slots(), shard.indices(len(read.dataset), batch_size), strict=False)


def _same(batch: Any) -> Any:
    return batch


def _stream(
    dataset: Any, shard: Shard, batch_size: int | None, collate: Collate | None, columns: tuple[str, ...]
) -> Iterator[Any]:
    """The batches of a stream whose numbers are the shard's slots."""
    first, wanted = 0, shard.slots()
    slot = next(wanted)
    for epoch in itertools.count():
        number = -1
        for number, items in enumerate(_batches(_one_pass(dataset, epoch, batch_size), batch_size)):
            if first + number == slot:
                yield items if batch_size is None else (collate or default_collate)(_select(items, columns, "The stream"))
                slot = next(wanted)
        if epoch and number < 0:
            raise DataError(
                f"The stream gives no batch in pass {epoch} (the first is 0): it is empty then, or can be read only once. Give "
                "a function that makes it for each pass: loader(lambda epoch: ..., ...)."
            )
        first += number + 1
        if not epoch and first < shard.num_heads:
            raise DataError(
                f"The stream has {first} full batches of {batch_size or 'its own'} items, fewer than one for each of "
                f"{shard.num_heads} heads. Use more data, a smaller batch, or fewer heads."
            )


def _one_pass(dataset: Any, epoch: int, batch_size: int | None) -> Iterable[Any]:
    if hasattr(dataset, "iter_batches") and hasattr(dataset, "iter_rows"):  # ray.data.Dataset
        dataset.context.execution_options.preserve_order = True  # else its order would depend on the speed of its tasks
        return dataset.iter_rows() if batch_size is not None else dataset.iter_torch_batches()  # type: ignore[no-any-return]
    if isinstance(dataset, DataLoader):
        _check_torch_loader(dataset, batch_size)
    elif callable(dataset) and not isinstance(dataset, Iterable):
        made = _call(dataset, epoch)
        if isinstance(made, DataLoader):
            _check_torch_loader(made, batch_size)
        elif not isinstance(made, Iterable):
            raise DataError(f"The function gave a {type(made).__name__} for pass {epoch}, but it must give an iterable.")
        return made  # type: ignore[no-any-return]
    if not isinstance(dataset, Iterable):
        raise DataError(f"A {type(dataset).__name__} isn't a data set: it has neither a length and an index, nor an iterator.")
    if isinstance(dataset, Iterator):
        raise DataError(
            f"A {type(dataset).__name__} can be read only once, but heads read a stream again when they resume. Give a "
            "function that makes it: loader(lambda epoch: ..., ...)."
        )
    set_epoch = getattr(dataset, "set_epoch", None)
    if callable(set_epoch):
        set_epoch(epoch)
    return dataset


def _call(make: Callable[[int], Any], epoch: int) -> Any:
    """Calls the function that makes the stream of a pass."""
    with suppress(ValueError):  # a builtin function has no signature
        try:
            inspect.signature(make).bind(epoch)
        except TypeError as error:
            raise DataError(
                f"The function can't be called with the number of the pass: {error}. Write lambda epoch: ..."
            ) from None
    return make(epoch)


def _check_torch_loader(data: DataLoader[Any], batch_size: int | None) -> None:
    """Raises DataError if its items aren't those that loader() expects, or if its order may differ between heads."""
    if batch_size is not None and data.batch_sampler is not None:
        raise DataError(
            f"batch_size is {batch_size}, but a DataLoader gives batches already. Pass batch_size=None, or give loader() its "
            "dataset."
        )
    if isinstance(data.dataset, IterableDataset):
        return
    sampler = data.sampler if data.batch_sampler is None else getattr(data.batch_sampler, "sampler", data.batch_sampler)
    if not isinstance(sampler, SequentialSampler):
        raise DataError(
            f"A DataLoader with a {type(sampler).__name__} draws its order itself, which may differ "
            "between heads. Give loader() its dataset, collate and num_workers instead: it shuffles."
        )


def _batches(items: Iterable[Any], size: int | None) -> Iterator[Any]:
    """Lists of `size` items, without the last incomplete one; the items themselves if `size` is None."""
    if size is None:
        return iter(items)
    if size < 1:
        raise DataError(f"batch_size is {size}, but it must be at least 1.")
    iterator = iter(items)
    return itertools.takewhile(lambda batch: len(batch) == size, iter(lambda: list(itertools.islice(iterator, size)), []))


def _ahead(batches: Iterator[Any], count: int, prepare: Callable[[Any], Any]) -> Iterator[Any]:
    before = _states()
    first = next(batches)
    if not all(map(_equal, before, _states())):
        raise DataError(
            f"prefetch is {count}, but reading the data draws random numbers from a global generator, which the model uses at "
            "the same time. Leave prefetch out, use num_workers, or draw from a generator of the data set's own."
        )
    yield prepare(first)
    yield from read_ahead(batches, count, prepare)


def _states() -> tuple[Any, ...]:
    numpy_state = np.random.get_state(legacy=False)
    return random.getstate(), repr(numpy_state["state"]["pos"]), numpy_state["state"]["key"].tobytes(), torch.get_rng_state()


def _equal(one: Any, other: Any) -> bool:
    return bool(torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other)


@contextmanager
def seeded(seed: int, slot: int) -> Iterator[None]:
    """Within the block, the global generators of Python, NumPy and torch (on the CPU) are seeded by (seed, slot)."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    number = int.from_bytes(hashlib.sha256(f"{seed}/{slot}/data".encode()).digest()[:8], "little") >> 1
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.default_generator.manual_seed(number)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _pinned(batch: Any) -> Any:
    return torch.utils.data._utils.pin_memory.pin_memory(batch)  # type: ignore[no-untyped-call] # as DataLoader does it
