"""The soak's figures, from rows and faults with known answers."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.soak_account import Fault, assign_heads, fit, next_merge, quantiles, rate, recovered_at, stretches


def merge(at: float, head: int, samples: int, incarnation: int = 0) -> dict[str, Any]:
    return {"at": at, "held": {str(head): {"incarnation": incarnation, "samples": samples}}}


def steady(head: int, begin: int, end: int, start: int = 0, incarnation: int = 0) -> list[dict[str, Any]]:
    """A merge of ten samples per second."""
    return [merge(at, head, start + 10 * (at - begin + 1), incarnation) for at in range(begin, end)]


def run() -> list[dict[str, Any]]:
    """Head 0 merges all the time. Head 1 is killed at 10.5 and merges again at 15. Both die with the driver at 30.5."""
    rows = [*steady(0, 0, 31), *steady(1, 0, 11), *steady(1, 15, 31, start=110, incarnation=1)]
    rows += [*steady(0, 40, 50, start=290), *steady(1, 40, 50, start=250)]
    return sorted(rows, key=lambda row: row["at"])


def test_rates_count_only_working_processes() -> None:
    """Gaps between processes of a head, and between drivers, don't count."""
    pieces = stretches(run(), starts=[-5.0, 35.0])
    assert rate(pieces, [(0, 50)]) == (10.0, 30 + 10 + 15 + 9 + 9)
    assert rate(pieces, [(10.5, 15)], [1]) == (10.0, 4.5)
    assert rate(pieces, [(10.5, 15), (12, 16)], [1, 1]) == (10.0, 5.5)
    assert rate(pieces, [(32, 38)]) == (0.0, 0.0)


def test_a_survivor_that_stalls_shows() -> None:
    """Half as many samples in a window give half the rate."""
    rows = [merge(0, 0, 10), merge(10, 0, 60), merge(20, 0, 160)]
    assert rate(stretches(rows, []), [(0, 10)]) == (5.0, 10)
    assert rate(stretches(rows, []), [(5, 15)]) == (7.5, 10)


def test_waiting_for_a_coordinator_is_no_stall_but_idling_is() -> None:
    """No merge from 10 to 15. The waiting contribution comes first, then what was trained in the meantime, or nothing."""
    before, after = steady(0, 0, 11), steady(0, 16, 26, start=150)
    caught_up = [*before, merge(15, 0, 120), merge(15.1, 0, 161), *after]
    assert rate(stretches(caught_up, []), [(11, 14)])[0] == pytest.approx(10.0)
    assert (0, 10.0, 15.1, 51) in [(p.head, p.begin, p.end, p.samples) for p in stretches(caught_up, [])]
    stood = [*before, merge(15, 0, 120), merge(16, 0, 130)]
    assert rate(stretches(stood, []), [(11, 14)])[0] == pytest.approx(20 / 6)


def test_faults_are_matched_with_heads_and_recoveries() -> None:
    """A kill is matched with a loss that the driver reports, a stop with a hang, until the head's next process merges."""
    faults = [Fault(10.5, "head SIGKILL"), Fault(11.0, "head SIGSTOP"), Fault(30.5, "driver SIGKILL")]
    events = [{"event": "head_lost", "at": 11.2, "heads": [1], "incarnation": 0}]
    assign_heads(faults, events)
    assert [fault.head for fault in faults] == [1, None, None]
    assert recovered_at(faults[0], run(), [-5.0, 35.0], 2) == 15
    assert recovered_at(faults[1], run(), [-5.0, 35.0], 2) is None
    assert recovered_at(faults[2], run(), [-5.0, 35.0], 2) == 40
    assert [next_merge(fault, run()) for fault in faults] == [0.5, 1.0, 9.5]


def test_a_head_that_dies_with_the_driver_during_its_recovery() -> None:
    """The restarted driver's head counts, with any incarnation."""
    fault = Fault(29.0, "head SIGKILL", head=1, incarnation=1, noticed=29.5)
    rows = [row for row in run() if not ("1" in row["held"] and 29 <= row["at"] <= 31)]
    assert recovered_at(fault, rows, [-5.0, 35.0], 2) == 40


def test_lines_and_quantiles() -> None:
    """A slope of 2 MiB per hour is found; the 90th percentile of ten values is the last one."""
    found = fit([(float(at), 100 + 2 * at / 3600) for at in range(0, 1800, 10)])
    assert found["per_hour"] == pytest.approx(2)
    assert found["over_the_run"] == pytest.approx(1, abs=0.01)
    assert quantiles([1, 2, 3, None]) == {"number": 3, "median": 2, "p90": 3, "max": 3}
    assert quantiles([]) == {"number": 0}
