"""Arms in one process: all see equally many samples, are evaluated as often, and equal the run that `train` makes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.config.ladder import LadderConfig
from lte_ray.engine.in_process import evaluate_base, run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.errors import ConfigError, WorkerFailed
from lte_ray.ladder import Arm, Point, ProcessRunner, check_arms, spacing
from lte_ray.ladder.arms import DEFAULTS
from lte_ray.ladder.checks import rank_facts
from lte_ray.ladder.rungs import make_rungs
from lte_ray.layout import Adapted, Plan
from tests.support.tiny_worker import BATCH, Tiny

LTE = LTEConfig(num_heads=3, lora_r=2, lora_alpha=4.0)
TRAIN = TrainConfig(steps=12, seed=3, threads_per_head=1)
RUN = ProcessRunner(Tiny(), torch.float64)


def rungs(train: TrainConfig = TRAIN, merge: MergeConfig | None = None, **ladder: object) -> list[Arm]:
    config = LadderConfig(**({"merge_iters": (1, 2)} | ladder))  # type: ignore[arg-type]
    return [arm.with_rate(1.0, arm.seed) for arm in make_rungs(config, LTE, merge or MergeConfig(), train)]


def test_all_rungs_are_evaluated_after_equally_many_samples() -> None:
    """Six evaluations of ordinary training, mhlora, and two rungs of LTE; only rungs of LTE send anything."""
    results = [RUN(arm) for arm in rungs()]
    assert [r.rung for r in results] == ["ordinary", "mhlora", "merge_iter=1", "merge_iter=2"]
    assert {tuple((p.step, p.samples) for p in r.points) for r in results} == {
        tuple((step, step * 3 * BATCH) for step in (2, 4, 6, 8, 10, 12))
    }
    ordinary, mhlora, one, two = results
    assert ordinary.sent == mhlora.sent == mhlora.ddp == 0
    assert one.sent == 2 * two.sent > 0
    size = prepare(Tiny(), rungs()[2].settings).plan.base.size
    assert ordinary.ddp == one.ddp == two.ddp == round(2 * 2 / 3 * size * 4 * 12 * 3)  # a ring of three, 36 gradients of fp32
    assert len({r.final("loss") for r in results}) == 4


def test_an_arm_is_the_run_with_its_settings() -> None:
    """The final figure is that of the same settings' run, in every bit; the listener hears of each merge."""
    arm, heard = rungs()[3], list[tuple[int, Point | None]]()
    result = RUN(arm, lambda heard_arm, step, point: heard.append((step, point)))
    run = run_in_process(Tiny(), arm.settings, torch.float64)
    expected = evaluate_base(Tiny(), prepare(Tiny(), arm.settings), run.base)
    assert dict(result.figures) == expected
    assert [step for step, _ in heard] == [2, 4, 6, 8, 10, 12, 12]
    assert tuple(point for _, point in heard if point is not None) == result.points


def test_a_rate_multiplies_every_learning_rate() -> None:
    """In all modes: half the rate of SGD at a rate of 2 gives the same weights as the rate itself."""

    class Half(Tiny):
        def build_optimizer(self, params: list[dict]) -> torch.optim.Optimizer:
            return torch.optim.SGD(params, lr=0.005, momentum=0.9)

    for arm in rungs():
        doubled = ProcessRunner(Half(), torch.float64)(arm.with_rate(2.0, arm.seed))
        assert doubled.final("loss") == RUN(arm).final("loss"), arm.rung


def test_evaluations_follow_merges_that_are_rarer() -> None:
    """With 5 steps between merges and an evaluation due every 2, each comes at the next merge, and one at the end."""
    arm = replace(rungs(merge_iters=(5,), rungs=("lte",))[0], evaluate_every=2)
    assert [p.step for p in RUN(arm).points] == [5, 10, 12]
    assert [p.step for p in RUN(replace(arm, evaluate_every=0)).points] == [12]


@pytest.mark.parametrize(
    ("steps", "merge_iters", "expected"),
    [(700, (1, 10, 50), 50), (70, (1, 10), 10), (700, (1, 7, 9, 11), 50), (12, (1, 2), 2), (1, (1,), 1), (4000, (10,), 290)],
)
def test_evaluations_are_due_where_all_rungs_merge(steps: int, merge_iters: tuple[int, ...], expected: int) -> None:
    """About fourteen times, at multiples of all intervals where that leaves enough of them."""
    every = spacing(steps, merge_iters)
    assert every == expected


