"""Deaths of heads in a chaos world, and what the driver does: `failure_handling` and `head_actors` of `runtime.controller`."""

from __future__ import annotations

from tests.chaos.parts import MOST_HEADS
from tests.chaos.run import Slot, pick_one
from tests.chaos.traffic import Traffic


class Deaths(Traffic):
    """Heads die, are restarted, dropped or added, and end."""

    def on_kill(self, pick: int, amount: int) -> bool:
        """A head's process dies; contributions that it has sent may still arrive."""
        slot = pick_one([m for _, m in sorted(self.slots.items()) if m.process is not None and not m.ended], pick)
        if slot is None or slot.process is None:
            return False
        process = slot.process
        process.alive = False
        if self.coordinator is not None:
            self.orphaned_calls += [call for call in process.calls if call.kind == "submit" and call.place == "wire"]
        process.calls.clear()
        slot.process = None
        return True

    def on_kill_ended(self, pick: int, amount: int) -> bool:
        """The process of a head that has ended dies, and the driver doesn't notice."""
        ended = [m for _, m in sorted(self.slots.items()) if m.ended and m.process is not None and not m.process.quarantined]
        slot = pick_one(ended, pick)
        if slot is None or slot.process is None:
            return False
        slot.process.alive = False
        slot.process.calls.clear()
        slot.process = None
        return True

    def on_notice(self, pick: int, amount: int) -> bool:
        """The driver notices that a process is gone, and tells the coordinator; `FailureHandler.handle_loss`."""
        picked = pick_one(
            [(n, m) for n, m in sorted(self.slots.items()) if m.process is None and not m.lost and not m.ended], pick
        )
        if picked is None:
            return False
        self._lose_head(*picked)
        return True

    def _lose_head(self, number: int, slot: Slot, drop: bool = False) -> None:
        slot.lost, slot.moved = True, None
        slot.incarnation += 1
        self.orphaned_calls = [
            c for c in self.orphaned_calls if c.process.number != number
        ]  # the dead process's sockets are closed by now
        if self.coordinator is not None:
            self.coordinator.lose(number, drop)

    def on_restart(self, pick: int, amount: int) -> bool:
        picked = pick_one([(n, m) for n, m in sorted(self.slots.items()) if m.lost], pick)
        if picked is None or self.coordinator is None:
            return False
        number, slot = picked
        slot.process, slot.lost = self.new_process(number, slot.incarnation, slot.moved), False
        return True

    def on_drain(self, pick: int, amount: int) -> bool:
        """The node of a head drains: the head must leave it, and the others end their rounds; `NodeDraining`."""
        leaving = pick_one([p for p in self.processes if not p.ended and not p.early_end.leaving], pick)
        if leaving is None:
            return False
        leaving.early_end.request_leave()
        for process in self.processes:
            process.early_end.request_round_end([process.number])
        return True

    def on_move(self, pick: int, amount: int) -> bool:
        """The driver sees that a head has left its node, and starts it elsewhere; `FailureHandler.handle_move`."""
        moving = [(n, m) for n, m in sorted(self.slots.items()) if m.process is not None and not m.ended and m.process.moves]
        picked = pick_one(moving, pick)
        if picked is None:
            return False
        number, slot = picked
        state = slot.process.leaves or slot.process.moved
        slot.process.alive, slot.process = False, None
        self._lose_head(number, slot)
        slot.moved = state
        return True

    def on_drop(self, pick: int, amount: int) -> bool:
        """The driver drops a head that died."""
        slots = sorted(self.slots.items())
        picked = pick_one([(n, m) for n, m in slots if m.process is None and not m.lost and not m.ended], pick)
        if picked is None or sum(not m.ended for m in self.slots.values()) < 2:
            return False
        number, slot = picked
        self._lose_head(number, slot, drop=True)
        self.incarnations[number] = slot.incarnation
        del self.slots[number]
        return True

    def on_admit(self, pick: int, amount: int) -> bool:
        """A head is added, unless some have ended; `FailureHandler._grow`."""
        number = next((n for n in range(MOST_HEADS) if n not in self.slots), None)
        if number is None or self.coordinator is None or any(m.ended or m.lost for m in self.slots.values()):
            return False
        incarnation = self.incarnations.get(number, 0)  # incarnations of a dropped number continue
        self.slots[number] = Slot(self.new_process(number, incarnation), incarnation)
        return True

    def on_turn_away(self, pick: int, amount: int) -> bool:
        """Heads that wait for data are dropped if all others have ended; `FailureHandler.drop_starved`."""
        late = [(n, m) for n, m in sorted(self.slots.items()) if not m.ended]
        if self.coordinator is None or not late or len(late) == len(self.slots):
            return False
        if any(n not in self.coordinator.joined or self.coordinator.engine.has_data(n) for n, _ in late):
            return False
        for number, slot in late:
            self._lose_head(number, slot, drop=True)
            del self.slots[number]
        return True

    def on_end(self, pick: int, amount: int) -> bool:
        """The driver sees that a process has ended its work; `FailureHandler.handle_finish`."""
        ended = [m for m in self.slots.values() if m.process is not None and not m.ended and m.process.ended]
        slot = pick_one([m for m in ended if not m.process.moves], pick)
        if slot is None:
            return False
        slot.ended, slot.end_step = True, slot.process.head.step
        if self.coordinator is not None and slot.process.quarantined:
            self.coordinator.lose(slot.process.number, drop=True)
        elif self.coordinator is not None:
            self.coordinator.leave(slot.process.number)  # a coordinator that began meanwhile doesn't know
        return True
