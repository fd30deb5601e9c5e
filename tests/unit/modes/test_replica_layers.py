"""Replica layers: copies that each compute their part of the batch, and their mean."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lte_ray import LTEError, MultiheadReplicaLayer, ReplicaLayer, prepare_model_for_lte
from tests.support.mode_models import (
    HEADS,
    LTE,
    UNIFORM,
    ModelCase,
    assert_like_heads,
    perturb,
    prepare,
    train_heads,
    train_mode,
)
from tests.support.numerics import assert_near

WIDTH = 4


@dataclasses.dataclass
class Record:
    """An output of a class of the user's own."""

    value: Tensor
    note: str


class Outputs(nn.Module):
    """Computes with an input, a second input, and a scale, and returns the kind of output that is asked for."""

    def __init__(self, kind: str = "tensor") -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, other: Any = None, *, scale: float = 1.0, table: Tensor | None = None) -> Any:
        y = self.linear(x) * scale
        if other is not None:
            y = y + other["more"][0]
        if table is not None:
            y = y + table.sum()
        if self.kind == "tuple":
            return y, (y.mean(), None), [2 * y]
        if self.kind == "dict":
            return {"y": y, "loss": y.mean(), "name": "mine"}
        if self.kind == "dataclass":
            return Record(y, "note")
        if self.kind == "model-output":
            from transformers.modeling_outputs import CausalLMOutput

            return CausalLMOutput(loss=y.mean(), logits=y)
        return y

    def double_of(self, x: Tensor) -> Tensor:
        y: Tensor = 2 * self.linear(x)
        return y


def replicas(kind: str = "tensor") -> MultiheadReplicaLayer:
    torch.manual_seed(0)
    layer = perturb(MultiheadReplicaLayer(Outputs(kind).double(), HEADS))
    assert isinstance(layer, MultiheadReplicaLayer)
    return layer


def inputs(samples: int = 4) -> Tensor:
    return torch.randn(samples, WIDTH, generator=torch.Generator().manual_seed(2)).double()


def outputs_by_head(layer: MultiheadReplicaLayer, x: Tensor) -> list[Any]:
    return [replica(part) for replica, part in zip(layer.replicas, x.chunk(HEADS), strict=True)]


def test_each_copy_computes_its_part_of_the_batch() -> None:
    """Outputs are concatenated; a copy's gradient comes from its own samples alone."""
    layer, x = replicas(), inputs()
    y = layer(x)
    assert torch.equal(y, torch.cat(outputs_by_head(layer, x)))
    y[: len(x) // HEADS].sum().backward()
    assert layer.replicas[0].linear.weight.grad.any()
    assert not layer.replicas[1].linear.weight.grad.any()
    assert layer.main.linear.weight.grad is None


def test_arguments_are_cut_in_any_nesting() -> None:
    """Positional, keyword, in dicts and tuples. Numbers, and tensors with another first dimension, go to every copy."""
    layer, x, more, table = replicas(), inputs(), inputs()[:, :3], torch.ones(3).double()
    y = layer(x, {"more": (more,)}, scale=2.0, table=table)
    parts = zip(layer.replicas, x.chunk(HEADS), more.chunk(HEADS), strict=True)
    assert torch.equal(y, torch.cat([2.0 * r.linear(part) + m + table.sum() for r, part, m in parts]))
    assert torch.equal(layer(x=x), layer(x))


def test_outputs_are_joined_in_any_nesting() -> None:
    """Tuples, lists, dicts, dataclasses, and None. Tensors without a dimension are averaged, as mean losses must be."""
    x = inputs()
    first, (mean, none), (twice,) = (layer := replicas("tuple"))(x)
    expected = outputs_by_head(layer, x)
    assert torch.equal(first, torch.cat([e[0] for e in expected]))
    assert none is None
    assert torch.equal(twice, 2 * first)
    assert_near(mean, first.mean(), 1e-15)
    named = replicas("dict")(x)
    assert torch.equal(named["y"], first)
    assert named["name"] == "mine"
    record = replicas("dataclass")(x)
    assert isinstance(record, Record)
    assert torch.equal(record.value, first)
    assert record.note == "note"


def test_outputs_of_transformers_are_joined() -> None:
    """A ModelOutput stays one, with its attributes and the mean of the heads' losses."""
    pytest.importorskip("transformers")
    layer, x = replicas("model-output"), inputs()
    y = layer(x)
    assert type(y) is type(outputs_by_head(layer, x)[0])
    assert torch.equal(y.logits, replicas()(x))
    assert_near(y.loss, y.logits.mean(), 1e-15)
    assert y.hidden_states is None


def test_the_authors_evaluated_copy_0() -> None:
    """Evaluation uses the merged module, which only merges change; a merge sets it and all copies to the copies' mean."""
    layer, x = replicas(), inputs(3)
    torch.manual_seed(0)
    original = Outputs().double()
    assert torch.equal(layer.eval()(x), original(x))
    mean = torch.stack([r.linear.weight for r in layer.replicas]).mean(0)
    layer.merge_parameters()
    for module in (layer.main, *layer.replicas):
        assert torch.equal(module.linear.weight, mean)
    assert not torch.equal(layer.eval()(x), original(x))
    assert torch.equal(layer(x), layer.main(x))
    assert layer(x[0]).shape == (3,)


def test_running_statistics_are_each_copys_own_until_a_merge() -> None:
    """Each copy's batch norm statistics are those of its data; a merge averages them and keeps the count of batches."""
    layer = MultiheadReplicaLayer(nn.BatchNorm1d(WIDTH).double(), HEADS)
    alone = [nn.BatchNorm1d(WIDTH).double() for _ in range(HEADS)]
    x = inputs(8)
    y = layer(x)
    assert_near(y, torch.cat([norm(part) for norm, part in zip(alone, x.chunk(HEADS), strict=True)]), 1e-15)
    assert not torch.equal(layer.replicas[0].running_mean, layer.replicas[1].running_mean)
    assert not layer.main.running_mean.any()
    layer.merge_parameters()
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(norm, name) for norm in alone]).mean(0)
        assert all(torch.equal(getattr(norm, name), mean) for norm in (layer.main, *layer.replicas))
    assert int(layer.main.num_batches_tracked) == 1