DEFAULTS_OF_RESULTS = {
    LTEConfig: {
        "num_heads": 2,
        "lora_r": 64,
        "lora_alpha": 128.0,
        "rslora": False,
        "lora_bias": "replica",
        "reset": "none",
        "adapt": ("linear", "attention", "conv"),
        "others": "replica",
        "base_dtype": "fp32",
        "full_rank": False,
        "merge_buffers": ("auto",),
    },
    MergeConfig: {
        "merge_iter": 10,
        "policy": "auto",
        "policy_args": None,
        "merge_schedule": "",
        "when": "barrier",
        "quorum": 0,
        "wait": True,
        "transfer": "fp32",
        "replica_topk": 1.0,
        "send_down": "auto",
        "never_merge": False,
        "max_norm_z": 8.0,
        "rollback_z": 0.0,
    },
    TrainConfig: {
        "steps": 700,
        "seed": 0,
        "precision": "fp32",
        "optimizer": "auto",
        "lr": None,
        "replica_lr": None,
        "schedule": "auto",
        "warmup": None,
        "clip_norm": 0.0,
        "ema": 0.0,
        "accumulate": 1,
        "weight_decay": None,
        "lr_scale": 1.0,
        "baseline": False,
    },
}
"""Defaults that decide what arms train. Raise `lte_ray.ladder.arms.DEFAULTS` with any change here."""


@pytest.mark.parametrize("config", DEFAULTS_OF_RESULTS)
def test_kept_results_are_of_todays_defaults(config: type) -> None:
    """An arm's key leaves defaults out, so a changed default needs another number in the keys."""
    assert DEFAULTS == 1
    assert {name: getattr(config(), name) for name in DEFAULTS_OF_RESULTS[config]} == DEFAULTS_OF_RESULTS[config]


def test_arms_with_other_workers_and_policies_have_other_keys() -> None:
    """Keys depend on what is trained: not on names, evaluations or threads, and for ordinary training not on merging."""
    ordinary, mhlora, one, two = rungs()
    renamed = replace(one, rung="other", evaluate_every=7, train=replace(one.train, eval_every=3, threads_per_head=2))
    assert renamed.key == one.key
    different = [
        *(ordinary, mhlora, one, two, one.with_rate(2.0, 3), one.with_rate(1.0, 4), replace(one, worker={"dropout": 0.5})),
        replace(one, merge=replace(one.merge, policy="nesterov")),
        replace(one, lte=replace(one.lte, lora_r=3)),
    ]
    assert len({arm.key for arm in different}) == len(different)
    assert replace(ordinary, merge=MergeConfig(merge_iter=99)).key == ordinary.key


def test_arguments_of_an_arm_replace_the_workers() -> None:
    """By name; unknown ones are errors."""
    arm = replace(rungs()[2], worker={"optimizer": "adamw"})
    assert arm.make_worker(Tiny(dropout=0.25)) == Tiny(dropout=0.25, optimizer="adamw")
    with pytest.raises(ConfigError, match=r"Tiny has no argument 'optimiser'. It has: dropout, optimizer"):
        replace(arm, worker={"optimiser": "adamw"}).make_worker(Tiny())


def test_quick_takes_fewer_steps_and_leaves_out_rungs_that_hardly_merge() -> None:
    """A tenth of 700; 50 steps at least; merge_iter=50 would merge twice in 70."""
    arms = rungs(replace(TRAIN, steps=700), MergeConfig(merge_iter=10), merge_iters=(), quick=True)
    assert [arm.rung for arm in arms] == ["ordinary", "mhlora", "merge_iter=1", "merge_iter=10"]
    assert {(arm.train.steps, arm.evaluate_every) for arm in arms} == {(70, 10)}
    assert rungs(replace(TRAIN, steps=60), quick=True)[0].train.steps == 50


@pytest.mark.parametrize(
    ("optimizer", "chosen", "expected"),
    [
        ("auto", "auto", ("auto", None)),
        ("lora-muon", "auto", ("muon", 0.1)),
        ("lora-muon", "adamw", ("adamw", None)),
        ("lora-plus", "auto", ("adamw", 0.1)),
        ("lora-plus", "adamw", ("adamw", 0.1)),
        ("lora-plus", "muon", ("muon", None)),
    ],
)
def test_ordinary_training_has_an_optimizer_for_weights(optimizer: str, chosen: str, expected: tuple) -> None:
    """The counterpart of the heads', at the same rate; or another one, at its default rate."""
    train = replace(TRAIN, optimizer=optimizer, lr=0.1)
    ordinary, *others = (arm.train for arm in rungs(train, ordinary_optimizer=chosen))
    assert (ordinary.optimizer, ordinary.lr) == expected
    assert {(other.optimizer, other.lr) for other in others} == {(optimizer, 0.1)}


