"""Shared by tests: a tiny worker with every kind of parameter, and the arithmetic written out densely."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.data import Shard
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.snapshot import SavedState, snapshot
from lte_ray.engine.settings import Settings
from lte_ray.layout import Adapted, Plan, Replica
from lte_ray.messages import CheckpointRequest, Contribution
from lte_ray.worker import build_model, endless_batches

LONG_RUN = os.environ.get("LTE_RAY_LONG") == "1"
"""`make chaos`, which has time for more."""

WORDS, WIDTH, SAMPLES, BATCH = 7, 6, 96, 4
EPS64 = torch.finfo(torch.float64).eps
EPS32 = torch.finfo(torch.float32).eps


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """The relative Frobenius error is at most `tolerance` (against at least 1, so that a zero can be compared)."""
    assert actual.shape == expected.shape
    error = float(torch.linalg.vector_norm((actual.double() - expected.double()).detach()))
    assert error <= tolerance * max(1.0, float(torch.linalg.vector_norm(expected.detach().double()))), error


class Net(nn.Module):
    """Linear layers with and without bias, two that share a weight, an embedding tied to the output, a lone parameter."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.up = nn.Linear(WIDTH, 8)
        self.norm = nn.LayerNorm(8)
        self.mid, self.twin = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.twin.weight = self.mid.weight
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(8, WIDTH)
        self.logits = nn.Linear(WIDTH, WORDS, bias=False)
        self.logits.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.up(self.embed(words) * self.scale)))
        x = self.twin(torch.tanh(self.mid(self.dropout(x))))
        return self.logits(self.down(torch.tanh(x)))


ADAPTED = ["up.weight", "mid.weight", "down.weight"]
REPLICAS = ["scale", "embed.weight", "up.bias", "norm.weight", "norm.bias", "twin.bias", "down.bias"]


@dataclass
class Tiny:
    """Learns a fixed table of next words, in float64."""

    dropout: float = 0.0
    optimizer: str = "sgd"

    def build_model(self) -> nn.Module:
        return Net(self.dropout).double()

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        words = torch.arange(SAMPLES) * 5 % WORDS
        for indices in shard.indices(SAMPLES, BATCH):
            yield words[indices], (words[indices] * 3 + 1) % WORDS

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        words, following = batch
        return F.cross_entropy(model(words), following)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        words = torch.arange(WORDS)
        return {"loss": float(F.cross_entropy(model(words), (words * 3 + 1) % WORDS))}

    def build_optimizer(self, params: list[dict]) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(params, lr=0.01, momentum=0.9)  # higher rates make rounding errors grow
        return torch.optim.AdamW(params, lr=0.01)


