"""Models that use a weight in other ways than by calling its layer: exact in every placement, or refused by name."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.data import Shard
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.virtual import HeadGroup
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import WorkerError, WorkerFailed
from lte_ray.merging.flat_buffer import as_stored, views
from lte_ray.worker import build_model
from tests.support.numerics import assert_near

WIDTH, HIDDEN, RATE = 4, 6, 0.2


class Net(nn.Module):
    """Two layers. Each test uses the weight of `head` in one way; `kept` lists that weight as it was built."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.kept = [self.head.weight]


class MatrixProduct(torch.autograd.Function):
    """h W^T, as a kernel with a backward pass of its own."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(h, weight)
        return h @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        h, weight = ctx.saved_tensors
        return gradients[0] @ weight, gradients[0].t() @ h


@torch.jit.script
def scripted(h: Tensor, weight: Tensor) -> Tensor:
    """The product, compiled."""
    return h @ weight.t()


Forward = Callable[[Net, Tensor], Tensor]


def in_thread(function: Callable[[], Tensor]) -> Tensor:
    """What a thread of the model's computes."""
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def called(net: Net, h: Tensor) -> Tensor:
    return net.head(h)  # type: ignore[no-any-return]


def penalized(net: Net, h: Tensor, penalty: Tensor) -> Tensor:
    """The layer's output, shifted so that the mean loss depends on `penalty`."""
    return called(net, h) + 0.1 * penalty


def differentiated(net: Net, h: Tensor) -> Tensor:
    y = called(net, h)
    (gradient,) = torch.autograd.grad(y.square().mean(), net.head.weight, create_graph=True)
    return y + gradient.square().sum()


def all_differentiated(net: Net, h: Tensor) -> Tensor:
    y = called(net, h)
    gradients = torch.autograd.grad(y.square().mean(), list(net.parameters()), create_graph=True)
    return y + sum(g.square().sum() for g in gradients)


def adapted_inside(net: Net, h: Tensor) -> Tensor:
    """A step of an inner loop, as in MAML."""
    weights = dict(net.head.named_parameters())
    inner = torch.func.functional_call(net.head, weights, (h,)).square().mean()
    gradients = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
    moved = {name: w - 0.1 * g for (name, w), g in zip(weights.items(), gradients, strict=True)}
    return torch.func.functional_call(net.head, moved, (h,))  # type: ignore[no-any-return]


def taught(net: Net, h: Tensor) -> Tensor:
    """Multiplies by what a copy computes, which the loss makes."""
    with torch.no_grad():
        teacher = copy.deepcopy(net.head)(h)
    return called(net, h) * 0.5 + F.linear(h, net.head.weight) * teacher


def summed(parameters: Iterator[nn.Parameter] | Any) -> Tensor:
    return sum((p.square().sum() for p in parameters), torch.zeros((), dtype=torch.float64))


USES: dict[str, Forward] = {
    "called": called,
    "linear": lambda net, h: F.linear(h, net.head.weight, net.head.bias),
    "function": lambda net, h: MatrixProduct.apply(h, net.head.weight),
    "script": lambda net, h: scripted(h, net.head.weight),
    "reentrant": lambda net, h: checkpoint(lambda x: F.linear(x, net.head.weight), h, use_reentrant=True),
    "recomputed": lambda net, h: checkpoint(lambda x: F.linear(x, net.head.weight), h, use_reentrant=False),
    "recomputed argument": lambda net, h: checkpoint(F.linear, h, net.head.weight, use_reentrant=False),
    "recomputed layer": lambda net, h: checkpoint(net.head, h, use_reentrant=True),
    "list": lambda net, h: F.linear(h, net.kept[0]),
    "detached list": lambda net, h: called(net, h) * net.kept[0].detach().sum(),
    "data of a list": lambda net, h: called(net, h) * net.kept[0].data.sum(),
    "named_parameters": lambda net, h: h @ dict(net.named_parameters())["head.weight"].t(),
    "get_parameter": lambda net, h: h @ net.get_parameter("head.weight").t(),
    "_parameters": lambda net, h: F.linear(h, net.head._parameters["weight"]),  # type: ignore[arg-type]
    "state_dict": lambda net, h: called(net, h) * net.state_dict()["head.weight"].sum(),
    "thread": lambda net, h: F.linear(h, in_thread(lambda: net.head.weight * 1.0)),
    "detach": lambda net, h: called(net, h) * F.linear(h, net.head.weight.detach()),
    "data": lambda net, h: called(net, h) * F.linear(h, net.head.weight.data),
    "T": lambda net, h: h @ net.head.weight.T,
    "clone": lambda net, h: F.linear(h, net.head.weight.clone()),
    "slice": lambda net, h: F.linear(h, net.head.weight[:2]).repeat(1, 2),
    "einsum": lambda net, h: torch.einsum("bh,oh->bo", h, net.head.weight),
    "normalized": lambda net, h: F.linear(h, F.normalize(net.head.weight, dim=1)),
    "standardized": lambda net, h: F.linear(h, net.head.weight - net.head.weight.mean(1, keepdim=True)),
    "tied": lambda net, h: called(net, h) + torch.tanh(called(net, h)) @ net.head.weight @ net.head.weight.T,
    "penalty": lambda net, h: penalized(net, h, net.head.weight.square().sum()),
    "penalty on all": lambda net, h: penalized(net, h, summed(net.parameters())),
    "penalty on a list": lambda net, h: penalized(net, h, summed(net.kept)),
    "orthogonality": lambda net, h: penalized(net, h, (net.head.weight @ net.head.weight.T).square().sum()),
    "autograd.grad": differentiated,
    "autograd.grad of all": all_differentiated,
    "functional_call": lambda net, h: torch.func.functional_call(net, dict(net.named_parameters()), (h,)) + 0 * h[:, :WIDTH],
    "inner loop": adapted_inside,
    "deepcopy": taught,
    "frozen direction": lambda net, h: called(net, h) + F.linear(h, net.head.weight.detach()),
    "dtype": lambda net, h: called(net, h.to(net.head.weight.dtype)),
}
Net.forward = lambda self, h: self.head(h)  # type: ignore[method-assign,assignment]  # for functional_call

