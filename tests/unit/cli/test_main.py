"""The command line without a Ray of its own: bad input is rejected before anything starts."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from lte_ray.cli.flags import parse
from lte_ray.cli.main import main
from lte_ray.config import SECTIONS, FailureConfig, LTEConfig, MergeConfig, PlacementConfig, StorageConfig, TrainConfig, flag
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError, StorageError
from lte_ray.run import record as run_record
from lte_ray.run import start as run_start
from lte_ray.storage import RunDirectory
from workers.regression import Regression

GOOD = "workers.regression:Regression"

NET = """
import torch
from torch import nn

class Net:
    def build_model(self):
        return nn.Linear(8, 8)
    def train_batches(self, shard):
        while True:
            yield torch.randn(4, 8)
    def loss(self, model, batch):
        return model(batch).square().mean()
    def evaluate(self, model):
        return {"norm": sum(p.norm().item() for p in model.parameters())}

class NoLoss(Net):
    loss = None

class NoBatches(Net):
    def train_batches(self, shard):
        yield from ()

class NothingToAdapt(Net):
    def build_model(self):
        return nn.LayerNorm(8)

class BadModel(Net):
    def build_model(self):
        raise RuntimeError("weights are missing")

class Untyped(Net):
    def __init__(self, size):
        pass

class Refusing(Net):
    def __init__(self, size: int = 3):
        raise ValueError("size must be 4")

class Odd(Net):
    def __init__(self):
        raise OSError("no such device")

class Extra(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}
    def set_extra_state(self, state):
        pass

class Stateful(Net):
    def build_model(self):
        return nn.Sequential(nn.Linear(8, 8), Extra(8, 8))

def function():
    pass
"""


@pytest.fixture
def net(tmp_path: Path) -> str:
    """A user's file outside the repository."""
    path = tmp_path / "net.py"
    path.write_text(NET)
    return str(path)


def complaint(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> str:
    """The error output of `lte-ray train`, which must exit with 2 and write nothing to the storage folder."""
    storage = tmp_path / "runs"
    try:
        code = main(["train", *arguments, "--storage", str(storage)])
    except SystemExit as leaving:
        code = leaving.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert code == 2, captured
    assert not storage.exists() or not list(storage.iterdir())
    assert "Traceback" not in captured.err or "raised" in captured.err
    return " ".join(captured.err.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere.at.all:Net"], "there is no module nowhere"),
        (["workers.regression:Regresion"], "Did you mean Regression?"),
        (["no/such/file.py:Net"], "there is no file"),
        (["workers.regression"], "package.module:Class or path/to/file.py:Class"),
        ([GOOD, "--num-heds", "3"], "--num-heads"),
        ([GOOD, "--num-heads", "many"], "--num-heads"),
        ([GOOD, "--num-heads", "0"], "--num-heads is 0, but it must be at least 1"),
        ([GOOD, "--steps", "0"], "--steps is 0, but it must be at least 1"),
        ([GOOD, "--merge-iter", "0"], "--merge-iter is 0, but it must be at least 1"),
        ([GOOD, "--lora-alpha", "-1"], "--lora-alpha is -1.0, but it must be a number above 0"),
        ([GOOD, "--exclude", "9"], "--exclude '9' matches no layer"),
        ([GOOD, "--policy", "avrage"], "Did you mean average?"),
        ([GOOD, "--name", "../up"], "--name is '../up'"),
        ([GOOD, "--worker.widht", "3"], "--worker.width"),
        ([GOOD, "--worker.samples", "60"], "60 samples can't fill a batch of 64; use more data, or a smaller batch"),
        ([GOOD, "--gpus-per-head", "1.5"], "--gpus-per-head is 1.5, but it must be at most 1: a head computes on one GPU"),
        ([GOOD, "--resume"], "--resume needs --name"),
        ([GOOD, "--resume", "--overwrite", "--name", "a"], "contradict"),
        ([GOOD, "--config", "missing.toml"], "missing.toml can't be read"),
    ],
)
def test_bad_flags_are_one_clear_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], says: str
) -> None:
    """Exit code 2; the message names the flag and says what to do."""
    assert says in complaint(capsys, tmp_path, *arguments)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("NoLoss", "it lacks loss()"),
        ("NoBatches", "train_batches() ended at once, without a batch, for head 0 of 2"),
        ("NothingToAdapt", "nothing to adapt"),
        ("BadModel", "RuntimeError: weights are missing"),
        ("Refusing", "size must be 4"),
        ("Odd", "OSError: no such device"),
        ("Stateful", "can't be exported"),
        ("Untyped", "Unsupported type annotation for field worker"),
        ("function", "not a class"),
        ("Nett", "Did you mean Net?"),
    ],
)
def test_bad_workers_are_one_clear_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, net: str, name: str, says: str
) -> None:
    """Exit code 2; the message says what the worker lacks."""
    assert says in complaint(capsys, tmp_path, f"{net}:{name}", "--lora-r", "4")


