"""The job server of a cluster, with Ray's own client: finds it, submits a job, follows its log, and stops it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import ray
from ray.job_submission import JobSubmissionClient

from lte_ray.errors import ConfigError, ResourceError, RunError
from lte_ray.runtime.cluster import describe_token
from lte_ray.storage import run_in_thread

T = TypeVar("T")

VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Environment variables that name the cluster, the first one first."""

HEADERS = "RAY_JOB_HEADERS"
"""Ray's variable with headers for its job server, as JSON."""

CONNECT = 10.0
"""Seconds until a server must have answered a connection."""

ANSWER = 60.0
"""Seconds until a server must have answered a question."""

PATIENCE = 600.0
"""Seconds without an answer after which a job is no longer followed."""

SILENCE = {"PENDING": 5.0, "RUNNING": 60.0}
"""Seconds without a line after which the state of a job is asked for."""

EXIT_LINE = "lte-ray: exit code "
"""How the last line begins that a command of lte-ray writes in a job. Ray doesn't record the exit code of a stopped job."""

CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging")
"""Loggers of Ray's client whose notes say less than ours."""

_LOST = (OSError, RuntimeError, ResourceError, aiohttp.ClientError)


def connect(address: str | None) -> JobServer:
    """Connects to the job server at an address, by default the one that the environment names.

    Args:
        address: ``http://HOST:PORT`` or ``HOST:PORT`` of the job server, or what `ray.init` takes.

    Raises:
        ConfigError: no address is given, or it names no cluster.
        ResourceError: nothing answers there, it isn't a job server, or it refuses the token.
    """
    variable = next((name for name in VARIABLES if os.environ.get(name)), None)
    source = "--address " if address else f"{variable}=" if variable else ""
    given = address or (os.environ[variable] if variable else "")
    if given == "local":
        raise ConfigError(f"{source}local is no cluster that runs. Give the address of its job server: http://HEAD-NODE:8265.")
    shown = f"at {source}{given}" if given else "on this machine"
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    if given:
        given = _with_scheme(given.partition("#")[0], shown)  # a link to the dashboard may be given
    change = "Correct it, or start its job server." if given else (
        "Give the address of the cluster's job server, --address http://HEAD-NODE:8265, or set RAY_API_SERVER_ADDRESS."
    )  # fmt: skip
    try:
        headers = json.loads(os.environ.get(HEADERS, "null"))
        with _preferring(given):
            client = _within(ANSWER, lambda: JobSubmissionClient(given or None, headers=headers))
    except ray.exceptions.AuthenticationError as error:
        why = _first_line(error).partition(" Note: ")[0]  # Ray's note is a page about tokens
        raise ResourceError(f"The job server {shown} refuses: {why} {describe_token()}") from error
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        if "header value" in str(error):  # its text has the token
            raise ResourceError(
                f"The token can't be sent to the job server {shown}: it has characters that no header may have."
            ) from None
        raise ResourceError(f"No job server answers {shown}: {_first_line(error)} {change}") from error
    return JobServer(client, client.get_address())


@contextlib.contextmanager
def _preferring(address: str) -> Iterator[None]:
    """Has Ray's client use this address for the block, if there is one: it prefers its variables to its argument."""
    before = os.environ.get(VARIABLES[0])
    try:
        if address:
            os.environ[VARIABLES[0]] = address
        yield
    finally:
        if address and before is None:
            del os.environ[VARIABLES[0]]
        elif address:
            os.environ[VARIABLES[0]] = str(before)


def _with_scheme(address: str, shown: str) -> str:
    """An address with ``http://`` if a web server answers there. Tries it once: Ray itself tries for minutes.

    Raises:
        ResourceError: nothing answers.
    """
    scheme, mark, _ = address.partition("://")
    place = urlsplit(address if mark else f"//{address}")
    try:
        host, port = place.hostname, place.port or {"http": 80, "https": 443}.get(scheme)
    except ValueError as error:
        raise ResourceError(f"{shown.removeprefix('at ')} is no address: {error}.") from error
    if not host or not port or (mark and scheme not in ("http", "https")):
        return address  # "auto", ray://, or a platform's own
    try:
        socket.create_connection((host, port), timeout=CONNECT).close()
    except OSError as error:
        raise ResourceError(
            f"Nothing answers {shown}: {error}. The job server's address is http://HEAD-NODE:8265 unless Ray was started "
            "with another one."
        ) from error
    return address if mark or not _is_web_server(host, port) else f"http://{address}"


