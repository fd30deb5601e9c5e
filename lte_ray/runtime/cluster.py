"""The connection to Ray: the cluster that the environment names, or a local one for this run only."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextvars import ContextVar

import ray

from lte_ray.errors import ResourceError

HASH_SEED = "PYTHONHASHSEED"


LOCAL = "local"

log = logging.getLogger("lte_ray")

_chosen: ContextVar[str | None] = ContextVar("address", default=None)


@contextlib.contextmanager
def use_address(address: str) -> Iterator[None]:
    """Has `connected` use this Ray for the block, whatever RAY_ADDRESS says.

    Args:
        address: as `ray.init` takes it; "local": an own one.
    """
    token = _chosen.set(address)
    try:
        yield
    finally:
        _chosen.reset(token)


def _address() -> str | None:
    """The address of the Ray to connect to; None if one is to be started."""
    address = _chosen.get() or os.environ.get("RAY_ADDRESS")
    return None if address == LOCAL else address or None


def will_start() -> bool:
    """Whether `connected` starts a local Ray, instead of connecting to one that runs."""
    return not ray.is_initialized() and _address() is None


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Connects to Ray for the block: an existing connection; else `use_address` or RAY_ADDRESS; else a local Ray that ends with
    the block.

    Raises:
        ResourceError: no cluster answers there, it needs a token that isn't set here, or no local Ray starts.
    """
    if ray.is_initialized():
        yield
        return
    address = _address()
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
        raise ResourceError(f"No connection to {_place(address)}: {error.args[0]}. {describe_token()}") from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        change = f"{_correct()} If that cluster wants a token: {describe_token()}" if address else ""
        raise ResourceError(f"No connection to {_place(address)}: {error}. {change}".strip()) from error
    except Exception as error:
        if type(error) is not Exception:  # Ray raises a plain one if a node isn't there in time
            raise
        ray.shutdown()
        raise ResourceError(
            f"{_place(address) if address else 'A local Ray'} didn't start in time: {error} Try again."
        ) from error
    if callable(terminate) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)  # Ray's handler, installed meanwhile, ends the process at once
    try:
        log.info("%s: %s.", f"Connected to {_place(address)}" if address else "Started a local Ray for this run", _resources())
        yield
    finally:
        ray.shutdown()


def _resources() -> str:
    """What the cluster has: ``8 CPU, 2 GPU``."""
    total = ray.cluster_resources()
    return ", ".join(f"{total.get(name, 0):g} {name}" for name in ("CPU", "GPU") if name == "CPU" or total.get(name))


def _place(address: str | None) -> str:
    return f"the cluster at {_source()}{address}" if address else "a local Ray"


def _source() -> str:
    return "--address " if _chosen.get() else "RAY_ADDRESS="


def _correct() -> str:
    return "Correct --address, or leave it out." if _chosen.get() else "Correct or unset RAY_ADDRESS."


def describe_token() -> str:
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
    if address.startswith(("http://", "https://")):
        raise ResourceError(
            f"{_source()}{address} is the address of a job server. Run the same command there with lte-ray submit, or give the "
            "address of Ray itself, such as HEAD-NODE:6379."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        return  # "auto", "local", or a client address
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ResourceError(f"No cluster answers at {_source()}{address}: {error}. {_correct()}") from error
