"""What one node has: runs as a task on each node before a run starts.

Its code is sent along, since a node may lack lte-ray. So it needs nothing but Python.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import platform
import socket
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

WAIT = 10.0
"""Seconds that a new file may take to become visible on another node of a shared disk."""


def probe(directory: bytes = b"", name: str = "") -> dict[str, Any]:
    """Returns what this node has.

    Args:
        directory: the pickled `RunDirectory` of the storage; empty: don't look.
        name: of a file in it that the driver has written.

    Returns:
        ``host``; ``time`` (Unix, in seconds); the versions ``python``, ``ray``, ``torch`` and ``lte_ray`` (empty: not
        installed); ``code``, a checksum of lte-ray's source; and ``storage``: "ok", "unseen", or why it fails.
    """
    facts = {
        "host": socket.gethostname(),
        "time": time.time(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "ray": _version("ray"),
        "torch": _version("torch"),
    }
    facts |= _library()
    if directory and facts["lte_ray"]:
        try:
            facts["storage"] = _try_storage(pickle.loads(directory), name)
        except Exception as error:
            facts["storage"] = f"{type(error).__name__}: {error}"
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _library() -> dict[str, str]:
    """The version of lte-ray here and a checksum of its source, as this process would import it."""
    spec = find_spec("lte_ray")
    if spec is None or not spec.origin:
        return {"lte_ray": "", "code": ""}
    import lte_ray

    folder, digest = os.path.dirname(spec.origin), hashlib.sha1()
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(each for each in folders if each != "recipes")  # in a checkout they lie elsewhere
        for name in sorted(names):
            if name.endswith(".py"):
                path = os.path.join(place, name)
                digest.update(os.path.relpath(path, folder).encode())
                with open(path, "rb") as file:
                    digest.update(file.read())
    return {"lte_ray": lte_ray.__version__, "code": digest.hexdigest()[:12]}


def _try_storage(directory: Any, name: str) -> str:
    """Looks for the driver's file, then writes one and removes it. Writes nothing where the file isn't seen."""
    end = time.monotonic() + (WAIT if directory.is_local else 0.0)
    while not directory.exists(name):
        if time.monotonic() >= end:
            return "unseen"
        time.sleep(0.5)
    answer = f"{name}-{os.getpid()}-{socket.gethostname()}"
    directory.write(answer, b"")
    directory.delete(answer)
    return "ok"
