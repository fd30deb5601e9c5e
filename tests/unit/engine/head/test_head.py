"""One head in float64, against heads and merges written out densely (`helpers.DenseHead`)."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from lte_ray.adapters import LTELinear
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.snapshot import restore
from lte_ray.engine.prepare import prepare
from lte_ray.layout import Plan
from lte_ray.merging.flat_buffer import base_replicas, replica_part, views
from lte_ray.messages import Contribution, ContributionResult
from tests.support.dense_reference import DenseHead
from tests.support.head_states import head_state, through_file
from tests.support.numerics import EPS32, assert_near
from tests.support.tiny_worker import Tiny, make_settings

# SGD only adds float64 rounding up over some ten steps. Adam divides by a root that may be small, which magnifies it.
TOLERANCE = {"sgd": 1e-13, "adamw": 1e-11}


def make_head(worker: Tiny, head: int = 0, **changes: object) -> tuple[Head, Tensor]:
    """A head that has started, and the base that it started from."""
    settings = make_settings(**changes)  # type: ignore[arg-type]
    built = Head(worker, settings, head, dtype=torch.float64)
    base = prepare(worker, settings, torch.float64).base
    built.start(0, base)
    return built, base


def accept(head: Head, contribution: Contribution, version: int, base: Tensor) -> None:
    head.adopt(ContributionResult(head.number, contribution.sequence, True, version), version, base)


def refuse(head: Head, contribution: Contribution, version: int = 0, base: Tensor | None = None) -> None:
    head.adopt(ContributionResult(head.number, contribution.sequence, False, version, "a test"), version, base)


def parts(plan: Plan, contribution: Contribution) -> dict[str, Tensor]:
    return views(plan.contribution, contribution.buffer)


def flat(plan: Plan, weights: dict[str, Tensor]) -> Tensor:
    return torch.cat([weights[e.name].detach().flatten() for e in plan.base.entries])


def effective(head: Head) -> dict[str, Tensor]:
    """The weights that the head computes with: W~ + s B A."""
    layers = {id(m.weight): m for m in head.model.modules() if isinstance(m, LTELinear)}
    parameters = dict(head.model.named_parameters())
    chosen = {spec.name: layers[id(parameters[spec.name])] for spec in head.plan.adapted}
    return {n: (m.weight + m.lte_factors.scaling * m.lte_factors.B @ m.lte_factors.A).detach() for n, m in chosen.items()}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_heads_equal_their_dense_counterparts_after_merges(optimizer: str) -> None:
    """Contributions hold (A, B, p - p'), W~ is W - s B'A', and a head computes with the merged weights right after a merge."""
    worker, tolerance = Tiny(optimizer=optimizer), TOLERANCE[optimizer]
    heads = [make_head(worker, n)[0] for n in (0, 1)]
    dense = [DenseHead(worker, head) for head in heads]
    plan, base = heads[0].plan, make_head(worker)[1]
    products = [{name: torch.zeros_like(w) for name, w in d.w.items()} for d in dense]  # s B' A'
    for version in range(1, 5):
        contributions = [head.train_round() for head in heads]
        merged = {name: value.clone() for name, value in views(plan.base, base).items()}
        for d, c, committed in zip(dense, contributions, products, strict=True):
            d.train(3)
            sent = parts(plan, c)
            for spec in plan.adapted:
                assert_near(sent[spec.a_name], d.a[spec.name], tolerance)
                assert_near(sent[spec.b_name], d.b[spec.name], tolerance)
                product = d.product(spec.name).detach()
                merged[spec.name] += 0.5 * (product - committed[spec.name])
                committed[spec.name] = product
            for name, p in d.p.items():
                change = p.detach() - views(plan.base, base)[name]
                assert_near(sent[name], change, tolerance)
                merged[name] += 0.5 * change
        base = flat(plan, merged)
        for head, d, c, committed in zip(heads, dense, contributions, products, strict=True):
            accept(head, c, version, base)
            parameters = dict(head.model.named_parameters())
            for name, weight in d.w.items():
                weight.copy_(merged[name] - committed[name])
                assert_near(parameters[name], weight, tolerance)
                assert_near(effective(head)[name], merged[name], tolerance)
            for name, p in d.p.items():
                p.data.copy_(merged[name])
                assert torch.equal(parameters[name], merged[name])
            assert (head.version, head.step) == (version, 3 * version)


def test_a_refused_contribution_is_part_of_the_next() -> None:
    """A refusal leaves the head untouched; its next contribution holds all since the start, steps and samples too."""
    worker = Tiny()
    head, base = make_head(worker)
    dense = DenseHead(worker, head)
    before = {name: p.detach().clone() for name, p in head.model.named_parameters()}
    refused = head.train_round()
    trained = {name: p.detach().clone() for name, p in head.model.named_parameters()}
    refuse(head, refused)
    assert all(torch.equal(p, trained[name]) for name, p in head.model.named_parameters())
    assert (refused.steps, refused.samples, refused.sequence, refused.step) == (3, 12, 1, 3)
    second = head.train_round()
    dense.train(6)
    assert (second.steps, second.samples, second.sequence, second.step, second.version) == (6, 24, 2, 6, 0)
    sent = parts(head.plan, second)
    for spec in head.plan.adapted:
        assert_near(sent[spec.b_name] @ sent[spec.a_name], dense.b[spec.name] @ dense.a[spec.name], TOLERANCE["sgd"])
        assert torch.equal(dict(head.model.named_parameters())[spec.name], before[spec.name])
    for name, p in dense.p.items():
        assert_near(sent[name], p - views(head.plan.base, base)[name], TOLERANCE["sgd"])
    accept(head, second, 1, base)
    assert head.train_round().steps == 3


def test_a_refusal_with_a_newer_base_keeps_reference_and_progress() -> None:
    """On W_2 without its last contribution: W~ = W_2 - s B' A' with the old reference, p = P_2 + (p - P_1)."""
    head, base = make_head(Tiny())
    plan, s = head.plan, head.plan.adapted[0].scaling
    first = head.train_round()
    one = base + 0.1
    accept(head, first, 1, one)
    second = head.train_round()
    trained = {name: p.detach().clone() for name, p in head.model.named_parameters()}
    two = base - 0.2
    refuse(head, second, 2, two)
    reference, new = parts(plan, first), views(plan.base, two)
    parameters = dict(head.model.named_parameters())
    for spec in plan.adapted:
        # One float64 product and one sum.
        assert_near(parameters[spec.name], new[spec.name] - s * reference[spec.b_name] @ reference[spec.a_name], 1e-15)
    for replica in plan.replicas:
        kept = trained[replica.name] - views(plan.base, one)[replica.name]
        assert_near(parameters[replica.name], new[replica.name] + kept, 1e-15)
    factors = head.converted.factors
    assert all(torch.equal(factors[name], value) for name, value in parts(plan, second).items() if "lora" in name)
    assert (head.version, head.train_round().steps) == (2, 6)


def test_progress_from_before_a_newer_base_is_contributed_once() -> None:
    """Refused, moved to a newer base, then accepted without further change: the merge holds the change exactly once."""
    head, base = make_head(Tiny(), merge_iter=1)
    first = head.train_round()
    refuse(head, first, 1, base + 0.1)
    change = {r.name: parts(head.plan, first)[r.name] for r in head.plan.replicas}
    head.optimizer.param_groups[0]["lr"] = head.optimizer.param_groups[-1]["lr"] = 0.0  # the next step moves nothing
    second = parts(head.plan, head.train_round())
    for name, value in change.items():
        assert_near(second[name], value, 1e-15)  # (P + d) - P rounds once
    assert all(torch.equal(second[n], v) for n, v in parts(head.plan, first).items() if "lora" in n)


def test_reset_b_zeroes_b_after_an_accepted_merge_only() -> None:
    """With reset="B", accepted means B := 0, A kept and W~ = W_1; refused means B is kept for the next contribution."""
    head, base = make_head(Tiny(), reset="B")
    first = parts(head.plan, c := head.train_round())
    refuse(head, c)
    factors = head.converted.factors
    assert all(
        torch.equal(factors[spec.b_name], first[spec.b_name]) and factors[spec.b_name].any() for spec in head.plan.adapted
    )
    second = parts(head.plan, c := head.train_round())
    accept(head, c, 1, base + 0.1)
    parameters = dict(head.model.named_parameters())
    for spec in head.plan.adapted:
        assert not factors[spec.b_name].any()
        assert torch.equal(factors[spec.a_name], second[spec.a_name])
        assert torch.equal(parameters[spec.name], views(head.plan.base, base + 0.1)[spec.name])
    assert not torch.equal(parts(head.plan, head.train_round())["up.weight.lora_B"], second["up.weight.lora_B"])


@pytest.mark.parametrize("reset", ["none", "B"])
def test_the_optimizer_keeps_its_state_across_merges(reset: str) -> None:
    """Moments and step counts are bitwise the same before and after a rebase."""
    head, base = make_head(Tiny(optimizer="adamw"), reset=reset)
    contribution = head.train_round()

    def moments() -> list[Tensor]:
        return [v.clone() for entries in head.optimizer.state.values() for v in entries.values()]

    before = moments()
    accept(head, contribution, 1, base + 0.1)
    assert len(before) == 3 * (2 * len(head.plan.adapted) + len(head.plan.replicas))
    assert all(torch.equal(a, b) for a, b in zip(moments(), before, strict=True))


class Scheduled(Tiny):
    """With a learning rate that falls after every step."""

    def build_schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total_steps)


