"""A head and its worker's code: random numbers, batches, errors and counts."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lte_ray.data import Shard
from lte_ray.engine.head.head import Head
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.prepare import load_base, prepare
from lte_ray.errors import WorkerError, WorkerFailed
from lte_ray.messages import Contribution, ContributionResult
from lte_ray.optim import LoRAMuon
from lte_ray.worker import build_model
from tests.support.tiny_worker import BATCH, Tiny, make_settings


def make_head(worker: Tiny, head: int = 0, **changes: object) -> Head:
    settings = make_settings(**changes)  # type: ignore[arg-type]
    built = Head(worker, settings, head, dtype=torch.float64)
    built.start(0, prepare(Tiny(), settings, torch.float64).base)
    return built


def next_round(head: Head) -> Contribution:
    """A round whose contribution is refused, so that the head continues to train."""
    contribution = head.train_round()
    head.adopt(ContributionResult(head.number, contribution.sequence, False, 0, "a test"), 0, None)
    return contribution


def test_heads_in_one_process_draw_what_each_would_draw_alone() -> None:
    """With dropout, two heads that take turns send bitwise what each sends when it runs alone."""
    worker = Tiny(dropout=0.5)
    alone = []
    for n in (0, 1):
        head = make_head(worker, n)
        alone.append([next_round(head).buffer for _ in range(3)])
    heads = [make_head(worker, n) for n in (0, 1)]
    turns = [[next_round(head).buffer for head in heads] for _ in range(3)]
    for n, rounds in enumerate(alone):
        assert all(torch.equal(turn[n], expected) for turn, expected in zip(turns, rounds, strict=True))


class Drawing(Tiny):
    """Draws from all three global generators in every step."""

    drawn: list[tuple[float, float, float]]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        return super().loss(model, batch)


def test_each_head_has_its_own_python_numpy_and_torch_numbers() -> None:
    """Two heads draw different numbers, the same head the same again, and the caller's generators don't change."""

    def states() -> tuple[object, ...]:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    drawn = []
    for n in (0, 1, 0):
        worker = Drawing()
        worker.drawn = []
        settings = make_settings()
        head = Head(worker, settings, n, dtype=torch.float64)
        base = torch.cat([dict(head.model.named_parameters())[e.name].detach().flatten() for e in head.plan.base.entries])
        head.start(0, base)
        head.train_round()
        drawn.append(worker.drawn)
    assert states() == before
    assert drawn[0] == drawn[2]
    assert all(a != b for one, two in zip(drawn[0], drawn[1], strict=True) for a, b in zip(one, two, strict=True))


class Finite(Tiny):
    """Yields two batches at a time, and is then called again."""

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.islice(super().train_batches(shard), 2)


def test_iterators_that_end_are_called_again_with_a_later_cursor() -> None:
    """A worker that yields two batches at a time trains as one whose batches never end."""
    finite, endless = make_head(Finite()), make_head(Tiny())
    assert torch.equal(next_round(finite).buffer, next_round(endless).buffer)
    assert torch.equal(next_round(finite).buffer, next_round(endless).buffer)


def test_the_last_round_takes_the_steps_that_are_left() -> None:
    """Of 8 steps with merge_iter=3 the rounds take 3, 3 and 2; then the head is done. Samples and losses agree."""
    head = make_head(Tiny(), steps=8)
    taken, samples = [], 0
    while not head.done:
        contribution = next_round(head)
        taken.append(contribution.step)
        samples = contribution.samples
    assert (taken, samples, head.samples) == ([3, 6, 8], 8 * BATCH, 8 * BATCH)
    status = head.status()
    assert (status.step, status.samples, status.head, status.version) == (8, 8 * BATCH, 0, 0)
    assert status.loss == contribution.loss


def test_a_rounds_loss_is_the_mean_of_its_steps() -> None:
    """The contribution's loss is the mean of the worker's losses in this round."""

    class Noting(Tiny):
        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            losses.append(value := super().loss(model, batch))
            return value

    losses: list[Tensor] = []
    contribution = next_round(make_head(Noting()))
    assert contribution.loss == sum(loss.item() for loss in losses) / 3


def test_a_contribution_is_never_written_again() -> None:
    """Further training leaves the buffer of an earlier contribution as it was."""
    head = make_head(Tiny())
    first = next_round(head).buffer
    kept = first.clone()
    next_round(head)
    assert torch.equal(first, kept)


class Failing(Tiny):
    """Raises `error` in its fifth step."""

    error: Exception
    calls: int = 0

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.calls += 1
        if self.calls == 5:
            raise self.error
        return super().loss(model, batch)


def test_an_error_in_the_workers_code_names_head_and_step() -> None:
    """WorkerFailed names the head and the step, with the worker's own traceback, chained."""
    worker = Failing()
    worker.error = ValueError("boom 42")
    head = make_head(worker, 1)
    next_round(head)
    with pytest.raises(WorkerFailed) as raised:
        next_round(head)
    failed = raised.value
    assert (failed.where, failed.step) == ("head 1", 5)
    assert failed.__cause__ is worker.error
    assert "ValueError: boom 42" in failed.traceback
    assert "raise self.error" in failed.traceback
    assert str(failed).startswith("The worker failed in head 1 at local step 5:\n\n")


