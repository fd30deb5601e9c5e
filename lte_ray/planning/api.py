"""Plans a run: what it trains, what it needs and what suits it, before anything starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lte_ray.config import BASE_DTYPES, LTEConfig, MergeConfig, TrainConfig
from lte_ray.config.hardware import Hardware
from lte_ray.engine.default_policy import resolve_policy
from lte_ray.engine.head.default_optimizer import check_optimizer_settings
from lte_ray.engine.head.worker_state import own_worker
from lte_ray.engine.prepare import describe_low_rank
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError
from lte_ray.planning.layers import Counts, LayerRow, count_parameters, layer_rows
from lte_ray.planning.measure import measure_head, measure_ordinary
from lte_ray.planning.memory import MemoryModel, Parts, total, with_gradient_buckets
from lte_ray.planning.recommendation import Recommendation, recommend
from lte_ray.planning.shapes import read_shapes
from lte_ray.planning.traffic import Ring, Traffic, ddp_ring, merge_traffic
from lte_ray.simulation.cost_model import as_sent
from lte_ray.worker import Worker

NEVER_MERGED = "With --never-merge, nothing is merged until the run ends: the traffic shown is that of merges without it."


@dataclass(frozen=True)
class RunPlan:
    """What a run trains and needs. Sizes in bytes, times in seconds; None where something isn't known.

    Attributes:
        worker: the name of its class.
        num_heads: of the settings.
        policy: the merge policy, also where the settings leave it open.
        layers: rows of parameters.
        counts: elements of the model.
        head: memory of a head on its device, by part, at the peak of a step.
        head_by_format: the same in all, by the format of main weights.
        host: memory of a head's process besides that, by part.
        processes: memory of driver, coordinator, object store and evaluator, by part.
        traffic: of a merge, first in the settings' formats.
        link: bytes per second for which times count.
        low_rank: in which matrices merges can't change all directions, in words; empty if there are none.
        ordinary: memory of a process of ordinary training with AdamW, by part.
        ddp: memory of a process of DDP, by part.
        ddp_ring: what as many processes of DDP as there are heads exchange in each step.
        recommendation: for the given GPUs; None without any.
        notes: what isn't known, and why.
    """

    worker: str
    num_heads: int
    policy: str
    layers: tuple[LayerRow, ...]
    counts: Counts
    head: Parts
    head_by_format: Mapping[str, int | None]
    host: Parts
    processes: Mapping[str, Parts]
    traffic: tuple[Traffic, ...]
    link: float
    low_rank: str
    ordinary: Parts
    ddp: Parts
    ddp_ring: Ring
    recommendation: Recommendation | None
    notes: tuple[str, ...]

    @property
    def trainable_share(self) -> float:
        """What a head trains, as a fraction of the model's parameters; above 1 if factors are larger than their weights."""
        return self.counts.trained / self.counts.parameters

    def to_json(self) -> dict[str, Any]:
        """Returns everything as JSON values, with sums of the memory under "total"."""
        values = dataclasses.asdict(self)
        values["trainable_share"] = self.trainable_share
        for name in ("head", "ordinary", "ddp"):
            values[name]["total"] = total(getattr(self, name))
        return values


def plan(
    worker: Worker,
    lte: LTEConfig | None = None,
    merge: MergeConfig | None = None,
    train: TrainConfig | None = None,
    *,
    gpu: str = "",
    num_gpus: int = 1,
    link: str | float = 1.25e9,
    step_time: str | float = 0.0,
) -> RunPlan:
    """Plans a run of `lte_ray.LTETrainer` with the same settings; starts nothing, and makes no weights.

    Args:
        worker: what to train; an instance, or its class if it needs no arguments.
        lte, merge, train: as for `lte_ray.LTETrainer`.
        gpu: the GPU to recommend settings for, by its memory (``"80GB"``) or name (``"H100"``); by default none.
        num_gpus: how many of these there are.
        link: each machine's link in each direction: ``"1Gbit"``, or bytes per second.
        step_time: of a local step, if it is known: ``"250ms"``, or seconds.

    Raises:
        ConfigError: the settings don't fit the model or each other, or a size or a time can't be read.
        WorkerError: the model can't be built, or can't be trained so.
    """
    hardware = Hardware(gpu, num_gpus, link, step_time)  # type: ignore[arg-type]  # it reads the units
    settings = Settings("plan", lte or LTEConfig(), merge or MergeConfig(), train or TrainConfig())
    return plan_run(worker() if isinstance(worker, type) else worker, settings, hardware)


def plan_run(worker: Worker, settings: Settings, hardware: Hardware) -> RunPlan:
    """Plans a run by its complete settings, as `plan`."""
    if settings.train.baseline:
        raise ConfigError(
            "--baseline is ordinary training, whose memory and traffic every plan shows next to those of heads. Leave it out."
        )
    check_optimizer_settings(worker, settings.train)
    name, worker = type(worker).__name__, own_worker(worker)
    shapes = read_shapes(worker, settings)
    rows = layer_rows(shapes)
    ordinary = measure_ordinary(worker, shapes, settings.train)
    memory = MemoryModel(shapes, settings)
    step = measure_head(worker, shapes, settings)
    settings = dataclasses.replace(settings, merge=resolve_policy(settings, step.orthogonalizes, memory.plan))
    memory.choose(settings)
    sent = as_sent(settings.merge)
    ordinary_parts = memory.ordinary(ordinary)

    def traffic(heads: int) -> Sequence[Traffic]:
        plans = shapes.plans if heads == len(shapes.plans) else shapes.plans[:1] * heads
        return merge_traffic(plans, settings, hardware.link)

    return RunPlan(
        worker=name,
        num_heads=settings.lte.num_heads,
        policy=settings.merge.policy if isinstance(settings.merge.policy, str) else type(settings.merge.policy).__name__,
        layers=rows,
        counts=count_parameters(rows, memory.plan),
        head=memory.head(step),
        head_by_format={f: total(memory.head(step, f)) for f in BASE_DTYPES} if memory.plan.adapted else {},
        host=memory.host(sent),
        processes=memory.processes(sent),
        traffic=tuple(traffic(settings.lte.num_heads)),
        link=hardware.link,
        low_rank=describe_low_rank(shapes.plans),
        ordinary=ordinary_parts,
        ddp=with_gradient_buckets(ordinary_parts, ordinary.gradients),
        ddp_ring=ddp_ring(memory.plan, max(2, settings.lte.num_heads), hardware.link),
        recommendation=recommend(memory, step, traffic, settings, hardware) if hardware.gpu else None,
        notes=(*shapes.notes, *step.problems, *[NEVER_MERGED] * settings.merge.never_merge),
    )
