"""Does the simulator predict a real run? Utilization under Ray relative to the simulator's, with throttled heads.

Four heads sleep in every local step: 20 ms, the last head 80 ms, so that two cores suffice. The simulator gets these times and
no other facts of the run: its other settings are the defaults for a small model on one machine. Utilization under Ray comes
from the stalls that contributions report (metrics.jsonl), between each head's second merge and its last, so that neither the
start nor the end of the run counts.

Also: merges on GPT-2-124M's shapes, compared with the prediction from the simulator's constants (`merge_flops`,
`merge_memory`), and the engine's time per message.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.report import progress, report, spread
from lte_ray import LTEConfig, LTETrainer, MergeConfig, Shard, TrainConfig
from lte_ray.config import PlacementConfig, StorageConfig
from lte_ray.config.cluster_model import ClusterModel
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.settings import Settings
from lte_ray.layout import Plan
from lte_ray.merging.registry import make_policy
from lte_ray.messages import Contribution
from lte_ray.run.metrics import SilentReporter
from lte_ray.simulation import CostModel, named_plan, simulate_time
from lte_ray.simulation.head import TINY_PLAN, TimedHead
from workers.regression import Regression

PAUSES = (0.02, 0.02, 0.02, 0.08)
STEPS, MERGE_ITER = 160, 10
LOCAL = ClusterModel(step_seconds=PAUSES[0], speeds=tuple(p / PAUSES[0] for p in PAUSES), bandwidth=0, jitter=0.02)
"""The simulated cluster: one machine, so links cost only latency. Without jitter the head number would decide ties."""

WAYS = {
    "barrier": MergeConfig(merge_iter=MERGE_ITER),
    "quorum": MergeConfig(merge_iter=MERGE_ITER, when="quorum", quorum=2),
    "no wait": MergeConfig(merge_iter=MERGE_ITER, when="arrival", wait=False),
}


@dataclasses.dataclass
class Throttled(Regression):
    """Regression on one thread, with a pause in every step of each head."""

    def train_batches(self, shard: Shard) -> Any:
        for inputs, targets in super().train_batches(shard):
            yield inputs, targets, PAUSES[shard.head]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, float]) -> Tensor:
        inputs, targets, pause = batch
        time.sleep(pause)
        return super().loss(model, (inputs, targets))


def under_ray(merge: MergeConfig) -> list[float]:
    """Each head's utilization."""
    with tempfile.TemporaryDirectory() as storage:
        LTETrainer(
            Throttled(),
            lte=LTEConfig(num_heads=len(PAUSES)),
            merge=merge,
            train=TrainConfig(steps=STEPS, budget="each", eval_every=0, checkpoint_every=0, threads_per_head=1),
            scaling_config=PlacementConfig(cpus_per_head=0.25),
            run_config=StorageConfig(name="run", storage=storage),
            reporter=SilentReporter(),
        ).fit()
        rows = [json.loads(line) for line in (Path(storage) / "run" / "metrics.jsonl").read_text().splitlines()]
    merged: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        for head, stall in row.get("stall_seconds", {}).items():
            merged[int(head)].append((row["at"], stall))
    return [1 - sum(stall for _, stall in of[2:]) / (of[-1][0] - of[1][0]) for _, of in sorted(merged.items())]


def simulated(merge: MergeConfig) -> list[float]:
    """The same by the simulator, given the step times."""
    settings = Settings("simulated", LTEConfig(num_heads=len(PAUSES)), merge, TrainConfig(steps=STEPS, budget="each"))
    return [head.utilisation for head in simulate_time([named_plan("gpt2-124m", 1, 1.0)], settings, _free(LOCAL)).heads]


def _free(cluster: ClusterModel) -> ClusterModel:
    """Regression's model is so small that its products and copies take almost no time."""
    return dataclasses.replace(cluster, merge_flops=0, merge_memory=0)


def coordinator_constants() -> dict[str, Any]:
    """Measures `ClusterModel`'s constants of the coordinator: merges on GPT-2-124M's shapes, and the decision on a message."""
    plan = named_plan("gpt2-124m", 32, 64.0)
    merges = {}
    for heads in (2, 8):
        took = [_merge_seconds(plan, heads) for _ in range(3)]
        modelled = CostModel([plan] * heads, MergeConfig()).merge_seconds(ClusterModel(), heads)
        merges[f"{heads} heads"] = {"measured": spread(took), "modelled": round(modelled, 4)}
    operations = sum(2 * a.matrix[0] * a.matrix[1] * 2 * a.rank for a in plan.adapted)
    left, right, weight = torch.randn(3072, 512), torch.randn(512, 768), torch.zeros(3072, 768)
    weight.addmm_(left, right)
    started = time.perf_counter()
    for _ in range(20):
        weight.addmm_(left, right)
    flops = 20 * 2 * 3072 * 512 * 768 / (time.perf_counter() - started)
    many = 64
    settings = Settings("messages", LTEConfig(num_heads=many), MergeConfig(), TrainConfig())
    coordinator = Coordinator(settings, TINY_PLAN, torch.zeros(1), make_policy(settings.merge))
    contributions = [TimedHead("messages", head).contribute() for head in range(many)]
    started = time.perf_counter()
    for contribution in contributions[:-1]:
        coordinator.receive(contribution, contribution.buffer)
    return {
        "threads": torch.get_num_threads(),
        "flops_of_products": round(flops),
        "operations_of_a_contribution": operations,
        "seconds_of_a_merge": merges,
        "seconds_of_a_message_without_ray": (time.perf_counter() - started) / (many - 1),
    }


def _merge_seconds(plan: Plan, heads: int) -> float:
    """Seconds from the contributions to a copy of the new base, as in `benchmarks.merge`."""
    settings = Settings("merge", LTEConfig(num_heads=heads), MergeConfig(), TrainConfig())
    buffers = [torch.zeros(plan.contribution.size).fill_(1e-3) for _ in range(heads)]
    references = {head: buffer[: plan.factors_size].clone() for head, buffer in enumerate(buffers)}
    base = torch.zeros(plan.base.size)
    coordinator = Coordinator(settings, plan, base, make_policy(settings.merge), references=references)
    messages = [
        Contribution("merge", head, incarnation=0, sequence=1, version=0, step=1, steps=1, samples=1, loss=0.0)
        for head in range(heads)
    ]
    started = time.perf_counter()
    for message, buffer in zip(messages, buffers, strict=True):
        coordinator.receive(message, buffer)
    coordinator.base.clone()
    return time.perf_counter() - started


def main() -> None:
    figures: dict[str, Any] = {"pauses": PAUSES, "constants": coordinator_constants()}
    met = {}
    for number, (name, merge) in enumerate(WAYS.items(), 1):
        real, virtual = under_ray(merge), simulated(merge)
        ratio = sum(real) / sum(virtual)
        progress(number, len(WAYS), f"{name}: utilization {sum(real) / len(real):.3f}, ratio to the simulated one {ratio:.3f}")
        met[name] = 0.9 <= ratio <= 1.1
        figures[name] = {
            "utilisation_under_ray": [round(value, 4) for value in real],
            "utilisation_simulated": [round(value, 4) for value in virtual],
            "ratio": round(ratio, 4),
            "ratio_by_head": spread([a / b for a, b in zip(real, virtual, strict=True)]),
        }
    limits = {name: f"utilization under Ray, ratio to the simulated one, {name}: 0.9 to 1.1" for name in WAYS}
    report("simulator", limits=limits, met=met, figures=figures)


if __name__ == "__main__":
    main()
