"""A run that waits for room in the cluster: what it says, and with what it starts; with a fake cluster and clock."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lte_ray.config import FailureConfig
from lte_ray.config.node_labels import matches
from lte_ray.errors import ResourceError
from lte_ray.runtime import placement, waiting
from lte_ray.runtime.nodes import Node
from lte_ray.runtime.placement import Placement, least_actors, reserve
from lte_ray.runtime.waiting import Lack, Patience, count_places

NODES = [Node("1", {"kind": "a"}, {"CPU": 4.0}), Node("2", {"kind": "b"}, {"CPU": 4.0, "GPU": 1.0})]


class Cluster:
    """A cluster with room for `room` bundles, and from `later` on, in seconds, for all. Its clock goes on while it is asked."""

    def __init__(self, room: int, later: float = 1e9) -> None:
        self.room, self.later, self.now = room, later, 0.0
        self.groups: list[int] = []

    def reserve(self, placed: Placement, actors: int) -> Any:
        self.groups.append(actors)
        return SimpleNamespace(wait=lambda seconds: self.wait(actors, seconds), id=len(self.groups) - 1)

    def wait(self, actors: int, seconds: float) -> bool:
        fits = actors <= self.room
        self.now += 0 if fits else seconds
        return fits or self.now >= self.later

    def remove(self, group: Any) -> None:
        self.groups[group.id] = 0


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Cluster:
    """In place of Ray."""
    made = Cluster(*request.param)
    monkeypatch.setattr(placement, "find_enclosing", lambda actors: None)
    monkeypatch.setattr(placement, "make_group", made.reserve)
    monkeypatch.setattr(placement, "remove_placement_group", made.remove)
    monkeypatch.setattr(placement, "PlacementGroupSchedulingStrategy", lambda group, index: (group, index))
    monkeypatch.setattr(placement, "time", SimpleNamespace(monotonic=lambda: made.now))
    monkeypatch.setattr(waiting, "live_nodes", lambda selector: NODES)
    monkeypatch.setattr(waiting, "free_by_node", lambda nodes: [{"CPU": float(made.room)}, {}])
    return made


HEADS = [(0, 1), (2, 3), (4, 5), (6, 7)]


@pytest.mark.parametrize("cluster", [(0, 45.0)], indirect=True)
def test_it_waits_and_says_for_what(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """The messages say how long, what is missing and what is free, more and more seldom; the display shows them, too."""
    shown: list[str] = []
    with reserve(Placement(1.0, 0.0, 2, timeout=600.0), HEADS, show=shown.append) as reservation:
        assert (reservation.heads_by_actor, reservation.missing) == (HEADS, [])
        assert cluster.groups == [4]
    assert cluster.groups == [0]
    assert caplog.messages == shown
    assert shown == [
        f"Waiting for room in the cluster for {waited} s, and {600 - waited} s more. Each of 4 processes of heads needs 1 CPU; "
        "there is room for 0 now (free: 0 CPU). Missing: 4 CPU."
        for waited in (10, 30)
    ]


@pytest.mark.parametrize("cluster", [(3,)], indirect=True)
def test_it_starts_with_those_that_have_room(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """If fewer are enough. The other bundles stay requested, so that an autoscaling cluster knows of them."""
    with reserve(Placement(1.0, 0.0, 2, timeout=60.0), HEADS, FailureConfig(min_heads=3, exhausted="drop")) as reservation:
        assert (reservation.heads_by_actor, reservation.missing) == (HEADS[:3], HEADS[3:])
        assert cluster.groups == [0, 3, 1]
        assert len(reservation.heads_and_strategies()) == 3
    assert cluster.groups == [0, 0, 0]
    assert "Missing: 1 CPU. The run starts with 3 of 4 processes (--exhausted drop)." in caplog.text


@pytest.mark.parametrize(
    ("cluster", "failure", "waited", "says"),
    [
        ((3,), FailureConfig(), "60 s. Each of 4", "; --exhausted drop starts with those that have room.$"),
        ((1,), FailureConfig(min_heads=2, exhausted="drop"), "120 s. Each of 2", r"; 2 must have room \(--min-heads\).$"),
    ],
    indirect=["cluster"],
)
def test_too_little_room_is_an_error(cluster: Cluster, failure: FailureConfig, waited: str, says: str) -> None:
    """It says how long it waited, what is missing, and what to change; nothing stays reserved."""
    with (
        pytest.raises(ResourceError, match=rf"^There was no room in the cluster for {waited} .*Missing: \d CPU\. .*{says}"),
        reserve(Placement(1.0, 0.0, timeout=60.0), HEADS, failure),
    ):
        pass
    assert set(cluster.groups) == {0}


def test_min_heads_counts_only_with_exhausted_drop() -> None:
    """Else a run starts with all heads. Heads of one process start together."""
    placed = Placement(1.0, 0.0, heads=2)
    assert least_actors(placed, FailureConfig(min_heads=3), 4) == 4
    assert least_actors(placed, FailureConfig(min_heads=3, exhausted="drop"), 4) == 2


@pytest.mark.parametrize("cluster", [(1, 75.0)], indirect=True)
def test_it_waits_as_long_again_for_the_fewest(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    """A cluster that can't grow to the size for all heads may not have grown at all, so it is asked for fewer."""
    with reserve(Placement(1.0, 0.0, timeout=60.0), HEADS, FailureConfig(min_heads=2, exhausted="drop")) as reservation:
        assert (len(reservation.heads_by_actor), len(reservation.missing)) == (2, 2)
        assert cluster.groups == [0, 2, 1, 1]
    assert "The run now waits for 2 of 4 processes (--exhausted drop, --min-heads)." in caplog.text


