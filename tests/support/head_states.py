"""States of heads, as checkpoints contain them."""

from __future__ import annotations

import json

import safetensors.torch

from lte_ray.engine.head.head import Head
from lte_ray.engine.head.snapshot import SavedState, snapshot
from lte_ray.messages import CheckpointRequest


def head_state(head: Head) -> SavedState:
    """Returns the head's state at the version that it has adopted, with all that it knows to be merged."""
    return snapshot(head, CheckpointRequest(head.version, {head.number: head.state.merged.sequence}))


def through_file(state: SavedState) -> SavedState:
    """Returns the state after a round trip through a checkpoint's formats: safetensors and JSON."""
    tensors, meta = state
    return safetensors.torch.load(safetensors.torch.save(tensors)), json.loads(json.dumps(meta))
