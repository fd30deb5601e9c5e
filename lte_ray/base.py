"""The authors' `lte.base`, which this path stands for: the classes by which their programs recognize layers."""

from lte_ray.adapters.layer import LTELayer
from lte_ray.modes.replica import ReplicaLayer

__all__ = ["LTELayer", "ReplicaLayer"]
