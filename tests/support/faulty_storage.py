"""A filesystem that fails as a script says: around a local one, in every process that it is sent to.

The script is a JSON file, read at every operation, so a test can change it while others run::

    [{"kind": "fail", "op": "write", "match": "*/head-0001*", "nth": [1, 2], "errno": "ENOSPC"},
     {"kind": "tear", "op": "write", "match": "*/manifest.json*", "nth": [1], "errno": "EIO"},
     {"kind": "swallow", "op": "write", "match": "*"},
     {"kind": "slow", "op": "read", "match": "*", "seconds": 0.2},
     {"kind": "fail", "op": "*", "match": "*", "while": "/a/flag"}]

`op` is write, append, read, look (file infos and listings), make, move or delete; `match` is a pattern for the whole path.
`nth` counts the matching operations of all processes from 1; without it all are meant. `while`: only as long as
that file is there. tear writes half of the data and then raises; swallow writes half and says nothing.
"""

from __future__ import annotations

import errno
import fnmatch
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from lte_ray.storage import RunDirectory


def faulty(root: Path, name: str = "run", *, patience: float = 60.0) -> tuple[RunDirectory, FaultScript]:
    """Returns a run directory in `root`/storage on such a filesystem, and its script, which is empty."""
    script = FaultScript(str(root / "script.json"))
    script.write()
    filesystem = pafs.PyFileSystem(FaultyHandler(script.path))
    return RunDirectory.open(str(root / "storage"), name, filesystem, patience=patience), script


def fail(kind: str = "fail", op: str = "write", **more: Any) -> dict[str, Any]:
    return {"kind": kind, "op": op, "match": "*", **more}


class FakeClock:
    """A clock that only waiting advances; it can run an action while waiting."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.meanwhile()
        self.now += seconds


@dataclass(frozen=True)
class FaultScript:
    """The scripted faults, in a file."""

    path: str

    def write(self, *faults: dict[str, Any]) -> None:
        """Replaces all faults; counts restart."""
        for count in Path(self.path).parent.glob("script.json.*"):
            count.unlink()
        part = Path(self.path + "-part")
        part.write_text(json.dumps(faults))
        part.replace(self.path)

    def count_met(self, index: int = 0) -> int:
        """Returns how many operations the fault with this index has matched so far, in all processes."""
        count = Path(f"{self.path}.{index}")
        return count.stat().st_size if count.exists() else 0

    def faults(self, op: str, path: str) -> list[dict[str, Any]]:
        """Returns the faults for this operation, and counts it."""
        due = []
        for index, fault in enumerate(json.loads(Path(self.path).read_text())):
            if fault["op"] not in ("*", op) or not fnmatch.fnmatch(path, fault["match"]):
                continue
            if "while" in fault and not Path(fault["while"]).exists():
                continue
            with open(f"{self.path}.{index}", "ab", buffering=0) as count:  # appending is atomic: one byte an operation
                count.write(b".")
                number = count.tell()
            if number in fault.get("nth", [number]):
                due.append(fault)
        return due

    def apply(self, op: str, path: str) -> list[dict[str, Any]]:
        """Sleeps or raises; returns the faults that the operation itself must apply."""
        due = self.faults(op, path)
        for fault in due:
            if fault["kind"] == "slow":
                time.sleep(fault["seconds"])
            if fault["kind"] == "fail":
                raise error_of(fault)
        return [fault for fault in due if fault["kind"] in ("tear", "swallow")]


def error_of(fault: dict[str, Any]) -> OSError:
    number = getattr(errno, fault.get("errno", "EIO"))
    return OSError(number, os.strerror(number))


class TornStream:
    """A stream that writes only half of its input."""

    def __init__(self, stream: Any, fault: dict[str, Any]) -> None:
        self._stream, self._fault = stream, fault
        self.closed = False

    def write(self, data: Any) -> int:
        data = bytes(data)
        self._stream.write(data[: len(data) // 2])
        if self._fault["kind"] == "tear":
            raise error_of(self._fault)
        return len(data)

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        self.closed = True
        self._stream.close()


class FaultyHandler(pafs.FileSystemHandler):
    """Local files with the script's faults. It can be pickled for other processes."""

    def __init__(self, script: str) -> None:
        self._script = FaultScript(script)
        self._local = pafs.LocalFileSystem()

    def __reduce__(self) -> tuple[Any, ...]:
        return FaultyHandler, (self._script.path,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FaultyHandler) and other._script == self._script

    def __hash__(self) -> int:
        return hash(self._script)

    def get_type_name(self) -> str:
        return "faulty"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[Any]:
        for path in paths:
            self._script.apply("look", path)
        return list(self._local.get_file_info(paths))

    def get_file_info_selector(self, selector: Any) -> list[Any]:
        self._script.apply("look", selector.base_dir)
        return list(self._local.get_file_info(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        self._script.apply("make", path)
        self._local.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self._script.apply("delete", path)
        self._local.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._script.apply("delete", path)
        self._local.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        self._script.apply("delete", path)
        self._local.delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self._script.apply("move", dest)
        self._local.move(src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self._script.apply("write", dest)
        self._local.copy_file(src, dest)

    def open_input_stream(self, path: str) -> Any:
        self._script.apply("read", path)
        return self._local.open_input_stream(path)

    def open_input_file(self, path: str) -> Any:
        self._script.apply("read", path)
        return self._local.open_input_file(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        torn = self._script.apply("write", path)
        stream = self._local.open_output_stream(path, metadata=metadata)
        return pa.PythonFile(TornStream(stream, torn[0]), mode="w") if torn else stream

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        torn = self._script.apply("append", path)
        stream = self._local.open_append_stream(path, metadata=metadata)
        return pa.PythonFile(TornStream(stream, torn[0]), mode="w") if torn else stream
