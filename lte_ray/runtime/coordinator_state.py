"""The state that a coordinator starts from: version 0, a checkpoint, or what the heads know.

A checkpoint may be continued with the same heads, exactly where they were, or with more or fewer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor

from lte_ray import checkpoint
from lte_ray.config.validation import is_integer
from lte_ray.data.assignment import PartitionAssignor
from lte_ray.data.partition import advance, initial_partitions
from lte_ray.engine.coordinator.recovery import Recovered
from lte_ray.errors import StorageError
from lte_ray.layout import Plan
from lte_ray.merging.policy import MergePolicy
from lte_ray.merging.registry import saved_momentum
from lte_ray.messages import CommittedPosition
from lte_ray.runtime.context import RunContext
from lte_ray.runtime.object_store import Handle


@dataclass(frozen=True)
class CoordinatorState:
    """A version of the base, and all that belongs to it.

    Attributes:
        version: of the base.
        base: refers to the base, flat.
        references: by head, refers to the factors that the base contains of it, flat; missing where B' = 0.
        momentum: refers to the momentum of the outer steps, as the base; None if it is 0.
        residual: refers to what rounded changes of the base have left out so far, as the base; None if it is 0.
        ema: refers to the moving average of the bases up to this one, as the base; None: it begins here, if there is one.
        positions: by head, what the base contains of it; missing if nothing.
        assignment_state: which head owns which batches (`PartitionAssignor.state`); empty at the start of a run.
        steps_by_head: the local steps that each head has taken.
        step_limits: by head, the local steps up to which it may go.
        checkpoint_version: the newest complete checkpoint, whose policy state is used; None if there is none.
        exact_heads: heads that continue exactly from their states in it.
        saved_heads: heads whose states it contains.
        outlier_filter: the state of the outlier filter.
        members: the heads of the run, if some have left or joined since its start.
        epoch: how many coordinators there were before.
    """

    version: int
    base: Handle
    references: Mapping[int, Handle] = field(default_factory=dict)
    momentum: Handle | None = None
    residual: Handle | None = None
    ema: Handle | None = None
    positions: Mapping[int, CommittedPosition] = field(default_factory=dict)
    assignment_state: Mapping[str, Any] = field(default_factory=dict)
    steps_by_head: Mapping[int, int] = field(default_factory=dict)
    step_limits: Mapping[int, int] = field(default_factory=dict)
    checkpoint_version: int | None = None
    exact_heads: frozenset[int] = frozenset()
    saved_heads: frozenset[int] = frozenset()
    outlier_filter: Mapping[str, Any] = field(default_factory=dict)
    members: frozenset[int] | None = None
    epoch: int = 0

    def position(self, head: int) -> CommittedPosition:
        """Returns what the base contains of a head."""
        return self.positions.get(head, CommittedPosition())

    @classmethod
    def from_recovered(
        cls, recovered: Recovered, references: Mapping[int, Handle], momentum: Handle | None, **more: Any
    ) -> CoordinatorState:
        """Returns the state that the heads know.

        Args:
            recovered: what their reports amount to.
            references: those that the heads reported, and others that a checkpoint contains.
            momentum: the heads' or a checkpoint's.
            more: other fields.
        """
        return cls(
            version=recovered.version,
            base=recovered.base,
            references=references,
            momentum=momentum,
            positions=recovered.positions,
            assignment_state=recovered.assignment_state,
            steps_by_head={head: position.step for head, position in recovered.positions.items()},
            step_limits=recovered.step_limits,
            **more,
        )


def load_checkpoint(
    context: RunContext, plans: Sequence[Plan], version: int, num_heads: int, policy: MergePolicy
) -> CoordinatorState:
    """Returns the state that the checkpoint of `version` contains.

    If the number of heads has changed, the data that isn't merged is divided again. Heads that remain continue with their
    merged factors and their optimizers' states. New ones start with B = 0. Contributions of heads that are gone stay in the
    base. All heads count as having taken equally many steps.

    Args:
        context: of the run.
        plans: each head's.
        version: of the checkpoint.
        num_heads: how many heads the run has now.
        policy: the run's merge policy, which knows the momentum in states that an earlier release saved.

    Raises:
        StorageError: it is damaged.
    """
    directory, publish = context.directory, context.transport.publish
    manifest = checkpoint.read_manifest(directory, version)
    head_states = {head: checkpoint.read_head(directory, manifest, head)[1] for head in manifest.heads}
    try:
        positions = read_positions(manifest, head_states, int(manifest.facts["lte"]["num_heads"]))
        steps = {head: int(state["step"]) for head, state in head_states.items()}
        assignment_state = dict(
            manifest.facts.get("ledger")
            or PartitionAssignor({head: position.lanes for head, position in positions.items()}).state()
        )
        PartitionAssignor.from_state(assignment_state)  # raises here what is wrong with it
        outlier_filter = dict(manifest.facts.get("guard") or {})
        same_heads = set(positions) == set(range(num_heads))
        if not same_heads:
            assignment_state = PartitionAssignor.repartitioned(assignment_state, num_heads).state()
            mean_step = round(sum(position.step for position in positions.values()) / max(1, len(positions)))
            positions = {head: _at_step(positions.get(head), mean_step, version) for head in range(num_heads)}
    except (KeyError, ValueError, TypeError, AttributeError) as error:  # intact, but not what a run writes
        where = directory.path_to(checkpoint.version_folder(version))
        raise StorageError(f"{where} can't be continued: {type(error).__name__}: {error}.") from error
    base = checkpoint.read_base(directory, manifest, plans[0])
    factors = checkpoint.read_references(directory, manifest, plans)
    momentum = _read_momentum(context, plans[0], manifest, policy)
    residual = checkpoint.read_residual(directory, manifest, plans[0])
    ema = checkpoint.read_ema(directory, manifest, plans[0]) if context.settings.train.ema else None
    exact_heads = frozenset(head_states) if same_heads else frozenset()
    return CoordinatorState(
        version=version,
        base=publish(base),
        # A head without a merged contribution is new; factors under its number are an earlier head's.
        references={h: publish(f) for h, f in factors.items() if h in positions and positions[h].sequence},
        momentum=None if momentum is None else publish(momentum),
        residual=None if residual is None else publish(residual),
        ema=None if ema is None else publish(ema),
        positions=positions,
        assignment_state=assignment_state,
        steps_by_head={h: steps[h] if h in exact_heads else position.step for h, position in positions.items()},
        checkpoint_version=version,
        exact_heads=exact_heads,
        saved_heads=frozenset(head for head in head_states if head in positions),
        outlier_filter=outlier_filter,
    )


def _read_momentum(context: RunContext, plan: Plan, manifest: checkpoint.Manifest, policy: MergePolicy) -> Tensor | None:
    """Returns the momentum of the policy's outer steps in a checkpoint, flat; None if it holds none.

    Earlier releases had it in the policy's own state.
    """
    directory, name = context.directory, context.settings.merge.policy
    momentum = checkpoint.read_momentum(directory, manifest, plan, name)
    if momentum is not None:
        return momentum
    saved = checkpoint.read_policy(directory, manifest, name)
    return saved_momentum(policy, saved, int(manifest.facts["lte"]["num_heads"])) if saved else None


def read_positions(
    manifest: checkpoint.Manifest, head_states: Mapping[int, dict[str, Any]], num_heads: int
) -> dict[int, CommittedPosition]:
    """Returns what the base of a checkpoint contains of each head. An older release wrote that into the heads' states only."""
    recorded = manifest.facts.get("standings")
    if recorded is not None:
        return {int(head): _position(position) for head, position in recorded.items()}
    positions = {}
    for head, state in head_states.items():
        batches = state.get("batches", state["step"])
        step, samples = state["since"]
        partitions = advance(initial_partitions(head, num_heads), batches)
        positions[head] = CommittedPosition(0, state["sequence"], manifest.version, step, samples, batches, partitions)
    return positions


def _position(recorded: dict[str, Any]) -> CommittedPosition:
    """Returns a position from its fields in a manifest; KeyError, ValueError or TypeError if no run writes such fields."""
    position = CommittedPosition(**{**recorded, "lanes": tuple((n, s) for n, s in recorded["lanes"])})
    numbers = {f.name: getattr(position, f.name) for f in fields(position) if f.name != "lanes"}
    wrong = {name: number for name, number in numbers.items() if not is_integer(number) or number < 0}
    if wrong:
        raise ValueError(f"the position of a head has {wrong!r:.80}")
    return position


def _at_step(position: CommittedPosition | None, step: int, version: int) -> CommittedPosition:
    return CommittedPosition(step=step, version=version) if position is None else replace(position, step=step)
