"""`lte-ray submit` without a cluster: what it refuses, what it would send, and how it ends; Ray's client is a fake."""

from __future__ import annotations

import json
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lte_ray.cli import main as command_line
from lte_ray.cli import submit as submitting
from lte_ray.cli.main import main
from lte_ray.jobs import server as job_server
from lte_ray.jobs.server import JobServer

GOOD = "workers.regression:Regression"
WORKER = "from workers.regression import Regression\n"


class FakeClient:
    """A cluster that takes one job and plays its log. Each item of the log is text, an exception, or a call."""

    def __init__(
        self, log: list[Any], status: str = "SUCCEEDED", code: int | None = 0, error: str = "", message: str = ""
    ) -> None:
        self.log, self.stopped = log, 0
        self.ended = SimpleNamespace(
            status=SimpleNamespace(value=status, is_terminal=lambda: True),
            driver_exit_code=code,
            error_type=error,
            message=message,
        )
        self.jobs: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.code: list[str] = []

    def submit_job(self, **job: Any) -> None:
        """Takes a job, and looks at its files, which are gone afterwards."""
        self.jobs.append(job)
        environment = job["runtime_env"]
        if "working_dir" in environment:
            with zipfile.ZipFile(environment["working_dir"]) as archive:
                self.files = {name: archive.read(name) for name in archive.namelist()}
        self.code = [
            str(Path(each) / "trainer.py") for each in environment.get("py_modules", ()) if (Path(each) / "trainer.py").exists()
        ]

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        """Plays the log from its beginning, as Ray does for each connection."""
        for each in self.log:
            if isinstance(each, str):
                yield each
            elif isinstance(each, BaseException):
                self.log.remove(each)
                raise each
            else:
                each()

    def get_job_info(self, job: str) -> Any:
        """How it has ended."""
        return self.ended

    def stop_job(self, job: str) -> None:
        """Counts."""
        self.stopped += 1


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, which is the current one."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "mine.py").write_text(WORKER)
    monkeypatch.chdir(root)
    return root


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeClient]:
    """Makes a fake cluster that `connect` finds."""
    monkeypatch.setattr(job_server.time, "sleep", lambda seconds: None)

    def make(*log: Any, **ended: Any) -> FakeClient:
        client = FakeClient(list(log), **ended)
        monkeypatch.setattr(job_server, "connect", lambda address: JobServer(client, address or "http://here"))
        return client

    return make


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a submission that must end with exit code 2."""
    assert main(["submit", *arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "lte-ray submit needs COMMAND"),
        (["mine.py:Regression"], "lte-ray submit train mine.py:Regression"),
        (["--working-dir", "none", "train", "mine.py:Regression"], "a file that isn't sent with --working-dir none"),
        (["--", "mine.py:Regression"], "lte-ray submit train mine.py:Regression"),
        (["--", "python", "x.py"], "Other programs run with ray job submit"),
        (["--", "trian", GOOD], "Did you mean train?"),
        (["watch", "mine"], "lte-ray watch doesn't run in a job"),
        (["train", GOOD, "--address", "http://head:8265"], "Give it before: lte-ray submit --address"),
        (["train", "missing.py:Net"], "there is no file"),
        (["train", "mine.py:Regresion"], "mine.py has no Regresion"),
        (["train", "mine.py"], "path/to/file.py:Class"),
        (["train", GOOD, "--grace", "5m"], "--grace is 300 s, but a stopped job has 60 s before Ray kills it"),
        (["--adress", "x", "train", GOOD], "Did you mean --address?"),
        (["train", GOOD, "--num-heads", "0"], "--num-heads is 0, but it must be at least 1"),
        (["train", GOOD, "--num-heds", "2"], "Did you mean --num-heads?"),
        (["train", GOOD, "--storage", "runs"], "--storage is 'runs', a relative path, but the folder of a job is removed"),
        (["--env", "1=2", "--", "train", GOOD], "--env must be NAME=VALUE"),
        (["--env", "NOT_SET_HERE", "--", "train", GOOD], "there is no such variable here"),
        (["--submission-id", "../x", "train", GOOD], "--submission-id is '../x'"),
        (["--stop-time", "0", "train", GOOD], "--stop-time is 0.0, but it must be at least 1"),
        (["--package", "lte-ray==1", "train", GOOD], "it must be auto, none, or a file that ends in .whl"),
        (["--package", "missing.whl", "train", GOOD], "there is no such file"),
        (["--working-dir", "missing", "train", GOOD], "there is no such folder"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(
    folder: Path, cluster: Callable[..., FakeClient], capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    """Settings of the training, too, as far as its worker can be imported here."""
    client = cluster()
    assert says in refused(capsys, *arguments)
    assert not client.jobs


def test_a_training_is_submitted_with_its_folder_and_our_code(
    folder: Path, cluster: Callable[..., FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    """Submit's own flags end where the command begins. The log is on stdout, and notes are on stderr."""
    client = cluster("step 1\n", "step 2\nlte-ray: exit code 0\n")
    (folder / ".venv").mkdir()
    variables = ["--env", "A=1", "--env", "B=x=y", "C=", "--pip", "einops"]
    assert main(["submit", *variables, "--stop-time", "2m", "train", "mine.py:Regression", "--steps", "3"]) == 0
    output = capsys.readouterr()
    assert output.out == "step 1\nstep 2\nlte-ray: exit code 0\n"
    assert "Sending" in output.err
    assert "Left out: .venv/" in output.err
    assert "in ~/ray_results there" in output.err
    (job,) = client.jobs
    assert job["entrypoint"] == "python -m lte_ray train mine.py:Regression --steps 3"
    assert job["runtime_env"]["env_vars"] == {"A": "1", "B": "x=y", "C": "", "RAY_JOB_STOP_WAIT_TIME_S": "120"}
    assert job["runtime_env"]["pip"] == ["einops"]
    assert client.files == {"mine.py": WORKER.encode()}
    assert client.code


