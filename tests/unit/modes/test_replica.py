"""What trains as copies: replica layers, lone parameters through loops over heads, and weights used without a call."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tests.unit.modes.test_equal as equal
from lte_ray import LTEConfig, LTEError, LTELayer, MultiheadReplicaLayer, ReplicaLayer, prepare_model_for_lte
from lte_ray.misc import MergeCondition
from lte_ray.modes import merged_state_dict, replica
from tests.support.helpers import assert_near
from tests.unit.modes.test_equal import HEADS, LTE, SEED, batch, build, loss, train_heads, train_mode
from tests.unit.modes.test_layers import devices, on_meta
from workers.gpt import GPT

PLAIN = LTEConfig(num_heads=HEADS, lora_r=2, lora_alpha=4.0)
LINEAR = dataclasses.replace(LTE, adapt=("linear",))
WIDTH = 4


@dataclasses.dataclass
class Record:
    """An output of a kind of its own."""

    value: Tensor
    note: str


class Outputs(nn.Module):
    """Returns whatever is asked for, of x, a second input and a scale."""

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


@torch.no_grad()
def unlike(layer: nn.Module) -> nn.Module:
    """Adds noise to all copies, so that they differ from each other and from the merged ones."""
    generator = torch.Generator().manual_seed(1)
    for p in layer.parameters():
        if p.requires_grad:
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return layer


def replicas(kind: str = "tensor") -> MultiheadReplicaLayer:
    torch.manual_seed(0)
    made = unlike(MultiheadReplicaLayer(Outputs(kind).double(), HEADS))
    assert isinstance(made, MultiheadReplicaLayer)
    return made


def inputs(samples: int = 4) -> Tensor:
    return torch.randn(samples, WIDTH, generator=torch.Generator().manual_seed(2)).double()


def heads_outputs(layer: MultiheadReplicaLayer, x: Tensor) -> list[Any]:
    return [replica(part) for replica, part in zip(layer.replicas, x.chunk(HEADS), strict=True)]


def test_each_copy_computes_its_part_of_the_batch() -> None:
    """Outputs are laid end to end; gradients of a copy come from its own samples alone."""
    layer, x = replicas(), inputs()
    y = layer(x)
    assert torch.equal(y, torch.cat(heads_outputs(layer, x)))
    y[: len(x) // HEADS].sum().backward()
    assert layer.replicas[0].linear.weight.grad.any()
    assert not layer.replicas[1].linear.weight.grad.any()
    assert layer.main.linear.weight.grad is None


def test_arguments_are_cut_in_any_nesting() -> None:
    """Positional, by keyword, in dicts and tuples; tensors of another first dimension and numbers go to every copy whole."""
    layer, x, more, table = replicas(), inputs(), inputs()[:, :3], torch.ones(3).double()
    y = layer(x, {"more": (more,)}, scale=2.0, table=table)
    parts = zip(layer.replicas, x.chunk(HEADS), more.chunk(HEADS), strict=True)
    assert torch.equal(y, torch.cat([2.0 * r.linear(own) + m + table.sum() for r, own, m in parts]))
    assert torch.equal(layer(x=x), layer(x))


def test_outputs_are_joined_in_any_nesting() -> None:
    """Tuples, lists, dicts, dataclasses, None; numbers without a dimension are averaged, as a mean loss is."""
    x = inputs()
    first, (mean, none), (twice,) = (layer := replicas("tuple"))(x)
    expected = heads_outputs(layer, x)
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
    assert type(y) is type(heads_outputs(layer, x)[0])
    assert torch.equal(y.logits, replicas()(x))
    assert_near(y.loss, y.logits.mean(), 1e-15)
    assert y.hidden_states is None


def test_the_authors_evaluated_copy_0() -> None:
    """Evaluation uses the merged module, which changes at merges only; a merge is the mean, in every copy."""
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
    """Batch norm: each copy's statistics are those of its data; a merge averages them and keeps the count of batches."""
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
    """Whatever the layer lacks itself is looked up there; what neither has is an ordinary AttributeError."""
    layer = replicas()
    assert layer.kind == "tensor"
    assert layer.linear is layer.main.linear
    assert layer.linear.in_features == WIDTH
    assert torch.equal(layer.double_of(inputs()), 2 * layer.main(inputs()))
    assert not hasattr(layer, "nothing")
    with pytest.raises(AttributeError, match="nothing"):
        _ = layer.nothing
    assert isinstance(copy.deepcopy(layer), ReplicaLayer)


