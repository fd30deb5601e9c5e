"""Plans of workers: layers, notes about what isn't known, other processes, and recommendations."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lte_ray
from lte_ray import LTEConfig, MergeConfig, Shard, TrainConfig
from lte_ray.errors import ConfigError, WorkerError
from lte_ray.planning import plan, total
from lte_ray.planning.layers import join_names
from tests.support.small_llama import LLAMA_8B, SmallLlama
from workers.gpt import GPT


class Two:
    """Two linear layers, one of them frozen, and a norm."""

    def build_model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4), nn.Linear(4, 4))
        model[3].requires_grad_(False)
        return model

    def train_batches(self, shard: Shard) -> Iterator[Any]:
        return itertools.repeat(torch.ones(2, 8))

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().mean()


class NeedsValues(Two):
    """Its model reads a value while it is built."""

    def build_model(self) -> nn.Module:
        assert float(torch.ones(3).exp().sum()) > 0
        return super().build_model()


class LossNeedsValues(Two):
    """Its loss reads a value."""

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        loss = super().loss(model, batch)
        return loss / float(loss.detach())


class WithoutData(Two):
    """Its data are missing."""

    def train_batches(self, shard: Shard) -> Iterator[Any]:
        raise FileNotFoundError("no such data")


class Broken(Two):
    """Its model can't be built."""

    def build_model(self) -> nn.Module:
        raise RuntimeError("no such layer")


class OwnOptimizer(Two):
    """Its optimizer reads values."""

    def build_optimizer(self, params: Any) -> torch.optim.Optimizer:
        class Reading(torch.optim.SGD):
            def step(self, closure: Any = None) -> None:
                float(next(iter(self.param_groups[0]["params"])).detach().sum())

        return Reading(params, lr=0.1)


def test_rows_say_what_trains() -> None:
    """Weights with factors, replicas and frozen parameters have rows with their sizes."""
    planned = plan(Two(), LTEConfig(lora_r=3))
    rows = {row.name: row for row in planned.layers}
    assert {name: row.how for name, row in rows.items()} == {
        "0.weight": "factors", "2.weight": "factors", "0.bias": "replica", "1.weight": "replica", "1.bias": "replica",
        "2.bias": "replica", "3.weight": "frozen", "3.bias": "frozen",
    }  # fmt: skip
    assert (rows["0.weight"].ranks, rows["0.weight"].trained) == ((3,), 3 * (8 + 16))
    counts = planned.counts
    assert (counts.parameters, counts.frozen, counts.factors, counts.replicas) == (264, 20, 3 * 24 + 3 * 20, 52)
    assert planned.trainable_share == (132 + 52) / 264


def test_layers_that_repeat_are_one_row() -> None:
    """A row names ranges of numbers, and its count is that of its parameters."""
    rows = {row.name: row for row in plan(GPT(depth=3, width=64)).layers}
    assert (rows["blocks.0..2.up.weight"].count, rows["blocks.0..2.up.weight"].parameters) == (3, 3 * 256 * 64)


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        (["a.0.w"], "a.0.w"),
        (["a.0.w", "a.1.w", "a.2.w"], "a.0..2.w"),
        (["a.2.w", "a.10.w"], "a.2,10.w"),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], "a.0..1.b.0..1"),
        (["a.0.b.0", "a.1.b.1"], "a.*.b.*"),
    ],
)
def test_names_are_joined(names: list[str], joined: str) -> None:
    """Numbers become ranges, lists, or a star where combinations are missing."""
    assert join_names(names) == joined


def test_ranks_of_heads_may_differ() -> None:
    """A row shows each head's rank, and the sizes are the first head's."""
    row = next(row for row in plan(Two(), LTEConfig(num_heads=2, lora_r=(2, 4))).layers if row.name == "0.weight")
    assert (row.ranks, row.trained) == ((2, 4), 2 * 24)


def test_model_that_needs_values_is_built_on_the_cpu() -> None:
    """The plan is the same, and says so."""
    planned, usual = plan(NeedsValues()), plan(Two())
    assert planned.layers == usual.layers
    assert planned.head == usual.head
    assert "was built on the CPU" in planned.notes[0]
    assert not usual.notes


@pytest.mark.parametrize(
    ("worker", "part", "note"),
    [
        (WithoutData(), "activations", "no such data"),
        (LossNeedsValues(), "activations", "the loss needs values"),
        (OwnOptimizer(), "optimizer state", "its step needs values"),
    ],
)
def test_what_is_not_known_is_said(worker: Any, part: str, note: str) -> None:
    """The rest of the plan is there; the total isn't."""
    planned = plan(worker, gpu="80GB")
    assert planned.head[part] is None
    assert total(planned.head) is None
    assert any(note in each for each in planned.notes)
    assert planned.head["main weights"] == 4 * (8 * 16 + 16 * 4)
    assert planned.traffic[0].up > 0
    assert planned.recommendation is not None
    assert not planned.recommendation.fits
    assert "isn't known" in planned.recommendation.reasons[0]


def test_model_that_cannot_be_built_is_one_error() -> None:
    """The error says what build_model raised."""
    with pytest.raises(WorkerError, match="no such layer"):
        plan(Broken())


