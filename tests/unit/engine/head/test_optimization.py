"""An optimizer step: accumulation, clipping, precision, multipliers, recomputed activations, compilation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lte_ray.adapters import convert
from lte_ray.config import LTEConfig, TrainConfig
from lte_ray.data import Shard
from lte_ray.engine.head.compilation import check_compile
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.optimization import OptimizerStep, build_optimizer, checkpoint_activations
from lte_ray.engine.head.snapshot import restore
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError, WorkerFailed
from lte_ray.layout import Adapted, Plan, Replica
from lte_ray.messages import ContributionResult
from tests.support.head_states import head_state, through_file
from tests.support.numerics import EPS32, assert_near
from tests.support.tiny_worker import BATCH, SAMPLES, WORDS, Net, Tiny, make_settings
from workers.regression import Regression

CPU = torch.device("cpu")


def settings(train: dict[str, Any] | None = None, lte: dict[str, Any] | None = None, **more: Any) -> Settings:
    """`make_settings` with some fields of TrainConfig and LTEConfig changed."""
    run_settings = make_settings(**more)
    return dataclasses.replace(
        run_settings,
        train=dataclasses.replace(run_settings.train, **(train or {})),
        lte=dataclasses.replace(run_settings.lte, **(lte or {})),
    )


def started(worker: Any, run_settings: Settings, head: int = 0, dtype: torch.dtype = torch.float64) -> Head:
    one = Head(worker, run_settings, head, dtype=dtype)
    one.start(0, prepare(worker, run_settings, dtype).base)
    return one


def restored(head: Head, worker: Any, run_settings: Settings) -> Head:
    """Another head that continues from this one's state, through safetensors and JSON."""
    tensors, meta = head_state(head)
    other = Head(worker, run_settings, head.number, dtype=head.dtype, incarnation=1)
    base = prepare(worker, run_settings, head.dtype).base
    restore(other, through_file((tensors, meta)), base)
    return other


def trained(head: Head) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in head.trained_parameters.items()}


@dataclass
class Single(Tiny):
    """Tiny in float32, by default without dropout."""

    def build_model(self) -> nn.Module:
        return Net(self.dropout)


# -- accumulation ------------------------------------------------------------------------------------------------------


@dataclass
class Sized(Tiny):
    """Tiny with batches of another size: several of Tiny's in a row."""

    times: int = 1

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        words = torch.arange(SAMPLES) * 5 % WORDS
        small = Shard(shard.head, shard.num_heads, shard.seed, cursor=shard.cursor * self.times).indices(SAMPLES, BATCH)
        while True:
            indices = torch.cat([torch.from_numpy(next(small)) for _ in range(self.times)])
            yield words[indices], (words[indices] * 3 + 1) % WORDS


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("clip", [0.0, 0.2])
def test_accumulating_k_batches_is_one_batch_k_times_as_large(times: int, clip: float) -> None:
    """Means of equal batches: the same steps, losses and counts, with clipping too, for four merges of two heads."""
    runs = [
        run_in_process(Sized(), settings({"accumulate": times, "clip_norm": clip}), torch.float64),
        run_in_process(Sized(times=times), settings({"clip_norm": clip}), torch.float64),
    ]
    # Two orders of the same float64 sums, over 12 steps of SGD with momentum.
    assert_near(runs[0].base, runs[1].base, 1e-13)
    for small, large in zip(runs[0].merges, runs[1].merges, strict=True):
        assert (small.samples, small.steps, small.step) == (large.samples, large.steps, large.step)
        assert small.samples == 2 * 3 * times * BATCH
        for head in (0, 1):
            assert small.losses[head] == pytest.approx(large.losses[head], rel=1e-13)


