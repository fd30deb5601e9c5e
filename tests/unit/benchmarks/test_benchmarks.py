"""The benchmarks of merging at a tiny size: their counts and comparisons are right."""

from __future__ import annotations

import torch

from benchmarks import async_quality, formats, merge_scale, optimizers, shapes
from benchmarks import bytes as bytes_
from lte_ray.config import MergeConfig
from lte_ray.transfer.codec import min_contribution_bytes
from tests.support.plans import plan_from_shapes
from tests.support.tiny_worker import BATCH, Tiny


def test_bytes_are_counted_without_a_heads_own_contribution() -> None:
    """In fp32 by factors: up is the contribution with what the head measured, down those of the two others and some numbers."""
    plan, merge = plan_from_shapes([(24, 20, 2), (6, 40, 2)], [(5,)]), MergeConfig(send_down="factors")
    found = bytes_.measure(plan, merge, heads=3)
    size = 4 * plan.contribution.size
    assert size == min_contribution_bytes(plan, merge)
    assert size < found["up"] < size + 600
    assert 2 * size < found["down"] < 2 * size + 400


def test_the_minimum_down_is_the_smaller_form_of_each_entry() -> None:
    """A wide matrix by the others' factors, a small one dense, and replicas dense, since 3 changes are more than the values."""
    plan = plan_from_shapes([(100, 100, 1), (4, 4, 2)], [(5,)])
    assert bytes_.least_down(plan, MergeConfig(), heads=4) == 4 * (3 * 200 + 16 + 5)
    assert bytes_.least_down(plan, MergeConfig(transfer="int8"), heads=4) == 3 * 200 + 3 * 16 + 3 * 5


def test_embeddings_with_factors_are_the_same_model() -> None:
    """Both plans have GPT-2-124M's parameters."""
    assert shapes.gpt2_plan(True).base.size == shapes.gpt2_plan(False).base.size == 124_439_808


def test_formats_are_compared_in_loss() -> None:
    """Two merges of a tiny model: the ratio of fp32 to itself is 1, and that of int8 is close to it."""

    class Words(Tiny):
        def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
            return {"bits_per_byte": sum(float(p.detach().square().sum()) for p in model.parameters())}

    wires = {name: formats.Wire(MergeConfig(merge_iter=3, transfer=name)) for name in ("fp32", "int8")}  # type: ignore[arg-type]
    found = formats.losses(Words(), wires, steps=6)
    assert found["fp32"]["over_fp32"]["median"] == 1.0
    assert 0.9 < found["int8"]["over_fp32"]["median"] < 1.1


def test_optimizers_are_compared_on_the_same_head() -> None:
    """LoRA-Muon and AdamW, of whole steps and alone."""
    tiny = {"width": 16, "depth": 1, "attention_heads": 1, "context": 8, "batch_size": 2}
    found = optimizers.compare("tiny", optimizers.Case(tiny, rank=2, runs=1, steps=1))
    assert found["ratio"]["median"] > 0
    assert found["step_ms"].keys() == found["optimizer_ms"].keys() == {"lora-muon", "adamw"}


def test_shards_and_bare_products_give_the_same_weights() -> None:
    """`point` compares them itself: more heads than distinct contributions, with and without shards."""
    plan = plan_from_shapes([(24, 20, 2), (6, 40, 2), (16, 16, 2)], [(5,)])
    for shards in (1, 3):
        for alone in (False, True):
            row = merge_scale.point(plan, merge_scale.DISTINCT + 2, shards, alone)
            assert row["seconds"] > 0


def test_all_ways_see_equally_many_samples() -> None:
    """With and without waiting, and speed-matched: all local steps of all heads are merged."""
    names = ("barrier", "naive, weight 1", "average, quorum of 2", "samples, speed-matched")
    found = {name: async_quality.train(Tiny(), async_quality.WAYS[name], seed=0, steps=20) for name in names}
    assert {name: row["samples"] for name, row in found.items()} == dict.fromkeys(names, 4 * 20 * BATCH)
