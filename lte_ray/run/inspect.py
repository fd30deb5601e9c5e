"""What a run's files tell about it, while it goes on and afterwards. Imports neither torch nor Ray, and changes nothing."""

from __future__ import annotations

import calendar
import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.coordinator.step_budget import is_shared
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError, LTEError, StorageError
from lte_ray.messages import HeadStatus
from lte_ray.redaction import printable, without_credentials
from lte_ray.run.environment import ENVIRONMENT
from lte_ray.run.metrics import Progress, Row
from lte_ray.run.newest_rows import GONE, Ending, NewestRows, to_number
from lte_ray.run.run_toml import RunRecord, read
from lte_ray.storage import MODEL, RUN, Driver, RunDirectory, find_driver
from lte_ray.storage.checkpoints import newest_version

T = TypeVar("T")

State = Literal["running", "finished", "stopped", "ended-early", "silent"]

PATIENCE = 5.0
"""Seconds for which reading is repeated while storage fails."""

QUIET, QUIET_MERGES = 120.0, 5
"""When a run without a new row counts as silent, if nothing tells whether its driver is alive: after QUIET seconds, and after
QUIET_MERGES times the time between two merges."""

THREADS = 8
"""Runs that are read at once."""


@dataclass(frozen=True)
class RunStatus:
    """A run, as its files show it.

    Attributes:
        directory: of the run.
        state: "running"; "finished"; "stopped", saved and exported before its last step; "ended-early", with an error or an
            interrupt; or "silent", without any sign of life.
        why: the reason of the state, in words; empty if there is none to tell.
        since: the newest sign of life (Unix time): a row, or the start; None if there is none.
        driver: the process that trains it, as far as that can be told.
        progress: as displays show it.
        program: the worker; empty if that isn't known.
        has_model: whether the merged weights were exported.
        events: rows of the newest ones, oldest first.
        missing: what couldn't be read, one sentence each.
    """

    directory: RunDirectory
    state: State
    why: str
    since: float | None
    driver: Driver
    progress: Progress
    program: str
    has_model: bool
    events: tuple[Row, ...]
    missing: tuple[str, ...]

    @property
    def is_over(self) -> bool:
        """Whether no process trains the run any more."""
        return self.state != "running" and not (self.state == "silent" and self.driver.alive is None)

    @property
    def is_resumable(self) -> bool:
        """Whether ``lte-ray resume`` would continue it from a checkpoint before its last step."""
        return self.state not in ("running", "finished") and self.progress.checkpoint is not None

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        p = self.progress
        evaluation = None if p.evaluation is None else {"version": p.evaluation.version, **p.evaluation.values}
        return {
            "run": self.directory.display,
            "name": p.run,
            "state": self.state,
            "why": self.why,
            "since": self.since,
            "resumable": self.is_resumable,
            "driver_alive": self.driver.alive,
            "driver": self.driver.name,
            "worker": self.program,
            "baseline": p.baseline,
            "step": p.step,
            "steps": p.steps,
            "version": p.version,
            "samples": p.samples,
            "samples_per_second": p.samples_per_second,
            "train_loss": p.train_loss,
            "evaluation": evaluation,
            "seconds": p.seconds,
            "remaining_seconds": p.remaining,
            "checkpoint": p.checkpoint,
            "model": self.has_model,
            "heads": {
                str(h.head): {name: getattr(h, name) for name in ("step", "samples", "loss", "version", "state", "device")}
                for h in p.heads
            },
            "note": p.note or p.stalled,
            "events": list(self.events),
            "missing": list(self.missing),
        }


def inspect_run(directory: RunDirectory) -> RunStatus:
    """Reads how far a run is.

    Of ``metrics.jsonl`` only the end is read, so a long run takes no longer than a short one.

    Raises:
        StorageError: there is no run, or storage fails.
    """
    missing: list[str] = []
    record = _read_record(directory, missing)
    settings = _read_settings(record, missing)
    start = _read_start(directory, missing)
    rows = NewestRows.read(directory, settings.lte.num_heads, evaluates=settings.train.eval_every > 0)
    driver, checkpoint, now = find_driver(directory), newest_version(directory), time.time()
    missing += rows.problems(is_alive=driver.alive)
    model_at, toml_at = directory.modified_at(MODEL), directory.modified_at(RUN)
    since = max((at for at in (rows.newest_at, start.at) if at is not None), default=toml_at)
    silence = 0.0 if since is None else max(0.0, now - since)
    ending = rows.ending(start.at)
    if not ending.known and model_at is not None and model_at >= (toml_at or math.inf):  # of a release without that event
        ending = dataclasses.replace(ending, finished=True)
    quiet_after = max(QUIET, QUIET_MERGES * rows.seconds_per_merge)
    state, why = _judge(ending, driver, silence, quiet_after)
    progress = _make_progress(settings, rows, start, checkpoint)
    if state == "running":
        note = ending.note or _describe_start(rows, start)
        stalled = f"no row for {silence:.0f} s" if silence >= quiet_after / 2 else ""
        seconds = now - start.at if start.at else progress.seconds
        progress = dataclasses.replace(progress, seconds=seconds, note=note, stalled=stalled)
    else:
        progress = dataclasses.replace(progress, remaining=None)
    return RunStatus(
        directory=directory,
        state=state,
        why=why,
        since=since,
        driver=driver,
        progress=progress,
        program=str(record.content.get("program", "")),
        has_model=directory.exists(MODEL),
        events=tuple(reversed(rows.events)),
        missing=tuple(missing),
    )


