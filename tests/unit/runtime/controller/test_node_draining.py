"""What the driver does about nodes that drain, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lte_ray import FailureConfig
from lte_ray.errors import RunError
from lte_ray.runtime.controller import node_draining
from lte_ray.runtime.controller.node_draining import NodeDraining
from tests.support.driver_side import Run


class Nodes:
    """Three heads on two nodes: 0 and 1 on "a", 2 on "b"; the driver is on "c"."""

    def __init__(self, path: Path, merges_wait: bool) -> None:
        self.run = Run(path, [(0,), (1,), (2,)], 0, FailureConfig())
        self.draining: dict[str, float | None] = {}
        self.watch = NodeDraining(self.run.state, self.run.heads, merges_wait)

    def calls(self) -> list[list[str]]:
        """What each head's process was asked to do, besides training."""
        return [[call for call in slot.actor.calls if call != "run"] for slot in self.run.heads.slots]


Make = Callable[..., Nodes]


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a run whose nodes may drain."""

    def make(merges_wait: bool = True) -> Nodes:
        made = Nodes(tmp_path, merges_wait)
        monkeypatch.setattr(node_draining, "draining_nodes", lambda: dict(made.draining))
        monkeypatch.setattr(node_draining, "node_of_bundle", lambda strategy: "b" if strategy == (2,) else "a")
        monkeypatch.setattr(node_draining, "this_node", lambda: "c")
        return made

    return make


def test_heads_leave_a_node_that_drains_and_others_end_their_rounds(nodes: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Each is asked once, and there is one event for the node."""
    made = nodes()
    made.watch.check()
    assert made.calls() == [[], [], []]
    made.draining = {"a": 29.6}
    for _ in range(3):
        made.watch.check()
    assert made.calls() == [["leave"], ["leave"], ["end_round"]]
    assert made.run.events == [{"event": "node_drains", "node": "a", "seconds": 29.6, "heads": [0, 1]}]
    assert "Node a will be taken away in 30 s. Heads [0, 1] contribute, and move." in caplog.text


def test_merges_of_one_contribution_need_no_others(nodes: Make) -> None:
    """With --when arrival other heads go on with their rounds."""
    made = nodes(merges_wait=False)
    made.draining = {"b": None}
    made.watch.check()
    assert made.calls() == [[], [], ["leave"]]
    assert made.run.events[0]["seconds"] is None


def test_a_node_without_heads_drains_unnoticed(nodes: Make) -> None:
    """It is another run's, or idle."""
    made = nodes()
    made.draining = {"d": 30.0}
    made.watch.check()
    assert (made.calls(), made.run.events) == ([[], [], []], [])


def test_a_process_that_has_not_answered_is_not_asked(nodes: Make) -> None:
    """It has trained nothing, and is started elsewhere as soon as there is room."""
    made = nodes()
    made.run.heads.slots[2].health.answered = None
    made.draining = {"b": 30.0}
    made.watch.check()
    assert made.calls() == [[], [], []]
    assert made.run.rows("node_drains")[0]["heads"] == [2]


def test_a_run_ends_saved_when_its_driver_must_go(nodes: Make) -> None:
    """A driver can't move; the error leads to a last checkpoint, and exit code 75. Its heads aren't asked to leave."""
    made = nodes()
    made.draining = {"c": 30.0, "a": 30.0}
    with pytest.raises(RunError, match=r"driver's own node will be taken away in 30 s.*Continue it on another node"):
        made.watch.check()
    assert made.calls() == [[], [], []]
    assert [row["node"] for row in made.run.rows("node_drains")] == ["c"]


def test_a_head_on_another_node_that_drains_later_leaves_too(nodes: Make) -> None:
    """Also if the same node drains again, after its drain was given up."""
    made = nodes()
    steps: list[Any] = [{"a": 30.0}, {"a": 28.0, "b": 30.0}, {}, {"b": 30.0}]
    for made.draining in steps:
        made.watch.check()
    assert made.calls() == [["leave"], ["leave"], ["end_round", "leave"]]
    assert [row["node"] for row in made.run.rows("node_drains")] == ["a", "b"]
