"""The links of a simulated cluster, and which bytes cross them."""

from __future__ import annotations

import pytest

from lte_ray.config.cluster_model import ClusterModel
from lte_ray.errors import ConfigError
from lte_ray.simulation.network import Network

CLUSTER = ClusterModel(bandwidth=1000, latency=0.5)


def on_machines(machines: int, heads: int) -> Network:
    return Network(ClusterModel(bandwidth=1000, latency=0.5, machines=machines), heads, 1)


def test_each_head_and_the_coordinator_have_a_link_by_default() -> None:
    """Two contributions arrive one after another; two answers leave the coordinator one after another."""
    network = Network(CLUSTER, 2, 1)
    assert [network.send_up(0.0, head, 1000) for head in (0, 1)] == [1.5, 2.5]
    assert [network.send_down(0.0, head, 1000, 0) for head in (0, 1)] == [1.5, 2.5]
    assert network.traffic() == ([1000, 1000], [1000, 1000])


def test_heads_beside_the_coordinator_use_no_link() -> None:
    """Of four heads on two machines, the first two send and receive through memory."""
    network = on_machines(2, 4)
    assert [network.send_up(0.0, head, 1000) for head in range(4)] == [0.5, 0.5, 1.5, 2.5]
    assert [network.send_down(10.0, head, 1000, 0) for head in (0, 1)] == [10.5, 10.5]
    assert network.traffic() == ([0, 0, 1000, 1000], [0, 0, 0, 0])


def test_what_goes_to_several_heads_of_a_machine_crosses_its_link_once() -> None:
    """The dense base once, and the factors of the two heads on the other machine once, not each head's three others."""
    network = on_machines(2, 4)
    times = [network.send_down(0.0, head, 1000, 3 * 600) for head in (2, 3)]
    assert times[-1] == pytest.approx(0.5 + (1000 + 2 * 600) / 1000)
    assert sum(network.traffic()[1]) == 1000 + 2 * 600


def test_machines_contradict_a_link_of_the_coordinator_and_shards() -> None:
    """Either would have no effect."""
    with pytest.raises(ConfigError, match="--coordinator-bandwidth"):
        ClusterModel(machines=2, coordinator_bandwidth=5e6)
    with pytest.raises(ConfigError, match="with --shards 2 it is on several"):
        Network(ClusterModel(machines=2), 4, 2)
