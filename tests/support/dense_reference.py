"""The arithmetic of LTE computed densely, from the formulas, as a reference for tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lte_ray.data import Shard
from lte_ray.engine.head.head import Head
from lte_ray.layout import Plan
from lte_ray.worker import build_model, endless_batches
from tests.support.tiny_worker import Tiny


class DenseHead:
    """A head without adapters: the unconverted model computes with the dense W~ + s B A.

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
        """Returns s B A of a main weight."""
        return self.s * (self.b[name] @ self.a[name])

    def train(self, steps: int) -> None:
        for _ in range(steps):
            weights = {name: w + self.product(name) for name, w in self.w.items()} | self.p

            def run(words: Tensor, weights: dict[str, Tensor] = weights) -> Tensor:
                return torch.func.functional_call(self.model, weights, (words,))

            self.worker.loss(run, next(self.batches)).backward()  # type: ignore[arg-type]
            self.optimizer.step()
            self.optimizer.zero_grad()


def split_flat(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Splits a flat buffer into consecutive tensors of these shapes."""
    parts = torch.split(flat, [math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def dense_change_by_formula(plan: Plan, contribution: Tensor, reference: Tensor | None) -> Tensor:
    """Returns the change of one contribution: s (B A - B' A') of each weight, then the replica changes."""
    shapes = [shape for spec in plan.adapted for shape in ((spec.rank, spec.shape[1]), (spec.shape[0], spec.rank))]
    size = sum(math.prod(shape) for shape in shapes)
    new = split_flat(contribution[:size], shapes)
    old = [torch.zeros_like(t) for t in new] if reference is None else split_flat(reference, shapes)
    changes = []
    for i, spec in enumerate(plan.adapted):
        changes.append(spec.scaling * (new[2 * i + 1] @ new[2 * i] - old[2 * i + 1] @ old[2 * i]))
    return torch.cat([*(c.flatten() for c in changes), contribution[size:]])
