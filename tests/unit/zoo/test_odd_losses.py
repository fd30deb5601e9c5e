"""Losses that freeze layers, keep views, go backward themselves, or replace buffers: exact, or refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.data import Shard
from lte_ray.engine.head.head import Head
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import WorkerError, WorkerFailed
from lte_ray.merging.flat_buffer import views
from lte_ray.worker import build_model
from tests.support.numerics import assert_near
from tests.unit.zoo.test_uses_of_weights import HIDDEN, WIDTH, Net, Using, settings, trained_by_hand


def error(y: Tensor, x: Tensor) -> Tensor:
    return F.mse_loss(y, x.roll(1, 1).sin())


def hidden(net: Any, x: Tensor) -> Tensor:
    return torch.tanh(net.body(x))


def adversarial(net: Any, x: Tensor) -> Tensor:
    """The head is frozen for one part, as a discriminator is."""
    for p in net.head.parameters():
        p.requires_grad_(False)
    first = -0.5 * error(net.head(hidden(net, x)), x)
    for p in net.head.parameters():
        p.requires_grad_(True)
    return first + error(net.head(hidden(net, x).detach()), x)


def frozen_body(net: Any, x: Tensor) -> Tensor:
    net.body.requires_grad_(False)
    return error(net.head(hidden(net, x)), x)


def cleared(net: Any, x: Tensor) -> Tensor:
    """Goes backward itself, and drops the gradients."""
    loss = error(net.head(hidden(net, x)), x)
    (0.5 * loss).backward(retain_graph=True)
    net.zero_grad()
    return loss


def normalized(net: Any, x: Tensor) -> Tensor:
    """Divides by the size of its own gradient."""
    loss = error(net.head(hidden(net, x)), x)
    loss.backward(retain_graph=True)
    size = sum(p.grad.square().sum() for p in net.parameters() if p.grad is not None)
    net.zero_grad()
    return loss / (1 + size.detach())


def caught(net: Any, x: Tensor) -> Tensor:
    """Catches what `torch.autograd.grad` may raise."""
    loss = error(net.head(hidden(net, x)), x)
    try:
        (gradient,) = torch.autograd.grad(loss, net.head.weight, create_graph=True)
    except Exception:
        return loss
    return loss + gradient.square().sum()


def read_without_gradients(net: Any, x: Tensor) -> Tensor:
    with torch.inference_mode():
        scale = float(net.head.weight.sum())
    return error(F.linear(hidden(net, x), net.head.weight), x) * (1 + 0.1 * scale)


def new_layer(net: Any, x: Tensor) -> Tensor:
    """Makes a layer of the class of one of its own."""
    torch.manual_seed(0)
    extra = type(net.head)(HIDDEN, WIDTH).double()
    with torch.no_grad():
        extra.weight.fill_(0.1)
    return error(net.head(hidden(net, x)) + extra(hidden(net, x)), x)


LOSSES = [adversarial, frozen_body, cleared, normalized, caught, read_without_gradients, new_layer]


@dataclass
class Odd(Using):
    """A worker with one of these losses."""

    use: str = ""
    of: Callable[[Any, Tensor], Tensor] = frozen_body

    def loss(self, model: Any, batch: Tensor) -> Tensor:
        return self.of(model, batch)


def assert_trains_by_the_chain_rule(worker: Using, run: Settings) -> None:
    """Three steps of a head give what `trained_by_hand` gives."""
    head = Head(worker, run, 0, dtype=torch.float64)
    head.start(0, prepare(worker, run, torch.float64).base)
    head.train(3)
    expected = trained_by_hand(worker, run, 0, 3)
    for name, parameter in head.trained_parameters.items():
        assert_near(parameter.detach(), expected[name], 1e-13)


@pytest.mark.parametrize("base_dtype", ["fp32", "int8"])
@pytest.mark.parametrize("loss", LOSSES)
def test_an_odd_loss_trains_as_the_ordinary_model_would(loss: Callable[[Any, Tensor], Tensor], base_dtype: str) -> None:
    """After three steps, factors and replicas are those of the unconverted model's gradients and the chain rule."""
    worker, run = Odd(of=loss), settings(1, base_dtype=base_dtype)
    assert_trains_by_the_chain_rule(worker, run)


