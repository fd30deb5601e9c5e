"""Batches of any data set: which items each head gets, what a resume gives, and every way in which data is refused."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lte_ray.data import Shard, loader
from lte_ray.data.prefetch import read_ahead
from lte_ray.errors import DataError


class Noisy(Dataset[Any]):
    """Item i is i with random changes, from all three global generators."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, random.random() + np.random.rand() + float(torch.rand(()))


class Stream(IterableDataset[int]):
    """The numbers 0 to 22; a pass of batches of 4 has five, and three items are left."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(23))


def take(batches: Iterator[Any], count: int) -> list[Any]:
    return list(itertools.islice(batches, count))


def rows(batches: Iterator[Any], count: int) -> list[list[int]]:
    return [batch.tolist() for batch in take(batches, count)]


def test_items_with_an_index_follow_the_shard() -> None:
    """They are those of `Shard.indices`, from any cursor."""
    shard = Shard(1, 2, seed=3)
    expected = [indices.tolist() for indices in itertools.islice(shard.indices(40, 4), 12)]
    assert rows(loader(list(range(40)), shard, 4), 12) == expected
    assert rows(loader(list(range(40)), shard.at(7), 4), 5) == expected[7:]


def test_random_changes_depend_on_the_batch_only() -> None:
    """Not on the cursor from which a head continues, nor on processes; and the caller's generators don't move."""
    torch.manual_seed(5)
    before = torch.get_rng_state(), random.getstate()
    all_batches = take(loader(Noisy(), Shard(0, 2, seed=1), 4), 6)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    torch.rand(3)
    later = take(loader(Noisy(), Shard(0, 2, seed=1, cursor=3), 4), 3)
    assert torch.equal(torch.stack([noise for _, noise in later]), torch.stack([noise for _, noise in all_batches[3:]]))


@pytest.mark.slow
def test_processes_give_the_same_batches() -> None:
    """With `num_workers`, from a cursor in the middle of the data."""
    shard = Shard(0, 2, seed=1, cursor=2)
    here, there = (take(loader(Noisy(), shard, 4, num_workers=count), 4) for count in (0, 2))
    assert all(torch.equal(a, b) for one, other in zip(here, there, strict=True) for a, b in zip(one, other, strict=True))


def test_a_stream_is_divided_by_slots() -> None:
    """Together the heads see every full batch of each pass once, in the stream's order."""
    heads = [rows(loader(Stream(), Shard(head, 2, seed=0), 4), 5) for head in range(2)]
    merged = [batch for pair in zip(*heads, strict=True) for batch in pair]
    assert merged == [list(range(start, start + 4)) for start in (0, 4, 8, 12, 16)] * 2


def test_a_stream_continues_from_any_share() -> None:
    """A resume, and partitions that came from another head, give the batches with these numbers."""
    shard = Shard(0, 2, seed=0)
    assert rows(loader(Stream(), shard.at(3), 4), 4) == rows(loader(Stream(), shard, 4), 7)[3:]
    moved = Shard(0, 2, seed=0, cursor=4, lanes=((7, 4), (8, 2)))
    assert rows(loader(Stream(), moved, 4), 3) == [[8, 9, 10, 11], [12, 13, 14, 15], [0, 1, 2, 3]]  # slots 7, 8, 10


def test_a_stream_of_batches_and_one_made_for_each_pass() -> None:
    """Batches are given out as they are, and the function knows the pass."""
    batches = loader(lambda epoch: ([epoch, number] for number in range(3)), Shard(0, 1, seed=0), None)
    assert take(batches, 4) == [[0, 0], [0, 1], [0, 2], [1, 0]]


