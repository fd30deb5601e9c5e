"""Number types and devices, one process, and the names of the package. (Several processes: modes/test_torchrun.)"""

from __future__ import annotations

import argparse

import pytest
import torch
from torch import nn

from lte_ray import misc
from lte_ray.errors import ConfigError
from lte_ray.misc import common, distributed


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
    """The context computes in bfloat16 each time it is entered; parameters stay float32; the scaler doesn't scale."""
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
    """bfloat16 and flash attention on Ampere and later, float16 before."""
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
    """The scaler scales on CUDA devices before Ampere."""
    alone.setattr(torch.version, "hip", None)
    alone.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    for capability, enabled in (((7, 5), True), ((8, 0), False)):
        pretend_cuda(alone, capability)
        dtype, _, scaler = common.determine_compute_context()
        assert (dtype, scaler.is_enabled()) == (torch.float32, enabled)


def test_autocast_vars_casts_where_autocast_is_on() -> None:
    """Only floating-point tensors are cast; one argument gives one tensor."""
    x, y = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    assert common.autocast_vars(x) is x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [t.dtype for t in common.autocast_vars(x, y)] == [torch.bfloat16, torch.int64]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_real_gpu() -> None:
    """The context computes in auto_dtype, and the scaler steps the optimizer."""
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
    """One device, one process, rank 0; reductions return a copy."""
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


def test_wrong_settings_are_one_clear_error(alone: pytest.MonkeyPatch) -> None:
    """An unknown reduction, part of torchrun's environment, and a rank that isn't a number."""
    with pytest.raises(ConfigError, match=r"'avg' is unknown; known: mean, sum\."):
        distributed.reduce(torch.zeros(1), "avg")
    alone.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="WORLD_SIZE, LOCAL_RANK isn't set"):
        distributed.init_distributed_mode()
    alone.setenv("LOCAL_RANK", "one")
    with pytest.raises(ConfigError, match="LOCAL_RANK = 'one' in the environment isn't a number"):
        distributed.local_rank()


def test_names_of_the_package() -> None:
    """__all__ is sorted and complete, and submodules are attributes, as in the authors' package."""
    assert sorted(misc.__all__) == misc.__all__
    assert all(hasattr(misc, name) for name in misc.__all__)
    assert misc.merge.MergeCondition is misc.MergeCondition
    assert misc.position.PositionalEncoding is misc.PositionalEncoding
    assert misc.attention.MultiheadAttention is misc.MultiheadAttention
