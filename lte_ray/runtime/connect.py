"""The connection to Ray: the cluster that the environment names, or a local one for this run alone."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator

import ray

from lte_ray.errors import ResourceError


@contextlib.contextmanager
def connected() -> Iterator[None]:
    """Ray is connected within the block: as it was before, or to RAY_ADDRESS, or to a new local Ray that ends with it.

    Raises:
        ResourceError: RAY_ADDRESS is set, but no cluster answers there.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    terminate = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            ray.init(address=address, logging_level=logging.WARNING)
        else:
            ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the cluster at RAY_ADDRESS={address}" if address else "a local Ray"
        raise ResourceError(f"No connection to {where}: {error}. Correct or unset RAY_ADDRESS.") from error
    if terminate is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminate)  # Ray has put its own there, which ends the process at once
    try:
        yield
    finally:
        ray.shutdown()
