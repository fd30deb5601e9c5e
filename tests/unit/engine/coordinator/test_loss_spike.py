"""A loss that jumps and stays up is seen; one that falls, wavers or jumps once isn't."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.engine.coordinator.loss_spike import MIN_RELATIVE_DEVIATION, MIN_WINDOW, LossSpikeDetector

LOSSES = st.floats(0.01, 100) | st.sampled_from([math.nan, math.inf, 0.0])


def filled(loss: float = 2.0, *, z: float = 6.0, patience: int = 3) -> LossSpikeDetector:
    watch = LossSpikeDetector(16, z, patience)
    assert [watch.record_loss(loss) for _ in range(16)] == [""] * 16
    return watch


@pytest.mark.parametrize("patience", [1, 3])
def test_a_spike_is_told_once_and_why(patience: int) -> None:
    """At the `patience`-th high loss in a row; `since` says how many merges lie after the last good one."""
    watch = filled(patience=patience)
    told = [watch.record_loss(20.0) for _ in range(patience + 3)]
    assert [bool(text) for text in told] == [n == patience - 1 for n in range(patience + 3)]
    assert told[patience - 1] == (
        f"the training loss 20 is {18 / (MIN_RELATIVE_DEVIATION * 2):.1f} robust standard deviations above the median "
        f"(recent median 2), merge {patience} in a row; --rollback-z is 6"
    )
    assert watch.suspicious_merges == patience + 3


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_a_spike_from_the_first_merge_on(loss: float) -> None:
    """Without anything to compare with."""
    watch = LossSpikeDetector(16, 6.0)
    assert [bool(watch.record_loss(loss)) for _ in range(4)] == [False, False, True, False]
    watch = filled()
    text = [watch.record_loss(loss) for _ in range(3)][-1]
    assert text == f"the training loss {loss} isn't finite (recent median 2), merge 3 in a row; --rollback-z is 6"


def test_single_spikes_pass() -> None:
    """Two high merges in a row and a good one, for ever, with patience 3."""
    watch = filled()
    for _ in range(50):
        assert [watch.record_loss(20.0), watch.record_loss(math.nan), watch.record_loss(2.0)] == [""] * 3
        assert watch.suspicious_merges == 0


@given(st.lists(st.floats(-1, 1), min_size=20, max_size=200), st.floats(0.9, 1.0))
def test_a_loss_that_falls_or_wavers_is_no_spike(noise: list[float], fall: float) -> None:
    """l_t = l_0 fall^t (1 +- 12 %): at the most z = (1.12 / 0.88 - 1) / 0.05 = 5.5."""
    watch = LossSpikeDetector(16, 6.0, patience=1)
    assert not any(watch.record_loss(5 * fall**turn * (1 + 0.12 * each)) for turn, each in enumerate(noise))


@given(st.lists(st.floats(1, 1.2), min_size=MIN_WINDOW, max_size=40), st.floats(1e-6, 1e6))
def test_the_unit_of_the_loss_does_not_matter(losses: list[float], unit: float) -> None:
    """Three times the largest is a spike in any unit; the threshold is on z alone."""
    watch = LossSpikeDetector(16, 6.0, patience=1)
    assert not any(watch.record_loss(unit * loss) for loss in losses)
    assert watch.record_loss(3.6 * unit)


def test_the_threshold_is_where_the_formula_has_it() -> None:
    """A spread of its own, median 3 and median deviation 1, and the least one of 5 % where there is none."""
    for losses, limit in (([1.0, 2.0, 3.0, 4.0, 5.0] * 3, 3 + 6 * 1.4826), ([3.0] * 15, 3 * (1 + 6 * MIN_RELATIVE_DEVIATION))):
        for loss, spike in ((limit * 0.999, False), (limit * 1.001, True)):
            watch = LossSpikeDetector(16, 6.0, patience=1)
            assert not any(watch.record_loss(each) for each in losses)
            assert bool(watch.record_loss(loss)) == spike


def test_high_losses_are_not_what_later_ones_are_compared_with() -> None:
    """After a spike and a reset the median is the one from before, and the next spike is seen."""
    watch = filled()
    for _ in range(3):
        assert any(watch.record_loss(20.0) for _ in range(3))
        watch.reset()
        assert watch.suspicious_merges == 0
        assert watch.record_loss(2.1) == ""


def test_a_level_that_lasts_becomes_the_runs_own() -> None:
    """If nobody goes back: after as many high losses as the window holds they are normal; losses that are NaN never are."""
    watch = filled()
    assert sum(bool(watch.record_loss(20.0)) for _ in range(40)) == 1
    assert watch.suspicious_merges == 0
    assert sum(bool(watch.record_loss(200.0)) for _ in range(3)) == 1
    watch = filled()
    assert sum(bool(watch.record_loss(math.nan)) for _ in range(40)) == 1
    assert watch.suspicious_merges == 40


def test_nothing_is_judged_when_off_or_too_early() -> None:
    """z = 0; fewer than 8 merges; losses that were 0 throughout."""
    assert not any(filled(z=0.0).record_loss(each) for each in [1e9] * 5 + [math.nan] * 5)
    assert not any(LossSpikeDetector(16, 6.0, 1).record_loss(10.0**n) for n in range(MIN_WINDOW))
    assert filled(0.0, patience=1).record_loss(1e-9) == ""


@given(st.lists(LOSSES, max_size=60), st.integers(0, 60))
def test_it_goes_on_after_a_checkpoint_as_if_there_had_been_none(losses: list[float], cut: int) -> None:
    """Through JSON without NaN, at any point."""
    whole, first, second = (LossSpikeDetector(16, 6.0) for _ in range(3))
    expected = [whole.record_loss(loss) for loss in losses]
    found = [first.record_loss(loss) for loss in losses[:cut]]
    second.load_state(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert found + [second.record_loss(loss) for loss in losses[cut:]] == expected
    assert (second.state(), second.suspicious_merges) == (whole.state(), whole.suspicious_merges)


def test_no_state_is_a_new_watchs() -> None:
    """A checkpoint of a run without watch."""
    watch = filled()
    watch.load_state({})
    assert watch.state() == LossSpikeDetector(16, 6.0).state()


@pytest.mark.parametrize(("window", "patience"), [(MIN_WINDOW - 1, 3), (16, 0), (16, 17)])
def test_impossible_arguments_are_refused(window: int, patience: int) -> None:
    """The error has both numbers."""
    with pytest.raises(ValueError, match=f"window is {window}, .* patience {patience}"):
        LossSpikeDetector(window, 6.0, patience)
