"""`lte-ray sweep` without Ray: what it refuses, how it continues, and what it shows. Its trials are made up."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lte_ray.cli.flags import parse
from lte_ray.cli.main import main
from lte_ray.cli.sweep_flags import switches, to_arguments, training_command
from lte_ray.errors import ConfigError
from lte_ray.ladder import Point
from lte_ray.sweep import Trial, TrialResult, TrialSettings, ray_trials
from lte_ray.sweep.engine import Progress, RunningTrial
from workers.regression import Regression

WORKER = "workers.regression:Regression"
SMALL = "--worker.width 4 --worker.samples 64 --worker.batch-size 8 --steps 40 --merge-iter 2 --eval-every 2"


class MadeUp:
    """A trial that is done at the first look: its loss is its rank, plus its seed."""

    def __init__(self, trial: Trial, settings: TrialSettings) -> None:
        self.trial, self.settings = trial, settings

    def poll(self) -> Progress:
        trial, steps = self.trial, self.settings.train.steps
        rank, samples = self.settings.lte.lora_r, steps * self.settings.lte.num_heads * 8
        loss = float(rank[0] if isinstance(rank, tuple) else rank) + trial.seed
        points = (Point(steps, samples, {"validation_loss": loss}),)
        return Progress(
            steps, points, (), TrialResult(trial.key, trial.name, trial.number, dict(trial.values), trial.seed, points, 61.0)
        )

    def stop(self, reason: str) -> None: ...

    def end(self) -> None: ...


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[TrialSettings]:
    """The settings of the trials that were started, in order."""
    started: list[TrialSettings] = []

    class MadeUpTrials(ray_trials.RayTrials):
        def check(self, trials: Sequence[Trial]) -> None: ...

        def start(self, trial: Trial, alone: bool) -> RunningTrial:
            started.append(self.make(trial))
            return MadeUp(trial, started[-1])

        def wait(self, running: Sequence[RunningTrial]) -> None: ...

    @contextlib.contextmanager
    def connected() -> Iterator[None]:
        yield

    monkeypatch.setattr("lte_ray.sweep.ray_trials.RayTrials", MadeUpTrials)
    monkeypatch.setattr("lte_ray.runtime.cluster.connected", connected)
    monkeypatch.setenv("COLUMNS", "120")
    return started


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    return ["sweep", WORKER, *SMALL.split(), "--storage", str(tmp_path), "--name", "mine"]


def test_a_sweep_trains_each_configuration_and_shows_the_best(
    command: list[str], tmp_path: Path, trained: list[TrialSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    """A line for each trial, the table, and the command of the best, which gives the same settings. It trains nothing again."""
    arguments = [*command, "--over", "lora-r=4,2", "--over", "worker.lr=log:0.001:0.1", "--num-trials", "4"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert len(trained) == 4
    assert {settings.lte.lora_r for settings in trained} == {2, 4}
    assert "4/4  trial-003  lora-r=" in shown.err
    best = next(line for line in shown.out.splitlines() if line.startswith("lte-ray train"))
    content = json.loads((tmp_path / "mine" / "sweep.json").read_text())
    assert content["best"]["command"] == best
    assert len(content["arms"]) == 4
    assert "lora_r" not in content["settings"]
    assert content["settings"]["worker"]["width"] == 4
    assert best in (tmp_path / "mine" / "sweep.md").read_text()
    _, _, program, *flags = shlex.split(best)
    parsed = parse(Regression, program, flags)
    same = next(each for each in trained if each.worker.lr == parsed.worker.lr)
    assert (parsed.lte, parsed.merge, parsed.train) == (same.lte, same.merge, same.train)
    assert parsed.worker == same.worker
    assert main(arguments) == 0
    assert len(trained) == 4
    again = capsys.readouterr()
    assert "4 trials are done" in again.err
    assert again.out == shown.out
    assert main([*arguments[:-1], "6"]) == 0
    assert len(trained) == 6


def test_seeds_are_for_the_best(command: list[str], trained: list[TrialSettings], capsys: pytest.CaptureFixture[str]) -> None:
    """All configurations are trained with the first seed, the finalists with the others."""
    assert main([*command, "--over", "lora-r=1,2,4", "--seeds", "5", "6", "7", "--finalists", "1", "--json"]) == 0
    assert [(each.lte.lora_r, each.train.seed) for each in trained[3:]] == [(1, 6), (1, 7)]
    assert {each.train.seed for each in trained[:3]} == {5}
    printed = json.loads(capsys.readouterr().out)
    assert printed["best"]["values"] == {"lora-r": "1"}
    assert printed["best"]["command"].endswith("--lora-r 1 --seed 5")
    assert {arm["name"] for arm in printed["arms"]} >= {"trial-000", f"{printed['best']['name']}-seed-7"}


def test_any_flag_varies(command: list[str], trained: list[TrialSettings]) -> None:
    """Switches, flags of several values, negative numbers, and those of policies."""
    assert main([*command, "--num-heads", "2", "--over", "wait=on,off", "--over", "lora-r=2 1,4 4"]) == 0
    assert {(each.merge.wait, each.lte.lora_r) for each in trained} == {
        (wait, rank) for wait in (True, False) for rank in ((2, 1), (4, 4))
    }
    trained.clear()
    assert main([*command[:-1], "other", "--policy", "nesterov", "--over", "policy.lr=0.5,0.7"]) == 0
    assert {each.merge.policy_args["lr"] for each in trained if each.merge.policy_args} == {0.5, 0.7}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "lte-ray sweep needs --over, a flag and its values: --over lora-r=8,16,32."),
        (["--over", "lora-r=8,0"], "With lora-r=0: --lora-r is 0, but it must be a whole number, at least 1."),
        (["--over", "lora-r=8,many"], "With lora-r=many: --lora-r is 'many', but it must be"),
        (["--over", "lora-rank=8"], "With lora-rank=8: lte-ray sweep has no flag --lora-rank."),
        (["--over", "worker.witdh=8"], "has no argument --worker.witdh. Did you mean --worker.width?"),
        (["--over", "wait=maybe"], "--over has wait=maybe, but --wait is on or off."),
        (["--over", "seed=1,2"], "--over has seed, which can't vary: give --seeds"),
        (["--over", "name=a,b"], "--over has name, which can't vary: all trials are in one folder."),
        (["--over", "num-trials=1,2"], "--over has num-trials, which can't vary: it is the sweep's own."),
        (["--over", "worker.api-key=a,b"], "--over has worker.api-key, which can't vary: it is a secret"),
        (["--lora-r", "4", "--over", "lora-r=8,16"], "--lora-r and --over lora-r=... are both given."),
        (["--over", "lr=0.1,0.2"], "With lr=0.1: --lr 0.1 would have no effect, because Regression has a build_optimizer()"),
        (["--over", "lora-r=8,16", "--num-trials", "3"], "--num-trials is 3, but --over has 2 combinations"),
        (["--over", "num-heads=1,4", "quorum=4,1", "when=quorum"], "--quorum is 4, but there are 1 heads"),
        (["--over", "lora-r=8,16", "--best-by", "loss"], "--best-by is 'loss', but evaluate() returns validation_loss"),
        (["--over", "lora-r=8,16", "--scheduler", "asha", "--eval-every", "0"], "trainings are evaluated only at their end"),
        (["--over", "lora-r='8", "--num-heads", "1"], "can't be read: No closing quotation."),
        (["--over", "lora-r=8,4", "--policy", "averge"], "Did you mean average?"),
        (["--over", "worker.optimizer=a,b"], "has no argument --worker.optimizer"),
    ],
)
def test_bad_values_are_refused_before_anything_trains(
    arguments: list[str], says: str, command: list[str], tmp_path: Path, trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, one sentence that names the configuration, and no folder."""
    assert main([*command, *arguments]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
    assert not trained


def test_other_settings_in_the_same_folder_are_refused(
    command: list[str], trained: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """With what differs. --overwrite starts again, and a folder of something else is left alone."""
    arguments = [*command, "--over", "lora-r=1,2"]
    assert main(arguments) == 0
    assert main([*arguments, "--worker.lr", "0.5"]) == 2
    assert "worker.lr was 0.003 and is 0.5" in capsys.readouterr().err
    assert main([*command, "--over", "lora-r=1,4"]) == 2
    assert "over was ['lora-r=1,2'] and is ['lora-r=1,4']" in capsys.readouterr().err
    assert main([*arguments, "--worker.lr", "0.5", "--overwrite"]) == 0
    assert len(trained) == 4
    other = Path(command[-3]) / "other"
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    assert main([*arguments, "--name", "other", "--overwrite"]) == 2
    assert "has no sweep.json, so it isn't a sweep's" in capsys.readouterr().err


def test_a_file_says_what_varies(command: list[str], tmp_path: Path, trained: list[TrialSettings]) -> None:
    """In its section [sweep]; the rest is for the trials."""
    file = tmp_path / "settings.toml"
    file.write_text('[sweep]\nover = ["lora-r=1,2"]\nscheduler = "none"\n[heads]\nlora_alpha = 8.0\nlora_r = 32\n')
    assert main([*command, "--config", str(file)]) == 0
    assert [(each.lte.lora_r, each.lte.lora_alpha) for each in trained] in ([(1, 8.0), (2, 8.0)], [(2, 8.0), (1, 8.0)])


def test_a_command_has_no_secrets_and_nothing_of_the_sweep() -> None:
    """What the sweep itself needs is left out, with its values."""
    arguments = [
        "--over",
        "a=1,2",
        "b=3,4",
        "--num-heads",
        "4",
        "--num-trials",
        "3",
        "--no-wait",
        "--worker.token",
        "abc",
        "--name",
        "x",
        "--json",
        "--lr=0.1",
    ]
    command = training_command("mine.py:Net", arguments, ["--lora-r", "8 8"])
    assert command == "lte-ray train mine.py:Net --num-heads 4 --no-wait --worker.token '***' --lr=0.1 --lora-r '8 8'"


def test_switches_are_told_by_their_types() -> None:
    """Those of the settings and of the worker."""
    known = switches(Regression, [])
    assert {"wait", "baseline", "strict"} <= known
    assert "lora-r" not in known
    assert to_arguments((("wait", "off"), ("lr", "-1"), ("lora-r", "8 4")), known) == [
        "--no-wait",
        "--lr=-1",
        "--lora-r",
        "8",
        "4",
    ]
    with pytest.raises(ConfigError, match="--wait is on or off"):
        to_arguments((("wait", "8"),), known)
