"""State that no optimizer trains: buffers that training changes are merged, and all else must be equal in every process."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.data import Shard
from lte_ray.engine.head.untrained import check_equal_builds
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.prepare import merged_state_dict, prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError, WorkerError, WorkerFailed
from lte_ray.merging.flat_buffer import views
from tests.support.numerics import assert_near

WIDTH = 4


class RunningMean(nn.Module):
    """Subtracts an average of its inputs, which it keeps in a buffer."""

    def __init__(self, persistent: bool = True) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH), persistent)
        self.register_buffer("table", torch.arange(8.0))
        self.register_buffer("mask", torch.ones(WIDTH, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0) + 10, 0.3)
        return self.out(x + 10 - self.mean)  # type: ignore[no-any-return]


class Codebook(nn.Module):
    """Vector quantization whose codes follow the inputs that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("codes", torch.randn(5, WIDTH))
        self.register_buffer("counts", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.cdist(x, self.codes).argmin(1)
        if self.training:
            with torch.no_grad():
                hits = F.one_hot(chosen, 5).to(x.dtype)
                self.counts.mul_(0.9).add_(hits.sum(0), alpha=0.1)
                means = hits.T @ x / hits.sum(0).clamp(min=1)[:, None]
                self.codes.copy_(torch.where(hits.sum(0)[:, None] > 0, 0.9 * self.codes + 0.1 * means, self.codes))
        quantized = x + (self.codes[chosen] - x).detach()
        return self.out(quantized)  # type: ignore[no-any-return]


class MomentumEncoder(nn.Module):
    """A slow copy of a layer, in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("slow", self.out.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.slow.lerp_(self.out.weight, 0.1)
        return self.out(x) + 0.1 * F.linear(x, self.slow)  # type: ignore[no-any-return]


class Counting(nn.Module):
    """Counts its calls in an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.out(x)  # type: ignore[no-any-return]


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)), nn.Linear(WIDTH, WIDTH))


def normalized() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH, momentum=None), nn.Linear(WIDTH, WIDTH))


MODELS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "running mean": (RunningMean, {"mean"}),
    "codebook": (Codebook, {"codes", "counts"}),
    "momentum encoder": (MomentumEncoder, {"slow"}),
    "counter": (Counting, {"calls"}),
    "spectral norm": (spectral, {"0.parametrizations.weight.0._u", "0.parametrizations.weight.0._v"}),
    "batch norm": (normalized, {"1.running_mean", "1.running_var", "1.num_batches_tracked"}),
}


@dataclass
class Stateful:
    """A worker with one of these models."""

    build: Callable[[], nn.Module]

    def build_model(self) -> nn.Module:
        return self.build().double()

    def train_batches(self, shard: Shard) -> Iterator[Tensor]:
        for slot in shard.slots():
            yield torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(slot), dtype=torch.float64)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return F.mse_loss(model(batch), batch.roll(1, 1))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": float(self.loss(model, next(self.train_batches(Shard(0, 1, 5)))))}

    def build_optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.1)


def settings(heads: int = 2, **lte: Any) -> Settings:
    config = LTEConfig(num_heads=heads, lora_r=2, lora_alpha=4.0, **lte)
    return Settings("zoo", config, MergeConfig(merge_iter=3, policy="average"), TrainConfig(steps=6))


IN_TURNS = ("spectral norm", "batch norm")
"""Models that write to their buffers in a way that can't be computed as one batch."""


@pytest.mark.parametrize(
    ("name", "placement"),
    [(name, where) for name in MODELS for where in ("apart", "turns", "batch") if where != "batch" or name not in IN_TURNS],
)
def test_buffers_that_training_changes_are_merged(name: str, placement: str) -> None:
    """They are found without being named. After the last merge heads hold what is exported, and what one head alone learns."""
    build, expected = MODELS[name]
    placed = {"heads_per_actor": 1 if placement == "apart" else 2, "stack_heads": "always" if placement == "batch" else "never"}
    done = run_in_process(Stateful(build), settings(), torch.float64, **placed)  # type: ignore[arg-type]
    initial = prepare(Stateful(build), settings(), torch.float64)
    assert {r.name for r in done.plan.replicas if r.buffer} == expected
    before, after = views(done.plan.base, initial.base), views(done.plan.base, done.base)
    exported = merged_state_dict(initial.model, done.plan, done.base)
    for buffer in expected:
        assert not torch.equal(before[buffer], after[buffer]), "training changes it"
        for head in done.heads:
            assert_near(head.converted.tensors()[buffer].double(), after[buffer], 1e-13)
        assert_near(exported[buffer].double(), after[buffer], 1e-6)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"spectral norm", "codebook"}))
def test_merged_buffers_are_the_mean_of_what_heads_would_hold(name: str) -> None:
    """The first merge adds the mean of the heads' changes, as it does for any replica."""
    build, expected = MODELS[name]
    run = Settings("zoo", settings().lte, MergeConfig(merge_iter=3, policy="average"), TrainConfig(steps=3))
    done = run_in_process(Stateful(build), run, torch.float64)
    alone = []
    for head in range(2):
        model = prepare(Stateful(build), run, torch.float64).model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # buffers that follow weights are left out below
        for batch in itertools.islice(Stateful(build).train_batches(Shard(head, 2, 0)), 3):
            Stateful(build).loss(model, batch).backward()
            optimizer.step()
        alone.append(dict(model.named_buffers()))
    after = views(done.plan.base, done.base)
    for buffer in expected - {"slow", "1.running_mean", "1.running_var"}:
        assert_near(after[buffer], torch.stack([a[buffer].double() for a in alone]).mean(0), 1e-13)


