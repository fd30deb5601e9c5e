"""The actor between the processes of ordinary training and the driver: what it knows after starts, reports and failures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from lte_ray.errors import WorkerFailed
from lte_ray.messages import HeadStatus, MergeRecord
from lte_ray.runtime.coordinator_state import CoordinatorState
from lte_ray.runtime.data_parallel.actor import DataParallelActor
from lte_ray.runtime.data_parallel.messages import ProcessReport
from lte_ray.runtime.placement import Placement


def make(head_failures: int = 3) -> DataParallelActor:
    setup: Any = SimpleNamespace(
        start=CoordinatorState(0, None), context=SimpleNamespace(transport=SimpleNamespace(publish=Tensor.tolist))
    )
    return DataParallelActor(setup, Placement(1, 0), -1, head_failures)


def report(*versions: int, **more: Any) -> ProcessReport:
    merges = tuple(MergeRecord(version, 0.0, (0,), 5, 20, {0: 1.0}, 0, 0, step=5 * version) for version in versions)
    return ProcessReport(HeadStatus(0, step=5 * max(versions, default=0)), merges, **more)


def test_merges_are_kept_until_the_driver_has_seen_them() -> None:
    """With a handle of the weights that are to be evaluated; the final ones are published, too."""
    actor = make()
    assert actor.begin(0)
    ones = np.ones(2, np.float32)
    actor.report(report(1, 2, bases={2: ones}, emas={2: 2 * ones}, checkpoint=1))
    status = actor.status(seen=0, starts=1)
    assert [(m.version, m.base, m.ema) for m in status.merges] == [(1, None, None), (2, [1.0, 1.0], [2.0, 2.0])]
    assert (status.checkpoint, status.final) == (1, None)
    actor.report(report(3, final=(3, np.zeros(1, np.float32), None)))
    status = actor.status(seen=2, starts=1)
    assert [merge.version for merge in status.merges] == [3]
    assert status.final == (3, [0.0], None)
    actor.report(report(final=(3, ones, 2 * ones)))
    assert actor.status(seen=3, starts=1).final == (3, [1.0, 1.0], [2.0, 2.0])


def test_another_start_voids_later_merges() -> None:
    """Those up to its version stay until the driver, which must go back first, knows of the start."""
    actor = make()
    actor.begin(0)
    actor.report(report(1, 2, 3))
    assert actor.begin(2)
    status = actor.status(seen=3, starts=1)
    assert (status.starts, status.start_version) == (2, 2)
    assert [merge.version for merge in status.merges] == [1, 2]
    actor.report(report(3))
    assert [merge.version for merge in actor.status(seen=2, starts=2).merges] == [3]


@pytest.mark.parametrize("limit", [0, 2])
def test_starts_without_progress_are_limited(limit: int) -> None:
    """The count starts again at 0 with a version newer than all before."""
    actor = make(limit)
    assert actor.begin(0)
    if limit:
        actor.report(report(1))
        assert actor.begin(0)  # the first failure in a row
        actor.report(report(1))
        assert actor.begin(0)
    assert not actor.begin(0)
    assert not actor.begin(0)


def test_a_run_that_failed_or_stops_doesnt_start_again() -> None:
    """The processes learn it when they ask, and in the answer to a report."""
    failed = make()
    failed.begin(0)
    failed.fail(WorkerFailed("head 0", 3, "no data"))
    assert not failed.begin(0)
    stopped = make()
    stopped.begin(0)
    assert not stopped.report(report(1))
    stopped.stop()
    assert stopped.report(report(2))
    assert not stopped.begin(2)
