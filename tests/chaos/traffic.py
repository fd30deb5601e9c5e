"""What happens in a chaos world without deaths: training, messages in any order, late, again or lost, poison, checkpoints."""

from __future__ import annotations

from typing import Any

from tests.chaos.client import PendingJoin
from tests.chaos.parts import Call
from tests.chaos.process import ChaosHeadProcess
from tests.chaos.run import ChaosRun, pick_one

CALM = ("train", "contribute", "deliver", "hub", "fetch", "adopt", "hub", "deliver", "end")
"""What happens in a run without faults."""


class Traffic(ChaosRun):
    """Events `on_NAME(pick, amount)`: whether it happened; `pick` says which of several, `amount` how much."""

    def do(self, kind: str, pick: int = 0, amount: int = 1) -> bool:
        """Lets an event happen, if it can."""
        raise NotImplementedError

    def on_train(self, pick: int, amount: int) -> bool:
        process = pick_one(self.processes, pick)
        return process is not None and process.train(amount)

    def on_contribute(self, pick: int, amount: int) -> bool:
        process = pick_one([p for p in self.processes if p.due()], pick)
        if process is not None:
            process.contribute()
        return process is not None

    def on_deliver(self, pick: int, amount: int) -> bool:
        """A call reaches the coordinator."""
        call = pick_one(self.calls_on_the_wire, pick)
        if call is None or self.coordinator is None:
            return False
        if call in self.orphaned_calls:
            self.orphaned_calls.remove(call)
        call.place = "held"
        self._receive(call)
        return True

    def on_repeat(self, pick: int, amount: int) -> bool:
        """A call that has reached the coordinator reaches it once more; only its first answer counts."""
        kinds = ("submit", "newer", "leave", "saved")
        call = pick_one([c for p in self.processes for c in p.calls if c.place == "held" and c.kind in kinds], pick)
        if call is None or self.coordinator is None:
            return False
        self._receive(call)
        return True

    def on_lose_answer(self, pick: int, amount: int) -> bool:
        """An answer is lost, and the call made again."""
        call = pick_one([call for p in self.processes for call in p.calls if call.answers], pick)
        if call is not None:
            call.answers.clear()
            call.place = "wire"
        return call is not None

    def _receive(self, call: Call) -> None:
        assert self.coordinator is not None
        hub, process = self.coordinator, call.process
        if call.kind == "submit":
            hub.submit(call)
        elif call.kind == "newer":
            hub.waiting_calls.append(call)
        elif call.kind == "join":
            hub.joins.append(PendingJoin(call))
        else:
            if call.kind == "leave":
                hub.leave(process.number)
            else:
                hub.add_part(*call.payload)
            if call in process.calls:
                process.calls.remove(call)

    def on_hub(self, pick: int, amount: int) -> bool:
        """The coordinator does one of the things that it has begun: fetches, answers, lets heads join, writes its files."""
        hub = self.coordinator
        if hub is None:
            return False
        todo: list[Any] = [lambda head=head: hub.receive(head) for head in hub.arriving]
        todo += [lambda index=index: hub.reply_to(index) for index in range(len(hub.decided))]
        todo += [lambda join=join: hub.continue_join(join) for join in hub.joins]
        todo += [
            lambda version=version: self._write_own(version)
            for version, kept in hub.checkpoints.items()
            if not kept.base_written
        ]
        if any(call.payload < hub.engine.version for call in hub.waiting_calls):
            todo.append(hub.reply_to_waiting)
        begin = pick % len(todo) if todo else 0
        return any(act() is not False for act in todo[begin:] + todo[:begin])  # the first that can go on

    def _write_own(self, version: int) -> None:
        assert self.coordinator is not None
        self.coordinator.checkpoints[version].base_written = True
        self.coordinator.commit(version)

    def on_fetch(self, pick: int, amount: int) -> bool:
        """An answer reaches its process."""
        call = pick_one([call for p in self.processes for call in p.calls if call.answers], pick)
        if call is None or not call.process.fetch(call):
            return False
        if call.kind == "submit" and call not in call.process.calls:
            self.answered_calls.append(call)
        return True

    def on_echo(self, pick: int, amount: int) -> bool:
        """A contribution that was answered long ago reaches the coordinator once more."""
        call = pick_one(self.answered_calls, pick)
        if call is None or self.coordinator is None:
            return False
        self.coordinator.submit(call)
        return True

    def on_adopt(self, pick: int, amount: int) -> bool:
        """A process takes what has been fetched; the first thing is where it begins."""
        process = pick_one([p for p in self.processes if p.received and not p.ended], pick)
        if process is not None:
            process.adopt() if process.head is not None else process.begin()
        return process is not None

    def on_poison(self, pick: int, amount: int) -> bool:
        process = pick_one([p for p in self.processes if p.head is not None and not p.over], pick)
        if process is not None:
            process.poison()
        return process is not None

    def on_cut(self, pick: int, amount: int) -> bool:
        """A checkpoint of the newest version is begun; or, where there is one, of the next as soon as it is merged."""
        if self.coordinator is None:
            return False
        self.coordinator.begins_at_next_merge = not self.coordinator.may_begin
        if self.coordinator.may_begin:
            self.coordinator.begin_checkpoint()
        return True

    def on_ask(self, pick: int, amount: int) -> bool:
        """The driver hears from the coordinator, and has heads that hear nothing any more write to checkpoints."""
        if self.coordinator is None:
            return False
        self.saved = self.coordinator.newest
        for version, kept in list(self.coordinator.checkpoints.items()):
            for number in [n for n in kept.missing if n in self.slots and self.slots[n].process is None]:
                self.coordinator.add_part(version, number, None)  # it can't
        return sum(self._request_part(process) for process in self.processes if process.left) > 0

    def _request_part(self, process: ChaosHeadProcess) -> bool:
        assert self.coordinator is not None
        lacking = (
            kept for kept in self.coordinator.checkpoints.values() if process.number in kept.missing - kept.asked_by_driver
        )
        kept = next(lacking, None)
        if kept is None or process.head is None:
            return False
        kept.asked_by_driver.add(process.number)
        process._take_snapshot(process.head, kept.request)
        return True

    def on_go(self, pick: int, amount: int) -> bool:
        """Several things that aren't faults happen, in an order that `pick` gives."""
        moved = False
        for turn in range(12 * amount):
            pick = (pick * 1103515245 + 12345) % 2**31
            moved = self.do(CALM[(pick >> 16) % len(CALM)], pick >> 20, 1 + turn % 3) or moved
        return moved
