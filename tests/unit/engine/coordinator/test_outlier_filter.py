"""Contributions that would move the base far more than others did are refused; healthy ones never, also if all change."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.coordinator.coordinator import Coordinator, StepResult
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


def offer(guard: OutlierFilter, head: int, norm: float, steps: int = 10) -> str:
    """One contribution's way as the coordinator goes it; all that is fit is merged at once."""
    reason = guard.check(head, norm, steps)
    if reason:
        guard.record_refusal(head)
    else:
        guard.reset_refusals(head)
        guard.record_merge(head, norm, steps)
    return reason


def filled(norm: float = 1.0, heads: int = 4, count: int = WINDOW, z: float = 8.0) -> OutlierFilter:
    guard = OutlierFilter(MergeConfig(max_norm_z=z))
    assert not any(offer(guard, n % heads, norm) for n in range(count))
    return guard


@given(st.lists(st.tuples(st.integers(0, 3), NORMS), max_size=100), st.integers(-40, 40))
def test_the_unit_of_norms_does_not_matter(offers: list[tuple[int, float]], power: int) -> None:
    """All norms times c: the same are refused. (c = 2^k, so that rounding moves logarithms only in their last bits.)"""
    one, other = OutlierFilter(MergeConfig()), OutlierFilter(MergeConfig())
    first = [bool(offer(one, head, norm)) for head, norm in offers]
    assert first == [bool(offer(other, head, norm * 2.0**power)) for head, norm in offers]


@given(st.lists(st.floats(-0.2, 0.2), min_size=40, max_size=300), st.integers(1, 16), st.data())
def test_a_healthy_walk_is_never_refused(moves: list[float], heads: int, data: st.DataObject) -> None:
    """Norms that go up or down by up to 20 % of a contribution to the next's level, each head at it again after all others."""
    guard, level = OutlierFilter(MergeConfig()), 1.0
    for turn, move in enumerate(moves):
        if turn % 4 == 0:  # the level moves from merge to merge, in which there are several
            level *= 1 + move
        assert offer(guard, turn % heads, level * (1 + data.draw(st.floats(-0.2, 0.2)))) == ""


