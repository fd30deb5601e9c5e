"""A good small worker, and workers with one mistake each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_ray import Shard

BATCH, SAMPLES, WIDTH = 4, 64, 6


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 3))


class Good:
    """Learns the classes of random points."""

    def build_model(self) -> nn.Module:
        return make_net()

    def points(self) -> tuple[Tensor, Tensor]:
        points = torch.from_numpy(np.random.default_rng(0).standard_normal((SAMPLES, WIDTH), dtype=np.float32))
        return points, points[:, :3].argmax(1)

    def train_batches(self, shard: Shard) -> Iterator[Any]:
        points, classes = self.points()
        for indices in shard.indices(SAMPLES, BATCH):
            yield points[indices], classes[indices]

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return F.cross_entropy(model(batch[0]), batch[1])

    def evaluate(self, model: nn.Module) -> Any:
        points, classes = (each.to(next(model.parameters()).device) for each in self.points())
        return {"accuracy": float((model(points).argmax(1) == classes).float().mean())}


class LossOfEachSample(Good):
    def loss(self, model: nn.Module, batch: Any) -> Any:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class RaisingLoss(Good):
    def loss(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0]) @ torch.ones(2, 1)


class NaNLoss(Good):
    def loss(self, model: nn.Module, batch: Any) -> Any:
        return super().loss(model, batch) * torch.log(-torch.ones(()))


class InfinityLater(Good):
    """Its rate is so high that the second loss isn't finite."""

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0]).square().mean()

    def build_optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=1e38)


class NaNGradient(Good):
    """The root of 0 has an infinite derivative, which times 0 is NaN."""

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return super().loss(model, batch) + (model(batch[0]) * 0).square().sum().sqrt()


class SameForAllHeads(Good):
    def train_batches(self, shard: Shard) -> Iterator[Any]:
        return super().train_batches(Shard(0, 1, 7, shard.cursor))


class WithoutCursor(Good):
    def train_batches(self, shard: Shard) -> Iterator[Any]:
        return super().train_batches(Shard(shard.head, shard.num_heads, shard.seed))


class SkipsAhead(Good):
    def train_batches(self, shard: Shard) -> Iterator[Any]:
        return super().train_batches(Shard(shard.head, shard.num_heads, shard.seed, 2 * shard.cursor))


class OtherEachTime(Good):
    def train_batches(self, shard: Shard) -> Iterator[Any]:
        points, classes = self.points()
        draws = np.random.default_rng()
        for _ in shard.slots():
            indices = draws.integers(SAMPLES, size=BATCH)
            yield points[indices], classes[indices]


class GlobalDraws(Good):
    """Draws from the head's own generator, which is right, but reads no shard."""

    def train_batches(self, shard: Shard) -> Iterator[Any]:
        points, classes = self.points()
        while True:
            indices = torch.randint(SAMPLES, (BATCH,))
            yield points[indices], classes[indices]


class OneBatch(Good):
    def train_batches(self, shard: Shard) -> Iterator[Any]:
        points, classes = self.points()
        return itertools.repeat((points, classes))


class NoData(Good):
    def train_batches(self, shard: Shard) -> Iterator[Any]:
        raise FileNotFoundError("no such file: data.csv")


class Unused(nn.Module):
    """Has a layer that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = make_net(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


class UnusedLayer(Good):
    def build_model(self) -> nn.Module:
        return Unused()


class Muted(Unused):
    """Multiplies the output of a layer by 0."""

    def forward(self, x: Tensor) -> Any:
        x = self.net(x)
        return x + 0 * self.head(x)


class MutedLayer(Good):
    def build_model(self) -> nn.Module:
        return Muted()


class LeavesOutBiases(Good):
    def build_optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([group for group in params if group["name"] == "lora"], lr=0.01)


class RateZero(Good):
    def build_optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.0)


class OtherBuild(Good):
    """A frozen table whose values no generator of the run decides."""

    def build_model(self) -> nn.Module:
        model = make_net()
        model.register_buffer("table", torch.from_numpy(np.random.default_rng().standard_normal(4)))
        return model


class OtherWeights(Good):
    def build_model(self) -> nn.Module:
        model = make_net()
        with torch.no_grad():
            model[0].weight.copy_(torch.from_numpy(np.random.default_rng().standard_normal((8, WIDTH))))
        return model


class Grows(Good):
    """Each build has one more layer."""

    built: list[int] = []  # noqa: RUF012 - it is the mistake

    def build_model(self) -> nn.Module:
        self.built.append(1)
        return nn.Sequential(make_net(), *[nn.Linear(3, 3) for _ in self.built])


class BrokenBuild(Good):
    def build_model(self) -> nn.Module:
        raise FileNotFoundError("no such file: config.json")


class UnsavableSchedule(Good):
    def build_optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.01)

    def build_schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
        schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
        schedule.started = np.float64(1.0).astype(np.float32)  # type: ignore[attr-defined]
        return schedule


class ForgetfulSchedule(Good):
    """Its rate depends on a counter that isn't saved."""

    def build_optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.01)

    def build_schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
        return Forgetful(optimizer)


