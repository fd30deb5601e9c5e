"""How a job server is found, and what a user sees if it isn't. Ray's client is a fake."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from lte_ray.errors import ConfigError, ResourceError
from lte_ray.jobs import server as job_server
from lte_ray.jobs.server import VARIABLES, JobServer, connect


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment names no cluster and no token."""
    for name in (*VARIABLES, "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_JOB_HEADERS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def port() -> Iterator[int]:
    """The port of a web server that knows no page."""
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None], list[Any]]:
    """Makes Ray's client fail with an error, or record its arguments."""

    def make(error: Exception | None) -> list[Any]:
        calls: list[Any] = []

        def start(address: str | None, headers: Any) -> Any:
            calls.append((os.environ.get("RAY_API_SERVER_ADDRESS"), headers))
            if error is not None:
                raise error
            return SimpleNamespace(get_address=lambda: address)

        monkeypatch.setattr(job_server, "JobSubmissionClient", start)
        return calls

    return make


def refusal(address: str | None = None) -> str:
    """The error of a connection that can't be made."""
    with pytest.raises((ConfigError, ResourceError)) as raised:
        connect(address)
    return str(raised.value)


def test_a_flag_wins_over_variables_and_needs_no_scheme(
    port: int, client: Callable[[Exception | None], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's client prefers its variables, so they get what was chosen. A link to the dashboard is an address, too."""
    calls = client(None)
    monkeypatch.setenv("RAY_JOB_HEADERS", '{"a": "b"}')
    for address in (f"127.0.0.1:{port}", f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port}#/jobs"):
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:1")
        monkeypatch.setenv("RAY_ADDRESS", "other:1")
        assert connect(address).address == f"http://127.0.0.1:{port}"
        assert calls[-1][0] == f"http://127.0.0.1:{port}"
        assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://other:1"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{port}")
    assert connect(None).address == f"http://127.0.0.1:{port}"
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert connect(None).address == "auto"
    assert {headers["a"] for _, headers in calls} == {"b"}


def test_a_server_that_is_not_there_is_one_error_that_names_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried once."""
    assert refusal("local").startswith("--address local is no cluster that runs")
    assert refusal("http://127.0.0.1:1").startswith("Nothing answers at --address http://127.0.0.1:1: [Errno 111]")
    assert refusal("http://127.0.0.1:99999").startswith("--address http://127.0.0.1:99999 is no address")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert refusal().startswith("Nothing answers at RAY_ADDRESS=127.0.0.1:1: [Errno 111]")


def test_a_token_that_is_refused_is_one_sentence_without_rays_page(
    port: int, client: Callable[[Exception | None], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without the token."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123secret")
    client(ray.exceptions.AuthenticationError("Authentication failed: Forbidden. Note: a page.\n\nMore of it."))
    text = refusal(f"http://127.0.0.1:{port}")
    assert text.startswith(
        f"The job server at --address http://127.0.0.1:{port} refuses: Authentication failed: Forbidden. RAY_AUTH"
    )
    assert "a page" not in text
    client(ValueError("Invalid character(s) in header value: 'Bearer 0123secret'"))
    text = refusal(f"http://127.0.0.1:{port}")
    assert "it has characters that no header may have" in text
    assert "0123secret" not in text


def test_another_server_is_no_job_server(port: int, client: Callable[[Exception | None], list[Any]]) -> None:
    """Ray's client then fails in many ways."""
    client(RuntimeError("Version check returned 404. Please upgrade.\nTrace"))
    assert f"No job server answers at --address http://127.0.0.1:{port}: Version check returned 404." in refusal(
        f"http://127.0.0.1:{port}"
    )
    client(ConnectionError("Could not find any running Ray instance."))
    assert refusal().endswith(
        "No job server answers on this machine: Could not find any running Ray instance. Give the address of the cluster's job "
        "server, --address http://HEAD-NODE:8265, or set RAY_API_SERVER_ADDRESS."
    )


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("Request failed with status code 400: Job with submission_id a already exists.", ConfigError, "has a job of this id"),
        (
            "Request failed with status code 500: Traceback (most recent call last):\n  x\nOSError: full",
            ResourceError,
            "OSError: full.",
        ),
    ],
)
def test_a_job_that_is_not_taken_says_why(text: str, error: type[Exception], says: str) -> None:
    """In the last line of the server's traceback."""

    def submit_job(**job: Any) -> None:
        raise RuntimeError(text)

    with pytest.raises(error) as raised:
        JobServer(SimpleNamespace(submit_job=submit_job), "http://x").submit("a", "true", {})
    assert says in str(raised.value)
