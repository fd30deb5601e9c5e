"""How a run on Ray ends that couldn't place all its heads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lte_ray import FailureConfig
from lte_ray.errors import RunError
from lte_ray.runtime.controller.controller import TrainController
from lte_ray.runtime.controller.run_state import RunPhase


@pytest.mark.parametrize(
    ("missing", "exhausted", "fails"),
    [(["head 1", "head 3"], "stop", True), (["head 1"], "drop", False), ([], "stop", False)],
)
def test_heads_without_a_place_at_the_end_are_an_error_unless_the_run_may_do_without(
    missing: list[str], exhausted: Any, fails: bool
) -> None:
    """The error names them, and says that everything is saved, and how to continue."""
    entered: list[RunPhase] = []
    run: Any = SimpleNamespace(
        _failure=FailureConfig(exhausted=exhausted),
        _failure_handler=SimpleNamespace(ended_without=missing),
        _reservation=SimpleNamespace(last_patience=1800.0),
        state=SimpleNamespace(enter=entered.append, log=SimpleNamespace(record_event=lambda event, why: None)),
    )
    if not fails:
        TrainController._check_complete(run)
        return
    with pytest.raises(RunError, match=r"without head 1, head 3: .* for 1800 s \(--resource-timeout\).* is saved"):
        TrainController._check_complete(run)
    assert entered == [RunPhase.FAILED]
