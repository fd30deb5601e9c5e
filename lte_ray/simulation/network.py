"""Links with a bandwidth and a latency."""

from __future__ import annotations

from lte_ray.config.cluster_model import ClusterModel


class Link:
    """One direction of a link: first in, first out, `bandwidth` bytes per second (0: no limit).

    Attributes:
        busy: seconds for which the link has transmitted.
        bytes: transmitted so far.
    """

    def __init__(self, bandwidth: float) -> None:
        self._bandwidth = bandwidth
        self._free_at = 0.0
        self.busy = 0.0
        self.bytes = 0

    def transmit(self, now: float, size: int) -> float:
        """Sends `size` bytes from `now` on; returns the time at which the last of them has left."""
        seconds = size / self._bandwidth if self._bandwidth else 0.0
        self._free_at = max(self._free_at, now) + seconds
        self.busy += seconds
        self.bytes += size
        return self._free_at


class Network:
    """The links of all heads, and of the coordinator (one for each of its shards, which share what it sends and receives).

    A message occupies the sender's and the receiver's link at the same time; the one that is free later decides.

    Attributes:
        inward, outward: the coordinator's links.
    """

    def __init__(self, cluster: ClusterModel, num_heads: int, shards: int) -> None:
        self._latency = cluster.latency
        self._up = [Link(cluster.bandwidth) for _ in range(num_heads)]
        self._down = [Link(cluster.bandwidth) for _ in range(num_heads)]
        total = shards * (cluster.coordinator_bandwidth or cluster.bandwidth)
        self.inward, self.outward = Link(total), Link(total)

    def send_up(self, now: float, head: int, size: int) -> float:
        """Sends a contribution; returns the time at which it arrives at the coordinator."""
        return self._latency + max(self._up[head].transmit(now, size), self.inward.transmit(now, size))

    def send_down(self, now: float, head: int, dense: int, factors: int) -> float:
        """Sends an answer; returns the time at which it arrives at the head.

        Args:
            dense: bytes from the coordinator.
            factors: bytes directly from other heads.
        """
        return self._latency + max(self._down[head].transmit(now, dense + factors), self.outward.transmit(now, dense))

    def traffic(self) -> tuple[list[int], list[int]]:
        """Bytes up and bytes down so far, by head."""
        return [link.bytes for link in self._up], [link.bytes for link in self._down]
