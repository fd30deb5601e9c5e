"""Predicted memory against what real heads allocate in this process."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lte_ray import Shard
from lte_ray.adapters.quantization import QuantizedWeight
from lte_ray.config import BASE_DTYPES, LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.settings import Settings
from lte_ray.layout import Adapted
from lte_ray.planning import plan, total
from lte_ray.planning.memory import stored_bytes
from tests.support.real_memory import measure_real_head
from tests.support.small_llama import SmallLlama
from workers.gpt import GPT
from workers.vit import ViT

TOLERANCE = 0.1


class RandomImages(ViT):
    """The vision transformer on noise."""

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        for slot in shard.slots():
            generator = torch.Generator().manual_seed(slot)
            yield torch.randn(32, 1, 28, 28, generator=generator), torch.randint(10, (32,), generator=generator)


WORKERS = {"gpt": GPT(depth=2), "vit": RandomImages(depth=2), "llama": SmallLlama()}


def check_prediction(worker: object, lte: LTEConfig, train: TrainConfig) -> None:
    """Compares the parts that stay, and the peak of a step, with those of a real head."""
    predicted = dict(plan(worker, lte, MergeConfig(policy="average"), train).head)
    kept, peak = measure_real_head(worker, Settings("real", lte, MergeConfig(policy="average"), train))
    activations, gradients, batch = predicted.pop("activations"), predicted["gradients"], predicted["batch"]
    stays = total(predicted)
    assert activations is not None
    assert gradients is not None
    assert batch is not None
    assert stays is not None
    assert math.isclose(stays, kept, rel_tol=TOLERANCE)
    assert math.isclose(activations + gradients + batch, peak, rel_tol=TOLERANCE)


@pytest.mark.sweep
@pytest.mark.parametrize("base_dtype", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("name", WORKERS)
def test_predictions_are_within_a_tenth_of_a_real_head(name: str, base_dtype: str) -> None:
    """What a head keeps, and the peak of its step, are as predicted, in each format of main weights."""
    if base_dtype == "nf4":
        pytest.importorskip("bitsandbytes")
    check_prediction(WORKERS[name], LTEConfig(lora_r=16, base_dtype=base_dtype), TrainConfig(steps=20))


@pytest.mark.parametrize("base_dtype", ["fp32", "bf16"])
def test_mixed_precision_is_predicted(base_dtype: str) -> None:
    """With autocast, activations are smaller, but weights in full precision are copied for the backward pass."""
    train = TrainConfig(steps=20, precision="bf16-mixed", optimizer="adamw")
    check_prediction(SmallLlama(), LTEConfig(lora_r=16, base_dtype=base_dtype), train)


@pytest.mark.parametrize(
    ("lte", "train"),
    [
        (LTEConfig(others="frozen", lora_r=8), TrainConfig(steps=20, optimizer="adamw")),
        (LTEConfig(full_rank=True), TrainConfig(steps=20)),
        (LTEConfig(lora_r=8), TrainConfig(steps=20, checkpoint_activations=("blocks.*",))),
    ],
    ids=["frozen", "full-rank", "recomputed"],
)
def test_other_settings_are_predicted(lte: LTEConfig, train: TrainConfig) -> None:
    """What is frozen, full rank and recomputed activations count."""
    check_prediction(GPT(depth=2), lte, train)


@pytest.mark.parametrize("base_dtype", ["bf16", "nf4"])
def test_other_formats_are_as_when_they_are_set(base_dtype: str) -> None:
    """The total of a format that isn't set is nearly that of a plan in which it is."""
    compared = plan(SmallLlama(), LTEConfig(lora_r=16)).head_by_format[base_dtype]
    exact = total(plan(SmallLlama(), LTEConfig(lora_r=16, base_dtype=base_dtype)).head)
    assert compared is not None
    assert exact is not None
    assert math.isclose(compared, exact, rel_tol=0.05)


@pytest.mark.parametrize("shape", [(48, 80), (7, 5), (300, 1000), (8, 3, 3, 3)])
@pytest.mark.parametrize("base_dtype", BASE_DTYPES)
def test_stored_bytes_are_those_of_quantized_weights(shape: tuple[int, ...], base_dtype: str) -> None:
    """The formula gives the bytes of codes and scales, exactly."""
    if base_dtype == "nf4":
        pytest.importorskip("bitsandbytes")
    real = QuantizedWeight.from_weight(torch.randn(shape, generator=torch.Generator().manual_seed(0)), base_dtype)
    assert stored_bytes(Adapted("w", shape, 1, 1.0), base_dtype, torch.float32) == real.nbytes