def test_a_torch_loader_in_a_fixed_order_is_a_stream_of_batches() -> None:
    """Its batches are divided; one that shuffles is refused."""
    fixed = DataLoader(list(range(8)), batch_size=2)  # type: ignore[arg-type]
    assert rows(loader(fixed, Shard(1, 2, seed=0), None), 2) == [[2, 3], [6, 7]]
    stream = DataLoader(Stream(), batch_size=2)
    assert rows(loader(stream, Shard(1, 2, seed=0), None), 2) == [[2, 3], [6, 7]]


def test_a_torch_loader_that_cannot_be_divided_is_refused() -> None:
    """One whose order isn't fixed, also if a function makes it; and batches of batches."""
    data = TensorDataset(torch.arange(20))
    drawn = [
        DataLoader(data, batch_size=2, shuffle=True),
        DataLoader(data, batch_size=2, sampler=WeightedRandomSampler([1.0] * 20, 20)),
        DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 2, drop_last=False)),
    ]
    for one in drawn:
        for given in (one, lambda epoch, one=one: one):
            with pytest.raises(DataError, match=r"RandomSampler .*draws its order itself"):
                next(loader(given, Shard(0, 1, seed=0), None))
    for given in (DataLoader(data, batch_size=2), lambda epoch: DataLoader(data, batch_size=2)):
        with pytest.raises(DataError, match="batch_size is 4, but a DataLoader gives batches already"):
            next(loader(given, Shard(0, 1, seed=0), 4))


class ReadOnce(IterableDataset[int]):
    """Every pass is the same generator."""

    def __init__(self) -> None:
        self.items = (number for number in range(20))

    def __iter__(self) -> Iterator[int]:
        return self.items


def test_a_pass_without_a_batch_is_refused() -> None:
    """Instead of waiting for ever: one iterator for all passes, and a stream that is empty later."""
    once = iter(range(20))
    for data in (lambda epoch: once, ReadOnce(), lambda epoch: [] if epoch else range(20)):
        batches = loader(data, Shard(0, 2, seed=0), 2)
        assert rows(batches, 5)[-1] == [16, 17]
        with pytest.raises(DataError, match=r"no batch in pass 1 .*read only once\. Give a function"):
            next(batches)


def test_tables_of_pandas_are_refused() -> None:
    """Their index isn't the number of a row."""
    pandas = pytest.importorskip("pandas")
    with pytest.raises(DataError, match=r'A DataFrame of pandas .*df\.to_dict\("records"\)'):
        loader(pandas.DataFrame({"a": range(9)}), Shard(0, 1, seed=0), 2)
    with pytest.raises(DataError, match=r"A Series of pandas .*tolist"):
        loader(pandas.Series(range(9)), Shard(0, 1, seed=0), 2)


def test_files_by_their_path(tmp_path: Path) -> None:
    """JSONL is read as records; `columns` keeps some of them."""
    (tmp_path / "a.jsonl").write_text('{"x": 1, "y": "a"}\n{"x": 2, "y": "b"}\n')
    batch = next(loader(tmp_path / "a.jsonl", Shard(0, 1, seed=0), 2, columns=["x"]))
    assert sorted(batch["x"].tolist()) == [1, 2]
    assert list(batch) == ["x"]


def test_data_sets_of_hugging_face() -> None:
    """Map style is shuffled by the shard; a stream keeps its order."""
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"x": list(range(20)), "text": [str(n) for n in range(20)]})
    shard = Shard(1, 2, seed=3)
    first = next(loader(data, shard, 4))
    assert first["x"].tolist() == next(shard.indices(20, 4)).tolist()
    assert first["text"] == [str(n) for n in first["x"].tolist()]
    assert next(loader(data.to_iterable_dataset(), shard, 4, columns=["x"]))["x"].tolist() == [4, 5, 6, 7]
    with pytest.raises(DataError, match=r"This data set is a mapping of train\. Give one of its values"):
        loader(datasets.DatasetDict(train=data), shard, 4)


