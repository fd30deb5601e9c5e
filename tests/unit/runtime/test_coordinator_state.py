"""From a checkpoint to a state: what a manifest says is used as it is, or refused with one error."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lte_ray import checkpoint
from lte_ray.config import MergeConfig, TrainConfig
from lte_ray.data.assignment import PartitionAssignor
from lte_ray.data.partition import initial_partitions as first_lanes
from lte_ray.errors import StorageError
from lte_ray.merging.registry import make_policy
from lte_ray.runtime.coordinator_state import CoordinatorState, load_checkpoint
from lte_ray.storage import RunDirectory
from tests.support.plans import plan_from_shapes, random_flat
from tests.unit.checkpoint.test_damaged_checkpoints import FUZZ, places, replaced, values

PLAN = plan_from_shapes([(6, 5, 2)], [(4,)], scaling=2.0)
LANES = {head: first_lanes(head, 2) for head in (0, 1)}
FACTS = {
    "step": 4,
    "lte": {"num_heads": 2},
    "standings": {
        str(head): {"incarnation": head, "sequence": 2, "version": 3, "step": 4, "samples": 32, "batches": 4, "lanes": lanes}
        for head, lanes in LANES.items()
    },
    "ledger": PartitionAssignor(LANES).state(),
    "guard": {},
}
AT = Path("checkpoints", "000003")


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    """A run of two heads with a checkpoint of version 3."""
    directory = RunDirectory.open(str(tmp_path), "run")
    directory.create()
    files = [checkpoint.write_base(directory, 3, PLAN, random_flat(PLAN.base.size, 1).float())]
    files += [checkpoint.write_head(directory, 3, head, {"a": torch.ones(2)}, {"step": 4 + head}) for head in LANES]
    files.append(
        checkpoint.write_references(directory, 3, {head: random_flat(PLAN.factors_size, head).float() for head in LANES})
    )
    checkpoint.commit(directory, 3, tuple(LANES), files, json.loads(json.dumps(FACTS)))
    return directory


def start(directory: RunDirectory, num_heads: int = 2, policy: str = "nesterov", ema: float = 0.0) -> CoordinatorState:
    settings = SimpleNamespace(merge=MergeConfig(policy=policy), train=TrainConfig(ema=ema))
    transport = SimpleNamespace(publish=lambda tensor: tensor)
    common: Any = SimpleNamespace(directory=directory, transport=transport, settings=settings)
    return load_checkpoint(common, [PLAN] * max(2, num_heads), 3, num_heads, make_policy(settings.merge))


def add_file(directory: RunDirectory, entry: checkpoint.FileEntry) -> None:
    """Commits the checkpoint again, with another file."""
    manifest = checkpoint.read_manifest(directory, 3)
    checkpoint.commit(directory, 3, manifest.heads, [*manifest.files, entry], manifest.facts)


def test_the_moving_average_continues(directory: RunDirectory) -> None:
    """If the run still has one (--ema); else, and where the checkpoint has none, there is none."""
    average = random_flat(PLAN.base.size, 2).float()
    assert start(directory, ema=0.9).ema is None
    add_file(directory, checkpoint.write_ema(directory, 3, PLAN, average))
    assert torch.equal(start(directory, ema=0.9).ema, average)
    assert start(directory).ema is None


def test_momentum_continues_under_the_policy_that_made_it(directory: RunDirectory) -> None:
    """Under another it is 0, as where the checkpoint holds none."""
    assert start(directory).momentum is None
    momentum = random_flat(PLAN.base.size, 2).float()
    add_file(directory, checkpoint.write_momentum(directory, 3, PLAN, "lte_ray.merging.outer:Nesterov", momentum))
    assert start(directory, policy="average").momentum is None
    assert start(directory, policy="nesterov").momentum is None
    restored = start(directory, policy="lte_ray.merging:Nesterov").momentum
    assert torch.equal(restored, momentum)


def test_momentum_that_an_earlier_release_saved_as_the_policys_state_continues(directory: RunDirectory) -> None:
    """It becomes that of the outer steps."""
    momentum = random_flat(PLAN.base.size, 2).float()
    add_file(directory, checkpoint.write_policy(directory, 3, "nesterov", {"momentum": momentum}))
    assert start(directory, policy="average").momentum is None
    assert torch.equal(start(directory).momentum, momentum)


def test_momentum_of_another_model_is_refused(directory: RunDirectory) -> None:
    """As a base of another model is."""
    other = plan_from_shapes([(6, 5, 2)], [(5,)])
    momentum = random_flat(other.base.size, 2).float()
    add_file(directory, checkpoint.write_momentum(directory, 3, other, "nesterov", momentum))
    with pytest.raises(StorageError, match="holds another model than the worker builds"):
        start(directory)


def test_the_same_heads_continue_exactly(directory: RunDirectory) -> None:
    """With what the base contains of them, and the steps that they had taken since."""
    state = start(directory)
    assert (state.version, state.checkpoint_version, state.exact_heads, state.saved_heads) == (3, 3, {0, 1}, {0, 1})
    assert [state.position(head).incarnation for head in (0, 1)] == [0, 1]
    assert state.steps_by_head == {0: 4, 1: 5}
    assert state.references.keys() == {0, 1}


def test_another_number_of_heads_takes_over_the_data(directory: RunDirectory) -> None:
    """No head continues exactly. A new one has nothing in the base, and counts as having taken as many steps."""
    state = start(directory, 3)
    assert state.exact_heads == set()
    assert state.references.keys() == {0, 1}
    assert state.steps_by_head == {0: 4, 1: 4, 2: 4}
    assert state.position(2).sequence == 0


@pytest.mark.parametrize(
    "facts",
    [{"standings": [1]}, {"standings": {"0": {"step": "4"}}}, {"ledger": {"owners": 3}}, {"guard": [4]}, {"lte": {}}],
    ids=str,
)
def test_facts_that_no_run_writes_are_one_error(directory: RunDirectory, facts: dict[str, Any]) -> None:
    """It is raised before any actor starts."""
    file = Path(directory.path) / AT / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_bytes(checkpoint.serialize_manifest({**manifest, "facts": {**manifest["facts"], **facts}}))
    with pytest.raises(StorageError):
        start(directory)


@FUZZ
@given(data=st.data(), new=values, heads=st.sampled_from([1, 2, 4]))
def test_any_facts_give_a_state_or_one_error(directory: RunDirectory, data: st.DataObject, new: Any, heads: int) -> None:
    """Whatever replaces whichever fact."""
    file = Path(directory.path) / AT / "manifest.json"
    whole = file.read_bytes()
    manifest = json.loads(whole)
    place = data.draw(st.sampled_from([p for p in places(manifest) if p[:1] == ("facts",)]))
    file.write_bytes(checkpoint.serialize_manifest(replaced(manifest, place, new)))
    with contextlib.suppress(StorageError):
        start(directory, heads)
    file.write_bytes(whole)