def test_an_accumulating_head_resumes_with_the_next_batch() -> None:
    """The cursor counts batches, not steps; dropout and momentum continue as they would have."""
    worker, run_settings = Tiny(dropout=0.3), settings({"accumulate": 3})
    head = started(worker, run_settings)
    head.train_round()
    head.adopt(ContributionResult(0, 1, False, 0, "a test"), 0, None)
    other = restored(head, worker, run_settings)
    expected, continued = head.train_round(), other.train_round()
    assert torch.equal(continued.buffer, expected.buffer)
    assert (continued.loss, continued.samples, continued.step) == (expected.loss, 6 * 3 * BATCH, 6)


def test_a_head_resumed_with_another_accumulate_neither_repeats_nor_skips_batches() -> None:
    """What was taken before the checkpoint counts by batches, however many a step takes now."""
    seen: list[Tensor] = []

    class Watching(Tiny):
        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            seen.append(batch[0])
            return super().loss(model, batch)

    run_settings = settings({"accumulate": 2})
    head = started(Watching(), run_settings)
    seen.clear()  # of the check before the run
    head.train_round()
    head.adopt(ContributionResult(0, 1, False, 0, "a test"), 0, None)
    trained = list(seen)
    other = restored(head, Watching(), settings({"accumulate": 1}))
    seen.clear()
    other.train_round()
    seen[:0] = trained
    batches = Tiny().train_batches(Shard(0, 2, run_settings.train.seed))
    assert len(seen) == 3 * 2 + 3
    assert all(torch.equal(words, next(batches)[0]) for words in seen)


# -- clipping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.01, 0.3, 1e6])
def test_clipping_is_torchs_for_all_factors_and_replicas(clip: float) -> None:
    """One norm for the head, as clip_grad_norm_ of all parameters; a large bound changes nothing."""
    worker = Tiny()
    clipped, plain = started(worker, settings({"clip_norm": clip})), started(worker, settings())
    for head in (clipped, plain):
        head.backward(head.next_batch())
    parameters = list(plain.trained_parameters.values())
    assert len(parameters) == 2 * len(plain.plan.adapted) + len(plain.plan.replicas)
    norm = float(torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])))
    assert float(nn.utils.clip_grad_norm_(parameters, clip)) == pytest.approx(norm, rel=1e-14)
    before = trained(plain)
    for head in (clipped, plain):
        head.finish_step()
    for name, value in trained(plain).items():
        assert torch.equal(trained(clipped)[name], value)
    moved = torch.cat([(trained(plain)[name] - value).flatten() for name, value in before.items()])
    # The first step of SGD is lr times the gradient. Its norm is the bound, up to the 1e-6 that torch adds to the norm.
    assert float(torch.linalg.vector_norm(moved)) == pytest.approx(0.01 * min(norm, clip), rel=1e-5)


# -- mixed precision ---------------------------------------------------------------------------------------------------


def test_bf16_mixed_computes_in_bfloat16_and_keeps_float32() -> None:
    """Products are bf16; factors, replicas, gradients, contributions and the merged base are fp32, and the head learns."""
    types: set[torch.dtype] = set()

    class Watching(Single):
        def build_model(self) -> nn.Module:
            model = super().build_model()
            model.up.register_forward_hook(lambda module, args, output: types.add(output.dtype))
            return model

    mixed, full = (run_in_process(Watching(), settings({"precision": p}, steps=30)) for p in ("bf16-mixed", "fp32"))
    assert types == {torch.bfloat16, torch.float32}
    assert mixed.base.dtype == torch.float32
    assert all(p.dtype == torch.float32 for head in mixed.heads for p in head.model.parameters())
    assert not torch.equal(mixed.base, mixed.base.bfloat16().float())
    # Gradients err by bf16's 2^-8; 30 small steps keep the weights near those of the fp32 run.
    assert_near(mixed.base, full.base, 0.02)
    losses = [sum(m.losses.values()) for m in mixed.merges]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("clip", [0.0, 1e6])
