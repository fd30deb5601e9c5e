"""The optimizer and schedule of a worker that builds none."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from lte_ray.config import TrainConfig
from lte_ray.engine.head.head import Head
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError
from lte_ray.optim import LoRAMuon, Muon
from tests.support.tiny_worker import Tiny, make_settings


class Plain(Tiny):
    """Tiny without an optimizer of its own."""

    build_optimizer = None  # type: ignore[assignment]


class Scheduled(Plain):
    def build_schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def make(lte: dict[str, Any] | None = None, **train: Any) -> Settings:
    settings = make_settings()
    return dataclasses.replace(
        settings, lte=dataclasses.replace(settings.lte, **(lte or {})), train=TrainConfig(steps=12, seed=3, **train)
    )


def rates(settings: Settings, worker: Any = None) -> dict[str, float]:
    """The rate of each group by its name, and its multiplier if it has one."""
    groups = Head(worker or Plain(), settings, 0, dtype=torch.float64).optimizer.param_groups
    return {f"{g['name']} x{g['lr_multiplier']:g}" if "lr_multiplier" in g else g["name"]: g["lr"] for g in groups}


@pytest.mark.parametrize(
    ("train", "kind", "expected"),
    [
        ({}, LoRAMuon, {"lora": 0.05, "replica": 0.01}),
        ({"optimizer": "adamw"}, torch.optim.AdamW, {"lora": 1e-3, "replica": 1e-3}),
        ({"optimizer": "adamw", "lr": 0.5}, torch.optim.AdamW, {"lora": 0.5, "replica": 0.5}),
        ({"optimizer": "adamw", "replica_lr": 0.5}, torch.optim.AdamW, {"lora": 1e-3, "replica": 0.5}),
        ({"optimizer": "lora-plus", "lr": 0.5}, torch.optim.AdamW, {"lora_A": 0.5, "lora_B": 2.0, "replica": 1e-3}),
        ({"optimizer": "lora-muon"}, LoRAMuon, {"lora": 0.05, "replica": 0.01}),
        ({"optimizer": "lora-muon", "lr": 0.5, "replica_lr": 0.25}, LoRAMuon, {"lora": 0.5, "replica": 0.25}),
    ],
)
def test_settings_choose_the_optimizer_and_its_rates(train: dict[str, Any], kind: type, expected: dict[str, float]) -> None:
    """Without settings it is LoRA-Muon. AdamW has rate 1e-3; no optimizer decays weights."""
    train = {"schedule": "constant", "warmup": 0, **train}
    optimizer = Head(Plain(), make(**train), 0, dtype=torch.float64).optimizer
    assert isinstance(optimizer, kind)
    assert rates(make(**train)) == pytest.approx(expected)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0}


@pytest.mark.parametrize("optimizer", ["adamw", "lora-plus", "lora-muon"])
def test_multipliers_of_layers_hold(optimizer: str) -> None:
    """For any optimizer; those of the factors of one layer are twice those of others."""
    by_name = rates(make({"layers": ("up: lr=2",)}, optimizer=optimizer))
    for name in ("lora", "lora_A", "lora_B"):
        assert by_name.get(f"{name} x2", 0.0) == 2 * by_name.get(f"{name} x1", 0.0)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_settings_choose_the_schedule(schedule: str) -> None:
    """It begins with a warm-up: after one of two steps at half the rate."""
    head = Head(Plain(), make(schedule=schedule, warmup=2), 0, dtype=torch.float64)
    assert [group["lr"] for group in head.optimizer.param_groups] == [0.025, 0.005]


def test_the_schedule_is_a_cosine_unless_the_optimizer_is_the_workers_own() -> None:
    """Whoever builds an optimizer and no schedule has always had a constant rate."""
    assert Head(Plain(), make(), 0, dtype=torch.float64).schedule is not None
    assert Head(Tiny(), make(), 0, dtype=torch.float64).schedule is None


@pytest.mark.parametrize(
    ("lte", "train", "kind"),
    [({}, {}, LoRAMuon), ({"full_rank": True}, {}, Muon), ({"full_rank": True}, {"baseline": True}, torch.optim.AdamW)],
)
def test_the_default_suits_what_trains(lte: dict[str, Any], train: dict[str, Any], kind: type) -> None:
    """LoRA-Muon for factors, Muon for whole weights, AdamW for ordinary training."""
    assert type(Head(Plain(), make(lte, **train), 0, dtype=torch.float64).optimizer) is kind


@pytest.mark.parametrize("optimizer", ["lora-plus", "lora-muon"])
def test_a_run_trains_with_it(optimizer: str) -> None:
    """Two heads, through merges, to a lower loss."""
    run = run_in_process(Plain(), make(optimizer=optimizer, lr=0.05, schedule="cosine", warmup=2), torch.float64)
    first, last = (sum(merge.losses.values()) for merge in (run.merges[0], run.merges[-1]))
    assert last < first


def test_muon_trains_weights_in_full() -> None:
    """Where no factors train."""
    head = Head(
        Plain(), make({"full_rank": True}, optimizer="muon", lr=0.5, schedule="constant", warmup=0), 0, dtype=torch.float64
    )
    assert type(head.optimizer) is Muon
    assert {group["name"]: group["lr"] for group in head.optimizer.param_groups} == {"weight": 0.5, "replica": 0.01}


@pytest.mark.parametrize(
    ("worker", "settings", "message"),
    [
        (
            Tiny(),
            make(optimizer="lora-muon", lr=0.5),
            "--optimizer lora-muon and --lr 0.5 would have no effect, because Tiny has a build_optim",
        ),
        (Tiny(), make(replica_lr=0.5), "--replica-lr 0.5 would have no effect"),
        (Tiny(), make(weight_decay=0.1), "--weight-decay 0.1 would have no effect"),
        (
            Scheduled(),
            make(schedule="cosine", warmup=3),
            "--schedule cosine and --warmup 3 would .* because Scheduled has a build_sch",
        ),
        (
            Tiny(),
            make(warmup=3),
            "--warmup is 3, but Tiny has .* but no build_schedule.., so there is no schedule",
        ),
        (Plain(), make(optimizer="muon"), "--optimizer muon is for weights that train in full, .* Use lora-muon"),
        (Plain(), make({"full_rank": True}, optimizer="lora-plus"), "in full rank there are no factors"),
    ],
)
def test_settings_without_an_effect_are_refused_before_any_head_starts(worker: Any, settings: Settings, message: str) -> None:
    """The error names the settings and says what to do."""
    with pytest.raises(ConfigError, match=message):
        prepare(worker, settings)


def test_a_worker_may_build_one_of_the_two() -> None:
    """Its own optimizer with the settings' schedule, or the other way round."""
    prepare(Tiny(), make(schedule="cosine"))
    prepare(Scheduled(), make(optimizer="lora-muon"))


@pytest.mark.parametrize("optimizer", ["adamw", "lora-plus", "lora-muon"])
def test_weight_decay_is_for_factors_and_not_for_replicas(optimizer: str) -> None:
    """Biases and norms don't decay, as is usual."""
    head = Head(Plain(), make(optimizer=optimizer, weight_decay=0.25), 0)
    decays = {group["name"][:4]: group["weight_decay"] for group in head.optimizer.param_groups}
    assert decays == {"lora": 0.25, "repl": 0.0}
    assert {group["weight_decay"] for group in Head(Plain(), make(), 0).optimizer.param_groups} == {0.0}
