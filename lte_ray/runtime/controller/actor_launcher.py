"""Starts the actors of a run, with the resources that each may use, and ends them.

The actors' classes are plain Python: `ray.remote` is applied here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from lte_ray.checkpoint import FileEntry
from lte_ray.engine.prepare import Initial
from lte_ray.engine.process_tuning import available_cores, head_threads
from lte_ray.runtime.context import RunContext
from lte_ray.runtime.draining import draining_nodes
from lte_ray.runtime.evaluator_actor import EvaluatorActor
from lte_ray.runtime.head.actor import HeadActor, HeadHost
from lte_ray.runtime.nodes import OF_ONE_NODE, coordinator_selector, free_gpus, live_nodes
from lte_ray.runtime.placement import Placement


class ActorLauncher:
    """Starts actors and keeps track of those that live, so that none outlives the run.

    Args:
        context: of the run.
        initial: the model and the plans.
        placement: what each actor of heads reserves.
        stack_heads: whether an actor's heads are computed as one batch.
    """

    def __init__(self, context: RunContext, initial: Initial, placement: Placement, stack_heads: str) -> None:
        self._context, self._initial, self._placement, self._stack_heads = context, initial, placement, stack_heads
        self._alive: list[Any] = []

    def launch(self, kind: type, options: dict[str, Any], *args: Any) -> Any:
        """Starts an actor with these options of Ray's. Its "ctl" group answers calls while it works."""
        actor = ray.remote(concurrency_groups={"ctl": 4})(kind).options(max_restarts=0, **options).remote(*args)
        self._alive.append(actor)
        return actor

    def unreserved(self, processes: int = 1) -> dict[str, Any]:
        """Returns Ray's options for actors that reserve nothing, on the nodes of --coordinator-labels; several are spread."""
        draining = draining_nodes()
        nodes = [node for node in live_nodes() if node.id not in draining]
        selector = coordinator_selector(self._placement.coordinator_labels, nodes, processes)
        if draining and nodes:  # Ray may place what needs no resources on them
            selector = {**selector, OF_ONE_NODE: f"!in({','.join(sorted(draining))})"}
        strategy = "SPREAD" if processes > 1 else "DEFAULT"
        return {"num_cpus": 0, "scheduling_strategy": strategy, "label_selector": selector or None}

    def launch_heads(
        self, numbers: tuple[int, ...], strategy: Any, incarnation: int, moved: Mapping[int, FileEntry] | None = None
    ) -> Any:
        """Starts an actor for these heads under a scheduling strategy. `moved` is as for `HeadActor`."""
        placement, (concurrent_heads, threads) = self._placement, self._concurrency
        resources = {k: v for k, v in placement.bundle.items() if k not in ("CPU", "GPU")}
        options = {"num_cpus": placement.bundle.get("CPU", 0), "num_gpus": placement.gpus, "resources": resources}
        options["scheduling_strategy"] = strategy
        host = HeadHost(threads, concurrent_heads, placement.gpus > 0, self._stack_heads, placement.gpu_memory)
        return self.launch(HeadActor, options, self._context, self._initial.plans, numbers, host, incarnation, moved)

    def launch_evaluator(self, head_actors: int) -> Any:
        """Starts the evaluator on what the heads' actors, which are `head_actors`, leave: a GPU if there is one, idle cores."""
        concurrent_heads, threads = self._concurrency
        options = self.unreserved()
        wanted = self._placement.gpus
        gpus = wanted if 0 < wanted <= free_gpus(options["label_selector"] or {}) else 0
        idle_cores = max(1, available_cores() - concurrent_heads * threads * head_actors)
        options["num_gpus"] = gpus
        return self.launch(
            EvaluatorActor, options, self._context, self._initial.plans, idle_cores, gpus > 0, self._placement.gpu_memory
        )

    @property
    def _concurrency(self) -> tuple[int, int]:
        """How many heads of an actor train concurrently, and torch's threads for each."""
        per_head = self._context.settings.train.threads_per_head
        return head_threads(per_head, self._placement.cpus, self._placement.heads)

    def end(self, actor: Any) -> None:
        """Ends an actor; one that was ended before is left alone."""
        if actor in self._alive:
            self._alive.remove(actor)
            ray.kill(actor)

    def end_all(self) -> None:
        """Ends all actors that are left."""
        for actor in self._alive:
            ray.kill(actor)
