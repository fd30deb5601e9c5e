"""What the driver decides about places in the cluster and processes that are gone, without a Ray."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError

from lte_ray import FailureConfig
from lte_ray.engine.failure_policy import FailurePolicy
from lte_ray.errors import CoordinatorLost, HeadLost
from lte_ray.messages import HeadStatus
from lte_ray.runtime.controller import failure_handling
from lte_ray.runtime.controller.failure_handling import FailureHandler
from lte_ray.runtime.controller.head_actors import HeadActorGroup, HeadActorSlot
from lte_ray.runtime.head.client import ReconnectingStub
from lte_ray.runtime.ray_errors import to_lte_error


class Places:
    """A cluster with room for so many more actors."""

    patience = 30.0

    def __init__(self, room: int = 0) -> None:
        self.room = room
        self.spared: list[Any] = []

    def add_bundle(self) -> Any:
        self.room -= 1
        return "a place" if self.room >= 0 else None

    def release_bundle(self, strategy: Any) -> None:
        self.spared.append(strategy)


class Actor:
    """A process that takes any call."""

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *args: (name, args))


def mend(numbers: list[tuple[int, ...]], room: int = 0, **failure: Any) -> FailureHandler:
    """The driver's side of a run whose processes host these heads, all of them training."""
    hub = SimpleNamespace(coordinator=Actor(), epoch=0)
    crew = HeadActorGroup(hub, lambda *_: Actor(), lambda _: None)  # type: ignore[arg-type]
    config = FailureConfig(**{"exhausted": "drop", **failure})
    events: list[dict[str, Any]] = []
    session = SimpleNamespace(
        crew=crew,
        hub=hub,
        failure=config,
        failures=FailurePolicy(config),
        initial=SimpleNamespace(plans=range(8)),
        statuses={n: HeadStatus(n, state="training") for process in numbers for n in process},
        log=SimpleNamespace(record_event=lambda event, **more: events.append({"event": event, **more})),
        merges=[],
        is_now=lambda heads, state: None,
    )
    crew.launch_all([(process, process) for process in numbers])
    for member in crew.members:
        crew.start(member)
        member.pulse.answered = member.pulse.begun = time.monotonic()
    made = FailureHandler(session, Places(room))  # type: ignore[arg-type]
    made.events = events  # type: ignore[attr-defined]
    return made


def told(made: FailureHandler, event: str) -> list[dict[str, Any]]:
    return [row for row in made.events if row["event"] == event]  # type: ignore[attr-defined]


def lose_place(made: FailureHandler, member: HeadActorSlot, seconds: float = 31.0) -> None:
    """Its process died, and the next one has waited for a place for so long."""
    made._session.crew.clear(member)
    made._session.crew.start(member)
    made._do_without(member, seconds)


def grow(made: FailureHandler) -> None:
    made._grow(time.monotonic() + 2 * failure_handling.GROW)
    made._grown = time.monotonic() - 2 * failure_handling.GROW


def test_heads_of_one_process_come_back_together() -> None:
    """Both are dropped for lack of a place, and share one again."""
    made = mend([(0, 1), (2, 3)], room=1)
    lose_place(made, made._session.crew.members[1])
    assert [row["heads"] for row in told(made, "head_dropped")] == [[2, 3]]
    assert made._places.spared == [(2, 3)]  # type: ignore[attr-defined]
    grow(made)
    back = made._session.crew.members[-1]
    assert (back.numbers, back.incarnation, back.strategy) == ((2, 3), 2, "a place")
    assert [row["head"] for row in told(made, "head_added")] == [2, 3]
    grow(made)
    assert len(made._session.crew.members) == 2


def test_no_head_comes_back_without_room() -> None:
    """It is asked for again later."""
    made = mend([(0,), (1,)])
    lose_place(made, made._session.crew.members[1])
    grow(made)
    assert not told(made, "head_added")
    made._places.room = 1  # type: ignore[attr-defined]
    grow(made)
    assert [row["head"] for row in told(made, "head_added")] == [1]


def test_a_quarantined_head_keeps_nobody_from_coming_back() -> None:
    """Its place is over, but the run isn't; once a head has taken all its steps, it is."""
    made = mend([(0,), (1,), (2,)], room=1)
    crew, statuses = made._session.crew, made._session.statuses
    crew.over(crew.members[0])
    statuses[0] = HeadStatus(0, state="done")
    lose_place(made, crew.members[2])
    grow(made)
    assert not told(made, "head_added")
    statuses[0] = HeadStatus(0, state="quarantined")
    grow(made)
    assert [row["head"] for row in told(made, "head_added")] == [2]


def test_heads_that_have_ended_are_nobody_to_go_on_with() -> None:
    """The last head that trains isn't dropped for lack of a place: what is left of its steps would never be taken."""
    made = mend([(0,), (1,)])
    crew = made._session.crew
    crew.over(crew.members[0])
    lose_place(made, crew.members[1])
    lose_place(made, crew.members[1])
    assert not told(made, "head_dropped")
    assert len(crew.members) == 2
    assert ["no place" in row["why"] for row in told(made, "waits_for_place")] == [True, True]  # once for each process
    made._do_without(crew.members[1], 99.0)
    assert len(told(made, "waits_for_place")) == 2


def test_a_head_that_died_too_often_does_not_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the run may have more heads than it has now: another number is taken."""
    made = mend([(0,), (1,)], room=1, head_failures=0, max_heads=2)
    monkeypatch.setattr(ray, "get", lambda ref, timeout: None)
    made._head_lost(made._session.crew.members[1], HeadLost("it died"))
    assert [row["heads"] for row in told(made, "head_dropped")] == [[1]]
    grow(made)
    assert [row["head"] for row in told(made, "head_added")] == [2]


def test_what_the_driver_was_busy_with_says_nothing_of_the_heads() -> None:
    """A minute in which it wrote to a slow disk makes no head's step, and no answer, a minute long."""
    made = mend([(0,)])
    crew = made._session.crew
    (member,) = crew.members
    now = time.monotonic()
    member.asked, member.pulse.moved, crew._looked = ("status", now - 60.0), now - 61.0, now - 60.0
    crew._overlook()
    assert now - member.pulse.moved == pytest.approx(3.0, abs=0.5)
    assert now - member.asked[1] == pytest.approx(2.0, abs=0.5)
    crew._looked = time.monotonic() - 1.0
    before = member.pulse.moved
    crew._overlook()
    assert member.pulse.moved == before


def test_a_process_that_rays_memory_monitor_ended_is_gone_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray calls it by another name: the line waits for the next coordinator, and the error is ours."""
    error = OutOfMemoryError("the node was short of memory")
    assert isinstance(to_lte_error(error, "the coordinator"), CoordinatorLost)
    answers: list[Any] = [error, ActorDiedError(), 7]

    def get(ref: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            line.connect(Actor(), line.epoch + 1)  # as the driver does
            raise answer
        return answer

    monkeypatch.setattr(ray, "get", get)
    line = ReconnectingStub(Actor(), 0)
    assert line.call("contribute") == (2, 7)