@pytest.mark.parametrize("reset", ["none", "B"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_restored_head_continues_bitwise_the_same(optimizer: str, reset: str) -> None:
    """Through safetensors and JSON: data, dropout, optimizer, schedule, reference and counts continue as they would have."""
    worker = Scheduled(dropout=0.3, optimizer=optimizer)
    head, base = make_head(worker, reset=reset)
    one = base + 0.1
    accept(head, head.train_round(), 1, one)
    tensors, meta = head_state(head)
    restored = Head(worker, head.settings, 0, dtype=torch.float64, incarnation=1)
    restore(restored, through_file((tensors, meta)), one)
    for sequence in (2, 3):
        expected, continued = head.train_round(), restored.train_round()
        assert torch.equal(continued.buffer, expected.buffer)
        assert (continued.sequence, continued.step, continued.steps, continued.samples) == (sequence, 3 * sequence, 3, 12)
        assert (continued.loss, continued.version) == (expected.loss, expected.version)
        for each, contribution in ((head, expected), (restored, continued)):
            accept(each, contribution, sequence, one)
            assert {g["lr"] for g in each.optimizer.param_groups} == {0.01 * (1 - each.step / 12)}


@dataclass
class Rounded(Tiny):
    """Tiny in bfloat16, which has 8 bits."""

    lr: float = 0.0

    def build_model(self) -> nn.Module:
        return super().build_model().bfloat16()

    def build_optimizer(self, params: list[dict]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=self.lr)


def rounded_head(lr: float) -> tuple[Head, list[Tensor]]:
    """A head in bfloat16, merged in float32, and bases whose replicas bfloat16 can't represent."""
    settings = make_settings(steps=18)
    start = prepare(Rounded(), settings).base
    shifts = [0.1 * torch.randn(start.shape, generator=torch.Generator().manual_seed(n)) for n in range(6)]
    bases = [start + shift for shift in shifts]
    for base in bases:
        replicas = base_replicas(prepare(Rounded(), settings).plan, base)
        assert float((replicas - replicas.bfloat16()).abs().max()) > 1e-3
    return Head(Rounded(lr=lr), settings, 0), bases


@pytest.mark.parametrize("accepted", [(True,) * 5, (False,) * 5, (True, False, True, True, False)], ids=["yes", "no", "mixed"])
def test_replicas_in_bfloat16_that_do_not_train_contribute_nothing(accepted: tuple[bool, ...]) -> None:
    """p - p' is what was trained: the head keeps the base's float32 values, and rounds them for the model only."""
    head, (first, *bases) = rounded_head(lr=0.0)
    head.start(0, first)
    for version, (base, answer) in enumerate(zip(bases, accepted, strict=True), 1):
        contribution = head.train_round()
        assert not replica_part(head.plan, contribution.buffer).any()
        (accept if answer else refuse)(head, contribution, version, base)
        for name, p in head.converted.replicas().items():
            assert torch.equal(p, views(head.plan.base, base)[name])


def test_steps_of_bfloat16_replicas_beyond_the_base_are_counted_without_its_rounding() -> None:
    """Refused progress stays as it was on newer bases, and is gone once it is accepted."""
    head, (first, *bases) = rounded_head(lr=0.05)
    head.start(0, first)
    contribution = head.train_round()
    learned = replica_part(head.plan, contribution.buffer).clone()
    assert 0.01 < float(learned.abs().max()) < 2
    for group in head.optimizer.param_groups:
        group["lr"] = 0.0
    for version in (1, 2, 3):
        refuse(head, contribution, version, bases[version - 1])
        contribution = head.train_round()
        # With each base p - (p - d) is rounded twice in float32, where |p| + |d| < 4.
        contributed = replica_part(head.plan, contribution.buffer)
        assert float((contributed - learned).abs().max()) <= version * 4 * EPS32
    accept(head, contribution, 4, bases[3])
    assert not replica_part(head.plan, head.train_round().buffer).any()
