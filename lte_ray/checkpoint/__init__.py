"""Checkpoints: ``checkpoints/NNNNNN/`` with one file of main weights and one a head, and a manifest written last.

The folder's number is the base version. Every process writes its own file, so nothing large passes through one of
them. A folder without a manifest is no checkpoint. Tensors are safetensors, the rest JSON: nothing executes on load.

Format 2 (since 0.2)::

    manifest.json               what there is, with sizes and checksums; its own checksum; facts (step, standings, ledger, ...)
    base.safetensors            main weights and replicas, under the model's own names
    references.safetensors      by head, the factors that the base holds of it ("head-0003", flat)
    head-0003.safetensors       what that head needs to go on exactly; a head without one goes on from its reference
    policy.safetensors          what the merge policy keeps
    evaluation.json             the worker's judgement, written whenever it is there; not in the manifest

A file of a version that is written again has a number in its name (``base.1.safetensors``), so that none is replaced while a
manifest lists it. Format 1 had no references of its own (they are in the head files), no checksum of the manifest, and could be
gone on from only with all heads' files; it is still read.
"""

from __future__ import annotations

from lte_ray.checkpoint.files import (
    BASE,
    EVALUATION,
    POLICY,
    REFERENCES,
    check_factors,
    head_file,
    read_base,
    read_evaluation,
    read_head,
    read_policy,
    read_references,
    write_base,
    write_evaluation,
    write_head,
    write_policy,
    write_references,
)
from lte_ray.checkpoint.manifest import (
    FOLDER,
    FORMAT,
    FORMATS,
    MANIFEST,
    Damaged,
    FileEntry,
    Manifest,
    commit,
    has_all_heads,
    manifest_checksum,
    read_manifest,
    version_folder,
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

__all__ = [
    "BASE",
    "EVALUATION",
    "FOLDER",
    "FORMAT",
    "FORMATS",
    "MANIFEST",
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
    "manifest_checksum",
    "newest_resumable",
    "prune",
    "read_base",
    "read_evaluation",
    "read_head",
    "read_manifest",
    "read_newest_intact",
    "read_policy",
    "read_references",
    "remove_after",
    "remove_incomplete",
    "verify",
    "version_folder",
    "write_base",
    "write_evaluation",
    "write_head",
    "write_policy",
    "write_references",
]
