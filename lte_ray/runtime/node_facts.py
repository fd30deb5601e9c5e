"""What nodes have, and what is wrong with it: facts in, sentences out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MAX_SKEW = 10.0
"""Seconds that a node's clock may differ from the driver's."""

ELSEWHERE = "Or keep the run off such nodes with --head-labels and --coordinator-labels."

NAMED = 3
"""Nodes that a message names."""


@dataclass(frozen=True)
class NodeFacts:
    """What one node has, as `node_probe.probe` returns it.

    Attributes:
        address: of the node, for people.
        values: what the probe returned; empty if the node couldn't run it.
        failed: why it couldn't.
        sent, answered: Unix times in seconds of the driver's clock, before and after the probe ran.
    """

    address: str
    values: Mapping[str, Any]
    failed: str = ""
    sent: float = 0.0
    answered: float = 0.0

    @property
    def name(self) -> str:
        """The node for people: its address and its host's name."""
        host = self.values.get("host")
        return f"{self.address} ({host})" if host and host != self.address else self.address

    @property
    def skew(self) -> float:
        """Seconds that its clock is ahead of the driver's, at least; negative: behind. The probe ran between two times."""
        at = float(self.values.get("time", self.sent))
        return at - self.answered if at > self.answered else min(0.0, at - self.sent)


def find_problem(here: Mapping[str, Any], nodes: Sequence[NodeFacts], storage: str) -> str:
    """Returns one sentence about what would break a run on these nodes; empty if nothing would.

    Args:
        here: what the probe returned in the driver's process.
        nodes: all others.
        storage: of the run, for people.
    """
    for affected, change in _problems(here, nodes, storage):
        if affected:
            more = f" The same holds for {len(affected) - 1} more: {_names(affected[1:])}." if len(affected) > 1 else ""
            return f"{affected[0][1]}{more} {change} {ELSEWHERE}"
    return ""


def _problems(
    here: Mapping[str, Any], nodes: Sequence[NodeFacts], storage: str
) -> Iterator[tuple[list[tuple[NodeFacts, str]], str]]:
    """Yields kinds of problems: the nodes that have it, with a sentence each, and what to change."""
    yield (
        [(n, f"Node {n.name} has no lte-ray.") for n in nodes if not n.failed and not n.values["lte_ray"]],
        "Install lte-ray on every node, or send it along: lte-ray submit does.",
    )
    yield (
        [(n, f"Node {n.name} can't run lte-ray's code: {n.failed.rstrip('.')}.") for n in nodes if n.failed],
        "Make its Python environment the same as the driver's, or remove it from the cluster.",
    )
    for key, label, parts in (("python", "Python", 2), ("ray", "Ray", 0), ("torch", "torch", 2), ("lte_ray", "lte-ray", 0)):
        wanted = here[key]
        differing = [n for n in nodes if not n.failed and _cut(n.values[key], parts) != _cut(wanted, parts)]
        yield (
            [
                (n, f"Node {n.name} has {_has(label, n.values[key])}, but the driver has {_has(label, wanted)}.")
                for n in differing
            ],
            "Install the same versions on all nodes.",
        )
    other = [n for n in nodes if not n.failed and n.values["code"] != here["code"]]
    yield (
        [(n, f"Node {n.name} has another state of lte-ray {here['lte_ray']}'s code than the driver.") for n in other],
        "Install the same on all nodes, or send it along: lte-ray submit does.",
    )
    states = [(n, n.values.get("storage", "ok")) for n in nodes if not n.failed]
    yield (
        [
            (n, f"Node {n.name} doesn't see --storage {storage}: a file of the driver isn't there.")
            for n, s in states
            if s == "unseen"
        ],
        "Heads on all nodes write checkpoints, so give a place that all can access: a disk that they share, or a URI such as "
        "s3://bucket/runs.",
    )
    yield (
        [(n, f"Node {n.name} can't use --storage {storage}: {s.rstrip('.')}.") for n, s in states if s not in ("ok", "unseen")],
        "Give it the rights, or another --storage that all nodes can access.",
    )
    yield (
        [
            (n, f"The clock of node {n.name} is {abs(n.skew):.0f} s {'ahead of' if n.skew > 0 else 'behind'} the driver's.")
            for n in nodes
            if not n.failed and abs(n.skew) > MAX_SKEW
        ],
        "Set the clocks by NTP (chrony, systemd-timesyncd): the run's times and its storage depend on them.",
    )


def find_notes(here: Mapping[str, Any], nodes: Sequence[NodeFacts]) -> list[str]:
    """Returns sentences about differences that a run survives: of the last part of a version."""
    return [
        f"Node {n.name} has torch {n.values['torch']}, and the driver {here['torch']}. Results may differ in their last digits."
        for n in nodes
        if not n.failed and _differs_last(n.values["torch"], here["torch"])
    ]


def _differs_last(version: str, other: str) -> bool:
    """Whether two versions differ in their last part only."""
    return _cut(version, 0) != _cut(other, 0) and _cut(version, 2) == _cut(other, 2)


def _cut(version: str, parts: int) -> str:
    """A version without its local part (``+cu126``); only the first parts of it, if a number is given."""
    public = version.partition("+")[0]
    return ".".join(public.split(".")[:parts]) if parts else public


def _has(label: str, version: str) -> str:
    return f"{label} {version}" if version else f"no {label}"


def _names(affected: Sequence[tuple[NodeFacts, str]]) -> str:
    names = [n.name for n, _ in affected]
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
