"""Heads whose main weights are quantized: what they compute and report, and that merging is unaffected."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lte_ray import checkpoint
from lte_ray.adapters.quantization import QuantizedWeight
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.snapshot import restore
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.merging import Average, ComposedPolicy
from lte_ray.merging.flat_buffer import as_matrix, as_stored, views
from lte_ray.messages import ContributionResult
from lte_ray.run.metrics import MetricsLog
from lte_ray.storage import RunDirectory
from tests.support.dense_reference import dense_change_by_formula
from tests.support.head_states import head_state, through_file
from tests.support.numerics import EPS64, assert_near
from tests.support.tiny_worker import Net, Tiny, make_settings

FORMATS = ["bf16", "int8", "nf4"]


@pytest.fixture(params=FORMATS)
def form(request: pytest.FixtureRequest) -> str:
    """Each format that this machine supports."""
    if request.param == "nf4":
        pytest.importorskip("bitsandbytes")
    return str(request.param)


def settings(form: str, **lte: Any) -> Settings:
    run_settings = make_settings()
    return dataclasses.replace(run_settings, lte=dataclasses.replace(run_settings.lte, base_dtype=form, **lte))


class Kinds(nn.Module):
    """A linear layer, a transposed one, convolutions, an embedding, attention and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.conv = nn.Embedding(7, 8), nn.Conv1d(8, 8, 3, padding="same", groups=2)
        self.attention, self.norm, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8), nn.Linear(8, 7)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)[None]
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.out(self.norm(x + self.attention(x, x, x)[0]))[0]


class Many(Tiny):
    """Tiny's task for a model with a layer of every kind."""

    def build_model(self) -> nn.Module:
        return Kinds().double()


EVERYTHING = {"adapt": ("linear", "attention", "conv", "embedding", "norm"), "lora_bias": "lora"}


def started(worker: Tiny, run_settings: Settings, head: int = 0) -> tuple[Head, Tensor]:
    base = prepare(worker, run_settings, torch.float64).base
    one = Head(worker, run_settings, head, dtype=torch.float64)
    one.start(0, base)
    return one, base


def quantized(head: Head, base: Tensor) -> tuple[dict[str, Tensor], float]:
    """Q(W) in float64 of every main weight that is quantized, and the largest relative error, by a separate quantizer."""
    weights, errors = {}, [0.0]
    for spec in head.plan.adapted:
        weight = views(head.plan.base, base)[spec.name]
        weights[spec.name] = weight
        if spec.base_dtype != "fp32" and len(spec.shape) > 1:
            shown = as_matrix(spec, weight) if len(spec.shape) == 2 else weight
            q = QuantizedWeight.from_weight(shown.float(), spec.base_dtype).dequantize().double()
            weights[spec.name] = as_stored(spec, q) if len(spec.shape) == 2 else q
            errors.append(
                float(torch.linalg.vector_norm(shown.float().double() - q) / torch.linalg.vector_norm(shown.double()))
            )
    return weights, max(errors)


def dense_model(head: Head, worker: Tiny, base: Tensor, reference: dict[str, Tensor] | None) -> nn.Module:
    """The unconverted model with Q(W) + s (B A - B' A') instead of each main weight, and the head's replicas."""
    model = worker.build_model()
    weights, _ = quantized(head, base)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for spec in head.plan.adapted:
            product = head.converted.factors[spec.b_name] @ head.converted.factors[spec.a_name]
            if reference is not None:
                product = product - reference[spec.b_name] @ reference[spec.a_name]
            parameters[spec.name].copy_(weights[spec.name] + as_stored(spec, spec.scaling * product))
        for replica in head.plan.replicas:
            parameters[replica.name].copy_(head.converted.parameters[replica.name])
    return model


@pytest.mark.parametrize(("worker", "lte"), [(Tiny(), {}), (Many(), EVERYTHING)], ids=["tiny", "every kind"])
def test_a_head_computes_with_the_quantized_weight_and_exact_products(form: str, worker: Tiny, lte: dict[str, Any]) -> None:
    """Q(W) x + s (B A - B' A') x in all layers, before and after merges; gradients are those of that dense model."""
    head, base = started(worker, settings(form, **lte))
    words, reference = torch.arange(7), None
    for version in range(1, 4):
        dense = dense_model(head, worker, base, reference)
        # Sums of some ten float64 terms in another order, through five layers.
        assert_near(head.model(words), dense(words), 5000 * EPS64)
        contribution = head.train_round()
        dense = dense_model(head, worker, base, reference)
        assert_near(head.model(words), dense(words), 5000 * EPS64)
        reference = {n: t.clone() for n, t in views(head.plan.contribution, contribution.buffer).items() if "lora" in n}
        base = base + 0.05 * torch.randn(base.shape, generator=torch.Generator().manual_seed(version), dtype=base.dtype)
        head.adopt(ContributionResult(0, version, True, version), version, base)


