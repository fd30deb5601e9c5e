"""Actors of a run: their copies of the main weights, their resources, and their threads."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import torch
from ray.util import placement_group_table

from lte_ray.config import FailureConfig, PlacementConfig
from lte_ray.engine.head.virtual import HeadGroup
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError
from lte_ray.merging.registry import make_policy
from lte_ray.messages import HeadStatus
from lte_ray.run.metrics import SilentReporter
from lte_ray.runtime.context import PickledObject, RunContext
from lte_ray.runtime.controller.controller import TrainController
from lte_ray.runtime.coordinator_state import CoordinatorState
from lte_ray.runtime.object_store import ObjectStore
from lte_ray.runtime.placement import Placement, assign_heads, from_scaling_config, reserve, resolve, transfer_groups
from lte_ray.storage import RUN, RunDirectory
from tests.support.ray_runs import Regression, settings

pytestmark = pytest.mark.ray
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # for the functions below that run inside a head


@contextlib.contextmanager
def actors(path: Path, placement: Placement, **train: Any) -> Iterator[TrainController]:
    """The actors of a run, which train without a controller that watches them."""
    kwargs = settings(**train)
    config = Settings("r", kwargs["lte"], kwargs["merge"], kwargs["train"])
    directory = RunDirectory.open(str(path), "r")
    directory.create()
    initial = prepare(Regression(), config)
    groups = transfer_groups(config.merge, initial.plans, 1)
    context = RunContext(PickledObject.pickle(Regression()), config, directory, ObjectStore(), groups)
    directory.write(RUN, b"")
    with reserve(placement, assign_heads(placement, config.lte.num_heads)) as reservation:
        controller = TrainController(
            context=context,
            initial=initial,
            start=CoordinatorState(0, context.transport.publish(initial.base)),
            policy=PickledObject.pickle(make_policy(config.merge)),
            reservation=reservation,
            failure=FailureConfig(max_failures=0),
            stack_heads="auto",
            reporter=SilentReporter(),
            export=lambda base: None,
        )
        with controller.actors():
            yield controller


def wait_for_heads(run: TrainController) -> list[tuple[HeadStatus, ...]]:
    return ray.get([slot.run for slot in run.heads.slots])


def stored_weight(group: HeadGroup) -> torch.Tensor:
    stored = next(iter(group.heads[0].converted.main_weights.values())).stored
    assert isinstance(stored, torch.Tensor)
    return stored


def first_weight(group: HeadGroup) -> torch.Tensor:
    return stored_weight(group).clone()


def perturb(group: HeadGroup) -> None:
    with torch.no_grad():
        stored_weight(group).add_(1.0)


def torch_threads(group: HeadGroup) -> int:
    return torch.get_num_threads()


def test_heads_reserve_resources_and_have_their_own_main_weights(local_ray: None, tmp_path: Path) -> None:
    """Two heads with 2 CPUs each reserve a bundle of 2 CPUs each, and torch uses 2 threads in each.

    If one head's base is perturbed, the other head's and the coordinator's stay the same.
    """
    with actors(tmp_path, Placement(cpus=2, gpus=0), steps=5) as run:
        wait_for_heads(run)
        bundles = [group["bundles"] for group in placement_group_table().values() if group["state"] == "CREATED"]
        assert bundles == [{0: {"CPU": 2.0}, 1: {"CPU": 2.0}}]
        assert ray.get(run.heads.slots[0].actor.status.remote())[0].step == 5
        # the thread count is set where the head trains, so it is read there
        assert ray.get(run.heads.slots[1].actor.inspect.remote(torch_threads)) == 2
        before = ray.get([slot.actor.inspect.remote(first_weight) for slot in run.heads.slots])
        _, published, *_ = ray.get(run.coordinator.actor.finish.remote())
        base = ObjectStore().fetch(published).clone()
        ray.get(run.heads.slots[0].actor.inspect.remote(perturb))
        after = ray.get([slot.actor.inspect.remote(first_weight) for slot in run.heads.slots])
        assert torch.equal(after[0], before[0] + 1.0)
        assert torch.equal(after[1], before[1])
        assert torch.equal(ObjectStore().fetch(published), base)


def test_status_answers_while_a_head_trains(local_ray: None, tmp_path: Path) -> None:
    """A head reports its step during training."""
    with actors(tmp_path, Placement(cpus=1, gpus=0), steps=100_000) as run:
        runs = [slot.run for slot in run.heads.slots]
        while ray.get(run.heads.slots[0].actor.status.remote(), timeout=120)[0].step < 5:
            assert not ray.wait(runs, timeout=0.05)[0]
        assert ray.get(run.coordinator.actor.status.remote(0)).version >= 0


def test_heads_share_cores_by_default(local_ray: None) -> None:
    """On 4 CPUs, two heads get one each and eight get half of one each; without GPUs, none is requested."""
    assert resolve(PlacementConfig(), 2) == Placement(cpus=1.0, gpus=0.0)
    assert resolve(PlacementConfig(), 8) == Placement(cpus=0.5, gpus=0.0)


def test_num_workers_sets_the_number_of_actors() -> None:
    """ScalingConfig(num_workers): one actor per head by default; fewer actors host several heads; others are an error."""
    heads_per_actor = [
        from_scaling_config(ray.train.ScalingConfig(num_workers=n), 32)[0].heads_per_actor for n in (1, 32, 4, 5)
    ]
    assert heads_per_actor == [1, 1, 8, 7]
    with pytest.raises(ConfigError, match="Leave num_workers out for one head each, or give 16"):
        from_scaling_config(ray.train.ScalingConfig(num_workers=17), 32)
    with pytest.raises(ConfigError, match="or give 2"):
        from_scaling_config(ray.train.ScalingConfig(num_workers=3), 2)
    placement = Placement(cpus=1, gpus=0, heads=2)
    assert assign_heads(placement, 5) == [(0, 1), (2, 3), (4,)]


def test_an_actor_of_several_heads_gets_their_cores_by_default(local_ray: None) -> None:
    """On 4 CPUs: two actors of 4 heads get 2 CPUs each, one actor of 32 heads gets 4, and one of 2 heads gets 2."""
    placements = [resolve(PlacementConfig(heads_per_actor=each), heads) for heads, each in ((8, 4), (32, 32), (2, 2))]
    assert [(p.cpus, p.heads) for p in placements] == [(2.0, 4), (4.0, 32), (2.0, 2)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_head_with_a_gpu_trains_on_its_first_device(tmp_path: Path) -> None:
    """Inside its actor, a head's GPU is cuda:0, whatever its number is on the machine."""
    with ray.init(address="local", num_cpus=2, include_dashboard=False):
        share = 1.0 if torch.cuda.device_count() > 1 else 0.5
        with actors(tmp_path, Placement(cpus=1, gpus=share), steps=5) as run:
            assert [s.device for (s,) in wait_for_heads(run)] == ["cuda:0", "cuda:0"]
