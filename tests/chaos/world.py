"""A whole run in one process, without threads, Ray or time, to which anything may happen, one event after another.

Heads, coordinator, snapshots and recovery are the real ones. What carries messages between them mirrors `lte_ray.runtime`:

- `process`, `client`: `runtime.head`
- `coordinator`, `checkpoints`: `runtime.coordinator`
- `run`, `deaths`, `recovery`: `runtime.controller`

`account` says what must be true.
"""

from __future__ import annotations

import torch

from tests.chaos.account import InvariantBroken, assert_close, effective_weights
from tests.chaos.coordinator import ChaosCoordinator
from tests.chaos.recovery import Recovery
from tests.chaos.traffic import CALM

FAIR = ("recover", "notice", "move", "restart", "ask", *dict.fromkeys(CALM), "turn_away")
"""Events of a run without further faults, including what the driver does."""

FAULTS = (
    "kill",
    "kill_ended",
    "notice",
    "restart",
    "drop",
    "admit",
    "kill_hub",
    "recover",
    "crash",
    "lose_answer",
    "repeat",
    "echo",
    "poison",
    "drain",
    "move",
)
"""Faults, and how the driver responds."""

KINDS = (*CALM, *FAULTS, "poison", "cut", "cut", "ask", *["go"] * 12)
"""Kinds of events in a schedule, each as often as it is to be drawn."""

ROUNDS = 400
"""Rounds in which a run without further faults must end, from any state."""


class World(Recovery):
    """A run, its events (`do`), its end (`settle`), and the invariants."""

    def do(self, kind: str, pick: int = 0, amount: int = 1) -> bool:
        """Lets an event happen, if it can, then checks all invariants. `pick` chooses among several, `amount` says how much."""
        if not getattr(self, f"on_{kind}")(pick, amount):
            return False
        self.happened[kind] += 1
        for process in self.processes:
            process.advance()
        self.check()
        return True

    def settle(self) -> None:
        """Lets the run end without further faults, with everything merged and saved."""
        for _ in range(ROUNDS):
            if self.coordinator is not None and all(slot.ended for slot in self.slots.values()):
                break
            happened = [self.do(kind, pick, 9) for kind in FAIR for pick in range(6)]
            if not any(happened):
                raise InvariantBroken(f"the run stands still:\n{self.explain()}")
        else:
            raise InvariantBroken(f"the run doesn't end:\n{self.explain()}")
        self.end()

    def end(self) -> None:
        """Checks the end: all that isn't poison is merged, all steps are taken, and the last version is saved."""
        coordinator = self.coordinator
        assert coordinator is not None
        coordinator.freeze()
        self.on_ask(0, 1)
        for process in self.processes:
            while self._request_part(process):
                pass
        while self.on_hub(0, 1) or self.on_deliver(0, 1):
            pass
        active = {number: m.process for number, m in self.slots.items() if m.process is not None and not m.process.quarantined}
        for number, process in active.items():
            assert process.track is not None
            carried, slots = process.track.unmerged(coordinator.engine.positions[number].sequence)
            assert_close(carried, torch.zeros_like(carried), f"head {number} has ended with something that isn't merged")
            if not all(poison for _, poison in slots):
                raise InvariantBroken(f"head {number} has ended, and batches {slots} aren't merged")
        heads = {*active, *(number for number, slot in self.slots.items() if slot.process is None)}
        if not heads:
            return  # all are quarantined, so the run ends with an error
        self._check_members(coordinator, heads)
        ends = {
            n: (position.step, self.slots[n].end_step)
            for n, position in coordinator.engine.positions.items()
            if n in heads - set(active)
        }
        if any(merged < end for merged, end in ends.values()) and not self.happened["poison"]:  # whose steps are dropped
            raise InvariantBroken(f"heads ended and died, and not all of their steps are merged: {ends}")
        steps = {number: process.head.step for number, process in active.items() if process.head is not None}
        if not coordinator.engine.shares_steps and set(steps.values()) - {self.settings.train.steps}:
            raise InvariantBroken(f"not all heads have taken {self.settings.train.steps} steps: {steps}")
        budget, out = coordinator.engine.step_budget, len(heads) < len(self.slots)
        taken = {
            n: budget.steps_granted[n] if n in heads else step for n, step in budget.steps_by_head.items()
        }  # a head that left took no more
        out = out or self.happened["drop"] > 0  # steps that a head frees after the others know their last one aren't taken
        if budget.shared and not out and sum(taken.values()) < budget.total:
            raise InvariantBroken(f"of {budget.total} steps only {taken} were taken")
        if coordinator.checkpoints:
            raise InvariantBroken(f"checkpoints {sorted(coordinator.checkpoints)} aren't whole")

    def _check_members(self, coordinator: ChaosCoordinator, heads: set[int]) -> None:
        dead = {number for number in heads if self.slots[number].process is None}
        idle = dead - coordinator.engine.positions.keys()  # they joined and did nothing, and no other process knew of them
        if coordinator.engine.members != heads - idle:
            raise InvariantBroken(f"the members are {coordinator.engine.members}, but the driver has {heads}")
        if coordinator.engine.assignor.heads - heads:
            raise InvariantBroken(f"heads {coordinator.engine.assignor.heads - heads} own batches, and have left the run")

    def explain(self) -> str:
        """Returns where everything stands, for people."""
        coordinator, lines = self.coordinator, []
        if coordinator is not None:
            engine = coordinator.engine
            lines.append(f"version {engine.version}, live {engine.live}, members {engine.members}, waits {engine.waiting_for}")
            lines.append(
                f"pending {engine.pending_heads}, joins {len(coordinator.joins)}, undecided {list(coordinator.undecided)}"
            )
        for number, slot in sorted(self.slots.items()):
            p = slot.process
            if p is None or p.head is None:
                lines.append(f"head {number}: {'no process' if p is None else 'no head'}, gone {slot.lost}")
                continue
            h = p.head
            calls = [(call.kind, call.place, len(call.answers)) for call in p.calls]
            lines.append(
                f"head {number}.{p.incarnation}: step {h.step}/{h.step_limit} final {h.limit_is_final}, version {h.version}, "
                f"outstanding {h.outstanding}, over {p.over}/{slot.ended}, lanes {h.batch_stream.partitions}, calls {calls}"
            )
        return "\n".join(lines)

    def check(self) -> None:
        """Checks what must hold after every event."""
        account = self.account
        if self.coordinator is not None:
            version = self.coordinator.engine.version
            assert_close(self.coordinator.engine.base, account.weights[version], f"the base of version {version}")
            account.check_slots(self.coordinator.engine.assignor)
        for process in self.processes:
            head, track = process.head, process.track
            if head is None or track is None or not process.finite:
                continue
            if head.version not in account.weights:
                raise InvariantBroken(f"head {process.number} trains on version {head.version}, which never was")
            start, _ = account.start(process.number, track, head.version)
            expected = account.weights[head.version] + track.total - start
            assert_close(effective_weights(head), expected, f"head {process.number} at version {head.version}")
