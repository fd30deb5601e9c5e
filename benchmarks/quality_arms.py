"""The jobs of `benchmarks.quality`: what is trained, in which ways, and what is asked of the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.ladder import Arm, Figure
from workers.gpt import GPT
from workers.images import ImageClassifier
from workers.mixer import Mixer
from workers.resnet import ResNet
from workers.vit import ViT

ORDINARY, MUON = "ordinary", "ordinary, Muon"

BITS, ACCURACY = Figure("bits_per_byte"), Figure("accuracy", higher_is_better=True)

ADAMW = {"optimizer": "adamw", "lr": 4e-3, "schedule": "cosine"}
MUON_RATES = {"optimizer": "muon", "lr": 0.05, "replica_lr": 0.016, "schedule": "cosine"}


@dataclass(frozen=True)
class Limit:
    """A bound on an arm, compared with another.

    Attributes:
        arm, other: names. If they are equal, the bound is on the ratio of the highest seed's figure to the lowest's.
        bound: the highest `ratio` of the figures, or of the bytes that a head sends and receives; or the most that the arm's
            figure lies below the other's (`below`).
        kind: of the bound.
    """

    arm: str
    other: str
    bound: float
    kind: Literal["ratio", "bytes", "below"] = "ratio"


@dataclass(frozen=True)
class Job:
    """A model, a length of training, and the arms that are compared.

    Attributes:
        worker: trains it; its batch size doesn't count.
        figure: that is compared.
        batch: samples in a step of all heads together.
        steps: local steps of a head, and steps of ordinary training.
        limits: what is asked.
        make_arms: gives the arms, at the first rate and seed.
    """

    worker: GPT | ImageClassifier
    figure: Figure
    batch: int
    steps: int
    limits: tuple[Limit, ...]
    make_arms: Callable[[Job], Iterator[Arm]]

    @property
    def evaluate_every(self) -> int:
        return self.steps // 6 // 50 * 50

    @property
    def arms(self) -> list[Arm]:
        return list(self.make_arms(self))

    def arm(self, name: str, heads: int, merge: MergeConfig, lte: dict[str, Any] | None = None, **train: Any) -> Arm:
        """An arm whose heads share the batch, with these settings of heads and training."""
        return Arm(
            name,
            LTEConfig(num_heads=heads, **(lte or {})),
            merge,
            TrainConfig(steps=self.steps, eval_every=0, **train),
            worker={"batch_size": self.batch // heads},
            evaluate_every=self.evaluate_every,
        )

    def ordinary(self, name: str, **train: Any) -> Arm:
        """Ordinary training with the whole batch."""
        return self.arm(name, 1, MergeConfig(self.evaluate_every), baseline=True, **train)


def gpt_arms(job: Job) -> Iterator[Arm]:
    """Ordinary training, LTE with the library's defaults, in int8 and as in the paper, and in full rank with outer steps."""
    yield job.ordinary(ORDINARY, **ADAMW)
    yield job.ordinary(MUON, **MUON_RATES)
    for heads in (2, 4, 8):
        yield job.arm(f"LTE, {heads} heads", heads, MergeConfig())
    for heads in (4, 8):
        yield job.arm(f"LTE, {heads} heads, merge_iter 50", heads, MergeConfig(50))
    rounded = MergeConfig(transfer="int8", send_down="int8")
    for heads in (4, 8):
        yield job.arm(f"LTE, {heads} heads, rank 48 in int8", heads, rounded, {"lora_r": 48})
    yield job.arm("LTE, 4 heads, rank 32", 4, MergeConfig(), {"lora_r": 32})
    yield job.arm("LTE, 4 heads, rank 32 in int8", 4, rounded, {"lora_r": 32})
    for heads in (2, 4, 8):
        yield job.arm(f"LTE as in the paper, {heads} heads", heads, MergeConfig(policy="average"), **ADAMW)
    muloco = MergeConfig(policy="nesterov", policy_args={"lr": 0.7, "momentum": 0.6})
    diloco = MergeConfig(policy="nesterov", policy_args={"lr": 0.7, "momentum": 0.9})
    for heads in (4, 8):
        yield job.arm(f"MuLoCo, {heads} heads", heads, muloco, {"full_rank": True}, **MUON_RATES)
        yield job.arm(f"DiLoCo, {heads} heads", heads, diloco, {"full_rank": True}, **ADAMW)
        yield job.arm(f"local AdamW, {heads} heads", heads, MergeConfig(policy="average"), {"full_rank": True}, **ADAMW)


def image_arms(job: Job) -> Iterator[Arm]:
    """Ordinary training, and LTE with the library's defaults."""
    yield job.ordinary(ORDINARY, **ADAMW | {"lr": 2e-3})
    yield job.ordinary(MUON, **MUON_RATES)
    yield job.arm("LTE, 4 heads", 4, MergeConfig())


GPT_LIMITS = (
    *(Limit(f"LTE, {heads} heads", ORDINARY, bound) for heads, bound in ((2, 0.96), (4, 0.97), (8, 1.00))),
    *(Limit(f"LTE, {heads} heads", MUON, bound) for heads, bound in ((2, 1.05), (4, 1.08), (8, 1.12))),
    *(Limit(f"LTE, {heads} heads, merge_iter 50", ORDINARY, bound) for heads, bound in ((4, 1.00), (8, 1.04))),
    *(Limit(f"LTE, {heads} heads, rank 48 in int8", f"MuLoCo, {heads} heads", 1.03) for heads in (4, 8)),
    *(Limit(f"LTE, {heads} heads, rank 48 in int8", f"DiLoCo, {heads} heads", 1.00) for heads in (4, 8)),
    *(Limit(f"LTE, {heads} heads, rank 48 in int8", f"MuLoCo, {heads} heads", 0.2, "bytes") for heads in (4, 8)),
    Limit("LTE, 2 heads", "LTE, 2 heads", 1.02),
)

IMAGE_LIMITS = (Limit("LTE, 4 heads", ORDINARY, 0.003, "below"),)

JOBS = {
    "main": Job(GPT(validation_windows=1024), BITS, 32, 700, GPT_LIMITS, gpt_arms),
    "long": Job(GPT(width=64, depth=2, context=64, validation_windows=1024), BITS, 32, 4000, GPT_LIMITS, gpt_arms),
    "vit": Job(ViT(test_images=0), ACCURACY, 128, 600, IMAGE_LIMITS, image_arms),
    "mixer": Job(Mixer(test_images=0), ACCURACY, 128, 600, IMAGE_LIMITS, image_arms),
    "resnet": Job(ResNet(test_images=0), ACCURACY, 128, 600, IMAGE_LIMITS, image_arms),
}
