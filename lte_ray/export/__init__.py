"""Takes a model out of a run: merged weights, a model of transformers, or a change as an adapter for PEFT.

    lte_ray.export.safetensors("runs/gpt", "gpt.safetensors")
    lte_ray.export.save_pretrained("runs/gpt", "gpt-merged")
    lte_ray.export.peft_adapter("runs/gpt", "gpt-adapter")

Each reads the run directory and starts no Ray. What is written appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save

from lte_ray.engine.prepare import merged_state_dict
from lte_ray.errors import StorageError
from lte_ray.export import peft as _peft
from lte_ray.export import pretrained as _pretrained
from lte_ray.export.run_reader import Written, open_run, read_run, select_checkpoint
from lte_ray.run.record import MODEL

__all__ = ["Written", "peft_adapter", "safetensors", "save_pretrained"]

Where = str | os.PathLike[str]


def peft_adapter(
    run: Where, out: Where, head: int | None = None, version: int | None = None, rank: int | None = None, *, worker: Any = None
) -> Written:
    """Writes a LoRA adapter: after `PeftModel.from_pretrained(model, out)` the model computes what the run's does.

    By default it holds the average: the change from the initial model, as the worker builds it, to the merged weights.

    Args:
        run: path or URI of the run directory.
        out: a folder that isn't there yet or is empty.
        head: one head's change instead, beyond the merged weights (`save_pretrained` writes them), which is zero where all
            its steps are merged.
        version: of the checkpoint; by default the newest.
        rank: the largest rank that a weight's change may have; by default what it takes to be exact.
        worker: instead of the one that ``run.toml`` names: a worker, its class, or module:Class.

    Raises:
        UserError: no such run, version, head or worker; `out` is taken; PEFT isn't installed or can't hold the change; or the
            average isn't the sum of the heads' products, and no rank is given.
    """
    place = _check_output(out)
    _pretrained.require_package("peft")
    saved = read_run(run, version, worker)
    with _atomic_output(place) as folder:
        return _peft.write_adapter(saved, folder, head, rank)


def save_pretrained(run: Where, out: Where, version: int | None = None, *, worker: Any = None) -> Written:
    """Writes the merged weights as `save_pretrained` of transformers does, for `from_pretrained(out)`.

    Args and errors as `peft_adapter`; the worker's model must be one of transformers, or hold one and train nothing else.
    """
    place = _check_output(out)
    _pretrained.require_package("transformers")
    saved = read_run(run, version, worker)
    with _atomic_output(place) as folder:
        return _pretrained.write_pretrained(saved, folder)


def safetensors(run: Where, out: Where, version: int | None = None, *, worker: Any = None) -> Written:
    """Writes the merged weights, fp32, under the unconverted model's own names: `out` if it ends in .safetensors, else
    ``model.safetensors`` in the folder `out`.

    Args and errors as `peft_adapter`. The newest of a finished run is a copy, for which the worker isn't needed.
    """
    place = _check_output(out)
    directory = open_run(run)
    if version is None and worker is None and directory.exists(MODEL):
        data, summary = directory.read(MODEL), "the run's final merged weights"
    else:
        manifest = select_checkpoint(directory, version)
        saved = read_run(run, manifest.version, worker)
        data = save(merged_state_dict(saved.model, saved.plan, saved.base), {"format": "pt"})
        summary = f"the merged weights of version {manifest.version}"
    with _atomic_output(place) as folder:
        (folder / MODEL).write_bytes(data)
    return Written(f"{MODEL}: {summary}" if place.suffix != ".safetensors" else summary)


def _check_output(out: Where) -> Path:
    """The place to write to. Raises StorageError if something is there already."""
    text = os.fspath(out)
    if "://" in text:
        raise StorageError(f"OUT is {text!r}, but it must be a local path. Copy it from there afterwards.")
    place = Path(text).expanduser().absolute()
    if place.is_dir() and not place.is_symlink():
        if any(place.iterdir()) or place.suffix == ".safetensors":
            raise StorageError(f"OUT is {text!r}, a folder that isn't empty. Name one that isn't there yet, or empty it.")
    elif place.exists() or place.is_symlink():
        raise StorageError(f"OUT is {text!r}, which is there already. Name one that isn't.")
    return place


@contextlib.contextmanager
def _atomic_output(place: Path) -> Iterator[Path]:
    """A folder beside `place` that takes its place at the end, and is removed if anything goes wrong."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        try:
            yield folder
            if place.suffix == ".safetensors":
                os.replace(folder / MODEL, place)
            else:
                umask = os.umask(0)
                os.umask(umask)
                folder.chmod(0o777 & ~umask)  # mkdtemp lets nobody else in
                if place.exists():
                    place.rmdir()
                folder.rename(place)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"OUT {str(place)!r} can't be written: {error}.") from error
