"""Several heads as one stacked, batched computation: `torch.func.vmap` of one head's loss over the heads.

Every head's own tensors become slices of stacked ones, in place, so that heads, optimizers and checkpoints go on using
them as they are. The frozen main weights aren't stacked: there is one of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lte_ray.adapters.factors import Factors
from lte_ray.adapters.stand_in import computing
from lte_ray.config import TrainConfig
from lte_ray.engine.optimize import autocast, checked_loss
from lte_ray.errors import ConfigError
from lte_ray.layout import Plan
from lte_ray.worker import Batch, Worker

if TYPE_CHECKING:
    from lte_ray.engine.head import Head


class Unstackable(ConfigError):
    """These heads can't be computed as one batch; they can in turns."""


def check_stackable(train: TrainConfig, plans: Sequence[Plan]) -> None:
    """Raises Unstackable if the settings of heads rule out that they are computed as one batch."""
    if train.compile:
        raise Unstackable("--compile and --stack-heads always don't go together: a compiled model runs one head at a time.")
    if train.checkpoint_activations:
        raise Unstackable(
            "--checkpoint-activations and --stack-heads always don't go together: activations can be computed again for one "
            "head at a time only."
        )
    if len(set(plans)) > 1:
        raise Unstackable(
            "--stack-heads always needs heads of equal rank and alpha; --lora-r, --lora-alpha or a rule gives several."
        )


class Stack:
    """The stacked tensors of some heads, and their common loss.

    Args:
        worker: the user's program.
        heads: heads that share their main weights.

    Raises:
        Unstackable: the heads have different ranks, are compiled, or checkpoint activations.
    """

    def __init__(self, worker: Worker, heads: Sequence[Head]) -> None:
        self._heads = heads
        first = heads[0]
        check_stackable(first.settings.train, [head.plan for head in heads])
        self._worker = worker
        models = [dict(head.model.named_parameters()) for head in heads]
        self._trained = {name: _stacked([m[name] for m in models]) for name, p in models[0].items() if p.requires_grad}
        for head in heads:
            for module in head.model.modules():
                if isinstance(module, Factors):
                    module.reserve_reference()
        buffers = [dict(_own_buffers(head.model)) for head in heads]
        self._kept = {name: _stacked([b[name] for b in buffers]) for name in buffers[0]}
        self._slots = _slots(first.model, {**{n: models[0][n] for n in self._trained}, **buffers[0]})
        for stacked in self._trained.values():
            stacked.requires_grad_()

    def backward(self, batches: list[Batch]) -> Tensor:
        """Adds the gradients of each head's batch to its parameters' gradients; gives the losses, one a head.

        Raises:
            Unstackable: the batches differ in shape, or the model does something that can't be batched; no gradient changed.
        """
        train, device = self._heads[0].settings.train, self._heads[0].device
        try:
            batch = pytree.tree_map(lambda *leaves: _together(leaves), *batches)
            with warnings.catch_warnings(), autocast(train, device), computing():
                warnings.filterwarnings("ignore", message="There is a performance drop")  # it is fast enough, and exact
                losses = torch.vmap(self._one, randomness="different")(self._trained, self._kept, batch)
            scaled = [head.update.scaled(loss) for head, loss in zip(self._heads, losses, strict=True)]
            torch.autograd.backward(torch.stack(scaled).sum())  # in here as models may compute activations again themselves
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            raise Unstackable(f"the heads can't be computed as one batch: {str(error).splitlines()[0]}") from error
        self._hand_out()
        return losses.detach()

    def _one(self, trained: dict[str, Tensor], kept: dict[str, Tensor], batch: Batch) -> Tensor:
        """The loss of one head: the first head's model, with another's tensors in the place of its own."""
        before = [place[key] for place, key, _ in self._slots]
        try:
            for place, key, name in self._slots:
                place[key] = trained[name] if name in trained else kept[name]
            return checked_loss(self._worker.loss(self._heads[0].model, batch))
        finally:
            for (place, key, _), tensor in zip(self._slots, before, strict=True):
                place[key] = tensor

    def _hand_out(self) -> None:
        """Gives every head's parameters their slice of the gradients, on top of what they have."""
        for index, head in enumerate(self._heads):
            for name, parameter in head.model.named_parameters():
                stacked = self._trained.get(name)
                if stacked is not None and stacked.grad is not None:
                    gradient = stacked.grad[index]
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        for stacked in self._trained.values():
            stacked.grad = None


def _slots(model: nn.Module, own: dict[str, Tensor]) -> list[tuple[dict[str, Any], str, str]]:
    """Every place in the model's modules that holds one of these tensors (a tied one has several), with its name.

    `torch.func.functional_call` goes by names, and trips over a module that is held twice.
    """
    names = {id(tensor): name for name, tensor in own.items()}
    return [
        (place, key, names[id(tensor)])
        for module in model.modules()
        for place in (module._parameters, module._buffers)
        for key, tensor in place.items()
        if id(tensor) in names
    ]


def _own_buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The buffers that differ between heads: references and running statistics."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Factors | nn.modules.batchnorm._NormBase):
            found += [(f"{name}.{key}".lstrip("."), b) for key, b in module.named_buffers(recurse=False)]
    return found


@torch.no_grad()
def _stacked(tensors: list[Tensor]) -> Tensor:
    """The tensors as one, of which each becomes a slice, in place."""
    stacked = torch.stack([t.detach() for t in tensors])
    for tensor, part in zip(tensors, stacked, strict=True):
        tensor.data = part
    return stacked


def _together(leaves: tuple[object, ...]) -> object:
    """One leaf of all heads' batches: tensors stacked; anything else must be the same for all."""
    if isinstance(leaves[0], Tensor):
        return torch.stack([leaf for leaf in leaves if isinstance(leaf, Tensor)])
    if any(leaf != leaves[0] for leaf in leaves):
        raise ValueError(f"the batches hold different values {leaves[:3]} that aren't tensors")
    return leaves[0]
