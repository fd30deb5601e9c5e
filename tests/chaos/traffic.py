"""What happens in a chaos world without deaths: training, poison, checkpoints, and messages late, repeated, lost or reordered.

The names of events are recorded in `benchmarks/results/chaos.json`: they stay.
"""

from __future__ import annotations

from typing import Any

from tests.chaos.client import PendingJoin
from tests.chaos.parts import Call
from tests.chaos.process import ChaosHeadProcess
from tests.chaos.run import ChaosRun, pick_one

CALM = ("train", "contribute", "deliver", "hub", "fetch", "adopt", "hub", "deliver", "end")
"""Events of a run without faults."""


class Traffic(ChaosRun):
    """Events `on_NAME(pick, amount)`: `pick` chooses among several, `amount` says how much. Each returns if it happened."""

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
        """A call that reached the coordinator reaches it again; only the first reply counts."""
        kinds = ("submit", "newer", "leave", "saved")
        call = pick_one([c for p in self.processes for c in p.calls if c.place == "held" and c.kind in kinds], pick)
        if call is None or self.coordinator is None:
            return False
        self._receive(call)
        return True

    def on_lose_answer(self, pick: int, amount: int) -> bool:
        """A reply is lost, and the call is made again."""
        call = pick_one([call for p in self.processes for call in p.calls if call.answers], pick)
        if call is not None:
            call.answers.clear()
            call.place = "wire"
        return call is not None

    def _receive(self, call: Call) -> None:
        assert self.coordinator is not None
        coordinator, process = self.coordinator, call.process
        if call.kind == "submit":
            coordinator.submit(call)
        elif call.kind == "newer":
            coordinator.waiting_calls.append(call)
        elif call.kind == "join":
            coordinator.joins.append(PendingJoin(call))
        else:
            if call.kind == "leave":
                coordinator.leave(process.number)
            else:
                coordinator.add_part(*call.payload)
            if call in process.calls:
                process.calls.remove(call)

    def on_hub(self, pick: int, amount: int) -> bool:
        """The coordinator continues one thing that it has begun: fetches, replies, lets a head join, or writes its files."""
        coordinator = self.coordinator
        if coordinator is None:
            return False
        todo: list[Any] = [lambda head=head: coordinator.receive(head) for head in coordinator.arriving]
        todo += [lambda index=index: coordinator.reply_to(index) for index in range(len(coordinator.decided))]
        todo += [lambda join=join: coordinator.continue_join(join) for join in coordinator.joins]
        todo += [
            lambda version=version: self._write_own(version)
            for version, stored in coordinator.checkpoints.items()
            if not stored.base_written
        ]
        if any(call.payload < coordinator.engine.version for call in coordinator.waiting_calls):
            todo.append(coordinator.reply_to_waiting)
        begin = pick % len(todo) if todo else 0
        return any(act() is not False for act in todo[begin:] + todo[:begin])  # the first that can continue

    def _write_own(self, version: int) -> None:
        assert self.coordinator is not None
        self.coordinator.checkpoints[version].base_written = True
        self.coordinator.commit(version)

    def on_fetch(self, pick: int, amount: int) -> bool:
        """A reply reaches its process."""
        call = pick_one([call for p in self.processes for call in p.calls if call.answers], pick)
        if call is None or not call.process.fetch(call):
            return False
        if call.kind == "submit" and call not in call.process.calls:
            self.answered_calls.append(call)
        return True

    def on_echo(self, pick: int, amount: int) -> bool:
        """A contribution that was answered long ago reaches the coordinator again."""
        call = pick_one(self.answered_calls, pick)
        if call is None or self.coordinator is None:
            return False
        self.coordinator.submit(call)
        return True

    def on_adopt(self, pick: int, amount: int) -> bool:
        """A process adopts what it received; the first reply starts its head."""
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
        """A checkpoint of the newest version is begun; if that has one, of the next version as soon as it is merged."""
        if self.coordinator is None:
            return False
        self.coordinator.begins_at_next_merge = not self.coordinator.may_begin
        if self.coordinator.may_begin:
            self.coordinator.begin_checkpoint()
        return True

    def on_ask(self, pick: int, amount: int) -> bool:
        """The driver polls the coordinator, and asks heads that get no more replies for their parts of checkpoints."""
        if self.coordinator is None:
            return False
        self.saved = self.coordinator.newest
        for version, stored in list(self.coordinator.checkpoints.items()):
            for number in [n for n in stored.missing if n in self.slots and self.slots[n].process is None]:
                self.coordinator.add_part(version, number, None)  # its process is dead
        return sum(self._request_part(process) for process in self.processes if process.left) > 0

    def _request_part(self, process: ChaosHeadProcess) -> bool:
        assert self.coordinator is not None
        lacking = (
            stored
            for stored in self.coordinator.checkpoints.values()
            if process.number in stored.missing - stored.asked_by_driver
        )
        stored = next(lacking, None)
        if stored is None or process.head is None:
            return False
        stored.asked_by_driver.add(process.number)
        process._take_snapshot(process.head, stored.request)
        return True

    def on_go(self, pick: int, amount: int) -> bool:
        """Several events without faults happen, in an order that depends on `pick`."""
        moved = False
        for turn in range(12 * amount):
            pick = (pick * 1103515245 + 12345) % 2**31
            moved = self.do(CALM[(pick >> 16) % len(CALM)], pick >> 20, 1 + turn % 3) or moved
        return moved
