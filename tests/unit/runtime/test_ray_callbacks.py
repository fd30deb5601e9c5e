"""Callbacks of Ray's RunConfig get the merges, evaluations, checkpoints and failures of a run, in Ray's form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray.train

from lte_ray.config import TrainConfig
from lte_ray.errors import ConfigError, RunError
from lte_ray.run.callbacks import CallbackList, Run
from lte_ray.run.stopping import StopRules
from lte_ray.runtime.ray_callbacks import adapt_callbacks
from lte_ray.storage import RunDirectory
from lte_ray.trainer import _storage


class Kept(ray.train.UserCallback):
    """Keeps the arguments of its calls."""

    def __init__(self) -> None:
        self.reports: list[tuple[Any, Any, Any]] = []
        self.exceptions: list[dict[int, Exception]] = []

    def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
        self.reports.append((run_context, metrics, checkpoint))

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self.exceptions.append(worker_exceptions)


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """Of a run without rows."""
    directory = RunDirectory.open(str(tmp_path), "r")
    directory.create()
    return directory


def follow(config: ray.train.RunConfig, directory: RunDirectory) -> CallbackList:
    run = Run("r", directory.path, {}, StopRules(TrainConfig(), "", 0.0))
    return CallbackList(adapt_callbacks(config, directory), run, directory)


def test_a_run_reports_as_one_worker(directory: RunDirectory) -> None:
    """Means over the heads; a checkpoint comes with the newest metrics."""
    kept = Kept()
    config = ray.train.RunConfig(callbacks=[kept])
    following = follow(config, directory)
    following.handle_row(
        {"kind": "merge", "version": 1, "step": 5, "samples": 20, "train_loss": {"0": 1.0, "1": 2.0, "2": None}}
        | {"figures": {"hits": {"0": 0.5, "1": 1.0}}}
    )
    following.handle_row({"kind": "evaluation", "version": 1, "step": 5, "values": {"loss": 3.0}})
    following.handle_checkpoint(1)
    (first, metrics, nothing), (_, evaluation, _), (_, again, checkpoint) = kept.reports
    assert first.get_run_config() is config and len(first.run_id) == 32
    assert (metrics, nothing) == ([{"hits": 0.75, "train_loss": 1.5, "version": 1, "step": 5, "samples": 20}], None)
    assert evaluation == again == [{"loss": 3.0, "version": 1, "step": 5}]
    assert checkpoint.path.endswith("checkpoints/000001")


def fail(following: CallbackList, remedy: str) -> None:
    """A run that loses two heads, refuses a contribution, and ends early."""
    with following.running():
        following.handle_row({"kind": "event", "event": "head_lost", "heads": [2, 3], "why": "died", "remedy": remedy})
        following.handle_row({"kind": "event", "event": "refused", "head": 1})
        raise RunError("over")


@pytest.mark.parametrize(("remedy", "last"), [("restart", [{0: "over"}]), ("stop", [])])
def test_failures_are_exceptions_of_heads(directory: RunDirectory, remedy: str, last: list[dict[int, str]]) -> None:
    """The error that ends the run is one, too, unless it was that of heads."""
    kept = Kept()
    with pytest.raises(RunError):
        fail(follow(ray.train.RunConfig(callbacks=[kept]), directory), remedy)
    shown = [{head: str(error) for head, error in errors.items()} for errors in kept.exceptions]
    assert shown == [{2: "died", 3: "died"}, *last]


def test_a_warning_names_the_users_class(directory: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    """Not the one that adapts it."""

    class Broken(Kept):
        def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
            raise ValueError("no")

    follow(ray.train.RunConfig(callbacks=[Broken()]), directory).handle_checkpoint(1)
    assert caplog.records[0].getMessage().startswith("The callback Broken raised ValueError in on_checkpoint: no.")


def test_callbacks_of_another_kind_are_refused(directory: RunDirectory) -> None:
    """Ray has callbacks for its own controller, which a run here hasn't."""
    other = type("Internal", (ray.train.UserCallback.__mro__[1],), {})()
    config = ray.train.RunConfig(callbacks=[other])
    _storage(config)  # the field itself is followed
    with pytest.raises(ConfigError, match=r"RunConfig\(callbacks=\[Internal\]\) would have no effect"):
        adapt_callbacks(config, directory)
