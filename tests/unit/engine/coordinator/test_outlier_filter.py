"""Contributions that would move the base far more than others did are refused; healthy ones never, even if all change."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.coordinator.coordinator import Coordinator, EventResult
from lte_ray.engine.coordinator.validation import (
    GROWTH,
    MAX_DEVIATION,
    MAX_JUDGEMENTS,
    MIN_DEVIATION,
    MIN_WINDOW,
    QUARANTINE_AFTER,
    WINDOW,
    OutlierFilter,
)
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError
from lte_ray.merging.low_rank import squared_norm
from workers.regression import Regression

NORMS = st.floats(1e-6, 1e6)


def offer(outliers: OutlierFilter, head: int, norm: float, steps: int = 10) -> str:
    """Treats one contribution as the coordinator does; those that pass are merged at once."""
    reason = outliers.check(head, norm, steps)
    if reason:
        outliers.record_refusal(head)
    else:
        outliers.reset_refusals(head)
        outliers.record_merge(head, norm, steps)
    return reason


def filled(norm: float = 1.0, heads: int = 4, count: int = WINDOW, z: float = 8.0) -> OutlierFilter:
    outliers = OutlierFilter(MergeConfig(max_norm_z=z))
    assert not any(offer(outliers, n % heads, norm) for n in range(count))
    return outliers


@given(st.lists(st.tuples(st.integers(0, 3), NORMS), max_size=100), st.integers(-40, 40))
def test_the_unit_of_norms_does_not_matter(offers: list[tuple[int, float]], power: int) -> None:
    """All norms times c: the same are refused. (c = 2^k, so that rounding changes only the last bits of logarithms.)"""
    one, other = OutlierFilter(MergeConfig()), OutlierFilter(MergeConfig())
    first = [bool(offer(one, head, norm)) for head, norm in offers]
    assert first == [bool(offer(other, head, norm * 2.0**power)) for head, norm in offers]


@given(st.lists(st.floats(-0.2, 0.2), min_size=40, max_size=300), st.integers(1, 16), st.data())
def test_a_healthy_walk_is_never_refused(moves: list[float], heads: int, data: st.DataObject) -> None:
    """Norms whose level changes by up to 20 % a merge, with 20 % noise; heads contribute in turn."""
    outliers, level = OutlierFilter(MergeConfig()), 1.0
    for turn, move in enumerate(moves):
        if turn % 4 == 0:  # the level changes from merge to merge, each of four contributions
            level *= 1 + move
        assert offer(outliers, turn % heads, level * (1 + data.draw(st.floats(-0.2, 0.2)))) == ""


@given(st.lists(NORMS, min_size=MIN_WINDOW, max_size=2 * WINDOW), st.floats(100, 1e12), st.integers(1, 1000))
def test_a_hundred_times_the_median_is_always_refused(norms: list[float], times: float, steps: int) -> None:
    """However widely earlier norms were spread, once there were 16, and each time that one head of 4 offers it."""
    outliers = OutlierFilter(MergeConfig())
    for turn, norm in enumerate(norms):
        outliers.record_merge(turn % 4, norm * steps**GROWTH, steps)
    recent = sorted(norms[-WINDOW:])
    middle = math.sqrt(recent[(len(recent) - 1) // 2] * recent[len(recent) // 2])
    for head in (1, 2, 3):
        assert outliers.check(head, middle * steps**GROWTH, steps) == ""
    for _ in range(5):
        assert outliers.check(0, middle * times * steps**GROWTH, steps)


def test_the_reason_of_a_refusal() -> None:
    """It has the norm, its z, the median for that number of steps, and the flag; a tenth of the norm passes."""
    outliers = filled(3.1)
    reason = outliers.check(0, 812.0, 10)
    z = math.log(812 / 3.1) / MIN_DEVIATION
    assert reason == (
        f"its norm 812 is {z:.1f} robust standard deviations above the recent contributions' (median 3.1 for 10 steps); "
        "--max-norm-z is 8"
    )
    assert f"(median {3.1 * 2**GROWTH:.3g} for 20 steps)" in outliers.check(0, 812.0, 20)
    assert outliers.check(0, 81.2 * 0.9, 10) == ""


def test_the_threshold_follows_the_formula() -> None:
    """1.5^8 = 25.6 times for equal norms; 1.75^8 = 88 times for widely spread ones; with --max-norm-z 4, 1.5^4 = 5.1."""
    spread = OutlierFilter(MergeConfig())
    for turn in range(WINDOW):
        spread.record_merge(turn % 4, 10.0 ** (turn % 3 - 1), 1)
    for outliers, z, scale in ((filled(), 8, MIN_DEVIATION), (spread, 8, MAX_DEVIATION), (filled(z=4.0), 4, MIN_DEVIATION)):
        limit = math.exp(z * scale) * (1.0 if outliers is spread else 10**-GROWTH)
        assert outliers.check(0, limit * 0.999, 1) == ""
        assert outliers.check(0, limit * 1.001, 1)


def test_nothing_is_refused_before_sixteen_merges() -> None:
    """Before the 16th any norm passes; with 0 the filter is off."""
    assert filled(count=MIN_WINDOW - 1).check(0, 1e20, 10) == ""
    assert filled(count=MIN_WINDOW).check(0, 1e20, 10) != ""
    assert filled(z=0.0).check(0, 1e20, 10) == ""


def test_small_norms_and_zeros_pass_and_zeros_do_not_count() -> None:
    """A learning rate of 0 is neither refused nor makes the next contributions outliers."""
    outliers = filled()
    assert outliers.check(0, 1e-30, 10) == ""
    for turn in range(100):
        assert offer(outliers, turn % 4, 0.0) == ""
    assert offer(outliers, 0, 2.0) == ""


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_refused_at_once(norm: float) -> None:
    """Even before anything to compare with, and it isn't remembered."""
    outliers = OutlierFilter(MergeConfig())
    assert outliers.check(0, norm, 10) == f"its norm is {norm}"
    assert outliers.state() == OutlierFilter(MergeConfig()).state()