def test_a_batch_that_copies_cannot_share() -> None:
    """The error names batch and heads; without any tensor there is nothing to share."""
    layer = replicas()
    with pytest.raises(ValueError, match=r"batch of 3 can't be split over 2 heads"):
        layer(inputs(3))
    with pytest.raises(LTEError, match="no tensor with a batch dimension"):
        layer(1.0)


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
    """Class token and positions at the top (unless `lone` is False), blocks with parameters of their own, one called twice."""

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


class Encoder(nn.Module):
    """nn.TransformerEncoder with batch_first=False inside of a batch-first model."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, norm_first=True), 2, enable_nested_tensor=False
        )
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.encoder(x.transpose(0, 1))[0])
        return y


class Words(nn.Module):
    """Positions, tied logits and a layer, each used by its weight (`direct`) or called."""

    def __init__(self, direct: bool) -> None:
        super().__init__()
        self.direct = direct
        self.tokens, self.positions = nn.Embedding(7, WIDTH), nn.Embedding(5, WIDTH)
        self.mid = nn.Linear(WIDTH, WIDTH)
        self.logits = None if direct else nn.Linear(WIDTH, 7, bias=False)
        if self.logits is not None:
            self.logits.weight = self.tokens.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.tokens(words)
        if self.logits is not None:
            x = torch.tanh(self.mid(x + self.positions(torch.arange(words.shape[1]))))
            return self.logits(self.mid(x))  # type: ignore[no-any-return]
        x = torch.tanh(self.mid(x + self.positions.weight[: words.shape[1]]))
        x = F.linear(x.to(self.mid.weight.dtype), self.mid.weight, self.mid.bias)
        return F.linear(x, self.tokens.weight)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    """This file's models among those of test_modes_equal, and fewer steps."""
    monkeypatch.setattr(equal, "STEPS", 20)
    mine: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "vit": (ViT, (3, WIDTH)),
        "blocks": (lambda: ViT(lone=False), (3, WIDTH)),
        "above": (Above, (3, WIDTH)),
        "encoder": (Encoder, (3, WIDTH)),
        "called": (lambda: Words(direct=False), (3,)),
        "direct": (lambda: Words(direct=True), (3,)),
    }
    for name, value in mine.items():
        monkeypatch.setitem(equal.MODELS, name, value)
    monkeypatch.setattr(equal, "WORDS", (*equal.WORDS, "called", "direct"))


def assert_like_heads(model: nn.Module, expected: tuple[dict[str, Tensor], list[nn.Module]], x: Tensor) -> None:
    """Merged weights are those of Ray heads that trained alike, and so are all outputs in training."""
    base, heads = expected
    state = merged_state_dict(model)
    # 1e-9: float64 rounding, which the steps of Adam make grow; other arithmetic is off by 1e-3 and more.
    for name, value in base.items():
        assert_near(state[name], value, 1e-9)
    assert_near(model(x), torch.cat([head(own) for head, own in zip(heads, x.chunk(HEADS), strict=True)]), 1e-9)


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
@pytest.mark.parametrize("chunk", ["layer", "model"])
@pytest.mark.parametrize("kind", ["vit", "blocks"])
def test_lone_parameters_train_as_heads_own(models: None, kind: str, chunk: str) -> None:
    """Class token, positions, layer scales, lists and dicts of parameters, in loops at the top or nested, a block called
    twice, keywords: 20 steps and 4 merges equal the Ray heads'.
    """
    expected = train_heads(kind, LTE)
    for mode in ("ddp", "dmp"):
        assert_like_heads(train_mode(kind, LTE, mode, chunk), expected, batch(kind, 0)[0])