def test_fp16_mixed_trains_on_a_cpu_with_loss_scaling(clip: float) -> None:
    """Scaled losses give unscaled steps: near those of an fp32 run from the first step that doesn't overflow."""
    mixed, full = (
        started(Single(), settings({"precision": p, "clip_norm": clip}), dtype=torch.float32) for p in ("fp16-mixed", "fp32")
    )
    mixed.optimizer_step.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for head in (mixed, full):
        for _ in range(3):
            head.backward(head.next_batch())
            head.finish_step()
    for name, value in trained(full).items():
        assert_near(trained(mixed)[name], value, 3e-3)  # fp16 has 11 bits
    assert not all(torch.equal(trained(mixed)[name], value) for name, value in trained(full).items())
    assert mixed.optimizer_step.scaler.get_scale() == 256.0


@pytest.mark.parametrize(("clip", "optimizer"), [(0.0, "adamw"), (1.0, "adamw"), (1.0, "lora-muon")])
def test_a_step_whose_gradients_overflow_is_skipped(clip: float, optimizer: str) -> None:
    """Weights and moments don't change, the scale is halved, and the next step is taken; the step is counted."""
    head = started(Single(optimizer=optimizer), settings({"precision": "fp16-mixed", "clip_norm": clip}), dtype=torch.float32)
    head.optimizer_step.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = trained(head)
    head.backward(head.next_batch())
    next(iter(head.converted.factors.values())).grad[0, 0] = math.inf  # type: ignore[index]
    head.finish_step()
    assert all(torch.equal(value, before[name]) for name, value in trained(head).items())
    assert not head.optimizer.state
    assert (head.step, head.optimizer_step.scaler.get_scale()) == (1, 512.0)
    assert all(p.grad is None for p in head.model.parameters())
    head.backward(head.next_batch())
    head.finish_step()
    assert head.step == 2
    assert not all(torch.equal(value, before[name]) for name, value in trained(head).items())
    assert all(torch.isfinite(value).all() for value in trained(head).values())


def test_the_loss_scale_survives_a_checkpoint() -> None:
    """It continues bitwise; from a checkpoint without one (of fp32, or of an older release) it starts again."""
    worker, run_settings = Single(), settings({"precision": "fp16-mixed"})
    head = started(worker, run_settings, dtype=torch.float32)
    head.train_round()
    head.adopt(ContributionResult(0, 1, False, 0, "a test"), 0, None)
    scale = head.optimizer_step.scaler.get_scale()
    assert scale < 65536.0
    other = restored(head, worker, run_settings)
    assert other.optimizer_step.scaler.get_scale() == scale
    assert torch.equal(other.train_round().buffer, head.train_round().buffer)
    plain = started(worker, settings(), dtype=torch.float32)
    assert restored(plain, worker, run_settings).optimizer_step.scaler.get_scale() == 65536.0
    tensors, meta = head_state(plain)
    del meta["optimizer"]["scaler"]
    other = Head(worker, run_settings, 0)
    restore(other, (tensors, meta), prepare(worker, run_settings).base)
    assert other.optimizer_step.scaler.get_scale() == 65536.0


def test_a_float16_model_is_refused_under_fp16_mixed_before_any_head_starts() -> None:
    """Its gradients can't be unscaled. It trains without mixed precision, and with it once its parameters are in float32."""

    class Half(Tiny):
        def build_model(self) -> nn.Module:
            return Net().half()

    with pytest.raises(
        ConfigError, match=r"needs parameters in float32, but build_model\(\) gives 10 in float16, e.g. up.weight"
    ):
        prepare(Half(), settings({"precision": "fp16-mixed"}))
    prepare(Half(), settings())
    prepare(Single(), settings({"precision": "fp16-mixed"}))