@given(st.lists(NORMS, min_size=MIN_WINDOW, max_size=2 * WINDOW), st.floats(100, 1e12), st.integers(1, 1000))
def test_a_hundred_times_the_median_is_always_refused(norms: list[float], times: float, steps: int) -> None:
    """However widely the norms before were spread, once there were 16, and each time that one head of 4 offers it."""
    guard = OutlierFilter(MergeConfig())
    for turn, norm in enumerate(norms):
        guard.record_merge(turn % 4, norm * steps**GROWTH, steps)
    recent = sorted(norms[-WINDOW:])
    middle = math.sqrt(recent[(len(recent) - 1) // 2] * recent[len(recent) // 2])
    for head in (1, 2, 3):
        assert guard.check(head, middle * steps**GROWTH, steps) == ""
    for _ in range(5):
        assert guard.check(0, middle * times * steps**GROWTH, steps)


def test_what_is_refused_and_why() -> None:
    """The sentence has the norm, its z, the median for as many steps, and the flag; a tenth of it passes."""
    guard = filled(3.1)
    reason = guard.check(0, 812.0, 10)
    z = math.log(812 / 3.1) / MIN_DEVIATION
    assert reason == (
        f"its norm 812 is {z:.1f} robust standard deviations above the recent contributions' (median 3.1 for 10 steps); "
        "--max-norm-z is 8"
    )
    assert f"(median {3.1 * 2**GROWTH:.3g} for 20 steps)" in guard.check(0, 812.0, 20)
    assert guard.check(0, 81.2 * 0.9, 10) == ""


def test_the_threshold_is_where_the_formula_has_it() -> None:
    """1.5^8 = 25.6 times equal norms; 1.75^8 = 88 times widely spread ones; with --max-norm-z 4, 1.5^4 = 5.1 times."""
    spread = OutlierFilter(MergeConfig())
    for turn in range(WINDOW):
        spread.record_merge(turn % 4, 10.0 ** (turn % 3 - 1), 1)
    for guard, z, scale in ((filled(), 8, MIN_DEVIATION), (spread, 8, MAX_DEVIATION), (filled(z=4.0), 4, MIN_DEVIATION)):
        limit = math.exp(z * scale) * (1.0 if guard is spread else 10**-GROWTH)
        assert guard.check(0, limit * 0.999, 1) == ""
        assert guard.check(0, limit * 1.001, 1)


def test_nothing_is_judged_before_there_were_sixteen() -> None:
    """The 16th merge is the last that anything goes before; with 0 the guard is off."""
    assert filled(count=MIN_WINDOW - 1).check(0, 1e20, 10) == ""
    assert filled(count=MIN_WINDOW).check(0, 1e20, 10) != ""
    assert filled(z=0.0).check(0, 1e20, 10) == ""


def test_small_norms_and_zeros_are_fit_and_zeros_say_nothing() -> None:
    """A learning rate of 0 neither is refused nor makes the next contributions stand out."""
    guard = filled()
    assert guard.check(0, 1e-30, 10) == ""
    for turn in range(100):
        assert offer(guard, turn % 4, 0.0) == ""
    assert offer(guard, 0, 2.0) == ""


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_no_number_is_refused_at_once(norm: float) -> None:
    """Before there is anything to compare with, and without a trace in what is remembered."""
    guard = OutlierFilter(MergeConfig())
    assert guard.check(0, norm, 10) == f"its norm is {norm}"
    assert guard.state() == OutlierFilter(MergeConfig()).state()


@pytest.mark.parametrize("exponent", [0.5, 1.0])
@pytest.mark.parametrize("times", [1 / 1000, 1 / 10, 10, 1000])
def test_a_head_that_was_away_is_not_refused(times: float, exponent: float) -> None:
    """It contributes 10 or 1000 times as many steps as others, or as few, of noise (k^0.5) or all in one direction (k^1)."""
    guard = OutlierFilter(MergeConfig())
    for turn in range(WINDOW):
        offer(guard, turn % 4, 1.0, 1000)
    assert guard.check(0, times**exponent, round(1000 * times)) == ""


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 16, 64, 100])
@pytest.mark.parametrize("times", [3.0, 1000.0])
def test_a_lasting_change_of_level_is_let_through(heads: int, times: float) -> None:
    """All heads' norms trebled: none is refused. A thousandfold: half of them are, or the lone one, once."""
    guard = filled(heads=heads, count=max(WINDOW, 2 * heads))
    refused = [bool(offer(guard, turn % heads, times)) for turn in range(5 * heads + WINDOW)]
    assert sum(refused) == (0 if times == 3.0 else max(1, min(heads, MAX_JUDGEMENTS) // 2))
    assert not any(refused[heads if heads > 1 else 1 :])
    assert guard.check(0, 100 * times, 10)  # which is compared with the new level


@pytest.mark.parametrize(("heads", "faulty"), [(2, 1), (3, 1), (4, 2), (16, 8)])
def test_a_faulty_minority_is_never_let_through(heads: int, faulty: int) -> None:
    """Up to half of the heads send a thousandfold for ever, in any turn among the others, and each is refused each time."""
    guard = filled(heads=heads)
    for turn in range(20 * heads):
        head = (turn * 7) % heads if heads % 7 else turn % heads
        assert bool(offer(guard, head, 1000.0 if head < faulty else 1.0)) == (head < faulty)


def test_heads_that_blow_up_apart_from_each_other_are_no_witnesses() -> None:
    """Three of four heads, a thousandfold, a millionfold and so on: a change that all go through is one."""
    guard = filled()
    for power in range(1, 20):
        for head in range(3):
            assert guard.check(head, 1000.0 ** (power + head), 10)
        assert offer(guard, 3, 1.0) == ""


def test_the_third_refusal_in_a_row_quarantines() -> None:
    """Counted by head; a fit one between, or a merge, begins anew, and so does whoever takes the head's place."""
    guard = OutlierFilter(MergeConfig())
    assert [guard.record_refusal(0) for _ in range(QUARANTINE_AFTER)] == [False, False, True]
    assert [guard.record_refusal(0) for _ in range(QUARANTINE_AFTER)] == [False, False, True]
    for mend in (lambda: guard.reset_refusals(1), lambda: guard.record_merge(1, 1.0, 1)):
        assert [guard.record_refusal(1), guard.record_refusal(1), guard.record_refusal(2)] == [False] * 3
        mend()
    assert [guard.record_refusal(1), guard.record_refusal(1), guard.record_refusal(2), guard.record_refusal(1)] == [
        False,
        False,
        True,
        True,
    ]


def test_a_quarantined_head_is_no_witness() -> None:
    """Of three heads one was quarantined for a thousandfold; another that sends it now is alone, and refused."""
    guard = filled(heads=3)
    for _ in range(QUARANTINE_AFTER):
        assert offer(guard, 0, 1000.0)
    for _ in range(QUARANTINE_AFTER - 1):
        assert offer(guard, 2, 1.0) == ""
        assert offer(guard, 1, 1000.0)


@given(st.lists(st.tuples(st.integers(0, 3), NORMS, st.integers(1, 100)), max_size=120), st.integers(0, 120))
def test_it_goes_on_after_a_checkpoint_as_if_there_had_been_none(offers: list[tuple[int, float, int]], cut: int) -> None:
    """Through JSON, at any point: the same refusals with the same words, the same quarantines, the same state."""
    whole, first, second = OutlierFilter(MergeConfig()), OutlierFilter(MergeConfig()), OutlierFilter(MergeConfig())
    expected = [offer(whole, *each) for each in offers]
    found = [offer(first, *each) for each in offers[:cut]]
    second.load_state(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert found + [offer(second, *each) for each in offers[cut:]] == expected
    assert second.state() == whole.state()


def test_no_state_is_a_new_guards() -> None:
    """A checkpoint of a run without guard."""
    guard = filled()
    guard.load_state({})
    assert guard.state() == OutlierFilter(MergeConfig()).state()


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
    """Training from scratch, also at ten times the rate: at half of the default z nothing would be refused."""
    guard, receive, judged = OutlierFilter(MergeConfig(max_norm_z=4.0)), Coordinator.receive, []

    def watched(self: Coordinator, contribution: object, buffer: object) -> StepResult:
        c, share = contribution, self._tensors.share(contribution.head, buffer)  # type: ignore[attr-defined, arg-type]
        judged.append(offer(guard, c.head, math.sqrt(squared_norm(share)), c.steps))  # type: ignore[attr-defined]
        return receive(self, contribution, buffer)  # type: ignore[arg-type]

    monkeypatch.setattr(Coordinator, "receive", watched)
    heads = LTEConfig(**({"num_heads": 4, "lora_r": 4, "lora_alpha": 16.0} | lte))
    settings = Settings("test", heads, MergeConfig(**({"merge_iter": 5} | merge)), TrainConfig(steps=60))
    run_in_process(Regression(width=8, batch_size=8, samples=1024, lr=lr), settings)
    assert len(judged) >= 48
    assert set(judged) == {""}


@pytest.mark.parametrize("name", ["max_norm_z", "rollback_z"])
def test_thresholds_are_zero_or_one_and_more(name: str) -> None:
    """Less than one deviation is what healthy contributions do all the time."""
    flag = "--" + name.replace("_", "-")
    for value in (0, 1, 8.5):
        assert getattr(MergeConfig(**{name: value}), name) == value
    for value in (0.5, -1.0, math.nan, math.inf, "8", True):
        with pytest.raises(ConfigError, match=f"^{flag} is {value!r}, but it must be "):
            MergeConfig(**{name: value})