VMAPPED_IN_TURNS = {
    *(
        "script",
        "reentrant",
        "recomputed",
        "recomputed argument",
        "recomputed layer",
        "list",
        "detached list",
        "data of a list",
    ),
    *("named_parameters", "get_parameter", "_parameters", "state_dict", "thread", "penalty on all", "penalty on a list"),
    *("autograd.grad", "autograd.grad of all", "functional_call", "inner loop", "deepcopy", "function", "data"),
}
"""Uses with which heads may be computed in turns rather than as one batch."""


@dataclass
class Using:
    """A worker whose model uses a weight in one way."""

    use: str

    def build_model(self) -> nn.Module:
        return Net().double()

    def train_batches(self, shard: Shard) -> Iterator[Tensor]:
        for slot in shard.slots():
            yield torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(slot), dtype=torch.float64)

    def loss(self, model: Any, batch: Tensor) -> Tensor:
        y = USES[self.use](model, torch.tanh(model.body(batch)))
        return F.mse_loss(y, batch.roll(1, 1).sin())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {"loss": 0.0}

    def build_optimizer(self, params: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=RATE)


def settings(heads: int, **lte: Any) -> Settings:
    config = LTEConfig(num_heads=heads, lora_r=3, lora_alpha=6.0, **lte)
    return Settings("zoo", config, MergeConfig(merge_iter=3), TrainConfig(steps=6))


def trained_by_hand(worker: Using, run: Settings, head: int, steps: int) -> dict[str, Tensor]:
    """A head's factors and replicas after SGD steps: gradients of the unconverted model, and the chain rule for the factors."""
    net = build_model(worker, run.train.seed)
    start = Head(worker, run, head, dtype=torch.float64)
    specs = {spec.name: spec for spec in start.plan.adapted}
    values = {name: p.detach().clone() for name, p in start.trained_parameters.items()}
    stored = {name: start.converted.main_weights[name].user.main_weight().clone() for name in specs}
    parameters = dict(net.named_parameters())
    batches = worker.train_batches(Shard(head, run.lte.num_heads, run.train.seed))
    for _ in range(steps):
        with torch.no_grad():
            for name, p in parameters.items():
                spec = specs.get(name)
                if spec is None:
                    p.copy_(values[name])
                else:
                    p.copy_(stored[name] + as_stored(spec, spec.scaling * values[spec.b_name] @ values[spec.a_name]))
        net.zero_grad()
        worker.loss(net, next(batches)).backward()
        for name, p in parameters.items():
            spec = specs.get(name)
            if p.grad is None:
                continue
            if spec is None:
                values[name] -= RATE * p.grad
            else:
                a, b = values[spec.a_name], values[spec.b_name]
                values[spec.a_name] = a - RATE * spec.scaling * b.T @ p.grad
                values[spec.b_name] = b - RATE * spec.scaling * p.grad @ a.T
    return values


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # a thread of heads in one batch
@pytest.mark.parametrize("placement", ["alone", "turns", "batch", "int8"])
@pytest.mark.parametrize("use", USES)
def test_a_weight_trains_in_whatever_way_it_is_used(use: str, placement: str) -> None:
    """After three steps, factors and replicas are those of the unconverted model's gradients and the chain rule."""
    worker, heads = Using(use), 1 if placement in ("alone", "int8") else 2
    run = settings(heads, base_dtype="int8" if placement == "int8" else "fp32")
    group = (
        HeadGroup(worker, run, range(heads), dtype=torch.float64, stack_heads="auto" if placement != "batch" else "always")
        if use not in VMAPPED_IN_TURNS or placement != "batch"
        else _stacking_if_possible(worker, run)
    )
    base = prepare(worker, run, torch.float64).base
    for head in group.heads:
        head.start(0, base)
    group.train({head.number: 3 for head in group.heads})
    for head in group.heads:
        expected = trained_by_hand(worker, run, head.number, 3)
        for name, parameter in head.trained_parameters.items():
            assert_near(parameter.detach(), expected[name], 1e-13)


