"""Number types and devices, processes, and the package's face."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn

from lte_ray import misc
from lte_ray.errors import ConfigError
from lte_ray.misc import common, distributed

RANKS = """
import argparse, os, torch
from lte_ray.misc import distributed as d
assert not d.is_distributed() and d.world_size() == 1 and d.is_main_process()
args = argparse.Namespace(dist_url="env://")
assert d.init_distributed_mode(args) and d.init_distributed_mode() and d.is_distributed()
assert args.distributed and (args.rank, args.gpu, args.world_size) == (d.rank(), d.rank(), 2) and args.dist_backend == "gloo"
assert d.reduce(1.0 + 2 * d.rank(), "mean").item() == 2.0 and d.reduce(d.rank(), "sum").item() == 1
assert d.world_size() == 2 and d.is_main_process() == (d.rank() == 0) and d.local_rank() == d.rank()
x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True) * (1 + 2 * d.rank())
assert d.reduce(x, "sum").tolist() == [4.0, 8.0] and d.reduce(x).tolist() == [2.0, 4.0]
assert x.tolist() == [1.0 + 2 * d.rank(), 2.0 + 4 * d.rank()] and not d.reduce(x).requires_grad
y = torch.arange(6).view(2, 3).t() * d.rank()
assert torch.equal(d.reduce(y, "sum"), torch.arange(6).view(2, 3).t())
assert torch.equal(d.reduce(y), torch.arange(6).view(2, 3).t() / 2)
del os.environ["LOCAL_RANK"]
assert d.local_rank() == d.rank()
torch.distributed.destroy_process_group()
print("fine")
"""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No torchrun and no CUDA."""
    for name in distributed.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    return monkeypatch


def pretend_cuda(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], count: int = 2) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


def test_on_cpu_bfloat16_without_scaling(alone: pytest.MonkeyPatch) -> None:
    """The context computes in bfloat16 each time it is entered; parameters stay float32; the scaler only passes on."""
    dtype, context, scaler = common.determine_compute_context()
    layer = nn.Linear(2, 2).to(dtype)
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    before = layer.weight.detach().clone()
    for _ in range(2):
        with context:
            y = layer(torch.ones(1, 2))
        assert y.dtype == torch.bfloat16
        scaler.scale(y.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert layer(torch.zeros(1, 2)).dtype == layer.weight.dtype == dtype == torch.float32
    assert torch.equal(layer.weight, before - 1 - 1)
    assert not scaler.is_enabled()
    assert common.auto_dtype("cpu") == torch.bfloat16
    assert not common.flash_ready_device()


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_on_cuda_by_capability(alone: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype) -> None:
    """bfloat16 and flash attention from Ampere on; before, float16."""
    pretend_cuda(alone, capability)
    alone.setattr(torch.version, "hip", None)
    alone.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert common.auto_dtype() == common.auto_dtype("cuda:1") == dtype
    assert common.flash_ready_device() == (dtype == torch.bfloat16)
    assert not common.flash_ready_device("cpu")


def test_a_device_without_autocast_computes_in_float32(alone: pytest.MonkeyPatch) -> None:
    """Its context has no effect."""
    dtype, context, scaler = common.determine_compute_context("meta")
    with context:
        assert nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == dtype == torch.float32
    assert not scaler.is_enabled()


def test_float16_needs_a_scaler(alone: pytest.MonkeyPatch) -> None:
    """On CUDA devices before Ampere it scales."""
    alone.setattr(torch.version, "hip", None)
    alone.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    for capability, enabled in (((7, 5), True), ((8, 0), False)):
        pretend_cuda(alone, capability)
        dtype, _, scaler = common.determine_compute_context()
        assert (dtype, scaler.is_enabled()) == (torch.float32, enabled)


def test_autocast_vars_casts_where_autocast_is_on() -> None:
    """Floating-point tensors only; one in, one out."""
    x, y = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    assert common.autocast_vars(x) is x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [t.dtype for t in common.autocast_vars(x, y)] == [torch.bfloat16, torch.int64]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_real_gpu() -> None:
    """The context computes in auto_dtype, and a step of the scaler is one of the optimizer."""
    dtype, context, scaler = common.determine_compute_context("cuda")
    layer = nn.Linear(2, 2, device="cuda", dtype=dtype)
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    before = layer.weight.detach().clone()
    with context:
        y = layer(torch.ones(1, 2, device="cuda"))
    assert y.dtype == common.auto_dtype("cuda")
    scaler.scale(y.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(layer.weight, before - 1)
    assert scaler.is_enabled() == (y.dtype == torch.float16)


def test_a_process_alone(alone: pytest.MonkeyPatch) -> None:
    """One device, one process, rank 0, and reductions that return a copy."""
    assert not distributed.init_distributed_mode()
    args = argparse.Namespace()
    assert not distributed.init_distributed_mode(args)
    assert vars(args) == {"distributed": False}
    assert distributed.reduce(3.0, "mean") == 3.0
    assert distributed.num_visible_devices() == distributed.world_size() == 1
    assert distributed.rank() == distributed.local_rank() == 0
    assert distributed.is_main_process()
    assert distributed.device() == torch.device("cpu")
    x = torch.tensor([1.0, 2.0])
    for reduction in ("mean", "sum"):
        result = distributed.reduce(x, reduction)
        assert torch.equal(result, x)
        assert result.data_ptr() != x.data_ptr()


def test_the_local_rank_chooses_the_device(alone: pytest.MonkeyPatch) -> None:
    """More processes than devices are an error that says what to change."""
    pretend_cuda(alone, (9, 0))
    alone.setenv("LOCAL_RANK", "1")
    assert distributed.device() == torch.device("cuda", 1)
    assert distributed.num_visible_devices() == 2
    alone.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="LOCAL_RANK = 2, but only 2 CUDA devices are visible; start fewer"):
        distributed.device()


def test_what_cannot_be_is_one_clear_error(alone: pytest.MonkeyPatch) -> None:
    """Unknown reductions, half of torchrun's environment, and no numbers in it."""
    with pytest.raises(ConfigError, match=r"'avg' is unknown; known: mean, sum\."):
        distributed.reduce(torch.zeros(1), "avg")
    alone.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="WORLD_SIZE, LOCAL_RANK isn't set"):
        distributed.init_distributed_mode()
    alone.setenv("LOCAL_RANK", "one")
    with pytest.raises(ConfigError, match="LOCAL_RANK = 'one' in the environment isn't a number"):
        distributed.local_rank()


def test_two_processes_reduce() -> None:
    """With torchrun's environment both join one gloo group, and both hold sums and means."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common_env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS],
            env={**os.environ, **common_env, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        for process in processes:
            out, err = process.communicate(timeout=120)
            assert out.strip() == "fine", err
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_the_packages_face() -> None:
    """__all__ is sorted and complete, and submodules are reached as the authors' are."""
    assert sorted(misc.__all__) == misc.__all__
    assert all(hasattr(misc, name) for name in misc.__all__)
    assert misc.merge.MergeCondition is misc.MergeCondition
    assert misc.position.PositionalEncoding is misc.PositionalEncoding
    assert misc.attention.MultiheadAttention is misc.MultiheadAttention


def test_ray_is_not_imported() -> None:
    """Importing the package loads torch alone."""
    code = "import sys, lte_ray.misc; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
