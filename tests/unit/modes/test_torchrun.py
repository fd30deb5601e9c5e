"""Modes and `misc.distributed` in several processes, as torchrun starts them: they train the model that one process trains."""

from __future__ import annotations

import argparse
import multiprocessing
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
from lte_ray.misc import MergeCondition, distributed
from lte_ray.modes import merged_state_dict
from tests.support.numerics import assert_near

HEADS, WORLD, SAMPLES, STEPS, MERGE_STEPS = 2, 2, 8, 6, 3
ROOT, MODULE = Path(__file__).resolve().parents[3], "tests.unit.modes.test_torchrun"
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


def process_part(batch: Tensor, rank: int, world: int, heads: int) -> Tensor:
    """A process's part of a batch: a slice of every head's part, so that each head's data is that of one process."""
    return batch.unflatten(0, (heads, world, -1))[:, rank].flatten(0, 1)


def train(case: dict[str, Any], rank: int = 0, world: int = 1) -> nn.Module:
    """Trains in float64 with Adam and merges; several processes each train on their parts of the same batches."""
    mode, chunk = case["mode"], case["chunk"]
    lte = LTEConfig(
        num_heads=HEADS, lora_r=(2, 1), lora_alpha=4.0, **{k: v for k, v in case.items() if k not in ("mode", "chunk")}
    )
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # parameters that train without LoRA
        model = prepare_model_for_lte(Small().double(), lte, replica_layers=["out", "token"], mode=mode, chunk=chunk, seed=1)
    outer = model if world == 1 else DistributedDataParallel(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    merges = MergeCondition(outer, MERGE_STEPS)
    generator = torch.Generator().manual_seed(5)
    for _ in range(STEPS + 1):  # no merge follows the last step
        x, target = (
            torch.randn(SAMPLES, 2, 6, generator=generator).double(),
            torch.randn(SAMPLES, 3, generator=generator).double(),
        )
        if world > 1:
            heads = 1 if mode == "mhlora" else HEADS
            x, target = (process_part(t, rank, world, heads) for t in (x, target))
        optimizer.zero_grad()
        (outer(x) - target).square().mean().backward()
        optimizer.step()
        merges.step()
    return model


def statistics(rank: int = 0, world: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    """Merged and full state of batch norms, one a replica and one with LoRA, whose statistics only merges exchange."""
    torch.manual_seed(0)
    lte = LTEConfig(num_heads=HEADS, lora_r=1, adapt=("linear", "norm"), exclude=("0",))
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    model.forward = lambda x: model[2](x + 0 * (model[0](x) + model[1](x)))  # type: ignore[method-assign]
    prepare_model_for_lte(model, lte, seed=1)
    outer = model if world == 1 else DistributedDataParallel(model, broadcast_buffers=False)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        x = torch.randn(SAMPLES, 3, generator=generator).double()
        outer(x if world == 1 else process_part(x, rank, world, HEADS)).square().mean().backward()
    MergeCondition(outer).merge()
    return merged_state_dict(model), model.state_dict()


def resets(rank: int) -> dict[str, Tensor]:
    """State after a reset of models of all modes, prepared in processes with different seeds."""
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


def check_process_group(folder: Path) -> None:
    """Joins the process group, once and again, and checks ranks and reductions."""
    assert not distributed.is_distributed()
    assert distributed.world_size() == 1
    assert distributed.is_main_process()
    args = argparse.Namespace(dist_url=f"file://{folder}/rendezvous")
    assert distributed.init_distributed_mode(args)
    assert distributed.init_distributed_mode()
    assert distributed.is_distributed()
    rank = distributed.rank()
    expected = {"distributed": True, "rank": rank, "gpu": rank, "world_size": WORLD, "dist_backend": "gloo"}
    assert vars(args) == {**expected, "dist_url": args.dist_url}
    assert distributed.world_size() == WORLD
    assert distributed.is_main_process() == (rank == 0)
    assert distributed.local_rank() == rank
    assert distributed.reduce(1.0 + 2 * rank, "mean").item() == 2.0
    assert distributed.reduce(rank, "sum").item() == 1
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True) * (1 + 2 * rank)
    assert distributed.reduce(x, "sum").tolist() == [4.0, 8.0]
    assert distributed.reduce(x).tolist() == [2.0, 4.0]
    assert x.tolist() == [1.0 + 2 * rank, 2.0 + 4 * rank]
    assert not distributed.reduce(x).requires_grad
    y = torch.arange(6).view(2, 3).t() * rank
    assert torch.equal(distributed.reduce(y, "sum"), torch.arange(6).view(2, 3).t())
    assert torch.equal(distributed.reduce(y), torch.arange(6).view(2, 3).t() / 2)
    os.environ.pop("LOCAL_RANK")
    assert distributed.local_rank() == rank


def worker(folder: Path) -> None:
    """One of the processes: trains all cases and writes the results to a file."""
    torch.set_num_threads(1)
    check_process_group(folder)
    rank = distributed.rank()
    results: dict[str, Any] = {"statistics": statistics(rank, WORLD), "resets": resets(rank)}
    for name, case in CASES.items():
        model = train(case, rank, WORLD)
        results[name] = (merged_state_dict(model), model.state_dict())
    assert "ray" not in sys.modules, "Modes and misc work without Ray."
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def fork_workers(folder: Path) -> None:
    """Starts the processes with the environment that torchrun gives them; forking imports torch once for all of them."""
    torch.set_num_threads(1)
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # imports what the first optimizer needs
    context = multiprocessing.get_context("fork")
    processes = []
    for rank in range(WORLD):
        os.environ.update({"WORLD_SIZE": str(WORLD), "RANK": str(rank), "LOCAL_RANK": str(rank)})
        processes.append(context.Process(target=worker, args=(folder,), daemon=True))
        processes[-1].start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))