@pytest.mark.parametrize("clip", [0.1, 0.3])
def test_a_scaled_gradient_is_clipped_by_its_norm_before_scaling(clip: float) -> None:
    """A step of SGD under fp16-mixed is the rate times the true gradient, clipped: the loss scale isn't in its norm."""
    scale = 256.0
    clipped, plain = (
        started(Single(), settings({"precision": "fp16-mixed", "clip_norm": c}), dtype=torch.float32) for c in (clip, 0.0)
    )
    for head in (clipped, plain):
        head.optimizer_step.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        head.backward(head.next_batch())
    gradients = {name: p.grad / scale for name, p in plain.trained_parameters.items() if p.grad is not None}
    norm = float(torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients.values()])))
    assert norm > 2 * clip
    before = trained(clipped)
    clipped.finish_step()
    moved = {name: trained(clipped)[name] - before[name] for name in gradients}
    # Weights of size 1 are rounded by 3e-8 each, some 200 of them by 4e-7 in norm; the whole step is 1e-3 or more.
    size = float(torch.linalg.vector_norm(torch.cat([m.flatten() for m in moved.values()])))
    assert size == pytest.approx(0.01 * clip, rel=1e-3)
    for name, gradient in gradients.items():
        assert float(torch.linalg.vector_norm(moved[name] + 0.01 * clip / norm * gradient)) < 1e-3 * size, name
    assert clipped.optimizer_step.scaler.get_scale() == scale  # no overflow: the step was taken


# -- learning-rate multipliers -----------------------------------------------------------------------------------------


RULES = ("up: lr=2", "scale: lr=0.1", "down.bias: lr=0")


class Scheduled(Tiny):
    """With a learning rate that falls after every step."""

    def build_schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> lr_scheduler.LRScheduler:
        return lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total_steps)


def multipliers(head: Head) -> dict[str, float]:
    """The ratio of each trained parameter's rate to the worker's rate of 0.01, times the schedule's."""
    rates = {id(p): group["lr"] for group in head.optimizer.param_groups for p in group["params"]}
    parameters = {**head.converted.factors, **{r.name: head.converted.parameters[r.name] for r in head.plan.replicas}}
    return {name: rates[id(p)] / (0.01 * (1 - head.step / 12)) for name, p in parameters.items()}


def test_multipliers_hold_under_a_schedule_and_in_a_resumed_run() -> None:
    """At every step each rate is multiplier times schedule times rate; a resumed head continues bitwise the same."""
    run_settings = settings(lte={"layers": RULES}, steps=12, merge_iter=2)
    expected = {"up.weight.lora_A": 2.0, "up.weight.lora_B": 2.0, "up.bias": 2.0, "scale": 0.1, "down.bias": 0.0}
    head = started(Scheduled(), run_settings)
    for sequence in range(1, 6):
        for name, factor in multipliers(head).items():
            assert factor == pytest.approx(expected.get(name, 1.0), rel=1e-14), name
        contribution = head.train_round()
        head.adopt(ContributionResult(0, sequence, False, 0, "a test"), 0, None)
        if sequence == 2:
            other = restored(head, Scheduled(), run_settings)
        if sequence > 2:
            assert torch.equal(other.train_round().buffer, contribution.buffer)
            other.adopt(ContributionResult(0, other.sequence, False, 0, "a test"), 0, None)
    assert multipliers(other) == multipliers(head)


def test_lora_muon_heads_resume_exactly_with_multipliers_and_a_schedule() -> None:
    """Rates of factors and replicas, by the rules, and all that follows are bitwise those of the head that went on."""
    run_settings = settings(lte={"layers": RULES, "lora_bias": "lora", "adapt": ("linear", "norm")}, steps=12, merge_iter=2)
    head = started(Scheduled(optimizer="lora-muon"), run_settings)
    for sequence in range(1, 5):
        contribution = head.train_round()
        head.adopt(ContributionResult(0, sequence, False, 0, "a test"), 0, None)
        if sequence == 2:
            other = restored(head, Scheduled(optimizer="lora-muon"), run_settings)
        if sequence > 2:
            assert torch.equal(other.train_round().buffer, contribution.buffer)
            other.adopt(ContributionResult(0, other.sequence, False, 0, "a test"), 0, None)
    assert sorted(set(multipliers(other).values())) == pytest.approx([0.0, 0.1, 1.0, 2.0])