def test_a_missing_worker_and_an_unknown_command_are_errors(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2; the message shows the correct form."""
    assert main(["train"]) == 2
    assert "needs a WORKER first" in capsys.readouterr().err
    assert main(["trian"]) == 2
    assert "lte-ray train WORKER" in capsys.readouterr().err


@pytest.mark.ray
def test_storage_that_cannot_be_written_is_an_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, local_ray: None
) -> None:
    """A run directory below a regular file: exit code 2, nothing started."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert main(["train", GOOD, "--storage", str(blocked)]) == 2
    assert "can't be written" in capsys.readouterr().err


def test_a_name_that_is_taken_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Existing files stay, and --overwrite refuses to remove a folder that isn't a run."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    command = ["train", GOOD, "--storage", str(tmp_path), "--name", "mine"]
    assert main(command) == 2
    assert "already in" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 2
    assert "isn't a run of lte-ray" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"


@pytest.mark.ray
def test_more_heads_than_resources_is_an_error(capsys: pytest.CaptureFixture[str], tmp_path: Path, local_ray: None) -> None:
    """It says what was requested, what the cluster has, and what to change."""
    said = complaint(capsys, tmp_path, GOOD, "--num-heads", "17", "--worker.batch-size", "8")
    assert "17 heads ask for 4.25 CPU (0.25 CPU each), but the cluster has 4 CPU" in said
    assert "--num-heads to at most 16" in said
    assert "--cpus-per-head" in said
    said = complaint(capsys, tmp_path, GOOD, "--gpus-per-head", "1")
    assert "2 heads ask for 2 GPU (1 CPU, 1 GPU each), but the cluster has 0 GPU" in said


def test_help_explains_every_field_and_the_workers_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Each field of each settings class, and each argument of the worker, is listed with its help text."""
    with pytest.raises(SystemExit) as leaving:
        main(["train", GOOD, "--help-all"])
    assert leaving.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for kind in SECTIONS:
        for field in dataclasses.fields(kind):
            if field.name == "policy_args":  # its flags are the policy's arguments
                continue
            name = flag(field.name).replace("--", "--no-") if field.default is True else flag(field.name)
            assert name in shown
            assert " ".join(field.metadata["help"].split()[:4]) in shown
    assert "--worker.batch-size INT" in shown
    assert "Samples in one head's batch." in shown


def test_help_into_a_closed_pipe_ends_silently() -> None:
    """As in `lte-ray train --help | head`: the exit code of a broken pipe, and nothing on stderr."""
    command = [Path(sys.executable).parent / "lte-ray", "train", "--help"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_toml_file_gives_settings_and_flags_win(tmp_path: Path) -> None:
    """Flat keys for lte-ray's settings, and a table [worker] for the worker's."""
    path = tmp_path / "settings.toml"
    path.write_text(
        'num_heads = 4\nsteps = 70\nexclude = ["3"]\nresume = false\nname = "n"\n[worker]\nbatch_size = 8\nlr = 0.1\n'
    )
    parsed = parse(Regression, GOOD, ["--steps", "5", "--config", str(path)])
    assert parsed.lte == LTEConfig(num_heads=4, exclude=("3",))
    assert parsed.train.steps == 5
    assert parsed.storage.name == "n"
    assert parsed.worker == Regression(batch_size=8, lr=0.1)


@pytest.mark.parametrize(("in_file", "given"), [("epochs = 3", ["--steps", "5"]), ("steps = 5", ["--samples=400"])])
def test_a_length_given_as_a_flag_replaces_the_files_in_another_unit(tmp_path: Path, in_file: str, given: list[str]) -> None:
    """So a resumed run, whose record counts steps, can be continued by epochs."""
    path = tmp_path / "settings.toml"
    path.write_text(f"{in_file}\nseed = 2\n")
    train = parse(Regression, GOOD, ["--config", str(path), *given]).train
    assert (train.seed, train.epochs) == (2, None)
    assert (train.steps, train.samples) in [(5, None), (700, 400)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("num_haeds = 3", "unknown setting num_haeds. Did you mean num_heads?"),
        ("[worker]\nwdith = 3", "unknown setting worker.wdith. Did you mean width?"),
        ("num_heads = ", "isn't valid TOML"),
        ("worker = 3", "must be a table"),
        ("steps = 0", "--steps is 0"),
    ],
)
def test_a_bad_toml_file_is_one_clear_error(tmp_path: Path, text: str, says: str) -> None:
    """The error names the file and the key."""
    path = tmp_path / "settings.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says.replace(".", r"\.").replace("?", r"\?")):
        parse(Regression, GOOD, ["--config", str(path)])


@dataclasses.dataclass
class Switches:
    """A worker with settings whose defaults aren't false or empty."""

    on: bool = True
    off: bool = False
    names: tuple[str, ...] = ("a", "b")


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("off", [True, False])
@pytest.mark.parametrize("names", [[], ["c"]])
def test_toml_gives_booleans_and_empty_lists(tmp_path: Path, on: bool, off: bool, names: list[str]) -> None:
    """They count for any default."""
    path = tmp_path / "settings.toml"
    path.write_text(tomli_w.dumps({"worker": {"on": on, "off": off, "names": names}}))
    assert parse(Switches, "x:Switches", ["--config", str(path)]).worker == Switches(on, off, tuple(names))


@pytest.mark.parametrize("on", [True, False])
def test_a_flag_wins_over_every_switch_of_a_file(tmp_path: Path, on: bool) -> None:
    """Switches of the settings and of the worker, for any default and any value in the file; of two flags the last counts."""
    path = tmp_path / "settings.toml"
    switches = [f.name for kind in SECTIONS for f in dataclasses.fields(kind) if isinstance(f.default, bool)]
    ours = [name for name in switches if name not in ("resume", "overwrite")]  # they contradict each other
    path.write_text(tomli_w.dumps(dict.fromkeys(ours, on) | {"worker": {"on": on, "off": on}}))
    flags = [flag(name).replace("--", "--no-") if on else flag(name) for name in ours]
    flags += [f"--worker.{'no-' if on else ''}{name}" for name in ("on", "off")]
    parsed = parse(Switches, "x:Switches", ["--config", str(path), *flags])
    values = {k: v for part in (parsed.lte, parsed.merge, parsed.train) for k, v in vars(part).items()}
    assert {"wait", "strict", "compile", "rslora", "match_speed", "never_merge", "full_rank", "baseline"} == set(ours)
    assert [values[name] for name in ours] == [not on] * len(ours)
    assert parsed.worker == Switches(not on, not on)
    assert parse(Switches, "x:Switches", ["--wait", "--no-wait", "--resume", "--no-resume"]).merge.wait is False


def test_a_runs_own_record_runs_it_again(tmp_path: Path) -> None:
    """`--config run.toml` gives the settings of that run, None included, but not its name."""
    storage = StorageConfig(name="first", storage="relative", keep_checkpoints=None)
    settings = Settings("first", LTEConfig(exclude=("3",)), MergeConfig(merge_iter=3), TrainConfig(steps=7))
    directory = RunDirectory.open(str(tmp_path), "first")
    run_start.create_run(
        directory,
        run_record.make_record(Regression(lr=0.5), GOOD, settings, PlacementConfig(), storage, FailureConfig()),
        storage,
    )
    parsed = parse(Regression, GOOD, ["--config", str(tmp_path / "first" / "run.toml")])
    assert (parsed.lte, parsed.merge, parsed.train) == (settings.lte, settings.merge, settings.train)
    assert parsed.worker == Regression(lr=0.5)
    assert parsed.storage == StorageConfig(storage=str(Path("relative").absolute()), keep_checkpoints=None)


def test_two_runs_cannot_take_one_name_at_once(tmp_path: Path) -> None:
    """Exactly one of them creates the folder."""
    directory = RunDirectory.open(str(tmp_path), "same")
    directory.create(exclusive=True)
    with pytest.raises(StorageError, match="taken this name"):
        directory.create(exclusive=True)


def test_a_cluster_that_does_not_answer_is_an_error_at_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RAY_ADDRESS names a closed port: exit code 2, without the minutes for which Ray retries."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    assert "No cluster answers at RAY_ADDRESS=127.0.0.1:1" in complaint(capsys, tmp_path, GOOD)


SECRETIVE = """
from workers.regression import Regression


class Secretive(Regression):
    def __init__(self, api_token: str = "", width: int = 8, options: dict | None = None):
        print("made")
        super().__init__(width=width)
"""


@pytest.mark.parametrize("flags", [["--help"], ["--worker.api-tokne", "x"], ["--worker.width", "many"], ["--storag", "runs"]])
def test_help_and_errors_show_no_secret_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    """They name defaults, which the file for --config replaces."""
    (tmp_path / "secretive.py").write_text(SECRETIVE)
    file = 'storage = "s3://KEY:HIDDEN@bucket/x"\n[worker]\napi_token = "HIDDEN"\nwidth = 12\noptions = {password = "HIDDEN"}\n'
    (tmp_path / "x.toml").write_text(file)
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(SystemExit):
        main(["train", "secretive.py:Secretive", "--config", "x.toml", *flags])
    captured = capsys.readouterr()
    assert captured.out or captured.err
    assert "HIDDEN" not in captured.out + captured.err
    if flags == ["--help"]:
        assert "***" in captured.out
        assert "12" in captured.out


def test_secrets_of_a_file_reach_the_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unmasked, and what its constructor prints is seen."""
    (tmp_path / "x.toml").write_text('[worker]\napi_token = "HIDDEN"\n')

    class Secretive(Regression):
        def __init__(self, api_token: str = "") -> None:
            print("made")
            super().__init__()
            self.api_token = api_token

    assert parse(Secretive, "here:Secretive", ["--config", str(tmp_path / "x.toml")]).worker.api_token == "HIDDEN"
    assert capsys.readouterr().out == "made\n"
