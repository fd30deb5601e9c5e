"""A head's state as a checkpoint holds it: how it is taken between two steps, and how a new process goes on from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lte_ray.engine.state import optimizer_state, restore_optimizer
from lte_ray.errors import StorageError
from lte_ray.merging.flat import factors_part, replica_part, replica_views
from lte_ray.messages import Grant, Lanes, Save, Standing

if TYPE_CHECKING:
    from lte_ray.engine.head import Head

State = tuple[dict[str, Tensor], dict[str, Any]]
"""Named CPU tensors, and JSON values."""


class Missed(Exception):
    """The head has gone on: it can't say any more what it held at that version."""


def snapshot(head: Head, save: Save) -> State:
    """All that the head needs to go on from version `save.version`, beside its base; a copy, to be written in another thread.

    The cut is consistent whatever the head has trained meanwhile: relative to what that version holds of it, its factors and
    replicas carry all the rest, which rides in its next contribution.

    Raises:
        Missed: a later contribution of this head was merged and adopted already.
    """
    sequence = save.sequences[head.head]
    outstanding = head._outstanding
    contained = outstanding if head.sequence == sequence else None
    since, reference = head._since, head._reference
    if contained is not None:
        since, reference = head._offered, factors_part(head.plan, contained)
    if since.sequence != sequence:
        raise Missed
    zero_b = contained is not None and head.settings.lte.reset == "B"
    b = {spec.b for spec in head.plan.adapted}
    tensors = {f"factor.{n}": torch.zeros_like(p) if zero_b and n in b else p for n, p in head._factors.items()}
    if reference is not None and head.settings.lte.reset == "none":
        tensors["reference"] = reference
    if contained is not None or head.version != save.version:
        ahead = head._replica_change()
        if contained is not None:
            for name, held in replica_views(head.plan, replica_part(head.plan, contained)).items():
                ahead[name] -= held
        tensors |= {f"ahead.{name}": change for name, change in ahead.items()}
    else:  # as they are: adding the difference to the base again would round
        tensors |= {f"replica.{name}": p for name, p in head._replicas.items()}
    tensors |= {f"buffer.{name}": b for name, b in head.buffers()}
    if head._losses:
        tensors["losses"] = torch.stack(head._losses)
    optimizer_tensors, optimizer_meta = optimizer_state(head.optimizer, head.schedule)
    optimizer_meta["scaler"] = head.update.scaler.state_dict()
    rng_tensors, rng_meta = head.rng.state()
    tensors = {**tensors, **optimizer_tensors, **rng_tensors}
    meta = {
        "head": head.head,
        "version": save.version,
        "step": head.step,
        "samples": head.samples,
        "batches": head.feed.taken,
        "lanes": [list(lane) for lane in head.feed.lanes],
        "grant": head.feed.grant,
        "released": None if head.feed.released is None else [head.feed.released.id, *head.feed.released.lanes],
        "incarnation": head.incarnation,
        "sequence": sequence,
        "since": [since.step, since.samples],
        "offered": head._offered.step,
        "loss": head._loss,
        "position": head.update.position,
        "optimizer": optimizer_meta,
        "rng": rng_meta,
    }
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}, meta


def restore(head: Head, state: State, base: Tensor) -> None:
    """Takes over what `snapshot` gave, on the base of that version (flat), in the place of `start`.

    Raises:
        StorageError: something is missing in it, or of another shape.
    """
    tensors, meta = state
    try:
        _restore(head, tensors, meta, base)
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
        raise StorageError(f"The saved state of head {head.head} can't be used: {type(error).__name__}: {error}.") from error


@torch.no_grad()
def _restore(head: Head, tensors: dict[str, Tensor], meta: dict[str, Any], base: Tensor) -> None:
    step, samples = meta["since"]
    standing = Standing(head.incarnation, meta["sequence"], meta["version"], step, samples)
    head.resume(standing, tensors.get("reference"))
    head.start(meta["version"], base)
    for name, parameter in head._factors.items():
        parameter.copy_(tensors[f"factor.{name}"])
    if all(f"replica.{name}" in tensors for name in head._replicas):
        for name, replica in head._replicas.items():
            replica.copy_(tensors[f"replica.{name}"])
    else:
        head.move_replicas({name: tensors[f"ahead.{name}"].to(head.device) for name in head._replicas})
    for name, buffer in head.buffers():
        buffer.copy_(tensors[f"buffer.{name}"])
    head.step, head.samples, head._loss = meta["step"], meta["samples"], meta["loss"]
    head._offered = Standing(head.incarnation, meta["sequence"], step=meta.get("offered", step))
    head._losses = [loss.to(head.device) for loss in tensors["losses"]] if "losses" in tensors else []
    # An older release took one batch a step, and knew no lanes.
    taken = meta.get("batches", meta["step"])
    lanes: Lanes = tuple((n, s) for n, s in meta["lanes"]) if "lanes" in meta else head.feed.after(taken)
    head.feed.move(taken, lanes, meta.get("grant", 0))
    released = meta.get("released")
    if released is not None:
        head.feed.released = Grant(released[0], tuple((n, s) for n, s in released[1:]))
    restore_learning(head, state=(tensors, meta))
    head.update.position = meta.get("position", float(head.step))
    head.rng.load_state(tensors, meta["rng"])


def restore_learning(head: Head, state: State) -> None:
    """The optimizer's state and the schedule's."""
    tensors, meta = state
    restore_optimizer(head.optimizer, head.schedule, tensors, meta["optimizer"])
    head.update.scaler.load_state_dict(meta["optimizer"].get("scaler") or head.update.scaler.state_dict())
    head.update.position = meta.get("position", float(meta["step"]))


def rejoin(head: Head, standing: Standing, reference: Tensor | None, version: int, base: Tensor, saved: State | None) -> str:
    """A head that died goes on from what a base holds of it, in the place of `start`.

    It starts with the factors that were merged last and B A = B' A', so that it contributes nothing that it hasn't trained;
    with the data that nobody has contributed; and with the optimizer's state of its last checkpoint, if there is one.

    Returns:
        What it had to do without, in words; empty if nothing.
    """
    lacks = ""
    if saved is not None:
        try:
            restore_learning(head, saved)
            tensors, _ = saved
            with torch.no_grad():
                for name, buffer in head.buffers():
                    buffer.copy_(tensors[f"buffer.{name}"])
                if reference is None and head.settings.lte.reset == "B":
                    for spec in head.plan.adapted:
                        head._factors[spec.a].copy_(tensors[f"factor.{spec.a}"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            lacks = f"its saved optimizer state can't be used ({type(error).__name__}: {error})"
            head.optimizer.state.clear()
    position = head.update.position
    head.resume(standing, reference)
    head.update.position = position
    head.update.reach(standing.step / head.settings.train.steps)
    head.feed.move(standing.batches, standing.lanes)
    head.start(version, base)
    return lacks
