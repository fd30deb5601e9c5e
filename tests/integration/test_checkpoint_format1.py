"""Checkpoints of format 1, which release 0.1 wrote: a real one is read and follows the rules of its format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lte_ray import LTEConfig, LTETrainer, MergeConfig, TrainConfig, checkpoint
from lte_ray.config import StorageConfig
from lte_ray.engine.in_process import run_in_process
from lte_ray.engine.prepare import Initial, prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import StorageError
from lte_ray.layout import Plan
from lte_ray.merging.flat_buffer import factor_views
from lte_ray.storage import RunDirectory
from workers.regression import Regression

FIXTURE = Path(__file__).parents[1] / "fixtures" / "checkpoint-1"
"""A run of `workers.regression` with 2 heads, 8 steps, and outer Nesterov, at its second of four merges; see its run.toml."""

WORKER = Regression(width=4, batch_size=4, samples=64)
SETTINGS = Settings(
    "checkpoint-1",
    LTEConfig(num_heads=2, lora_r=2, lora_alpha=4),
    MergeConfig(merge_iter=2, policy="nesterov", merge_threads=1),
    TrainConfig(steps=8, seed=3, checkpoint_every=2, eval_every=2),
)


@pytest.fixture(scope="module")
def initial() -> Initial:
    """The model that the run trained."""
    return prepare(WORKER, SETTINGS, torch.float32)


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """A copy of the old run."""
    shutil.copytree(FIXTURE, tmp_path / "checkpoint-1")
    return RunDirectory.open(str(tmp_path), "checkpoint-1")


def edit(directory: RunDirectory, **changes: object) -> None:
    """Edits the manifest, which has no checksum in this format."""
    path = Path(directory.path, "checkpoints", "000002", "manifest.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_its_manifest_is_read(directory: RunDirectory) -> None:
    """Format, heads, files, and facts are those that were written."""
    manifest = checkpoint.read_manifest(directory, 2)
    assert (manifest.format, manifest.version, manifest.heads) == (1, 2, (0, 1))
    assert (manifest.facts["step"], manifest.facts["taken"], manifest.facts["lte"]["num_heads"]) == (4, 8, 2)
    checkpoint.verify(directory, manifest)
    assert checkpoint.has_all_heads(manifest)
    assert checkpoint.read_newest_intact(directory) == (manifest, [])
    assert checkpoint.newest_resumable(directory) == manifest


def test_its_base_and_references_match(directory: RunDirectory, initial: Initial) -> None:
    """The base has the shape of the worker's model; right after a merge, references equal the heads' factors."""
    manifest = checkpoint.read_manifest(directory, 2)
    plan: Plan = initial.plan
    base = checkpoint.read_base(directory, manifest, plan)
    assert base.shape == initial.base.shape
    assert not torch.equal(base, initial.base)
    checkpoint.check_factors(directory, manifest, initial.plans)
    references = checkpoint.read_references(directory, manifest, initial.plans)
    assert sorted(references) == [0, 1]
    for head, reference in references.items():
        tensors, meta = checkpoint.read_head(directory, manifest, head)
        assert (meta["head"], meta["version"], meta["step"]) == (head, 2, 4)
        factors = factor_views(plan, reference)
        assert {n: t.tolist() for n, t in factors.items()} == {n: tensors[f"factor.{n}"].tolist() for n in factors}


def test_its_policy_state_is_read(directory: RunDirectory, initial: Initial) -> None:
    """The policy that wrote the outer momentum gets it; another policy gets nothing."""
    manifest = checkpoint.read_manifest(directory, 2)
    (momentum,) = checkpoint.read_policy(directory, manifest, "nesterov").values()
    assert momentum.shape == initial.base.shape
    assert checkpoint.read_policy(directory, manifest, "average") == {}


def test_it_needs_all_heads_states(directory: RunDirectory) -> None:
    """A checkpoint with fewer can't be resumed from; the error says which heads it has."""
    edit(directory, heads=[1])
    assert not checkpoint.has_all_heads(checkpoint.read_manifest(directory, 2))
    assert checkpoint.newest_resumable(directory) is None
    with pytest.raises(StorageError, match=r"000002, of an older release, holds the state of heads \[1\] only"):
        checkpoint.read_newest_intact(directory)
    edit(directory, heads=[])
    with pytest.raises(StorageError, match="holds the main weights alone"):
        checkpoint.read_newest_intact(directory)


def test_prune_keeps_the_newest_that_can_be_resumed(directory: RunDirectory) -> None:
    """A newer checkpoint of format 1 without heads doesn't replace it; one of format 2 does."""
    folder = Path(directory.path, "checkpoints")
    manifest = json.loads((folder / "000002" / "manifest.json").read_text())
    (folder / "000003").mkdir()
    (folder / "000003" / "manifest.json").write_text(json.dumps(manifest | {"version": 3, "heads": [], "files": []}))
    checkpoint.prune(directory, 1)
    assert checkpoint.complete_versions(directory) == [2, 3]
    checkpoint.commit(directory, 4, (), [], {})
    checkpoint.prune(directory, 1)
    assert checkpoint.complete_versions(directory) == [4]


@pytest.mark.parametrize("facts", [{}, {"lte": 3}, {"lte": {}}, {"lte": {"num_heads": "many"}}, {"lte": {"num_heads": None}}])
def test_facts_without_the_number_of_heads(directory: RunDirectory, facts: object) -> None:
    """The checkpoint counts as damaged."""
    edit(directory, facts=facts)
    with pytest.raises(StorageError, match="damaged: it doesn't say how many heads there were"):
        checkpoint.has_all_heads(checkpoint.read_manifest(directory, 2))
    with pytest.raises(StorageError, match="None of the checkpoints in"):
        checkpoint.read_newest_intact(directory)


def test_a_checksum_is_verified_in_every_format(directory: RunDirectory) -> None:
    """A manifest that has a checksum must match it, even if it says that its format is 1."""
    edit(directory, sha256="0" * 64)
    with pytest.raises(StorageError, match=r"000002/manifest.json is damaged: .*torn or edited"):
        checkpoint.read_manifest(directory, 2)


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_resumes_from_it(local_ray: None, directory: RunDirectory) -> None:
    """Heads take the remaining steps with the stored momentum; the next checkpoint has format 2."""
    root, name = str(Path(directory.path).parent), "checkpoint-1"
    result = LTETrainer(
        WORKER,
        lte=SETTINGS.lte,
        merge=SETTINGS.merge,
        train=SETTINGS.train,
        run_config=StorageConfig(name=name, storage=root, resume=True),
    ).fit()
    assert result.metrics is not None
    assert (result.metrics["version"], result.metrics["step"], result.metrics["samples"]) == (4, 8, 2 * 8 * 4)
    assert checkpoint.read_manifest(directory, 4).format == 2
    expected = run_in_process(WORKER, SETTINGS)
    merged = checkpoint.read_base(directory, checkpoint.read_manifest(directory, 4), expected.plan)
    assert torch.allclose(merged, expected.base, rtol=0.0, atol=1e-6)