def transposed(net: Net) -> Tensor:
    return net.head.weight.t()


KEPT: dict[str, Callable[[Net], Tensor]] = {
    "t": transposed,
    "slice": lambda net: net.head.weight[:2],
    "data": lambda net: net.head.weight.data,
    "detach": lambda net: net.head.weight.detach(),
    "view": lambda net: net.head.weight.view(-1),
}


@pytest.mark.parametrize("base_dtype", ["fp32", "int8"])
@pytest.mark.parametrize("kind", KEPT)
def test_a_kept_view_of_a_weight_with_factors_is_refused(kind: str, base_dtype: str) -> None:
    """It can't follow the weight; without factors it does."""

    class Keeping(Using):
        def build_model(self) -> nn.Module:
            net = Net().double()
            net.kept = [KEPT[kind](net)]  # type: ignore[list-item]
            return net

        def loss(self, model: Any, batch: Tensor) -> Tensor:
            return error(model.head(hidden(model, batch)), batch) * (1 + 0.1 * model.kept[0].detach().square().sum())

    with pytest.raises(WorkerFailed, match=r"keeps a view of head\.weight .*--exclude head\.weight"):
        run_in_process(Keeping(""), settings(1, base_dtype=base_dtype), torch.float64)
    run_in_process(Keeping(""), settings(1, exclude=("head.weight",)), torch.float64)


def test_unfreezing_in_the_loss_is_refused() -> None:
    """What build_model() has frozen has no place in the base: the error says to let it require gradients there."""

    class Thawing(Using):
        def build_model(self) -> nn.Module:
            net = Net().double()
            net.body.requires_grad_(False)
            return net

        def loss(self, model: Any, batch: Tensor) -> Tensor:
            model.body.requires_grad_(True)
            return error(model.head(hidden(model, batch)), batch)

    with pytest.raises(WorkerFailed, match=r"lets body\.weight, body\.bias train, which build_model\(\) has frozen"):
        run_in_process(Thawing(""), settings(1), torch.float64)


@pytest.mark.parametrize("by", ["lerp_", "data"])
def test_a_frozen_parameter_that_is_written_to_late_is_refused(by: str) -> None:
    """As one that is written to in the first round; also if no version counter tells."""

    class Late(Using):
        calls = 0

        def build_model(self) -> nn.Module:
            net = Net().double()
            net.slow = nn.Parameter(net.head.weight.detach().clone(), requires_grad=False)
            return net

        def loss(self, model: Any, batch: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 4:
                slow = model.slow.data if by == "data" else model.slow
                with torch.no_grad():
                    slow.lerp_(model.head.weight, 0.5)
            return error(model.head(hidden(model, batch)), batch)

    with pytest.raises(WorkerFailed, match=r"writes to slow, parameters that don't train"):
        run_in_process(Late(""), settings(1), torch.float64)


class Assigning(nn.Module):
    """Replaces a buffer by another tensor, or writes to it without a version, at each loss."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.out = way, nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                mean: Any = self.mean
                value = 0.7 * mean + 0.3 * (x.mean(0) + 10)
                self.ready = self.ready | True  # type: ignore[operator]
                if self.way == "assign":
                    self.mean = value
                elif self.way == "data":
                    mean.data.copy_(value)
                else:
                    mean.data = value
        return self.out(x + 10 - self.mean)  # type: ignore[no-any-return]


@dataclass
class Assigned(Using):
    """A worker with such a model."""

    use: str = "assign"

    def build_model(self) -> nn.Module:
        return Assigning(self.use).double()

    def loss(self, model: Any, batch: Tensor) -> Tensor:
        return error(model(batch), batch)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("way", ["assign", "data", "data ="])
def test_a_buffer_that_the_model_replaces_is_merged(way: str, together: int) -> None:
    """As if it had been written to in place; flags are merged, too."""
    run = Settings("zoo", LTEConfig(num_heads=2, lora_r=2), MergeConfig(merge_iter=3, policy="average"), TrainConfig(steps=6))
    done = run_in_process(Assigned(way), run, torch.float64, heads_per_actor=together)
    merged = views(done.plan.base, done.base)
    assert (merged["mean"] > 3).all()
    assert merged["ready"] == 1
    for head in done.heads:
        assert_near(head.model.mean, merged["mean"], 1e-13)


def test_looking_for_buffers_leaves_the_first_base_alone() -> None:
    """A model that sets its parameters from the first batch is as it was built."""

    class Setting(Assigned):
        def loss(self, model: Any, batch: Tensor) -> Tensor:
            with torch.no_grad():
                model.out.bias.fill_(5.0)
            return super().loss(model, batch)

    initial = prepare(Setting(), settings(1), torch.float64)
    built = build_model(Setting(), settings(1).train.seed)
    assert torch.equal(views(initial.plan.base, initial.base)["out.bias"], built.out.bias)  # type: ignore[union-attr]


class Padded(nn.Module):
    """An embedding with a padding row, tied to the logits or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(7, HIDDEN, padding_idx=0), nn.Linear(HIDDEN, 7, bias=False)
        if tied:
            self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.words(x)))  # type: ignore[no-any-return]


