"""What a merge sends, in each format, and how long it takes on given links."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.config.cluster_model import ClusterModel
from lte_ray.engine.coordinator.broadcast_log import alternative_bytes
from lte_ray.engine.settings import Settings
from lte_ray.layout import Plan
from lte_ray.simulation.api import simulate_time
from lte_ray.simulation.cost_model import CostModel, as_sent

FORMATS = (("fp32", "auto"), ("bf16", "auto"), ("int8", "auto"), ("int8", "int8"))
"""Pairs of --transfer and --send-down that a plan compares with the settings' own."""


@dataclass(frozen=True)
class Traffic:
    """One merge of all heads between machines.

    Attributes:
        transfer, send_down: the formats, as --transfer and --send-down name them.
        up: bytes of the largest contribution of a head.
        down: bytes that a head receives.
        seconds: until all heads train again, if they wait.
    """

    transfer: str
    send_down: str
    up: int
    down: int
    seconds: float


def merge_traffic(plans: Sequence[Plan], settings: Settings, link: float) -> tuple[Traffic, ...]:
    """Returns the bytes and the time of a merge: first with the settings' formats, then with others.

    Args:
        plans: each head's.
        settings: with a policy that isn't "auto".
        link: bytes per second of each machine's link in each direction, the coordinator's among them.
    """
    given = settings.merge
    ways = dict.fromkeys([(given.transfer, given.send_down), *FORMATS])
    rows = []
    for transfer, send_down in ways:
        merge = replace(given, transfer=transfer, send_down=send_down)  # type: ignore[arg-type]  # of the choices
        sent = as_sent(merge)
        costs = CostModel(plans, sent)
        up = max(costs.contribution_bytes(head) for head in range(len(plans)))
        down = sum(costs.update_bytes(len(plans) - 1))
        rows.append(Traffic(transfer, send_down, up, down, _seconds(plans, sent, link)))
    return tuple(rows)


def _seconds(plans: Sequence[Plan], merge: MergeConfig, link: float) -> float:
    """The time by which a merge lengthens a simulated run whose heads are equal and wait."""
    timed = MergeConfig(
        merge_iter=1,
        policy="average",
        transfer=merge.transfer,
        replica_topk=merge.replica_topk,
        send_down=merge.send_down,
        shards=merge.shards,
    )
    cluster = ClusterModel(step_seconds=1.0, bandwidth=link)

    def run(steps: int) -> float:
        settings = Settings("plan", LTEConfig(num_heads=len(plans)), timed, TrainConfig(steps=steps))
        return simulate_time(list(plans), settings, cluster).seconds

    return run(3) - run(2) - cluster.step_seconds


@dataclass(frozen=True)
class Ring:
    """Gradients of DDP, summed in a ring at every step.

    Attributes:
        bytes: that each process sends, and receives.
        seconds: of a step's exchange.
    """

    bytes: int
    seconds: float


def ddp_ring(plan: Plan, processes: int, link: float) -> Ring:
    """Returns what DDP with that many processes exchanges in a step, in fp32."""
    each = alternative_bytes(plan.base.size, processes, 1, 1)["ddp"]
    return Ring(each, each / link if link else 0.0)
