"""A head's part of the data: deterministic, disjoint, resumable at any batch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lte_ray import Shard

heads, batches, extras, seeds = st.integers(1, 4), st.integers(1, 5), st.integers(0, 30), st.integers(0, 2**31)


def take(shard: Shard, size: int, batch: int, count: int) -> list[list[int]]:
    return [indices.tolist() for indices in itertools.islice(shard.indices(size, batch), count)]


@given(heads, batches, extras, seeds)
def test_the_same_shard_gives_the_same_batches(num_heads: int, batch: int, extra: int, seed: int) -> None:
    """Batches depend on head, heads, seed and cursor alone; each is full and within the data."""
    size = num_heads * batch + extra
    shard = Shard(num_heads - 1, num_heads, seed)
    first = take(shard, size, batch, 12)
    np.random.seed(0)
    assert take(shard, size, batch, 12) == first
    assert all(len(indices) == batch and set(indices) <= set(range(size)) for indices in first)


@given(heads, batches, extras, seeds)
def test_within_an_epoch_no_sample_is_seen_twice(num_heads: int, batch: int, extra: int, seed: int) -> None:
    """All heads' batches of one epoch are disjoint, and leave out less than a batch for every head."""
    size = num_heads * batch + extra
    steps = size // (num_heads * batch)
    for epoch in (0, 1):
        seen = [
            index
            for head in range(num_heads)
            for indices in take(Shard(head, num_heads, seed, epoch * steps), size, batch, steps)
            for index in indices
        ]
        assert len(seen) == len(set(seen)) == steps * num_heads * batch
        assert size - len(seen) < num_heads * batch


@given(heads, batches, extras, seeds, st.integers(0, 20))
def test_cursor_k_is_the_same_as_skipping_k_batches(num_heads: int, batch: int, extra: int, seed: int, k: int) -> None:
    """A resumed head goes on exactly where it was, across epochs."""
    size = num_heads * batch + extra
    shard = Shard(0, num_heads, seed)
    assert take(shard.at(k), size, batch, 6) == take(shard, size, batch, k + 6)[k:]


def test_epochs_and_seeds_give_other_orders() -> None:
    """Every epoch is a new permutation, and so is every seed; one head alone sees all samples of an epoch."""
    shard = Shard(0, 1, 5)
    first, second = take(shard, 40, 40, 2)
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second
    assert take(Shard(0, 1, 6), 40, 40, 1)[0] != first


@pytest.mark.parametrize(("size", "batch", "num_heads"), [(0, 1, 1), (5, 2, 3), (7, 8, 1)])
def test_too_few_samples_are_an_error_that_says_what_to_change(size: int, batch: int, num_heads: int) -> None:
    """Fewer samples than one batch for every head can't be shared."""
    with pytest.raises(
        ValueError, match=f"{size} samples can't fill a batch of {batch} for each of {num_heads} heads; use more"
    ):
        next(Shard(0, num_heads, 0).indices(size, batch))