def test_attributes_are_the_merged_modules() -> None:
    """Attributes that the layer lacks are the merged module's; if both lack one, it is an ordinary AttributeError."""
    layer = replicas()
    assert layer.kind == "tensor"
    assert layer.linear is layer.main.linear
    assert layer.linear.in_features == WIDTH
    assert torch.equal(layer.double_of(inputs()), 2 * layer.main(inputs()))
    assert not hasattr(layer, "nothing")
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing
    assert isinstance(copy.deepcopy(layer), ReplicaLayer)


def test_norms_become_replica_layers() -> None:
    """A norm becomes a MultiheadReplicaLayer that shows the merged norm's attributes; every copy gets a gradient."""
    torch.manual_seed(0)
    model = prepare_model_for_lte(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), UNIFORM)
    norm = model[1]
    assert isinstance(norm, MultiheadReplicaLayer)
    assert norm.normalized_shape == (4,)
    assert norm.weight is norm.main.weight
    assert len(norm.replicas) == HEADS
    model(torch.randn(2, 4)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_batch_that_copies_cannot_split() -> None:
    """The error names batch and heads; an input without any tensor can't be split."""
    layer = replicas()
    with pytest.raises(ValueError, match=r"batch of 3 can't be split over 2 heads"):
        layer(inputs(3))
    with pytest.raises(LTEError, match="no tensor with a batch dimension"):
        layer(1.0)


class Recurrent(nn.Module):
    """An LSTM with given initial states, whose last hidden state counts too."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.lstm = nn.LSTM(WIDTH, 3, num_layers=2, bidirectional=True, batch_first=batch_first)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) if self.lstm.batch_first else self.first(x).transpose(0, 1)
        time = 1 if self.lstm.batch_first else 0
        start = x.mean(time)[:, :3].expand(4, -1, -1)
        y, (h, c) = self.lstm(x, (start.contiguous(), 2 * start))
        z: Tensor = self.head(y.mean(time)) + h[-1] * c[0]
        return z


@pytest.mark.filterwarnings("ignore:.*batch_first=False")
@pytest.mark.parametrize("batch_first", [True, False])
def test_states_of_recurrent_layers_are_split_along_the_batch(batch_first: bool) -> None:
    """States are (layers, batch, width). With batch_first=True both chunks train what Ray heads do.

    With batch_first=False chunk="model" does, and chunk="layer" is an error that says so.
    """
    case = ModelCase(lambda: Recurrent(batch_first), (4, WIDTH))
    expected, x = train_heads(case, LTE), case.batch(0)[0]
    assert_like_heads(train_mode(case, LTE, "ddp", "model"), expected, x)
    if batch_first:
        assert_like_heads(train_mode(case, LTE, "dmp", "layer"), expected, x)
    else:
        with pytest.raises(LTEError, match=r"lstm got .* batch_first=False: .*chunk='model'"):
            prepare(case, "ddp")(x)


def test_recurrent_layers_split_batches_only() -> None:
    """Outputs and states equal each copy's on its part; keywords work; one sequence alone, or packed ones, are an error."""
    torch.manual_seed(0)
    for kind in (nn.GRU, nn.RNN):
        layer = perturb(MultiheadReplicaLayer(kind(WIDTH, 3, num_layers=2, batch_first=True).double(), HEADS))
        x, start = torch.randn(4, 5, WIDTH).double(), torch.randn(2, 4, 3).double()
        parts = [r(part, s) for r, part, s in zip(layer.replicas, x.chunk(2), start.chunk(2, 1), strict=True)]
        for y, states in (layer(x, start), layer(hx=start, input=x)):
            assert_near(y, torch.cat([part[0] for part in parts]), 1e-15)
            assert_near(states, torch.cat([part[1] for part in parts], 1), 1e-15)
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 4, 3, 2]), batch_first=True)
        for wrong in (x[0], packed):
            with pytest.raises(LTEError, match=r"chunk='model'"):
                layer(wrong)
            layer.eval()(wrong)
            layer.train()
