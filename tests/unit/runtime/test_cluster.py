"""The errors of a user who can't connect to Ray. `ray.init` is a fake here; tests/integration has the real one."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from lte_ray.errors import ResourceError
from lte_ray.runtime import cluster


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no connection, none can be made, and the environment names none."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "_probe", lambda address: None)
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def error_text(monkeypatch: pytest.MonkeyPatch, error: Exception, **environment: str) -> str:
    """Returns the text of the user's error if Ray raises `error`."""

    def fails(**arguments: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", fails)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ResourceError) as raised, cluster.connected():
        pass
    return str(raised.value)


@pytest.mark.parametrize(
    ("initialized", "address", "starts"),
    [(False, None, True), (False, "", True), (False, "10.0.0.1:6379", False), (True, None, False)],
)
def test_a_local_ray_is_started_only_if_there_is_none(
    monkeypatch: pytest.MonkeyPatch, initialized: bool, address: str | None, starts: bool
) -> None:
    """What the display says at the start depends on it."""
    monkeypatch.setattr(ray, "is_initialized", lambda: initialized)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster.will_start() == starts


def test_a_token_that_is_not_there_is_one_error_that_says_where_to_give_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the cluster, Ray's reason without its page of help, what was found here, and what to set."""
    missing = ray.exceptions.AuthenticationError("Token authentication is enabled but no authentication token was found")
    text = error_text(monkeypatch, missing, RAY_ADDRESS="10.0.0.1:6379", RAY_AUTH_MODE="token")
    assert text == (
        "No connection to the cluster at RAY_ADDRESS=10.0.0.1:6379: Token authentication is enabled but no authentication "
        "token was found. RAY_AUTH_MODE is token here, and the token comes from ~/.ray/auth_token, if it is there. Set "
        "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's token, or RAY_AUTH_TOKEN_PATH to a file that holds it."
    )


def test_a_failed_connection_may_be_a_refused_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray says only that it couldn't connect: the error names the token as a possible reason, and doesn't show it."""
    refused = ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379")
    text = error_text(monkeypatch, refused, RAY_ADDRESS="10.0.0.1:6379")
    assert "Correct or unset RAY_ADDRESS. If that cluster wants a token: RAY_AUTH_MODE is unset here," in text
    text = error_text(monkeypatch, refused, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="0123456789abcdef")
    assert "RAY_AUTH_MODE is token here, and the token comes from RAY_AUTH_TOKEN." in text
    assert "0123456789abcdef" not in text


def test_the_address_of_a_job_server_is_for_submit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray takes its scheme for a Python module."""
    monkeypatch.undo()
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with cluster.use_address("http://head:8265"), pytest.raises(ResourceError) as raised, cluster.connected():
        pass
    assert "--address http://head:8265 is the address of a job server. Run the same command there with lte-ray" in str(
        raised.value
    )


def test_a_local_ray_that_does_not_start_is_not_blamed_on_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no address to correct."""
    assert error_text(monkeypatch, RuntimeError("no room")) == "No connection to a local Ray: no room."


def test_a_node_that_is_not_there_in_time_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises a plain Exception then; errors of other kinds are no news about the cluster."""
    text = error_text(monkeypatch, Exception("The current node timed out during startup."))
    assert text == "A local Ray didn't start in time: The current node timed out during startup. Try again."
    monkeypatch.setattr(ray, "init", lambda **_: {}["missing"])
    with pytest.raises(KeyError), cluster.connected():
        pass
