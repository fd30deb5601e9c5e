"""Exports a run's model: as merged weights, as a model for transformers, or as an adapter for PEFT.

    lte_ray.export.safetensors("runs/gpt", "gpt.safetensors")
    lte_ray.export.save_pretrained("runs/gpt", "gpt-merged")
    lte_ray.export.peft_adapter("runs/gpt", "gpt-adapter")

Each function reads the run directory without starting Ray, and writes its output atomically.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lte_ray.config import suggest
from lte_ray.engine.prepare import merged_state_dict
from lte_ray.errors import ConfigError, StorageError
from lte_ray.export import peft as _peft
from lte_ray.export import pretrained as _pretrained
from lte_ray.export.delta import head_delta
from lte_ray.export.run_reader import SavedRun, Written, open_run, read_run
from lte_ray.run.record import copy_files
from lte_ray.storage import EMA_MODEL, MODEL

__all__ = ["Written", "peft_adapter", "safetensors", "save_pretrained"]

PathLike = str | os.PathLike[str]


def peft_adapter(
    run: PathLike,
    out: PathLike,
    head: int | None = None,
    version: int | None = None,
    rank: int | None = None,
    *,
    worker: Any = None,
    ema: bool = False,
) -> Written:
    """Writes a LoRA adapter: after `PeftModel.from_pretrained(model, out)`, the model computes what the run's model does.

    By default, the adapter contains the average: the change from the initial model, as the worker builds it, to the merged
    weights.

    Args:
        run: path or URI of the run directory.
        out: a folder that is empty or doesn't exist.
        head: export this head's change beyond the merged weights (`save_pretrained` writes these) instead; it is zero if all
            the head's steps are merged. If heads never merge, export this head's adapter, for the initial model.
        version: the checkpoint's version; by default the newest.
        rank: the largest rank of a weight's change; by default the rank of the exact change.
        worker: overrides the worker that ``run.toml`` names: a worker, its class, or module:Class.
        ema: export the moving average of the merged weights (`TrainConfig.ema`) instead of them.

    Raises:
        UserError: the run, version, head, average or worker doesn't exist; `out` isn't empty; PEFT isn't installed, or can't
            represent the change; `head` is given together with `ema`.
    """
    if ema and head is not None:
        raise ConfigError(f"--ema and --head {head} contradict each other: the average is one of all heads. Leave one out.")
    path = _check_output(out)
    _pretrained.require_package("peft")
    saved = read_run(run, version, worker, ema)
    with _atomic_output(path) as folder:
        written = _peft.write_adapter(saved, folder, head, rank)
        copy_files(saved.directory, folder)
        return written


DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of exported weights by name; "auto" is the model's own."""


def save_pretrained(
    run: PathLike,
    out: PathLike,
    version: int | None = None,
    *,
    head: int | None = None,
    dtype: str = "auto",
    worker: Any = None,
    ema: bool = False,
) -> Written:
    """Writes the merged weights, or those of one head, as `save_pretrained` of transformers does, for `from_pretrained(out)`.

    Args and errors as `peft_adapter`; `head` and `dtype` as for `safetensors`. The worker's model must be one of transformers,
    or contain one and train nothing else.
    """
    path = _check_output(out)
    _pretrained.require_package("transformers")
    _check_dtype(dtype)
    saved = read_run(run, version, worker, ema)
    weights, what = _weights_of(saved, head)
    _convert(saved.model, dtype)
    with _atomic_output(path) as folder:
        written = _pretrained.write_pretrained(saved, folder, weights, what)
        copy_files(saved.directory, folder)
        return written


def safetensors(
    run: PathLike,
    out: PathLike,
    version: int | None = None,
    *,
    head: int | None = None,
    dtype: str = "auto",
    worker: Any = None,
    ema: bool = False,
) -> Written:
    """Writes the merged weights, or those of one head, under the unconverted model's own names.

    Writes the file `out` if it ends in .safetensors, else ``model.safetensors`` in the folder `out`. Args and errors as
    `peft_adapter`. For the newest version of a finished run it copies the run's file, without needing the worker.

    Args:
        head: export the weights with which this head computes, instead: W + s (B A - B' A'), which is W_0 + s B A if heads
            never merge. Those of merged runs also have its own replicas.
        dtype: auto (each weight's own type in the model), fp32, bf16 or fp16. Merged weights are fp32 in checkpoints.
    """
    path = _check_output(out)
    _check_dtype(dtype)
    directory = open_run(run)
    written = EMA_MODEL if ema else MODEL
    if version is None and worker is None and head is None and dtype == "auto" and directory.exists(written):
        average = "moving average of the final merged weights" if ema else "run's final merged weights"
        data, summary = directory.read(written), f"the {average}"
    else:
        saved = read_run(run, version, worker, ema)
        weights, summary = _weights_of(saved, head)
        _convert(saved.model, dtype)
        data = save(merged_state_dict(saved.model, saved.plan, weights), {"format": "pt"})
    with _atomic_output(path) as folder:
        (folder / MODEL).write_bytes(data)
    return Written(f"{MODEL}: {summary}" if path.suffix != ".safetensors" else summary)


def _weights_of(saved: SavedRun, head: int | None) -> tuple[Tensor, str]:
    """The weights to export, flat in the base layout, and what they are in words. A head's own buffers go into the model."""
    if head is None:
        saved.check_merged()
        return saved.base, f"the {saved.weights}"
    if saved.is_ema:
        raise ConfigError(f"--ema and --head {head} contradict each other: the average is one of all heads. Leave one out.")
    change = head_delta(saved, head)
    buffers = dict(saved.model.named_buffers())
    for name, value in change.buffers.items():
        buffers[name].copy_(value)
    return change.final, f"the weights of head {head} at version {saved.manifest.version}"


def _check_dtype(dtype: str) -> None:
    """Raises ConfigError unless it is one of `DTYPES`."""
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype is {dtype!r}, but it must be one of: {', '.join(DTYPES)}.{suggest(dtype, DTYPES)}")


def _convert(model: nn.Module, dtype: str) -> None:
    if (chosen := DTYPES[dtype]) is not None:
        model.to(chosen)


def _check_output(out: PathLike) -> Path:
    """Returns the path to write to; raises StorageError if it isn't local, or exists and isn't an empty folder."""
    text = os.fspath(out)
    if "://" in text:
        raise StorageError(f"OUT is {text!r}, but it must be a local path. Copy it from there afterwards.")
    path = Path(text).expanduser().absolute()
    if path.is_dir() and not path.is_symlink():
        if any(path.iterdir()) or path.suffix == ".safetensors":
            raise StorageError(f"OUT is {text!r}, a folder that isn't empty. Name one that doesn't exist yet, or empty it.")
    elif path.exists() or path.is_symlink():
        raise StorageError(f"OUT is {text!r}, which exists already. Name one that doesn't.")
    return path


@contextlib.contextmanager
def _atomic_output(path: Path) -> Iterator[Path]:
    """Yields a temporary folder next to `path`, which it renames to `path` at the end and removes on errors."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield folder
            _permit(folder)
            if path.suffix == ".safetensors":
                os.replace(folder / MODEL, path)
            else:
                if path.exists():
                    path.rmdir()
                folder.rename(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"OUT {str(path)!r} can't be written: {error}.") from error


def _permit(folder: Path) -> None:
    """Gives the folder and its contents the permissions of new files: mkdtemp and safetensors keep theirs to the owner."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
