"""The lease of a run on an object store, with a store in memory and clocks that the tests advance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lte_ray.errors import LeaseLost, StorageError
from lte_ray.storage import RunDirectory, check_unlocked, conditional, exclusive_lock, find_driver, lease, ownership
from lte_ray.storage.conditional import Tag, Unsupported
from lte_ray.storage.lease import LIFETIME, RENEW_INTERVAL, SAFE, Lease, hold_lease, serialize
from lte_ray.storage.ownership import LEASE
from tests.support.faulty_storage import faulty


class MemoryObject:
    """A lease's object in a file, as `ConditionalObject` has it. Each write gets another tag.

    Attributes:
        fails: called before each operation.
        loses_answers: writes that happen but are reported as a failure.
        ignores: whether conditions are ignored.
    """

    kind = "s3"

    def __init__(self, path: Path) -> None:
        self.path, self.tag = path, 0
        self.fails: Callable[[], None] = lambda: None
        self.loses_answers, self.ignores = 0, False

    def read(self) -> tuple[bytes, Tag] | None:
        self.fails()
        return (self.path.read_bytes(), self._tag) if self.path.exists() else None

    def create(self, data: bytes) -> Tag | None:
        self.fails()
        return None if self.path.exists() and not self.ignores else self._write(data)

    def replace(self, data: bytes, tag: Tag) -> Tag | None:
        self.fails()
        return self._write(data) if self.ignores or (self.path.exists() and tag == self._tag) else None

    @property
    def _tag(self) -> Tag:
        return {"e_tag": str(self.tag)}

    def _write(self, data: bytes) -> Tag:
        self.path.write_bytes(data)
        self.tag += 1
        if self.loses_answers:
            self.loses_answers -= 1
            raise OSError("the connection was reset")
        return self._tag


class World:
    """One store, and a clock that waiting advances; while time passes, `meanwhile` happens."""

    def __init__(self, path: Path) -> None:
        self.directory, _ = faulty(path, patience=5.0)
        self.directory.create()
        self.stored = MemoryObject(Path(self.directory.path) / LEASE)
        self.now, self.waits = 0.0, 0.0
        self.meanwhile: Callable[[], None] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.now, self.waits = self.now + seconds, self.waits + seconds
        self.meanwhile()

    def lease(self) -> Lease:
        """A lease that is held, without a thread that renews it."""
        taken, owner = lease._acquire(self.directory)
        ownership.hold(owner, taken.check)
        return taken

    def content(self) -> dict[str, object]:
        return dict(json.loads(self.stored.path.read_bytes()))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(tmp_path)
    monkeypatch.setattr(lease, "ConditionalObject", lambda directory, name: made.stored)
    monkeypatch.setattr(lease, "clock", lambda: made.now)
    monkeypatch.setattr(lease, "sleep", made.sleep)
    monkeypatch.setattr("lte_ray.storage.retry.sleep", lambda seconds: None)
    return made


def test_the_numbers_leave_time_to_write() -> None:
    """A holder misses two renewals before it must ask, and asks well before others may take the lease."""
    assert 3 * RENEW_INTERVAL < SAFE
    assert SAFE + RENEW_INTERVAL < LIFETIME


def test_a_second_driver_is_refused_as_soon_as_the_first_renews(world: World) -> None:
    """It says who trains the run. Clocks of machines don't matter: nothing of the lease is a time."""
    first = world.lease()
    world.meanwhile = first.renew
    with pytest.raises(StorageError, match=r"is being trained by process \d+ on .*\. Wait until it ends"):
        check_unlocked(world.directory)
    assert world.waits < RENEW_INTERVAL
    with pytest.raises(StorageError, match="is being trained by process"), exclusive_lock(world.directory):
        pass
    assert not any("at" in name or "time" in name for name in world.content())


