"""dmp over several devices: everything that a head computes with is on the head's device, and stays there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lte_ray import LTEConfig, MultiheadReplicaLayer, prepare_model_for_lte
from lte_ray.misc import MergeCondition
from lte_ray.modes import dmp, merged_state_dict, replica
from tests.support.mode_models import HEADS, SEED, ModelCase, adam, device_types, head_device_on_meta, loss
from tests.support.numerics import assert_near

WIDTH = 4
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_statistics_of_adapted_norms_are_on_their_heads_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """dmp over two devices: everything that a head computes with is on its device, also if the model is moved later."""

    def prepare_norm() -> nn.Module:
        lte = LTEConfig(num_heads=2, lora_r=2, lora_bias="lora", adapt=("linear", "norm"))
        return prepare_model_for_lte(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), lte, mode="dmp", strict=False)

    prepared_first = prepare_norm()
    monkeypatch.setattr(dmp, "head_device", head_device_on_meta)
    for model in (prepare_norm(), prepared_first.float()):
        for layer in model:
            for parts in (layer.layers, layer.lora_A, layer.lora_B):
                assert [device_types(part) for part in parts] == [{"cpu"}, {"meta"}]
            assert layer.weight.device.type == "cpu"
        norm = model[1]
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert [getattr(norm, f"{name}{end}").device.type for end in ("", "_head0", "_head1")] == ["cpu", "cpu", "meta"]


def partly_frozen() -> nn.Module:
    """A linear layer, three of which two share a frozen weight, and two batch norms, of which one has no parameters."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3))))
    model[1][0].requires_grad_(False)
    model[1][2].weight = model[1][0].weight
    return nn.Sequential(*model, nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH, affine=False)).double()


def prepare_spread(model: nn.Module) -> nn.Module:
    model[2].requires_grad_(False)
    lte = LTEConfig(num_heads=HEADS, lora_r=2, lora_bias="frozen")
    return prepare_model_for_lte(model, lte, mode="dmp", replica_layers=["1"], seed=SEED)


def test_copies_and_all_their_tensors_are_on_their_heads_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """dmp over two devices: frozen parameters and statistics too, also if the model is moved after preparing."""
    prepared_first = prepare_spread(partly_frozen())
    monkeypatch.setattr(replica, "head_device", head_device_on_meta)
    for model in (prepare_spread(partly_frozen()), prepared_first.double()):
        for layer in list(model)[1:]:
            assert isinstance(layer, MultiheadReplicaLayer)
            assert device_types(layer.main) == device_types(layer.replicas[0]) == {"cpu"}
            assert device_types(layer.replicas[1]) == {"meta"}
        assert model[1].replicas[1][2].weight is model[1].replicas[1][0].weight
        assert not model[1].replicas[1][0].weight.requires_grad


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("move_later", [True, False])
def test_statistics_and_frozen_copies_over_all_visible_gpus(move_later: bool) -> None:
    """dmp trains what it does on a CPU, moved before or after preparing; every copy stays on its device."""
    states = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = prepare_spread(partly_frozen()).to(device) if move_later else prepare_spread(partly_frozen().to(device))
        optimizer = adam(model.parameters())
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            optimizer.zero_grad()
            model(torch.randn(8, WIDTH, generator=generator).double().to(device)).sin().sum().backward()
            optimizer.step()
            MergeCondition(model).merge()
        states.append(merged_state_dict(model))
    for name, value in states[0].items():
        # 1e-8: float64 sums in another order, which Adam makes grow; other arithmetic is off by 1e-3 and more.
        assert_near(states[1][name].cpu(), value, 1e-8)
    for layer in list(model)[1:]:
        for head, copy_ in enumerate(layer.replicas):
            assert {t.device.index for t in (*copy_.parameters(), *copy_.buffers())} == {head % torch.cuda.device_count()}
    assert model[1].replicas[1][2].weight is model[1].replicas[1][0].weight


class Pictures(nn.Module):
    """Convolution, a class token, attention, a norm, and an output layer that trains as a replica."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.token = nn.Conv2d(3, 8, 4, stride=4), nn.Parameter(torch.randn(1, 1, 8))
        self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.out = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        y: Tensor = self.out(self.norm(x + self.attention(x, x, x)[0])[:, 0])
        return y


def train_ddp_and_dmp(device: str, chunk: str, heads: int = 4) -> list[nn.Module]:
    """Trains ddp and dmp on the same batches with three merges, and asserts that both give the same model."""
    case = ModelCase(Pictures, (3, 8, 8))
    models = []
    for mode in ("ddp", "dmp"):
        model = prepare_model_for_lte(
            case.build().to(device),
            LTEConfig(num_heads=heads, lora_r=2, lora_alpha=4.0),
            mode=mode,
            chunk=chunk,
            replica_layers=["out", "token"],
            seed=SEED,
        )
        optimizer, merges = adam(model.parameters()), MergeCondition(model, 3)
        for step in range(10):
            x, target = case.batch(step, 4 * heads)
            optimizer.zero_grad()
            loss(model(x.to(device)), target.to(device)).backward()
            optimizer.step()
            merges.step()
        models.append(model)
    ddp_state, dmp_state = (merged_state_dict(m) for m in models)
    for name, value in ddp_state.items():
        # 1e-8: float64 sums in another order, which Adam makes grow; other arithmetic is off by 1e-3 and more.
        assert_near(dmp_state[name].cpu(), value.cpu(), 1e-8)
    x = case.batch(0, heads)[0].to(device)
    assert_near(models[1](x).cpu(), models[0](x).cpu(), 1e-8)
    assert_near(models[1].eval()(x).cpu(), models[0].eval()(x).cpu(), 1e-8)
    return models


@pytest.mark.slow
@pytest.mark.parametrize("chunk", ["layer", "model"])
def test_ddp_is_dmp_on_a_cpu(chunk: str) -> None:
    """Convolution, attention, a lone parameter, and a replica. Slow: both modes are compared with Ray heads elsewhere."""
    train_ddp_and_dmp("cpu", chunk)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("chunk", ["layer", "model"])
def test_ddp_is_dmp_over_all_visible_gpus(chunk: str) -> None:
    """The same with dmp's copies and replicas spread round robin over the devices, where they stay."""
    _, model = train_ddp_and_dmp("cuda", chunk)
    count = torch.cuda.device_count()
    for copies in (model.conv.layers, model.conv.lora_A, model.conv.lora_B, model.out.replicas):
        for head, part in enumerate(copies):
            assert {p.device.index for p in part.parameters()} == {head % count}
