"""A loss that jumps and stays high is a spike; one that falls, varies or jumps once isn't."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.engine.coordinator.loss_spike import MIN_RELATIVE_DEVIATION, MIN_WINDOW, LossSpikeDetector

LOSSES = st.floats(0.01, 100) | st.sampled_from([math.nan, math.inf, 0.0])


def filled(loss: float = 2.0, *, z: float = 6.0, patience: int = 3) -> LossSpikeDetector:
    detector = LossSpikeDetector(16, z, patience)
    assert [detector.record_loss(loss) for _ in range(16)] == [""] * 16
    return detector


@pytest.mark.parametrize("patience", [1, 3])
def test_a_spike_is_reported_once_with_the_reason(patience: int) -> None:
    """At the `patience`-th high loss in a row; `suspicious_merges` counts the merges after the last good one."""
    detector = filled(patience=patience)
    reasons = [detector.record_loss(20.0) for _ in range(patience + 3)]
    assert [bool(text) for text in reasons] == [n == patience - 1 for n in range(patience + 3)]
    assert reasons[patience - 1] == (
        f"the training loss 20 is {18 / (MIN_RELATIVE_DEVIATION * 2):.1f} robust standard deviations above the median "
        f"(recent median 2), merge {patience} in a row; --rollback-z is 6"
    )
    assert detector.suspicious_merges == patience + 3


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_a_spike_from_the_first_merge_on(loss: float) -> None:
    """Even without anything to compare with."""
    detector = LossSpikeDetector(16, 6.0)
    assert [bool(detector.record_loss(loss)) for _ in range(4)] == [False, False, True, False]
    detector = filled()
    text = [detector.record_loss(loss) for _ in range(3)][-1]
    assert text == f"the training loss {loss} isn't finite (recent median 2), merge 3 in a row; --rollback-z is 6"


def test_single_spikes_pass() -> None:
    """Two high merges in a row and a good one, again and again, with patience 3."""
    detector = filled()
    for _ in range(50):
        assert [detector.record_loss(20.0), detector.record_loss(math.nan), detector.record_loss(2.0)] == [""] * 3
        assert detector.suspicious_merges == 0


@given(st.lists(st.floats(-1, 1), min_size=20, max_size=200), st.floats(0.9, 1.0))
def test_a_loss_that_falls_or_varies_is_not_a_spike(noise: list[float], fall: float) -> None:
    """l_t = l_0 fall^t (1 +- 12 %): z is at most (1.12 / 0.88 - 1) / 0.05 = 5.5."""
    detector = LossSpikeDetector(16, 6.0, patience=1)
    assert not any(detector.record_loss(5 * fall**turn * (1 + 0.12 * each)) for turn, each in enumerate(noise))


@given(st.lists(st.floats(1, 1.2), min_size=MIN_WINDOW, max_size=40), st.floats(1e-6, 1e6))
def test_the_unit_of_the_loss_does_not_matter(losses: list[float], unit: float) -> None:
    """Three times the largest is a spike in any unit; the threshold is on z alone."""
    detector = LossSpikeDetector(16, 6.0, patience=1)
    assert not any(detector.record_loss(unit * loss) for loss in losses)
    assert detector.record_loss(3.6 * unit)


def test_the_threshold_follows_the_formula() -> None:
    """For losses with median 3 and median deviation 1, and for equal losses, whose deviation is the least one of 5 %."""
    for losses, limit in (([1.0, 2.0, 3.0, 4.0, 5.0] * 3, 3 + 6 * 1.4826), ([3.0] * 15, 3 * (1 + 6 * MIN_RELATIVE_DEVIATION))):
        for loss, spike in ((limit * 0.999, False), (limit * 1.001, True)):
            detector = LossSpikeDetector(16, 6.0, patience=1)
            assert not any(detector.record_loss(each) for each in losses)
            assert bool(detector.record_loss(loss)) == spike


def test_later_losses_are_not_compared_with_suspicious_ones() -> None:
    """After a spike and a reset the median is the earlier one, and the next spike is detected."""
    detector = filled()
    for _ in range(3):
        assert any(detector.record_loss(20.0) for _ in range(3))
        detector.reset()
        assert detector.suspicious_merges == 0
        assert detector.record_loss(2.1) == ""


def test_a_level_that_lasts_becomes_normal() -> None:
    """If the run doesn't go back, a whole window of high losses makes them normal; NaN never becomes normal."""
    detector = filled()
    assert sum(bool(detector.record_loss(20.0)) for _ in range(40)) == 1
    assert detector.suspicious_merges == 0
    assert sum(bool(detector.record_loss(200.0)) for _ in range(3)) == 1
    detector = filled()
    assert sum(bool(detector.record_loss(math.nan)) for _ in range(40)) == 1
    assert detector.suspicious_merges == 40


def test_nothing_is_reported_when_off_or_too_early() -> None:
    """z = 0; fewer than 8 merges; losses that were always 0."""
    assert not any(filled(z=0.0).record_loss(each) for each in [1e9] * 5 + [math.nan] * 5)
    assert not any(LossSpikeDetector(16, 6.0, 1).record_loss(10.0**n) for n in range(MIN_WINDOW))
    assert filled(0.0, patience=1).record_loss(1e-9) == ""


@given(st.lists(LOSSES, max_size=60), st.integers(0, 60))
def test_it_continues_from_a_checkpoint_as_if_uninterrupted(losses: list[float], cut: int) -> None:
    """Through JSON without NaN, at any point."""
    uninterrupted, first, second = (LossSpikeDetector(16, 6.0) for _ in range(3))
    expected = [uninterrupted.record_loss(loss) for loss in losses]
    reasons = [first.record_loss(loss) for loss in losses[:cut]]
    second.load_state(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert reasons + [second.record_loss(loss) for loss in losses[cut:]] == expected
    assert (second.state(), second.suspicious_merges) == (uninterrupted.state(), uninterrupted.suspicious_merges)


def test_an_empty_state_resets_it() -> None:
    """As in a checkpoint of a run without detection."""
    detector = filled()
    detector.load_state({})
    assert detector.state() == LossSpikeDetector(16, 6.0).state()


@pytest.mark.parametrize(("window", "patience"), [(MIN_WINDOW - 1, 3), (16, 0), (16, 17)])
def test_impossible_arguments_are_refused(window: int, patience: int) -> None:
    """The error has both numbers."""
    with pytest.raises(ValueError, match=f"window is {window}, .* patience {patience}"):
        LossSpikeDetector(window, 6.0, patience)
