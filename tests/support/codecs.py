"""Codecs for small plans."""

from __future__ import annotations

import torch

from lte_ray.config.merge import MergeConfig
from lte_ray.layout import Plan
from lte_ray.transfer.codec import Codec
from lte_ray.transfer.groups import make_groups
from tests.support.plans import plan_from_shapes

FORMATS = ["fp32", "bf16", "int8"]


def make_codec(plan: Plan, merge: MergeConfig, dtype: torch.dtype = torch.float32) -> Codec:
    """Returns the codec of two heads with this plan."""
    return Codec(plan, make_groups([plan, plan], merge), merge, dtype)


def large_codec(transfer: str, topk: float = 1.0) -> Codec:
    """Returns a codec with a partial block in each segment, and few enough replica elements sent for indices."""
    plan = plan_from_shapes([(40, 30, 3), (7, 200, 5)], [(1300,), (5,)])
    return make_codec(plan, MergeConfig(transfer=transfer, replica_topk=topk, send_down="dense"))
