"""States of heads, as checkpoints contain them."""

from __future__ import annotations

import json

import safetensors.torch

from lte_ray.engine.head.head import Head
from lte_ray.engine.head.snapshot import SavedState, snapshot
from lte_ray.messages import CheckpointRequest


def head_state(head: Head) -> SavedState:
    """The head's state at the version that it has adopted, which holds all that it has heard was merged."""
    return snapshot(head, CheckpointRequest(head.version, {head.number: head.state.merged.sequence}))


def through_file(state: SavedState) -> SavedState:
    """The state as a checkpoint keeps it: safetensors and JSON."""
    tensors, meta = state
    return safetensors.torch.load(safetensors.torch.save(tensors)), json.loads(json.dumps(meta))
