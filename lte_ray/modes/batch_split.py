"""A batch shared out over heads along its first dimension, and the head whose part is being computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from lte_ray.errors import ConfigError

HEAD: ContextVar[int | None] = ContextVar("lte_ray_head", default=None)
"""The active head: layers compute for it alone and take their whole input as its. None: layers share the batch out."""


class Batch(NamedTuple):
    """What the model was called with: its first tensor's first dimension, and whether any tensor has no other dimension."""

    size: int
    has_vectors: bool


BATCH: ContextVar[Batch | None] = ContextVar("lte_ray_batch", default=None)
"""The batch that the model was called with, where it is known."""


@contextmanager
def active(head: int) -> Iterator[None]:
    """Everything within is computed for this head."""
    token = HEAD.set(head)
    try:
        yield
    finally:
        HEAD.reset(token)


def recomputing() -> bool:
    """Whether a backward pass runs, in which gradient checkpointing computes again what it didn't keep."""
    return torch._C._current_graph_task_id() != -1


def check_not_recomputed(module: nn.Module) -> None:
    """Raises ConfigError if a module in a loop over heads is used in a backward pass, where no head is active."""
    if module.__dict__.get("lte_looped") and recomputing():
        refuse_recomputed()


def refuse_recomputed() -> NoReturn:
    """Raises ConfigError: in a backward pass no head is active."""
    raise ConfigError(
        "Gradient checkpointing inside of a loop over heads (chunk='model', or parameters that a module owns itself) would "
        "lose track of the head. Put the checkpoint around the whole model, or leave it out."
    )


def check_batch(size: int, heads: int, where: str, exactly: bool = False) -> None:
    """Raises ConfigError unless a first dimension of `size` can be shared out over `heads`.

    Args:
        where: what got it, for the error.
        exactly: it must be the batch itself; else a multiple of it will do, as where a layer sees patches or windows.
    """
    called_with = BATCH.get()
    batch = called_with.size if called_with is not None else 0
    if batch and (size != batch if exactly else size % batch):
        raise ConfigError(
            f"{where} got an input whose first dimension is {size}, but the model's batch is {batch}: what isn't batch-first "
            "can't be shared out over heads there. Use chunk='model' in prepare_model_for_lte, which shares out the model's "
            "input instead."
        )
    if size % heads or not size:
        lower, upper = size // heads * heads, (size // heads + 1) * heads
        raise ConfigError(
            f"A training batch of {size} can't be shared out over {heads} heads (in {where}): its first dimension must be a "
            f"multiple of {heads}. Use a batch of {f'{lower} or ' if lower else ''}{upper} (DataLoader: drop_last=True), or "
            "chunk='model' in prepare_model_for_lte if the batch is one, but layers inside see other first dimensions."
        )


def check_indices(indices: Tensor, where: str) -> None:
    """Raises ConfigError if an embedding is asked for 0, 1, 2, ...: positions, as many as there happen to be samples."""
    batch = BATCH.get()
    if batch is None or batch.has_vectors or indices.dim() != 1 or indices.shape[0] != batch.size:
        return
    if torch.equal(indices, torch.arange(batch.size, device=indices.device, dtype=indices.dtype)):
        raise ConfigError(
            f"{where} got 0, 1, ... {batch.size - 1}, which are positions rather than one index for each sample, and can't be "
            "shared out over heads. Use chunk='model' in prepare_model_for_lte, which shares out the model's input instead."
        )


def split(
    args: Sequence[Any], kwargs: dict[str, Any], heads: int, where: str, exactly: bool = False
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Each head's arguments: every tensor whose first dimension is the batch's, in any nesting, is cut into equal parts.

    The batch is the first dimension of the first tensor that has one. All else goes to every head whole.

    Raises:
        ConfigError: there is no tensor, or the batch can't be shared out.
    """
    leaves, tree = tree_flatten((tuple(args), kwargs))
    sizes = [leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    if not sizes:
        raise ConfigError(f"{where} got no tensor with a batch dimension, so there is nothing to share out over heads.")
    check_batch(sizes[0], heads, where, exactly)
    parts = [
        leaf.chunk(heads) if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == sizes[0] else (leaf,) * heads
        for leaf in leaves
    ]
    return [tree_unflatten([part[head] for part in parts], tree) for head in range(heads)]


def join(outputs: Sequence[Any]) -> Any:
    """The heads' outputs as one: tensors laid end to end, numbers without a dimension averaged, in any nesting.

    What isn't a tensor is the first head's.
    """
    first = outputs[0]
    if dataclasses.is_dataclass(first) and not isinstance(first, type | dict):
        fields = [f.name for f in dataclasses.fields(first) if f.init]
        return dataclasses.replace(first, **{name: join([getattr(o, name) for o in outputs]) for name in fields})
    flat = [tree_flatten(output) for output in outputs]
    if len(flat[0][0]) == 1 and flat[0][0][0] is first:
        return _join_leaves(outputs)
    return tree_unflatten([join(leaves) for leaves in zip(*(leaves for leaves, _ in flat), strict=True)], flat[0][1])


def _join_leaves(leaves: Sequence[Any]) -> Any:
    if not isinstance(leaves[0], Tensor):
        return leaves[0]
    leaves = [leaf.to(leaves[0].device) for leaf in leaves]
    return torch.cat(list(leaves)) if leaves[0].dim() else torch.stack(list(leaves)).mean(0)


def moved(tree: Any, device: torch.device) -> Any:
    """`tree` with all tensors on `device`."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)


def each_head(
    module: nn.Module,
    run: Callable[[int, tuple[Any, ...], dict[str, Any]], Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    heads: int,
) -> Any:
    """`run`(head, arguments) on each head's part of the arguments, with that head active; the outputs joined.

    `module` is what is called so, or what was copied for it.
    """
    check_not_recomputed(module)
    where, exactly = module.__dict__.get("lte_name") or type(module).__name__, isinstance(module, nn.Embedding)
    if exactly and args and isinstance(args[0], Tensor):
        check_indices(args[0], where)
    outputs = []
    for head, (own, named) in enumerate(split(args, kwargs, heads, where, exactly)):
        with active(head):
            outputs.append(run(head, own, named))
    return join(outputs)