class Above(nn.Module):
    """Uses parameters of a part, single and in a list, beside calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, scale=0.5) * self.block.layer_scale + self.block.shifts[0]


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
def test_lone_parameters_are_the_heads_own_for_modules_above(models: None) -> None:
    """In a loop at the top, whoever uses a parameter that a module below owns gets the head's copy."""
    expected = train_heads("above", LTE)
    for mode in ("ddp", "dmp"):
        assert_like_heads(train_mode("above", LTE, mode, "model"), expected, batch("above", 0)[0])
    with pytest.raises(LTEError, match=r"block\.layer_scale is used .*chunk='model'"):
        train_mode("above", LTE, "ddp")


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
def test_a_loop_over_replica_layers_merges_lone_parameters(models: None) -> None:
    """The authors' own merge loop, by isinstance, reaches whatever trains as copies."""
    torch.manual_seed(0)
    model = unlike(prepare_model_for_lte(ViT(), PLAIN, strict=False))
    other = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, (LTELayer, ReplicaLayer)):
            module.merge_parameters()
    MergeCondition(other).merge()
    merged, expected, start = merged_state_dict(model), merged_state_dict(other), ViT().state_dict()
    assert set(merged) == set(start)
    assert all(torch.equal(merged[name], value) for name, value in expected.items())
    mean = torch.stack([p for name, p in model.named_parameters() if name.startswith("class_token_head")]).mean(0)
    assert torch.equal(model.class_token, mean)


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
def test_models_that_are_not_batch_first_inside(models: None) -> None:
    """nn.TransformerEncoder(batch_first=False): chunk="layer" warns of it, chunk="model" trains what the Ray heads do."""
    expected = train_heads("encoder", LTE)
    for mode in ("ddp", "dmp"):
        assert_like_heads(train_mode("encoder", LTE, mode, "model"), expected, batch("encoder", 0)[0])
        with pytest.warns(UserWarning, match=r"batch_first=False.*chunk='model'"):
            prepare_model_for_lte(build("encoder"), PLAIN, mode=mode, strict=False)


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
@pytest.mark.parametrize("lte", [LINEAR, LTE], ids=["replicas", "adapted"])
def test_weights_used_without_a_call_train_with_chunk_model(models: None, lte: LTEConfig) -> None:
    """positions.weight[:t], mid.weight and the tied tokens.weight are each head's own, as where these layers are called."""
    called = lte if lte is LTE else dataclasses.replace(lte, exclude=("logits",))
    expected, x = train_heads("called", called), batch("called", 0)[0]
    for mode in ("ddp", "dmp"):
        model = train_mode("direct", lte, mode, "model")
        assert_like_heads(model, expected, x)
        assert_near(model.eval()(x), evaluated(model, x), 1e-13)


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    original = build("direct")
    original.load_state_dict(merged_state_dict(model))
    y: Tensor = original.eval()(x)
    return y


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
def test_weights_used_without_a_call_in_mhlora(models: None) -> None:
    """They hold the heads' sum, in training and in evaluation."""
    model = train_mode("direct", LTE, "mhlora")
    x, _ = batch("direct", 0)
    assert_near(model(x), evaluated(model, x), 1e-13)
    assert_near(model.eval()(x), evaluated(model, x), 1e-13)


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
@pytest.mark.parametrize("mode", ["ddp", "dmp"])
@pytest.mark.parametrize(
    ("lte", "named", "culprit"),
    [(LINEAR, ["tokens", "positions"], "positions.weight"), (LINEAR, [], "positions.weight"), (LTE, [], "positions.weight")],
    ids=["replica-layers", "left-over", "adapted"],
)
def test_weights_used_without_a_call_are_an_error_with_chunk_layer(
    models: None, lte: LTEConfig, named: list[str], culprit: str, mode: str
) -> None:
    """In training the first use raises, naming the parameter and chunk='model'; evaluation works; so does a look at it."""
    model = prepare_model_for_lte(build("direct"), lte, mode=mode, strict=False, replica_layers=named, seed=SEED)
    x, _ = batch("direct", 0)
    with pytest.raises(LTEError, match=rf"{culprit} is used .*chunk='model'"):
        model(x)
    assert_near(model.eval()(x), build("direct")(x), 1e-14)
    assert isinstance(model.train().positions.weight * 2, Tensor)  # outside of a forward pass it is what it is


class Looker(nn.Module):
    """Asks its layers' weights for type, device, shape and size only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.linear, self.out):
            w = layer.weight
            x = x.to(w.device, w.dtype).view(-1, w.shape[1])
            assert (w.dim(), w.ndim, w.numel(), w.is_cuda, len(w), w.size(0)) == (2, 2, w.nelement(), False, len(w), w.shape[0])
            assert isinstance(w.detach(), Tensor)
            assert "..." not in repr(w)
        y: Tensor = self.out(self.linear(x))
        return y


def test_a_look_at_a_weight_is_no_use() -> None:
    """As transformers' models do to cast their inputs: with LoRA, as a replica, and with either way of sharing out."""
    for mode in ("ddp", "dmp", "mhlora"):
        for chunk in ("layer", "model"):
            model = prepare_model_for_lte(Looker(), PLAIN, mode=mode, chunk=chunk, replica_layers=["out", "scale"])
            assert model(torch.ones(2, WIDTH)).shape == (2, 3)


