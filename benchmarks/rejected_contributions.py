"""Contributions and decisions that would damage the base, for `benchmarks.rejected`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rejected_runner import TAKEN, Row, Run
from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.settings import Settings
from lte_ray.errors import PolicyError
from lte_ray.layout import Adapted, Plan, Replica
from lte_ray.merging import Average, ComposedPolicy, Discard, Merge, MergeChange, MergePolicy, Pending, Roster, Wait
from lte_ray.messages import Contribution
from lte_ray.transfer.checksum import base_checksum, verify_checksums

PLAN = Plan((Adapted("w", (6, 5), 2, 2.0),), (Replica("p", (4,)),))
SIZE = PLAN.contribution.size
HEADS = 3


def coordinator(policy: MergePolicy, heads: int = HEADS) -> Coordinator:
    """A coordinator with a base of zeros."""
    settings = Settings("run", LTEConfig(num_heads=heads, lora_r=2), MergeConfig(), TrainConfig())
    return Coordinator(settings, PLAN, torch.zeros(PLAN.base.size), policy)


def offer(head: int, sequence: int = 1, **changes: Any) -> Contribution:
    """The numbers of a valid contribution, with `changes`."""
    sound = {"run": "run", "incarnation": 0, "version": 0, "step": 3 * sequence, "steps": 3, "samples": 12, "loss": 1.0}
    return Contribution(head=head, sequence=sequence, **(sound | changes))


def sound(value: float | None = None) -> Tensor:
    """The tensors of a valid contribution, or with one element of this value."""
    flat = torch.full((SIZE,), 0.1)
    if value is not None:
        flat[0] = value
    return flat


REFUSED: dict[str, tuple[Contribution, Tensor]] = {
    "a NaN": (offer(1), sound(float("nan"))),
    "an infinity": (offer(1), sound(float("inf"))),
    "a number of 1e18": (offer(1), sound(1e18)),
    "one element too few": (offer(1), sound()[:-1]),
    "one element too many": (offer(1), torch.zeros(SIZE + 1)),
    "another shape": (offer(1), sound().view(1, -1)),
    "float64 instead of float32": (offer(1), sound().double()),
    "whole numbers": (offer(1), torch.ones(SIZE, dtype=torch.int32)),
    "of another run": (offer(1, run="other"), sound()),
    "of a version that isn't there yet": (offer(1, version=7), sound()),
    "of a head that there isn't": (offer(HEADS), sound()),
    "of head -1": (offer(-1), sound()),
    "received before": (offer(0), sound()),
    "of sequence 0": (offer(1, 0), sound()),
    "of sequence -1": (offer(1, -1), sound()),
    "the next, while one isn't decided": (offer(0, 2), sound()),
}
"""Contributions after a valid one of head 0, while the coordinator waits for two more heads."""


def contributions(run: Run, folder: Path) -> Iterator[Row]:
    """Contributions of heads. Extend `REFUSED`, or add a scene below."""
    for given, (contribution, buffer) in REFUSED.items():
        engine = coordinator(ComposedPolicy(Average()))
        engine.receive(offer(0), sound())
        yield verdict(given, engine, contribution, buffer)
    engine = coordinator(ComposedPolicy(Average()))
    engine.leave(1)
    yield verdict("of a head that has left", engine, offer(1), sound())
    engine = coordinator(_ScriptedPolicy(Discard([1], "for the test"), Wait()))
    engine.receive(offer(1, incarnation=1), sound())
    yield verdict("of a predecessor that died", engine, offer(1, 5, incarnation=0), sound())
    engine = coordinator(ComposedPolicy(Average()), heads=1)
    for sequence in range(1, 21):
        engine.receive(offer(0, sequence), sound() * sequence)
    yield verdict("1,000 times as large as the 20 before it", engine, offer(0, 21), sound() * 20_000)
    lanes = engine.assignor.start_head(0)
    engine = coordinator(ComposedPolicy(Average()), heads=2)
    yield verdict("trained on another head's data", engine, offer(1, partitions=lanes, batches=3), sound())
    try:
        verify_checksums([sound()], [base_checksum(sound()) ^ 1])
    except ValueError as error:  # the runtime's reason
        yield Row("a checksum that doesn't match", "refused", str(error))


def verdict(given: str, engine: Coordinator, contribution: Contribution, buffer: Tensor) -> Row:
    """The coordinator's answer. The base must not change."""
    before = engine.base.clone()
    found = engine.receive(contribution, buffer).results
    refused = len(found) == 1 and not found[0].accepted and torch.equal(engine.base, before)
    return Row(given, "refused" if refused else TAKEN, found[0].reason if found else "")


class _ScriptedPolicy:
    """Makes the given decisions in turn."""

    name = "mine"

    def __init__(self, *decisions: Any) -> None:
        self.decisions = list(decisions)

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Any:
        decision = self.decisions.pop(0)
        if isinstance(decision, Exception):
            raise decision
        return decision


DECISIONS: dict[str, Any] = {
    "raises": KeyError("oops"),
    "decides nothing": None,
    "merges a head that sent nothing": Merge({2: 1.0}),
    "gives the weight NaN": Merge({0: float("nan")}),
    "gives the weight 1e300": Merge({0: 1e300}),
    "gives a change of another shape": MergeChange(torch.zeros(3), [0]),
    "gives a change with NaN": MergeChange(torch.full((PLAN.base.size,), float("nan")), [0]),
    "discards a head twice": Discard([0, 0], ""),
}


def decisions(run: Run, folder: Path) -> Iterator[Row]:
    """Wrong decisions of a merge policy: the run ends, and the base doesn't change."""
    for given, decision in DECISIONS.items():
        engine = coordinator(_ScriptedPolicy(decision))
        try:
            engine.receive(offer(0), sound())
        except PolicyError as error:
            assert not engine.base.any()
            yield Row(f"a policy that {given}", str(error.exit_code), str(error).splitlines()[0])


CATEGORIES: dict[str, Callable[[Run, Path], Iterator[Row]]] = {"Contributions": contributions, "Decisions": decisions}