class Forgetful:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.steps = optimizer, 0

    def step(self) -> None:
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 * self.steps

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class ForgetfulOptimizer(Good):
    """Its steps depend on a counter that isn't saved."""

    def build_optimizer(self, params: Any) -> torch.optim.Optimizer:
        class Counting(torch.optim.SGD):
            steps = 0

            def step(self, closure: Any = None) -> Any:
                self.steps += 1
                for group in self.param_groups:
                    for parameter in group["params"]:
                        if parameter.grad is not None:
                            parameter.grad.mul_(self.steps)
                return super().step(closure)

        return Counting(params, lr=0.01)


class CountsCalls(Good):
    """Its loss depends on a counter that isn't saved."""

    calls = 0

    def loss(self, model: nn.Module, batch: Any) -> Any:
        self.calls += 1
        return super().loss(model, batch) * self.calls


class RaisingEvaluation(Good):
    def evaluate(self, model: nn.Module) -> Any:
        return {"accuracy": self.points()[2]}


class EvaluationIsANumber(Good):
    def evaluate(self, model: nn.Module) -> Any:
        return 0.5


class EvaluationIsNaN(Good):
    def evaluate(self, model: nn.Module) -> Any:
        return {"loss": float("nan"), "accuracy": 0.5}


class EvaluationOfNothing(Good):
    def evaluate(self, model: nn.Module) -> Any:
        return {}


class EvaluationWrites(Good):
    def evaluate(self, model: nn.Module) -> Any:
        model[2].bias.add_(1.0)  # type: ignore[index,union-attr,operator]
        return super().evaluate(model)


class EvaluationTrains(Good):
    def evaluate(self, model: nn.Module) -> Any:
        return super().evaluate(model.train())


class NeedsBatches(Good):
    """Its evaluation uses what only training has made."""

    def train_batches(self, shard: Shard) -> Iterator[Any]:
        self.classes = 3
        return super().train_batches(shard)

    def evaluate(self, model: nn.Module) -> Any:
        return {"accuracy": 1 / self.classes}


class LossOnCPU(Good):
    def loss(self, model: nn.Module, batch: Any) -> Any:
        return (model(batch[0]) * torch.ones(3)).square().mean()


class EvaluationOnCPU(Good):
    def evaluate(self, model: nn.Module) -> Any:
        points, _ = self.points()
        return {"mean": float(model(points).mean())}


class Listing(nn.Module):
    """Keeps its weights in a list, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 8), nn.Linear(8, 3)
        self.weights = [self.first.weight, self.second.weight]

    def forward(self, x: Tensor) -> Any:
        for weight in self.weights:
            x = torch.tanh(x @ weight.T)
        return x + self.first.bias.sum() + self.second.bias


class KeepsItsModel(Good):
    """Uses the model that it has built, and weights in a list: both move with the model."""

    def build_model(self) -> nn.Module:
        self.model = Listing()
        return self.model

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return F.cross_entropy(self.model(batch[0]), batch[1])


class WithGenerator(Good):
    """Has an attribute that can't be pickled."""

    def __init__(self) -> None:
        self.lines = (line for line in ["one", "two"])


class Large(Good):
    """Carries its data."""

    def __init__(self) -> None:
        self.data = np.zeros(3 * 10**6)


class TwoMistakes(LossOfEachSample, RaisingEvaluation, WithoutCursor):
    """Has mistakes in its loss, its evaluation and its data."""


class WithoutEvaluation:
    """Has only what a worker must have."""

    build_model, points, train_batches, loss = Good.build_model, Good.points, Good.train_batches, Good.loss
