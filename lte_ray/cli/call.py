"""How one call of the command line runs: on which Ray, and what it prints where.

Results go to stdout; progress, notes, warnings and errors to stderr.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, Literal

from lte_ray.config.validation import check_booleans, setting

log = logging.getLogger("lte_ray")

JSON_HELP = "Print one JSON object on stdout, and nothing else there."
JSON_LINES_HELP = "Print JSON objects on stdout, one a line, and nothing else there."


@dataclass(frozen=True)
class CallOptions:
    """How this call runs: on which Ray, and what it prints. These don't belong to the run, and run.toml has none of them."""

    address: str | None = setting(
        None,
        "Ray to use, as in ray.init: auto, HOST:PORT, ray://HOST:PORT, or local (an own one). It wins over RAY_ADDRESS. By "
        "default an own Ray is started.",
    )
    json: bool = setting(False, "Print one JSON object on stdout (of a run its final metrics), and nothing else there.")
    quiet: bool = setting(False, "Show no progress and no notes; warnings and errors remain.")
    log_level: Literal["auto", "debug", "info", "warning", "error"] = setting(
        "auto", "What is reported on stderr in addition to progress; auto: info, with --quiet warning."
    )

    def __post_init__(self) -> None:
        check_booleans(self, "json", "quiet")

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Reports what the library logs on stderr, and uses the chosen Ray, for the block."""
        with _reporting(self.level), _using(self.address):
            yield

    @property
    def level(self) -> int:
        """The lowest level of messages that are shown."""
        chosen = ("warning" if self.quiet else "info") if self.log_level == "auto" else self.log_level
        return int(getattr(logging, chosen.upper()))


@contextlib.contextmanager
def _reporting(level: int) -> Iterator[None]:
    """Shows messages of the library from this level on. A program that has set up logging keeps its own handlers."""
    from lte_ray.run.display import TimedHandler

    before, handler = log.level, None if log.hasHandlers() else TimedHandler()
    log.setLevel(level)
    if handler is not None:
        log.addHandler(handler)
    try:
        yield
    finally:
        log.setLevel(before)
        if handler is not None:
            log.removeHandler(handler)


@contextlib.contextmanager
def _using(address: str | None) -> Iterator[None]:
    if address is None:
        yield
        return
    from lte_ray.runtime.cluster import use_address

    with use_address(address):
        yield


_stdout: list[IO[str]] = []
"""The output of `print_json` within `json_alone`."""


@contextlib.contextmanager
def json_alone() -> Iterator[None]:
    """Has what is printed go to stderr for the block, such as a worker's own lines, except for `print_json`."""
    _stdout.append(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout.pop()


def print_json(values: Mapping[str, Any]) -> None:
    """Prints one line of JSON: numbers that aren't finite as null, other objects as text."""
    print(json.dumps(_plain(values), allow_nan=False, default=str), file=_stdout[-1] if _stdout else sys.stdout, flush=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
