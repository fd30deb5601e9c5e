"""The authors' `lte.prepare`, which this path stands for."""

from lte_ray.modes.prepare import prepare_model_for_lte
from lte_ray.modes.replica import MultiheadReplicaLayer

__all__ = ["MultiheadReplicaLayer", "prepare_model_for_lte"]