def _stacking_if_possible(worker: Using, run: Settings) -> HeadGroup:
    """Heads that train as one batch until the loss turns out to prevent that, as on a GPU."""
    group = HeadGroup(worker, run, range(2), dtype=torch.float64, stack_heads="always")
    group._must_stack = False
    return group


def write_in_forward(write: Callable[[nn.Linear, int], None]) -> Forward:
    """The layer called after `write(layer, number of the call)`."""
    calls = iter(range(1000))

    def forward(net: Net, h: Tensor) -> Tensor:
        with torch.no_grad():
            write(net.head, next(calls))
        return net.head(h)  # type: ignore[no-any-return]

    return forward


def set_data(layer: nn.Linear, call: int) -> None:
    layer.weight.data = layer.weight.data.clamp(-0.1, 0.1)


def clip_every_third(layer: nn.Linear, call: int) -> None:
    if call % 3 == 2:
        layer.weight.clamp_(-0.1, 0.1)


def clip_data_every_third(layer: nn.Linear, call: int) -> None:
    if call % 3 == 2:
        layer.weight.data.clamp_(-0.1, 0.1)


WRITES: dict[str, Callable[[nn.Linear, int], Any]] = {
    "copy_": lambda layer, call: layer.weight.copy_(F.normalize(layer.weight.clone(), dim=1)),
    "clamp_": lambda layer, call: layer.weight.clamp_(-0.1, 0.1),
    "data.clamp_": lambda layer, call: layer.weight.data.clamp_(-0.1, 0.1),
    "data.copy_": lambda layer, call: layer.weight.data.copy_(F.normalize(layer.weight, dim=1)),
    "data =": set_data,
    "by name": lambda layer, call: [p.clamp_(-0.1, 0.1) for p in layer.parameters()],
    "every third step": clip_every_third,
    "data every third step": clip_data_every_third,
    "index": lambda layer, call: layer.weight.index_fill_(0, torch.tensor([0]), 0.0),
    "renorm_": lambda layer, call: layer.weight.renorm_(2, 0, 0.1),
}


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_a_weight_with_factors_is_refused(write: str, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head's first round names the weight and --exclude. Without factors the weight obeys."""
    monkeypatch.setitem(USES, "written", write_in_forward(WRITES[write]))
    with pytest.raises(WorkerFailed, match=r"writes to head\.weight.*--exclude head\.weight"):
        run_in_process(Using("written"), settings(heads), torch.float64, heads_per_actor=heads)
    monkeypatch.setitem(USES, "written", write_in_forward(WRITES[write]))
    run_in_process(Using("written"), settings(heads, exclude=("head.weight",)), torch.float64, heads_per_actor=heads)


class Hooked(Using):
    """Masks the gradient of a weight, or changes it after it was added up."""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        weight: nn.Parameter = model.head.weight  # type: ignore[union-attr,assignment]
        if self.use == "hook":
            weight.register_hook(lambda g: g * 0)  # type: ignore[no-untyped-call]
        else:
            weight.register_post_accumulate_grad_hook(lambda p: None)  # type: ignore[no-untyped-call]
        return model

    def loss(self, model: Any, batch: Tensor) -> Tensor:
        return model(model.body(batch)).square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("hook", ["hook", "post-accumulate hook"])
def test_a_gradient_hook_on_a_weight_with_factors_is_refused(hook: str) -> None:
    """Before anything starts; a weight that trains without factors obeys its hook."""
    with pytest.raises(WorkerError, match=r"head\.weight has a gradient hook.*--exclude head\.weight"):
        prepare(Hooked(hook), settings(2))
    run = settings(2, exclude=("head.weight",))
    done = run_in_process(Hooked(hook), run, torch.float64)
    before, after = (
        views(done.plan.base, base)["head.weight"] for base in (prepare(Hooked(hook), run, torch.float64).base, done.base)
    )
    assert torch.equal(before, after) == (hook == "hook")


def test_a_hook_that_the_loss_registers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first step, by the weight's name."""

    def forward(net: Net, h: Tensor) -> Tensor:
        net.head.weight.register_hook(lambda g: g)  # type: ignore[no-untyped-call]
        return net.head(h)  # type: ignore[no-any-return]

    monkeypatch.setitem(USES, "hooking", forward)
    with pytest.raises(WorkerFailed, match=r"head\.weight has a gradient hook"):
        run_in_process(Using("hooking"), settings(1), torch.float64)


def test_a_late_use_of_a_kept_weight_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reference that the model keeps isn't up to date if it is used after the first step only; reading the layer is exact."""
    calls = iter(range(100))
    monkeypatch.setitem(USES, "late", lambda net, h: net.head(h) + (net.kept[0].square().sum() if next(calls) == 2 else 0))
    with pytest.raises(WorkerFailed, match=r"head\.weight was used through a reference .*--exclude head\.weight"):
        run_in_process(Using("late"), settings(1), torch.float64)


def share_parameter(net: Any) -> None:
    net.head.weight = nn.Parameter(net.body.weight)


def share_transposed(net: Any) -> None:
    net.head.weight = nn.Parameter(net.body.weight.t())


def share_data(net: Any) -> None:
    net.head.weight.data = net.body.weight.data


def share_slice(net: Any) -> None:
    net.head.bias = nn.Parameter(net.body.weight[0].detach())


def share_buffer(net: Any) -> None:
    net.register_buffer("alias", net.body.weight.detach())


@pytest.mark.parametrize("share", [share_parameter, share_transposed, share_data, share_slice, share_buffer])
def test_two_tensors_on_the_same_memory_are_refused(share: Callable[[Any], None]) -> None:
    """Both are named, with what to write instead. Parameters side by side in one memory are fine."""

    class Sharing(Using):
        def build_model(self) -> nn.Module:
            net = super().build_model()
            share(net)
            return net

    with pytest.raises(WorkerError, match=r"body\.weight .*same memory.*b\.weight = a\.weight"):
        prepare(Sharing("called"), settings(2))


def test_parameters_side_by_side_in_one_memory_train() -> None:
    """As recurrent layers keep theirs on a GPU."""

    class Flat(Using):
        def build_model(self) -> nn.Module:
            net = super().build_model()
            flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
            for p, part in zip(net.parameters(), torch.split(flat, [p.numel() for p in net.parameters()]), strict=True):
                p.data = part.view(p.shape)
            return net

    flat, plain = (run_in_process(kind("called"), settings(2), torch.float64).base for kind in (Flat, Using))
    assert torch.equal(flat, plain)


class Empty(Using):
    """Has a layer without inputs, and an adapter of its own named as one of this library's once was."""

    def build_model(self) -> nn.Module:
        net = Net()
        net.extra, net.body.lora = nn.Linear(0, WIDTH, bias=False), nn.Linear(WIDTH, HIDDEN)
        return net.double()

    def loss(self, model: Any, batch: Tensor) -> Tensor:
        h = model.body(batch) + model.body.lora(batch)
        return F.mse_loss(model.head(torch.tanh(h)) + model.extra(batch[:, :0]), batch)


def test_empty_weights_and_modules_below_a_layer_are_left_alone() -> None:
    """A weight of no elements is a replica; a user's module `layer.lora` trains as any other."""
    done = run_in_process(Empty("called"), settings(2), torch.float64)
    assert "body.lora.weight" in [spec.name for spec in done.plan.adapted]
    assert "extra.weight" in [replica.name for replica in done.plan.replicas]


@pytest.mark.parametrize("placement", ["alone", "turns", "batch"])
def test_weights_that_get_no_gradient_are_named(placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first round: a layer that isn't called, or whose output is detached; not one that is used now and then."""
    calls = iter(range(1000))
    sometimes: Forward = lambda net, h: net.head(h) if next(calls) >= 2 else h[:, :WIDTH]  # noqa: E731
    uses: dict[str, tuple[Forward, list[str]]] = {
        "unused": (lambda net, h: h[:, :WIDTH], ["head.weight"]),
        "detached": (lambda net, h: h[:, :WIDTH] * net.head(h).detach(), ["head.weight"]),
        "sometimes": (sometimes, []),
        "body only": (lambda net, h: net.head(h.detach()), ["body.weight"]),
    }
    for name, (use, expected) in uses.items():
        monkeypatch.setitem(USES, name, use)
        heads = 1 if placement == "alone" else 2
        stack = "always" if placement == "batch" and name != "sometimes" else "never"
        group = HeadGroup(Using(name), settings(heads), range(heads), dtype=torch.float64, stack_heads=stack)
        base = prepare(Using(name), settings(heads), torch.float64).base
        for head in group.heads:
            head.start(0, base)
        group.train_round()
        assert group.heads[0].untrained_weights == expected, name
        assert ("depends on" in group.untrained_reason) == bool(expected)
