"""A run that is started in a placement group, such as that of a trial of Ray Tune, uses its bundles."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lte_ray.config import LTEConfig, PlacementConfig, TrainConfig
from lte_ray.errors import ResourceError
from lte_ray.runtime import enclosing_group, placement
from lte_ray.runtime.nodes import Node


@pytest.fixture
def start_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has this process seem to be in a placement group of these bundles."""

    def start(bundles: list[dict[str, float]] | None, assigned: dict[str, float] | None = None, captures: bool = True) -> None:
        context = SimpleNamespace(
            should_capture_child_tasks_in_placement_group=captures, get_assigned_resources=lambda: assigned or {}
        )
        group = None if bundles is None else SimpleNamespace(bundle_specs=bundles)
        monkeypatch.setattr(enclosing_group, "get_current_placement_group", lambda: group)
        monkeypatch.setattr(enclosing_group.ray, "get_runtime_context", lambda: context)
        monkeypatch.setattr(placement, "live_nodes", lambda: [Node("1", {}, {"CPU": 64.0, "GPU": 8.0})])

    return start


ONE = {"CPU": 1.0}
OWN = {"CPU": 1.0, "bundle": 0.001}


@pytest.mark.parametrize(
    ("bundles", "assigned", "captures", "first"),
    [
        (None, {}, True, None),
        ([ONE] * 4, {}, False, None),
        ([ONE], OWN, True, None),
        ([ONE] * 2, {"bundle": 0.001}, True, 0),
        ([ONE] * 3, OWN, True, 1),
        ([ONE] * 5, OWN, True, 3),
    ],
    ids=["no group", "not for its children", "only its own", "an empty first one", "a first one of its own", "more"],
)
def test_heads_get_the_last_bundles(
    start_in: Any, bundles: Any, assigned: dict[str, float], captures: bool, first: int | None
) -> None:
    """If the group is meant for what its processes start, and has more than the process's own."""
    start_in(bundles, assigned, captures)
    enclosing = enclosing_group.find_enclosing(2)
    assert (None if enclosing is None else enclosing.first) == first


def test_too_few_bundles_are_refused(start_in: Any) -> None:
    """With how many it needs."""
    start_in([ONE] * 2, OWN)
    with pytest.raises(ResourceError, match=r"has 2 bundles, .* one for this process, and one for .* 2 actors.*3"):
        enclosing_group.find_enclosing(2)


def test_heads_have_what_the_bundles_have(start_in: Any) -> None:
    """Where the settings leave it open; more than a bundle has is refused."""
    start_in([{"CPU": 3.0, "GPU": 1.0}] * 2)
    lte, train = LTEConfig(num_heads=2), TrainConfig()
    resolved = placement.resolve_run(PlacementConfig(), lte, train)
    assert (resolved.cpus, resolved.gpus) == (3.0, 1.0)
    resolved = placement.resolve_run(PlacementConfig(cpus_per_head=2, gpus_per_head=0), lte, train)
    assert (resolved.cpus, resolved.gpus) == (2.0, 0.0)
    enclosing = enclosing_group.find_enclosing(2)
    assert enclosing is not None
    enclosing.check(resolved.bundle, {})
    with pytest.raises(ResourceError, match=r"asks for 4 CPU, but a bundle .* has 3 CPU, 1 GPU"):
        enclosing.check({"CPU": 4.0}, {})


def test_labels_must_be_those_of_the_bundles_nodes(start_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads go where the bundles are, so another node is refused."""
    start_in([ONE] * 2)
    nodes = [{"NodeID": name, "Labels": {"kind": name}} for name in ("large", "small")]
    monkeypatch.setattr(
        enclosing_group, "placement_group_table", lambda group: {"bundles_to_node_id": {0: "large", 1: "small"}}
    )
    monkeypatch.setattr(enclosing_group.ray, "nodes", lambda: nodes)
    enclosing = enclosing_group.find_enclosing(2)
    assert enclosing is not None
    enclosing.check(ONE, {"kind": "in(large,small)"})
    with pytest.raises(ResourceError, match="--head-labels is kind=large, but a bundle"):
        enclosing.check(ONE, {"kind": "large"})


def test_ordinary_training_in_several_processes_needs_room_outside(start_in: Any) -> None:
    """Ray Train reserves for them itself."""
    start_in([ONE] * 2)
    with pytest.raises(ResourceError, match="--baseline-processes is 2"):
        placement.resolve_run(PlacementConfig(), LTEConfig(num_heads=2), TrainConfig(baseline=True, baseline_processes=2))


def test_the_group_outlives_the_run(start_in: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run frees what it has reserved, not the group that it was started in."""
    removed: list[Any] = []
    monkeypatch.setattr(placement, "remove_placement_group", removed.append)
    start_in([ONE] * 2)
    with placement.reserve(placement.Placement(1.0, 0.0), [(0,), (1,)]) as reservation:
        reservation._added.append("added")
        assert not reservation.owned
    assert removed == ["added"]