@pytest.mark.parametrize("cluster", [(0,)], indirect=True)
def test_an_interrupt_frees_what_was_requested(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the request would stay in a cluster to which the user's own program is connected."""
    monkeypatch.setattr(cluster, "wait", lambda actors, seconds: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), reserve(Placement(1.0, 0.0), HEADS):
        pass
    assert cluster.groups == [0]


def test_bundles_are_counted_by_node() -> None:
    """What is free on two nodes makes no place together."""
    nodes = [{"CPU": 3.0, "GPU": 1.0}, {"CPU": 1.0}, {"CPU": 1.5, "GPU": 0.5}, {}]
    assert count_places({"CPU": 1.0}, nodes) == 5
    assert count_places({"CPU": 1.0, "GPU": 0.25}, nodes) == 4
    assert count_places({"CPU": 2.0}, nodes) == 1
    assert count_places({"CPU": 0.1}, [{"CPU": 0.3}]) == 3  # 0.3 / 0.1 is below 3 in floating point


@pytest.mark.parametrize(
    ("bundle", "selector", "free", "says"),
    [
        ({"CPU": 8.0}, {}, [{}, {}], "needs 8 CPU, but no node is that large: at most, one has 4 CPU."),
        (
            {"CPU": 1.0, "GPU": 2.0},
            {},
            [{}, {}],
            "needs 1 CPU, 2 GPU, but no node is that large: at most, one has 4 CPU, 1 GPU.",
        ),
        (
            {"CPU": 2.0},
            {"kind": "a"},
            [{"CPU": 3.0}],
            "needs 2 CPU on nodes with kind=a; there is room for 1 now (free: 3 CPU).",
        ),
        ({"CPU": 2.0}, {"kind": "c"}, [], "needs 2 CPU on nodes with kind=c, but there is no such node."),
        ({"CPU": 2.0}, {}, [{"CPU": 4.0}], "there is room for all, but not in the way that --placement-strategy asks for."),
    ],
)
def test_what_is_lacking_is_said(
    monkeypatch: pytest.MonkeyPatch,
    bundle: dict[str, float],
    selector: dict[str, str],
    free: list[dict[str, float]],
    says: str,
) -> None:
    """A node that is too small, resources that others use, or a strategy that can't be followed."""
    monkeypatch.setattr(waiting, "live_nodes", lambda selector: [n for n in NODES if matches(selector, n.labels)])
    monkeypatch.setattr(waiting, "free_by_node", lambda nodes: free)
    assert says in str(Lack(bundle, selector, 2))


def test_patience_ends_when_it_says() -> None:
    """It never waits beyond its end to say something."""
    patience = Patience(15.0, now=100.0)
    assert patience.until_word(100.0) == 10.0
    assert patience.say("Why.", 110.0) == "Waiting for room in the cluster for 10 s, and 5 s more. Why."
    assert patience.until_word(110.0) == 5.0
    assert patience.left(116.0) == 0.0
