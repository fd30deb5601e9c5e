"""The placement group that a run is started in, such as that of a trial of Ray Tune: its bundles are for the heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.placement_group import get_current_placement_group, placement_group_table

from lte_ray.config import PlacementConfig
from lte_ray.config.node_labels import matches
from lte_ray.errors import ResourceError


@dataclass(frozen=True)
class EnclosingGroup:
    """Bundles of a placement group, one for each actor of heads.

    Attributes:
        group: Ray's.
        first: the number of the first bundle.
        bundles: their resources.
    """

    group: Any
    first: int
    bundles: tuple[dict[str, float], ...]

    def complete(self, config: PlacementConfig) -> PlacementConfig:
        """Returns the settings, with what the bundles have for each actor where the settings leave it open."""
        cpus, gpus = (min(bundle.get(name, 0.0) for bundle in self.bundles) for name in ("CPU", "GPU"))
        return replace(
            config,
            cpus_per_head=cpus if config.cpus_per_head is None else config.cpus_per_head,
            gpus_per_head=min(gpus, 1.0) if config.gpus_per_head is None else config.gpus_per_head,
        )

    def check(self, wanted: Mapping[str, float], labels: Mapping[str, str]) -> None:
        """Checks that the bundles suit the heads.

        Args:
            wanted: resources of each actor of heads.
            labels: that select the heads' nodes.

        Raises:
            ResourceError: a bundle has less, or is on another node.
        """
        for bundle in self.bundles:
            if any(amount > bundle.get(name, 0.0) + 1e-6 for name, amount in wanted.items() if name != "CPU" or amount >= 0.01):
                raise ResourceError(
                    f"Each actor of heads asks for {_words(wanted)}, but a bundle of the placement group that this run was "
                    f"started in has {_words(bundle)}. Give the bundles what the heads ask for, or leave --cpus-per-head and "
                    "--gpus-per-head out."
                )
        if labels and not self._are_on(labels):
            given = " ".join(f"{key}={value}" for key, value in labels.items())
            raise ResourceError(
                f"--head-labels is {given}, but a bundle of the placement group that this run was started in is on another "
                "node. Give that group the label selector (bundle_label_selector)."
            )

    def _are_on(self, labels: Mapping[str, str]) -> bool:
        """Whether all bundles are on nodes that a label selector chooses."""
        nodes = placement_group_table(self.group)["bundles_to_node_id"]
        labels_by_node = {node["NodeID"]: node.get("Labels") or {} for node in ray.nodes()}
        last = self.first + len(self.bundles)
        return all(matches(labels, labels_by_node.get(nodes.get(bundle), {})) for bundle in range(self.first, last))


def find_enclosing(actors: int) -> EnclosingGroup | None:
    """Returns the bundles of the placement group that this process is in.

    None if it is in no group, if the group isn't for what its processes start (``placement_group_capture_child_tasks``, which
    Ray Tune sets), or if it has no bundle but the process's own.

    Args:
        actors: of heads; each needs a bundle. They get the last ones.

    Raises:
        ResourceError: there are fewer bundles.
    """
    group = get_current_placement_group()  # None in a driver
    context = ray.get_runtime_context()
    if group is None or not context.should_capture_child_tasks_in_placement_group:
        return None
    occupied = 1 if set(context.get_assigned_resources()) - {"bundle"} else 0  # Ray marks a bundle's processes so
    bundles = group.bundle_specs
    if len(bundles) == occupied:
        return None
    if len(bundles) - occupied < actors:
        process = "one for this process, and " if occupied else ""
        raise ResourceError(
            f"The placement group that this run was started in has {len(bundles)} bundles, but the run needs {process}one for "
            f"each of its {actors} actors of heads. Give it {actors + occupied}, as tune.PlacementGroupFactory([{{}}] + "
            f"[{{'CPU': 1}}] * {actors}), or one only: then the run reserves places of its own."
        )
    return EnclosingGroup(group, len(bundles) - actors, tuple(bundles[-actors:]))


def _words(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items()) or "nothing"
