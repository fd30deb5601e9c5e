"""A small checkpoint to damage, and everything that a resumed run or an export reads."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lte_ray import checkpoint
from lte_ray.errors import StorageError
from lte_ray.storage import RunDirectory
from tests.support.plans import plan_from_shapes, random_flat

PLAN = plan_from_shapes([(6, 5, 2)], [(4,)], scaling=2.0)
HEADS = (0, 1)
FACTS = {"step": 4, "taken": 8, "samples": 64, "lte": {"num_heads": 2, "lora_r": 2}}
FOLDER = "checkpoints/000001"


def write_checkpoint(directory: RunDirectory, version: int = 1) -> checkpoint.Manifest:
    """Writes a complete checkpoint with every kind of file."""
    directory.create()
    factors = {e.name: torch.ones(e.shape) for e in PLAN.contribution.entries[: 2 * len(PLAN.adapted)]}
    state = {f"factor.{name}": tensor for name, tensor in factors.items()} | {"reference": torch.zeros(3)}
    files = [checkpoint.write_base(directory, version, PLAN, random_flat(PLAN.base.size, 1).float())]
    files += [checkpoint.write_head(directory, version, head, state, {"step": 4, "cursor": 4}) for head in HEADS]
    files.append(checkpoint.write_references(directory, version, {head: torch.ones(3) for head in HEADS}))
    files.append(checkpoint.write_momentum(directory, version, PLAN, "nesterov", random_flat(PLAN.base.size, 2).float()))
    files.append(checkpoint.write_residual(directory, version, PLAN, random_flat(PLAN.base.size, 3).float()))
    files.append(checkpoint.write_ema(directory, version, PLAN, random_flat(PLAN.base.size, 4).float()))
    files.append(checkpoint.write_policy(directory, version, "nesterov", {"velocity": torch.ones(3)}))
    checkpoint.write_evaluation(directory, version, {"loss": 1.0})
    return checkpoint.commit(directory, version, HEADS, files, FACTS)


def copy_run(intact: Path, to: Path) -> RunDirectory:
    """Copies the intact run directory to `to`/run."""
    shutil.rmtree(to / "run", ignore_errors=True)
    shutil.copytree(intact, to / "run")
    return RunDirectory.open(str(to), "run")


def read_files(folder: Path) -> dict[str, bytes]:
    """Returns the contents of all files in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read_all(directory: RunDirectory) -> list[str]:
    """Reads all that a resumed run or an export reads, and returns the error messages."""
    said: list[str] = []

    def attempt(read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(directory, *arguments)
        except StorageError as error:
            said.append(str(error))
            return None

    for version in checkpoint.complete_versions(directory):
        manifest = attempt(checkpoint.read_manifest, version)
        attempt(checkpoint.read_evaluation, version)
        if manifest is None:
            continue
        attempt(checkpoint.verify, manifest)
        attempt(checkpoint.read_base, manifest, PLAN)
        attempt(checkpoint.read_references, manifest)
        attempt(checkpoint.read_momentum, manifest, PLAN, "nesterov")
        attempt(checkpoint.read_residual, manifest, PLAN)
        attempt(checkpoint.read_ema, manifest, PLAN)
        attempt(checkpoint.read_policy, manifest, "nesterov")
        for head in (*HEADS, 9):
            attempt(checkpoint.read_head, manifest, head)
        attempt(checkpoint.check_factors, manifest, [PLAN, PLAN])
    attempt(checkpoint.read_newest_intact)
    attempt(checkpoint.newest_resumable)
    return said


def read_and_check(directory: RunDirectory) -> list[str]:
    """As `read_all`, and asserts that reading changes nothing and that messages are short and printable."""
    root = Path(directory.path).parent
    before = read_files(root)
    said = read_all(directory)
    assert read_files(root) == before
    for text in said:
        assert len(text) < 1_000
        assert all(line.isprintable() for line in text.split("\n"))
    return said


def forge_file(tmp_path: Path, name: str, content: bytes) -> None:
    """Writes the file, and a manifest with its size and hash."""
    folder = tmp_path / "run" / "checkpoints" / "000001"
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest["files"]:
        if entry["name"] == name:
            entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_bytes(checkpoint.serialize_manifest(manifest))
