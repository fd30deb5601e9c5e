"""The connection to Ray: the cluster that the environment names, or a local one for this run alone."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import ray

from lte_ray.errors import ResourceError
from lte_ray.loading import FILE_MODULE_PREFIX


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
    try:
        if address:
            ray.init(address=address, logging_level=logging.WARNING)
        else:
            ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = f"the cluster at RAY_ADDRESS={address}" if address else "a local Ray"
        raise ResourceError(f"No connection to {where}: {error}. Correct or unset RAY_ADDRESS.") from error
    try:
        yield
    finally:
        ray.shutdown()


def travels_by_value(thing: Any) -> None:
    """Has Ray send the class of `thing` by value if it was loaded from a file, which no other process could import."""
    module = sys.modules.get(type(thing).__module__)
    if module is not None and module.__name__.startswith(FILE_MODULE_PREFIX):
        ray.cloudpickle.register_pickle_by_value(module)
