"""Which nodes suit the processes that reserve nothing, and what is said if no node has the labels."""

from __future__ import annotations

import re

import pytest

from lte_ray.errors import ResourceError
from lte_ray.runtime import nodes
from lte_ray.runtime.nodes import OFF_SPOT, Node, check_labels, coordinator_selector

SAFE, SPOT, PREEMPTIBLE = ({"ray.io/market-type": kind} for kind in ("on-demand", "spot", "preemptible"))


def cluster(*labels: dict[str, str]) -> list[Node]:
    """Nodes with these labels, and Ray's own."""
    return [Node(str(n), {**each, "ray.io/node-id": str(n)}) for n, each in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "processes", "expected"),
    [
        ((SAFE, SPOT), 1, OFF_SPOT),
        (({}, PREEMPTIBLE), 1, OFF_SPOT),
        ((SPOT, PREEMPTIBLE), 1, {}),
        ((SAFE, {}), 1, {}),
        ((SAFE, SPOT, SPOT), 2, {}),
        ((SAFE, {}, SPOT), 2, OFF_SPOT),
    ],
)
def test_the_coordinator_stays_off_spot_nodes_by_default(
    labels: tuple[dict[str, str], ...], processes: int, expected: dict[str, str]
) -> None:
    """Where there are other nodes: for several processes, as many of them."""
    assert coordinator_selector(("auto",), cluster(*labels), processes) == expected
    assert coordinator_selector(("none",), cluster(*labels), processes) == {}


def test_labels_of_the_coordinator_that_are_gone_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    """A coordinator that replaces a lost one must find a node, so others than asked for count, too."""
    asked = ("mine=a",)
    assert coordinator_selector(asked, cluster({"mine": "a"}, SPOT)) == {"mine": "a"}
    assert not caplog.messages
    assert coordinator_selector(asked, cluster(SAFE, SPOT)) == OFF_SPOT
    assert "No node matches --coordinator-labels mine=a any more, so another one is used." in caplog.text


def test_labels_that_no_node_has_are_refused_with_those_that_exist(caplog: pytest.LogCaptureFixture) -> None:
    """The message counts the nodes of each label. With a timeout, nodes may come: a warning says what is waited for."""
    some = cluster(SAFE, SPOT, SPOT)
    check_labels("--head-labels", {"ray.io/market-type": "spot"}, some)
    expected = (
        "No node matches --head-labels mine=a. Labels of the cluster's nodes: ray.io/market-type=on-demand (1 node), "
        "ray.io/market-type=spot (2 nodes). "
    )
    with pytest.raises(ResourceError, match=f"^{re.escape(expected)}Correct --head-labels, start such nodes"):
        check_labels("--head-labels", {"mine": "a"}, some)
    with pytest.raises(ResourceError, match="The cluster's nodes have no labels"):
        check_labels("--head-labels", {"mine": "a"}, cluster({}))
    check_labels("--head-labels", {"mine": "a"}, some, timeout=60.0)
    assert f"{expected}The run waits 60 s for such nodes (--resource-timeout)." in caplog.text


def test_long_lists_of_labels_are_cut() -> None:
    """Twelve are enough to see how they are written."""
    with pytest.raises(ResourceError, match=r"a9=b \(1 node\)|and 8 more\. Correct"):
        check_labels("--head-labels", {"mine": "a"}, cluster({f"a{n}": "b" for n in range(20)}))


def test_nodes_are_read_as_ray_says_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead nodes don't count; resources are summed over those that a selector chooses."""
    rows = [
        {"NodeID": "1", "Alive": True, "Labels": SAFE, "Resources": {"CPU": 4.0}},
        {"NodeID": "2", "Alive": True, "Labels": SPOT, "Resources": {"CPU": 8.0, "GPU": 1.0}},
        {"NodeID": "3", "Alive": True, "Labels": SPOT, "Resources": {"CPU": 8.0, "GPU": 1.0}},
        {"NodeID": "4", "Alive": False, "Labels": SPOT, "Resources": {}},
    ]
    monkeypatch.setattr(nodes.ray, "nodes", lambda: rows)
    assert [node.id for node in nodes.live_nodes()] == ["1", "2", "3"]
    assert nodes.total_resources(nodes.live_nodes({"ray.io/market-type": "spot"})) == {"CPU": 16.0, "GPU": 2.0}
