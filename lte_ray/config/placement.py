"""The settings of placement: the resources that heads reserve, and the nodes that processes may be on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lte_ray.config.node_labels import ANY, AUTO, parse_labels, to_labels
from lte_ray.config.units import read_units
from lte_ray.config.validation import check_at_least, check_choice, check_integers, setting
from lte_ray.errors import ConfigError

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


@dataclass(frozen=True)
class PlacementConfig:
    """The resources of each head. In Python also Ray's ``ScalingConfig``."""

    heads_per_actor: int = setting(
        1,
        "Heads in one actor (virtual heads). They share its resources and one copy of the main weights (on CPUs one copy for "
        "each head that trains at the same time).",
    )
    stack_heads: Literal["auto", "always", "never"] = setting(
        "auto",
        "Whether an actor computes its heads as one batch (always) or one by one (never); auto: one batch on a GPU, one by "
        "one on CPUs.",
    )
    cpus_per_head: float | None = setting(
        None,
        "CPUs reserved for each head's actor (for all its heads together, if it has several); by default 1 per head, or an "
        "equal share (at least 0.25) if there are more heads than CPUs.",
    )
    gpus_per_head: float | None = setting(
        None,
        "GPUs reserved for each head's actor, 1 or a fraction of one; by default 1 if the cluster has one for each, else 0.",
    )
    gpu_memory_share: float | None = setting(
        None,
        "Part of its GPU's memory that each process of heads may use for tensors, between 0 and 1; 1: no limit. By default "
        "--gpus-per-head, so that heads that share a GPU can't take memory from each other.",
    )
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = setting(
        "PACK",
        "How Ray distributes the heads' actors: on few nodes (PACK) or on many (SPREAD), as far as there is room; or strictly "
        "on one node (STRICT_PACK) or each on another (STRICT_SPREAD). Heads of --max-heads go where there is room.",
    )
    head_labels: tuple[str, ...] = setting(
        (),
        "Labels that the heads' nodes must have, e.g. 'ray.io/accelerator-type=H100' 'ray.io/market-type=!spot'. Values: one, "
        "'!one', 'in(a,b)', '!in(a,b)'.",
    )
    coordinator_labels: tuple[str, ...] = setting(
        (AUTO,),
        "Labels that the node of the coordinator, its shards and the evaluator must have. auto: not "
        "ray.io/market-type=spot, if the cluster has other nodes; none: any node.",
    )
    resource_timeout: float = setting(
        0.0,
        "Time to wait for an autoscaling cluster to provide the resources; 0: fail at once if they are missing. With "
        "--exhausted drop, the run then starts with the heads that have room, or waits as long again for --min-heads. A run "
        "whose other heads are done waits as long (0: 30 minutes) for a place for the last ones, then ends without them.",
        unit="time",
    )

    def __post_init__(self) -> None:
        read_units(self)
        check_integers(self, "heads_per_actor")
        check_at_least(self, 1, "heads_per_actor")
        check_choice(self, "stack_heads", ("auto", "always", "never"))
        check_choice(self, "placement_strategy", STRATEGIES)
        to_labels(self, "head_labels", "coordinator_labels")
        parse_labels("head_labels", self.head_labels)
        self._check_coordinator_labels()
        for name in ("cpus_per_head", "gpus_per_head", "resource_timeout"):
            if getattr(self, name) is not None:
                check_at_least(self, 0, name)
        share = self.gpu_memory_share
        if share is not None:
            check_at_least(self, 0, "gpu_memory_share")
            if not 0 < share <= 1:
                raise ConfigError(f"--gpu-memory-share is {share}, but it must be above 0 and at most 1: a part of one GPU.")
            if self.gpus_per_head == 0:
                raise ConfigError(f"--gpu-memory-share is {share}, but --gpus-per-head is 0. Leave one of them out.")
        if (self.gpus_per_head or 0) > 1:
            raise ConfigError(
                f"--gpus-per-head is {self.gpus_per_head}, but it must be at most 1: a head computes on one GPU, so the others "
                "would idle. To use more GPUs, raise --num-heads."
            )

    def _check_coordinator_labels(self) -> None:
        labels = self.coordinator_labels
        words = [label for label in labels if label in (AUTO, ANY)]
        if words and len(labels) > 1:
            raise ConfigError(f"--coordinator-labels is {' '.join(labels)}, but {words[0]} stands alone. Leave one out.")
        if not words:
            parse_labels("coordinator_labels", labels)