def test_a_thread_reads_ahead_the_same_batches() -> None:
    """With `prefetch`, of both kinds of data; and the thread ends with the generator."""
    shard, before = Shard(0, 2, seed=1), threading.active_count()
    for data in (list(range(40)), Stream()):
        ahead = loader(data, shard, 4, prefetch=2)
        assert rows(ahead, 6) == rows(loader(data, shard, 4), 6)
        ahead.close()  # type: ignore[attr-defined]
    for thread in threading.enumerate():
        if thread.name == "lte-ray read ahead":
            thread.join(10)
    assert threading.active_count() <= before


def test_an_error_in_the_thread_is_raised_after_the_items_before_it() -> None:
    """Its own type and text."""

    def numbers() -> Iterator[int]:
        yield 1
        raise KeyError("two")

    ahead = read_ahead(numbers(), 3)
    assert next(ahead) == 1
    with pytest.raises(KeyError, match="two"):
        next(ahead)


def test_sequences_of_several_lengths_are_items() -> None:
    """A list of tensors isn't taken for a table if its tensors are items of other lengths, or of one shape."""
    for data in ([torch.ones(3), torch.ones(5)], [torch.ones(5), torch.ones(5)]):
        batch = next(loader(data, Shard(0, 2, seed=0), 1))
        assert batch.shape[0] == 1


@pytest.mark.parametrize(
    ("data", "batch_size", "settings", "says"),
    [
        ([], 4, {}, "The data set is empty"),
        ([1] * 7, 4, {}, "has 7 samples, fewer than one batch of 4 for each of 2 heads: 8. Use more data, a smaller batch, or"),
        ([1] * 9, 0, {}, "batch_size is 0, but it must be at least 1"),
        ([1] * 9, None, {}, "A list has single items: give batch_size"),
        ([{"a": 1, "b": 2}] * 9, 4, {"columns": ["c"]}, "there is no column c. The columns are: a, b"),
        ([1] * 9, 4, {"columns": ["c"]}, "items of the type int, which have no columns"),
        (Noisy(), 4, {"prefetch": 2}, "draws random numbers from a global generator"),
        (Noisy(), 4, {"prefetch": 2, "num_workers": 1}, "one of them 0"),
        (Stream(), 4, {"num_workers": 1}, "processes can't share it. Use prefetch"),
        (Stream(), 12, {}, "has 1 full batches of 12 items, fewer than one for each of 2 heads"),
        (iter([1, 2]), 1, {}, r"can be read only once.*loader\(lambda epoch"),
        (5, 1, {}, "A int isn't a data set"),
        (lambda epoch: 5, 1, {}, "The function gave a int for pass 0, but it must give an iterable"),
        (
            (torch.zeros(9, 2), np.zeros(9)),
            1,
            {},
            r"a tuple of 2 tensors or arrays.* Give torch.utils.data.TensorDataset\(X, y\)",
        ),
        ([torch.zeros(9, 2), torch.zeros(9)], 1, {}, r"a list of 2 tensors or arrays.* Give torch.utils.data.TensorDataset"),
        ([1] * 9, "4", {}, "batch_size is '4', but it must be a whole number"),
        ([1] * 9, 4.0, {}, "batch_size is 4.0, but it must be a whole number"),
        ([1] * 9, True, {}, "batch_size is True, but it must be a whole number"),
        ([1] * 9, 4, {"num_workers": None}, "num_workers is None, but it must be a whole number"),
        ([{"text": 1}] * 9, 4, {"columns": "text"}, r"columns is 'text', but it must be a list of names, such as \['text'\]"),
        (lambda: [1] * 9, 4, {}, "can't be called with the number of the pass: too many positional.* Write lambda epoch"),
    ],
)
def test_data_that_cannot_be_used_is_refused(data: Any, batch_size: int | None, settings: Any, says: str) -> None:
    """With one sentence about what was found and what to change."""
    with pytest.raises(DataError, match=says):
        take(loader(data, Shard(1, 2, seed=0), batch_size, **settings), 3)
