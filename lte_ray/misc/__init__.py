"""Helpers of the authors' library: attention and patches that LoRA can adapt, position embeddings, merges, devices.

Names and signatures here are those of their library, https://github.com/minyoungg/LTE, whose users import them from these
paths: they must neither move nor change (`docs/from-lte.md`).
"""

from lte_ray.config import LTEConfig
from lte_ray.misc import attention, common, convert, distributed, masks, merge, position
from lte_ray.misc.attention import MultiheadAttention
from lte_ray.misc.common import auto_dtype, determine_compute_context, flash_ready_device
from lte_ray.misc.convert import (
    LinearProjection,
    disable_norm_affine_parameters,
    replace_conv_proj_with_linear,
    use_custom_attention,
)
from lte_ray.misc.distributed import (
    device,
    init_distributed_mode,
    is_distributed,
    is_main_process,
    local_rank,
    num_visible_devices,
    rank,
    reduce,
    world_size,
)
from lte_ray.misc.merge import MergeCondition
from lte_ray.misc.position import PositionalEncoding, sinusoidal, sinusoidal_2d

__all__ = [
    "LTEConfig",
    "LinearProjection",
    "MergeCondition",
    "MultiheadAttention",
    "PositionalEncoding",
    "attention",
    "auto_dtype",
    "common",
    "convert",
    "determine_compute_context",
    "device",
    "disable_norm_affine_parameters",
    "distributed",
    "flash_ready_device",
    "init_distributed_mode",
    "is_distributed",
    "is_main_process",
    "local_rank",
    "masks",
    "merge",
    "num_visible_devices",
    "position",
    "rank",
    "reduce",
    "replace_conv_proj_with_linear",
    "sinusoidal",
    "sinusoidal_2d",
    "use_custom_attention",
    "world_size",
]
