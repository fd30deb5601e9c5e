"""Waiting for room in the cluster: how many actors have room now, and what the others lack, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from lte_ray.runtime.nodes import Node, describe, free_by_node, live_nodes

FIRST_WORD, LAST_WORD = 10.0, 60.0
"""Seconds between two messages that a run still waits: the first, and in the end."""


def count_places(bundle: Mapping[str, float], nodes: Iterable[Mapping[str, float]]) -> int:
    """Returns how many such bundles fit on the nodes, by the resources of each."""
    return sum(min(int((node.get(name, 0.0) + 1e-6) / amount) for name, amount in bundle.items()) for node in nodes)


def amounts(resources: Mapping[str, float], times: float = 1) -> str:
    """Resources in words: ``2 CPU, 1 GPU``."""
    return ", ".join(f"{times * amount:g} {name}" for name, amount in resources.items())


class Lack:
    """What actors of heads that wait for room lack now.

    Args:
        bundle: what each needs, by Ray's names of resources.
        selector: Ray's label selector of the nodes that they may be on.
        actors: how many wait, as one group: Ray reserves all their bundles or none.
    """

    def __init__(self, bundle: Mapping[str, float], selector: Mapping[str, str], actors: int) -> None:
        self._bundle, self._selector, self._actors = bundle, selector, actors
        nodes = live_nodes(selector)
        free = free_by_node(nodes)
        self.places = min(actors, count_places(bundle, free))
        self._free = {name: sum(node.get(name, 0.0) for node in free) for name in bundle}
        self._suits = count_places(bundle, [node.resources for node in nodes]) > 0
        self._largest = _largest(nodes, bundle)
        self._has_nodes = bool(nodes)

    def __str__(self) -> str:
        on = f" on nodes with {describe(self._selector)}" if self._selector else ""
        each = f"Each of {self._actors} processes of heads needs {amounts(self._bundle)}{on}"
        if not self._has_nodes:
            return f"{each}, but there is no such node."
        if not self._suits:
            return f"{each}, but no node is that large: at most, one has {amounts(self._largest)}."
        missing = self._actors - self.places
        if not missing:
            return f"{each}; there is room for all, but not in the way that --placement-strategy asks for."
        return (
            f"{each}; there is room for {self.places} now (free: {amounts(self._free)}). "
            f"Missing: {amounts(self._bundle, missing)}."
        )


def _largest(nodes: Sequence[Node], bundle: Mapping[str, float]) -> dict[str, float]:
    """What the largest node has of each resource; the largest may be another one for each."""
    return {name: max((node.resources.get(name, 0.0) for node in nodes), default=0.0) for name in bundle}


class Patience:
    """When a run that waits says so, and until when it waits.

    Args:
        seconds: that it waits.
        now: the time now (monotonic).
    """

    def __init__(self, seconds: float, now: float) -> None:
        self._began, self.seconds = now, seconds
        self._pause, self._next = FIRST_WORD, now + FIRST_WORD

    def left(self, now: float) -> float:
        """Returns the seconds that are left, at least 0."""
        return max(0.0, self._began + self.seconds - now)

    def until_word(self, now: float) -> float:
        """Returns the seconds until there is something to say, or until it waits no more."""
        return max(0.0, min(self._next - now, self.left(now)))

    def say(self, lack: object, now: float) -> str:
        """Returns what there is to say now, with what is lacking; the next time comes later each time."""
        self._pause = min(LAST_WORD, 2 * self._pause)
        self._next = now + self._pause
        waited, left = now - self._began, self.left(now)
        return f"Waiting for room in the cluster for {waited:.0f} s, and {left:.0f} s more. {lack}"
