"""A contribution's way through the transfer format, where head and coordinator are in one process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from lte_ray.config import MergeConfig
from lte_ray.engine.coordinator import Coordinator
from lte_ray.engine.head import Head
from lte_ray.layout import Plan
from lte_ray.merging.transfer import Codec, groups
from lte_ray.messages import Contribution


class Transit:
    """Encodes what heads send and decodes it as the coordinator does; leaves it as it is where the format loses nothing.

    Args:
        plans: each head's.
        coordinator: holds the references that are decoded with.
    """

    def __init__(self, plans: Sequence[Plan], merge: MergeConfig, coordinator: Coordinator, dtype: torch.dtype) -> None:
        self._coordinator = coordinator
        self._codecs: list[Codec] = []
        if merge.transfer != "fp32" or merge.replica_topk < 1:
            parts = groups(plans, merge)
            made = {plan: Codec(plan, parts, merge, dtype) for plan in set(plans)}
            self._codecs = [made[plan] for plan in plans]

    def __call__(self, head: Head, contribution: Contribution) -> Contribution:
        """The contribution as the coordinator has it; the head takes what was decoded as what it contributed."""
        if not self._codecs:
            return contribution
        codec = self._codecs[head.head]
        sent = head.encode(contribution, codec)
        return replace(sent, buffer=codec.decode(dict(enumerate(sent.buffer)), self._coordinator.reference(head.head)))
