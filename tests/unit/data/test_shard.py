"""A head's shard of the data: deterministic, disjoint, resumable at any batch."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lte_ray import Shard
from lte_ray.data.partition import Partition, to_partitions

heads, batches, extras, seeds = st.integers(1, 4), st.integers(1, 5), st.integers(0, 30), st.integers(0, 2**31)


def take(shard: Shard, size: int, batch: int, count: int) -> list[list[int]]:
    return [indices.tolist() for indices in itertools.islice(shard.indices(size, batch), count)]


@given(heads, batches, extras, seeds)
def test_the_same_shard_gives_the_same_batches(num_heads: int, batch: int, extra: int, seed: int) -> None:
    """Batches depend only on head, number of heads, seed and cursor; each is full and within the data."""
    size = batch + extra
    shard = Shard(num_heads - 1, num_heads, seed)
    first = take(shard, size, batch, 12)
    np.random.seed(0)
    assert take(shard, size, batch, 12) == first
    assert all(len(indices) == batch and set(indices) <= set(range(size)) for indices in first)


@given(heads, batches, extras, seeds)
def test_an_epoch_holds_every_sample_once_but_less_than_one_batch(num_heads: int, batch: int, extra: int, seed: int) -> None:
    """For any number of heads, their batches of an epoch are disjoint and omit only what doesn't fill a batch."""
    size = batch + extra
    in_epoch = size // batch
    row = [indices for turn in zip(*(take(Shard(h, num_heads, seed), size, batch, 2 * in_epoch) for h in range(num_heads)),
                                   strict=True) for indices in turn]  # fmt: skip
    for epoch in (0, 1):
        seen = [index for indices in row[epoch * in_epoch : (epoch + 1) * in_epoch] for index in indices]
        assert len(seen) == len(set(seen)) == in_epoch * batch
        assert size - len(seen) < batch
        assert seen == np.random.default_rng([seed, epoch]).permutation(size)[: len(seen)].tolist()


@given(heads, batches, extras, seeds, st.integers(0, 20))
def test_cursor_k_is_the_same_as_skipping_k_batches(num_heads: int, batch: int, extra: int, seed: int, k: int) -> None:
    """A resumed head continues exactly where it was, across epochs."""
    size = batch + extra
    shard = Shard(0, num_heads, seed)
    assert take(shard.at(k), size, batch, 6) == take(shard, size, batch, k + 6)[k:]
    assert shard.at(k) == Shard(0, num_heads, seed, cursor=k) == shard.at(k // 2).at(k)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 20), st.integers(0, 20), seeds)
def test_heads_that_change_share_the_same_batches(old: int, new: int, mine: int, others: int, seed: int) -> None:
    """A partition's batches don't depend on its owner: a shard that gets another's partition trains them in order."""
    one, two = Shard(0, old + 1, seed).at(mine), Shard(old, old + 1, seed).at(others)
    both = Shard(new + 7, new, seed, cursor=5, lanes=to_partitions((*one.lanes, *two.lanes)))
    expected = sorted([*itertools.islice(one.slots(), 12), *itertools.islice(two.slots(), 12)])[:12]
    assert list(itertools.islice(both.slots(), 12)) == expected
    assert take(both, 17, 3, 12) == [take(Shard(0, 1, seed, cursor=slot), 17, 3, 1)[0] for slot in expected]
    assert list(itertools.islice(both.at(9).slots(), 8)) == expected[4:]


def test_a_shard_goes_through_pickle() -> None:
    """With its partitions, and without its cache."""
    shard = Shard(1, 3, 7, cursor=4, lanes=(Partition(5, 6), Partition(9, 6)))
    batches = take(shard, 20, 3, 9)
    again = pickle.loads(pickle.dumps(shard))
    assert again == shard and again.lanes == shard.lanes
    assert take(again, 20, 3, 9) == batches


def test_batches_may_be_changed_in_place() -> None:
    """A worker that sorts or offsets its indices doesn't change those of another head in its process."""
    for indices in itertools.islice(Shard(0, 1, 3).indices(12, 4), 6):
        indices[:] = -1
    assert sorted(itertools.chain(*take(Shard(0, 1, 3), 12, 4, 3))) == list(range(12))


def test_epochs_and_seeds_give_other_orders() -> None:
    """Each epoch and each seed has its own permutation; a single head sees all samples of an epoch."""
    shard = Shard(0, 1, 5)
    first, second = take(shard, 40, 40, 2)
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second
    assert take(Shard(0, 1, 6), 40, 40, 1)[0] != first


@pytest.mark.parametrize(("size", "batch"), [(0, 1), (7, 8), (5, 0)])
def test_too_few_samples_are_an_error_that_says_what_to_change(size: int, batch: int) -> None:
    """Fewer samples than one batch; raised by the call of `indices`."""
    with pytest.raises(ValueError, match=f"{size} samples can't fill a batch of {batch}; use more data, or a smaller batch"):
        Shard(0, 2, 0).indices(size, batch)


def test_impossible_shards_are_refused() -> None:
    """A cursor that goes back or below 0, a head beyond num_heads without partitions, numbers that aren't partitions."""
    with pytest.raises(ValueError, match="has taken 5 batches already; it can't go back to 4"):
        Shard(0, 2, 0, cursor=5).at(4)
    with pytest.raises(ValueError, match="cursor is -1"):
        Shard(0, 2, 0, cursor=-1)
    with pytest.raises(ValueError, match="head 2 of 2 heads has no partition at the start; pass its partitions"):
        Shard(2, 2, 0)
    with pytest.raises(ValueError, match="isn't a partition"):
        Shard(2, 2, 0, lanes=(Partition(0, 0),))