def test_gradients_pass_through_the_quantized_weight(form: str) -> None:
    """Each factor's gradient is that through the dense weight: dA = s B^T dW, dB = s dW A^T."""
    worker = Tiny()
    head, base = started(worker, settings(form))
    head.train_round()
    dense, batch = dense_model(head, worker, base, None), (torch.arange(7), torch.arange(7) * 3 % 7)
    worker.loss(head.model, batch).backward()
    worker.loss(dense, batch).backward()
    parameters = dict(dense.named_parameters())
    for spec in head.plan.adapted:
        a, b = head.converted.factors[spec.a_name], head.converted.factors[spec.b_name]
        g = parameters[spec.name].grad
        assert g is not None
        assert_near(a.grad, spec.scaling * b.T @ g, 5000 * EPS64)
        assert_near(b.grad, spec.scaling * g @ a.T, 5000 * EPS64)
    for replica in head.plan.replicas:
        assert_near(head.converted.parameters[replica.name].grad, parameters[replica.name].grad, 5000 * EPS64)


def test_a_shared_weight_is_quantized_once(form: str) -> None:
    """Both layers hold the same codes, and nothing holds the weight in full."""
    head, _ = started(Tiny(), settings(form))
    assert head.model.mid.lte_parameters["weight"].stored is head.model.twin.lte_parameters["weight"].stored
    assert dict(head.model.named_parameters())["mid.weight"].untyped_storage().nbytes() == 8  # of one element
    assert head.model.mid.weight.shape == (8, 8)  # the weight can still be read
    kinds = {name: type(main.stored) for name, main in head.converted.main_weights.items()}
    assert set(kinds.values()) == {QuantizedWeight}


def test_the_quantization_error_is_reported_with_each_contribution_and_merge(form: str, tmp_path: Path) -> None:
    """||W - Q(W)|| / ||W||, the largest of all layers, of the version that was trained on; metrics.jsonl has it."""
    result = run_in_process(Tiny(), settings(form), torch.float64)
    fresh = prepare(Tiny(), settings(form), torch.float64).base
    _, expected = quantized(result.heads[0], fresh)
    assert expected > 0
    assert result.merges[0].base_error == pytest.approx(expected, rel=1e-6)  # norms of the fp32 weights
    head, base = started(Tiny(), settings(form))
    head.train_round()
    head.adopt(ContributionResult(0, 1, True, 1), 1, base + 0.1)
    assert head.train_round().base_error == pytest.approx(quantized(head, base + 0.1)[1], rel=1e-6)
    directory = RunDirectory.open(str(tmp_path), "run")
    directory.create()
    log = MetricsLog(directory)
    for record in result.merges:
        log.record_merge(record)
    log.close()
    rows = [json.loads(line) for line in directory.read("metrics.jsonl").decode().splitlines()]
    assert [row["base_error"] for row in rows] == [m.base_error for m in result.merges]
    assert len({row["base_error"] for row in rows}) == 4
    # bf16 rounds by 2^-9 at most; int8 by half of 1/127 of a row's largest; nf4 by a tenth of a block's.
    assert all(row["base_error"] < {"bf16": 2.0**-9, "int8": 0.01, "nf4": 0.15}[form] for row in rows)


def test_without_quantization_the_error_is_zero() -> None:
    """fp32 heads fold the reference into the base's own weights."""
    assert {m.base_error for m in run_in_process(Tiny(), settings("fp32")).merges} == {0.0}


def test_the_error_is_that_of_the_quantized_layers(form: str) -> None:
    """A rule quantizes one layer: the others count as exact."""
    run_settings = settings("fp32", layers=(f"up: base_dtype={form}",))
    head, base = started(Tiny(), run_settings)
    assert [type(m.stored) for m in head.converted.main_weights.values()] == [QuantizedWeight, Tensor, Tensor]
    assert head.train_round().base_error == pytest.approx(quantized(head, base)[1], rel=1e-6)
    dense = dense_model(head, Tiny(), base, None)
    assert_near(head.model(torch.arange(7)), dense(torch.arange(7)), 5000 * EPS64)


@pytest.mark.parametrize("reset", ["none", "B"])
def test_merging_is_exact_for_quantized_heads(form: str, reset: str) -> None:
    """As with float32 heads, W_v - W_0 = sum of w D, without a trace of Q; the base isn't quantized."""
    worker, run_settings = Tiny(), settings(form, reset=reset)
    initial = prepare(worker, run_settings, torch.float64)
    coordinator = Coordinator(run_settings, initial.plan, initial.base.clone(), ComposedPolicy(Average()), plans=initial.plans)
    heads = [Head(worker, run_settings, n, dtype=torch.float64) for n in range(2)]
    for head in heads:
        head.start(0, initial.base)
    ledger, before = torch.zeros_like(initial.base), dict.fromkeys(range(2))
    for version in range(1, 5):
        for head in heads:
            contribution = head.train_round()
            ledger += dense_change_by_formula(head.plan, contribution.buffer, before[head.number]) / 2
            before[head.number] = None if reset == "B" else contribution.buffer[: head.plan.factors_size].clone()
            event_result = coordinator.receive(contribution, contribution.buffer)
        # 8 changes, each of float64 products of inner size 4.
        assert_near(coordinator.base - initial.base, ledger, 1e-13)
        for result in event_result.results:
            heads[result.head].adopt(result, version, coordinator.base.clone())
    quantized_base = quantized(heads[0], coordinator.base)[0]
    exact = views(initial.plan.base, coordinator.base)
    assert not any(torch.equal(exact[name], q) for name, q in quantized_base.items())


