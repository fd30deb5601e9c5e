"""Links with a bandwidth and a latency. Each carries one thing after another, each direction on its own."""

from __future__ import annotations

from lte_ray.config.cluster_model import ClusterModel


class Link:
    """One direction of a link: FIFO, `bandwidth` bytes per second (0: no limit)."""

    def __init__(self, bandwidth: float) -> None:
        self._bandwidth = bandwidth
        self._free = 0.0
        self.busy = 0.0
        self.bytes = 0

    def carry(self, now: float, size: int) -> float:
        """When the last of `size` bytes that are handed over at `now` has left."""
        took = size / self._bandwidth if self._bandwidth else 0.0
        self._free = max(self._free, now) + took
        self.busy += took
        self.bytes += size
        return self._free


class Network:
    """The links of all heads, and of the coordinator (one for each of its shards, which share what it sends and gets).

    What goes from one to another occupies both links at the same time; whichever is free later decides.
    """

    def __init__(self, cluster: ClusterModel, num_heads: int, shards: int) -> None:
        self._latency = cluster.latency
        self._up = [Link(cluster.bandwidth) for _ in range(num_heads)]
        self._down = [Link(cluster.bandwidth) for _ in range(num_heads)]
        whole = shards * (cluster.coordinator_bandwidth or cluster.bandwidth)
        self.inward, self.outward = Link(whole), Link(whole)

    def up(self, now: float, head: int, size: int) -> float:
        """When a contribution has arrived at the coordinator."""
        return self._latency + max(self._up[head].carry(now, size), self.inward.carry(now, size))

    def down(self, now: float, head: int, dense: int, factors: int) -> float:
        """When an answer has arrived at the head: `dense` bytes from the coordinator, `factors` straight from other heads."""
        return self._latency + max(self._down[head].carry(now, dense + factors), self.outward.carry(now, dense))

    def traffic(self) -> tuple[list[int], list[int]]:
        """Bytes up and down so far, of each head."""
        return [link.bytes for link in self._up], [link.bytes for link in self._down]
