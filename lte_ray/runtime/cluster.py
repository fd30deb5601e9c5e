"""The connection to Ray: the cluster that the environment names, or a local one for this run only."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator

import ray

from lte_ray.errors import ResourceError

HASH_SEED = "PYTHONHASHSEED"


def will_start() -> bool:
    """Whether `connected` starts a local Ray, instead of connecting to one that runs."""
    return not ray.is_initialized() and not os.environ.get("RAY_ADDRESS")


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Connects to Ray for the block: an existing connection; else RAY_ADDRESS; else a local Ray that ends with the block.

    Raises:
        ResourceError: no cluster answers at RAY_ADDRESS, it needs a token that isn't set here, or no local Ray starts.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    terminate = signal.getsignal(signal.SIGTERM)
    if address:
        _probe(address)
    try:
        if address:
            # Sets of text have one order in all processes. The workers of a job that says so itself have one already.
            same_order = {} if HASH_SEED in os.environ else {"env_vars": {HASH_SEED: "0"}}
            ray.init(address=address, logging_level=logging.WARNING, runtime_env=same_order)
        else:
            os.environ.setdefault(HASH_SEED, "0")  # Ray's workers inherit it
            for name in ("RAY_enable_metrics_collection", "RAY_event_stats"):
                os.environ.setdefault(name, "0")  # a private Ray's metrics are never read, and cost the heads time
            ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR)
    except (KeyboardInterrupt, SystemExit):  # Ray's handler of SIGTERM exits; what has started must end
        ray.shutdown()
        raise KeyboardInterrupt from None
    except ray.exceptions.AuthenticationError as error:
        raise ResourceError(f"No connection to {_place(address)}: {error.args[0]}. {_token()}") from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        change = f"Correct or unset RAY_ADDRESS. If that cluster wants a token: {_token()}" if address else ""
        raise ResourceError(f"No connection to {_place(address)}: {error}. {change}".strip()) from error
    if callable(terminate) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)  # Ray's handler, installed meanwhile, ends the process at once
    try:
        yield
    finally:
        ray.shutdown()


def _place(address: str | None) -> str:
    return f"the cluster at RAY_ADDRESS={address}" if address else "a local Ray"


def _token() -> str:
    """Returns where this process would take a token from, without the token, and what to change."""
    mode = os.environ.get("RAY_AUTH_MODE", "unset")
    variables = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)]
    source = variables[0] if variables else "~/.ray/auth_token, if it is there"
    return (
        f"RAY_AUTH_MODE is {mode} here, and the token comes from {source}. "
        "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the cluster's token, or RAY_AUTH_TOKEN_PATH to a file that holds it."
    )


def _probe(address: str) -> None:
    """Tries the address once: Ray itself tries for minutes to reach a cluster that doesn't exist."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        return  # "auto", "local", or a client address
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ResourceError(f"No cluster answers at RAY_ADDRESS={address}: {error}. Correct or unset RAY_ADDRESS.") from error
