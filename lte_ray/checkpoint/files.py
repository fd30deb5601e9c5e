"""The files of a checkpoint: the base, the heads' states and references, the merge policy's tensors, and the evaluation.

Tensors are written as safetensors under names that no complete checkpoint uses, and read only if they are what the manifest
lists. ``evaluation.json`` holds the worker's evaluation of the base, by which the best checkpoints are found.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import safetensors.torch
from torch import Tensor

from lte_ray.checkpoint.manifest import Damaged, FileEntry, Manifest, read_file, summarize_error
from lte_ray.config.best_figure import parse_best_by
from lte_ray.errors import StorageError
from lte_ray.layout import Plan
from lte_ray.merging.flat_buffer import gather, views
from lte_ray.merging.registry import stable_name
from lte_ray.storage import RunDirectory
from lte_ray.storage.checkpoints import MANIFEST, version_folder

BASE = "base.safetensors"
POLICY = "policy.safetensors"
REFERENCES = "references.safetensors"
MOMENTUM = "momentum.safetensors"
RESIDUAL = "residual.safetensors"
EMA = "ema.safetensors"
EVALUATION = "evaluation.json"

MOVED = "moved"
"""Folder of the states of heads that move to other nodes. It is removed when the run ends."""

MAX_EVALUATION_BYTES = 2**20

_HEAD = re.compile(r"head-(\d{4,9})", re.ASCII)


def head_file(head: int) -> str:
    """Name of a head's file."""
    return f"head-{head:04d}.safetensors"


def write_tensors(
    directory: RunDirectory, version: int, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> FileEntry:
    """Writes one file of a checkpoint, under another name if a complete checkpoint already has this file."""
    return _write_file(directory, version_folder(version), _free_name(directory, version, name), tensors, metadata)


def _write_file(
    directory: RunDirectory, folder: str, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]
) -> FileEntry:
    copies = {key: value.detach().clone().contiguous() for key, value in tensors.items()}  # tensors may share memory
    data = safetensors.torch.save(copies, metadata or None)  # with no tensors and {} it writes a broken header
    directory.write(f"{folder}/{name}", data)
    return FileEntry(name, len(data), hashlib.sha256(data).hexdigest())


def read_bytes(directory: RunDirectory, manifest: Manifest, name: str) -> bytes:
    """Reads a file. Raises Damaged if it is missing or isn't what the manifest lists."""
    expected = manifest.entry(name)
    if expected is None:
        path = f"{directory.path_to(version_folder(manifest.version))}/{name}"
        raise Damaged(f"{path} can't be read: the checkpoint doesn't hold it.")
    path = f"{version_folder(manifest.version)}/{expected.name}"
    data = read_file(directory, path, expected.size)
    if len(data) != expected.size or hashlib.sha256(data).hexdigest() != expected.sha256:
        raise Damaged(f"{directory.path_to(path)} is damaged: its content isn't what the manifest lists.")
    return data