def test_a_run_in_bfloat16_or_8_bits_ends_near_the_float32_run() -> None:
    """Quantization changes little, compared with what is learned."""
    full = run_in_process(Tiny(), settings("fp32")).base
    start = prepare(Tiny(), settings("fp32")).base
    for form, most in (("bf16", 0.05), ("int8", 0.1)):
        assert torch.linalg.vector_norm(run_in_process(Tiny(), settings(form)).base - full) < most * torch.linalg.vector_norm(
            full - start
        )


@pytest.mark.parametrize(("worker", "lte"), [(Tiny(dropout=0.3), {}), (Many(), EVERYTHING)], ids=["tiny", "every kind"])
def test_a_restored_head_continues_bitwise_the_same(form: str, worker: Tiny, lte: dict[str, Any]) -> None:
    """The codes are computed from the base again; factors, replicas and references come from the state."""
    run_settings = settings(form, **lte)
    head, base = started(worker, run_settings)
    head.train_round()
    head.adopt(ContributionResult(0, 1, True, 1), 1, base + 0.1)
    tensors, meta = head_state(head)
    other = Head(worker, run_settings, 0, dtype=torch.float64, incarnation=1)
    restore(other, through_file((tensors, meta)), base + 0.1)
    for sequence in (2, 3):
        expected, continued = head.train_round(), other.train_round()
        assert torch.equal(continued.buffer, expected.buffer)
        assert continued.base_error == expected.base_error
        for each in (head, other):
            each.adopt(ContributionResult(0, sequence, sequence == 2, sequence), sequence, base - 0.1 * sequence)


def test_a_refused_head_keeps_its_reference_on_the_new_base(form: str) -> None:
    """Q(W_2) + s (B A - B' A') with the old reference."""
    worker = Tiny()
    head, base = started(worker, settings(form))
    first = head.train_round()
    head.adopt(ContributionResult(0, 1, True, 1), 1, base + 0.1)
    reference = {n: t.clone() for n, t in views(head.plan.contribution, first.buffer).items() if "lora" in n}
    head.train_round()
    head.adopt(ContributionResult(0, 2, False, 2, "a test"), 2, base - 0.2)
    words = torch.arange(7)
    assert_near(head.model(words), dense_model(head, worker, base - 0.2, reference)(words), 5000 * EPS64)


def test_checkpoints_hold_no_codes(form: str, tmp_path: Path) -> None:
    """A head's file has factors, replicas, reference, optimizer and generators; the base's file has the exact weights."""
    head, base = started(Many(), settings(form, **EVERYTHING))
    head.train_round()
    head.adopt(ContributionResult(0, 1, True, 1), 1, base + 0.1)
    tensors, meta = head_state(head)
    kinds = {name.partition(".")[0] for name in tensors}
    assert kinds == {"factor", "reference", "optimizer", "rng"}  # all layers have factors here: no replicas
    assert {n for n in tensors if n.startswith("factor.")} == {f"factor.{n}" for n in head.converted.factors}
    assert not any(t.dtype in (torch.int8, torch.bfloat16) for t in tensors.values())
    assert not any("quantized" in name for name in tensors)
    directory = RunDirectory.open(str(tmp_path), "run")
    files = [
        checkpoint.write_head(directory, 1, 0, tensors, meta),
        checkpoint.write_base(directory, 1, head.plan, base + 0.1),
    ]
    manifest = checkpoint.commit(directory, 1, (0,), files, {})
    assert torch.equal(checkpoint.read_base(directory, manifest, head.plan), base + 0.1)


def test_checkpoints_hold_the_users_buffers_and_no_codes(form: str) -> None:
    """A checkpoint holds the model's buffers, not those that conversion added."""

    class Counting(Tiny):
        def build_model(self) -> nn.Module:
            model = Net().double()
            model.register_buffer("count", torch.zeros(()))
            model.up.register_buffer("seen", torch.ones(2))
            return model

        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            model.count += 1
            return super().loss(model, batch)

    head, base = started(Counting(), settings(form, merge_buffers=("none",)))
    head.train_round()
    head.adopt(ContributionResult(0, 1, True, 1), 1, base)
    tensors, meta = head_state(head)
    assert {n for n in tensors if n.startswith("buffer.")} == {"buffer.count", "buffer.up.seen"}
    other = Head(Counting(), head.settings, 0, dtype=torch.float64)
    restore(other, (tensors, meta), base)
    assert other.model.count == 3.0