def test_what_the_cluster_has_installed_can_be_used(folder: Path, cluster: Callable[..., FakeClient]) -> None:
    """Then no code is sent, and with none no folder."""
    client = cluster()
    assert main(["submit", "--package", "none", "--working-dir", "none", "--", "lte-ray", "train", "regression"]) == 0
    (job,) = client.jobs
    assert job["entrypoint"] == "lte-ray train regression"
    assert set(job["runtime_env"]) == {"env_vars"}


def test_a_worker_elsewhere_is_sent_with_its_own_folder(
    folder: Path, tmp_path: Path, cluster: Callable[..., FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its path in the command is the one in that folder. In a folder that is named, it must be."""
    other = tmp_path / "other" / "net.py"
    other.parent.mkdir()
    other.write_text(WORKER)
    client = cluster()
    assert main(["submit", "train", f"{other}:Regression"]) == 0
    assert client.jobs[0]["entrypoint"].endswith("train net.py:Regression")
    assert set(client.files) == {"net.py"}
    inside = folder / "sub" / "net.py"
    inside.parent.mkdir()
    inside.write_text(WORKER)
    assert main(["submit", "train", f"{inside}:Regression"]) == 0
    assert client.jobs[1]["entrypoint"].endswith("train sub/net.py:Regression")
    assert main(["submit", "--working-dir", "sub", "train", "sub/net.py:Regression"]) == 0
    assert client.jobs[2]["entrypoint"].endswith("train net.py:Regression")
    assert "which doesn't contain it" in refused(capsys, "--working-dir", ".", "train", f"{other}:Regression")


def test_a_worker_that_only_the_cluster_can_make_is_left_to_it(
    folder: Path, cluster: Callable[..., FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its module is installed there, or it imports or reads what is there."""
    (folder / "heavy.py").write_text("import no_such_package\nclass Net: ...\n")
    (folder / "data.py").write_text(
        f"{WORKER}class Net(Regression):\n    def __init__(self, path: str = '/no/such'):\n        open(path)\n"
    )
    client = cluster()
    for worker in ("heavy.py:Net", "data.py:Net", "installed_there:Net", "/only/there/net.py:Net"):
        assert main(["submit", "train", worker]) == 0
        assert "WORKER can't be used here, so its settings aren't checked" in capsys.readouterr().err
    assert len(client.jobs) == 4


def test_files_that_the_command_names_must_be_sent(
    folder: Path, cluster: Callable[..., FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that are here: what only the cluster has is its own business."""
    (folder / ".gitignore").write_text("data/\n")
    (folder / "data").mkdir()
    (folder / "data" / "x.txt").write_text("x")
    (folder.parent / "y.txt").write_text("y")
    client = cluster()
    ignored = refused(capsys, "resume", "data/x.txt")
    assert "data/x.txt is in" in ignored
    assert ".gitignore excludes it" in ignored
    assert "../y.txt is outside the folder" in refused(capsys, "resume", "../y.txt")
    assert not client.jobs
    assert main(["submit", "resume", "other/run", "--storage=/data/x.txt"]) == 0


@pytest.mark.parametrize(
    ("ended", "code", "says"),
    [
        ({"status": "FAILED", "code": 1}, 1, "failed: exit code 1"),
        ({"status": "FAILED", "code": 2}, 2, "failed: exit code 2"),
        ({"status": "FAILED", "code": 75}, 75, "can be continued: exit code 75"),
        ({"status": "FAILED", "code": -9}, 137, "failed: exit code 137"),
        ({"status": "FAILED", "code": 127}, 127, "A program wasn't found"),
        ({"status": "STOPPED", "code": None}, 1, "before it could say how it ended"),
        ({"status": "FAILED", "code": None, "error": "RUNTIME_ENV_SETUP_FAILURE", "message": "no pip"}, 2, "couldn't prepare"),
        ({"status": "FAILED", "code": None, "error": "JOB_SUPERVISOR_ACTOR_DIED", "message": "node died."}, 75, "was lost"),
        ({"status": "FAILED", "code": None, "message": "odd"}, 1, "ended without an exit code: odd"),
    ],
)
def test_the_exit_code_is_the_jobs_own(
    folder: Path,
    cluster: Callable[..., FakeClient],
    capsys: pytest.CaptureFixture[str],
    ended: dict[str, Any],
    code: int,
    says: str,
) -> None:
    """As far as Ray or the log knows it."""
    cluster("line\n", **ended)
    assert main(["submit", "train", GOOD]) == code
    assert says in capsys.readouterr().err


def interrupt() -> None:
    """Ctrl-C."""
    raise KeyboardInterrupt


def interrupt_before(client: FakeClient, text: str) -> None:
    """Adds text to the log, which comes once Ctrl-C was pressed."""

    def once() -> None:
        client.log[client.log.index(once)] = text
        raise KeyboardInterrupt

    client.log.append(once)


def test_ctrl_c_stops_the_job_and_follows_it_until_it_has_saved(
    folder: Path, cluster: Callable[..., FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    """No line is printed twice, although Ray sends the log again."""
    client = cluster("one\ntwo\n", status="STOPPED", code=None)
    interrupt_before(client, "three\nlte-ray: exit code 75\n")
    assert main(["submit", "train", GOOD]) == 130
    output = capsys.readouterr()
    assert output.out == "one\ntwo\nthree\nlte-ray: exit code 75\n"
    assert "asked to stop, and saves itself first" in output.err
    assert client.stopped == 1


def test_sigterm_stops_the_job_and_gives_its_exit_code(
    folder: Path, cluster: Callable[..., FakeClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a training which SIGTERM ends: 75, if it can be continued."""
    client = cluster("one\n", status="STOPPED", code=None)
    interrupt_before(client, "lte-ray: exit code 75\n")
    monkeypatch.setattr(command_line, "received_sigterm", lambda: True)
    assert main(["submit", "train", GOOD]) == 75
    assert client.stopped == 1


def test_a_second_ctrl_c_leaves_the_job_to_itself(
    folder: Path, cluster: Callable[..., FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    """It says how to see it again."""
    client = cluster("one\n", interrupt)
    assert main(["submit", "train", GOOD]) == 130
    assert "is left to itself. See it with ray job logs --follow" in capsys.readouterr().err
    assert client.stopped == 1


def test_a_lost_connection_is_made_again(
    folder: Path, cluster: Callable[..., FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    """The log continues where it was."""
    cluster("one\n", ConnectionResetError("reset"), RuntimeError("closed"), "two\n")
    assert main(["submit", "train", GOOD]) == 0
    output = capsys.readouterr()
    assert output.out == "one\ntwo\n"
    assert "is lost (reset.). Trying again." in output.err


def test_json_is_one_object_and_the_log_goes_to_stderr(
    folder: Path, cluster: Callable[..., FakeClient], capsys: pytest.CaptureFixture[str]
) -> None:
    """With --detach it is printed at once."""
    cluster("one\n", status="FAILED", code=75)
    assert main(["submit", "--json", "--submission-id", "a", "train", GOOD]) == 75
    output = capsys.readouterr()
    assert json.loads(output.out) == {"submission_id": "a", "address": "http://here", "status": "FAILED", "exit_code": 75}
    assert "one\n" in output.err
    assert main(["submit", "--json", "--detach", "--submission-id", "a", "train", GOOD]) == 0
    assert json.loads(capsys.readouterr().out) == {"submission_id": "a", "address": "http://here"}


def test_help_of_the_command_is_shown_here(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No cluster is needed for it."""
    with pytest.raises(SystemExit) as leaving:
        main(["submit", "train", GOOD, "--help"])
    assert leaving.value.code == 0
    assert "--num-heads" in capsys.readouterr().out


def test_notes_are_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets in a path aren't markup."""
    submitting._note("[red] x")
    assert capsys.readouterr().err == "[red] x\n"
