"""The parts of a checkpoint: base, references, heads' states, and what the merge policy keeps."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lte_ray.checkpoint.files import BASE, POLICY, REFERENCES, damaged, head_file, read_tensors, write_tensors
from lte_ray.checkpoint.manifest import FileEntry, Manifest, folder
from lte_ray.errors import StorageError
from lte_ray.layout import Plan
from lte_ray.merging.flat import gather, views
from lte_ray.storage import RunDirectory

_HEAD = re.compile(r"head-(\d{4,9})", re.ASCII)


def write_base(directory: RunDirectory, version: int, plan: Plan, base: Tensor) -> FileEntry:
    """Writes the main weights and replicas of `version` under the model's own parameter names."""
    return write_tensors(directory, version, BASE, views(plan.base, base), {})


def read_base(directory: RunDirectory, manifest: Manifest, plan: Plan) -> Tensor:
    """The base of a checkpoint, flat.

    Raises:
        StorageError: the file is damaged, or is of another model.
    """
    tensors, _ = read_tensors(directory, manifest, BASE)
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    expected = {e.name: e.shape for e in plan.base.entries}
    if found != expected:
        differing = repr(sorted(set(found.items()) ^ set(expected.items()))[:4])[:400]
        raise StorageError(
            f"{directory.at(folder(manifest.version))} holds another model than the worker builds; they differ in {differing}."
        )
    types = {t.dtype for t in tensors.values()}
    if len(types) != 1 or not all(kind.is_floating_point for kind in types):
        raise damaged(directory, manifest, BASE, f"its weights are of {', '.join(sorted(map(str, types)))}")
    return gather(plan.base, tensors, next(iter(types)))


def write_references(directory: RunDirectory, version: int, references: Mapping[int, Tensor]) -> FileEntry:
    """Writes, by head, the factors that the base of `version` holds of it: 1-D, `plan.factors_size` elements."""
    tensors = {f"head-{head:04d}": reference for head, reference in references.items()}
    return write_tensors(directory, version, REFERENCES, tensors, {})


def read_references(directory: RunDirectory, manifest: Manifest, plans: Sequence[Plan] | None = None) -> dict[int, Tensor]:
    """What `write_references` wrote; none of a head where B' = 0. In format 1 they are in the heads' files.

    Args:
        plans: each head's, to check the sizes; heads beyond them aren't checked.

    Raises:
        StorageError: a file is damaged, or a reference isn't of these plans.
    """
    found: dict[int, Tensor] = {}
    name = REFERENCES
    if manifest.format == 1:
        for head in manifest.heads:
            tensors, _ = read_tensors(directory, manifest, head_file(head))
            if "reference" in tensors:
                found[head] = tensors["reference"]
        name = head_file(min(manifest.heads, default=0))
    elif manifest.entry(REFERENCES) is not None:
        for key, tensor in read_tensors(directory, manifest, REFERENCES)[0].items():
            match = _HEAD.fullmatch(key)
            if match is None:
                raise damaged(directory, manifest, name, f"{key!r:.40} is no head")
            found[int(match[1])] = tensor
    for head, tensor in found.items():
        if tensor.dim() != 1 or not tensor.dtype.is_floating_point:
            what = f"the reference of head {head} is a {tensor.dtype} of shape {tuple(tensor.shape)}"
            raise damaged(directory, manifest, name, what)
        if plans is not None and head < len(plans) and tensor.numel() != plans[head].factors_size:
            raise _other_factors(directory, manifest, f"the size of head {head}'s")
    return found


def write_head(directory: RunDirectory, version: int, head: int, tensors: dict[str, Tensor], meta: dict[str, Any]) -> FileEntry:
    """Writes one head's state (`Head.state`)."""
    return write_tensors(directory, version, head_file(head), tensors, {"state": json.dumps(meta)})


def read_head(directory: RunDirectory, manifest: Manifest, head: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """One head's state, for `Head.load_state`: tensors by name, and JSON values by name.

    Raises:
        StorageError: the file isn't there or is damaged.
    """
    name = head_file(head)
    tensors, metadata = read_tensors(directory, manifest, name)
    try:
        state = json.loads(metadata["state"])
    except (ValueError, KeyError, RecursionError) as error:
        raise damaged(directory, manifest, name, error) from error
    if not isinstance(state, dict):
        raise damaged(directory, manifest, name, "its state isn't an object")
    return tensors, state


def write_policy(directory: RunDirectory, version: int, name: str, tensors: dict[str, Tensor]) -> FileEntry:
    """Writes what the merge policy `name` keeps from one merge to the next."""
    return write_tensors(directory, version, POLICY, tensors, {"policy": name})


def read_policy(directory: RunDirectory, manifest: Manifest, name: str) -> dict[str, Tensor]:
    """What `write_policy` wrote; empty if that was nothing, or another policy's.

    Raises:
        StorageError: the file is damaged.
    """
    if manifest.entry(POLICY) is None:
        return {}
    tensors, metadata = read_tensors(directory, manifest, POLICY)
    return tensors if metadata.get("policy") == name else {}


def check_factors(directory: RunDirectory, manifest: Manifest, plans: Sequence[Plan]) -> None:
    """Raises StorageError unless the heads' factors are those of the plans. Their settings are: so one head tells.

    Without a head's state, which names its factors, the sizes of the references must do.
    """
    head = next((head for head in manifest.heads if head < len(plans)), None)
    if head is None:
        read_references(directory, manifest, plans)
        return
    tensors, _ = read_head(directory, manifest, head)
    found = {name.removeprefix("factor."): tuple(t.shape) for name, t in tensors.items() if name.startswith("factor.")}
    plan = plans[head]
    expected = {e.name: e.shape for e in plan.contribution.entries[: 2 * len(plan.adapted)]}
    if found != expected:
        differing = sorted({name.rpartition(".")[0] for name, _ in set(found.items()) ^ set(expected.items())})
        more = ", ..." if len(differing) > 8 else ""
        raise _other_factors(directory, manifest, f"{', '.join(differing[:8])}{more}")


def _other_factors(directory: RunDirectory, manifest: Manifest, differing: str) -> StorageError:
    shown = "".join(c if c.isprintable() else "?" for c in differing[:400])
    return StorageError(
        f"{directory.at(folder(manifest.version))} holds heads with other factors; they differ in {shown}. If the run was "
        "begun when only nn.Linear layers had factors, continue it with --adapt linear."
    )
