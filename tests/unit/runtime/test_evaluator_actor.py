"""The evaluator's process: the figures of a base, and of its moving average."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lte_ray.engine.prepare import prepare
from lte_ray.errors import WorkerError
from lte_ray.runtime.evaluator_actor import EvaluatorActor
from tests.support.tiny_worker import Tiny, make_settings


@dataclass
class Sums(Tiny):
    """Its figures are the sum of the weights and a random number."""

    name: str = "sum"

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        total = sum(float(each.detach().sum()) for each in model.parameters())
        return {"sum": total, self.name: float(torch.rand(()))}


def make(worker: Tiny) -> tuple[EvaluatorActor, torch.Tensor]:
    settings = make_settings()
    initial = prepare(worker, settings, torch.float64)
    context: Any = SimpleNamespace(
        fault_script=None,
        settings=settings,
        worker=SimpleNamespace(load=lambda: worker),
        transport=SimpleNamespace(fetch=lambda flat: flat),
    )
    return EvaluatorActor(context, initial.plans, torch.get_num_threads(), gpu=False), initial.base


def test_figures_of_the_average_have_its_name() -> None:
    """And they don't change what the worker draws for the next base."""
    evaluator, base = make(Sums(name="draw"))
    evaluator.evaluate(base)  # builds the model, under a seed
    torch.manual_seed(1)
    alone = [evaluator.evaluate(base), evaluator.evaluate(base)]
    torch.manual_seed(1)
    both = [evaluator.evaluate(base, 2 * base), evaluator.evaluate(base)]
    assert both[1] == alone[1]
    assert list(both[0]) == ["sum", "draw", "ema_sum", "ema_draw"]
    assert both[0] == alone[0] | {"ema_sum": both[0]["ema_sum"], "ema_draw": both[0]["ema_draw"]}
    assert both[0]["ema_sum"] != both[0]["sum"]


def test_a_worker_with_such_a_figure_is_told_to_rename_it() -> None:
    """Only where the run has an average."""
    evaluator, base = make(Sums(name="ema_sum"))
    assert set(evaluator.evaluate(base)) == {"sum", "ema_sum"}
    with pytest.raises(WorkerError, match=r"evaluate\(\) returns .ema_sum."):
        evaluator.evaluate(base, base)
