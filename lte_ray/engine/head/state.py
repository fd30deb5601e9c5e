"""A head's state as a checkpoint holds it: how it is taken between two steps, and how a new process goes on from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lte_ray.data.partition import to_partitions
from lte_ray.engine.head.optimizer_state import check_shapes, optimizer_state, restore_optimizer
from lte_ray.errors import StorageError
from lte_ray.merging.flat_buffer import factors_part, replica_views
from lte_ray.messages import Assignment, CheckpointRequest, CommittedPosition, Partitions

if TYPE_CHECKING:
    from lte_ray.engine.head.head import Head

SavedState = tuple[dict[str, Tensor], dict[str, Any]]
"""Named CPU tensors, and JSON values."""


INVALID_STATE_ERRORS = (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError, OverflowError)
"""What comes of a saved state that isn't what it should be."""


class StateMissed(Exception):
    """The head has gone on: it can't say any more what it held at that version."""


def snapshot(head: Head, request: CheckpointRequest) -> SavedState:
    """All that the head needs to go on from version `save.version`, beside its base; a copy, to be written in another thread.

    The cut is consistent whatever the head has trained meanwhile: relative to what that version holds of it, its factors and
    replicas carry all the rest, which rides in its next contribution.

    Raises:
        StateMissed: a later contribution of this head was merged and adopted already.
    """
    sequence = request.sequences[head.number]
    outstanding = head._outstanding
    contained = outstanding if head.sequence == sequence else None
    since, reference = head._since, head._reference
    if contained is not None:
        since, reference = head._offered, factors_part(head.plan, contained)
    if since.sequence != sequence:
        raise StateMissed
    zero_b = contained is not None and head.settings.lte.reset == "B"
    b = {spec.b for spec in head.plan.adapted}
    tensors = {f"factor.{n}": torch.zeros_like(p) if zero_b and n in b else p for n, p in head._factors.items()}
    if reference is not None and head.settings.lte.reset == "none":
        tensors["reference"] = reference
    if contained is not None or head.version != request.version:
        tensors |= {f"ahead.{name}": change for name, change in head._steps_beyond(contained).items()}
    else:  # as they are: adding the difference to the base again would round
        tensors |= {f"replica.{name}": p for name, p in head._replicas.items()}
        adopted = replica_views(head.plan, head._replica_reference) if head._replica_reference is not None else {}
        tensors |= {f"adopted.{name}": p for name, p in adopted.items() if head._replicas[name].dtype != head.dtype}
    tensors |= {f"buffer.{name}": b for name, b in head.local_buffers()}
    if head._losses:
        tensors["losses"] = torch.stack(head._losses)
    optimizer_tensors, optimizer_meta = optimizer_state(head.optimizer, head.schedule)
    optimizer_meta["scaler"] = head.optimizer_step.scaler.state_dict()
    rng_tensors, rng_meta = head.rng.state()
    tensors = {**tensors, **optimizer_tensors, **rng_tensors}
    meta = {
        "head": head.number,
        "version": request.version,
        "step": head.step,
        "samples": head.samples,
        "batches": head.batch_stream.batches_taken,
        "lanes": [list(lane) for lane in head.batch_stream.partitions],
        "grant": head.batch_stream.assignment_id,
        "released": None
        if head.batch_stream.revoked is None
        else [head.batch_stream.revoked.id, *head.batch_stream.revoked.partitions],
        "incarnation": head.incarnation,
        "sequence": sequence,
        "since": [since.step, since.samples],
        # What is on its way and not in this version is contributed anew, at once.
        "offered": head._offered.step if outstanding is None or contained is not None else since.step,
        "loss": head._loss,
        "position": head.optimizer_step.position,
        "optimizer": optimizer_meta,
        "rng": rng_meta,
    }
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}, meta


def restore(head: Head, state: SavedState, base: Tensor) -> None:
    """Takes over what `snapshot` gave, on the base of that version (flat), in the place of `start`.

    Raises:
        StorageError: something is missing in it, or of another shape.
    """
    tensors, meta = state
    try:
        _restore(head, tensors, meta, base)
    except INVALID_STATE_ERRORS as error:
        raise StorageError(f"The saved state of head {head.number} can't be used: {type(error).__name__}: {error}.") from error