def test_a_lease_whose_driver_died_is_taken_over_without_anybodys_help(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """It takes the lease's lifetime, and the log says so. The driver that comes back stops before it writes."""
    first = world.lease()
    check_unlocked(world.directory)  # as a run does first: then it isn't watched a second time
    with exclusive_lock(world.directory) as second:
        assert LIFETIME <= world.waits < LIFETIME + 5
        assert f"waiting {LIFETIME:.0f} s for a sign of it" in caplog.text
        second.write("file", b"second")
        old = RunDirectory(world.directory.filesystem, world.directory.path, None, 5.0, first._owner)
        with pytest.raises(LeaseLost, match=r"was taken over: process .* has its lease now.*writes nothing more"):
            old.write("file", b"first")
        for write in (lambda: old.append("file", b"first"), lambda: old.delete("file"), old.check_lease):
            with pytest.raises(LeaseLost):
                write()
        assert old.read("file") == b"second"
    assert world.content()["released"]


def test_a_driver_that_ends_leaves_a_free_lease(world: World) -> None:
    """The next one doesn't wait, and status knows that no driver is alive."""
    assert find_driver(world.directory).alive is None
    with exclusive_lock(world.directory):
        assert find_driver(world.directory).alive is None
        assert " on " in find_driver(world.directory).name
    assert find_driver(world.directory).alive is False
    with exclusive_lock(world.directory):
        pass
    assert world.waits == 0


def test_of_two_drivers_that_take_a_lease_at_once_one_gets_it(world: World) -> None:
    """Whether it is new or was left behind."""
    create, replace = world.stored.create, world.stored.replace

    def late(data: bytes, *tag: Tag) -> Tag | None:
        world.stored.create, world.stored.replace = create, replace  # type: ignore[method-assign]
        other = create(serialize("other", 1)) if not tag else replace(serialize("other", 1), *tag)
        assert other is not None
        return create(data) if not tag else replace(data, *tag)

    for _ in range(2):
        world.stored.create = world.stored.replace = late  # type: ignore[assignment,method-assign]
        with pytest.raises(StorageError, match=r"has just been taken by process"), hold_lease(world.directory):
            pass
        assert world.content()["owner"] == "other"


def test_an_answer_that_was_lost_loses_no_lease(world: World) -> None:
    """The write happened: the next try finds its own content there."""
    world.stored.loses_answers = 1
    first = world.lease()
    world.stored.loses_answers = 1
    with pytest.raises(OSError, match="reset"):
        first.renew()
    first.renew()
    first.check()
    assert world.content()["number"] == 4


def test_a_driver_that_storage_cuts_off_asks_before_it_writes(world: World) -> None:
    """While it can't renew, it fails as storage does, without being stopped. Later it goes on if the lease is still there."""
    first = world.lease()

    def refuse() -> None:
        raise OSError("no route to host")

    world.stored.fails = refuse
    first.check()  # the last renewal is recent
    world.now += SAFE + 1
    first.check(may_wait=False)
    with pytest.raises(OSError, match="no route"):
        first.check()
    world.now += 10 * LIFETIME
    world.stored.fails = lambda: None
    first.check()
    world.stored.path.unlink()
    world.now += SAFE + 1
    with pytest.raises(LeaseLost, match="its lease was removed"):
        first.check()


def test_heads_and_coordinator_stop_writing_when_another_driver_has_the_run(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They know the owner alone and read the lease, but not for each write."""
    monkeypatch.setattr(ownership.time, "monotonic", lambda: world.now)
    with hold_lease(world.directory) as directory:
        held = ownership._held.pop(directory.owner)  # as in another process
        directory.write("part", b"1")
        world.stored.path.write_bytes(serialize("other", 1))
        directory.write("part", b"2")
        world.now += ownership.CHECK_INTERVAL
        with pytest.raises(StorageError, match=r"isn't written any more: process .* has its lease now"):
            directory.write("part", b"3")
        assert directory.read("part") == b"2"
        ownership._held[directory.owner] = held


def test_where_conditions_are_ignored_or_impossible_the_log_says_so_once(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on without a lease."""
    world.stored.ignores = True
    with exclusive_lock(world.directory) as directory:
        assert directory.owner == ""
        directory.write("file", b"1")
    assert "Nothing keeps a second driver from training the run" in caplog.text
    assert "the store ignores the conditions of writes. Start it only once." in caplog.text
    caplog.clear()
    monkeypatch.setattr(lease, "ConditionalObject", conditional.ConditionalObject)
    with exclusive_lock(world.directory):
        pass
    assert caplog.text.count("only of S3, Google Cloud Storage and Azure") == 1


def test_without_obstore_a_lease_that_another_holds_still_counts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be read, though not taken."""
    first = world.lease()
    world.meanwhile = first.renew

    def refuse(directory: RunDirectory, name: str) -> None:
        raise Unsupported("the package obstore isn't installed: pip install 'lte-ray[cloud]'")

    monkeypatch.setattr(lease, "ConditionalObject", refuse)
    with pytest.raises(StorageError, match="is being trained by"), exclusive_lock(world.directory):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"seconds": "x"}', b'{"seconds": true, "process": 7}'])
def test_a_lease_with_any_content_is_taken_over(world: World, content: bytes) -> None:
    """It may have been edited."""
    world.stored.path.write_bytes(content)
    with exclusive_lock(world.directory) as directory:
        assert directory.owner == world.content()["owner"]
    assert world.waits <= LIFETIME + 5
