"""Loops over heads: lone parameters that train as replicas, and models that run once for each head (chunk="model")."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lte_ray import LTELayer, ReplicaLayer, prepare_model_for_lte
from lte_ray.errors import LTEError
from lte_ray.misc import MergeCondition
from lte_ray.modes import merged_state_dict
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

WIDTH = 4


class Block(nn.Module):
    """Layer scale, and parameters in a list and in a dict, around an adapted layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_scale = nn.Parameter(torch.full((WIDTH,), 0.5))
        self.shifts = nn.ParameterList([nn.Parameter(torch.randn(WIDTH)) for _ in range(2)])
        self.named = nn.ParameterDict({"a": nn.Parameter(torch.randn(WIDTH))})
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *, scale: float) -> Tensor:
        return x + self.layer_scale * self.linear(self.norm(x) + self.shifts[1] + self.named["a"] * self.shifts[0]) * scale


class ViT(nn.Module):
    """Class token and positions at the top (if `lone`), and blocks with lone parameters, one of which is called twice."""

    def __init__(self, lone: bool = True) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.randn(1, 1, WIDTH)) if lone else None
        self.positions = nn.Parameter(torch.randn(1, 4, WIDTH)) if lone else None
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in (*self.blocks, self.blocks[0]):
            x = block(x, scale=0.7)
        y: Tensor = self.head(x[:, 0])
        return y


class UsesPartsParameters(nn.Module):
    """Calls a part, and also uses its parameters: a single one and one in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, scale=0.5) * self.block.layer_scale + self.block.shifts[0]


class SequenceFirst(nn.Module):
    """nn.TransformerEncoder with batch_first=False inside a batch-first model."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, norm_first=True), 2, enable_nested_tensor=False
        )
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(x.transpose(0, 1))[0])
        return y


class Collision(nn.Module):
    """Parameters whose copies would have the same names: a.b, a_b, and one named as a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.a = nn.ParameterDict({"b": nn.Parameter(torch.full((WIDTH,), 2.0))})
        self.a_b = nn.Parameter(torch.full((WIDTH,), 5.0))
        self.a_b_head0 = nn.Parameter(torch.full((WIDTH,), 7.0))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) * self.a["b"] * self.a_b * self.a_b_head0
        return y


VIT, BLOCKS = ModelCase(ViT, (3, WIDTH)), ModelCase(lambda: ViT(lone=False), (3, WIDTH))


@pytest.mark.parametrize("kind", ["vit", "blocks"])
def test_lone_parameters_train_as_heads_own(kind: str) -> None:
    """Class token, positions, layer scales, lists and dicts of parameters, in loops at the top ("vit") or nested ("blocks").

    Blocks are called twice and with keywords. Both chunks train what Ray heads do.
    """
    case, model_mode = {"vit": (VIT, "ddp"), "blocks": (BLOCKS, "dmp")}[kind]
    expected, x = train_heads(case, LTE), case.batch(0)[0]
    for mode, chunk in (("ddp", "layer"), ("dmp", "layer"), (model_mode, "model")):
        assert_like_heads(train_mode(case, LTE, mode, chunk), expected, x)


def test_lone_parameters_are_the_heads_own_for_modules_above() -> None:
    """In a loop at the top, a module that uses a parameter of a part gets the head's copy; without one it is an error."""
    case = ModelCase(UsesPartsParameters, (3, WIDTH))
    expected, x = train_heads(case, LTE), case.batch(0)[0]
    for mode in ("ddp", "dmp"):
        assert_like_heads(train_mode(case, LTE, mode, "model"), expected, x)
    with pytest.raises(LTEError, match=r"block\.layer_scale is used .*chunk='model'"):
        prepare(case, "ddp")(x)


def test_names_of_copies_do_not_collide() -> None:
    """Each parameter has copies of its own, which train as the Ray heads' do."""
    case = ModelCase(Collision, (WIDTH,))
    expected = train_heads(case, LTE)
    for mode in ("ddp", "dmp"):
        assert_like_heads(train_mode(case, LTE, mode), expected, case.batch(0)[0])


def test_a_merge_loop_over_replica_layers_reaches_lone_parameters() -> None:
    """The authors' merge loop, which uses isinstance, merges everything that trains as replicas."""
    model = perturb(prepare(VIT, "ddp", UNIFORM))
    other = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, (LTELayer, ReplicaLayer)):
            module.merge_parameters()
    MergeCondition(other).merge()
    merged, expected = merged_state_dict(model), merged_state_dict(other)
    assert set(merged) == set(ViT().state_dict())
    assert all(torch.equal(merged[name], value) for name, value in expected.items())
    mean = torch.stack([p for name, p in model.named_parameters() if name.startswith("class_token_head")]).mean(0)
    assert torch.equal(model.class_token, mean)


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
def test_models_that_are_not_batch_first_inside() -> None:
    """chunk="layer" warns of nn.TransformerEncoder(batch_first=False); chunk="model" trains what Ray heads do."""
    case = ModelCase(SequenceFirst, (3, WIDTH))
    expected = train_heads(case, LTE)
    for mode in ("ddp", "dmp"):
        assert_like_heads(train_mode(case, LTE, mode, "model"), expected, case.batch(0)[0])
    with pytest.warns(UserWarning, match=r"batch_first=False.*chunk='model'"):
        prepare_model_for_lte(case.build(), UNIFORM, strict=False)


class RowsAsSequence(nn.Module):
    """Attends over the rows of its input, or of each sample of a batch, one after another; `recurrent` by an LSTM."""

    def __init__(self, recurrent: bool) -> None:
        super().__init__()
        self.recurrent, self.up = recurrent, nn.Linear(WIDTH, WIDTH)
        self.mix = nn.LSTM(WIDTH, WIDTH, batch_first=True) if recurrent else nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 3:
            return torch.stack([self.forward(sample) for sample in x])
        x = self.up(x)
        output: Tensor = (self.mix(x) if self.recurrent else self.mix(x, x, x))[0]
        return output


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
@pytest.mark.parametrize("recurrent", [False, True])
def test_one_sequence_without_a_batch_is_not_cut_over_heads(recurrent: bool) -> None:
    """With chunk="model" in training, as the model's input or as its layer's; samples of a batch one by one are fine."""
    model = prepare_model_for_lte(RowsAsSequence(recurrent), UNIFORM, strict=False, chunk="model")
    x = torch.randn(2 * HEADS, WIDTH)
    with pytest.raises(LTEError, match=rf"mix.* got an input of shape \(2, {WIDTH}\): one sequence, .* Give the model a batch"):
        copy.deepcopy(model)(x)
    assert model.eval()(x).shape == x.shape
    model.train()
    assert model(torch.randn(2 * HEADS, 2, WIDTH)).shape == (2 * HEADS, 2, WIDTH)
    if not recurrent:
        root = prepare_model_for_lte(nn.MultiheadAttention(WIDTH, 2, batch_first=True), UNIFORM, chunk="model")
        with pytest.raises(LTEError, match="The model got an input"):
            root(query=x, key=x, value=x)
        assert root(*[x.unsqueeze(1)] * 3)[0].shape == (2 * HEADS, 1, WIDTH)
