"""Activation checkpointing: chosen modules compute their activations again in the backward pass instead of keeping them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import nn
from torch.utils.checkpoint import checkpoint

from lte_ray.adapters.plan import match


def checkpoint_activations(model: nn.Module, patterns: Sequence[str]) -> None:
    """Wraps the forward of every module that a pattern names; of nested ones, the outermost.

    Raises:
        ConfigError: a pattern matches no module.
    """
    if not patterns:
        return
    containers = (nn.ModuleList, nn.ModuleDict)  # nobody calls them
    modules = {name: module for name, module in model.named_modules() if name and not isinstance(module, containers)}
    chosen: set[str] = set()
    for hits in match(patterns, list(modules), "module", "--checkpoint-activations").values():
        chosen |= hits
    for name in sorted(chosen):
        if not any(name.startswith(other + ".") for other in chosen):
            module = modules[name]
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
