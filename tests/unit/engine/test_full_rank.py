"""Full rank: the weights that would get factors train themselves, which is local SGD or DiLoCo."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lte_ray.adapters.plan import make_plan, make_plans
from lte_ray.config import LTEConfig, MergeConfig
from lte_ray.data import Shard
from lte_ray.engine.head.head import Head
from lte_ray.engine.in_process import InProcessRun, run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError, WorkerError
from lte_ray.merging.flat_buffer import gather
from lte_ray.merging.registry import POLICIES
from lte_ray.modes.prepare import prepare_model_for_lte
from lte_ray.worker import build_model, endless_batches
from tests.support.numerics import assert_near
from tests.support.plan_cases import ALL_KINDS, TiedModel, make_config, model_of_every_kind
from tests.support.tiny_worker import ADAPTED, REPLICAS, Tiny, make_settings


def full_rank_settings(lte: dict[str, Any] | None = None, merge: dict[str, Any] | None = None, **changes: Any) -> Settings:
    settings = make_settings(**changes)
    lte_config = replace(settings.lte, **{"full_rank": True} | (lte or {}))
    return replace(settings, lte=lte_config, merge=replace(settings.merge, **merge or {}))


def run(settings: Settings, worker: Tiny | None = None, **how: Any) -> InProcessRun:
    return run_in_process(worker or Tiny(), settings, torch.float64, **how)


def local_sgd(worker: Tiny, settings: Settings, outer: torch.optim.Optimizer | None, weights: list[Tensor]) -> None:
    """Trains `weights` as DiLoCo's algorithm 1 says, in plain PyTorch; with their mean if there is no outer optimizer."""
    heads = []
    for number in range(settings.lte.num_heads):
        model = build_model(worker, settings.train.seed)
        shard = Shard(number, settings.lte.num_heads, settings.train.seed)
        optimizer = worker.build_optimizer([{"params": list(model.parameters())}])
        heads.append((model, optimizer, endless_batches(worker, shard)))
    for _ in range(settings.train.steps // settings.merge.merge_iter):
        for model, optimizer, batches in heads:
            with torch.no_grad():
                for p, w in zip(model.parameters(), weights, strict=True):
                    p.copy_(w)
            for _ in range(settings.merge.merge_iter):
                worker.loss(model, next(batches)).backward()
                optimizer.step()
                optimizer.zero_grad()
        for w, *local in zip(weights, *(model.parameters() for model, *_ in heads), strict=True):
            mean = torch.stack([p.detach() for p in local]).mean(0)
            if outer is None:
                w.data.copy_(mean)
            else:
                w.grad = w.detach() - mean
        if outer is not None:
            outer.step()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("policy", ["average", "nesterov"])
@pytest.mark.parametrize("lte", [{}, {"full_rank": False, "adapt": ()}], ids=["full-rank", "adapt-none"])
def test_full_rank_is_local_sgd_and_with_nesterov_diloco(lte: dict[str, Any], policy: str, optimizer: str) -> None:
    """Three heads, four merges: equal to plain loops, with the mean or torch's SGD with Nesterov momentum outside.

    So is a run in which nothing is adapted.
    """
    worker, args = Tiny(optimizer=optimizer), {"lr": 0.5, "momentum": 0.6} if policy == "nesterov" else None
    settings = full_rank_settings(lte, heads=3, merge={"policy": policy, "policy_args": args})
    result = run(settings, worker)
    assert not result.plan.adapted
    model = build_model(worker, settings.train.seed)
    weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
    outer = torch.optim.SGD(weights, lr=0.5, momentum=0.6, nesterov=True) if args else None
    local_sgd(worker, settings, outer, weights)
    named = dict(zip([name for name, _ in model.named_parameters()], weights, strict=True))
    initial = prepare(worker, settings, torch.float64).base
    assert not torch.allclose(result.base, initial, atol=1e-2)
    assert_near(result.base, gather(result.plan.base, named, torch.float64), 1e-11)


def test_the_weights_with_factors_are_those_that_train_in_full() -> None:
    """The base's layout is the same; matrices are marked, norms aren't; ranks and alphas don't count."""
    for model in (model_of_every_kind(), nn.Sequential(TiedModel().up, nn.LayerNorm(4))):
        for settings in ({}, {"adapt": ALL_KINDS}, {"lora_bias": "frozen"}, {"layers": ("@linear: lora_r=1 lr=0.5",)}):
            lora, full = (make_plan(model, make_config(full_rank=full, **settings)) for full in (False, True))
            assert full.base == lora.base
            weights, others = full.replicas[: len(lora.adapted)], full.replicas[len(lora.adapted) :]
            assert [(w.name, w.lr, w.weight) for w in weights] == [(a.name, a.lr, len(a.shape) > 1) for a in lora.adapted]
            assert (full.adapted, others) == ((), lora.replicas)
    lora_r, lora_alpha = (1, 2), (1.0, 4.0)
    assert len(set(make_plans(TiedModel(), LTEConfig(full_rank=True, lora_r=lora_r, lora_alpha=lora_alpha)))) == 1


def test_a_model_with_nothing_to_adapt_trains_in_full() -> None:
    """Without factors there need be no layer that can have them."""
    plan = make_plan(nn.LayerNorm(4), LTEConfig(full_rank=True))
    assert [(r.name, r.weight) for r in plan.replicas] == [("weight", False), ("bias", False)]
    assert {r.weight for r in make_plan(nn.Linear(4, 4), LTEConfig(full_rank=True, exclude=("*",))).replicas} == {False}


@dataclass
class Groups(Tiny):
    """Trains the weights at a rate of their own, and leaves the rest as it is."""

    def build_optimizer(self, params: list[dict]) -> torch.optim.Optimizer:
        rates = {"weight": 0.01, "replica": 0.0}
        return torch.optim.SGD([{**group, "lr": rates[group["name"]]} for group in params], lr=1.0)


def test_the_optimizer_can_tell_weights_from_the_rest() -> None:
    """Parameter groups are named "weight" and "replica", with the multipliers of --layers."""
    head = Head(Groups(), full_rank_settings(lte={"layers": ("up: lr=0.5",)}), 0, dtype=torch.float64)
    names = {id(p): name for name, p in head.model.named_parameters()}
    groups = head.optimizer.param_groups
    assert {(g["name"], g["lr_multiplier"], g["lr"]): {names[id(p)] for p in g["params"]} for g in groups} == {
        ("weight", 1.0, 0.01): set(ADAPTED) - {"up.weight"},
        ("weight", 0.5, 0.005): {"up.weight"},
        ("replica", 1.0, 0.0): set(REPLICAS) - {"up.bias"},
        ("replica", 0.5, 0.0): {"up.bias"},
    }
    result = run(full_rank_settings(), Groups())
    before = prepare(Tiny(), full_rank_settings(), torch.float64).base
    changed = {
        e.name: not torch.equal(result.base[e.offset : e.offset + e.size], before[e.offset : e.offset + e.size])
        for e in result.plan.base.entries
    }
    assert changed == {name: name in ADAPTED for name in changed}


@pytest.mark.parametrize(
    ("merge", "how"),
    [
        ({}, {"heads_per_actor": 2}),
        ({}, {"heads_per_actor": 2, "stack_heads": "always"}),
        ({"send_down": "factors"}, {}),
        ({"transfer": "bf16"}, {}),
        ({"transfer": "int8", "replica_topk": 0.5}, {}),
    ],
)
def test_heads_and_formats_work_as_with_factors(merge: dict[str, Any], how: dict[str, Any]) -> None:
    """Virtual heads give the same weights; rounded or partial changes are close, since the rest is sent later."""
    exact, result = run(full_rank_settings(steps=24)), run(full_rank_settings(steps=24, merge=merge), **how)
    moved = torch.linalg.vector_norm(exact.base - prepare(Tiny(), full_rank_settings(), torch.float64).base)
    difference = torch.linalg.vector_norm(result.base - exact.base)
    if "transfer" in merge:
        assert 0 < difference <= 0.1 * moved
    else:
        assert difference <= 1e-9 * moved


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - {"gated"}))
def test_every_policy_merges_dense_changes(policy: str) -> None:
    """The loss falls with each of them, with three heads of which each trains in full."""
    args = {"lr": 0.1, "momentum": 0.9} if "nesterov" in policy else None
    result = run(full_rank_settings(heads=3, steps=24, merge={"policy": policy, "policy_args": args}))
    assert result.merges[-1].losses[0] < result.merges[0].losses[0]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"reset": "B"}, "--full-rank and --reset B contradict each other"),
        ({"base_dtype": "int8"}, "--full-rank and --base-dtype int8 contradict each other"),
        ({"lora_bias": "lora"}, "--full-rank and --lora-bias lora contradict each other"),
        ({"layers": ("a: base_dtype=bf16",)}, "--layers 'a: base_dtype=bf16'"),
        ({"layers": ("a: lora_bias=lora",)}, "--layers 'a: lora_bias=lora'"),
    ],
)
def test_settings_of_factors_that_would_change_what_trains_are_refused(settings: dict[str, Any], says: str) -> None:
    """Quantized weights can't train, and there is no B."""
    with pytest.raises(ConfigError) as raised:
        LTEConfig(full_rank=True, **settings)
    assert says in str(raised.value)
    LTEConfig(full_rank=True, layers=("a: base_dtype=fp32 lora_bias=frozen", "b: lora_r=2"), lora_bias="frozen")


def test_what_needs_factors_is_refused() -> None:
    """Shards by layer, the modes of one process, and weights with sparse gradients."""
    with pytest.raises(ConfigError, match="--full-rank and --shards 2 contradict"):
        Settings("r", LTEConfig(full_rank=True), MergeConfig(shards=2), make_settings().train)
    with pytest.raises(ConfigError, match="full_rank is for runs of LTETrainer"):
        prepare_model_for_lte(nn.Linear(4, 4), LTEConfig(full_rank=True))
    sparse = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 4))
    with pytest.raises(
        WorkerError, match=r"0\.weight would train in full with sparse gradients.*Build it with sparse=False\.$"
    ):
        make_plan(sparse, LTEConfig(full_rank=True, adapt=ALL_KINDS))
