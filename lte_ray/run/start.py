"""Whether a run may start in its directory, and taking it: no other process trains there meanwhile."""

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
from lte_ray.engine.prepare import Initial
from lte_ray.engine.settings import Settings
from lte_ray.errors import StorageError
from lte_ray.run.record import as_toml
from lte_ray.storage import LOCK, PART_SUFFIX, PROBE, RUN, RunDirectory, check_unlocked, exclusive_lock

log = logging.getLogger("lte_ray")


@dataclass
class RunClaim:
    """A run directory that this process is to train in; whether it may is checked at once, and again when it is taken.

    Raises:
        StorageError: another process trains there, or as `check_start`.
    """

    directory: RunDirectory
    storage: StorageConfig
    settings: Settings
    initial: Initial

    def __post_init__(self) -> None:
        check_unlocked(self.directory)
        self._seen = self._versions()
        self._resume = self._checked()

    def _versions(self) -> list[int]:
        return checkpoint.complete_versions(self.directory) if self.directory.exists() else []

    def _checked(self) -> checkpoint.Manifest | None:
        """The checkpoint to go on from, if there is one: whole, and of this model. Says what the user should know."""
        resume, notes = check_start(self.directory, self.storage, self.settings)
        for line in notes:
            log.warning("%s", line)
        if resume:
            checkpoint.read_base(self.directory, resume, self.initial.plan)
            checkpoint.check_factors(self.directory, resume, self.initial.plans)
        return resume

    @contextlib.contextmanager
    def acquire(self, record: dict[str, Any]) -> Iterator[tuple[str, checkpoint.Manifest | None]]:
        """For the block the directory is this process's alone, with its ``run.toml``; gives that, and what to go on from."""
        directory = self.directory
        if self.storage.overwrite and directory.is_link(""):
            directory.delete()  # the link, not what it leads to
        there = directory.exists()
        with contextlib.ExitStack() as held:
            if there:
                held.enter_context(exclusive_lock(directory))
            if self._versions() != self._seen:  # others have trained it while this waited for the cluster
                self._resume = self._checked()
            config = create_run(directory, record, self.storage, self._resume)
            if self._resume and (differing := changed_data(self._resume, config)):
                log.warning(
                    "%s goes on, but %s. Where that changes the batches, samples of this epoch are repeated or left out.",
                    directory.display,
                    ", ".join(differing),
                )
            if not there:
                held.enter_context(exclusive_lock(directory))
            yield config, self._resume


def check_start(
    directory: RunDirectory, storage: StorageConfig, settings: Settings
) -> tuple[checkpoint.Manifest | None, list[str]]:
    """Whether the run may start there.

    Returns:
        The checkpoint to go on from, if it is to and there is one, else None; and what the user should know, in lines.

    Raises:
        StorageError: the name is taken, what there is to resume is damaged or has other heads, or it isn't a run.
    """
    place = directory.display
    there = directory.exists()
    if there and not (storage.resume or storage.overwrite):
        raise StorageError(
            f"A run named {settings.run!r} is already in {place}. Choose another --name, continue it with --resume, "
            "or replace it with --overwrite."
        )
    if there and storage.overwrite and not _is_run(directory):
        raise StorageError(f"{place} has no {RUN}, so it isn't a run of lte-ray; --overwrite won't remove it.")
    if not storage.resume:
        return None, []
    if not there or not checkpoint.complete_versions(directory):
        if there and not _is_run(directory):
            raise StorageError(f"{place} has no {RUN}, so it isn't a run of lte-ray; --resume won't write there.")
        what = "has no complete checkpoint" if there else "isn't there"
        return None, [f"{place} {what}: nothing to resume, the run starts from the beginning."]
    manifest, notes = checkpoint.read_newest_intact(directory)
    manifest = _with_facts(directory, manifest)
    before, asked = manifest.facts["lte"], json.loads(json.dumps(dataclasses.asdict(settings.lte)))
    # For settings that there weren't when the run was begun; `checkpoint.check_factors` finds out whether --adapt fits.
    default = json.loads(json.dumps(dataclasses.asdict(LTEConfig()))) | {"adapt": asked["adapt"]}
    before = {name: before.get(name, default[name]) for name in asked}
    same = ("strict", "num_heads")  # which change no head
    differing = [name for name in asked if asked[name] != before[name] and name not in same]
    if differing:
        said = ", ".join(f"{flag(name)} was {before[name]} and is {asked[name]}" for name in differing)
        raise StorageError(f"{place} can't be continued with other heads: {said}. Give the settings as they were.")
    heads = before["num_heads"]
    taken = manifest.facts.get("taken", manifest.facts["step"] * heads)  # which an older release didn't note
    wanted = settings.train.steps * heads
    if taken > wanted or (taken == wanted and heads != settings.lte.num_heads):
        raise StorageError(f"{place} has taken all {taken // heads} local steps a head already. Raise --steps to continue it.")
    if taken == wanted:  # the driver may have died just before its end: the same submission again ends the run
        notes.append(
            f"{place} has taken all {taken // heads} local steps a head already: only its model is written and evaluated "
            "again. Raise --steps to train on."
        )
    if heads != settings.lte.num_heads:
        now = settings.lte.num_heads
        notes.append(f"The run goes on with {now} heads in the place of {heads}; the data is dealt out anew.")
    return manifest, notes


