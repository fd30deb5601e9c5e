"""Looks at every node before a run on several of them starts, so that a wrong one costs seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import posixpath
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lte_ray.errors import ResourceError, StorageError
from lte_ray.runtime import node_probe
from lte_ray.runtime.node_facts import NodeFacts, find_notes, find_problem
from lte_ray.runtime.nodes import coordinator_selector, having, live_nodes
from lte_ray.storage import RunDirectory

PATIENCE = 120.0
"""Seconds that the nodes have to answer. Ray may have to install packages there first."""

BRIEF = 5.0
"""Seconds for which a node repeats what fails in the storage."""

log = logging.getLogger("lte_ray")


def check_nodes(directory: RunDirectory, head_labels: Mapping[str, str], coordinator_labels: tuple[str, ...]) -> None:
    """Checks that all nodes that a run may use have the driver's versions and code, can use the storage, and agree about the
    time. Does nothing if the driver's node is the only one.

    Args:
        directory: of the run. It may not exist yet.
        head_labels: Ray's label selector of the nodes that heads may be on.
        coordinator_labels: where the coordinator may be, as of `Placement`.

    Raises:
        ResourceError: a node differs, or can't use the storage.
        StorageError: the driver can't write there.
    """
    nodes = live_nodes()
    selectors = head_labels, coordinator_selector(coordinator_labels, nodes)
    used = {node.id for selector in selectors for node in having(nodes, selector)} - {ray.get_runtime_context().get_node_id()}
    others = [node for node in ray.nodes() if node["NodeID"] in used]
    if not others:
        return
    with _storage_to_try(directory) as (storage, name):
        driver = node_probe.probe()
        facts = [*_ask(others, storage, name)]
    if problem := find_problem(driver, facts, directory.uri or posixpath.dirname(directory.path)):
        raise ResourceError(problem)
    for note in find_notes(driver, facts):
        log.warning("%s", note)


@contextlib.contextmanager
def _storage_to_try(directory: RunDirectory) -> Iterator[tuple[bytes, str]]:
    """Writes a file next to the run's directory for the block. Yields the pickled folder, and the file's name."""
    parent = dataclasses.replace(directory, path=posixpath.dirname(directory.path), patience=min(directory.patience, BRIEF))
    name = f".lte-ray-nodes-{secrets.token_hex(4)}"
    existed = parent.exists()
    try:
        parent.write(name, b"")
    except StorageError as error:
        raise directory.unwritable(error) from error
    try:
        yield ray.cloudpickle.dumps(parent), name
    finally:
        with contextlib.suppress(StorageError):
            parent.delete(name)
        if not existed and parent.is_local:
            with contextlib.suppress(OSError):  # somebody else uses it by now
                os.rmdir(parent.path)


def _ask(nodes: list[dict[str, Any]], storage: bytes, name: str) -> Iterator[NodeFacts]:
    """Runs the probe on each node at once. A node that doesn't answer, or is gone, is left out with a warning."""
    ray.cloudpickle.register_pickle_by_value(node_probe)
    try:
        task = ray.remote(num_cpus=0, max_retries=0)(node_probe.probe)
        asked, sent = {}, time.time()
        for node in nodes:
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[task.options(scheduling_strategy=strategy).remote(storage, name)] = node["NodeManagerAddress"]
    finally:
        ray.cloudpickle.unregister_pickle_by_value(node_probe)
    end = time.monotonic() + PATIENCE
    while asked:
        done, _ = ray.wait(list(asked), timeout=max(0.0, end - time.monotonic()))
        if not done:
            break
        answered, address = time.time(), asked.pop(done[0])
        try:
            yield NodeFacts(address, ray.get(done[0]), sent=sent, answered=answered)
        except (ray.exceptions.RuntimeEnvSetupError, ray.exceptions.RayTaskError) as error:
            yield NodeFacts(address, {}, failed=_last_line(error))
        except ray.exceptions.RayError as error:
            log.warning("Node %s couldn't be checked: %s", address, _last_line(error))
    for ref, address in asked.items():
        ray.cancel(ref, force=True)
        log.warning("Node %s hasn't answered for %.0f s: it isn't checked.", address, PATIENCE)


def _last_line(error: Exception) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
