"""The run directory as a whole: whether a run may start there, what is written first (``run.toml``) and last (the model)."""

from __future__ import annotations

import dataclasses
from typing import Any

import safetensors.torch
import tomli_w
from torch import Tensor

from lte_ray import checkpoint
from lte_ray.config import PlacementConfig, StorageConfig
from lte_ray.engine.initial import Initial, merged_state_dict
from lte_ray.engine.settings import Settings
from lte_ray.errors import StorageError
from lte_ray.storage import RunDirectory
from lte_ray.worker import worker_settings

MODEL = "model.safetensors"
RUN = "run.toml"


def check_start(directory: RunDirectory, storage: StorageConfig, settings: Settings) -> checkpoint.Manifest | None:
    """Whether the run may start there; gives the checkpoint to go on from, if it is to.

    Raises:
        StorageError: the name is taken, there is nothing to resume or overwrite, or the heads are others than before.
    """
    place = directory.display
    there = directory.exists()
    if there and not (storage.resume or storage.overwrite):
        raise StorageError(
            f"A run named {settings.run!r} is already in {place}. Choose another --name, continue it with --resume, "
            "or replace it with --overwrite."
        )
    if there and storage.overwrite and not directory.exists(RUN):
        raise StorageError(f"{place} has no {RUN}, so it isn't a run of lte-ray; --overwrite won't remove it.")
    if not storage.resume:
        return None
    versions = checkpoint.complete(directory)
    if not versions:
        raise StorageError(f"--resume finds no complete checkpoint in {place}. Start the run without --resume.")
    manifest = checkpoint.read_manifest(directory, versions[-1])
    facts, lte = manifest.facts, settings.lte
    if (facts["num_heads"], facts["lora_r"]) != (lte.num_heads, lte.lora_r):
        raise StorageError(
            f"{place} was trained with {facts['num_heads']} heads of rank {facts['lora_r']}, but asked were {lte.num_heads} of "
            f"rank {lte.lora_r}. To continue it, give --num-heads {facts['num_heads']} --lora-r {facts['lora_r']}."
        )
    if facts["step"] >= settings.train.steps:
        raise StorageError(f"{place} has taken all {facts['step']} local steps already. Raise --steps to continue it.")
    return manifest


def create(directory: RunDirectory, record: dict[str, Any], *, overwrite: bool) -> None:
    """Makes the run directory with its ``run.toml``: the first thing that a run writes.

    Raises:
        StorageError: it can't be written.
    """
    if overwrite and directory.exists():
        directory.delete()
    directory.create()
    directory.write(RUN, tomli_w.dumps(_plain(record)).encode())


def record(
    worker: Any, program: str | None, settings: Settings, placement: PlacementConfig, storage: StorageConfig
) -> dict[str, Any]:
    """All settings as run, flat, as ``--config run.toml`` takes them; the worker's own under "worker"."""
    storage = dataclasses.replace(storage, name=settings.run, resume=False, overwrite=False)
    flat: dict[str, Any] = {"program": program or object_name(type(worker))}
    for section in (settings.lte, settings.merge, settings.train, placement, storage):
        flat |= {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    return {**flat, "policy": object_name(settings.merge.policy), "worker": worker_settings(worker)}


def export(directory: RunDirectory, initial: Initial, base: Tensor) -> None:
    """Writes the merged weights, fp32, under the unconverted model's own names."""
    state = merged_state_dict(initial.model, initial.plan, base)
    directory.write(MODEL, safetensors.torch.save(state, {"format": "pt"}))


def object_name(thing: Any) -> str:
    """How a class or policy is written in ``run.toml``: itself if it is a name, else module:Class."""
    if isinstance(thing, str):
        return thing
    kind = thing if isinstance(thing, type) else type(thing)
    return f"{kind.__module__}:{kind.__qualname__}"


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Only what TOML can say: no None, tuples as lists, unknown objects as text."""
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            plain[key] = _plain(value)
        elif isinstance(value, list | tuple):
            plain[key] = [v if isinstance(v, str | int | float | bool) else str(v) for v in value]
        elif value is not None:
            plain[key] = value if isinstance(value, str | int | float | bool) else str(value)
    return plain
