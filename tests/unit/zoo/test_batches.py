"""Batches in containers of all kinds: moved to the device, of the same type, and with their samples counted."""

from __future__ import annotations

import collections
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.data import Shard
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.worker import count_samples, to_device

X, Y = torch.zeros(4, 3), torch.ones(4)
META = torch.device("meta")


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass
class Sample:
    x: Tensor
    name: str = "a"


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    more: tuple[Tensor, ...] = ()


class Graph:
    """Moves itself, as torch_geometric's batches do."""

    def __init__(self, x: Tensor) -> None:
        self.label, self.x = "g", x

    def to(self, device: torch.device) -> Graph:
        return Graph(self.x.to(device))


class Opaque(Mapping[str, Tensor]):
    """A mapping that can't be written to."""

    def __getitem__(self, key: str) -> Tensor:
        return {"x": X}[key]

    def __iter__(self) -> Iterator[str]:
        return iter(["x"])

    def __len__(self) -> int:
        return 1


def encoding() -> Any:
    return pytest.importorskip("transformers").BatchEncoding({"input_ids": X.long(), "labels": Y})


PACKED = nn.utils.rnn.pack_sequence([torch.zeros(3, 2), torch.zeros(2, 2)])

BATCHES: dict[str, Any] = {
    "tensor": X,
    "tuple": (X, Y),
    "list": [X, Y],
    "dict": {"x": X, "y": Y},
    "nested": {"a": [(X, "text"), {"b": Y}], "n": 3},
    "named tuple": Pair(X, Y),
    "ordered": collections.OrderedDict(x=X),
    "default": collections.defaultdict(list, x=X),
    "user dict": collections.UserDict(x=X, y=Y),
    "proxy": types.MappingProxyType({"x": X}),
    "mapping": Opaque(),
    "dataclass": Sample(X),
    "frozen dataclass": Frozen(X, (Y,)),
    "own object": Graph(X),
    "scalar first": {"scale": torch.tensor(2.0), "x": X},
    "encoding": encoding,
}


def tensors(batch: Any) -> list[Tensor]:
    """All tensors in a batch."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return [t for value in batch.values() for t in tensors(value)]
    if isinstance(batch, list | tuple):
        return [t for value in batch for t in tensors(value)]
    return [t for value in vars(batch).values() for t in tensors(value)] if hasattr(batch, "__dict__") else []


@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_is_moved_and_counted(kind: str) -> None:
    """All its tensors, whatever holds them; the container's type stays, and the batch that was given isn't changed."""
    batch = BATCHES[kind]() if callable(BATCHES[kind]) else BATCHES[kind]
    assert count_samples(batch) == 4
    before = [t.device for t in tensors(batch)]
    moved = to_device(batch, META)
    assert {t.device for t in tensors(moved)} == {META}
    assert len(tensors(moved)) == len(before)
    if kind not in ("proxy", "mapping"):  # of these no other can be made
        assert type(moved) is type(batch)
    if kind != "encoding":  # it moves itself in place
        assert [t.device for t in tensors(batch)] == before


def test_a_packed_sequence_is_moved_by_itself() -> None:
    """Its lengths stay on the CPU; its samples are its sequences."""
    assert count_samples(PACKED) == 2
    moved = to_device((PACKED, X), torch.device("cpu"))
    assert isinstance(moved[0], nn.utils.rnn.PackedSequence)
    assert torch.equal(moved[0].data, PACKED.data)


@dataclass
class Reading:
    """A worker that takes its batches in the way of each test."""

    kind: str

    def build_model(self) -> nn.Module:
        return nn.Linear(3, 3)

    def train_batches(self, shard: Shard) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(shard.head if self.kind == "head" else 0)
        if self.kind == "indices":
            yield from (torch.zeros(len(rows), 3) for rows in shard.indices(64, 4))
        elif self.kind == "slots":
            yield from (torch.zeros(4, 3) for _ in shard.slots())
        elif self.kind == "cursor":
            for _ in range(shard.cursor, 99):
                yield torch.zeros(4, 3)
        elif self.kind == "seed":
            generator.manual_seed(shard.seed)
        while True:
            yield Sample(torch.randn(4, 3, generator=generator))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch.x if isinstance(batch, Sample) else batch).square().mean()  # type: ignore[no-any-return]

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": 0.0}


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("indices", ""),
        ("slots", ""),
        ("cursor", ""),
        ("none", "doesn't read its shard, so every head trains on all the data"),
        ("seed", "doesn't read its shard, so every head trains on all the data"),
        ("head", "reads shard.head but not where the head is in its data"),
    ],
)
def test_a_worker_that_does_not_follow_its_shard_is_described(kind: str, problem: str) -> None:
    """In words that say what to use; a worker that takes its batches from the shard is not."""
    settings = Settings("zoo", LTEConfig(num_heads=2, lora_r=1), MergeConfig(merge_iter=2), TrainConfig(steps=4))
    found = prepare(Reading(kind), settings).data_problem
    assert (problem in found) if problem else not found
    assert not found or "shard.indices(size, batch_size)" in found
    done = run_in_process(Reading(kind), settings)
    assert [head.samples for head in done.heads] == [16, 16]
