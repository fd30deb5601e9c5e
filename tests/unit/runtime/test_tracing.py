"""Traces of a process."""

from __future__ import annotations

import gzip
import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import profile

from lte_ray.config import TrainConfig
from lte_ray.engine.spans import span
from lte_ray.errors import ConfigError, StorageError
from lte_ray.runtime.tracing import Tracer
from lte_ray.storage import RunDirectory


def names(path: Path) -> set[str]:
    with gzip.open(path) as file:
        return {event["name"] for event in json.load(file)["traceEvents"]}


def work(name: str) -> None:
    with span(name):
        torch.ones(4).exp()


def test_the_steps_of_the_window_are_recorded_in_all_threads(tmp_path: Path) -> None:
    """Nothing before and after them; each trace is written once."""
    tracer = Tracer(RunDirectory.open(str(tmp_path), "run"), "head-0", (2, 3))
    for step in range(1, 6):
        tracer.before_step(step - 1)
        work(f"step {step}")
        thread = threading.Thread(target=lambda: torch.ones(4).sin())
        thread.start()
        thread.join()
    found = names(tmp_path / "run" / "profile" / "head-0.json.gz")
    assert {"step 2", "step 3", "aten::exp", "aten::sin"} <= found
    assert not {"step 1", "step 4", "step 5"} & found


def test_a_round_that_meets_the_window_is_recorded(tmp_path: Path) -> None:
    """The coordinator sees rounds of steps; a trace that isn't complete at the end of the run is written then."""
    tracer = Tracer(RunDirectory.open(str(tmp_path), "run"), "coordinator", (20, 30))
    for first, last in ((1, 10), (11, 20), (21, 29)):
        tracer.begin(first, last)
        work(f"merge {last}")
        tracer.end(last)
    assert not (tmp_path / "run" / "profile").exists()
    tracer.end()
    found = names(tmp_path / "run" / "profile" / "coordinator.json.gz")
    assert {"merge 20", "merge 29"} <= found
    assert "merge 10" not in found


def test_what_fails_costs_the_trace_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Storage that fails, or a profiler of the worker's own, is a warning."""

    def fail(*_: Any) -> None:
        raise StorageError("no space")

    directory = RunDirectory.open(str(tmp_path), "run")
    monkeypatch.setattr(RunDirectory, "write", fail)
    tracer = Tracer(directory, "head-0", (1, 1))
    with caplog.at_level(logging.WARNING, "lte_ray"):
        tracer.begin(1, 1)
        tracer.end(1)
        assert "There is no trace of head-0: no space" in caplog.text
        other = Tracer(directory, "head-1", (1, 1))
        with profile():
            other.begin(1, 1)
            other.end(1)
    assert "There is no trace of head-1" in caplog.text


def test_without_a_window_nothing_happens(tmp_path: Path) -> None:
    """And a span costs nothing."""
    tracer = Tracer(RunDirectory.open(str(tmp_path), "run"), "head-0", None)
    tracer.begin(1, 1)
    work("step 1")
    tracer.end()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("window", ["20", "0:5", "30:20", "a:b", "1:2:3", "-1:5"])
def test_a_window_that_is_none_is_refused(window: str) -> None:
    """With the form that it must have."""
    with pytest.raises(ConfigError, match=f"--profile is '{window}', but it must be the first and the last local step"):
        TrainConfig(profile=window)
