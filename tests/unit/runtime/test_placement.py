"""What heads get by default, from what a cluster has."""

from __future__ import annotations

import re

import pytest
import ray.train

from lte_ray.config import PlacementConfig
from lte_ray.config.node_labels import matches
from lte_ray.errors import ConfigError, ResourceError
from lte_ray.runtime import placement
from lte_ray.runtime.nodes import Node


@pytest.mark.parametrize(
    ("gpus", "heads", "each", "expected", "warning"),
    [
        (1.0, 4, 1, 0.0, "has 1 GPU for 4 processes of heads, .*--gpus-per-head 0.25.*--heads-per-actor 4"),
        (2.0, 3, 1, 0.0, "has 2 GPU for 3 processes of heads, .*--gpus-per-head 0.5.*--heads-per-actor 2"),
        (1.0, 4, 4, 1.0, ""),
        (4.0, 4, 1, 1.0, ""),
        (0.0, 4, 1, 0.0, ""),
    ],
)
def test_a_warning_says_how_to_use_idle_gpus(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gpus: float,
    heads: int,
    each: int,
    expected: float,
    warning: str,
) -> None:
    """By default a process of heads gets one GPU, or none if there are too few: a warning then says how to share them."""
    monkeypatch.setattr(placement, "live_nodes", lambda: [Node("1", {}, {"CPU": 16.0, "GPU": gpus})])
    assert placement.resolve(PlacementConfig(heads_per_actor=each), heads).gpus == expected
    assert len(caplog.messages) == bool(warning)
    if warning:
        assert re.search(warning, caplog.messages[0])


@pytest.mark.parametrize(("timeout", "first", "last"), [(0.0, 30.0, 1800.0), (60.0, 60.0, 60.0), (5.0, 30.0, 30.0)])
def test_the_last_heads_are_waited_for_half_an_hour_unless_a_timeout_is_given(
    timeout: float, first: float, last: float
) -> None:
    """--resource-timeout is how long any head is waited for, at least half a minute."""
    reservation = placement.Reservation(placement.Placement(1.0, 0.0, timeout=timeout), [(0,)], None)
    assert (reservation.patience, reservation.last_patience) == (first, last)


NODES = [
    Node("1", {"kind": "small"}, {"CPU": 2.0}),
    Node("2", {"kind": "large"}, {"CPU": 16.0, "GPU": 2.0}),
    Node("3", {"kind": "large"}, {"CPU": 16.0, "GPU": 2.0}),
]


def having(selector: dict[str, str] | None = None) -> list[Node]:
    """The nodes above, as `live_nodes` returns them."""
    return [node for node in NODES if matches(selector or {}, node.labels)]


def test_only_labeled_nodes_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """What heads get by default is a share of the nodes that they may be on; too many are refused with those nodes' sum."""
    monkeypatch.setattr(placement, "live_nodes", having)
    labels = {"kind": "large"}
    placed = placement.resolve(PlacementConfig(head_labels=("kind=large",), placement_strategy="SPREAD"), 4)
    assert placed == placement.Placement(1.0, 1.0, strategy="SPREAD", labels=labels)
    with pytest.raises(ResourceError, match=r"2 heads ask for 4 CPU \(2 CPU each\), but nodes with kind=small have 2 CPU"):
        placement.resolve(PlacementConfig(head_labels=("kind=small",), cpus_per_head=2), 2)
    for config in (PlacementConfig(head_labels=("kind=huge",)), PlacementConfig(coordinator_labels=("kind=huge",))):
        with pytest.raises(
            ResourceError, match=r"-labels kind=huge\. Labels of the cluster's nodes: kind=large \(2 nodes\), kind=sm"
        ):
            placement.resolve(config, 2)
    with pytest.raises(ResourceError, match="No node matches --coordinator-labels"):  # it isn't waited for
        placement.resolve(PlacementConfig(coordinator_labels=("kind=huge",), resource_timeout=9), 2)
    assert placement.resolve(PlacementConfig(head_labels=("kind=huge",), cpus_per_head=1, resource_timeout=9), 2).cpus == 1.0


def test_rays_label_selector_is_followed() -> None:
    """One for all heads; a list, one for each of Ray's workers, is refused."""
    config, _ = placement.from_scaling_config(ray.train.ScalingConfig(num_workers=2, label_selector={"kind": "!small"}), 2)
    assert (config.head_labels, config.placement_strategy) == (("kind=!small",), "PACK")
    with pytest.raises(ConfigError, match="give one label selector for all, a dict"):
        placement.from_scaling_config(ray.train.ScalingConfig(num_workers=2, label_selector=[{"kind": "large"}] * 2), 2)


@pytest.mark.parametrize(
    ("given", "heads", "expected"),
    [
        ({}, 4, 1.0),
        ({"gpus_per_head": 0.5}, 4, 0.5),
        ({"gpus_per_head": 0.5, "gpu_memory_share": 1}, 4, 1.0),
        ({"gpu_memory_share": 0.75}, 4, 0.75),
        ({"gpus_per_head": 0}, 4, 1.0),
    ],
)
def test_heads_that_share_a_gpu_share_its_memory(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, float], heads: int, expected: float
) -> None:
    """By default as much of it as they have of the GPU; with a GPU each, or on CPUs, there is no limit."""
    monkeypatch.setattr(placement, "live_nodes", having)
    assert placement.resolve(PlacementConfig(**given), heads).gpu_memory == expected  # type: ignore[arg-type]


def test_a_share_of_no_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the heads train on CPUs, the setting would have no effect."""
    monkeypatch.setattr(placement, "live_nodes", having)
    with pytest.raises(
        ConfigError, match=r"^--gpu-memory-share is 0.5, but the heads train on CPUs: .* a GPU for each\. Leave"
    ):
        placement.resolve(PlacementConfig(gpu_memory_share=0.5), 8)
    with pytest.raises(ConfigError, match=r"^--gpu-memory-share is 0.5, but --gpus-per-head is 0\. Leave one of them out\.$"):
        PlacementConfig(gpu_memory_share=0.5, gpus_per_head=0)
