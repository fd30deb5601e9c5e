"""A head's state in checkpoints: copied between two steps, and taken over by a new process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lte_ray.data.partition import to_partitions
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.optimization import ROUNDING_STEPS
from lte_ray.engine.head.optimizer_state import check_shapes, optimizer_state, restore_optimizer
from lte_ray.engine.head.worker_state import load_worker_state, worker_state
from lte_ray.errors import StorageError
from lte_ray.merging.flat_buffer import factors_part, replica_views
from lte_ray.messages import Assignment, CheckpointRequest, CommittedPosition, PartitionPairs

SavedState = tuple[dict[str, Tensor], dict[str, Any]]
"""Named CPU tensors, and JSON values."""

INVALID_STATE_ERRORS = (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError, OverflowError)
"""What taking over a malformed saved state may raise."""


class StateMissed(Exception):
    """The head has already adopted a later contribution: it can no longer tell its state at that version."""


def snapshot(head: Head, request: CheckpointRequest) -> SavedState:
    """Copies all that the head needs, besides its base, to continue from version `request.version`.

    The snapshot is consistent whatever the head has trained meanwhile: relative to what that version holds of the head, its
    factors and replicas carry the rest, which becomes part of its next contribution.

    Raises:
        StateMissed: a later contribution of this head was merged and adopted already.
    """
    state, stream = head.state, head.batch_stream
    sequence = request.sequences[head.number]
    pending = state.pending
    contained = pending if state.sequence == sequence else None
    merged, reference = state.merged, state.reference
    if contained is not None:
        merged, reference = state.contributed, factors_part(head.plan, contained)
    if merged.sequence != sequence:
        raise StateMissed
    zero_b = contained is not None and head.settings.lte.reset == "B"
    b = {spec.b_name for spec in head.plan.adapted}
    tensors = {f"factor.{n}": torch.zeros_like(p) if zero_b and n in b else p for n, p in state.factors.items()}
    if reference is not None and head.settings.lte.reset == "none":
        tensors["reference"] = reference
    if contained is not None or state.version != request.version:
        tensors |= {f"ahead.{name}": change for name, change in state.replica_changes_beyond(contained).items()}
    else:  # the replicas themselves: adding the difference to the base again would round
        tensors |= {f"replica.{name}": p for name, p in state.replicas.items()}
        adopted = replica_views(head.plan, state.replica_reference) if state.replica_reference is not None else {}
        tensors |= {f"adopted.{name}": p for name, p in adopted.items() if state.replicas[name].dtype != head.dtype}
    tensors |= {f"buffer.{name}": b for name, b in head.local_buffers()}
    if state.losses:
        tensors["losses"] = torch.stack(state.losses)
    optimizer_tensors, optimizer_meta = optimizer_state(head.optimizer, head.schedule)
    optimizer_meta["scaler"] = head.optimizer_step.scaler.state_dict()
    rng_tensors, rng_meta = head.rng.state()
    worker_tensors, worker_meta = worker_state(head.worker)
    tensors = {**tensors, **optimizer_tensors, **rng_tensors, **worker_tensors}
    meta = {
        "head": head.number,
        "version": request.version,
        "step": state.step,
        "samples": state.samples,
        "batches": stream.batches_taken,
        "lanes": [list(partition) for partition in stream.partitions],
        "grant": stream.assignment_id,
        "released": None if stream.revoked is None else [stream.revoked.id, *stream.revoked.partitions],
        "incarnation": head.incarnation,
        "sequence": sequence,
        "since": [merged.step, merged.samples],
        # A contribution that is pending and not in this version is made again at once.
        "offered": state.contributed.step if pending is None or contained is not None else merged.step,
        "loss": state.loss,
        "figures": {name: list(each) for name, each in state.figures.sums().items()},
        "position": head.optimizer_step.position,
        "steps": head.settings.train.steps,  # for which the schedule was built
        "optimizer": optimizer_meta,
        "rng": rng_meta,
        "worker": worker_meta,
    }
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}, meta


def restore(head: Head, saved: SavedState, base: Tensor) -> None:
    """Starts the head, instead of `Head.start`, from what `snapshot` returned, on the base of that version (flat).

    Raises:
        StorageError: something is missing, or has another shape.
    """
    tensors, meta = saved
    try:
        _restore(head, tensors, meta, base)
    except INVALID_STATE_ERRORS as error:
        raise StorageError(f"The saved state of head {head.number} can't be used: {type(error).__name__}: {error}.") from error


@torch.no_grad()
def _restore(head: Head, tensors: dict[str, Tensor], meta: dict[str, Any], base: Tensor) -> None:
    state, stream = head.state, head.batch_stream
    step, samples = map(_count, meta["since"])
    position = CommittedPosition(head.incarnation, _count(meta["sequence"]), _count(meta["version"]), step, samples)
    head.resume(position, tensors.get("reference"))
    has_replicas = all(f"replica.{name}" in tensors for name in state.replicas)
    ahead = None if has_replicas else {name: tensors[f"ahead.{name}"].to(head.device) for name in state.replicas}
    head.start(position.version, base, ahead)
    for name, parameter in state.factors.items():
        _copy(parameter, tensors[f"factor.{name}"])
    if has_replicas:
        assert state.replica_reference is not None
        adopted = replica_views(head.plan, state.replica_reference)
        for name, replica in state.replicas.items():
            _copy(replica, tensors[f"replica.{name}"])
            if f"adopted.{name}" in tensors:
                _copy(adopted[name], tensors[f"adopted.{name}"])
    for name, buffer in head.local_buffers():
        _copy(buffer, tensors[f"buffer.{name}"])
    state.step, state.samples, state.loss = _count(meta["step"]), _count(meta["samples"]), float(meta["loss"])
    state.contributed = CommittedPosition(head.incarnation, position.sequence, step=_count(meta.get("offered", step)))
    state.losses = [loss.to(head.device) for loss in tensors["losses"]] if "losses" in tensors else []
    state.figures.load({name: (float(total), _count(count)) for name, (total, count) in meta.get("figures", {}).items()})
    # Older releases took one batch a step, and had no partitions.
    taken = _count(meta.get("batches", state.step))
    partitions: PartitionPairs = to_partitions(meta["lanes"]) if "lanes" in meta else stream.partitions_after(taken)
    stream.seek(taken, partitions, _count(meta.get("grant", 0)))
    revoked = meta.get("released")
    if revoked is not None:
        stream.revoked = Assignment(_count(revoked[0]), to_partitions(revoked[1:]))
    restore_optimization(head, (tensors, meta))
    load_worker_state(head.worker, tensors, meta.get("worker"))
    head.rng.load_state(tensors, meta["rng"])
    with head.rng.swapped_in():  # fail here, rather than in the first step, if the generators can't take it
        pass


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} where a whole number, at least 0, is expected")
    return value


def _copy(into: Tensor, saved: Tensor) -> None:
    if saved.shape != into.shape:  # `copy_` would broadcast a smaller one
        raise ValueError(f"expected the shape {tuple(into.shape)}, found {tuple(saved.shape)}")
    into.copy_(saved)


def restore_optimization(head: Head, saved: SavedState) -> None:
    """Takes over the states of the optimizer, its schedule and the gradient scaler."""
    tensors, meta = saved
    parameters = (*head.state.factors.items(), *head.state.replicas.items())
    check_shapes(head.optimizer, tensors, {id(p): name for name, p in parameters})
    position, steps = float(meta["position"] if "position" in meta else meta["step"]), head.settings.train.steps
    advance = int(position + ROUNDING_STEPS) if meta.get("steps", steps) != steps else None
    restore_optimizer(head.optimizer, head.schedule, tensors, meta["optimizer"], advance)
    scaler = head.optimizer_step.scaler
    scaler.load_state_dict(meta["optimizer"].get("scaler") or scaler.state_dict())
    head.optimizer_step.position = position


def rejoin(
    head: Head, position: CommittedPosition, reference: Tensor | None, version: int, base: Tensor, saved: SavedState | None
) -> str:
    """Starts a head that died, instead of `Head.start`, from what a base holds of it.

    It starts with the factors that were merged last and B A = B' A', so that it contributes nothing that it hasn't trained;
    with the data that wasn't contributed; and with the optimizer's state that was saved last, if there is one. If that was
    saved at this very position, the head continues exactly: with its generators, and with what rounding has left out.

    Returns:
        What the head had to do without, in words; empty if nothing.
    """
    missing = ""
    if saved is not None:
        try:
            restore_optimization(head, saved)
            tensors, meta = saved
            load_worker_state(head.worker, tensors, meta.get("worker"))
            with torch.no_grad():
                for name, buffer in head.local_buffers():
                    _copy(buffer, tensors[f"buffer.{name}"])
                if reference is None and head.settings.lte.reset == "B":
                    for spec in head.plan.adapted:
                        _copy(head.state.factors[spec.a_name], tensors[f"factor.{spec.a_name}"])
        except INVALID_STATE_ERRORS as error:
            missing = f"its saved optimizer state can't be used ({type(error).__name__}: {error})"
            head.optimizer.state.clear()
    has_factors = reference is not None or head.settings.lte.reset == "B"  # else the head starts from the beginning
    exact = saved is not None and not missing and has_factors and _is_saved_at(position, saved)
    head.resume(position, reference)
    if not exact:  # else the schedule is where it was
        head.optimizer_step.advance_to(position.step / head.settings.train.steps)
    head.batch_stream.seek(position.batches, position.lanes)
    if saved is None or not exact:
        head.start(version, base)
        return missing
    ahead = {name: tensor for name in head.state.replicas if (tensor := saved[0].get(f"ahead.{name}")) is not None}
    head.start(version, base, {name: tensor.to(head.device) for name, tensor in ahead.items()} or None)
    return _take_factors_and_generators(head, saved)


def _is_saved_at(position: CommittedPosition, saved: SavedState) -> bool:
    """Whether a state was saved when the head had trained exactly what this position holds of it, and is usable."""
    tensors, meta = saved
    numbers = [meta.get(name) for name in ("incarnation", "sequence", "step", "samples", "batches")]
    same = numbers == [position.incarnation, position.sequence, position.step, position.samples, position.batches]
    return same and all(bool(t.isfinite().all()) for name, t in tensors.items() if name.startswith("factor."))


@torch.no_grad()
def _take_factors_and_generators(head: Head, saved: SavedState) -> str:
    """Takes over those of a state that was saved at the head's position; returns what is unusable, in words."""
    tensors, meta = saved
    try:
        head.rng.load_state(tensors, meta["rng"])
        with head.rng.swapped_in():  # fail here, rather than in the first step
            pass
        for name, parameter in head.state.factors.items():
            _copy(parameter, tensors[f"factor.{name}"])
    except INVALID_STATE_ERRORS as error:
        return f"its saved generators and factors can't be used ({type(error).__name__}: {error})"
    return ""