@pytest.mark.parametrize(
    ("ladder", "train", "merge", "message"),
    [
        ({"merge_iters": (13,)}, {}, {}, "--merge-iters has 13, but there are 12 steps"),
        ({"merge_iters": (20,), "quick": True}, {}, {}, "No rung of lte is left: with 50 steps none of 20 merges 5 times"),
        ({}, {"lr_scale": 2.0}, {}, "takes no --lr-scale: the ladder multiplies"),
        ({}, {"baseline": True}, {}, "takes no --baseline"),
        ({}, {}, {"merge_every": "5s"}, "takes no --merge-every"),
        ({}, {}, {"merge_schedule": "0:1 0.5:10"}, "takes no --merge-schedule"),
        ({}, {}, {"wait": False}, "takes no --no-wait: in one process"),
        ({"rungs": ()}, {}, {}, "--rungs is empty"),
        ({"rungs": ("lre",)}, {}, {}, "--rungs is 'lre', but it must be one of: ordinary, mhlora, lte. Did you mean lte"),
        ({"rates": (0.0, 1.0)}, {}, {}, r"--rates is \[0.0, 1.0\], but each must be a finite number above 0"),
        ({"merge_iters": (0,)}, {}, {}, r"--merge-iters is \[0\], but each must be a whole number, at least 1"),
        ({"seeds": (-1,)}, {}, {}, r"--seeds is \[-1\], but each must be a whole number, at least 0"),
        ({"on": "cluster"}, {}, {}, "--on is 'cluster', but it must be one of: process, ray"),
    ],
)
def test_settings_that_cannot_be_compared_are_refused(ladder: dict, train: dict, merge: dict, message: str) -> None:
    """One error that names the flag, before anything trains."""
    with pytest.raises(ConfigError, match=message):
        rungs(replace(TRAIN, **train), MergeConfig(**merge), **ladder)


@pytest.mark.parametrize(("lte", "name"), [({"adapt": ()}, "--adapt none"), ({"full_rank": True}, "--full-rank")])
def test_a_ladder_needs_factors(lte: dict, name: str) -> None:
    """What trains without any is refused."""
    with pytest.raises(ConfigError, match=f"takes no {name}: the ladder compares factors with ordinary training"):
        make_rungs(LadderConfig(), replace(LTE, **lte), MergeConfig(), TRAIN)


def test_a_check_finds_the_figure_and_the_facts() -> None:
    """Of an untrained model: the figure, the ranks of all heads, the largest dimension, and the rank that it needs."""
    checked = check_arms(Tiny(), rungs(), (0.5, 1.0), "")
    assert checked.figure.name == "loss"
    facts = checked.facts
    assert (facts.policy, facts.builds_optimizer, facts.orthogonalizes) == ("average", True, False)
    muon = check_arms(Tiny(optimizer="lora-muon"), rungs(), (1.0,), "").facts
    assert (muon.policy, muon.orthogonalizes) == ("orthogonal", True)
    assert (facts.num_heads, facts.total_rank, facts.largest_dimension, facts.needed_rank) == (3, 6, 8, 3)
    assert checked.facts.optimizers == dict.fromkeys(("ordinary", "mhlora", "merge_iter=1", "merge_iter=2"), "SGD")
    with pytest.raises(ConfigError, match=r"--figure is 'los', .* Did you mean loss"):
        check_arms(Tiny(), rungs(), (1.0,), "los")


@pytest.mark.parametrize(
    ("shapes", "ranks", "expected"),
    [
        ([(8, 8)], [4, 4], (8, 8, 0)),
        ([(8, 8)], [2, 4], (6, 8, 4)),
        ([(8, 64), (8, 8)], [4, 4], (8, 64, 8)),
        ([(8, 64)], [8, 8], (16, 64, 0)),
        ([(100, 60)], [10] * 4, (40, 100, 25)),
    ],
)
def test_the_rank_that_a_model_needs(shapes: list[tuple[int, int]], ranks: list[int], expected: tuple[int, int, int]) -> None:
    """Heads x rank reaches the largest dimension, unless each head can make any change already."""
    plans = [Plan(tuple(Adapted(f"w{i}", shape, rank, 1.0) for i, shape in enumerate(shapes)), ()) for rank in ranks]
    assert rank_facts(plans) == expected


def test_an_evaluation_that_fails_says_so() -> None:
    """Before any training, with the worker's traceback."""

    class Fails(Tiny):
        def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
            return 3.0  # type: ignore[return-value]

    with pytest.raises(WorkerFailed, match=r"(?s)in the evaluation.*must return a dict of names and numbers, but returned 3.0"):
        check_arms(Fails(), rungs(), (1.0,), "")


def test_a_schedule_with_rates_of_its_own_cannot_be_swept() -> None:
    """OneCycleLR with one number ignores the optimizer's rates: an error, rather than a sweep of nothing."""

    class Fixed(Tiny):
        def build_schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> object:
            return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=total_steps)

    with pytest.raises(
        ConfigError, match=r"--lr-scale is 0.5, but build_schedule\(\) makes the highest rate 0.099\d*, where it is 0.099"
    ):
        check_arms(Fixed(), rungs(), (0.5, 1.0), "")
