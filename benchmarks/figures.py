"""What figures and callbacks cost: the CPU time of a round's, relative to that of training the round.

The head is one of `workers.gpt:GPT`, whose loss returns three figures; a round has 10 steps. To that are added the row of a
merge of 8 heads and its way to a callback, which the driver may take from a head of its machine. CPU time hardly depends on
what else the machine does.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.report import repeat, report, spread
from lte_ray import Callback, LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.loss import Figures, compute_loss
from lte_ray.engine.head.measures import total_norm
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.messages import Measures, MergeRecord
from lte_ray.run.callbacks import CallbackList, Run
from lte_ray.run.metrics import MetricsLog
from lte_ray.run.stopping import StopRules
from lte_ray.storage import RunDirectory
from workers.gpt import GPT

STEPS, ROUNDS, TIMES = 10, 5, 200

NAMES = ("accuracy", "entropy", "length")


class Loss:
    """Returns a loss and figures that are computed already."""

    def __init__(self) -> None:
        self.returned = torch.ones((), requires_grad=True) * 2, dict.fromkeys(NAMES, torch.tensor(0.5))

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self.returned


def cpu_seconds(work: Callable[[], None], times: int = TIMES) -> float:
    """The mean CPU time of a call."""
    work()
    begun = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - begun) / times


def main() -> None:
    torch.set_num_threads(1)
    settings = Settings("figures", LTEConfig(num_heads=1), MergeConfig(merge_iter=STEPS), TrainConfig(steps=10**6))
    worker, returning, figures = GPT(), Loss(), Figures()
    head = Head(worker, settings, 0)
    head.start(0, prepare(worker, settings).base)
    batch = head.next_batch()
    head.backward(batch)
    parameters = [p for group in head.optimizer.param_groups for p in group["params"]]

    def step() -> None:
        figures.add(compute_loss(returning, head.model, batch)[1])  # type: ignore[arg-type]
        head.meter.count(batch, 1)

    def end_of_round() -> None:
        figures.close()
        head.meter.close(head.optimizer, total_norm(parameters), 1)

    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory.open(folder, "r")
        directory.create()
        log = MetricsLog(directory)
        run = Run("r", directory.path, {}, StopRules(TrainConfig(), "", 0.0))
        log.listeners.append(CallbackList([Callback()], run, directory).handle_row)
        by_head = dict.fromkeys(range(8), 0.5)
        measures = dict.fromkeys(range(8), Measures({"lora": 0.1, "replica": 0.1}, 1.0, 5, 1.0, {"gpu": 1.0}, 1, 1))
        merges = [
            MergeRecord(n, 1.0 + n, tuple(range(8)), 80, 80, by_head, 1, 1, 1, 1, dict.fromkeys(NAMES, by_head), measures)
            for n in range(1, 12)
        ]
        parts = {
            "step": [cpu_seconds(step) for _ in range(ROUNDS)],
            "end_of_round": [cpu_seconds(end_of_round) for _ in range(ROUNDS)],
            "row": [cpu_seconds(lambda: log.record_merge(merges[-1], merges[:-1])) for _ in range(ROUNDS)],
        }
    head.optimizer.zero_grad()
    training = repeat(ROUNDS, lambda: cpu_seconds(lambda: head.train(STEPS), 1), lambda seconds: f"{seconds:.3f} s a round")
    costs = {name: sorted(seconds)[ROUNDS // 2] for name, seconds in parts.items()}
    share = (STEPS * costs["step"] + costs["end_of_round"] + costs["row"]) / sorted(training)[ROUNDS // 2]
    report(
        "figures",
        limits={"cpu": "CPU time of a round's figures, row and callback to that of training the round <= 0.01"},
        met={"cpu": share <= 0.01},
        figures={
            "cpu_share": round(share, 6),
            "training_cpu_seconds": spread(training),
            "cpu_seconds": {name: round(seconds, 7) for name, seconds in costs.items()},
        },
    )


if __name__ == "__main__":
    main()
