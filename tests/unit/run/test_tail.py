"""Files of lines, read from their end and while they grow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.run import tail
from lte_ray.run.metrics_files import RunFile
from lte_ray.run.tail import LineFollower, is_event, parse_row, read_lines_back
from lte_ray.storage import RunDirectory

LINES = st.lists(st.binary(max_size=12).filter(lambda line: b"\n" not in line and line), max_size=12)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A folder for the file."""
    return RunDirectory.open(str(tmp_path_factory.mktemp("runs")), "", patience=0.0)


@given(lines=LINES, ended=st.booleans(), limit=st.integers(1, 60), block=st.integers(1, 9))
def test_lines_come_from_the_last_to_the_first(
    run: RunDirectory, lines: list[bytes], ended: bool, limit: int, block: int
) -> None:
    """All that lie within the limit, whatever the size of a block."""
    data = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    run.write("file", data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail, "BLOCK", block)
        read = list(read_lines_back(RunFile(run, "file"), limit))
        assert list(read_lines_back(RunFile(run, "file"), 10**6)) == lines[::-1]
    assert read == lines[::-1][: len(read)]
    assert sum(len(line) + 1 for line in read) <= limit + 1
    left_out = lines[::-1][len(read) :]
    assert not left_out or len(b"\n".join(lines[len(left_out) - 1 :])) + bool(ended) + 1 > limit


def test_no_file_has_no_lines(run: RunDirectory) -> None:
    """A run that hasn't merged yet."""
    assert list(read_lines_back(RunFile(run, "nothing"), 10)) == []
    assert LineFollower(RunFile(run, "nothing")).poll() == []


def test_a_follower_returns_what_is_new(run: RunDirectory) -> None:
    """A line that isn't complete comes once it is."""
    run.write("grows", b"one\ntw")
    follower = LineFollower(RunFile(run, "grows"))
    assert follower.poll() == [b"one"]
    assert follower.poll() == []
    run.append("grows", b"o\nthree\n")
    assert follower.poll() == [b"two", b"three"]


def test_a_follower_survives_that_a_resumed_run_rewrites_its_rows(run: RunDirectory) -> None:
    """Events that it has returned don't come again, and those that follow do, also if the file is as long as before."""
    merge, one, two, three = b'{"kind": "merge"}\n', *(b'{"kind": "event", "n": %d}\n' % n for n in (1, 2, 3))
    run.write("rows", merge + one + merge + two)
    follower = LineFollower(RunFile(run, "rows"), is_event)
    assert follower.poll() == [one.strip(), two.strip()]
    run.write("rows", one + two + three)
    assert follower.poll() == [three.strip()]
    run.write("rows", one + two)
    assert follower.poll() == []
    run.append("rows", three)
    assert follower.poll() == [three.strip()]


@pytest.mark.parametrize(
    "line", [b"", b"{", b"\xff", b"[1]", b"3", b'{"kind": 3}', b'{"at": 1}', b"[" * 100_000], ids=lambda x: str(x[:9])
)
def test_what_is_no_row_is_none(line: bytes) -> None:
    """Torn, of another kind, or nested without end."""
    assert parse_row(line) is None
