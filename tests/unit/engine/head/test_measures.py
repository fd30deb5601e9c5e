"""What heads measure of their training: learning rates, gradients, tokens, operations, memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.data import Shard
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.measures import PEAK_FLOPS, gpu_peak, learning_rates, total_norm
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import WorkerError
from tests.support.tiny_worker import BATCH, Tiny, make_settings


@dataclass
class Tokens(Tiny):
    """Batches with `input_ids`, as transformers' are; a sample takes 100 operations."""

    flops_per_sample: float = 100.0

    def train_batches(self, shard: Shard) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        for words, following in super().train_batches(shard):
            yield {"input_ids": words.view(2, -1), "labels": following.view(2, -1)}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
        return super().loss(model, (batch["input_ids"].flatten(), batch["labels"].flatten()))


def started(worker: Tiny, settings: Settings) -> Head:
    head = Head(worker, settings, 0, dtype=torch.float64)
    head.start(0, prepare(worker, settings, torch.float64).base)
    return head


@pytest.mark.parametrize("clip_norm", [0.0, 1e-3])
def test_the_gradient_norm_is_that_of_a_rounds_first_step(clip_norm: float) -> None:
    """Of all that trains, before clipping; and clipping in every step doesn't change which one is reported."""
    settings = replace(make_settings(heads=1), train=TrainConfig(steps=12, seed=3, clip_norm=clip_norm))
    head, norms = started(Tiny(), settings), []

    def observe() -> None:
        gradients = [p.grad.flatten() for g in head.optimizer.param_groups for p in g["params"] if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))

    head.average_gradients = observe
    contribution = head.train_round()
    assert contribution.measures.gradient_norm == pytest.approx(norms[0], rel=1e-12)
    assert len(norms) == 3 and norms[1] != norms[0]


def test_the_gradient_norm_of_scaled_gradients_is_not_scaled() -> None:
    """fp16-mixed scales losses by 65536; the norm is that of the gradients without it, also where heads clip."""
    norms = []
    for clip in (0.0, 1.0):
        train = TrainConfig(steps=3, seed=3, precision="fp16-mixed", clip_norm=clip)
        settings = Settings("test", LTEConfig(num_heads=1, lora_r=2, lora_alpha=4.0), MergeConfig(3, policy="average"), train)
        norms.append(run_in_process(Tiny(), settings).merges[0].measures[0].gradient_norm)
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert 1e-3 < norms[0] < 100


def test_sparse_gradients_count_each_row_once() -> None:
    """Uncoalesced, a row stands several times; the norm is that of the dense gradient."""
    table = nn.Embedding(5, 2, sparse=True)
    table(torch.tensor([1, 1, 3])).square().sum().backward()
    assert table.weight.grad is not None
    assert total_norm([table.weight]) == pytest.approx(float(table.weight.grad.to_dense().norm()))
    assert total_norm([nn.Parameter(torch.ones(2))]) is None


def test_learning_rates_are_the_highest_of_groups_of_one_name() -> None:
    """A group without a name counts by its number."""
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr, **name} for lr, name in
              [(0.1, {"name": "lora"}), (0.3, {"name": "lora"}), (0.2, {"name": "replica"}), (0.5, {})]]  # fmt: skip
    assert learning_rates(torch.optim.SGD(groups)) == {"lora": 0.3, "replica": 0.2, "3": 0.5}


def test_a_merge_has_each_heads_measures() -> None:
    """Tokens and operations of what it holds; on a CPU no GPU's."""
    run = run_in_process(Tokens(), make_settings(), torch.float64)
    for merge in run.merges:
        assert set(merge.measures) == {0, 1}
        for measures in merge.measures.values():
            assert (measures.tokens, measures.flops) == (3 * BATCH, 3 * 2 * 100.0)
            assert measures.lr == {"lora": 0.01, "replica": 0.01}
            assert (measures.gpu_memory, measures.peaks) == (None, {})
            assert measures.memory > 1e7
    assert {m.tokens for merge in run_in_process(Tiny(), make_settings()).merges for m in merge.measures.values()} == {None}


def test_a_worker_can_say_how_many_tokens_and_operations_a_sample_has() -> None:
    """By methods, too; and they count what the last contribution, which wasn't merged, holds."""

    @dataclass
    class Says(Tiny):
        def tokens_per_sample(self) -> int:
            return 7

        def flops_per_sample(self) -> int:
            return 2

    head = started(Says(), make_settings(heads=1))
    head.train_round()
    head.state.pending = None
    measures = head.train_round().measures
    assert (measures.tokens, measures.flops) == (6 * BATCH * 7, 6 * BATCH * 2.0)


@pytest.mark.parametrize("value", ["many", 0, -1.0, math.nan, True, [3]])
def test_operations_that_are_no_number_are_refused_before_the_run(value: object) -> None:
    """The error says what the attribute must be."""
    worker = Tokens(flops_per_sample=value)  # type: ignore[arg-type]
    with pytest.raises(WorkerError, match=r"Tokens.flops_per_sample is .*, but it must be a number above 0, or a method"):
        prepare(worker, make_settings())


def test_a_gpu_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The most special name counts; a GPU that isn't in the table has no peak."""
    for name, peak in [
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA L40S", 362e12),
        ("Other", None),
    ]:
        known = SimpleNamespace(name=name, uuid="GPU-1")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, known=known: known)
        assert gpu_peak(torch.device("cuda:0")) == ({} if peak is None else {"GPU-1": peak})
    assert gpu_peak(torch.device("cpu")) == {}
    names = list(PEAK_FLOPS)
    assert all(names.index(one) < names.index(other) for one in names for other in names if one != other and other in one)