@torch.no_grad()
def _restore(head: Head, tensors: dict[str, Tensor], meta: dict[str, Any], base: Tensor) -> None:
    step, samples = map(_count, meta["since"])
    standing = CommittedPosition(head.incarnation, _count(meta["sequence"]), _count(meta["version"]), step, samples)
    head.resume(standing, tensors.get("reference"))
    direct = all(f"replica.{name}" in tensors for name in head._replicas)
    ahead = None if direct else {name: tensors[f"ahead.{name}"].to(head.device) for name in head._replicas}
    head.start(standing.version, base, ahead)
    for name, parameter in head._factors.items():
        _copy(parameter, tensors[f"factor.{name}"])
    if direct:
        assert head._replica_reference is not None
        adopted = replica_views(head.plan, head._replica_reference)
        for name, replica in head._replicas.items():
            _copy(replica, tensors[f"replica.{name}"])
            if f"adopted.{name}" in tensors:
                _copy(adopted[name], tensors[f"adopted.{name}"])
    for name, buffer in head.local_buffers():
        _copy(buffer, tensors[f"buffer.{name}"])
    head.step, head.samples, head._loss = _count(meta["step"]), _count(meta["samples"]), float(meta["loss"])
    head._offered = CommittedPosition(head.incarnation, standing.sequence, step=_count(meta.get("offered", step)))
    head._losses = [loss.to(head.device) for loss in tensors["losses"]] if "losses" in tensors else []
    # An older release took one batch a step, and knew no lanes.
    taken = _count(meta.get("batches", head.step))
    lanes: Partitions = to_partitions(meta["lanes"]) if "lanes" in meta else head.batch_stream.partitions_after(taken)
    head.batch_stream.seek(taken, lanes, _count(meta.get("grant", 0)))
    released = meta.get("released")
    if released is not None:
        head.batch_stream.revoked = Assignment(_count(released[0]), to_partitions(released[1:]))
    restore_optimization(head, state=(tensors, meta))
    head.rng.load_state(tensors, meta["rng"])
    with head.rng.swapped_in():  # now, rather than in the first step, if the generators can't take it
        pass


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} where a whole number, at least 0, is expected")
    return value


def _copy(into: Tensor, saved: Tensor) -> None:
    if saved.shape != into.shape:  # `copy_` would spread a smaller one
        raise ValueError(f"expected the shape {tuple(into.shape)}, found {tuple(saved.shape)}")
    into.copy_(saved)


def restore_optimization(head: Head, state: SavedState) -> None:
    """The optimizer's state and the schedule's."""
    tensors, meta = state
    check_shapes(head.optimizer, tensors, {id(p): name for name, p in (*head._factors.items(), *head._replicas.items())})
    restore_optimizer(head.optimizer, head.schedule, tensors, meta["optimizer"])
    head.optimizer_step.scaler.load_state_dict(meta["optimizer"].get("scaler") or head.optimizer_step.scaler.state_dict())
    head.optimizer_step.position = float(meta["position"] if "position" in meta else meta["step"])


def rejoin(
    head: Head, position: CommittedPosition, reference: Tensor | None, version: int, base: Tensor, saved: SavedState | None
) -> str:
    """A head that died goes on from what a base holds of it, in the place of `start`.

    It starts with the factors that were merged last and B A = B' A', so that it contributes nothing that it hasn't trained;
    with the data that nobody has contributed; and with the optimizer's state of its last checkpoint, if there is one.

    Returns:
        What it had to do without, in words; empty if nothing.
    """
    lacks = ""
    if saved is not None:
        try:
            restore_optimization(head, saved)
            tensors, _ = saved
            with torch.no_grad():
                for name, buffer in head.local_buffers():
                    _copy(buffer, tensors[f"buffer.{name}"])
                if reference is None and head.settings.lte.reset == "B":
                    for spec in head.plan.adapted:
                        _copy(head._factors[spec.a], tensors[f"factor.{spec.a}"])
        except INVALID_STATE_ERRORS as error:
            lacks = f"its saved optimizer state can't be used ({type(error).__name__}: {error})"
            head.optimizer.state.clear()
    head.resume(position, reference)
    head.optimizer_step.advance_to(position.step / head.settings.train.steps)
    head.batch_stream.seek(position.batches, position.lanes)
    head.start(version, base)
    return lacks