def _is_web_server(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=CONNECT)
    try:
        connection.request("GET", "/api/version")
        connection.getresponse()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Returns what a call returns. Ray's client waits without a limit for a server that is gone.

    Raises:
        ResourceError: it hasn't returned in time.
    """
    try:
        return run_in_thread(call).result(seconds)
    except TimeoutError:
        raise ResourceError(f"There is no answer in {seconds:g} s.") from None


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if text.endswith(".") else f"{text}."


@dataclass
class JobServer:
    """A connection to a job server.

    Attributes:
        client: Ray's.
        address: of the server.
    """

    client: Any
    address: str

    def submit(self, job: str, command: str, runtime_env: Mapping[str, Any]) -> None:
        """Uploads what a job needs, and starts its command.

        Raises:
            ConfigError: there has been a job of this id.
            ResourceError: the server refuses, or is gone.
        """
        try:
            self.client.submit_job(submission_id=job, entrypoint=command, runtime_env=dict(runtime_env))
        except (OSError, RuntimeError, ValueError) as error:
            if "already exists" in str(error):
                raise ConfigError(f"--submission-id is {job!r}, but the cluster has a job of this id. Give another.") from error
            raise ResourceError(f"{self.address} didn't take the job: {_reason(str(error))}") from error

    def stop(self, job: str) -> None:
        """Asks a job to end. Raises ResourceError if the server doesn't answer or has no such job."""
        try:
            _within(ANSWER, lambda: self.client.stop_job(job))
        except (OSError, RuntimeError) as error:
            raise ResourceError(f"{self.address} didn't stop the job {job}: {_reason(str(error))}") from error

    def info(self, job: str) -> Any:
        """What Ray knows of a job (its `JobDetails`)."""
        return _within(ANSWER, lambda: self.client.get_job_info(job))


def _reason(text: str) -> str:
    """The line of Ray's text that says why: of a traceback the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if "Traceback" in text else lines[0] if lines else "it doesn't say why"
    return last if last.endswith(".") else f"{last}."


@dataclass
class JobLog:
    """The log of one job, printed as it grows. After a lost connection it continues where it was.

    Attributes:
        server: of the cluster.
        job: its id.
        write: gets new text.
        note: gets a sentence about the job or the connection.
        exit_code: that the job's command has written in the log, if it has.
    """

    server: JobServer
    job: str
    write: Callable[[str], None]
    note: Callable[[str], None]
    exit_code: int | None = None
    _seen: int = 0
    _last_line: str = ""
    _status: str = "PENDING"
    _is_writing: bool = False
    _shown: set[str] = field(default_factory=set)

    def follow(self) -> Any:
        """Prints until the job has ended. Returns what Ray knows of it then.

        Raises:
            RunError: the server hasn't answered for long.
        """
        last_answer = time.monotonic()
        while True:
            try:
                complete = asyncio.run(self._print())
                info = self.server.info(self.job)
            except _LOST as error:
                if self._is_writing:  # not the connection: our own output is closed
                    raise
                self._note_once(f"The connection to {self.server.address} is lost ({_first_line(error)}). Trying again.")
                if time.monotonic() - last_answer > PATIENCE:
                    raise RunError(
                        f"{self.server.address} hasn't answered for {PATIENCE:g} s. The job {self.job} may still run: see it "
                        f"with ray job logs --follow {self.job}."
                    ) from error
                time.sleep(1)
                continue
            last_answer = time.monotonic()
            self._status = info.status.value
            if info.status.is_terminal() and complete:
                return info
            if self._status == "PENDING":
                self._note_once(f"The job waits: {_first_line(RuntimeError(info.message or 'it is pending'))}")

    async def _print(self) -> bool:
        """Prints what is new. Returns whether the log is complete; False if nothing more has come for a while."""
        skip = self._seen
        texts = self.server.client.tail_job_logs(self.job)
        while True:
            try:
                text = await asyncio.wait_for(anext(texts), SILENCE.get(self._status, 5.0))
            except StopAsyncIteration:
                return True
            except TimeoutError:
                return False
            new, skip = text[skip:], max(0, skip - len(text))
            if new:
                self._status = "RUNNING"
                self._seen += len(new)
                self._is_writing = True
                self.write(new)
                self._is_writing = False
                self._read_exit_code(new)

    def _read_exit_code(self, text: str) -> None:
        *complete, self._last_line = (self._last_line + text).split("\n")
        for line in complete:
            if match := re.match(rf"{EXIT_LINE}(\d+)", line):
                self.exit_code = int(match[1])

    def _note_once(self, text: str) -> None:
        if text not in self._shown:
            self._shown.add(text)
            self.note(text)


def exit_code_of(info: Any, in_log: int | None) -> int | None:
    """The exit code of a job's command; None if it isn't known.

    Args:
        info: what Ray knows of the job.
        in_log: that the command has written in the log.
    """
    status, code = info.status.value, info.driver_exit_code
    if status == "SUCCEEDED":
        return 0
    if code is not None:
        return 128 - code if code < 0 else int(code)
    return in_log if status == "STOPPED" else None
