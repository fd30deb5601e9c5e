"""Reads a run from its directory: its settings, its worker's model, and one of its checkpoints. Doesn't start Ray."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lte_ray import checkpoint
from lte_ray.adapters.plan import make_plans
from lte_ray.checkpoint import Manifest
from lte_ray.config import LTEConfig, TrainConfig
from lte_ray.config.baseline import baseline_lte
from lte_ray.engine.head.rng import preserve_generators
from lte_ray.engine.head.untrained import check_equal_builds, fingerprints
from lte_ray.engine.initial_weights import build_initial_model
from lte_ray.engine.prepare import named_tensors
from lte_ray.errors import ConfigError, StorageError, UserError, WorkerError
from lte_ray.export.worker_factory import make_worker
from lte_ray.layout import Plan
from lte_ray.merging.flat_buffer import factor_views, gather
from lte_ray.run import run_toml
from lte_ray.storage import RUN, RunDirectory, split_run_path


@dataclass(frozen=True)
class SavedRun:
    """A run at one of its checkpoints.

    Attributes:
        directory: the run directory.
        manifest: the checkpoint's manifest.
        record: the content of ``run.toml``, flat; the worker's own settings are under "worker".
        model: the unconverted model, as the worker builds it with the run's seed: the initial weights W_0.
        plans: each head's plan of the model.
        initial: W_0, flat in the base layout.
        base: the merged weights W_v, or their moving average, flat in the base layout.
        is_ema: whether `base` is that average.
        worker: the user's.
    """

    directory: RunDirectory
    manifest: Manifest
    record: dict[str, Any]
    model: nn.Module
    plans: tuple[Plan, ...]
    initial: Tensor
    base: Tensor
    is_ema: bool = False
    worker: Any = None

    @property
    def plan(self) -> Plan:
        """The first head's plan; its base layout is that of all heads."""
        return self.plans[0]

    @property
    def weights(self) -> str:
        """What `base` is, in words."""
        average = "moving average of the merged weights up to" if self.is_ema else "merged weights of"
        return f"{average} version {self.manifest.version}"

    @property
    def never_merged(self) -> bool:
        """Whether the heads have independent adapters (``--never-merge``), and the base is W_0."""
        return bool(self.record.get("never_merge", False))

    def check_merged(self) -> None:
        """Raises ConfigError if there are no merged weights."""
        if self.never_merged:
            raise ConfigError(
                f"The heads of {self.directory.display} were never merged (--never-merge): each has an adapter of its own. Say "
                f"which with --head, 0 to {len(self.plans) - 1}."
            )

    def head(self, head: int) -> dict[str, Tensor]:
        """Reads the tensors of one head's state (`engine.head.snapshot`).

        A head that was never merged, and has no state since its process was gone, has the factors that it contributed last.

        Raises:
            ConfigError: the head doesn't exist.
            StorageError: the checkpoint doesn't contain it, or the file is damaged.
        """
        if not 0 <= head < len(self.plans):
            raise ConfigError(f"--head is {head}, but the heads of {self.directory.display} are 0 to {len(self.plans) - 1}.")
        if head not in self.manifest.heads:
            return self._contributed(head)
        return checkpoint.read_head(self.directory, self.manifest, head)[0]

    def _contributed(self, head: int) -> dict[str, Tensor]:
        """The factors of a head without a state, if the base doesn't hold them."""
        place = f"The checkpoint of version {self.manifest.version} in {self.directory.display}"
        if not self.never_merged:
            raise StorageError(
                f"{place} has no state of head {head}, since the policy merged only heads {list(self.manifest.heads)} there. "
                "Choose another --head or --version."
            )
        references = checkpoint.read_references(self.directory, self.manifest, self.plans)
        if head not in references:
            raise StorageError(
                f"{place} has nothing of head {head}, which hadn't contributed. Choose another --head or --version."
            )
        return {f"factor.{name}": factor for name, factor in factor_views(self.plans[head], references[head]).items()}


