"""Whether a worker's batches follow the shard: equal when read again, others for other heads, continued at the cursor."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lte_ray.checking.report import Findings
from lte_ray.checking.words import plural
from lte_ray.data.shard import Shard
from lte_ray.engine.head.rng import Generators, head_seed
from lte_ray.engine.head.worker_state import own_worker
from lte_ray.engine.settings import Settings
from lte_ray.worker import Batch, ShardReads, Worker, copy_batch, count_samples, describe_unread_shard, endless_batches

PART = "data"

ADVICE = "Take the batches of shard.indices(size, batch_size) or of shard.slots()."

OTHER_HEADS = 3
"""Heads whose data are compared with those of head 0, at most."""


class _Reader:
    """Reads batches of a worker as heads do, each with its own generators."""

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self._worker, self._heads, self._seed = worker, settings.lte.num_heads, settings.train.seed

    def read(self, head: int, cursor: int = 0, count: int = 1, generators: Generators | None = None) -> list[Batch]:
        """The first batches of a head from a cursor on, as the process of another run would get them."""
        generators = generators or Generators(head_seed(self._seed, head), torch.device("cpu"))
        with generators.swapped_in():
            batches = endless_batches(own_worker(copy.copy(self._worker)), Shard(head, self._heads, self._seed, cursor))
            return [copy_batch(batch) for batch in islice(batches, count)]

    def read_two(self, findings: Findings) -> tuple[list[Batch], Generators]:
        """The first two batches of head 0, timed, and its generators between the two."""
        generators = Generators(head_seed(self._seed, 0), torch.device("cpu"))
        batches = endless_batches(own_worker(copy.copy(self._worker)), Shard(0, self._heads, self._seed))
        with generators.swapped_in(), findings.timing("first batch"):
            first = next(batches)
        first, between = copy_batch(first), copy.copy(generators)
        with generators.swapped_in(), findings.timing("batch"):
            second = next(batches)
        return [first, copy_batch(second)], between


def check_batches(worker: Worker, settings: Settings, reads: ShardReads, findings: Findings) -> None:
    """Compares batches that must be equal, and batches that must differ."""
    with findings.looking_at(PART, "train_batches()"):
        _check(worker, settings, reads, findings)


def _check(worker: Worker, settings: Settings, reads: ShardReads, findings: Findings) -> None:
    name, reader = type(worker).__name__, _Reader(worker, settings)
    (first, second), between = reader.read_two(findings)
    repeats, mistakes = same(first, second), 0
    if not same(first, reader.read(0)[0]):
        findings.fail(
            PART,
            f"{name}.train_batches() gives another first batch when it is called again for head 0, so a resumed run doesn't "
            f"continue where it was. Draw from shard.seed, and keep no iterator in the worker. {ADVICE}",
        )
        mistakes += 1
    elif not repeats:
        resumed = reader.read(0, cursor=1, generators=between)[0]
        if same(resumed, first):
            findings.fail(
                PART,
                f"{name}.train_batches() begins with the first batch again where shard.cursor is 1, so a resumed run repeats "
                f"its data. Begin after shard.cursor batches. {ADVICE}",
            )
            mistakes += 1
        elif not same(resumed, second):
            findings.fail(
                PART,
                f"{name}.train_batches() begins with another batch than the second one where shard.cursor is 1, so a resumed "
                f"run doesn't continue where it was. Begin after shard.cursor batches. {ADVICE}",
            )
            mistakes += 1
    others = range(1, min(settings.lte.num_heads, 1 + OTHER_HEADS))
    equal = [] if repeats else [head for head in others if same(first, reader.read(head)[0])]
    if equal:
        findings.fail(
            PART,
            f"{name}.train_batches() gives heads 0 and {equal[0]} the same first batch, so they learn the same. {ADVICE}",
        )
        mistakes += 1
    if mistakes:
        return
    if unread := describe_unread_shard(worker, reads.names):
        findings.warn(PART, unread)
    elif repeats:
        findings.warn(PART, "The first two batches of head 0 are equal, so it isn't known whether batches follow the shard.")
    else:
        samples, whose = plural(count_samples(first), "sample"), "others for each head, " if others else ""
        findings.ok(PART, f"Batches of {samples}: the same when read again, {whose}continued at shard.cursor.")


def same(one: Any, other: Any) -> bool:
    """Whether two batches have equal values, in containers of any kind. What can't be compared counts as equal."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)) or one.shape != other.shape or one.dtype != other.dtype:
            return False
        equal_nan = one.is_floating_point() or one.is_complex()
        return bool(torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)) if equal_nan else torch.equal(one, other)
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return bool(np.array_equal(one, other))
    if type(one) is not type(other):
        return False
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, str | bytes | int | float | bool | None):
        return bool(one == other)
    if isinstance(one, Sequence):
        return len(one) == len(other) and all(map(same, one, other))
    if dataclasses.is_dataclass(one) or hasattr(one, "__dict__"):
        return same(vars(one), vars(other))
    return True