@pytest.mark.parametrize("exponent", [0.5, 1.0])
@pytest.mark.parametrize("times", [1 / 1000, 1 / 10, 10, 1000])
def test_a_head_that_was_away_is_not_refused(times: float, exponent: float) -> None:
    """It contributes 10 or 1000 times the others' steps, or 1/10 or 1/1000, as noise (k^0.5) or in one direction (k^1)."""
    outliers = OutlierFilter(MergeConfig())
    for turn in range(WINDOW):
        offer(outliers, turn % 4, 1.0, 1000)
    assert outliers.check(0, times**exponent, round(1000 * times)) == ""


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 16, 64, 100])
@pytest.mark.parametrize("times", [3.0, 1000.0])
def test_a_lasting_change_of_level_passes(heads: int, times: float) -> None:
    """If all norms triple, none is refused; if they grow a thousandfold, half of the heads are, once (a lone one too)."""
    outliers = filled(heads=heads, count=max(WINDOW, 2 * heads))
    refused = [bool(offer(outliers, turn % heads, times)) for turn in range(5 * heads + WINDOW)]
    assert sum(refused) == (0 if times == 3.0 else max(1, min(heads, MAX_JUDGEMENTS) // 2))
    assert not any(refused[heads if heads > 1 else 1 :])
    assert outliers.check(0, 100 * times, 10)  # compared with the new level


@pytest.mark.parametrize(("heads", "faulty"), [(2, 1), (3, 1), (4, 2), (16, 8)])
def test_a_faulty_minority_never_passes(heads: int, faulty: int) -> None:
    """Up to half of the heads always send a thousandfold, in any order among the others; each is refused each time."""
    outliers = filled(heads=heads)
    for turn in range(20 * heads):
        head = (turn * 7) % heads if heads % 7 else turn % heads
        assert bool(offer(outliers, head, 1000.0 if head < faulty else 1.0)) == (head < faulty)


def test_heads_that_diverge_differently_are_not_witnesses() -> None:
    """Three of four heads send a thousandfold, a millionfold and so on: only one common change counts."""
    outliers = filled()
    for power in range(1, 20):
        for head in range(3):
            assert outliers.check(head, 1000.0 ** (power + head), 10)
        assert offer(outliers, 3, 1.0) == ""


def test_the_third_refusal_in_a_row_quarantines() -> None:
    """Counted by head. One that passes, or a merge, resets the count; so does the quarantine."""
    outliers = OutlierFilter(MergeConfig())
    assert [outliers.record_refusal(0) for _ in range(QUARANTINE_AFTER)] == [False, False, True]
    assert [outliers.record_refusal(0) for _ in range(QUARANTINE_AFTER)] == [False, False, True]
    for reset in (lambda: outliers.reset_refusals(1), lambda: outliers.record_merge(1, 1.0, 1)):
        assert [outliers.record_refusal(1), outliers.record_refusal(1), outliers.record_refusal(2)] == [False] * 3
        reset()
    assert [outliers.record_refusal(1), outliers.record_refusal(1), outliers.record_refusal(2), outliers.record_refusal(1)] == [
        False,
        False,
        True,
        True,
    ]


def test_a_quarantined_head_is_not_a_witness() -> None:
    """One of three heads was quarantined for a thousandfold; another that sends it later is alone, and refused."""
    outliers = filled(heads=3)
    for _ in range(QUARANTINE_AFTER):
        assert offer(outliers, 0, 1000.0)
    for _ in range(QUARANTINE_AFTER - 1):
        assert offer(outliers, 2, 1.0) == ""
        assert offer(outliers, 1, 1000.0)


@given(st.lists(st.tuples(st.integers(0, 3), NORMS, st.integers(1, 100)), max_size=120), st.integers(0, 120))
def test_it_continues_from_a_checkpoint_as_if_uninterrupted(offers: list[tuple[int, float, int]], cut: int) -> None:
    """Through JSON, at any point: the same refusals, reasons and state."""
    uninterrupted, first, second = OutlierFilter(MergeConfig()), OutlierFilter(MergeConfig()), OutlierFilter(MergeConfig())
    expected = [offer(uninterrupted, *each) for each in offers]
    results = [offer(first, *each) for each in offers[:cut]]
    second.load_state(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert results + [offer(second, *each) for each in offers[cut:]] == expected
    assert second.state() == uninterrupted.state()


def test_an_empty_state_resets_it() -> None:
    """As in a checkpoint of a run without a filter."""
    outliers = filled()
    outliers.load_state({})
    assert outliers.state() == OutlierFilter(MergeConfig()).state()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lr", "lte", "merge"),
    [
        (3e-3, {}, {}),
        (3e-2, {}, {}),
        (3e-3, {"num_heads": 16}, {"merge_iter": 5}),
        (3e-3, {"reset": "B"}, {"merge_iter": 2}),
        (3e-3, {}, {"transfer": "int8", "when": "arrival"}),
    ],
)
def test_a_real_run_is_far_from_the_threshold(lr: float, lte: dict, merge: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training from scratch, also at ten times the rate: even half of the default z would refuse nothing."""
    outliers, receive, judged = OutlierFilter(MergeConfig(max_norm_z=4.0)), Coordinator.receive, []

    def watched(self: Coordinator, contribution: object, buffer: object) -> EventResult:
        c, share = contribution, self._tensors.share(contribution.head, buffer)  # type: ignore[attr-defined, arg-type]
        judged.append(offer(outliers, c.head, math.sqrt(squared_norm(share)), c.steps))  # type: ignore[attr-defined]
        return receive(self, contribution, buffer)  # type: ignore[arg-type]

    monkeypatch.setattr(Coordinator, "receive", watched)
    heads = LTEConfig(**({"num_heads": 4, "lora_r": 4, "lora_alpha": 16.0} | lte))
    settings = Settings("test", heads, MergeConfig(**({"merge_iter": 5} | merge)), TrainConfig(steps=60))
    run_in_process(Regression(width=8, batch_size=8, samples=1024, lr=lr), settings)
    assert len(judged) >= 48
    assert set(judged) == {""}


@pytest.mark.parametrize("name", ["max_norm_z", "rollback_z"])
def test_thresholds_are_zero_or_one_and_more(name: str) -> None:
    """Healthy contributions often differ by less than one deviation, so such a threshold is refused."""
    flag = "--" + name.replace("_", "-")
    for value in (0, 1, 8.5):
        assert getattr(MergeConfig(**{name: value}), name) == value
    for value in (0.5, -1.0, math.nan, math.inf, "8", True):
        with pytest.raises(ConfigError, match=f"^{flag} is {value!r}, but it must be "):
            MergeConfig(**{name: value})