@dataclass
class Poisoned(Tiny):
    """The loss of these batches of a head, counted from 0, is NaN; or of all that it has."""

    head: int = 1
    bad: tuple[int, ...] | None = None

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, ...]]:
        for number, batch in enumerate(super().train_batches(shard), shard.cursor):
            poison = shard.head == self.head and (self.bad is None or number in self.bad)
            yield (*batch, torch.tensor(float("nan") if poison else 1.0))

    def loss(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return super().loss(model, batch[:2]) * batch[2]


def make_settings(
    *,
    heads: int = 2,
    steps: int = 12,
    merge_iter: int = 3,
    reset: str = "none",
    policy: object = "average",
    exclude: tuple[str, ...] = (),
    seed: int = 3,
) -> Settings:
    """Settings of a small run: rank 2, s = 2."""
    lte = LTEConfig(num_heads=heads, lora_r=2, lora_alpha=4.0, reset=reset, exclude=exclude)  # type: ignore[arg-type]
    return Settings("test", lte, MergeConfig(merge_iter, policy=policy), TrainConfig(steps=steps, seed=seed))


class DenseHead:
    """A head written out without adapters: the unconverted model runs on W~ + s B A, all dense.

    Starts with the main weights, replicas and A of `like`.
    """

    def __init__(self, worker: Tiny, like: Head) -> None:
        self.worker, self.plan, seed = worker, like.plan, like.settings.train.seed
        self.model = build_model(worker, seed)
        start = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        factors = {name: p.detach().clone().requires_grad_() for name, p in like.converted.factors.items()}
        self.w = {spec.name: start[spec.name] for spec in self.plan.adapted}
        self.a = {spec.name: factors[spec.a_name] for spec in self.plan.adapted}
        self.b = {spec.name: factors[spec.b_name] for spec in self.plan.adapted}
        self.p = {r.name: start[r.name].requires_grad_() for r in self.plan.replicas}
        self.s = like.settings.lte.lora_alpha / like.settings.lte.lora_r
        self.optimizer = worker.build_optimizer([{"params": [*self.a.values(), *self.b.values(), *self.p.values()]}])
        self.batches = endless_batches(worker, Shard(like.number, like.settings.lte.num_heads, seed))

    def product(self, name: str) -> Tensor:
        """s B A of a main weight."""
        return self.s * (self.b[name] @ self.a[name])

    def train(self, steps: int) -> None:
        for _ in range(steps):
            weights = {name: w + self.product(name) for name, w in self.w.items()} | self.p

            def run(words: Tensor, weights: dict[str, Tensor] = weights) -> Tensor:
                return torch.func.functional_call(self.model, weights, (words,))

            self.worker.loss(run, next(self.batches)).backward()  # type: ignore[arg-type]
            self.optimizer.step()
            self.optimizer.zero_grad()


def make_plan_of(shapes: list[tuple[int, int, int]], replicas: list[tuple[int, ...]], scaling: float = 1.0) -> Plan:
    """A plan of weights (out, in, rank) and replica shapes, without a model."""
    adapted = tuple(Adapted(f"w{i}", (out, inn), rank, scaling) for i, (out, inn, rank) in enumerate(shapes))
    return Plan(adapted, tuple(Replica(f"p{i}", shape) for i, shape in enumerate(replicas)))


def split(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Cuts a flat buffer into tensors of these shapes, laid end to end."""
    parts = torch.split(flat, [math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def dense_by_hand(plan: Plan, contribution: Tensor, reference: Tensor | None) -> Tensor:
    """The change of one contribution, from the formula: s (B A - B' A') of each weight, then the replica changes."""
    shapes = [shape for spec in plan.adapted for shape in ((spec.rank, spec.shape[1]), (spec.shape[0], spec.rank))]
    size = sum(math.prod(shape) for shape in shapes)
    new = split(contribution[:size], shapes)
    old = [torch.zeros_like(t) for t in new] if reference is None else split(reference, shapes)
    changes = []
    for i, spec in enumerate(plan.adapted):
        changes.append(spec.scaling * (new[2 * i + 1] @ new[2 * i] - old[2 * i + 1] @ old[2 * i]))
    return torch.cat([*(c.flatten() for c in changes), contribution[size:]])


def random_flat(size: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def state_of(head: Head) -> SavedState:
    """The head's state at the version that it has adopted, which holds all that it has heard was merged."""
    return snapshot(head, CheckpointRequest(head.version, {head.number: head.state.merged.sequence}))


def through_a_file(state: SavedState) -> SavedState:
    """The state as a checkpoint keeps it: safetensors and JSON."""
    tensors, meta = state
    return safetensors.torch.load(safetensors.torch.save(tensors)), json.loads(json.dumps(meta))


def offer(head: int, sequence: int = 1, **changes: object) -> Contribution:
    """A contribution's record without its buffer."""
    values = {"run": "test", "incarnation": 0, "version": 0, "step": 3 * sequence, "steps": 3, "samples": 12, "loss": 1.0}
    return Contribution(head=head, sequence=sequence, **(values | changes))  # type: ignore[arg-type]
