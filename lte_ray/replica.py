"""The authors' `lte.replica`, which this path stands for."""

from lte_ray.modes.replica import MultiheadReplicaLayer, ReplicaLayer

__all__ = ["MultiheadReplicaLayer", "ReplicaLayer"]