def test_an_error_of_lte_rays_own_keeps_its_message_without_a_traceback() -> None:
    """A WorkerError within a step becomes a WorkerFailed with that message alone."""
    worker = Failing()
    worker.error = WorkerError("what to change")
    head = make_head(worker)
    next_round(head)
    with pytest.raises(WorkerFailed) as raised:
        next_round(head)
    assert (raised.value.step, raised.value.traceback) == (5, "what to change")


def raise_boom(*_: object) -> None:
    raise RuntimeError("boom")


def end_at_once(*_: object) -> Iterator[tuple[Tensor, Tensor]]:
    return iter(())


@pytest.mark.parametrize(
    ("method", "replacement", "step", "text"),
    [
        ("build_model", raise_boom, None, "RuntimeError: boom"),
        ("build_optimizer", raise_boom, None, "RuntimeError: boom"),
        ("train_batches", raise_boom, 1, "RuntimeError: boom"),
        ("train_batches", end_at_once, 1, "ended at once, without a batch"),
    ],
)
def test_an_error_in_any_method_of_the_worker_names_the_head(
    monkeypatch: pytest.MonkeyPatch, method: str, replacement: Callable[..., object], step: int | None, text: str
) -> None:
    """What the worker's method raises names the head, and the step if there is one."""
    worker = Tiny()
    monkeypatch.setattr(worker, method, replacement, raising=False)
    with pytest.raises(WorkerFailed) as raised:
        make_head(worker, 1).train_round()
    assert (raised.value.where, raised.value.step) == ("head 1", step)
    assert text in raised.value.traceback


def test_without_an_optimizer_of_its_own_a_worker_gets_lora_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is LoRA-Muon with the two groups "lora" and "replica", which hold what trains and nothing else."""
    monkeypatch.delattr(Tiny, "build_optimizer")
    head = make_head(Tiny())
    groups = head.optimizer.param_groups
    assert isinstance(head.optimizer, LoRAMuon)
    assert [(g["name"], len(g["params"])) for g in groups] == [("lora", 6), ("replica", 7)]
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in head.trained_parameters.values()}


class Bypassing(Tiny):
    """Computes with the weights of `down` and `mid` without calling the layers, and with that of `up` both ways."""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        assert model.down.weight.dtype == torch.float64

        def forward(words: Tensor) -> Tensor:
            x = torch.tanh(model.up(model.embed(words))) @ model.mid.weight.T
            assert model.down.weight.shape == (6, 8)  # the weight can be read
            return torch.nn.functional.linear(x, model.down.weight, model.down.bias) @ model.up.weight.T @ model.up.weight

        model.forward = forward
        return model

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        words, following = batch
        return torch.nn.functional.cross_entropy(model(words), following % 6) + 0.01 * model.down.weight.square().sum()


@pytest.mark.parametrize("settings", [{}, {"lora_bias": "lora"}, {"base_dtype": "nf4"}])
@pytest.mark.parametrize("stack", ["never", "always"])
def test_weights_used_without_a_call_include_the_factors(stack: str, settings: dict[str, Any]) -> None:
    """A head trains what the merged model then computes: with one head, both losses agree after the last merge."""
    plain = make_settings(heads=2, steps=6)
    run = dataclasses.replace(plain, lte=dataclasses.replace(plain.lte, **settings))
    done = run_in_process(Bypassing(), run, torch.float64, heads_per_actor=2, stack_heads=stack)
    model, batch = build_model(Bypassing(), run.train.seed), (torch.arange(6), torch.arange(6))
    load_base(model, done.plan, done.base)
    head = done.heads[0]
    head.prepare_to_train()  # loads the main weights, which heads of one process share
    with head.converted.user_parameters.track():
        theirs = Bypassing().loss(head.model, batch)
        theirs.backward()
    merged = Bypassing().loss(model, batch)
    # After a merge W~ + s B A is W; nf4 heads compute with a rounded W.
    assert theirs.item() == pytest.approx(float(merged), rel=0.05 if "base_dtype" in settings else 1e-12)
    assert all(factor.grad is not None for name, factor in head.converted.factors.items() if "down" in name or "mid" in name)
