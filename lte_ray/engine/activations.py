"""Activation checkpointing: chosen modules compute their activations again in the backward pass instead of keeping them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from lte_ray.adapters.plan import match


def checkpoint_activations(model: nn.Module, patterns: Sequence[str]) -> None:
    """Wraps the forward of every module that a pattern names; of nested ones, the outermost.

    Raises:
        ConfigError: a pattern matches no module.
    """
    if not patterns:
        return
    modules = dict(model.named_modules())
    chosen = matching(model, patterns)
    for name in sorted(chosen):
        if not any(name.startswith(other + ".") for other in chosen):
            module = modules[name]
            norms = [m for m in module.modules() if isinstance(m, _NormBase) and m.track_running_stats]
            again: dict[str, Any] = {"context_fn": functools.partial(_contexts, norms)} if norms else {}
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False, **again)


def matching(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """Names of the modules that the patterns name.

    Raises:
        ConfigError: a pattern matches no module that can be called.
    """
    containers = (nn.ModuleList, nn.ModuleDict)  # nobody calls them
    names = [name for name, module in model.named_modules() if name and not isinstance(module, containers)]
    return set().union(*match(patterns, names, "module", "--checkpoint-activations").values())


def _contexts(norms: Sequence[_NormBase]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For computing the activations, and for computing them again."""
    return nullcontext(), _keeping_statistics(norms)


@contextmanager
def _keeping_statistics(norms: Sequence[_NormBase]) -> Iterator[None]:
    """Within, batch normalisation leaves its running statistics alone: a batch counts once."""
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count
