"""Checkpoints: ``checkpoints/NNNNNN/`` with a file of main weights, a file for each head, and a manifest that is written last.

The folder's number is the base version. Every process writes its own file, so nothing large passes through one of them. A
folder without a manifest isn't a checkpoint. Tensors are safetensors, everything else is JSON: loading executes nothing.

Format 2 (since 0.2)::

    manifest.json               lists the files with sizes and checksums; its own checksum; facts (step, standings, ledger, ...)
    base.safetensors            main weights and replicas, under the model's own names
    momentum.safetensors        the momentum of outer steps, as the base; only if there is any
    residual.safetensors        what rounded changes of the base have left out (--send-down bf16 or int8), as the base
    ema.safetensors             the moving average of the bases (--ema), as the base
    references.safetensors      by head, the factors that the base contains ("head-0003", flat)
    head-0003.safetensors       what that head needs to resume exactly; a head without a file resumes from its reference
    policy.safetensors          what the merge policy keeps
    evaluation.json             the worker's evaluation, written when it is ready; not in the manifest

A head that moves to another node leaves its state in ``moved/head-0003.safetensors`` of the run directory, for its next process
only: the driver knows that file's checksum. The folder goes when the run ends.

A file of a version that is written again has a number in its name (``base.1.safetensors``), so that no file is replaced while a
manifest lists it. Format 1 had no separate references (they are in the head files) and no checksum of the manifest, and a run
could be resumed only with all heads' files. It can still be read.
"""

from __future__ import annotations

from lte_ray.checkpoint.files import (
    BASE,
    EMA,
    EVALUATION,
    MOMENTUM,
    POLICY,
    REFERENCES,
    check_factors,
    head_file,
    read_base,
    read_ema,
    read_evaluation,
    read_head,
    read_momentum,
    read_moved_head,
    read_policy,
    read_references,
    read_residual,
    write_base,
    write_ema,
    write_evaluation,
    write_head,
    write_momentum,
    write_moved_head,
    write_policy,
    write_references,
    write_residual,
)
from lte_ray.checkpoint.manifest import (
    FORMAT,
    FORMATS,
    Damaged,
    FileEntry,
    Manifest,
    commit,
    has_all_heads,
    read_manifest,
    serialize_manifest,
)
from lte_ray.checkpoint.retention import (
    complete_versions,
    incomplete_versions,
    newest_resumable,
    prune,
    read_newest_intact,
    remove_after,
    remove_incomplete,
    verify,
)
from lte_ray.storage.checkpoints import FOLDER, MANIFEST, version_folder

__all__ = [
    "BASE",
    "EMA",
    "EVALUATION",
    "FOLDER",
    "FORMAT",
    "FORMATS",
    "MANIFEST",
    "MOMENTUM",
    "POLICY",
    "REFERENCES",
    "Damaged",
    "FileEntry",
    "Manifest",
    "check_factors",
    "commit",
    "complete_versions",
    "has_all_heads",
    "head_file",
    "incomplete_versions",
    "newest_resumable",
    "prune",
    "read_base",
    "read_ema",
    "read_evaluation",
    "read_head",
    "read_manifest",
    "read_momentum",
    "read_moved_head",
    "read_newest_intact",
    "read_policy",
    "read_references",
    "read_residual",
    "remove_after",
    "remove_incomplete",
    "serialize_manifest",
    "verify",
    "version_folder",
    "write_base",
    "write_ema",
    "write_evaluation",
    "write_head",
    "write_momentum",
    "write_moved_head",
    "write_policy",
    "write_references",
    "write_residual",
]
