"""The run directory as a whole: whether a run may start there, what is written first (``run.toml``) and last (the model)."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import safetensors.torch
import tomli_w
from torch import Tensor

from lte_ray import checkpoint
from lte_ray.config import SECTIONS, FailureConfig, LTEConfig, PlacementConfig, StorageConfig, flag, toml
from lte_ray.config.fields import is_integer
from lte_ray.engine.initial import Initial, merged_state_dict
from lte_ray.engine.settings import Settings
from lte_ray.errors import StorageError
from lte_ray.loading import absolute
from lte_ray.redact import OMITTED, scrub, split, without_credentials
from lte_ray.storage import RUN, RunDirectory, check_alone
from lte_ray.worker import worker_settings

T = TypeVar("T")

MODEL = "model.safetensors"

NONE = "None"
"""TOML has no such value; flags do."""


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
    check_alone(directory)
    there = directory.exists()
    if there and not (storage.resume or storage.overwrite):
        raise StorageError(
            f"A run named {settings.run!r} is already in {place}. Choose another --name, continue it with --resume, "
            "or replace it with --overwrite."
        )
    if there and storage.overwrite and not directory.exists(RUN):
        raise StorageError(f"{place} has no {RUN}, so it isn't a run of lte-ray; --overwrite won't remove it.")
    if not storage.resume:
        return None, []
    if not there or not checkpoint.complete(directory):
        if there and directory.names() and not directory.exists(RUN):
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
    if taken >= settings.train.steps * heads:
        raise StorageError(f"{place} has taken all {taken // heads} local steps a head already. Raise --steps to continue it.")
    if heads != settings.lte.num_heads:
        now = settings.lte.num_heads
        notes.append(f"The run goes on with {now} heads in the place of {heads}; the data is dealt out anew.")
    return manifest, notes


def _with_facts(directory: RunDirectory, manifest: checkpoint.Manifest) -> checkpoint.Manifest:
    """The manifest, if its facts are those that a run goes on from; whoever wrote it may have left them out."""
    facts = manifest.facts
    lte = facts.get("lte")
    numbers = [facts.get("step"), facts.get("taken", 0), lte.get("num_heads") if isinstance(lte, dict) else None]
    if not all(is_integer(number) and number >= 0 for number in numbers):
        raise StorageError(
            f"{directory.at(checkpoint.folder(manifest.version))}/{checkpoint.MANIFEST} is damaged: it doesn't say how far "
            "the run was and which heads it had (step, taken, lte)."
        )
    return manifest


def create(
    directory: RunDirectory, record: dict[str, Any], storage: StorageConfig, resume: checkpoint.Manifest | None = None
) -> str:
    """Makes the run directory with its ``run.toml``, the first thing that a run writes, once it can start; gives its text.

    Checkpoints after the one that it goes on from are of steps that will be taken again: they are removed.

    Raises:
        StorageError: it can't be written, or another run has taken the name meanwhile.
    """
    if storage.overwrite and directory.exists():
        directory.delete()
    directory.create(exclusive=not storage.resume)
    if resume is not None:
        checkpoint.remove_after(directory, resume.version)
    text = tomli_w.dumps(_plain(record))
    directory.write(RUN, text.encode())
    return text


def record(
    worker: Any,
    program: str | None,
    settings: Settings,
    placement: PlacementConfig,
    storage: StorageConfig,
    failure: FailureConfig,
) -> dict[str, Any]:
    """All settings as run, flat, as ``--config run.toml`` takes them; the worker's own under "worker".

    Secrets (`lte_ray.redact`) aren't in it: "omitted" lists those that must be given again, and the storage's URI has none.
    """
    place = without_credentials(storage.storage) if storage.storage else None
    place = os.path.abspath(place) if place and "://" not in place else place
    storage = dataclasses.replace(storage, name=settings.run, storage=place, resume=False, overwrite=False)
    flat: dict[str, Any] = {"program": absolute(program or object_name(type(worker)))}
    for section in (settings.lte, settings.merge, settings.train, placement, failure, storage):
        flat |= {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    if storage.keep_checkpoints is None:
        flat["keep_checkpoints"] = NONE
    own, ours = split(worker_settings(worker), _defaults(type(worker)))
    of_policy, theirs = split(settings.merge.policy_args or {}, {})
    if ours or theirs:
        flat[OMITTED] = [*(f"worker.{name}" for name in ours), *(f"policy.{name}" for name in theirs)]
    flat |= {"policy": absolute(object_name(settings.merge.policy)), "policy_args": _named(of_policy)}
    return {**flat, "worker": _named(own)}


def read_record(directory: RunDirectory) -> dict[str, Any]:
    """What ``run.toml`` says.

    Raises:
        StorageError: there is none, or it is damaged.
    """
    if not directory.exists(RUN):
        raise StorageError(f"There is no run in {directory.display}: it has no {RUN}. Correct --storage or the name.")
    try:
        return toml.parse(directory.read(RUN))
    except ValueError as error:
        raise StorageError(f"{directory.at(RUN)} is damaged: {error}.") from error


def read_program(directory: RunDirectory) -> str:
    """The worker that ``run.toml`` names. Raises StorageError as `read_record`, and if it names none."""
    program = read_record(directory).get("program")
    if not isinstance(program, str) or not program:
        raise StorageError(f"{directory.at(RUN)} is damaged: it names no worker (program).")
    return program


def restored(directory: RunDirectory) -> dict[type, Any]:
    """The settings that ``run.toml`` says, by their class.

    Raises:
        StorageError: it is damaged.
        ConfigError: a setting is out of range.
    """
    content = read_record(directory)
    return {kind: section(directory, kind, content) for kind in SECTIONS}


def section(directory: RunDirectory, kind: Callable[..., T], content: Mapping[str, Any]) -> T:
    """The settings of one class, from what ``run.toml`` says; those that it doesn't know have their defaults.

    Raises:
        StorageError: it is damaged.
        ConfigError: a setting is out of range.
    """
    given = {f.name: content[f.name] for f in dataclasses.fields(kind) if f.name in content}  # type: ignore[arg-type]
    try:
        return kind(**{n: None if v == NONE else tuple(v) if isinstance(v, list) else v for n, v in given.items()})
    except TypeError as error:
        raise StorageError(f"{directory.at(RUN)} is damaged: {error}.") from error


def export(directory: RunDirectory, initial: Initial, base: Tensor) -> None:
    """Writes the merged weights, fp32, under the unconverted model's own names."""
    state = merged_state_dict(initial.model, initial.plan, base)
    directory.write(MODEL, safetensors.torch.save(state, {"format": "pt"}))


def object_name(thing: Any) -> str:
    """How a class, function or policy is written in ``run.toml``: itself if it is a name, else module:Name."""
    if isinstance(thing, str):
        return thing
    kind = thing if isinstance(thing, type) or inspect.isroutine(thing) else type(thing)
    return f"{kind.__module__}:{kind.__qualname__}"


def _defaults(kind: type) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}


def _named(values: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, None as flags say it."""
    return {name: NONE if value is None else value for name, value in values.items()}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Only what TOML can say: no None, tuples as lists, unknown objects as text."""
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            plain[key] = _plain(value)
        elif isinstance(value, list | tuple):
            plain[key] = [v if isinstance(v, str | int | float | bool) else scrub(str(v)) for v in value]
        elif value is not None:
            plain[key] = value if isinstance(value, str | int | float | bool) else scrub(str(value))
    return plain
