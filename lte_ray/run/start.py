"""Checks whether a run may start in its directory, and acquires it, so that no other process trains there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lte_ray import checkpoint
from lte_ray.config import LTEConfig, StorageConfig, flag, toml
from lte_ray.config.validation import is_integer
from lte_ray.engine.head.untrained import check_equal_builds
from lte_ray.engine.prepare import Initial
from lte_ray.engine.settings import Settings
from lte_ray.errors import StorageError, WorkerError
from lte_ray.run.record import format_record, write_files
from lte_ray.run.stop_request import remove_request
from lte_ray.storage import LEASE, LOCK, PART_SUFFIX, PROBE, RUN, RunDirectory, check_unlocked, exclusive_lock

log = logging.getLogger("lte_ray")


@dataclass
class RunClaim:
    """The run directory that this process will train in. Its constructor checks whether it may, and `acquire` checks again.

    Args:
        length: as of `check_start`.

    Raises:
        StorageError: another process trains there, or as `check_start`.
    """

    directory: RunDirectory
    storage: StorageConfig
    settings: Settings
    initial: Initial
    length: str | None = None

    def __post_init__(self) -> None:
        self.directory.check_lasting()
        check_unlocked(self.directory)
        self._checked_versions = self._versions()
        self._resume = self._find_checkpoint()

    @property
    def position(self) -> tuple[int, int]:
        """The step and the version of the base that the run starts from."""
        return (self._resume.facts["step"], self._resume.version) if self._resume else (0, 0)

    def _versions(self) -> list[int]:
        return checkpoint.complete_versions(self.directory) if self.directory.exists() else []

    def _find_checkpoint(self) -> checkpoint.Manifest | None:
        """The checkpoint to resume from, if there is one, intact and of this model. Logs what the user should know."""
        resume, notes = check_start(self.directory, self.storage, self.settings, self.length)
        for line in notes:
            log.warning("%s", line)
        if resume:
            checkpoint.read_base(self.directory, resume, self.initial.plan)
            checkpoint.check_factors(self.directory, resume, self.initial.plans)
        return resume

    @contextlib.contextmanager
    def acquire(
        self, record: dict[str, Any], worker: Any = None
    ) -> Iterator[tuple[RunDirectory, str, checkpoint.Manifest | None]]:
        """Holds the directory for the block and writes its ``run.toml``, and the files that the worker adds to its model.

        Yields:
            The directory that the block must write through, the text of ``run.toml``, and the checkpoint to resume from, if
            there is one.
        """
        directory = self.directory
        if self.storage.overwrite and directory.is_link(""):
            directory.delete()  # the link, not its target
        existed = directory.exists()
        with contextlib.ExitStack() as stack:
            if existed or not directory.is_local:  # a lease needs no folder, and a folder there excludes no driver
                directory = stack.enter_context(exclusive_lock(directory))
            if self._versions() != self._checked_versions:  # another process trained while this one waited for the cluster
                self._resume = self._find_checkpoint()
            config = create_run(directory, record, self.storage, self._resume)
            write_files(directory, worker)
            if self._resume and (differing := changed_data(self._resume, config)):
                log.warning(
                    "%s continues, but %s. If that changes the batches, samples of this epoch are repeated or left out.",
                    directory.display,
                    ", ".join(differing),
                )
            if not existed and directory.is_local:
                stack.enter_context(exclusive_lock(directory))
            remove_request(directory)  # of before
            stack.callback(remove_request, directory)
            yield directory, config, self._resume


def check_start(
    directory: RunDirectory, storage: StorageConfig, settings: Settings, length: str | None = None
) -> tuple[checkpoint.Manifest | None, list[str]]:
    """Checks whether the run may start in the directory.

    Args:
        length: which of epochs, samples and tokens says how long the run is; None if steps do.

    Returns:
        The checkpoint to resume from, or None; and lines that the user should see.

    Raises:
        StorageError: the name is taken, the run to resume is damaged, has other heads or is of another kind, or the directory
            isn't a run's.
    """
    place = directory.display
    exists = directory.exists()
    if exists and not (storage.resume or storage.overwrite):
        raise StorageError(
            f"A run named {settings.run!r} is already in {place}. Choose another --name, continue it with --resume, "
            "or replace it with --overwrite."
        )
    if exists and storage.overwrite and not _is_run(directory):
        raise StorageError(f"{place} has no {RUN}, so it isn't a run of lte-ray; --overwrite won't remove it.")
    if not storage.resume:
        return None, []
    if not exists or not checkpoint.complete_versions(directory):
        if exists and not _is_run(directory):
            raise StorageError(f"{place} has no {RUN}, so it isn't a run of lte-ray; --resume won't write there.")
        why = "has no complete checkpoint" if exists else "doesn't exist"
        return None, [f"{place} {why}: there is nothing to resume, so the run starts from the beginning."]
    manifest, notes = checkpoint.read_newest_intact(directory)
    _check_facts(directory, manifest)
    if manifest.facts.get("baseline", False) != settings.train.baseline:
        kind, way = ("LTE", "leave --baseline out") if settings.train.baseline else ("ordinary training", "give --baseline")
        raise StorageError(f"{place} is a run of {kind}: to continue it, {way}; or choose another --name.")
    _check_independent(place, manifest, settings)
    _check_length(place, manifest, settings, length)
    before, now = manifest.facts["lte"], json.loads(json.dumps(dataclasses.asdict(settings.lte)))
    # Settings that are newer than the run have their defaults; `checkpoint.check_factors` finds out whether these two fit.
    default = json.loads(json.dumps(dataclasses.asdict(LTEConfig()))) | {name: now[name] for name in ("adapt", "merge_buffers")}
    before = {name: before.get(name, default[name]) for name in now}
    harmless = ("strict", "num_heads")  # these change no head
    differing = [name for name in now if now[name] != before[name] and name not in harmless]
    if differing:
        changes = ", ".join(f"{flag(name)} was {before[name]} and is {now[name]}" for name in differing)
        raise StorageError(f"{place} can't be continued with other heads: {changes}. Give the settings as they were.")
    try:
        check_equal_builds(settings.untrained, manifest.facts.get("untrained", ()))
    except WorkerError as error:
        raise StorageError(f"{place} can't be continued with another model. {error}") from error
    heads = before["num_heads"]
    taken = manifest.facts.get("taken", manifest.facts["step"] * heads)  # an older release didn't record it
    wanted = settings.train.steps * heads
    if taken > wanted or (taken == wanted and heads != settings.lte.num_heads):
        raise StorageError(
            f"{place} has already taken all {taken // heads} local steps per head. Raise --steps to continue it."
        )
    if taken == wanted:  # the driver may have died just before the end: resubmitting the same command finishes the run
        notes.append(
            f"{place} has already taken all {taken // heads} local steps per head: only its model is written and evaluated "
            "again. Raise --steps to continue training."
        )
    if settings.train.ema and manifest.entry(checkpoint.EMA) is None:
        notes.append(
            f"{place} has no moving average yet (--ema): it begins with the merged weights of version {manifest.version}."
        )
    if heads != settings.lte.num_heads:
        notes.append(f"The run continues with {settings.lte.num_heads} heads instead of {heads}; the data is redistributed.")
    return manifest, notes


def _check_independent(place: str, manifest: checkpoint.Manifest, settings: Settings) -> None:
    """Raises StorageError if only one of the checkpoint and the run has independent adapters, or not equally many."""
    independent, heads = settings.merge.never_merge, manifest.facts["lte"]["num_heads"]
    if manifest.facts.get("never_merge", False) != independent:
        merge, way = ("merge", "leave --never-merge out") if independent else ("never merge", "give --never-merge")
        raise StorageError(f"{place} is a run whose heads {merge}: to continue it, {way}; or choose another --name.")
    if independent and heads != settings.lte.num_heads:
        raise StorageError(
            f"{place} has {heads} independent adapters, each with its own data: continue it with --num-heads {heads}, or "
            "choose another --name."
        )


def _check_length(place: str, manifest: checkpoint.Manifest, settings: Settings, length: str | None) -> None:
    """Raises StorageError if epochs, samples or tokens are given for a run that continues with another number of heads."""
    heads, now = manifest.facts["lte"]["num_heads"], settings.lte.num_heads
    if length is not None and heads != now:
        raise StorageError(
            f"{place} was trained with {heads} heads and would continue with {now}, so {flag(length)} doesn't say how many "
            f"steps are left: steps of {heads} heads take other numbers of samples. Give --steps: the local steps of each head "
            f"in all. {manifest.facts['step']} are taken already."
        )


def changed_data(resume: checkpoint.Manifest, config: str) -> list[str]:
    """Describes changes of the settings that determine the batches, the seed and the worker's own: "--seed was 0 and is 1"."""
    try:
        old, new = (_data_settings(toml.parse(str(text).encode())) for text in (resume.facts["config"], config))
    except (KeyError, ValueError):  # written by an older release or another program
        return []
    differing = [name for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
    return [f"{'the data' if name == toml.DATA else flag(name)} was {old[name]} and is {new[name]}" for name in differing]


def _data_settings(record: dict[str, Any]) -> dict[str, Any]:
    """What ``run.toml`` says of the batches: the seed, the worker's own settings and its training data."""
    worker = record.get("worker")
    of_worker = {f"worker.{name}": value for name, value in worker.items()} if isinstance(worker, dict) else {}
    return {name: record[name] for name in ("seed", toml.DATA) if name in record} | of_worker


def _is_run(directory: RunDirectory) -> bool:
    """Whether the directory is a run's, or empty, or was being created when its process died."""
    return directory.exists(RUN) or set(directory.list_names()) <= {LOCK, LEASE, PROBE, RUN + PART_SUFFIX}


def _check_facts(directory: RunDirectory, manifest: checkpoint.Manifest) -> None:
    """Raises StorageError if the manifest, which may have been edited, lacks facts that a resumed run needs."""
    facts = manifest.facts
    lte = facts.get("lte")
    numbers = [facts.get("step"), facts.get("taken", 0), lte.get("num_heads") if isinstance(lte, dict) else None]
    if not all(is_integer(number) and number >= 0 for number in numbers):
        raise StorageError(
            f"{directory.path_to(checkpoint.version_folder(manifest.version))}/{checkpoint.MANIFEST} is damaged: it doesn't "
            "say how far the run was and which heads it had (step, taken, lte)."
        )


def create_run(
    directory: RunDirectory, record: dict[str, Any], storage: StorageConfig, resume: checkpoint.Manifest | None = None
) -> str:
    """Creates the run directory, writes its ``run.toml`` and returns the text. This is the first thing that a run writes.

    Removes checkpoints after `resume`, since their steps will be taken again.

    Raises:
        StorageError: the directory can't be written, or another run has taken the name in the meantime.
    """
    existed = directory.exists()
    if storage.overwrite:
        for name in directory.list_names():
            if name not in (LOCK, LEASE):  # this process holds it
                directory.delete(name)
    directory.create(exclusive=not storage.resume and not (storage.overwrite and existed))
    if resume is not None:
        checkpoint.remove_after(directory, resume.version)
    text = format_record(record)
    directory.write(RUN, text.encode())
    return text
