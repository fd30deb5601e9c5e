"""What follows a run while it goes on: its sinks, and the record of its environment."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lte_ray.config import toml
from lte_ray.errors import LTEError
from lte_ray.run.environment import EnvironmentRecord, describe_environment, worker_folder
from lte_ray.run.history import read_rows
from lte_ray.run.metrics import MetricsLog, Row
from lte_ray.run.sinks import RunInfo, Sink, SinkThreads
from lte_ray.storage import RunDirectory, run_in_thread


@contextlib.contextmanager
def report_run(
    sinks: Mapping[str, Sink],
    directory: RunDirectory,
    metrics: MetricsLog,
    worker: Any,
    run_toml: str,
    position: tuple[int, int],
    devices: Callable[[], Mapping[int, str]],
) -> Iterator[None]:
    """Records the environment of the block, in which the run goes on, and gives its rows to the sinks.

    Args:
        sinks: by name.
        directory, metrics, worker, run_toml: of the run.
        position: the step and the version that the run starts from.
        devices: returns the heads' devices, once they have some.
    """
    step, version = position
    config = toml.parse(run_toml.encode())
    environment = describe_environment(worker_folder(worker))
    record = EnvironmentRecord.start(directory, environment, step=step, version=version, sinks=list(sinks), config=config)
    earlier: list[Row] = []
    if version:
        with contextlib.suppress(LTEError):  # then sinks count samples from here on
            earlier = read_rows(directory, until=version)

    def record_devices(row: Row) -> None:
        if row["kind"] == "merge":
            metrics.listeners.remove(record_devices)
            found = {str(head): device for head, device in devices().items()}
            run_in_thread(lambda: record.add(devices=found))

    metrics.listeners.append(record_devices)
    run = RunInfo(
        name=str(config["name"]),
        id=record.id,
        path=directory.display,
        resumed=version > 0,
        step=step,
        version=version,
        config=config,
        environment=environment,
    )
    with SinkThreads(sinks, directory, run, earlier).follow(metrics):
        yield