def test_a_multiplier_of_zero_moves_nothing_and_of_two_moves_twice_as_far() -> None:
    """One step of SGD from the same start."""
    plain, other = started(Tiny(), settings()), started(Tiny(), settings(lte={"layers": RULES}))
    before = trained(plain)
    for head in (plain, other):
        head.backward(head.next_batch())
        head.finish_step()
    for name, value in before.items():
        step, scaled = trained(plain)[name] - value, trained(other)[name] - value
        multipliers = {"up.weight.lora_A": 2.0, "up.weight.lora_B": 2.0, "up.bias": 2.0, "scale": 0.1, "down.bias": 0.0}
        factor = multipliers.get(name, 1.0)
        # Each of the two differences rounds at the size of the weight.
        assert_near(scaled, factor * step, 1e-15)


class Dropping(Tiny):
    """Makes one group of all parameters."""

    def build_optimizer(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for group in params for p in group["params"]], lr=0.01)


class Renaming(Tiny):
    """Makes new groups without the keys of those that it was given."""

    def build_optimizer(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": group["params"], "lr": 0.01} for group in params])


class Splitting(Tiny):
    """Splits each group by whether it decays, keeps the groups' keys, and leaves out what it doesn't train."""

    def build_optimizer(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        groups = []
        for group in params:
            for decays in (True, False):
                chosen = [p for p in group["params"] if (p.ndim > 1) == decays]
                groups.append({**group, "params": chosen, "weight_decay": 0.1 * decays, "lr": 0.01})
        return torch.optim.SGD([g for g in groups if g["params"]])


@pytest.mark.parametrize("worker", [Dropping(), Renaming()])
def test_an_optimizer_that_drops_the_groups_is_an_error_if_there_are_multipliers(worker: Tiny) -> None:
    """The error says how to keep them. Without multipliers the worker is free."""
    started(worker, settings()).train_round()
    with pytest.raises(WorkerFailed, match=r"(?s)build_optimizer\(\) doesn't keep the parameter groups.*\{\*\*group"):
        started(worker, settings(lte={"layers": RULES}))


class OneCycle(Tiny):
    """A schedule that replaces the groups' rates."""

    def build_schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> lr_scheduler.LRScheduler:
        return lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=total_steps)


class OwnCycles(Tiny):
    """The same, with each group's own rate as its highest."""

    def build_schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> lr_scheduler.LRScheduler:
        highest = [group["lr"] for group in optimizer.param_groups]
        return lr_scheduler.OneCycleLR(optimizer, max_lr=highest, total_steps=total_steps)


def test_a_schedule_that_forgets_the_multipliers_is_an_error_that_says_how_to_keep_them() -> None:
    """OneCycleLR with one rate for all is an error only if there are multipliers; with a rate for each group they hold."""
    started(OneCycle(), settings()).train_round()
    with pytest.raises(WorkerFailed, match=r"(?s)build_schedule\(\).*one rate \(0.0004\).*max_lr=\[g\['lr'\]"):
        started(OneCycle(), settings(lte={"layers": RULES}))
    ratios = multipliers(started(OwnCycles(), settings(lte={"layers": RULES})))
    assert ratios["up.bias"] == pytest.approx(2 * ratios["down.weight.lora_A"])
    assert ratios["scale"] == pytest.approx(0.1 * ratios["down.weight.lora_A"])
    assert ratios["down.bias"] == 0.0


def test_an_optimizer_may_split_the_groups_that_it_is_given() -> None:
    """Each parameter keeps its multiplier."""
    ratios = multipliers(started(Splitting(), settings(lte={"layers": RULES})))
    assert {name: f for name, f in ratios.items() if f != 1.0} == {
        "up.weight.lora_A": 2.0,
        "up.weight.lora_B": 2.0,
        "up.bias": 2.0,
        "scale": pytest.approx(0.1),
        "down.bias": 0.0,
    }


def test_groups_are_named_and_one_for_each_multiplier() -> None:
    """Without multipliers there are two, without that key. Groups of factors have each product's scaling."""
    plan = Plan(
        (Adapted("a", (2, 2), 1, 1.0), Adapted("b", (2, 2), 1, 3.0, lr=2.0)), (Replica("c", (2,)), Replica("d", (2,), lr=2.0))
    )
    tensors = {e.name: nn.Parameter(torch.zeros(e.shape)) for e in plan.contribution.entries}
    given: list[Any] = []

    class Worker(Tiny):
        def build_optimizer(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
            given.extend(params)
            return torch.optim.SGD(params, lr=0.5)

    optimizer, schedule = build_optimizer(Worker(), plan, tensors, TrainConfig())
    assert schedule is None
    assert [(g["name"], g["lr_multiplier"], g["lr"], len(g["params"])) for g in optimizer.param_groups] == [
        ("lora", 1.0, 0.5, 2),
        ("lora", 2.0, 1.0, 2),
        ("replica", 1.0, 0.5, 1),
        ("replica", 2.0, 1.0, 1),
    ]
    assert [g.get("scalings") for g in optimizer.param_groups] == [[1.0], [3.0], None, None]
    given.clear()
    alike = Plan((plan.adapted[0],), (plan.replicas[0],))
    build_optimizer(Worker(), alike, tensors, TrainConfig())
    assert [(g["name"], "lr_multiplier" in g) for g in given] == [("lora", False), ("replica", False)]


# -- recomputed activations --------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.4)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return x + self.dropout(torch.tanh(self.norm(self.linear(x)))) * scale


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.out = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.out(x)


def gradients(patterns: tuple[str, ...], seed: int = 0) -> tuple[dict[str, Tensor | None], dict[str, Tensor], int]:
    """Gradients, running statistics, and how often the first block's linear layer was computed."""
    torch.manual_seed(seed)
    model = convert(Blocks(), LTEConfig(num_heads=1, lora_r=2, lora_alpha=4.0)).model.train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)  # B != 0
    calls: list[int] = []
    model.blocks[0].linear.register_forward_pre_hook(lambda module, args: calls.append(1))
    checkpoint_activations(model, patterns)
    torch.manual_seed(7)
    x = torch.randn(5, 6, requires_grad=True)
    model(x).square().mean().backward()
    actual = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad}
    return actual, {name: b.clone() for name, b in model.named_buffers()}, len(calls)


