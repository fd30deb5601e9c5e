"""A whole run in one process, without threads, Ray or time, to which anything may happen, one event after another.

The heads, the coordinator, snapshots and recovery are the real ones; what carries messages between them is restated from
`lte_ray.runtime`: `chaos_process` and `chaos_line` (head, courier, line), `chaos_hub` and `chaos_cuts` (coordinator, merging,
cuts), `chaos_deaths` and `chaos_recovery` (mending, crew, session). `chaos_account` says what must be true.
"""

from __future__ import annotations

import torch

from tests.chaos.account import InvariantBroken, assert_close, effective_weights
from tests.chaos.coordinator import ChaosCoordinator
from tests.chaos.recovery import Recovery
from tests.chaos.traffic import CALM

FAIR = ("recover", "notice", "restart", "ask", *dict.fromkeys(CALM), "turn_away")
"""What happens in a run that is left alone; the driver's part included."""

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
)
"""What may go wrong, and the driver's answers to it."""

KINDS = (*CALM, *FAULTS, "poison", "cut", "cut", "ask", *["go"] * 12)
"""Of events in a schedule, by how often they are drawn."""

ROUNDS = 400
"""Rounds in which a run without faults must end from any state."""


class World(Recovery):
    """A run, its events (`do`), its end (`settle`), and the invariants."""

    def do(self, kind: str, pick: int = 0, amount: int = 1) -> bool:
        """Lets an event happen, if it can; `pick` says which of several, `amount` how much. Then checks all invariants."""
        if not getattr(self, f"on_{kind}")(pick, amount):
            return False
        self.happened[kind] += 1
        for process in self.processes:
            process.advance()
        self.check()
        return True

    def settle(self) -> None:
        """No more faults: the run must end, with everything merged and saved."""
        for _ in range(ROUNDS):
            if self.coordinator is not None and all(member.ended for member in self.slots.values()):
                break
            happened = [self.do(kind, pick, 9) for kind in FAIR for pick in range(6)]
            if not any(happened):
                raise InvariantBroken(f"the run stands still:\n{self.explain()}")
        else:
            raise InvariantBroken(f"the run doesn't end:\n{self.explain()}")
        self.end()

    def end(self) -> None:
        """Everything that was trained and isn't poison is merged, everybody took their steps, and the last version is saved."""
        hub = self.coordinator
        assert hub is not None
        hub.freeze()
        self.on_ask(0, 1)
        for process in self.processes:
            while self._request_part(process):
                pass
        while self.on_hub(0, 1) or self.on_deliver(0, 1):
            pass
        sound = {number: m.process for number, m in self.slots.items() if m.process is not None and not m.process.quarantined}
        for number, process in sound.items():
            assert process.track is not None
            carried, slots = process.track.unmerged(hub.engine.positions[number].sequence)
            assert_close(carried, torch.zeros_like(carried), f"head {number} has ended with something that isn't merged")
            if not all(poison for _, poison in slots):
                raise InvariantBroken(f"head {number} has ended, and batches {slots} aren't merged")
        there = {*sound, *(number for number, member in self.slots.items() if member.process is None)}
        if not there:
            return  # all are quarantined, so the run ends with an error
        self._check_members(hub, there)
        ends = {n: (held.step, self.slots[n].end_step) for n, held in hub.engine.positions.items() if n in there - set(sound)}
        if any(merged < end for merged, end in ends.values()) and not self.happened["poison"]:  # whose steps are dropped
            raise InvariantBroken(f"heads ended and died, and not all of their steps are merged: {ends}")
        steps = {number: process.head.step for number, process in sound.items() if process.head is not None}
        if not hub.engine.shares_steps and set(steps.values()) - {self.settings.train.steps}:
            raise InvariantBroken(f"not all heads have taken {self.settings.train.steps} steps: {steps}")
        budget, out = hub.engine.step_budget, len(there) < len(self.slots)
        taken = {
            n: budget.steps_granted[n] if n in there else step for n, step in budget.steps_taken.items()
        }  # who left took no more
        out = out or self.happened["drop"] > 0  # what one frees when the others have been told that they end is taken by nobody
        if budget.shared and not out and sum(taken.values()) < budget.total:
            raise InvariantBroken(f"of {budget.total} steps only {taken} were taken")
        if hub.checkpoints:
            raise InvariantBroken(f"checkpoints {sorted(hub.checkpoints)} aren't whole")

    def _check_members(self, hub: ChaosCoordinator, there: set[int]) -> None:
        dead = {number for number in there if self.slots[number].process is None}
        idle = dead - hub.engine.positions.keys()  # they came, did nothing, and nobody else knew of them
        if hub.engine.members != there - idle:
            raise InvariantBroken(f"the members are {hub.engine.members}, but the driver has {there}")
        if hub.engine.assignor.heads - there:
            raise InvariantBroken(f"heads {hub.engine.assignor.heads - there} own batches, and have left the run")

    def explain(self) -> str:
        """Where everything stands, for people."""
        hub, lines = self.coordinator, []
        if hub is not None:
            engine = hub.engine
            lines.append(f"version {engine.version}, live {engine.live}, members {engine.members}, waits {engine.waiting_for}")
            lines.append(f"pending {engine.pending_heads}, joins {len(hub.joins)}, undecided {list(hub.undecided)}")
        for number, member in sorted(self.slots.items()):
            p = member.process
            if p is None or p.head is None:
                lines.append(f"head {number}: {'no process' if p is None else 'no head'}, gone {member.lost}")
                continue
            h = p.head
            calls = [(call.kind, call.place, len(call.answers)) for call in p.calls]
            lines.append(
                f"head {number}.{p.incarnation}: step {h.step}/{h.step_limit} final {h.limit_is_final}, version {h.version}, "
                f"outstanding {h.outstanding}, over {p.over}/{member.ended}, lanes {h.batch_stream.partitions}, calls {calls}"
            )
        return "\n".join(lines)

    def check(self) -> None:
        """What must hold after every event."""
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
