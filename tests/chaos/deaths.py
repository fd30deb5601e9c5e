"""Deaths of heads in a chaos world, and what the driver does about them: what `runtime.mending` and `runtime.crew` do."""

from __future__ import annotations

from tests.chaos.parts import MOST_HEADS
from tests.chaos.run import Slot, pick_one
from tests.chaos.traffic import Traffic


class Deaths(Traffic):
    """Heads die, are restarted or given up, come and end."""

    def on_kill(self, pick: int, amount: int) -> bool:
        """A head's process dies; what it has put on the wire may still arrive."""
        member = pick_one([m for _, m in sorted(self.slots.items()) if m.process is not None and not m.ended], pick)
        if member is None or member.process is None:
            return False
        process = member.process
        process.alive = False
        if self.coordinator is not None:
            self.orphaned_calls += [call for call in process.calls if call.kind == "submit" and call.place == "wire"]
        process.calls.clear()
        member.process = None
        return True

    def on_kill_ended(self, pick: int, amount: int) -> bool:
        """The process of a head that has ended dies, which nobody notices."""
        ended = [m for _, m in sorted(self.slots.items()) if m.ended and m.process is not None and not m.process.quarantined]
        member = pick_one(ended, pick)
        if member is None or member.process is None:
            return False
        member.process.alive = False
        member.process.calls.clear()
        member.process = None
        return True

    def on_notice(self, pick: int, amount: int) -> bool:
        """The driver sees that a process is gone, and tells the coordinator."""
        found = pick_one(
            [(n, m) for n, m in sorted(self.slots.items()) if m.process is None and not m.lost and not m.ended], pick
        )
        if found is None:
            return False
        self._lose_head(*found)
        return True

    def _lose_head(self, number: int, member: Slot, drop: bool = False) -> None:
        member.lost = True
        member.incarnation += 1
        self.orphaned_calls = [
            c for c in self.orphaned_calls if c.process.number != number
        ]  # a killed process's sockets are closed by now
        if self.coordinator is not None:
            self.coordinator.lose(number, drop)

    def on_restart(self, pick: int, amount: int) -> bool:
        found = pick_one([(n, m) for n, m in sorted(self.slots.items()) if m.lost], pick)
        if found is None or self.coordinator is None:
            return False
        number, member = found
        member.process, member.lost = self.new_process(number, member.incarnation), False
        return True

    def on_drop(self, pick: int, amount: int) -> bool:
        """The driver gives up a head that has died."""
        here = sorted(self.slots.items())
        found = pick_one([(n, m) for n, m in here if m.process is None and not m.lost and not m.ended], pick)
        if found is None or sum(not m.ended for m in self.slots.values()) < 2:
            return False
        self._lose_head(*found, drop=True)
        self.incarnations[found[0]] = found[1].incarnation
        del self.slots[found[0]]
        return True

    def on_admit(self, pick: int, amount: int) -> bool:
        """A head is added; not once any has ended (`FailureHandler._grow`)."""
        number = next((n for n in range(MOST_HEADS) if n not in self.slots), None)
        if number is None or self.coordinator is None or any(m.ended or m.lost for m in self.slots.values()):
            return False
        incarnation = self.incarnations.get(number, 0)  # of a number that was given up, incarnations go on
        self.slots[number] = Slot(self.new_process(number, incarnation), incarnation)
        return True

    def on_turn_away(self, pick: int, amount: int) -> bool:
        """A head that waits for data, and comes too late, since all others have ended, is given up."""
        late = [(n, m) for n, m in sorted(self.slots.items()) if not m.ended]
        if self.coordinator is None or not late or len(late) == len(self.slots):
            return False
        if any(n not in self.coordinator.joined or self.coordinator.engine.has_data(n) for n, _ in late):
            return False
        for number, member in late:
            self._lose_head(number, member, drop=True)
            del self.slots[number]
        return True

    def on_end(self, pick: int, amount: int) -> bool:
        """The driver sees that a process has ended its work."""
        member = pick_one([m for m in self.slots.values() if m.process is not None and not m.ended and m.process.ended], pick)
        if member is None:
            return False
        member.ended, member.end_step = True, member.process.head.step
        if self.coordinator is not None and member.process.quarantined:
            self.coordinator.lose(member.process.number, drop=True)
        elif self.coordinator is not None:
            self.coordinator.leave(member.process.number)  # again: one that began meanwhile doesn't know
        return True