def changed_data(resume: checkpoint.Manifest, config: str) -> list[str]:
    """What differs of the settings that batches depend on, the seed and the worker's own: "--seed was 0 and is 1"."""
    try:
        old, new = (_data_settings(toml.parse(str(text).encode())) for text in (resume.facts["config"], config))
    except (KeyError, ValueError):  # of an older release, or of somebody else: nobody can say
        return []
    return [f"{flag(n)} was {old[n]} and is {new[n]}" for n in sorted(old.keys() & new.keys()) if old[n] != new[n]]


def _data_settings(record: dict[str, Any]) -> dict[str, Any]:
    """Those that batches depend on, of what ``run.toml`` says."""
    worker = record.get("worker")
    own = {f"worker.{name}": value for name, value in worker.items()} if isinstance(worker, dict) else {}
    return {"seed": record["seed"], **own} if "seed" in record else own


def _is_run(directory: RunDirectory) -> bool:
    """Whether it is a run's, or was being made into one when its process died, or is empty."""
    return directory.exists(RUN) or set(directory.list_names()) <= {LOCK, PROBE, RUN + PART_SUFFIX}


def _with_facts(directory: RunDirectory, manifest: checkpoint.Manifest) -> checkpoint.Manifest:
    """The manifest, if its facts are those that a run goes on from; whoever wrote it may have left them out."""
    facts = manifest.facts
    lte = facts.get("lte")
    numbers = [facts.get("step"), facts.get("taken", 0), lte.get("num_heads") if isinstance(lte, dict) else None]
    if not all(is_integer(number) and number >= 0 for number in numbers):
        raise StorageError(
            f"{directory.path_to(checkpoint.version_folder(manifest.version))}/{checkpoint.MANIFEST} is damaged: it doesn't "
            "say how far the run was and which heads it had (step, taken, lte)."
        )
    return manifest


def create_run(
    directory: RunDirectory, record: dict[str, Any], storage: StorageConfig, resume: checkpoint.Manifest | None = None
) -> str:
    """Makes the run directory with its ``run.toml``, the first thing that a run writes, once it can start; gives its text.

    Checkpoints after the one that it goes on from are of steps that will be taken again: they are removed.

    Raises:
        StorageError: it can't be written, or another run has taken the name meanwhile.
    """
    there = directory.exists()
    if storage.overwrite:
        for name in directory.list_names():
            if name != LOCK:  # which is held meanwhile
                directory.delete(name)
    directory.create(exclusive=not storage.resume and not (storage.overwrite and there))
    if resume is not None:
        checkpoint.remove_after(directory, resume.version)
    text = as_toml(record)
    directory.write(RUN, text.encode())
    return text
