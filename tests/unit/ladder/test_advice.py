"""Advice: the conclusion, and a sentence with a flag for each place where a rung falls behind."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from lte_ray.ladder import Facts, RungResult, advise
from tests.support.ladders import DOUBLE, HALF, ONE, make_rung, make_summaries

FACTS = Facts(4, 256, 128, 0, 64.0, "average", {"ordinary": "AdamW", "merge_iter=1": "AdamW"}, builds_optimizer=False)


def advice(*rungs: RungResult, facts: Facts = FACTS) -> list[str]:
    return advise(make_summaries(*rungs), facts)


SEEDS = (2.0, 2.0, 2.0)


def rungs(mhlora: float = 2.0, one: float = 2.0, ten: float = 2.0, fifty: float = 2.0) -> list[RungResult]:
    """A ladder with ordinary training at 2, three equal seeds each."""
    values = {"ordinary": 2.0, "mhlora": mhlora, "merge_iter=1": one, "merge_iter=10": ten, "merge_iter=50": fifty}
    return [make_rung(name, [value] * 3) for name, value in values.items()]


def test_where_all_is_as_good_the_rarest_merges_are_recommended() -> None:
    """One sentence, with the flag."""
    assert advice(*rungs(fifty=2.03)) == [
        "With merge_iter=50, LTE is 1.5% behind ordinary training at equal samples: train with --merge-iter 50."
    ]


def test_another_optimizer_of_ordinary_training_is_named() -> None:
    """Since LTE's lead may be the optimizer's."""
    facts = replace(FACTS, optimizers={"ordinary": "AdamW", "merge_iter=50": "LoRAMuon"})
    assert advice(*rungs(), facts=facts)[0].startswith("With merge_iter=50, LTE is level with ordinary training by AdamW at")


def test_a_recommended_rate_is_named() -> None:
    """If the best rate isn't the worker's own."""
    lines = advice(make_rung("ordinary", SEEDS), make_rung("merge_iter=10", SEEDS, best=DOUBLE, sweep={ONE: 3.0, 4.0: 3.0}))
    assert lines == [
        "With merge_iter=10, LTE is level with ordinary training at equal samples: train with --merge-iter 10 --lr-scale 2."
    ]


def test_mhlora_behind_with_small_factors_asks_for_a_higher_rank() -> None:
    """4 heads of rank 16 for a dimension of 512 need rank 128."""
    small = replace(FACTS, total_rank=64, largest_dimension=512, needed_rank=128)
    lines = advice(*rungs(mhlora=2.2, one=2.2, ten=2.2, fifty=2.2), facts=small)
    assert lines[0].startswith("LTE is behind ordinary training at equal samples: its best rung, merge_iter=1, is 10.0% behind")
    assert "add up to 64, below the largest dimension of an adapted weight, 512. Raise --lora-r towards 128, and" in lines[1]
    assert len(lines) == 2


def test_mhlora_behind_with_large_factors_asks_for_other_alphas() -> None:
    """Twice and half of the current one."""
    behind = rungs(mhlora=2.2, one=2.2, ten=2.2, fifty=2.2)
    assert "Try --lora-alpha 128 and 32" in advice(*behind)[1]
    with_muon = advice(*behind, facts=replace(FACTS, optimizers={"merge_iter=1": "LoRAMuon"}))[
        1
    ]  # which alpha doesn't matter to
    assert "--lora-alpha" not in with_muon
    assert "Try other ratios of --lr to --replica-lr" in with_muon


@pytest.mark.parametrize(
    ("values", "expected", "silent"),
    [
        ({"one": 2.2, "ten": 2.2, "fifty": 2.2}, "merge_iter=1 is 10.0% behind mhlora, although it merges", "drift"),
        ({"fifty": 2.3}, "merge_iter=50 is 15.0% behind merge_iter=10: the heads drift", "although"),
        ({"ten": 2.3, "fifty": 2.3}, "Merge more often (--merge-iter 1).", "although"),
    ],
)
def test_the_step_of_the_ladder_that_falls_behind_is_named(values: dict[str, float], expected: str, silent: str) -> None:
    """Only that step; an optimizer for factors is proposed once."""
    lines = advice(*rungs(**values))
    text = " ".join(lines)
    assert expected in text
    assert silent not in text
    assert text.count("lora-muon") == 1


@pytest.mark.parametrize(
    ("policy", "expected", "silent"),
    [
        ("average", "An outer step can make up for a part of that: leave --policy out", "Tune"),
        ("orthogonal", "Tune the outer step (--policy orthogonal --help lists its arguments)", "leave --policy out"),
    ],
)
def test_with_an_optimizer_for_factors_the_outer_step_is_next(policy: str, expected: str, silent: str) -> None:
    """If merges have one, its arguments are to be tuned."""
    facts = replace(FACTS, policy=policy, optimizers={"ordinary": "Muon", "merge_iter=1": "LoRAMuon"})
    text = " ".join(advice(*rungs(fifty=2.3), facts=facts))
    assert expected in text
    assert silent not in text


@pytest.mark.parametrize(
    ("optimizer", "builds", "expected"),
    [
        ("AdamW", False, "Averages of LoRA-Muon's steps lose less than those of AdamW's: --optimizer lora-muon, and leave"),
        ("SGD", True, "than those of SGD's: use lte_ray.optim.LoRAMuon in build_optimizer(), and leave --policy out"),
        ("LoRAMuon", False, ""),
    ],
)
def test_an_optimizer_for_factors_is_proposed_unless_it_is_used(optimizer: str, builds: bool, expected: str) -> None:
    """Where averages lose something, and in the way in which the worker can get it."""
    facts = replace(FACTS, optimizers={"ordinary": "Muon", "merge_iter=1": optimizer}, builds_optimizer=builds)
    text = " ".join(advice(*rungs(fifty=2.3), facts=facts))
    assert expected in text
    assert ("LoRA-Muon" in text) == bool(expected)
    assert "LoRA-Muon" not in " ".join(advice(*rungs(), facts=facts))


def test_without_mhlora_the_first_rung_is_compared_with_ordinary_training() -> None:
    """And without ordinary training only with each other."""
    ordinary, _, one, *_ = rungs(one=2.2)
    assert "merge_iter=1 is 10.0% behind ordinary training, although" in advice(ordinary, one)[1]
    assert advice(one) == []


def test_a_best_rate_on_the_edge_is_said_first_if_it_is_ordinary_trainings() -> None:
    """Since then nothing is settled; otherwise it is said last."""
    edge = make_rung("ordinary", SEEDS, best=DOUBLE, sweep={HALF: 3.0, ONE: 2.5})
    lte = make_rung("merge_iter=10", SEEDS)
    first, second = advice(edge, lte)
    assert first == (
        "The best rate of ordinary (x2) is the highest that was tried, so a better one may lie beyond it: "
        "add --rates 0.5 1 2 4 8."
    )
    assert second.startswith("With merge_iter=10")
    low = make_rung("merge_iter=10", SEEDS, best=HALF, sweep={ONE: 3.0, DOUBLE: 2.5})
    assert advice(make_rung("ordinary", SEEDS), low)[-1].endswith("the lowest that was tried, so a better one may lie beyond "
                                                                   "it: add --rates 0.125 0.25 0.5 1 2.")  # fmt: skip


def test_without_a_sweep_nothing_is_settled() -> None:
    """Said first."""
    lines = advice(make_rung("ordinary", SEEDS, sweep={}), make_rung("merge_iter=10", SEEDS, sweep={}))
    assert lines[0] == "No rung's rate was tuned, so differences may be due to rates alone: give --rates 0.5 1 2."
    assert lines[1].startswith("With merge_iter=10")
    some = advice(make_rung("ordinary", SEEDS, sweep={}), make_rung("merge_iter=10", SEEDS))
    assert some[0].startswith("ordinary: no rate was tuned")


def test_divergence_is_named_with_its_rates() -> None:
    """At some rates, or at all of them."""
    some = make_rung("merge_iter=10", SEEDS, sweep={HALF: 2.5, DOUBLE: math.nan})
    assert advice(make_rung("ordinary", SEEDS), some)[-1] == "merge_iter=10 diverged at x2."
    never = make_rung("merge_iter=10", [math.nan] * 3, sweep={HALF: math.nan})
    lines = advice(make_rung("ordinary", SEEDS), never)
    assert lines[0].startswith("LTE is behind ordinary training at equal samples: its best rung, merge_iter=10, is far behind")
    assert lines[-1] == "merge_iter=10 diverged at every rate that was tried: give lower ones (--rates)."


def test_differences_within_chance_are_called_so() -> None:
    """One seed proves little; several that differ widely, too."""
    assert "add --seeds 0 1 2" in advice(make_rung("ordinary", 2.0), make_rung("merge_iter=10", 2.0))[-1]
    wide = advice(make_rung("ordinary", [2.0, 2.2, 1.8]), make_rung("merge_iter=10", SEEDS))
    assert wide[-1].startswith("Seeds differ by up to 10.0%")
