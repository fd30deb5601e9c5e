"""``lte-ray submit``: runs a command of lte-ray as a job on a Ray cluster, with the worker's folder and lte-ray's own code.

It is a thin layer over Ray's job client: ``ray job`` shows, follows and stops its jobs, too.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lte_ray.cli.call import print_json
from lte_ray.cli.settings_parser import parse_arguments, positional
from lte_ray.config import suggest
from lte_ray.config.units import read_units
from lte_ray.config.validation import check_at_least, setting
from lte_ray.errors import RESUMABLE, ConfigError, LTEError, ResourceError, RunError, WorkerError

if TYPE_CHECKING:
    from lte_ray.jobs.folder import Folder
    from lte_ray.jobs.server import JobServer

USAGE = "lte-ray submit [flags] [--] COMMAND"
NOTHING = "none"
STOP_VARIABLE = "RAY_JOB_STOP_WAIT_TIME_S"

DRIVER_LOST = "JOB_SUPERVISOR_ACTOR_DIED"
"""Ray's word for a job whose driver was lost."""

NO_PROGRAM = 127
"""A shell's exit code if there is no such program."""

NOT_FOR_JOBS = {"submit", "new", "completion", "watch"}
"""Subcommands that make no sense in a job."""


@dataclass(frozen=True)
class Flags:
    """Runs COMMAND, such as train mine.py:Net --num-heads 8, as a job on a Ray cluster: sends the current folder and lte-ray's
    code, prints the job's log, and ends with its exit code. Ctrl-C stops the job, which saves itself first; a second Ctrl-C
    leaves it to itself."""

    command: str = positional("COMMAND", "A command of lte-ray with its arguments, after submit's own flags.")
    address: str | None = setting(
        None,
        "The cluster's job server, http://HEAD-NODE:8265. It wins over RAY_API_SERVER_ADDRESS and RAY_ADDRESS; without any, "
        "it is looked for on this machine.",
    )
    working_dir: str | None = setting(
        None,
        "Folder to send, in which COMMAND runs; none: send nothing. By default the current one, or a WORKER's outside it.",
    )
    package: str = setting(
        "auto",
        "lte-ray for the job. auto: its code as it is here; a file .whl: the code in that wheel; none: what the cluster has "
        "installed. The cluster needs what lte-ray depends on.",
    )
    pip: tuple[str, ...] = setting(
        (), "What Ray installs with pip on each node before the job: packages such as einops, or a file of requirements."
    )
    env: tuple[str, ...] = setting(
        (), "Variables for the job's processes: NAME=VALUE, or NAME with its value here. Ray shows them to who can see the job."
    )
    submission_id: str | None = setting(None, "The job's id in Ray; by default one with the time.")
    detach: bool = setting(False, "Don't wait: end as soon as the job is submitted.")
    stop_time: float = setting(
        60.0, "Time that a stopped job has to save itself before Ray kills it. (Ray's own default is 3 s.)", unit="time"
    )
    json: bool = setting(False, "Print one JSON object on stdout when the job has ended; its log goes to stderr.")

    def __post_init__(self) -> None:
        read_units(self)
        check_at_least(self, 1, "stop_time")
        if self.submission_id is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", self.submission_id):
            raise ConfigError(
                f"--submission-id is {self.submission_id!r}, but it must have letters, digits, '-', '_' and '.' only, and at "
                "most 100."
            )
        if self.package.endswith(".whl") and not Path(self.package).expanduser().is_file():
            raise ConfigError(f"--package is {self.package!r}, but there is no such file.")
        if self.package not in ("auto", NOTHING) and not self.package.endswith(".whl"):
            raise ConfigError(f"--package is {self.package!r}, but it must be auto, none, or a file that ends in .whl.")