@dataclass(frozen=True)
class Written:
    """What an export wrote.

    Attributes:
        summary: a description in words.
        rank: the largest rank of an adapter.
        error: the relative error of an adapter's change, ||W - W' - B A|| / ||W - W'||.
    """

    summary: str
    rank: int | None = None
    error: float | None = None


def open_run(run: str | os.PathLike[str]) -> RunDirectory:
    """Opens the run directory at a path or URI.

    Raises:
        StorageError: there is none, or the URI isn't supported.
    """
    location = os.fspath(run).rstrip("/") or "/"
    if "://" not in location:
        location = str(Path(location).expanduser().absolute())
    try:
        directory = RunDirectory.open(*split_run_path(location))
        exists, started = directory.exists(), directory.exists(RUN)
    except Exception as error:
        raise StorageError(f"RUN is {location!r}, which can't be opened: {error.__cause__ or error}") from error
    if not started:
        found = f"which has no {RUN}" if exists else "which doesn't exist"
        raise StorageError(f"RUN is {location!r}, {found}. It must be a run directory, as lte-ray train prints it at the end.")
    return directory


def select_checkpoint(directory: RunDirectory, version: int | None) -> Manifest:
    """Returns the manifest of the checkpoint of `version`, by default the newest.

    Raises:
        StorageError: there is no complete checkpoint of this version.
    """
    versions = checkpoint.complete_versions(directory)
    if not versions:
        raise StorageError(f"{directory.display} has no complete checkpoint, so there is nothing to export yet.")
    if version is not None and version not in versions:
        raise StorageError(
            f"--version is {version}, but the complete checkpoints in {directory.display} are of: "
            f"{', '.join(map(str, versions))}. A run keeps the newest few (--keep-checkpoints)."
        )
    return checkpoint.read_manifest(directory, versions[-1] if version is None else version)


def check_has_ema(directory: RunDirectory, manifest: Manifest) -> None:
    """Raises StorageError unless a checkpoint has the moving average of the merged weights."""
    if manifest.entry(checkpoint.EMA) is None:
        raise StorageError(
            f"--ema needs the moving average of the merged weights, but the checkpoint of version {manifest.version} in "
            f"{directory.display} has none: the run was trained without --ema. Leave --ema out."
        )


def read_run(run: str | os.PathLike[str], version: int | None = None, worker: Any = None, ema: bool = False) -> SavedRun:
    """Reads a run.

    Args:
        run: path or URI of the run directory.
        version: the checkpoint's version; by default the newest.
        worker: overrides the worker that ``run.toml`` names: a worker, its class, or module:Class.
        ema: read the moving average of the merged weights instead of them.

    Raises:
        StorageError: the run or checkpoint doesn't exist, is damaged, belongs to a different model, or has no moving average.
        WorkerError: the worker can't be loaded or constructed, or can't build its model.
        ConfigError: the settings in ``run.toml`` are damaged or don't fit the model.
    """
    directory = open_run(run)
    manifest, record = select_checkpoint(directory, version), run_toml.read(directory)
    if ema:
        check_has_ema(directory, manifest)
    lte, train = record.settings(LTEConfig), record.settings(TrainConfig)
    if train.baseline:
        lte = baseline_lte(lte)
    instance = make_worker(record.content, worker)
    with preserve_generators(torch.device("cpu")):  # keeps the caller's random state
        try:
            model = build_initial_model(instance, train)
        except UserError:
            raise
        except Exception as error:
            raise WorkerError(f"{type(instance).__name__}.build_model() raised {type(error).__name__}: {error}") from error
    plans = make_plans(model, lte)
    check_equal_builds(fingerprints(named_tensors(model), plans[0]), manifest.facts.get("untrained", ()))
    average = checkpoint.read_ema(directory, manifest, plans[0]) if ema else None
    base = checkpoint.read_base(directory, manifest, plans[0]) if average is None else average
    initial = gather(plans[0].base, named_tensors(model), base.dtype)
    return SavedRun(directory, manifest, record.content, model, plans, initial, base, ema, instance)
