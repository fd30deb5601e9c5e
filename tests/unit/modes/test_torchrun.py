"""Modes under torchrun: several processes with DistributedDataParallel train the model that one process trains."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lte_ray import LTEConfig, prepare_model_for_lte
from lte_ray.misc import MergeCondition
from lte_ray.modes import merged_state_dict
from tests.support.helpers import assert_near

HEADS, WORLD, SAMPLES, STEPS, MERGE = 2, 2, 8, 12, 3
CASES = {
    "layers": {"mode": "ddp", "chunk": "layer"},
    "model": {"mode": "ddp", "chunk": "model"},
    "copies": {"mode": "dmp", "chunk": "layer"},
    "joint": {"mode": "mhlora", "chunk": "layer"},
    "lora-biases": {"mode": "ddp", "chunk": "layer", "lora_bias": "lora", "reset": "B"},
}


class Small(nn.Module):
    """Convolution, attention, a class token, a norm, and an output layer that trains as a replica."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv1d(2, 4, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.attention, self.norm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patches(x).mT], 1)
        y: Tensor = self.out(self.norm(x + self.attention(x, x, x)[0])[:, 0])
        return y


def own_part(whole: Tensor, rank: int, world: int, heads: int) -> Tensor:
    """What a process gets of a batch: a slice of every head's part, so that each head sees the same data in all."""
    return whole.unflatten(0, (heads, world, -1))[:, rank].flatten(0, 1)


def train(case: dict[str, Any], rank: int = 0, world: int = 1) -> nn.Module:
    """Adam with merges in float64; in several processes on each one's part of the same batches."""
    mode, chunk = case["mode"], case["chunk"]
    lte = LTEConfig(
        num_heads=HEADS, lora_r=(2, 1), lora_alpha=4.0, **{k: v for k, v in case.items() if k not in ("mode", "chunk")}
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters that train without LoRA
        model = prepare_model_for_lte(Small().double(), lte, replica_layers=["out", "token"], mode=mode, chunk=chunk, seed=1)
    outer = model if world == 1 else DistributedDataParallel(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    merges = MergeCondition(outer, MERGE)
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS + 1):  # the last step stays unmerged
        x, target = (
            torch.randn(SAMPLES, 2, 6, generator=generator).double(),
            torch.randn(SAMPLES, 3, generator=generator).double(),
        )
        if world > 1:
            heads = 1 if mode == "mhlora" else HEADS
            x, target = (own_part(t, rank, world, heads) for t in (x, target))
        optimizer.zero_grad()
        (outer(x) - target).square().mean().backward()
        optimizer.step()
        merges.step()
    return model


def statistics(rank: int = 0, world: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    """Batch norm on the data itself, as a replica and with LoRA, whose statistics nobody else sends: merged and all state."""
    torch.manual_seed(0)
    lte = LTEConfig(num_heads=HEADS, lora_r=1, adapt=("linear", "norm"), exclude=("0",))
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    model.forward = lambda x: model[2](x + 0 * (model[0](x) + model[1](x)))  # type: ignore[method-assign]
    prepare_model_for_lte(model, lte, seed=1)
    outer = model if world == 1 else DistributedDataParallel(model, broadcast_buffers=False)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        x = torch.randn(SAMPLES, 3, generator=generator).double()
        outer(x if world == 1 else own_part(x, rank, world, HEADS)).square().mean().backward()
    MergeCondition(outer).merge()
    return merged_state_dict(model), model.state_dict()


def resets(rank: int) -> dict[str, Tensor]:
    """State of models of all modes, prepared in processes that were seeded differently, after a reset."""
    state = {}
    for mode in ("ddp", "dmp", "mhlora"):
        torch.manual_seed(100 + rank)
        lte = LTEConfig(num_heads=HEADS, lora_r=1, lora_alpha=4.0, lora_bias="lora")
        model = prepare_model_for_lte(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), lte, mode=mode)
        outer = DistributedDataParallel(model, broadcast_buffers=False)
        outer(torch.randn(SAMPLES, 3)).sum().backward()
        MergeCondition(outer).merge()
        for layer in model:
            layer.reset_lora_parameters()
        state |= {f"{mode}.{key}": value for key, value in model.state_dict().items()}
    return state


def worker(folder: Path) -> None:
    """What torchrun starts: trains all cases as one of its processes and leaves the results in files."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    results: dict[str, Any] = {"statistics": statistics(rank, dist.get_world_size()), "resets": resets(rank)}
    for name, case in CASES.items():
        model = train(case, rank, dist.get_world_size())
        results[name] = (merged_state_dict(model), model.state_dict())
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each process's results, of one start of torchrun."""
    folder = tmp_path_factory.mktemp("torchrun")
    script = folder / "script.py"
    script.write_text(
        f"from pathlib import Path\nfrom tests.unit.modes.test_torchrun import worker\nworker(Path({str(folder)!r}))\n"
    )
    root = Path(__file__).resolve().parents[3]
    paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD), str(script)]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_train_what_one_does(name: str, trained: list[dict[str, Any]]) -> None:
    """Merged weights, factors, references and replicas after 13 steps and 4 merges, when each process has a slice of every
    head's data.
    """
    model = train(CASES[name])
    # 1e-10: float64 sums in another order, which a dozen steps of Adam make grow; other arithmetic is off by 1e-3 and more.
    for actual, expected in zip(trained[0][name], (merged_state_dict(model), model.state_dict()), strict=True):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_near(actual[key], value, 1e-10)
    start = Small().state_dict()
    assert all(value.shape == start[key].shape for key, value in trained[0][name][0].items())


@pytest.mark.parametrize("name", list(CASES))
def test_processes_stay_bitwise_in_step(name: str, trained: list[dict[str, Any]]) -> None:
    """No parameter is sent at a merge, and still every process holds the very same numbers: gradients are averaged alike."""
    first, second = trained[0][name][1], trained[1][name][1]
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_running_statistics_are_averaged_over_processes(trained: list[dict[str, Any]]) -> None:
    """Each process's batch norms see its own data: after a merge they hold the mean, which is one process's on all of it."""
    (merged, first), (_, second) = trained[0]["statistics"], trained[1]["statistics"]
    assert all(torch.equal(first[key], second[key]) for key in first)
    alone, _ = statistics()
    for name in ("0.running_mean", "1.running_mean"):
        assert_near(merged[name], alone[name], 1e-14)
        assert merged[name].any()
    assert not torch.equal(merged["0.running_var"], torch.ones(3))


def test_processes_that_were_seeded_differently_stay_in_step(trained: list[dict[str, Any]]) -> None:
    """Without seed=: `reset_lora_parameters` draws what the first process draws, in every mode."""
    first, second = trained[0]["resets"], trained[1]["resets"]
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