def _judge(ending: Ending, driver: Driver, silence: float, quiet_after: float) -> tuple[State, str]:
    """The state of a run, and why, by what it has said and for how many seconds it has said nothing."""
    if driver.alive:
        return "running", ""
    if ending.ended_early:
        return "ended-early", ending.why
    if ending.finished:
        return ("stopped", ending.why) if ending.stopped else ("finished", "")
    if driver.alive is False:
        return "silent", "its driver ended without saying why"
    if silence >= quiet_after:
        return "silent", f"no row for {silence:.0f} s, and nothing tells here whether its driver is alive"
    return "running", ""


def list_runs(storage: str) -> list[RunDirectory]:
    """Returns the runs in a storage: the folders with a ``run.toml``.

    Raises:
        StorageError: there is no such folder, it is a run, or storage fails.
    """
    opened = RunDirectory.open(storage, "", patience=PATIENCE)
    folder = dataclasses.replace(opened, path=opened.path.rstrip("/") or "/")
    if folder.exists(RUN):
        shown = without_credentials(storage)
        raise StorageError(f"{shown} is a run, not a folder of runs. See it with lte-ray status {shown}.")
    if not folder.exists():
        raise StorageError(f"There is no folder {without_credentials(storage)}. Give the folder or URI that runs are in.")
    names = [name for name in folder.list_names() if not name.startswith(".")]
    runs = [RunDirectory.open(storage, name, patience=PATIENCE) for name in names]
    return [run for run, is_run in zip(runs, _at_once(lambda run: run.exists(RUN), runs), strict=True) if is_run]


def inspect_runs(runs: list[RunDirectory]) -> list[RunStatus | StorageError]:
    """Reads several runs at once, each as `inspect_run`. Returns the error of one that can't be read."""

    def inspect(run: RunDirectory) -> RunStatus | StorageError:
        try:
            return inspect_run(run)
        except StorageError as error:
            return error

    return _at_once(inspect, runs)


def _at_once(call: Callable[[RunDirectory], T], runs: list[RunDirectory]) -> list[T]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(call, runs))


# -- what a run was started with --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Start:
    """The newest start of the run: when (Unix time; None if unknown), and by head its device."""

    at: float | None
    devices: Mapping[str, Any]


def _read_record(directory: RunDirectory, missing: list[str]) -> RunRecord:
    if not directory.exists(RUN):
        return read(directory)  # which says that there is no run
    try:
        return read(directory)
    except StorageError as error:
        missing.append(str(error))
        return RunRecord(directory, {})


def _read_settings(record: RunRecord, missing: list[str]) -> Settings:
    """The settings; defaults for those that can't be read."""

    def section(kind: Callable[..., T]) -> T:
        try:
            return record.settings(kind)
        except (ConfigError, StorageError) as error:
            missing.append(f"{error} Defaults are shown instead.")
            return kind()

    name = printable(record.directory.path.rpartition("/")[2])
    lte, merge, train = section(LTEConfig), section(MergeConfig), section(TrainConfig)
    try:
        return Settings(name, lte, merge, train).resolved()
    except ConfigError as error:
        missing.append(f"{record.path}: {error}")
        return Settings(name, lte, MergeConfig(), TrainConfig(steps=train.steps, eval_every=train.eval_every))


def _read_start(directory: RunDirectory, missing: list[str]) -> _Start:
    try:
        start = json.loads(directory.read(ENVIRONMENT))["starts"][-1]
        at = calendar.timegm(time.strptime(start["at"], "%Y-%m-%dT%H:%M:%SZ"))
        devices = start.get("devices")
        return _Start(float(at), devices if isinstance(devices, dict) else {})
    except (LTEError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        missing.append(f"{ENVIRONMENT} can't be read, so the time of the last start isn't known.")
        return _Start(None, {})


# -- progress ---------------------------------------------------------------------------------------------------------------


def _make_progress(settings: Settings, rows: NewestRows, start: _Start, checkpoint: int | None) -> Progress:
    """The run as displays show it, without what only a run that goes on has."""
    heads = tuple(
        HeadStatus(
            head=head,
            step=place.step,
            samples=place.samples,
            loss=place.loss,
            version=place.version,
            state=rows.head_states.get(head, ""),
            device=printable(str(start.devices.get(str(head), ""))),
        )
        for head, place in sorted(rows.places.items())
    )
    steps = [h.step for h in heads if h.state not in GONE] or [h.step for h in heads]
    taken = sum(h.step for h in heads) // settings.lte.num_heads if is_shared(settings) else min(steps, default=0)
    rate = rows.seconds_per_step(len(heads))
    return Progress(
        run=settings.run,
        step=taken,
        steps=settings.train.steps,
        samples=sum(h.samples for h in heads),
        samples_per_second=rows.samples_per_second,
        version=rows.newest_version if rows.merges else checkpoint or 0,
        heads=heads,
        evaluation=rows.evaluation,
        seconds=max(0.0, (rows.newest_at or 0.0) - start.at) if start.at else 0.0,
        remaining=None if rate is None else rate * max(0, settings.train.steps - taken),
        checkpoint=checkpoint,
        baseline=settings.train.baseline,
    )


def _describe_start(rows: NewestRows, start: _Start) -> str:
    """That a run starts; empty once it has merged something."""
    merged_at = to_number(rows.merges[0].get("at")) if rows.merges else None
    starts = merged_at is None or (start.at is not None and merged_at < start.at)
    return "no merge yet since the start" if starts else ""