class Inside(nn.Module):
    """Calls a part of a layer instead of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.outputs = nn.Linear(WIDTH, WIDTH), Outputs()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.outputs.linear(self.first(x))
        return y


def test_parts_of_replica_layers_called_from_outside() -> None:
    """With chunk="layer" the merged part would train nothing: an error that names it; with chunk="model" copies train."""
    x = torch.ones(2, WIDTH)
    model = prepare_model_for_lte(Inside(), PLAIN, replica_layers=["outputs"])
    with pytest.raises(LTEError, match=r"outputs\.linear, inside a replica layer, is used .*chunk='model'"):
        model(x)
    assert model.eval()(x).shape == (2, 3)
    model = prepare_model_for_lte(Inside(), PLAIN, replica_layers=["outputs"], chunk="model")
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
@pytest.mark.parametrize("length", [3, 4])
def test_positions_are_no_batch(models: None, length: int) -> None:
    """positions(arange(t)) is refused with chunk="layer" whether t differs from the batch or happens to be the same."""
    for lte in (LINEAR, LTE):
        model = prepare_model_for_lte(build("called"), lte, strict=False, replica_layers=["positions"] if lte is LINEAR else ())
        with pytest.raises(LTEError, match=r"positions got .*chunk='model'"):
            model(torch.zeros(4, length, dtype=torch.long))


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
@pytest.mark.parametrize("mode", ["ddp", "dmp"])
@pytest.mark.parametrize("lte", [LINEAR, LTE], ids=["replicas", "adapted"])
def test_the_gpt_worker_in_one_process(mode: str, lte: LTEConfig) -> None:
    """workers/gpt.py: chunk="layer" is one error; with chunk="model" every copy and factor trains, positions included."""

    def made(chunk: str) -> nn.Module:
        torch.manual_seed(0)
        model = GPT(width=8, depth=1, attention_heads=2, context=6).build_model().double()
        return prepare_model_for_lte(model, lte, mode=mode, chunk=chunk, strict=False, seed=SEED)

    words = torch.randint(256, (4, 6), generator=torch.Generator().manual_seed(0))
    with pytest.raises(LTEError, match=r"positions got .*chunk='model'"):
        made("layer")(words)
    model = made("model")
    before = merged_state_dict(model)
    for _ in range(2):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        loss(model(words), torch.ones(4)).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        MergeCondition(model).merge()
    after = merged_state_dict(model)
    assert set(after) == set(GPT(width=8, depth=1, attention_heads=2, context=6).build_model().state_dict())
    assert all(not torch.equal(after[name], value) for name, value in before.items())


class Recurrent(nn.Module):
    """An LSTM whose last hidden state is what counts, with given first states."""

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


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
@pytest.mark.filterwarnings("ignore:.*batch_first=False")
@pytest.mark.parametrize("batch_first", [True, False])
def test_states_of_recurrent_layers_are_shared_out_along_the_batch(
    models: None, monkeypatch: pytest.MonkeyPatch, batch_first: bool
) -> None:
    """An LSTM's states are (layers, batch, width): with batch_first=True both ways of sharing out train what Ray heads do,
    else chunk="model" does, and chunk="layer" is an error that says so.
    """
    monkeypatch.setitem(equal.MODELS, "recurrent", (lambda: Recurrent(batch_first), (4, WIDTH)))
    expected, x = train_heads("recurrent", LTE), batch("recurrent", 0)[0]
    for mode in ("ddp", "dmp"):
        assert_like_heads(train_mode("recurrent", LTE, mode, "model"), expected, x)
        if batch_first:
            assert_like_heads(train_mode("recurrent", LTE, mode, "layer"), expected, x)
        else:
            with pytest.raises(LTEError, match=r"lstm got .* batch_first=False: .*chunk='model'"):
                train_mode("recurrent", LTE, mode, "layer")


def test_recurrent_layers_share_out_batches_only() -> None:
    """Outputs and states equal each copy's on its part; keywords work; one sequence alone, or packed ones, are an error."""
    torch.manual_seed(0)
    for kind in (nn.GRU, nn.RNN):
        layer = unlike(MultiheadReplicaLayer(kind(WIDTH, 3, num_layers=2, batch_first=True).double(), HEADS))
        x, start = torch.randn(4, 5, WIDTH).double(), torch.randn(2, 4, 3).double()
        own = [r(part, s) for r, part, s in zip(layer.replicas, x.chunk(2), start.chunk(2, 1), strict=True)]
        for y, states in (layer(x, start), layer(hx=start, input=x)):
            assert_near(y, torch.cat([part[0] for part in own]), 1e-15)
            assert_near(states, torch.cat([part[1] for part in own], 1), 1e-15)
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 4, 3, 2]), batch_first=True)
        for wrong in (x[0], packed):
            with pytest.raises(LTEError, match=r"chunk='model'"):
                layer(wrong)
            layer.eval()(wrong)
            layer.train()