@pytest.mark.parametrize(
    ("patterns", "times"),
    [((), 1), (("blocks.*",), 2), (("blocks",), 2), (("blocks.0", "blocks.0.norm", "out"), 2), (("*",), 2), (("blocks.1",), 1)],
)
def test_recomputed_activations_give_bitwise_the_same_gradients(patterns: tuple[str, ...], times: int) -> None:
    """With dropout, keywords and batch normalization, which counts a batch once; of nested modules the outermost is wrapped."""
    expected, statistics, _ = gradients(())
    actual, kept, calls = gradients(patterns)
    assert calls == times
    assert expected.keys() == actual.keys()
    for name, gradient in expected.items():
        assert (gradient is None) == (actual[name] is None)
        assert gradient is None or torch.equal(actual[name], gradient), name
    for name, buffer in statistics.items():
        assert torch.equal(kept[name], buffer), name


def test_a_run_with_recomputed_activations_is_bitwise_the_run_without() -> None:
    """Through heads, merges and dropout."""
    worker = Tiny(dropout=0.3)
    plain = run_in_process(worker, settings(), torch.float64)
    again = run_in_process(worker, settings({"checkpoint_activations": ("up", "norm", "dropout", "mid")}), torch.float64)
    assert torch.equal(again.base, plain.base)


