"""Many LoRA heads in one process, without Ray: the modes of the authors' library.

Names and signatures here are those of their library, https://github.com/minyoungg/LTE, whose users import them from these
paths: they must neither move nor change (`docs/from-lte.md`). `parameter_groups` is this library's.
"""

from lte_ray.modes.ddp import DDPLayer
from lte_ray.modes.dmp import DMPLayer
from lte_ray.modes.merged_state_dict import merged_state_dict
from lte_ray.modes.mhlora import MHLoRALayer
from lte_ray.modes.parameter_groups import parameter_groups
from lte_ray.modes.prepare import prepare_model_for_lte
from lte_ray.modes.replica import MultiheadReplicaLayer, ReplicaLayer

__all__ = [
    "DDPLayer",
    "DMPLayer",
    "MHLoRALayer",
    "MultiheadReplicaLayer",
    "ReplicaLayer",
    "merged_state_dict",
    "parameter_groups",
    "prepare_model_for_lte",
]
