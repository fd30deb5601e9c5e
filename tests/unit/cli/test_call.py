"""What a call prints where, which run and which Ray it means, and how it ends."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lte_ray.cli.main import main
from lte_ray.cli.run_argument import locate_run, run_path
from lte_ray.errors import ConfigError, HeadLost, Interrupted, ResourceError
from lte_ray.run.metrics import SilentReporter
from lte_ray.runtime import cluster
from lte_ray.trainer import LTETrainer

GOOD = "workers.regression:Regression"

METRICS = {
    "evaluation": {"validation_loss": 0.25}, "validation_loss": 0.25, "train_loss": float("nan"), "step": 10, "samples": 320,
    "samples_per_second": 64.0, "version": 1, "baseline": False, "independent": False, "times": {"train": 1.0}, "seconds": 5.0,
    "bytes_up": 10, "bytes_down": 20, "bytes_ddp": 30,
}  # fmt: skip


class Fits:
    """Replaces `LTETrainer.fit`: keeps the trainers, and gives a result or raises."""

    def __init__(self) -> None:
        self.trainers: list[LTETrainer] = []
        self.raises: BaseException | None = None
        self.metrics: dict[str, Any] = dict(METRICS)

    def fit(self, trainer: LTETrainer) -> Any:
        self.trainers.append(trainer)
        print("a line of the worker's own")
        logging.getLogger("lte_ray").info("a note")
        logging.getLogger("lte_ray").warning("a warning")
        if str(self.raises) == "terminated":
            with contextlib.suppress(KeyboardInterrupt):  # the trainer turns it into its own
                os.kill(os.getpid(), signal.SIGTERM)
        if self.raises is not None:
            raise self.raises
        return SimpleNamespace(metrics=self.metrics, checkpoint=None, path="/runs/mine")


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fits]:
    """What trains in place of Ray."""
    fits = Fits()
    monkeypatch.setattr(LTETrainer, "fit", lambda trainer: fits.fit(trainer))  # noqa: PLW0108  # binds the trainer
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(logging.getLogger("lte_ray"), "propagate", False)
    yield fits
    signal.signal(signal.SIGTERM, before)


def test_the_result_is_on_stdout_and_all_else_on_stderr(
    fits: Fits, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Notes have the time; with --quiet only warnings remain."""
    monkeypatch.setattr(logging.getLogger("lte_ray"), "handlers", [])  # without pytest's
    assert main(["train", GOOD]) == 0
    shown = capsys.readouterr()
    assert "validation loss" in shown.out
    assert "/runs/mine" in shown.out
    assert [line[10:] for line in shown.err.splitlines()] == ["a note", "a warning"]
    assert fits.trainers[0].reporter is None
    assert main(["train", GOOD, "--quiet"]) == 0
    shown = capsys.readouterr()
    assert [line[10:] for line in shown.err.splitlines()] == ["a warning"]
    assert isinstance(fits.trainers[1].reporter, SilentReporter)
    assert main(["train", GOOD, "--log-level", "error"]) == 0
    assert capsys.readouterr().err == ""
    assert logging.getLogger("lte_ray").level == logging.NOTSET


def test_json_is_one_object_on_stdout(fits: Fits, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the worker prints lines of its own, and for errors; what isn't finite is null."""
    assert main(["train", GOOD, "--json"]) == 0
    shown = capsys.readouterr()
    given = json.loads(shown.out)
    assert given == {**METRICS, "train_loss": None, "run": "/runs/mine", "checkpoint": None, "exit_code": 0}
    assert "a line of the worker's own" in shown.err
    assert main(["train", GOOD, "--json", "--steps", "0"]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"error": "--steps is 0, but it must be at least 1.", "exit_code": 2}
    assert "--steps is 0" in shown.err
    assert main(["train", "--json"]) == 2
    assert "needs a WORKER first" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize(
    ("raises", "stopped", "code"),
    [
        (HeadLost("head 1 died"), None, 1),
        (Interrupted("pressed", 3), None, 130),
        (Interrupted("terminated", 3), None, 75),
        (Interrupted("terminated", None), None, 130),
        (None, {"kind": "max-time", "reason": "3 h are over"}, 75),
        (None, {"kind": "patience", "reason": "no better loss"}, 0),
        (None, None, 0),
    ],
)
def test_the_exit_code_says_whether_to_resume(
    fits: Fits, raises: BaseException | None, stopped: dict[str, str] | None, code: int
) -> None:
    """75: the same command with --resume continues the run. Ctrl-C is 130 in any case."""
    fits.raises = raises
    fits.metrics["stopped"] = stopped
    assert main(["train", GOOD]) == code


def test_a_lost_head_with_a_checkpoint_is_resumable(fits: Fits) -> None:
    """The trainer says in the error which checkpoint is complete."""
    error = HeadLost("head 1 died")
    error.checkpoint = 4
    fits.raises = error
    assert main(["train", GOOD]) == 75


def test_a_run_is_a_path_or_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has a separator, or is a run in this folder, is a path; else a name in the storage."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lte_ray.storage.default_storage", lambda: "/default")
    assert locate_run("mine", None) == ("/default", "mine")
    assert locate_run("mine", "s3://bucket/runs?region=x") == ("s3://bucket/runs?region=x", "mine")
    assert run_path("mine", "s3://bucket/runs?region=x") == "s3://bucket/runs/mine?region=x"
    assert run_path("s3://bucket/runs/mine?region=x", None) == "s3://bucket/runs/mine?region=x"
    assert locate_run("runs/mine", None) == (str(tmp_path / "runs"), "mine")
    assert run_path("~/mine", None) == str(Path("~/mine").expanduser())
    (tmp_path / "mine").mkdir()
    assert locate_run("mine", None) == ("/default", "mine")  # a folder that isn't a run
    (tmp_path / "mine" / "run.toml").write_text("")
    assert locate_run("mine", None) == (str(tmp_path), "mine")
    with pytest.raises(ConfigError, match="RUN is 'runs/mine', a path, so --storage /x would have no effect"):
        locate_run("runs/mine", "/x")
    with pytest.raises(ConfigError, match="RUN is '-x'"):
        locate_run("-x", None)


@pytest.mark.parametrize("command", [["resume"], ["train", "--resume"], ["audit"]])
def test_every_command_takes_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    """And says where it looked."""
    assert main([*command, "mine", "--storage", str(tmp_path)]) == 2
    assert str(tmp_path / "mine") in capsys.readouterr().err
    assert main([*command, f"{tmp_path}/mine"]) == 2
    assert str(tmp_path / "mine") in capsys.readouterr().err


def test_the_address_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the call only; `local` starts an own Ray. Errors name the flag."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not cluster.will_start()
    with cluster.use_address("local"):
        assert cluster.will_start()
    refused = pytest.raises(ResourceError, match=r"No cluster answers at --address 127.0.0.1:1: .* Correct --address")
    with cluster.use_address("127.0.0.1:1"), refused, cluster.connected():
        pass
    assert not cluster.will_start()
