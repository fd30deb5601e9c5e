"""What is wrong with the nodes of a cluster: facts in, one sentence out."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from lte_ray.runtime import node_probe
from lte_ray.runtime.node_facts import ELSEWHERE, MAX_SKEW, NodeFacts, find_notes, find_problem
from lte_ray.runtime.node_probe import probe
from lte_ray.storage import RunDirectory

HERE = {
    "host": "head", "time": 100.0, "python": "3.11.7", "ray": "2.60.0", "torch": "2.8.1+cpu", "lte_ray": "0.1.0", "code": "abc",
    "storage": "ok",
}  # fmt: skip


def node(name: str = "10.0.0.3", sent: float = 100.0, answered: float = 101.0, **other: Any) -> NodeFacts:
    """A node that has what the driver has, but for some facts."""
    return NodeFacts(name, {**HERE, "host": f"host-{name[-1]}", **other}, sent=sent, answered=answered)


def problem(*nodes: NodeFacts) -> str:
    """The sentence about these nodes."""
    return find_problem(HERE, nodes, "/home/me/runs")


def test_equal_nodes_have_no_problem() -> None:
    """Another build of torch, of a node with GPUs, is the same version; so is another patch of Python."""
    assert problem(node(), node("10.0.0.4", torch="2.8.1+cu126", python="3.11.9")) == ""
    assert find_notes(HERE, [node(torch="2.8.1+cu126")]) == []


@pytest.mark.parametrize(
    ("facts", "text"),
    [
        ({"python": "3.12.1"}, "Node 10.0.0.3 (host-3) has Python 3.12.1, but the driver has Python 3.11.7."),
        ({"ray": "2.54.0"}, "Node 10.0.0.3 (host-3) has Ray 2.54.0, but the driver has Ray 2.60.0."),
        ({"torch": "2.7.0"}, "Node 10.0.0.3 (host-3) has torch 2.7.0, but the driver has torch 2.8.1+cpu."),
        ({"torch": ""}, "Node 10.0.0.3 (host-3) has no torch, but the driver has torch 2.8.1+cpu."),
        ({"lte_ray": "0.2.0"}, "Node 10.0.0.3 (host-3) has lte-ray 0.2.0, but the driver has lte-ray 0.1.0."),
    ],
)
def test_versions_that_differ_are_named(facts: dict[str, str], text: str) -> None:
    """The node, its version, the driver's, and what to change."""
    assert problem(node(), node(**facts)) == f"{text} Install the same versions on all nodes. {ELSEWHERE}"


def test_a_node_without_lte_ray_is_named_before_anything_else() -> None:
    """Its other versions may differ, too."""
    text = problem(node(lte_ray="", code="", torch=""))
    assert text == (
        "Node 10.0.0.3 (host-3) has no lte-ray. Install lte-ray on every node, or send it along: lte-ray submit does. "
        f"{ELSEWHERE}"
    )


def test_another_state_of_the_code_is_another_lte_ray() -> None:
    """The version alone doesn't tell two checkouts apart."""
    text = "Node 10.0.0.3 (host-3) has another state of lte-ray 0.1.0's code than the driver."
    assert problem(node(code="def")).startswith(text)


def test_a_node_that_can_not_run_the_probe_is_named() -> None:
    """With the last line of its error."""
    text = problem(NodeFacts("10.0.0.9", {}, failed="ModuleNotFoundError: No module named 'numpy'"))
    assert text.startswith("Node 10.0.0.9 can't run lte-ray's code: ModuleNotFoundError: No module named 'numpy'. Make its")


def test_storage_that_a_node_does_not_see_or_may_not_write() -> None:
    """Two different reasons, two different changes."""
    text = problem(node(storage="unseen"), node("10.0.0.4", storage="unseen"))
    assert text == (
        "Node 10.0.0.3 (host-3) doesn't see --storage /home/me/runs: a file of the driver isn't there. The same holds for 1 "
        "more: 10.0.0.4 (host-4). Heads on all nodes write checkpoints, so give a place that all can access: a disk that they "
        f"share, or a URI such as s3://bucket/runs. {ELSEWHERE}"
    )
    text = problem(node(storage="PermissionError: read-only"))
    assert text.startswith("Node 10.0.0.3 (host-3) can't use --storage /home/me/runs: PermissionError: read-only. Give it")


def test_many_nodes_with_one_problem_are_one_sentence() -> None:
    """Three more are named, and all are counted."""
    text = problem(*(node(f"10.0.0.{i}", torch="2.7.0") for i in range(8)))
    assert "The same holds for 7 more: 10.0.0.1 (host-1), 10.0.0.2 (host-2), 10.0.0.3 (host-3), ..." in text


@pytest.mark.parametrize(
    ("time", "text"), [(90.0 - MAX_SKEW, "20 s behind"), (151.0, "50 s ahead of"), (101.0 + MAX_SKEW, ""), (90.0, "")]
)
def test_clocks_are_compared_within_the_time_that_the_probe_took(time: float, text: str) -> None:
    """The probe ran at some time between 100 and 101 of the driver's clock: only what is certain counts."""
    facts = problem(node(time=time))
    assert (
        facts.startswith(f"The clock of node 10.0.0.3 (host-3) is {text} the driver's. Set the clocks by NTP")
        if text
        else not facts
    )
    assert problem(node(time=150.0, answered=160.0)) == "", "the task may have waited"


def test_a_difference_in_the_last_part_of_a_version_is_a_note() -> None:
    """Training works, but isn't the same to the last digit."""
    other = node(torch="2.8.0")
    assert problem(other) == ""
    assert find_notes(HERE, [other]) == [
        "Node 10.0.0.3 (host-3) has torch 2.8.0, and the driver 2.8.1+cpu. Results may differ in their last digits."
    ]


def test_the_probe_says_what_this_process_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whether a file of the driver is there: it writes nothing where it isn't."""
    storage = RunDirectory.open(str(tmp_path), "runs")
    facts = probe()
    assert find_problem(facts, [NodeFacts("x", facts, sent=facts["time"], answered=facts["time"])], "") == ""
    assert len(facts["code"]) == 12
    storage.write("mark", b"")
    assert probe(pickle.dumps(storage), "mark")["storage"] == "ok"
    assert storage.list_names() == ["mark"]
    monkeypatch.setattr(node_probe, "WAIT", 0.0)
    assert probe(pickle.dumps(storage), "other")["storage"] == "unseen"
    assert probe(b"junk", "mark")["storage"].startswith("UnpicklingError")
