"""Splits a batch over heads along its first dimension, and tracks the head whose part is being computed."""

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

ACTIVE_HEAD: ContextVar[int | None] = ContextVar("lte_ray_head", default=None)
"""The active head: layers compute for it alone and treat their input as its part. None: each layer splits its input."""


class ModelBatch(NamedTuple):
    """The model's input: the first dimension of its first tensor, and whether any of its tensors has one dimension only."""

    size: int
    has_vectors: bool


MODEL_BATCH: ContextVar[ModelBatch | None] = ContextVar("lte_ray_batch", default=None)
"""The batch that the model was called with, or None where it isn't known."""


MAYBE_SEQUENCE: ContextVar[tuple[int, int] | None] = ContextVar("lte_ray_maybe_sequence", default=None)
"""With chunk "model": the first dimension of an input that may be one sequence rather than a batch, and the number of heads."""


@contextmanager
def head_active(head: int) -> Iterator[None]:
    """Within the block, everything is computed for this head."""
    token = ACTIVE_HEAD.set(head)
    try:
        yield
    finally:
        ACTIVE_HEAD.reset(token)


def in_backward() -> bool:
    """Whether a backward pass is running, in which gradient checkpointing recomputes what it didn't keep."""
    return torch._C._current_graph_task_id() != -1


def check_not_recomputed(module: nn.Module) -> None:
    """Raises ConfigError if a module inside a loop over heads is used in a backward pass, where no head is active."""
    if module.__dict__.get("lte_looped") and in_backward():
        refuse_recomputation()


def refuse_recomputation() -> NoReturn:
    """Raises ConfigError: in a backward pass no head is active."""
    raise ConfigError(
        "Gradient checkpointing inside a loop over heads (chunk='model', or parameters that a module holds itself) would "
        "lose track of the head. Put the checkpoint around the whole model, or remove it."
    )


def check_divisible(size: int, heads: int, where: str, must_be_batch: bool = False) -> None:
    """Raises ConfigError unless a first dimension of `size` can be split over `heads`.

    Args:
        where: the name of the layer or model, for the error.
        must_be_batch: `size` must equal the model's batch. Otherwise a multiple of it is fine too, as in a layer that sees
            patches or windows.
    """
    model_batch = MODEL_BATCH.get()
    batch = model_batch.size if model_batch is not None else 0
    if batch and (size != batch if must_be_batch else size % batch):
        raise ConfigError(
            f"{where} got an input whose first dimension is {size}, but the model's batch is {batch}: an input that isn't "
            "batch-first can't be split over heads in this layer. Use chunk='model' in prepare_model_for_lte, which splits "
            "the model's input instead."
        )
    if size % heads or not size:
        lower, upper = size // heads * heads, (size // heads + 1) * heads
        raise ConfigError(
            f"A training batch of {size} can't be split over {heads} heads (in {where}): its first dimension must be a "
            f"multiple of {heads}. Use a batch of {f'{lower} or ' if lower else ''}{upper} (DataLoader: drop_last=True). If "
            "the batch is a multiple but layers inside see other first dimensions, use chunk='model' in "
            "prepare_model_for_lte."
        )


def check_not_positions(indices: Tensor, where: str) -> None:
    """Raises ConfigError if an embedding's input is 0, 1, 2, ..., as many as there are samples: positions, not samples."""
    batch = MODEL_BATCH.get()
    if batch is None or batch.has_vectors or indices.dim() != 1 or indices.shape[0] != batch.size:
        return
    if torch.equal(indices, torch.arange(batch.size, device=indices.device, dtype=indices.dtype)):
        raise ConfigError(
            f"{where} got 0, 1, ... {batch.size - 1}, which are positions rather than one index for each sample, so they "
            "can't be split over heads. Use chunk='model' in prepare_model_for_lte, which splits the model's input instead."
        )