def run_python(folder: Path, function: str, *command: str) -> None:
    """Runs `function(folder)` of this file in another Python, through `command` if given."""
    script = folder / "script.py"
    script.write_text(f"from pathlib import Path\nfrom {MODULE} import {function}\n{function}(Path({str(folder)!r}))\n")
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, *command, str(script)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Each process's results, of one start."""
    folder = tmp_path_factory.mktemp("processes")
    run_python(folder, "fork_workers")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


@pytest.mark.slow
def test_torchrun_itself_gives_the_same_bits(tmp_path: Path, trained: list[dict[str, Any]]) -> None:
    """The real launcher starts the same processes; every number they train is the same."""
    run_python(tmp_path, "worker", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD))
    for rank in range(WORLD):
        results = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for name in CASES:
            expected = trained[rank][name][1]
            assert all(torch.equal(value, expected[key]) for key, value in results[name][1].items())


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_train_what_one_does(name: str, trained: list[dict[str, Any]]) -> None:
    """Merged weights, factors, references, and replicas are equal if each process has a slice of every head's data."""
    model = train(CASES[name])
    # 1e-10: float64 sums in another order, which Adam makes grow; other arithmetic is off by 1e-3 and more.
    for actual, expected in zip(trained[0][name], (merged_state_dict(model), model.state_dict()), strict=True):
        assert list(actual) == list(expected)
        for key, value in expected.items():
            assert_near(actual[key], value, 1e-10)
    start = Small().state_dict()
    assert all(value.shape == start[key].shape for key, value in trained[0][name][0].items())


@pytest.mark.parametrize("name", list(CASES))
def test_processes_stay_bitwise_in_step(name: str, trained: list[dict[str, Any]]) -> None:
    """Merges send no parameters, and still all processes have the same bits: they average gradients alike."""
    first, second = trained[0][name][1], trained[1][name][1]
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_running_statistics_are_averaged_over_processes(trained: list[dict[str, Any]]) -> None:
    """Each process's batch norms see its own data; a merge sets them to the mean, which one process has on all data."""
    (merged, first), (_, second) = trained[0]["statistics"], trained[1]["statistics"]
    assert all(torch.equal(first[key], second[key]) for key in first)
    alone, _ = statistics()
    for name in ("0.running_mean", "1.running_mean"):
        assert_near(merged[name], alone[name], 1e-14)
        assert merged[name].any()
    assert not torch.equal(merged["0.running_var"], torch.ones(3))


def test_processes_with_different_seeds_stay_in_step(trained: list[dict[str, Any]]) -> None:
    """Without seed=, `reset_lora_parameters` draws what the first process draws, in every mode."""
    first, second = trained[0]["resets"], trained[1]["resets"]
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