def test_constant_and_temporary_buffers_are_not_merged() -> None:
    """A table that stays, a mask, and what isn't part of the state dict cost no bytes."""
    names = [entry.name for entry in prepare(Stateful(lambda: RunningMean(persistent=False)), settings()).plan.base.entries]
    assert names == ["out.weight", "out.bias"]


def test_buffers_can_be_named() -> None:
    """--merge-buffers replaces what is found; `none` merges none of them; a name that there isn't is refused."""
    for given, merged in ((("table",), ["table"]), (("auto", "t*"), ["mean", "table"]), (("none",), [])):
        plan = prepare(Stateful(RunningMean), settings(merge_buffers=given)).plan
        assert [r.name for r in plan.replicas if r.buffer] == merged
    with pytest.raises(ConfigError, match=r"--merge-buffers 'codes' matches no buffer of the model.*mean, table, mask"):
        prepare(Stateful(RunningMean), settings(merge_buffers=("codes",)))


class Growing(RunningMean):
    """Its buffer becomes longer."""

    def forward(self, x: Tensor) -> Tensor:
        self.mean = torch.cat([self.mean, x.mean().reshape(1)])
        return self.out(x)  # type: ignore[no-any-return]


def test_a_buffer_that_grows_is_refused() -> None:
    """It can't be averaged; the error names it."""
    with pytest.raises(WorkerError, match=r"changes the shape of its buffer mean"):
        prepare(Stateful(Growing), settings())


class Late(RunningMean):
    """Its buffer begins to change after the first step of a head."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 2:
            self.table.add_(1)
        return self.out(x)  # type: ignore[no-any-return]


def test_a_buffer_that_begins_to_change_later_is_refused() -> None:
    """It wasn't found before the run, so it isn't part of the base: the first contribution says how to name it."""
    with pytest.raises(WorkerFailed, match=r"changes its buffer table .*--merge-buffers auto table"):
        run_in_process(Stateful(Late), settings(), torch.float64)
    run_in_process(Stateful(Late), settings(merge_buffers=("auto", "table")), torch.float64)


def test_finding_buffers_changes_nothing() -> None:
    """Neither the base's values, nor the caller's random numbers, nor what the worker counts."""

    class Counter(Stateful):
        calls = 0

        def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
            self.calls += 1
            return super().loss(model, batch + torch.rand(()))

    worker = Counter(RunningMean)
    state = torch.get_rng_state()
    initial = prepare(worker, settings(), torch.float64)
    assert torch.equal(torch.get_rng_state(), state)
    assert worker.calls == 0
    assert not views(initial.plan.base, initial.base)["mean"].any()


class Unequal(nn.Module):
    """Has a tensor that nothing trains, different in each process."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)
        values = torch.from_numpy(np.random.default_rng().normal(size=(WIDTH, WIDTH)))
        if kind == "buffer":
            self.register_buffer("proj", values)
        elif kind == "temporary buffer":
            self.register_buffer("proj", values, persistent=False)
        elif kind == "frozen":
            self.proj = nn.Parameter(values, requires_grad=False)
        else:
            self.register_buffer("proj", torch.randperm(50, generator=torch.Generator().manual_seed(next(SEEDS))))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)  # type: ignore[no-any-return]


SEEDS = itertools.count()


@pytest.mark.parametrize("kind", ["buffer", "temporary buffer", "frozen", "order"])
def test_unequal_builds_are_refused(kind: str) -> None:
    """At the start of each head, with the tensor's name, also if only the order differs."""
    with pytest.raises(WorkerFailed, match=r"build_model\(\) isn't deterministic: proj differs between processes"):
        run_in_process(Stateful(lambda: Unequal(kind)), settings(), torch.float64)


def test_fingerprints_tell_builds_apart() -> None:
    """Processes compare fingerprints of what nothing trains; those of a checkpoint are compared at a resume and an export."""
    initial = prepare(Stateful(lambda: Unequal("buffer")), settings())
    other = prepare(Stateful(lambda: Unequal("buffer")), settings()).complete(settings())
    check_equal_builds(initial.untrained, initial.untrained)
    check_equal_builds(initial.untrained, ())  # a checkpoint of an older release
    with pytest.raises(WorkerError, match=r"build_model\(\) isn't deterministic: proj differs"):
        check_equal_builds(other.untrained, initial.untrained)


def test_unequal_values_of_what_trains_are_harmless() -> None:
    """Heads get the driver's values of all that is merged."""

    class Drawn(RunningMean):
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():
                self.out.weight.copy_(torch.from_numpy(np.random.default_rng().normal(size=(WIDTH, WIDTH))))

    first, other = (run_in_process(Stateful(Drawn), settings(), torch.float64) for _ in range(2))
    assert not torch.equal(first.base, other.base)
    assert copy.copy(first.merges[-1].losses) is not None