def check_not_one_sequence(where: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of attention and recurrent layers: raises ConfigError if their input is a part of one sequence.

    With chunk "model", a model that is given one sequence without a batch dimension would have it cut over heads.

    Args:
        where: the layer's name.
    """
    inputs, recorded = args[0] if args else kwargs.get("query", kwargs.get("input")), MAYBE_SEQUENCE.get()
    if recorded is None or not isinstance(inputs, Tensor) or inputs.dim() != 2:
        return
    length, heads = recorded
    if inputs.shape[0] == (length if ACTIVE_HEAD.get() is None else length // heads):
        raise ConfigError(
            f"{where or 'The model'} got an input of shape {tuple(inputs.shape)}: one sequence, without a batch dimension. But "
            f"chunk='model' cuts the first dimension of the model's input, here {length}, over {heads} heads, so each would "
            f"get a part of the sequence. Give the model a batch, (batch, sequence, width), of a multiple of {heads} sequences."
        )


def run_each_head(
    module: nn.Module,
    run: Callable[[int, tuple[Any, ...], dict[str, Any]], Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    heads: int,
) -> Any:
    """Calls `run(head, args, kwargs)` with each head's part of the arguments while that head is active; joins the outputs.

    Args:
        module: the module that was called with these arguments (for a replica layer, its merged module).
    """
    check_not_recomputed(module)
    where, is_embedding = module.__dict__.get("lte_name") or type(module).__name__, isinstance(module, nn.Embedding)
    if is_embedding and args and isinstance(args[0], Tensor):
        check_not_positions(args[0], where)
    outputs = []
    for head, (head_args, head_kwargs) in enumerate(split_arguments(args, kwargs, heads, where, must_be_batch=is_embedding)):
        with head_active(head):
            outputs.append(run(head, head_args, head_kwargs))
    return join_outputs(outputs)


def split_arguments(
    args: Sequence[Any], kwargs: dict[str, Any], heads: int, where: str, must_be_batch: bool = False
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Each head's arguments. Every tensor whose first dimension is the batch, in any nesting, is cut into equal parts.

    The batch is the first dimension of the first tensor that has a dimension. Everything else goes to each head unchanged.

    Raises:
        ConfigError: the arguments hold no tensor, or the batch can't be split.
    """
    leaves, tree = tree_flatten((tuple(args), kwargs))
    sizes = [leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    if not sizes:
        raise ConfigError(f"{where} got no tensor with a batch dimension, so nothing can be split over heads.")
    check_divisible(sizes[0], heads, where, must_be_batch)
    parts = [
        leaf.chunk(heads) if isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == sizes[0] else (leaf,) * heads
        for leaf in leaves
    ]
    return [tree_unflatten([part[head] for part in parts], tree) for head in range(heads)]


def join_outputs(outputs: Sequence[Any]) -> Any:
    """The heads' outputs as one, in any nesting: tensors are concatenated, tensors without a dimension averaged.

    Of anything that isn't a tensor, the first head's is returned.
    """
    first = outputs[0]
    if dataclasses.is_dataclass(first) and not isinstance(first, type | dict):
        fields = [f.name for f in dataclasses.fields(first) if f.init]
        return dataclasses.replace(first, **{name: join_outputs([getattr(o, name) for o in outputs]) for name in fields})
    flat = [tree_flatten(output) for output in outputs]
    if len(flat[0][0]) == 1 and flat[0][0][0] is first:
        return _join_leaves(outputs)
    return tree_unflatten([join_outputs(leaves) for leaves in zip(*(leaves for leaves, _ in flat), strict=True)], flat[0][1])


def _join_leaves(leaves: Sequence[Any]) -> Any:
    if not isinstance(leaves[0], Tensor):
        return leaves[0]
    leaves = [leaf.to(leaves[0].device) for leaf in leaves]
    return torch.cat(list(leaves)) if leaves[0].dim() else torch.stack(list(leaves)).mean(0)


def move_tensors(tree: Any, device: torch.device) -> Any:
    """`tree` with all its tensors on `device`."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)