def read_tensors(directory: RunDirectory, manifest: Manifest, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads the tensors of a file and its metadata. Raises Damaged if they can't be read, even if the checksum is right."""
    data = read_bytes(directory, manifest, name)
    try:
        metadata = _metadata(data)
        return safetensors.torch.load(data), metadata
    except Exception as error:  # the content may be anything, and the reader raises many kinds of errors
        raise damage_error(directory, manifest, name, error) from error


def damage_error(directory: RunDirectory, manifest: Manifest, name: str, error: BaseException | str) -> Damaged:
    """Returns the error that says what is wrong with a file."""
    entry = manifest.entry(name)
    path = f"{directory.path_to(version_folder(manifest.version))}/{entry.name if entry else name}"
    return Damaged(f"{path} is damaged: {error if isinstance(error, str) else summarize_error(error)}.")


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata in a safetensors header, whose length is in the first 8 bytes. Raises ValueError."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError(f"its header should have {size} bytes, but the file has {len(data)}")
    header: Any = json.loads(data[8 : 8 + size])
    metadata = header.get("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its header isn't one of safetensors")
    return metadata


def _free_name(directory: RunDirectory, version: int, name: str) -> str:
    """The name, with a number if a complete checkpoint of this version uses it: that one stays intact until `commit`."""
    if not directory.exists(f"{version_folder(version)}/{MANIFEST}"):
        return name
    taken = set(directory.list_names(version_folder(version)))
    stem = name.removesuffix(".safetensors")
    numbered = (f"{stem}.{number}.safetensors" for number in itertools.count(1))
    return next(free for free in itertools.chain([name], numbered) if free not in taken)


def write_base(directory: RunDirectory, version: int, plan: Plan, base: Tensor) -> FileEntry:
    """Writes the main weights and replicas of `version` under the model's own parameter names."""
    return write_tensors(directory, version, BASE, views(plan.base, base), {})


def read_base(directory: RunDirectory, manifest: Manifest, plan: Plan) -> Tensor:
    """Reads the base of a checkpoint, flat.

    Raises:
        StorageError: the file is damaged, or belongs to another model.
    """
    tensors, _ = read_tensors(directory, manifest, BASE)
    return _flatten(directory, manifest, BASE, plan, tensors)


def write_momentum(directory: RunDirectory, version: int, plan: Plan, policy: str, momentum: Tensor) -> FileEntry:
    """Writes the momentum of the outer steps that the merge policy of this name gave, in the base's layout, as `write_base`."""
    return write_tensors(directory, version, MOMENTUM, views(plan.base, momentum), {"policy": policy})


def read_momentum(directory: RunDirectory, manifest: Manifest, plan: Plan, policy: str) -> Tensor | None:
    """Reads what `write_momentum` wrote. None if there is nothing, or if it belongs to another policy.

    Raises:
        StorageError: the file is damaged, or belongs to another model.
    """
    if manifest.entry(MOMENTUM) is None:
        return None
    tensors, metadata = read_tensors(directory, manifest, MOMENTUM)
    if stable_name(metadata.get("policy", "")) != stable_name(policy):
        return None
    return _flatten(directory, manifest, MOMENTUM, plan, tensors)


def write_residual(directory: RunDirectory, version: int, plan: Plan, residual: Tensor) -> FileEntry:
    """Writes what rounded changes of the base have left out up to `version`, in the base's layout, as `write_base`."""
    return write_tensors(directory, version, RESIDUAL, views(plan.base, residual), {})


def read_residual(directory: RunDirectory, manifest: Manifest, plan: Plan) -> Tensor | None:
    """Reads what `write_residual` wrote, flat. None if there is nothing.

    Raises:
        StorageError: the file is damaged, or belongs to another model.
    """
    return _read_flat(directory, manifest, RESIDUAL, plan)


def write_ema(directory: RunDirectory, version: int, plan: Plan, ema: Tensor) -> FileEntry:
    """Writes the moving average of the bases up to `version`, as `write_base`."""
    return write_tensors(directory, version, EMA, views(plan.base, ema), {})


def read_ema(directory: RunDirectory, manifest: Manifest, plan: Plan) -> Tensor | None:
    """Reads what `write_ema` wrote, flat. None if there is nothing.

    Raises:
        StorageError: the file is damaged, or belongs to another model.
    """
    return _read_flat(directory, manifest, EMA, plan)


def _read_flat(directory: RunDirectory, manifest: Manifest, name: str, plan: Plan) -> Tensor | None:
    if manifest.entry(name) is None:
        return None
    tensors, _ = read_tensors(directory, manifest, name)
    return _flatten(directory, manifest, name, plan, tensors)


def _flatten(directory: RunDirectory, manifest: Manifest, name: str, plan: Plan, tensors: dict[str, Tensor]) -> Tensor:
    """Returns the tensors of a file flat in the base layout; StorageError if they aren't those of the plan's base."""
    shapes = {key: tuple(t.shape) for key, t in tensors.items()}
    expected = {e.name: e.shape for e in plan.base.entries}
    if shapes != expected:
        differing = repr(sorted(set(shapes.items()) ^ set(expected.items()))[:4])[:400]
        raise StorageError(
            f"{directory.path_to(version_folder(manifest.version))} holds another model than the worker "
            f"builds; they differ in {differing}."
        )
    types = {t.dtype for t in tensors.values()}
    if len(types) != 1 or not all(kind.is_floating_point for kind in types):
        raise damage_error(directory, manifest, name, f"its weights are of {', '.join(sorted(map(str, types)))}")
    return gather(plan.base, tensors, next(iter(types)))


def write_references(directory: RunDirectory, version: int, references: Mapping[int, Tensor]) -> FileEntry:
    """Writes the references: by head, the factors that the base of `version` contains, 1-D of `plan.factors_size` elements."""
    tensors = {f"head-{head:04d}": reference for head, reference in references.items()}
    return write_tensors(directory, version, REFERENCES, tensors, {})


def read_references(directory: RunDirectory, manifest: Manifest, plans: Sequence[Plan] | None = None) -> dict[int, Tensor]:
    """Reads what `write_references` wrote. A head whose reference has B' = 0 has none. In format 1 they are in heads' files.

    Args:
        plans: each head's, to check the sizes. Heads beyond them aren't checked.

    Raises:
        StorageError: a file is damaged, or a reference doesn't fit its plan.
    """
    references: dict[int, Tensor] = {}
    name = REFERENCES
    if manifest.format == 1:
        for head in manifest.heads:
            tensors, _ = read_tensors(directory, manifest, head_file(head))
            if "reference" in tensors:
                references[head] = tensors["reference"]
        name = head_file(min(manifest.heads, default=0))
    elif manifest.entry(REFERENCES) is not None:
        for key, tensor in read_tensors(directory, manifest, REFERENCES)[0].items():
            match = _HEAD.fullmatch(key)
            if match is None:
                raise damage_error(directory, manifest, name, f"{key!r:.40} is no head")
            references[int(match[1])] = tensor
    for head, tensor in references.items():
        if tensor.dim() != 1 or not tensor.dtype.is_floating_point:
            what = f"the reference of head {head} is a {tensor.dtype} of shape {tuple(tensor.shape)}"
            raise damage_error(directory, manifest, name, what)
        if plans is not None and head < len(plans) and tensor.numel() != plans[head].factors_size:
            raise _other_factors(directory, manifest, f"the size of head {head}'s")
    return references


def write_head(directory: RunDirectory, version: int, head: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> FileEntry:
    """Writes one head's state (`engine.head.snapshot.snapshot`)."""
    return write_tensors(directory, version, head_file(head), tensors, {"state": json.dumps(meta)})


def read_head(directory: RunDirectory, manifest: Manifest, head: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads one head's state for `engine.head.snapshot.restore`: tensors by name, and JSON values by name.

    Raises:
        StorageError: the file is missing or damaged.
    """
    name = head_file(head)
    tensors, metadata = read_tensors(directory, manifest, name)
    try:
        state = json.loads(metadata["state"])
    except (ValueError, KeyError, RecursionError) as error:
        raise damage_error(directory, manifest, name, error) from error
    if not isinstance(state, dict):
        raise damage_error(directory, manifest, name, "its state isn't an object")
    return tensors, state


def write_moved_head(directory: RunDirectory, head: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> FileEntry:
    """Writes the state of a head that moves to another node, apart from all checkpoints, for its next process."""
    return _write_file(directory, MOVED, head_file(head), tensors, {"state": json.dumps(meta)})


def read_moved_head(directory: RunDirectory, entry: FileEntry) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write_moved_head` wrote.

    Raises:
        StorageError: the file is missing or damaged.
    """
    path = f"{MOVED}/{entry.name}"
    data = read_file(directory, path, entry.size)
    if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise Damaged(f"{directory.path_to(path)} is damaged: its content isn't what was written.")
    state: dict[str, Any] = json.loads(_metadata(data)["state"])
    return safetensors.torch.load(data), state


def write_policy(directory: RunDirectory, version: int, name: str, tensors: dict[str, Tensor]) -> FileEntry:
    """Writes the tensors that the merge policy `name` keeps from one merge to the next."""
    return write_tensors(directory, version, POLICY, tensors, {"policy": name})


def read_policy(directory: RunDirectory, manifest: Manifest, name: str) -> dict[str, Tensor]:
    """Reads what `write_policy` wrote. Empty if there is nothing, or if it belongs to another policy.

    Raises:
        StorageError: the file is damaged.
    """
    if manifest.entry(POLICY) is None:
        return {}
    tensors, metadata = read_tensors(directory, manifest, POLICY)
    return tensors if stable_name(metadata.get("policy", "")) == stable_name(name) else {}


def check_factors(directory: RunDirectory, manifest: Manifest, plans: Sequence[Plan]) -> None:
    """Raises StorageError unless the heads' factors are those of the plans.

    All heads have the same settings, so one head is checked. If the checkpoint holds no head's state, which names the factors,
    the sizes of the references are checked instead.
    """
    head = next((head for head in manifest.heads if head < len(plans)), None)
    if head is None:
        read_references(directory, manifest, plans)
        return
    tensors, _ = read_head(directory, manifest, head)
    shapes = {name.removeprefix("factor."): tuple(t.shape) for name, t in tensors.items() if name.startswith("factor.")}
    plan = plans[head]
    expected = {e.name: e.shape for e in plan.contribution.entries[: 2 * len(plan.adapted)]}
    if shapes != expected:
        differing = sorted({name.rpartition(".")[0] for name, _ in set(shapes.items()) ^ set(expected.items())})
        more = ", ..." if len(differing) > 8 else ""
        raise _other_factors(directory, manifest, f"{', '.join(differing[:8])}{more}")


def _other_factors(directory: RunDirectory, manifest: Manifest, differing: str) -> StorageError:
    shown = "".join(c if c.isprintable() else "?" for c in differing[:400])
    return StorageError(
        f"{directory.path_to(version_folder(manifest.version))} holds heads with other factors; they differ in "
        f"{shown}. If the run was begun when only nn.Linear layers had factors, continue it with --adapt linear."
    )


def write_evaluation(directory: RunDirectory, version: int, values: Mapping[str, float]) -> None:
    """Writes the figures of a version, before or after its checkpoint is complete. NaN and infinity become null."""
    finite = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
    data = json.dumps({"version": version, "values": finite}, indent=1).encode()
    directory.write(f"{version_folder(version)}/{EVALUATION}", data)


def read_evaluation(directory: RunDirectory, version: int) -> dict[str, float]:
    """Reads the finite figures of a version, in the order in which the worker gave them.

    Raises:
        Damaged: the evaluation is missing or can't be read.
        StorageError: storage fails.
    """
    path = f"{version_folder(version)}/{EVALUATION}"
    data = read_file(directory, path, MAX_EVALUATION_BYTES)
    try:
        content = json.loads(data)
        values = content["values"].items()
        if content["version"] != version:
            raise ValueError("it is of another version")
        return {
            name: float(value)
            for name, value in values
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise Damaged(f"{directory.path_to(path)} is damaged: {summarize_error(error)}.") from error


def best_versions(directory: RunDirectory, versions: Iterable[int], count: int, by: str = "") -> list[int]:
    """The `count` best of the versions, best first. Of equal ones the newest is better; those without a figure don't count.

    Args:
        by: name of the figure. The lowest is best, or the highest after a dash ("-accuracy"). Without a name it is the first
            figure of the newest evaluation.
    """
    name, sign = parse_best_by(by)
    scores: list[tuple[float, int]] = []
    for version in sorted(versions, reverse=True) if count else []:
        with contextlib.suppress(Damaged):  # a failing storage doesn't make a version bad
            values = read_evaluation(directory, version)
            name = name or next(iter(values), "")
            if name in values:
                scores.append((sign * values[name], version))
    return [version for _, version in sorted(scores, key=lambda pair: pair[0])[:count]]