@dataclass
class Reading(Using):
    """A worker with such a model."""

    use: str = ""
    tied: bool = False

    def build_model(self) -> nn.Module:
        return Padded(self.tied).double()

    def train_batches(self, shard: Shard) -> Iterator[Tensor]:
        for slot in shard.slots():
            yield torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(slot))

    def loss(self, model: Any, batch: Tensor) -> Tensor:
        return F.cross_entropy(model(batch).flatten(0, 1), batch.roll(1, 1).flatten())


@pytest.mark.parametrize(
    ("adapt", "tied"), [(("linear",), False), (("linear", "embedding"), False), (("linear", "embedding"), True)]
)
def test_padding_rows_train_as_torch_trains_them(adapt: tuple[str, ...], tied: bool) -> None:
    """The lookup gives the padding row no gradient, in A and B either; nor do heads that are one batch."""
    worker, run = Reading(tied=tied), settings(1, adapt=adapt)
    assert_trains_by_the_chain_rule(worker, run)
    apart, turns = (run_in_process(worker, settings(2, adapt=adapt), torch.float64, heads_per_actor=n).base for n in (1, 2))
    assert torch.equal(apart, turns)
    batch = run_in_process(worker, settings(2, adapt=adapt), torch.float64, heads_per_actor=2, stack_heads="always").base
    assert_near(batch, apart, 1e-13)


def test_activation_checkpoints_and_quantized_weights_go_together() -> None:
    """Recomputed activations give saved tensors out once."""
    run = settings(1, base_dtype="int8")
    plain = run_in_process(Wrapping(""), run, torch.float64)
    train = TrainConfig(steps=6, checkpoint_activations=("inner",))
    checkpointed = run_in_process(Wrapping(""), Settings("zoo", run.lte, run.merge, train), torch.float64)
    assert_near(checkpointed.base, plain.base, 1e-14)


class Wrapping(Using):
    """A worker whose layers are in a module that can be recomputed."""

    def build_model(self) -> nn.Module:
        return nn.ModuleDict({"inner": nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, WIDTH))}).double()

    def loss(self, model: Any, batch: Tensor) -> Tensor:
        return error(model["inner"](batch), batch)


def test_two_buffers_on_the_same_memory_are_refused_if_they_change() -> None:
    """One would follow the other only in some placements."""

    class Aliased(Assigned):
        def build_model(self) -> nn.Module:
            model = super().build_model()
            model.register_buffer("same", model.mean.view(2, 2))
            return model

    with pytest.raises(WorkerError, match=r"mean and same are two tensors on the same memory"):
        prepare(Aliased("data"), settings(1))
