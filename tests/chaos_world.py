"""A whole run in one process, without threads, Ray or time: its driver, and what may happen, one event after another.

The heads, the coordinator, snapshots and recovery are the real ones; what carries messages between them is restated from
`lte_ray.runtime` (`chaos_process`: head and courier; `chaos_hub`: coordinator, merging, cuts; here: mending and session).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from chaos_account import Account, Broken, effective_weights, near
from chaos_hub import Hub, Joining
from chaos_parts import MOST_HEADS, Call, Disk, Fit, Here, Mode
from chaos_process import Process

from lte_ray.engine.initial import prepare, with_room
from lte_ray.engine.recovery import recover
from lte_ray.messages import Report
from lte_ray.runtime import resuming
from lte_ray.runtime.start import Start

CALM = ("train", "contribute", "deliver", "hub", "fetch", "adopt", "hub", "deliver", "end")
"""What happens in a run without faults."""

ROUNDS = 400
"""Rounds in which a run without faults must end from any state."""


@dataclass(eq=False)
class Member:
    """A head's place, as the driver sees it; `gone`: it knows that the process is."""

    process: Process | None
    incarnation: int = 0
    gone: bool = False
    over: bool = False


class World:
    """One run and all that happens to it; `happened` counts events by kind, `history` lists them.

    Args:
        mode: how it merges.
    """

    def __init__(self, mode: Mode) -> None:
        self.mode, self.settings = mode, mode.settings()
        self.initial = with_room(prepare(Fit(), self.settings, torch.float64), MOST_HEADS)
        self.account = Account({0: self.initial.base.clone()}, {0: {}})
        self._first = self.account.copy()
        self.disk, self.epoch = Disk(), 0
        self.begin, self.saved = Start(0, self.initial.base), None
        self.ghosts: list[Call] = []
        self.happened: Counter[str] = Counter()
        self._launch()

    saved: int | None
    hub: Hub | None

    def _launch(self) -> None:
        self.incarnations: dict[int, int] = {}
        self.members = {n: Member(self._process(n, 0)) for n in range(self.settings.lte.num_heads)}
        self.hub = self._hub(self.begin)

    def _process(self, number: int, incarnation: int) -> Process:
        return Process(self.settings, self.initial, number, incarnation, self.epoch, self.disk)

    def _hub(self, start: Start, members: set[int] | None = None) -> Hub:
        return Hub(self.mode, self.settings, self.initial, start, self.account, self.disk, members)

    @property
    def processes(self) -> list[Process]:
        return [member.process for _, member in sorted(self.members.items()) if member.process is not None]

    @property
    def wire(self) -> list[Call]:
        """Calls that are on their way to the coordinator, those of the dead included."""
        return [call for p in self.processes for call in p.calls if call.place == "wire"] + self.ghosts

    # -- events ----------------------------------------------------------------------------------------------------

    def do(self, kind: str, pick: int = 0, amount: int = 1) -> bool:
        """Lets an event happen, if it can; `pick` says which of several, `amount` how much. Then checks all invariants."""
        if not getattr(self, f"on_{kind}")(pick, amount):
            return False
        self.happened[kind] += 1
        for process in self.processes:
            process.look()
        self.check()
        return True

    def on_train(self, pick: int, amount: int) -> bool:
        process = _one(self.processes, pick)
        return process is not None and process.train(amount)

    def on_contribute(self, pick: int, amount: int) -> bool:
        process = _one([p for p in self.processes if p.due()], pick)
        if process is not None:
            process.contribute()
        return process is not None

    def on_deliver(self, pick: int, amount: int) -> bool:
        """A call reaches the coordinator."""
        call = _one(self.wire, pick)
        if call is None or self.hub is None:
            return False
        if call in self.ghosts:
            self.ghosts.remove(call)
        call.place = "held"
        self._arrives(call)
        return True

    def on_repeat(self, pick: int, amount: int) -> bool:
        """A call that has reached the coordinator reaches it once more; only its first answer counts."""
        kinds = ("submit", "newer", "leave", "saved")
        call = _one([c for p in self.processes for c in p.calls if c.place == "held" and c.kind in kinds], pick)
        if call is None or self.hub is None:
            return False
        self._arrives(call)
        return True

    def on_lose_answer(self, pick: int, amount: int) -> bool:
        """An answer is lost, and the call made again."""
        call = _one([call for p in self.processes for call in p.calls if call.answers], pick)
        if call is not None:
            call.answers.clear()
            call.place = "wire"
        return call is not None

    def _arrives(self, call: Call) -> None:
        assert self.hub is not None
        hub, process = self.hub, call.process
        if call.kind == "submit":
            hub.submit(call)
        elif call.kind == "newer":
            hub.behind.append(call)
        elif call.kind == "join":
            hub.joins.append(Joining(call))
        else:
            if call.kind == "leave":
                hub.leave(process.number)
            else:
                hub.add(*call.payload)
            if call in process.calls:
                process.calls.remove(call)

    def on_hub(self, pick: int, amount: int) -> bool:
        """The coordinator does one of the things that it has begun: fetches, answers, lets heads join, writes its files."""
        hub = self.hub
        if hub is None:
            return False
        todo: list[Any] = [lambda head=head: hub.fetched(head) for head in hub.arriving]
        todo += [lambda index=index: hub.answer(index) for index in range(len(hub.decided))]
        todo += [lambda join=join: hub.joining(join) for join in hub.joins]
        todo += [lambda version=version: self._write_own(version) for version, kept in hub.cuts.items() if not kept.own]
        if any(call.payload < hub.engine.version for call in hub.behind):
            todo.append(hub.tell_newer)
        begin = pick % len(todo) if todo else 0
        return any(act() is not False for act in todo[begin:] + todo[:begin])  # the first that can go on

    def _write_own(self, version: int) -> None:
        assert self.hub is not None
        self.hub.cuts[version].own = True
        self.hub.commit(version)

    def on_fetch(self, pick: int, amount: int) -> bool:
        """An answer reaches its process."""
        call = _one([call for p in self.processes for call in p.calls if call.answers], pick)
        return call is not None and call.process.fetch(call)

    def on_adopt(self, pick: int, amount: int) -> bool:
        """A process takes what has been fetched; the first thing is where it begins."""
        process = _one([p for p in self.processes if p.arrived and not p.ended], pick)
        if process is not None:
            process.adopt() if process.head is not None else process.begin()
        return process is not None

    def on_poison(self, pick: int, amount: int) -> bool:
        process = _one([p for p in self.processes if p.head is not None and not p.over], pick)
        if process is not None:
            process.poison()
        return process is not None

    def on_cut(self, pick: int, amount: int) -> bool:
        """A checkpoint of the newest version is begun."""
        if self.hub is None or not self.hub.may_cut:
            return False
        self.hub.cut()
        return True

    def on_ask(self, pick: int, amount: int) -> bool:
        """The driver hears from the coordinator, and has heads that hear nothing any more write to checkpoints."""
        if self.hub is None:
            return False
        self.saved = self.hub.saved
        return sum(self._ask(process) for process in self.processes if process.left) > 0

    def _ask(self, process: Process) -> bool:
        assert self.hub is not None
        kept = next((kept for kept in self.hub.cuts.values() if process.number in kept.untold), None)
        if kept is None or process.head is None:
            return False
        kept.untold.discard(process.number)
        process._save(process.head, kept.save)
        return True

    def on_go(self, pick: int, amount: int) -> bool:
        """Several things that aren't faults happen, in an order that `pick` gives."""
        moved = False
        for turn in range(6 * amount):
            pick = (pick * 1103515245 + 12345) % 2**31
            moved = self.do(CALM[(pick >> 16) % len(CALM)], pick >> 20, 1 + turn % 3) or moved
        return moved

    # -- deaths ----------------------------------------------------------------------------------------------------

    def on_kill(self, pick: int, amount: int) -> bool:
        """A head's process dies; what it has put on the wire may still arrive."""
        member = _one([m for _, m in sorted(self.members.items()) if m.process is not None and not m.over], pick)
        if member is None or member.process is None:
            return False
        process = member.process
        process.alive = False
        if self.hub is not None:
            self.ghosts += [call for call in process.calls if call.kind == "submit" and call.place == "wire"]
        process.calls.clear()
        member.process = None
        return True

    def on_notice(self, pick: int, amount: int) -> bool:
        """The driver sees that a process is gone, and tells the coordinator."""
        found = _one([(n, m) for n, m in sorted(self.members.items()) if m.process is None and not m.gone], pick)
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
        found = _one([(n, m) for n, m in sorted(self.members.items()) if m.gone], pick)
        if found is None or self.hub is None:
            return False
        number, member = found
        member.process, member.gone = self._process(number, member.incarnation), False
        return True

    def on_drop(self, pick: int, amount: int) -> bool:
        """The driver gives up a head that has died."""
        found = _one([(n, m) for n, m in sorted(self.members.items()) if m.process is None and not m.gone], pick)
        if found is None or sum(not m.over for m in self.members.values()) < 2:
            return False
        self._lost(*found, drop=True)
        self.incarnations[found[0]] = found[1].incarnation
        del self.members[found[0]]
        return True

    def on_admit(self, pick: int, amount: int) -> bool:
        """A head is added; not once any has ended (`Mending._grow`)."""
        number = max(self.members) + 1
        if number >= MOST_HEADS or self.hub is None or any(m.over or m.gone for m in self.members.values()):
            return False
        incarnation = self.incarnations.get(number, 0)  # of a number that was given up, incarnations go on
        self.members[number] = Member(self._process(number, incarnation), incarnation)
        return True

    def on_turn_away(self, pick: int, amount: int) -> bool:
        """A head that waits for data, and comes too late, since all others have ended, is given up."""
        late = [(n, m) for n, m in sorted(self.members.items()) if not m.over]
        if self.hub is None or not late or len(late) == len(self.members):
            return False
        if any(n not in self.hub.joined or self.hub.engine.ready(n) for n, _ in late):
            return False
        for number, member in late:
            self._lost(number, member, drop=True)
            del self.members[number]
        return True

    def on_end(self, pick: int, amount: int) -> bool:
        """The driver sees that a process has ended its work."""
        member = _one([m for m in self.members.values() if m.process is not None and not m.over and m.process.ended], pick)
        if member is None:
            return False
        member.over = True
        if member.process.quarantined and self.hub is not None:
            self.hub.lose(member.process.number, drop=True)
        return True

    def on_kill_hub(self, pick: int, amount: int) -> bool:
        """The coordinator dies; what it has answered may still arrive."""
        if self.hub is None:
            return False
        self.hub = None
        self.ghosts = []  # they were on their way to it
        for process in self.processes:
            process.cut()
        return True

    def on_recover(self, pick: int, amount: int) -> bool:
        """Another coordinator goes on; `Mending._recover`."""
        if self.hub is not None:
            return False
        self.epoch += 1
        reports: list[Report] = []
        for process in self.processes:
            reports.append(process.report(self.epoch))
        start, astray = self._start(reports)
        self._rollback(start)
        out = {n for n, m in self.members.items() if m.over and m.process is not None and m.process.quarantined}
        self.hub = self._hub(start, set(self.members) - out)
        for number, member in self.members.items():
            if number in astray and member.process is not None and not member.over:
                member.process.alive = False
                member.process, member.gone = None, True
                member.incarnation += 1
        for number, member in sorted(self.members.items()):
            if member.gone:
                self.hub.lose(number, False)
            if member.over:
                self.hub.leave(number)
        return True

    def _start(self, reports: list[Report]) -> tuple[Start, Iterable[int]]:
        """`Mending._start`."""
        saved, found = self.saved, recover(reports)
        if found is None or (saved is not None and saved > found.version):
            if saved is None or saved == self.begin.version:
                self._restored(saved)
                return _again(self.begin, self.epoch), frozenset()
            self._restored(saved)
            return _again(self._resumed(saved, self.settings.lte.num_heads), self.epoch), list(self.members)
        references, states = dict(found.references), frozenset[int]()
        if saved is not None:
            kept = self.disk.kept[saved]
            states = frozenset(kept.parts)
            for head, factors in kept.references.items():
                held = found.held.get(head)
                same = held is not None and kept.facts["standings"].get(str(head), {}).get("sequence") == held.sequence
                if head in found.unknown and same:
                    references[head] = factors.clone()
        start = Start(
            version=found.version,
            base=found.base,
            references=references,
            standings=found.held,
            ledger=found.ledger,
            taken={head: held.step for head, held in found.held.items()},
            granted=found.granted,
            saved=saved,
            exact=self.begin.exact - found.granted.keys() if found.version == self.begin.version else frozenset(),
            states=states,
            epoch=self.epoch,
        )
        return start, found.astray

    def _resumed(self, version: int, heads: int) -> Start:
        """What the runtime makes of a checkpoint."""
        common: Any = SimpleNamespace(directory=Here(), transport=Here())
        with patch.object(resuming, "checkpoint", self.disk):
            return resuming.resumed(common, self.initial, version, heads)

    def _rollback(self, start: Start) -> None:
        self.account.rollback(start.version, None if start.saved is None else self.disk.kept[start.saved].account.momentum)

    def on_crash(self, pick: int, amount: int) -> bool:
        """Everything dies; the run is resumed from the newest complete checkpoint, with another number of heads if `amount` > 4."""
        heads = self.settings.lte.num_heads
        if amount > 4:
            heads = 1 + (heads + pick) % 4
        self.ghosts, self.epoch = [], 0
        self.settings = self.mode.settings(heads)
        self.saved = max(self.disk.kept, default=None)
        if self.saved is None:
            self.begin = Start(0, self.initial.base)
        else:
            self.begin = self._resumed(self.saved, heads)
        for process in self.processes:
            process.alive = False
        self._restored(self.saved)
        self._launch()
        return True

    def _restored(self, saved: int | None) -> None:
        """The account is that of a checkpoint, or of the start."""
        self.account = self._first.copy() if saved is None else self.disk.kept[saved].account.copy()

    # -- the end ---------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """No more faults: the run must end, with everything merged and saved."""
        for _ in range(ROUNDS):
            if self.hub is not None and all(member.over for member in self.members.values()):
                break
            kinds = ("recover", "notice", "restart", "ask", "hub", "deliver", "fetch", "adopt", "train", "contribute", "end", "turn_away")
            happened = [self.do(kind, pick, 9) for kind in kinds for pick in range(6)]
            if not any(happened):
                raise Broken(f"the run stands still:\n{self.explained()}")
        else:
            raise Broken(f"the run doesn't end:\n{self.explained()}")
        self.end()

    def end(self) -> None:
        """Everything that was trained and isn't poison is merged, everybody took their steps, and the last version is saved."""
        hub = self.hub
        assert hub is not None
        hub.freeze()
        for process in self.processes:
            while self._ask(process):
                pass
        while self.on_hub(0, 1) or self.on_deliver(0, 1):
            pass
        sound = {number: m.process for number, m in self.members.items() if m.process is not None and not m.process.quarantined}
        for number, process in sound.items():
            assert process.track is not None
            carried, slots = process.track.carried(hub.engine.standings[number].sequence)
            near(carried, torch.zeros_like(carried), f"head {number} has ended with something that isn't merged")
            if not all(poison for _, poison in slots):
                raise Broken(f"head {number} has ended, and batches {slots} aren't merged")
        if not sound:
            return  # all are quarantined, so the run ends with an error
        if hub.engine.members != set(sound):
            raise Broken(f"the members are {hub.engine.members}, but the driver has {set(sound)}")
        steps = {number: process.head.step for number, process in sound.items() if process.head is not None}
        if not hub.engine.budget.shared and set(steps.values()) - {self.settings.train.steps}:
            raise Broken(f"not all heads have taken {self.settings.train.steps} steps: {steps}")
        if hub.cuts:
            raise Broken(f"checkpoints {sorted(hub.cuts)} aren't whole")

    def explained(self) -> str:
        """Where everything stands, for people."""
        hub, lines = self.hub, []
        if hub is not None:
            engine = hub.engine
            lines.append(f"version {engine.version}, live {engine.live}, members {engine.members}, waits {engine.waiting_for}")
            lines.append(f"pending {engine.pending}, joins {len(hub.joins)}, undecided {list(hub.undecided)}")
        for number, member in sorted(self.members.items()):
            p = member.process
            if p is None or p.head is None:
                lines.append(f"head {number}: {'no process' if p is None else 'no head'}, gone {member.gone}")
                continue
            h = p.head
            calls = [(call.kind, call.place, len(call.answers)) for call in p.calls]
            lines.append(
                f"head {number}.{p.incarnation}: step {h.step} of {h.limit} final {h._final}, version {h.version}, "
                f"outstanding {h.outstanding}, over {p.over}/{member.over}, lanes {h.feed.lanes}, calls {calls}"
            )
        return "\n".join(lines)

    # -- invariants ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """What must hold after every event."""
        account = self.account
        if self.hub is not None:
            version = self.hub.engine.version
            near(self.hub.engine.base, account.weights[version], f"the base of version {version}")
            account.check_slots(self.hub.engine.data)
        for process in self.processes:
            head, track = process.head, process.track
            if head is None or track is None or not process.sound:
                continue
            if head.version not in account.weights:
                raise Broken(f"head {process.number} trains on version {head.version}, which never was")
            start, _ = account.start(process.number, track, head.version)
            expected = account.weights[head.version] + track.total - start
            near(effective_weights(head), expected, f"head {process.number} at version {head.version}")


def _again(start: Start, epoch: int) -> Start:
    return Start(**{**vars(start), "epoch": epoch})


def _one(found: list[Any], pick: int) -> Any:
    """One of a list; None if it is empty."""
    return found[pick % len(found)] if found else None
