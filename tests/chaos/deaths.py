"""Deaths of heads in a chaos world, and what the driver does about them: what `runtime.mending` and `runtime.crew` do."""

from __future__ import annotations

from tests.chaos.parts import MOST_HEADS
from tests.chaos.run import Member, one
from tests.chaos.traffic import Traffic


class Deaths(Traffic):
    """Heads die, are restarted or given up, come and end."""

    def on_kill(self, pick: int, amount: int) -> bool:
        """A head's process dies; what it has put on the wire may still arrive."""
        member = one([m for _, m in sorted(self.members.items()) if m.process is not None and not m.over], pick)
        if member is None or member.process is None:
            return False
        process = member.process
        process.alive = False
        if self.hub is not None:
            self.ghosts += [call for call in process.calls if call.kind == "submit" and call.place == "wire"]
        process.calls.clear()
        member.process = None
        return True

    def on_kill_ended(self, pick: int, amount: int) -> bool:
        """The process of a head that has ended dies, which nobody notices."""
        ended = [m for _, m in sorted(self.members.items()) if m.over and m.process is not None and not m.process.quarantined]
        member = one(ended, pick)
        if member is None or member.process is None:
            return False
        member.process.alive = False
        member.process.calls.clear()
        member.process = None
        return True

    def on_notice(self, pick: int, amount: int) -> bool:
        """The driver sees that a process is gone, and tells the coordinator."""
        found = one([(n, m) for n, m in sorted(self.members.items()) if m.process is None and not m.gone and not m.over], pick)
        if found is None:
            return False
        self._lost(*found)
        return True

    def _lost(self, number: int, member: Member, drop: bool = False) -> None:
        member.gone = True
        member.incarnation += 1
        self.ghosts = [c for c in self.ghosts if c.process.number != number]  # a killed process's sockets are closed by now
        if self.hub is not None:
            self.hub.lose(number, drop)

    def on_restart(self, pick: int, amount: int) -> bool:
        found = one([(n, m) for n, m in sorted(self.members.items()) if m.gone], pick)
        if found is None or self.hub is None:
            return False
        number, member = found
        member.process, member.gone = self.process(number, member.incarnation), False
        return True

    def on_drop(self, pick: int, amount: int) -> bool:
        """The driver gives up a head that has died."""
        here = sorted(self.members.items())
        found = one([(n, m) for n, m in here if m.process is None and not m.gone and not m.over], pick)
        if found is None or sum(not m.over for m in self.members.values()) < 2:
            return False
        self._lost(*found, drop=True)
        self.incarnations[found[0]] = found[1].incarnation
        del self.members[found[0]]
        return True

    def on_admit(self, pick: int, amount: int) -> bool:
        """A head is added; not once any has ended (`FailureHandler._grow`)."""
        number = next((n for n in range(MOST_HEADS) if n not in self.members), None)
        if number is None or self.hub is None or any(m.over or m.gone for m in self.members.values()):
            return False
        incarnation = self.incarnations.get(number, 0)  # of a number that was given up, incarnations go on
        self.members[number] = Member(self.process(number, incarnation), incarnation)
        return True

    def on_turn_away(self, pick: int, amount: int) -> bool:
        """A head that waits for data, and comes too late, since all others have ended, is given up."""
        late = [(n, m) for n, m in sorted(self.members.items()) if not m.over]
        if self.hub is None or not late or len(late) == len(self.members):
            return False
        if any(n not in self.hub.joined or self.hub.engine.has_data(n) for n, _ in late):
            return False
        for number, member in late:
            self._lost(number, member, drop=True)
            del self.members[number]
        return True

    def on_end(self, pick: int, amount: int) -> bool:
        """The driver sees that a process has ended its work."""
        member = one([m for m in self.members.values() if m.process is not None and not m.over and m.process.ended], pick)
        if member is None:
            return False
        member.over, member.end = True, member.process.head.step
        if self.hub is not None and member.process.quarantined:
            self.hub.lose(member.process.number, drop=True)
        elif self.hub is not None:
            self.hub.leave(member.process.number)  # again: one that began meanwhile doesn't know
        return True