def submit(arguments: list[str]) -> int:
    """Runs the subcommand with the arguments after ``submit``, and returns the job's exit code.

    Raises:
        ConfigError: a flag, or a setting of the command, is wrong; or the folder is too large.
        ResourceError: no job server answers, or it refuses.
        RunError: the job couldn't start, or was lost.
    """
    given, command = split_command(arguments)
    flags: Flags = parse_arguments(Flags, USAGE, [*command[:1], *join_repeated(given)])
    command = command or [flags.command]
    check_subcommand(command)
    root, command = _folder_and_command(command, flags.working_dir)
    variables = {STOP_VARIABLE: f"{math.ceil(flags.stop_time)}"} | read_variables(flags.env)
    with contextlib.chdir(root or "."):
        storage = check_locally(command, flags.stop_time)
    from lte_ray.jobs.folder import read_folder
    from lte_ray.jobs.server import connect

    folder = None if root is None else read_folder(root)
    if folder is not None:
        check_files(command, folder)
    server = connect(flags.address)
    job = flags.submission_id or f"lte-ray-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    _note(_describe_folder(folder))
    with tempfile.TemporaryDirectory(prefix="lte-ray-") as scratch:
        runtime_env = _runtime_env(flags, folder, Path(scratch), variables)
        try:
            server.submit(job, entrypoint(command, flags.package), runtime_env)
        except KeyboardInterrupt:
            with contextlib.suppress(LTEError):  # it may have arrived
                server.stop(job)
            raise
    _note(f"Job {job} is submitted to {server.address}. {storage}".strip())
    if flags.detach:
        _note(f"See it with ray job logs --follow {job}, and stop it with ray job stop {job}.")
        if flags.json:
            print_json({"submission_id": job, "address": server.address})
        return 0
    code, status = _follow(server, job)
    if flags.json or "--json" in command:
        print_json({"submission_id": job, "address": server.address, "status": status, "exit_code": code})
    return code


# -- the command --------------------------------------------------------------------------------------------------------


