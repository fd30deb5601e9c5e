"""Links with a bandwidth and a latency."""

from __future__ import annotations

from collections import Counter

from lte_ray.config.cluster_model import ClusterModel
from lte_ray.errors import ConfigError


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
    """The links of all machines, and of the coordinator (one for each of its shards, which share what it sends and receives).

    A message occupies the sender's and the receiver's link at the same time; the one that is free later decides. By default
    each head has a machine of its own, and so has the coordinator. With `ClusterModel.machines` the heads of a machine share
    its link, the coordinator is on the first, and what goes to several heads of a machine crosses its link once.

    Attributes:
        inward, outward: the coordinator's links.
    """

    def __init__(self, cluster: ClusterModel, num_heads: int, shards: int) -> None:
        if cluster.machines and shards > 1:
            raise ConfigError(
                f"--machines {cluster.machines} puts the coordinator on one machine, but with --shards {shards} it is on "
                "several. Leave one of the two out."
            )
        self._latency, self._apart = cluster.latency, not cluster.machines
        machines = min(cluster.machines or num_heads, num_heads)
        self._machines = [head * machines // num_heads for head in range(num_heads)]
        self._heads_on = Counter(self._machines)
        self._up = [Link(cluster.bandwidth) for _ in range(machines)]
        self._down = [Link(cluster.bandwidth) for _ in range(machines)]
        self._bytes_up, self._bytes_down = [0] * num_heads, [0] * num_heads
        self.inward, self.outward = self._down[0], self._up[0]
        if self._apart:
            total = shards * (cluster.coordinator_bandwidth or cluster.bandwidth)
            self.inward, self.outward = Link(total), Link(total)

    def send_up(self, now: float, head: int, size: int) -> float:
        """Sends a contribution; returns the time at which it arrives at the coordinator."""
        if self._is_beside_coordinator(head):
            return now + self._latency
        self._bytes_up[head] += size
        return self._latency + max(self._up[self._machines[head]].transmit(now, size), self.inward.transmit(now, size))

    def send_down(self, now: float, head: int, dense: int, factors: int) -> float:
        """Sends an answer; returns the time at which it arrives at the head.

        Args:
            dense: bytes from the coordinator.
            factors: bytes directly from other heads.
        """
        if self._is_beside_coordinator(head):  # it has fetched all that this head needs
            return now + self._latency
        machine, heads = self._machines[head], len(self._machines)
        sharing = self._heads_on[machine]
        if sharing > 1:  # each of these heads counts a part of what their machine fetches once, without their own factors
            dense, factors = dense // sharing, factors * (heads - sharing) // ((heads - 1) * sharing)
        self._bytes_down[head] += dense + factors
        return self._latency + max(self._down[machine].transmit(now, dense + factors), self.outward.transmit(now, dense))

    def traffic(self) -> tuple[list[int], list[int]]:
        """Bytes up and bytes down over links so far, by head."""
        return self._bytes_up, self._bytes_down

    def _is_beside_coordinator(self, head: int) -> bool:
        return not self._apart and self._machines[head] == 0
