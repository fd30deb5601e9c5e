"""A worker is checked, called for batches, and its batches are moved and counted."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lte_ray import Shard
from lte_ray.errors import WorkerError
from lte_ray.worker import build_model, check_worker, count_samples, endless_batches, to_device, worker_settings
from tests.support.tiny_worker import Tiny
from workers.regression import Regression

Pair = namedtuple("Pair", "inputs targets")


def test_a_complete_worker_passes() -> None:
    """Optional methods aren't needed."""
    check_worker(Tiny())


def test_the_error_names_the_methods_that_a_worker_lacks() -> None:
    """The error names the class, what it lacks (also what can't be called), and what a worker needs."""

    class Half:
        loss = 3

        def build_model(self) -> nn.Module:
            return nn.Linear(1, 1)

    with pytest.raises(WorkerError) as raised:
        check_worker(Half())
    assert "Half can't be used as a worker: it lacks train_batches(), loss()." in str(raised.value)
    assert "needs build_model(), train_batches(), loss() (see" in str(raised.value)


def test_a_model_is_built_from_its_seed_alone() -> None:
    """The same seed gives the same weights, whatever was drawn before; a model that isn't a module is an error."""

    def weights(seed: int) -> torch.Tensor:
        return torch.cat([p.flatten() for p in build_model(Regression(width=4), seed).parameters()])

    first = weights(1)
    torch.rand(7)
    assert torch.equal(weights(1), first)
    assert not torch.equal(weights(2), first)

    class Wrong(Tiny):
        def build_model(self) -> nn.Module:
            return {}  # type: ignore[return-value]

    with pytest.raises(WorkerError, match=r"Wrong.build_model\(\) returned a dict, not a torch.nn.Module"):
        build_model(Wrong(), 0)


class Listed:
    """Yields batch numbers from the cursor on, a few at a time, and records its calls."""

    def __init__(self, at_a_time: int) -> None:
        self.at_a_time, self.asked = at_a_time, []

    def train_batches(self, shard: Shard) -> Iterator[int]:
        self.asked.append(shard)
        return iter(range(shard.cursor, shard.cursor + self.at_a_time))


def test_batches_never_end() -> None:
    """When an iterator ends, `train_batches` is called again with a later cursor, counted from the shard's own."""
    worker, shard = Listed(3), Shard(1, 4, 9, cursor=5)
    batches = endless_batches(worker, shard)  # type: ignore[arg-type]
    assert [next(batches) for _ in range(8)] == list(range(5, 13))
    assert worker.asked == [shard.at(5), shard.at(8), shard.at(11)]


def test_batches_may_be_a_list() -> None:
    """Anything that can be iterated is accepted, so each epoch may be a list."""

    class Lists:
        def train_batches(self, shard: Shard) -> list[str]:
            return ["a", "b"]

    batches = endless_batches(Lists(), Shard(0, 1, 0))  # type: ignore[arg-type]
    assert [next(batches) for _ in range(5)] == ["a", "b", "a", "b", "a"]


def test_an_empty_iterator_is_an_error_that_names_the_head() -> None:
    """At once, and also if batches run out later."""
    with pytest.raises(WorkerError, match=r"ended at once, without a batch, for head 1 of 4 at cursor 5"):
        next(endless_batches(Listed(0), Shard(1, 4, 0, 5)))  # type: ignore[arg-type]
    worker = Listed(2)
    batches = endless_batches(worker, Shard(0, 1, 0))  # type: ignore[arg-type]
    next(batches)
    worker.at_a_time = 0
    next(batches)
    with pytest.raises(WorkerError, match="at cursor 2"):
        next(batches)


def test_what_cannot_be_iterated_is_an_error() -> None:
    """train_batches must return an iterator."""

    class Wrong:
        def train_batches(self, shard: Shard) -> int:
            return 3

    with pytest.raises(WorkerError, match=r"Wrong.train_batches\(\) returned a int, not an iterator"):
        next(endless_batches(Wrong(), Shard(0, 1, 0)))  # type: ignore[arg-type]


def test_to_device_moves_every_tensor_and_keeps_the_rest() -> None:
    """Tensors, tuples, named tuples, lists and dicts, nested; anything else in a batch stays the same object."""
    meta, other = torch.device("meta"), object()
    x = torch.zeros(2, 3)
    assert to_device(x, meta).device == meta
    moved = to_device({"a": (x, [x, other]), "b": Pair(x, None), 3: "text"}, meta)
    assert isinstance(moved["a"], tuple)
    assert isinstance(moved["a"][1], list)
    assert isinstance(moved["b"], Pair)
    assert {t.device for t in (moved["a"][0], moved["a"][1][0], moved["b"].inputs)} == {meta}
    assert moved["a"][1][1] is other
    assert (moved["b"].targets, moved[3]) == (None, "text")
    assert to_device(other, meta) is other


TWO, FIVE = torch.zeros(2, 7), torch.zeros(5)


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (FIVE, 5),
        (TWO, 2),
        (torch.tensor(3.0), 1),
        ((TWO, FIVE), 2),
        ([FIVE, TWO], 5),
        (Pair(FIVE, TWO), 5),
        ({"x": TWO, "y": FIVE}, 2),
        (("name", 3, TWO), 2),
        ({"a": {"b": (TWO,)}, "c": FIVE}, 2),
        ("text", 1),
        ((), 1),
        ({}, 1),
        (None, 1),
        (["a", "b"], 1),
    ],
)
def test_samples_are_the_first_dimension_of_the_first_tensor(batch: object, samples: int) -> None:
    """However the batch is nested; 1 if it holds no tensor."""
    assert count_samples(batch) == samples


@pytest.mark.parametrize("first", [["a", "b", "c"], {"id": 7}, ()], ids=["list of names", "dict of numbers", "empty tuple"])
def test_values_without_tensors_are_skipped(first: object) -> None:
    """A list of file names or a dict of numbers before the tensors doesn't decide the number of samples."""
    assert count_samples((first, FIVE)) == 5


def test_a_workers_settings_are_its_constructor_arguments() -> None:
    """By name, if it keeps them in attributes."""
    assert worker_settings(Regression(width=4, lr=0.5)) == {"width": 4, "batch_size": 64, "samples": 8192, "lr": 0.5}

    class Forgetful:
        def __init__(self, kept: int = 1, lost: int = 2) -> None:
            self.kept = kept

    assert worker_settings(Forgetful(3)) == {"kept": 3}
