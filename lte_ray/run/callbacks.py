"""Callbacks: code of a user that the driver calls while a run goes on."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lte_ray.errors import ConfigError, RunError
from lte_ray.import_object import load_object
from lte_ray.run.error_log import ErrorLog
from lte_ray.run.metrics import Row
from lte_ray.run.stopping import Stop, StopRules
from lte_ray.storage import RunDirectory

log = logging.getLogger("lte_ray")

FAILURES = frozenset(
    {"coordinator_lost", "ended_early", "evaluator_lost", "head_dropped", "head_hung", "head_lost", "head_quarantined"}
    | {"node_drains", "processes_restart", "refused", "rolled_back", "storage"}
)
"""Other events that `Callback.on_failure` receives, too."""


@dataclass(frozen=True)
class Run:
    """A run, as callbacks see it.

    Attributes:
        name: of the run.
        path: of its directory, as in ``Result.path``.
        settings: all that ``run.toml`` has, by name; the worker's own are under "worker".
    """

    name: str
    path: str
    settings: Mapping[str, Any]
    _rules: StopRules = field(repr=False)

    def stop(self, reason: str) -> None:
        """Ends the run after the merge that is under way, at the earliest after its first, without an error.

        Heads save their states into a last checkpoint, and the merged weights are exported and evaluated. A resumed run goes
        on from there. Any thread may call this; only the first call counts.
        """
        self._rules.request(Stop("request", str(reason)))


class Callback:
    """Follows a run, in the driver. Override the methods that you need.

    Heads train on while a method runs, but the driver waits for it. If a method raises, or calls `sys.exit`, a warning says so,
    its traceback goes to ``errors.log``, and the callback isn't called again; the run goes on. Call ``run.stop`` to end it.
    Rows are copies of those of ``metrics.jsonl``. Once the run is interrupted, only `on_run_end` is called. If a run goes back
    to an earlier version, rows of the versions after it come again.
    """

    @property
    def label(self) -> str:
        """What warnings call it."""
        return type(self).__name__

    def on_run_start(self, run: Run) -> None:
        """The run has its directory; no process has started yet. A resumed run starts, too."""

    def on_merge(self, run: Run, row: Row) -> None:
        """Contributions were merged."""

    def on_evaluation(self, run: Run, row: Row) -> None:
        """A version was evaluated: its figures are in ``row["values"]``."""

    def on_checkpoint(self, run: Run, version: int) -> None:
        """A checkpoint of this version is complete."""

    def on_event(self, run: Run, row: Row) -> None:
        """Something happened: ``row["event"]`` says what."""

    def on_failure(self, run: Run, row: Row) -> None:
        """Something failed, or a node drains: a process was lost, a contribution was refused, ... `on_event` gets it, too."""

    def on_run_end(self, run: Run, outcome: Any) -> None:
        """The run has ended: with a `ray.train.Result`, or with the error that ended it early."""


class CallbackList:
    """Calls callbacks in turn, and switches off those that raise.

    Args:
        callbacks: in the order in which they are called.
        run: of which they are told.
        directory: of the run, whose ``errors.log`` gets their tracebacks.
    """

    def __init__(self, callbacks: Sequence[Callback], run: Run, directory: RunDirectory) -> None:
        self._callbacks, self._run, self._errors = list(callbacks), run, ErrorLog(directory)
        self._interrupted = False

    @property
    def rules(self) -> StopRules:
        """By which the run ends early."""
        return self._run._rules

    @contextlib.contextmanager
    def running(self) -> Iterator[list[Any]]:
        """Tells of the run's start before the block, and of its end after it. The block adds the result to the list."""
        results: list[Any] = []
        self._call("on_run_start")
        try:
            yield results
        except BaseException as error:
            self._call("on_run_end", error)
            raise
        self._call("on_run_end", *results)

    def handle_row(self, row: Row) -> None:
        """A row was added to the metrics."""
        if self._interrupted:  # the process must end soon
            return
        if row["kind"] != "event":
            self._call("on_merge" if row["kind"] == "merge" else "on_evaluation", row)
            return
        self._call("on_event", row)
        if row["event"] in FAILURES:
            self._call("on_failure", row)

    def handle_checkpoint(self, version: int) -> None:
        """A checkpoint is complete."""
        self._call("on_checkpoint", version)

    def _call(self, method: str, *arguments: Any) -> None:
        for callback in list(self._callbacks):
            try:
                own = [copy.deepcopy(each) if isinstance(each, dict) else each for each in arguments]  # it may change a row
                getattr(callback, method)(self._run, *own)
            except KeyboardInterrupt:
                self._interrupted = True
                raise
            except (Exception, SystemExit) as error:
                self._callbacks.remove(callback)
                name = callback.label
                what = f"The callback {name} raised {type(error).__name__} in {method}: {error}"
                place = self._errors.record(RunError(f"{what}\n\n{traceback.format_exc()}"), f"callback {name}")
                details = f" Details: {place}" if place else ""
                log.warning("%s. It isn't called again; the run goes on.%s", what.rstrip("."), details)


def load_callbacks(given: Sequence[Any], specs: Sequence[str]) -> list[Callback]:
    """Returns the callbacks of a run.

    Args:
        given: callbacks, or their classes.
        specs: ``--callback``: classes without arguments or instances, as package.module:Class or path/to/file.py:Class.

    Raises:
        ConfigError: one can't be imported or made, or isn't a `Callback`.
    """
    loaded = [(spec, load_object(spec, what="--callback", error=ConfigError)) for spec in specs]
    return [_make(f"callbacks has {each!r}", each) for each in given] + [
        _make(f"--callback is {spec!r}", each) for spec, each in loaded
    ]


def _make(what: str, given: Any) -> Callback:
    made = given
    if inspect.isclass(given) and issubclass(given, Callback):
        try:
            made = given()
        except Exception as error:
            raise ConfigError(f"{what}, which can't be made without arguments: {type(error).__name__}: {error}") from error
    if not isinstance(made, Callback):
        kind = made.__name__ if inspect.isclass(made) else type(made).__name__
        raise ConfigError(f"{what}, but {kind} isn't a callback. Derive it from lte_ray.Callback.")
    return made