class Collision(nn.Module):
    """Parameters whose copies' names are alike: a.b, a_b, and one that a copy would be called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.a = nn.ParameterDict({"b": nn.Parameter(torch.full((WIDTH,), 2.0))})
        self.a_b = nn.Parameter(torch.full((WIDTH,), 5.0))
        self.a_b_head0 = nn.Parameter(torch.full((WIDTH,), 7.0))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) * self.a["b"] * self.a_b * self.a_b_head0
        return y


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
def test_names_of_copies_do_not_collide(models: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each parameter has copies of its own, which train as the Ray heads' do."""
    monkeypatch.setitem(equal.MODELS, "collision", (Collision, (WIDTH,)))
    expected = train_heads("collision", LTE)
    for mode in ("ddp", "dmp"):
        assert_like_heads(train_mode("collision", LTE, mode), expected, batch("collision", 0)[0])


class Recomputed(nn.Module):
    """Words whose last part, which uses weights and a lone parameter without a call, is checkpointed."""

    def __init__(self, reentrant: bool | None, what: str) -> None:
        super().__init__()
        self.reentrant, self.what = reentrant, what
        self.tokens, self.mid, self.scale = nn.Embedding(7, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.ones(WIDTH))

    def last(self, x: Tensor) -> Tensor:
        if self.what == "scale":
            return torch.tanh(x * self.scale)
        return F.linear(torch.tanh(x), self.tokens.weight)

    def forward(self, words: Tensor) -> Tensor:
        x = self.mid(self.tokens(words) * self.scale)
        return self.last(x) if self.reentrant is None else checkpoint(self.last, x, use_reentrant=self.reentrant)


def gradients(mode: str, reentrant: bool | None, what: str = "tokens", lte: LTEConfig = LTE, **kwargs: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    model = prepare_model_for_lte(
        Recomputed(reentrant, what).double(),
        lte,
        mode=mode,
        strict=False,
        seed=SEED,
        use_special_attention_scaling=False,
        **kwargs,
    )
    unlike(model)
    model(torch.arange(12).view(4, 3) % 7).sin().square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_uses_of_a_weight_in_mhlora(reentrant: bool) -> None:
    """What is computed again in the backward pass has the heads' sum too: the same gradients as without a checkpoint."""
    expected, found = gradients("mhlora", None), gradients("mhlora", reentrant)
    for name, gradient in expected.items():
        assert gradient.any()
        assert torch.equal(found[name], gradient)


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
@pytest.mark.parametrize("mode", ["ddp", "dmp"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("what", ["adapted", "replica", "scale"])
def test_checkpointed_uses_of_a_weight_in_a_loop_are_an_error(mode: str, reentrant: bool, what: str) -> None:
    """In a backward pass no head is active: an error, not the merged weight's gradients."""
    lte = LTE if what == "adapted" else LINEAR
    named = ["tokens"] if what == "replica" else []
    with pytest.raises(LTEError, match="would lose track of the head"):
        gradients(mode, reentrant, what, lte, chunk="model", replica_layers=named)


def partly_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3))))
    model[1][0].requires_grad_(False)
    model[1][2].weight = model[1][0].weight
    return nn.Sequential(*model, nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH, affine=False)).double()


def spread(model: nn.Module) -> nn.Module:
    model[2].requires_grad_(False)
    lte = LTEConfig(num_heads=HEADS, lora_r=2, lora_bias="frozen")
    return prepare_model_for_lte(model, lte, mode="dmp", strict=False, replica_layers=["1"], seed=SEED)


@pytest.mark.filterwarnings("ignore:.*train without LoRA")
def test_copies_and_all_that_they_hold_lie_on_their_heads_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """dmp over two devices: frozen parameters and statistics too, also where all of it was moved after preparing."""
    moved = spread(partly_frozen())
    monkeypatch.setattr(replica, "head_device", on_meta)
    for model in (spread(partly_frozen()), moved.double()):
        for layer in list(model)[1:]:
            assert isinstance(layer, MultiheadReplicaLayer)
            assert devices(layer.main) == devices(layer.replicas[0]) == {"cpu"}
            assert devices(layer.replicas[1]) == {"meta"}
        assert model[1].replicas[1][2].weight is model[1].replicas[1][0].weight
        assert not model[1].replicas[1][0].weight.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:.*train without LoRA")
@pytest.mark.parametrize("later", [True, False])
def test_statistics_and_frozen_copies_over_all_visible_gpus(later: bool) -> None:
    """dmp trains what it does on a CPU, moved there before or after preparing; every copy stays on its device."""
    states = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = spread(partly_frozen()).to(device) if later else spread(partly_frozen().to(device))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
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