def test_settings_that_do_not_fit_the_model_are_refused() -> None:
    """As a run refuses them."""
    with pytest.raises(ConfigError, match="--exclude 'nothing'"):
        plan(Two(), LTEConfig(exclude=("nothing",)))
    with pytest.raises(ConfigError, match="--baseline is ordinary training"):
        plan(Two(), train=TrainConfig(baseline=True))


@pytest.mark.parametrize("gpu", ["80XB", "big", "0GB", "10Gbit", "A100"])
def test_unknown_gpus_are_refused(gpu: str) -> None:
    """The error lists the names that are known."""
    with pytest.raises(ConfigError, match="A100-80GB"):
        plan(Two(), gpu=gpu)


def test_number_of_gpus_needs_their_size() -> None:
    """Several GPUs of no size can't be planned for."""
    with pytest.raises(ConfigError, match="--num-gpus is 4"):
        plan(Two(), num_gpus=4)


def test_other_processes_have_parts() -> None:
    """The coordinator has the base, and one contribution of each head twice: as reference, and as it comes."""
    planned = plan(Two(), LTEConfig(num_heads=3), MergeConfig(policy="average"), TrainConfig(ema=0.9))
    coordinator, base = planned.processes["coordinator"], 4 * 244
    assert coordinator["base"] == coordinator["moving average"] == base
    assert coordinator["heads' references"] == coordinator["contributions of a merge"] == 3 * planned.traffic[0].up
    assert "momentum" not in coordinator
    assert plan(Two(), merge=MergeConfig(policy="nesterov")).processes["coordinator"]["momentum"] == base
    assert plan(Two(), merge=MergeConfig(policy="adam")).processes["coordinator"]["momentum"] == 2 * base


def test_heads_that_do_not_wait_have_two_sets_of_weights() -> None:
    """The next main weights are computed while a head trains."""
    merge = MergeConfig(policy="average", wait=False, when="arrival")
    waiting, other = plan(Two(), merge=MergeConfig(policy="average")).head, plan(Two(), merge=merge).head
    assert other["next main weights"] == other["main weights"]
    assert other["last contribution"] == 2 * (waiting["last contribution"] or 0)


def test_everything_is_json() -> None:
    """to_json has sums, and only JSON values."""
    planned = plan(Two(), gpu="24GiB", num_gpus=2, link="1Gbit")
    values = json.loads(json.dumps(planned.to_json(), allow_nan=False))
    assert values["head"]["total"] == total(planned.head)
    assert values["recommendation"]["num_heads"] == 2
    assert values["link"] == 125e6


def test_recommendation_uses_fewer_bits_where_it_must() -> None:
    """An 8B Llama fits an 80 GB GPU with weights in fewer bits; a head on each GPU, and formats for the link."""
    worker = SmallLlama(hidden=256, layers=2, vocabulary=64, context=8, batch_size=1, inner=2048)
    full = plan(worker, LTEConfig(lora_r=2), gpu="1GB", num_gpus=8).recommendation
    assert full is not None
    assert (full.base_dtype, full.num_heads, full.heads_per_gpu) == ("fp32", 8, 1)
    sizes = plan(worker, LTEConfig(lora_r=2)).head_by_format
    assert sizes["fp32"] is not None
    assert sizes["int8"] is not None
    between = (sizes["fp32"] + sizes["int8"]) / 2 / 0.9
    less = plan(worker, LTEConfig(lora_r=2), gpu=str(between), num_gpus=8).recommendation
    assert less is not None
    assert less.base_dtype in ("bf16", "int8")
    assert f"--base-dtype {less.base_dtype}" in less.flags
    none = plan(worker, LTEConfig(lora_r=2), gpu="1MB").recommendation
    assert none is not None
    assert not none.fits
    assert "smaller batches" in none.reasons[0]


def test_recommendation_merges_as_often_as_the_link_allows() -> None:
    """On a slow link, merges are in fewer bits and rarer; on a fast one as they were."""
    slow, fast = (
        plan(Two(), LTEConfig(lora_r=2), gpu="80GB", num_gpus=4, link=link, step_time="100ms").recommendation
        for link in ("1kB", "10GB")
    )
    assert slow is not None
    assert fast is not None
    assert (fast.transfer, fast.merge_iter) == ("fp32", 10)
    assert slow.transfer == "int8"
    assert (slow.merge_iter or 0) > 10
    assert slow.lora_r_from_scratch == 2


def test_public_name() -> None:
    """`lte_ray.plan` is this function."""
    assert lte_ray.plan is plan


@pytest.mark.slow
def test_llama_8b_is_planned_without_its_weights() -> None:
    """Eight billion parameters: their sizes are exact, and nothing as large is allocated (benchmarks/plan.py measures it)."""
    pytest.importorskip("transformers")
    planned = plan(SmallLlama(**LLAMA_8B), LTEConfig(num_heads=8, base_dtype="nf4"), gpu="80GB", num_gpus=8, link="1Gbit")
    assert planned.counts.parameters == 8_030_261_248
    assert next(row for row in planned.layers if "q_proj" in row.name).name == "model.layers.0..31.self_attn.q_proj.weight"
    assert planned.recommendation is not None
    assert planned.recommendation.fits