def split_command(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Splits the arguments into submit's own flags and the command, which begins after ``--`` or with a subcommand's name."""
    from lte_ray.cli.main import COMMANDS

    if "--" in arguments:
        at = arguments.index("--")
        given, command = arguments[:at], arguments[at + 1 :]
    else:
        at = next((i for i, each in enumerate(arguments) if each in COMMANDS or each == "lte-ray"), len(arguments))
        given, command = arguments[:at], arguments[at:]
    return given, command[1:] if command[:1] == ["lte-ray"] else command


def join_repeated(arguments: list[str]) -> list[str]:
    """The flags with all values of ``--env`` in one place, and those of ``--pip``, since both may be given several times."""
    joined: dict[str, list[str]] = {"--env": [], "--pip": []}
    rest: list[str] = []
    into = rest
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("-"):
            into = joined.get(name, rest)
            if into is not rest:
                into += [value] if equals else []
                continue
        into.append(argument)
    return rest + [each for name, values in joined.items() if values or name in arguments for each in (name, *values)]


def check_subcommand(command: list[str]) -> None:
    """Raises ConfigError unless the command is one of lte-ray that a job can run on the cluster that it is submitted to."""
    from lte_ray.cli.main import COMMANDS

    name = command[0]
    if name not in COMMANDS:
        if ":" in name or name.endswith(".py"):
            raise ConfigError(f"COMMAND is {name!r}, but it must be a command of lte-ray: lte-ray submit train {name}.")
        raise ConfigError(
            f"COMMAND is {name!r}, but it must be a command of lte-ray, such as train.{suggest(name, COMMANDS)} Other programs "
            "run with ray job submit."
        )
    if name in NOT_FOR_JOBS:
        raise ConfigError(f"lte-ray {name} doesn't run in a job. Run it here.")
    if any(each.partition("=")[0] == "--address" for each in command):
        raise ConfigError(
            "--address stands after the job's command, but the job uses the cluster that it is submitted to. Give it before: "
            f"lte-ray submit --address http://HEAD-NODE:8265 {name} ..."
        )


def _folder_and_command(command: list[str], given: str | None) -> tuple[Path | None, list[str]]:
    """The folder to send, and the command with the path of its WORKER in that folder."""
    here = Path.cwd()
    root = None if given == NOTHING else here if given is None else Path(given).expanduser().absolute()
    if root is not None and not root.is_dir():
        raise ConfigError(f"--working-dir is {str(root)!r}, but there is no such folder.")
    place, colon, name = command[1].rpartition(":") if len(command) > 1 else ("", "", "")
    if not colon or not place.endswith(".py"):
        return root, command
    if root is None:
        if not os.path.isabs(place):
            raise ConfigError(f"WORKER is {command[1]!r}, a file that isn't sent with --working-dir none. Leave that out.")
        return root, command
    path = Path(os.path.abspath(Path(place).expanduser()))
    if not path.is_file():
        return root, command  # it may be relative to --working-dir; the check of the command says if it isn't
    if not path.is_relative_to(root):
        if given is not None:
            raise ConfigError(f"WORKER is in {path}, but --working-dir is {root}, which doesn't contain it.")
        root = path.parent
    return root, [command[0], f"{path.relative_to(root).as_posix()}:{name}", *command[2:]]


def check_locally(command: list[str], stop_time: float) -> str:
    """Finds mistakes in the settings of a training here, before anything is sent. A worker that only the cluster can import or
    make is left to the job.

    Args:
        command: of lte-ray, with its arguments.
        stop_time: seconds that a stopped job has.

    Returns:
        A sentence about where the run will be kept.

    Raises:
        ConfigError: a setting is wrong.
    """
    if command[0] != "train":
        return ""
    from lte_ray.cli.flags import parse
    from lte_ray.cli.train import named_run
    from lte_ray.cli.worker_argument import read_worker

    if named_run(command[1:]) is not None:
        return ""
    try:
        worker = read_worker(command[1:], "train")
        parsed = parse(worker.kind, worker.program or "WORKER", worker.flags)
    except WorkerError as error:
        if error.__cause__ is None and not _may_be_elsewhere(command):
            raise
        _note(f"WORKER can't be used here, so its settings aren't checked: {error}")
        return ""
    if parsed.failure.grace > stop_time:
        raise ConfigError(
            f"--grace is {parsed.failure.grace:g} s, but a stopped job has {stop_time:g} s before Ray kills it. Give more: "
            f"lte-ray submit --stop-time {math.ceil(parsed.failure.grace) + 10} train ..."
        )
    storage = parsed.storage.storage
    if storage is None:
        return "The run is kept on the cluster, in ~/ray_results there; on several nodes give a --storage that all can access."
    if "://" not in storage:
        if not os.path.isabs(os.path.expanduser(storage)):
            raise ConfigError(
                f"--storage is {storage!r}, a relative path, but the folder of a job is removed after it. Give a URI such as "
                "s3://bucket/runs, or the absolute path of a disk that all nodes share."
            )
        return f"The run is kept in {storage} on the cluster."
    return ""


def _may_be_elsewhere(command: list[str]) -> bool:
    """Whether WORKER is in a module that isn't installed here, or in a file at an absolute path that isn't here."""
    place, colon, _ = command[1].rpartition(":") if len(command) > 1 else ("", "", "")
    if place.endswith(".py"):
        return os.path.isabs(place) and not os.path.exists(place)
    return bool(colon) and find_spec(place.partition(".")[0]) is None


def check_files(command: list[str], folder: Folder) -> None:
    """Raises ConfigError if an argument of the command names a file that is here, but isn't sent."""
    for argument in command[1:]:
        for value in (argument, argument.partition("=")[2]):
            place = value.rpartition(":")[0] if ".py:" in value else value
            if not place or place.startswith(("-", "/", "~")) or "://" in place or not {"/", "."} & set(place):
                continue
            path = Path(os.path.normpath(folder.root / place))
            if not path.exists():
                continue
            if not path.is_relative_to(folder.root):
                raise ConfigError(f"{place} is outside the folder that is sent, {folder.root}. Copy it there, or {_OTHER}")
            why = folder.why_left_out(path.relative_to(folder.root).as_posix())
            if why:
                raise ConfigError(f"{place} is in {folder.root}, but isn't sent: {why}. Change that, or {_OTHER}")


_OTHER = "give a place that the cluster can access: a shared disk, or a URI."


def read_variables(given: tuple[str, ...]) -> dict[str, str]:
    """The variables of ``--env``. A name alone takes its value from here.

    Raises:
        ConfigError: one isn't NAME=VALUE, or isn't set here.
    """
    variables = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ConfigError("--env must be NAME=VALUE, or the NAME of a variable that is set here.")
        if not equals and name not in os.environ:
            raise ConfigError(f"--env is {name}, but there is no such variable here. Write {name}=VALUE.")
        variables[name] = value if equals else os.environ[name]
    return variables


def entrypoint(command: list[str], package: str) -> str:
    """The shell command of the job. Code that is sent has no program in the cluster's PATH."""
    return shlex.join(["lte-ray", *command] if package == NOTHING else ["python", "-m", "lte_ray", *command])


def _runtime_env(flags: Flags, folder: Folder | None, scratch: Path, variables: dict[str, str]) -> dict[str, Any]:
    from lte_ray.jobs.code import copy_code

    environment: dict[str, Any] = {"env_vars": variables}
    if folder is not None:
        folder.archive(scratch / "folder.zip")
        environment["working_dir"] = str(scratch / "folder.zip")
    if flags.package != NOTHING:
        wheel = None if flags.package == "auto" else Path(flags.package).expanduser()
        environment["py_modules"] = [str(copy_code(scratch / "code", wheel))]
    if flags.pip:  # Ray reads a file of requirements itself
        environment["pip"] = flags.pip[0] if len(flags.pip) == 1 and Path(flags.pip[0]).is_file() else list(flags.pip)
    return environment


# -- the job ------------------------------------------------------------------------------------------------------------


def _follow(server: JobServer, job: str) -> tuple[int, str]:
    """Prints the job's log until it has ended. Returns the exit code and Ray's word for how it ended.

    Raises:
        RunError: it couldn't start, was lost or killed, or the server is gone.
    """
    from lte_ray.cli.main import received_sigterm
    from lte_ray.jobs.server import JobLog, exit_code_of

    log = JobLog(server, job, _write, _note)
    interrupted = False
    while True:
        try:
            info = log.follow()
            break
        except KeyboardInterrupt:
            if interrupted:
                _note(f"The job {job} is left to itself. See it with ray job logs --follow {job}.")
                return 130, "UNKNOWN"
            interrupted = True
            _stop(server, job)
    code, status = exit_code_of(info, log.exit_code), info.status.value
    if interrupted and status == "STOPPED" and not received_sigterm():
        return 130, status
    if code is None:
        if str(getattr(info.error_type, "value", info.error_type)) == DRIVER_LOST:
            _note(
                f"The job {job} was lost, probably with its node: {info.message} With --name NAME --resume in it, the same "
                "command continues what is saved."
            )
            return RESUMABLE, status
        raise _lost(job, info)
    if code == NO_PROGRAM:
        _note("A program wasn't found: PATH is that of the cluster's Ray. Change it with --env 'PATH=/path/to/bin:${PATH}'.")
    if code:
        kind = "can be continued" if code == RESUMABLE else "failed" if status == "FAILED" else "was stopped"
        _note(f"The job {job} {kind}: exit code {code}.")
    return code, status


def _stop(server: JobServer, job: str) -> None:
    try:
        server.stop(job)
    except ResourceError as error:
        _note(str(error))
    else:
        _note("The job is asked to stop, and saves itself first. Ctrl-C again leaves it to itself.")


def _lost(job: str, info: Any) -> LTEError:
    """The error for a job whose command hasn't said how it ended."""
    kind, message = str(getattr(info.error_type, "value", info.error_type or "")), (info.message or "").strip()
    if info.status.value == "STOPPED":
        return RunError(
            f"The job {job} was stopped before it could say how it ended: before its command began, or it was killed while it "
            "saved itself (--stop-time)."
        )
    if kind == "RUNTIME_ENV_SETUP_FAILURE":
        return ResourceError(f"The cluster couldn't prepare what the job {job} needs: {message}")
    return RunError(f"The job {job} ended without an exit code: {message or kind or 'Ray says no more'}")


def _write(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _note(text: str) -> None:
    if text:
        Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)


def _describe_folder(folder: Folder | None) -> str:
    if folder is None:
        return "No folder is sent."
    from lte_ray.jobs.folder import format_size

    shown = [
        f"{name}/" if (folder.root / name).is_dir() else name for name in folder.left_out if not name.endswith("__pycache__")
    ]
    more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
    rest = f" Left out: {', '.join(shown[:8])}{more}." if shown else ""
    number = f"{len(folder.files)} file{'' if len(folder.files) == 1 else 's'}"
    return f"Sending {folder.root}: {number}, {format_size(folder.size)}.{rest}"