@pytest.mark.parametrize("patterns", [("blcoks.*",), ("blocks.7",), ("out", "nothing")])
def test_a_pattern_without_a_module_is_an_error_before_any_head_starts(patterns: tuple[str, ...]) -> None:
    """The error names the pattern and the modules of the model."""

    class Stacked(Regression):
        def build_model(self) -> nn.Module:
            return Blocks()

    with pytest.raises(ConfigError, match=r"--checkpoint-activations '.*' matches no module of the model.*blocks.0"):
        prepare(Stacked(width=6), settings({"checkpoint_activations": patterns}))


def test_a_list_without_modules_is_no_module() -> None:
    """A ModuleList isn't called; a pattern that names nothing below one is an error, in the check and in the head."""
    model = nn.Module()
    model.blocks, model.out = nn.ModuleList(), nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="'blocks' matches no module"):
        checkpoint_activations(model, ("blocks",))

    class Hollow(Regression):
        def build_model(self) -> nn.Module:
            return model

    with pytest.raises(ConfigError, match="'blocks' matches no module"):
        prepare(Hollow(width=4), settings({"checkpoint_activations": ("blocks",)}))


# -- single steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "fp16-mixed"])
def test_a_schedule_is_stepped_once_a_step(precision: str) -> None:
    """However many batches a step takes."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    update = OptimizerStep(optimizer, schedule, TrainConfig(accumulate=2, precision=precision), CPU)  # type: ignore[arg-type]
    for step in range(3):
        for _ in range(2):
            update.scale_loss((weight * torch.tensor([1.0, 2.0])).sum()).backward()
        update.step()
        assert optimizer.param_groups[0]["lr"] == 0.5 ** (step + 1)
        assert weight.grad is None
    assert torch.equal(weight.detach(), torch.tensor([1.0, 1.0]) - torch.tensor([1.0, 2.0]) * (1 + 0.5 + 0.25))


@pytest.mark.parametrize(
    ("loss", "returned"), [(lambda: torch.ones(3), r"shape \(3,\)"), (lambda: 1.0, "float"), (lambda: None, "NoneType")]
)
def test_a_loss_that_is_no_scalar_is_an_error(loss: Callable[[], Any], returned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it isn't found before the run, the error names the head, the step and what was returned."""
    monkeypatch.setattr("lte_ray.engine.prepare.check_first_loss", lambda *arguments: None)

    class Bad(Tiny):
        def loss(self, model: nn.Module, batch: Any) -> Any:
            return loss()

    with pytest.raises(WorkerFailed, match=rf"(?s)head 0 at local step 1.*must return a scalar tensor.*it returned {returned}"):
        started(Bad(), settings()).train_round()


def test_a_torch_that_cannot_compile_is_refused() -> None:
    """Before any actor starts, and only if the run compiles."""
    check_compile(TrainConfig(), "2.7.0+cpu")
    check_compile(TrainConfig(compile=True), "2.13.0+cpu")
    with pytest.raises(ConfigError, match=r"--compile is set, but torch 2\.7\.0\+cpu fails to compile .*upgrade torch: 2\.13"):
        check_compile(TrainConfig(compile=True), "2.7.0+cpu")


@pytest.mark.skipif(torch.__version__ < "2.8", reason="this torch can't compile models with factors")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_run_is_the_eager_run(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """torch.compile changes the order of float32 sums, and nothing else: traced, and with its compiler, which takes long."""
    traced = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda model: traced(model, backend=backend))
    worker = Single()
    eager, compiled = (run_in_process(worker, settings({"compile": on}, steps=6, heads=1)) for on in (False, True))
    # Some hundred roundings in each of 6 steps of SGD with rate 0.01.
    assert_near(compiled.base, eager.base, 100 * EPS32)
    assert compiled.merges[-1].losses[0] == pytest.approx(eager.merges[-1].losses[0], rel=1e-4)
