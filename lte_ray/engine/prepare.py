"""The start of every run: checks the worker on this machine, and builds the first base."""

from __future__ import annotations

import copy
import math
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lte_ray.adapters.plan import make_plans, requested_ranks
from lte_ray.adapters.quantization import check_format
from lte_ray.config import LTEConfig, TrainConfig
from lte_ray.data.shard import Shard
from lte_ray.engine.first_loss import check_first_loss, describe_first_loss
from lte_ray.engine.head.compilation import check_compile
from lte_ray.engine.head.default_optimizer import check_optimizer_settings
from lte_ray.engine.head.optimization import build_optimizer, check_lr_scale, check_precision, match_modules
from lte_ray.engine.head.optimizer_state import optimizer_state
from lte_ray.engine.head.rng import preserve_generators
from lte_ray.engine.head.untrained import Fingerprints, fingerprints, resolve_buffers
from lte_ray.engine.head.worker_state import own_worker, worker_state
from lte_ray.engine.initial_weights import load_initial_weights
from lte_ray.engine.run_length import count_steps
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError, UserError, WorkerError
from lte_ray.layout import Adapted, Plan
from lte_ray.merging.flat_buffer import copy_rounded, gather, views
from lte_ray.optim import LoRAMuon
from lte_ray.worker import (
    Batch,
    ShardReads,
    Worker,
    build_model,
    check_worker,
    describe_unread_shard,
    endless_batches,
    flops_per_sample,
    observe_shard,
)


@dataclass(frozen=True)
class Initial:
    """The unconverted model as built, the plan of what each head trains, and version 0 of the base (flat, CPU).

    Attributes:
        optimizer: as each head builds its own; its factors are none that train.
        lte: the settings of heads, in which the buffers that are merged have names.
        untrained: fingerprints of what nothing trains in the model.
        data_problem: how the worker's batches don't follow the shard, in words; empty if they may.
        steps: local steps of each head.
        start: how the weights of ``--init-from`` don't fit the model, in words; empty if they do.
        loss_problem: that nothing can be learned from the first loss, in words; empty otherwise.
    """

    model: nn.Module
    plans: tuple[Plan, ...]
    base: Tensor
    optimizer: torch.optim.Optimizer
    lte: LTEConfig
    untrained: Fingerprints
    data_problem: str
    steps: int
    start: str
    loss_problem: str = ""

    def complete(self, settings: Settings) -> Settings:
        """Returns the settings with what only the model could tell."""
        lte = replace(settings.lte, merge_buffers=self.lte.merge_buffers)
        train = settings.train.with_steps(self.steps)
        return replace(settings, lte=lte, train=train, untrained=self.untrained, data_problem=self.data_problem)

    @property
    def plan(self) -> Plan:
        """The first head's plan; all heads have its base layout."""
        return self.plans[0]


def prepare(worker: Worker, settings: Settings, dtype: torch.dtype = torch.float32) -> Initial:
    """Builds the model and reads one batch, so that bad input is rejected before any actor starts.

    Raises:
        WorkerError: a method is missing or raised, it yielded no batch, or nothing can be adapted.
        ConfigError: the rank or an exclude pattern doesn't fit the model, or the optimizer's settings the worker.
    """
    check_worker(worker)
    worker_state(worker)
    check_compile(settings.train)
    check_optimizer_settings(worker, settings.train)
    check_flops(worker)
    with preserve_generators(torch.device("cpu")):  # the caller's random numbers don't change
        return _prepare(worker, settings, dtype)


def _prepare(worker: Worker, settings: Settings, dtype: torch.dtype) -> Initial:
    worker = own_worker(worker)  # a state of its own stays as it is
    model, start = build_first_model(worker, settings.train)
    batch, reads = read_first_batches(worker, settings)
    settings, plans = plan_heads(worker, settings, model, batch, reads.epoch)
    loss = check_first_loss(worker, model, batch, settings.train)
    optimizer = build_first_optimizer(worker, plans[0], model, settings.train)
    check_saved_state(worker, plans[0], settings.train)
    initial = make_initial(worker, settings, model, plans, optimizer, reads, start, dtype)
    return replace(initial, loss_problem=describe_first_loss(loss))


def make_initial(
    worker: Worker,
    settings: Settings,
    model: nn.Module,
    plans: tuple[Plan, ...],
    optimizer: torch.optim.Optimizer,
    reads: ShardReads,
    start: str,
    dtype: torch.dtype = torch.float32,
) -> Initial:
    """Gathers the first base and what else a run starts from.

    Args:
        settings, plans: as `plan_heads` returns them.
        model, start: as `build_first_model` returns them.
        optimizer: of `build_first_optimizer`.
        reads: what the worker reads of its shard.
        dtype: of the base.
    """
    tensors = named_tensors(model)
    base, data_problem = gather(plans[0].base, tensors, dtype), describe_unread_shard(worker, reads.names)
    untrained, steps = fingerprints(tensors, plans[0]), settings.train.steps
    return Initial(model, plans, base, optimizer, settings.lte, untrained, data_problem, steps, start)


def build_first_model(worker: Worker, train: TrainConfig) -> tuple[nn.Module, str]:
    """Builds the unconverted model that a run starts from.

    Returns:
        The model, and how the weights of ``--init-from`` don't fit it, in words.

    Raises:
        WorkerError: `build_model` raised, or its model can't be saved.
    """
    name = type(worker).__name__
    try:
        model = build_model(worker, train.seed)
        start = load_initial_weights(model, train.init_from) if train.init_from else ""
    except UserError:
        raise
    except Exception as error:
        raise WorkerError(f"{name}.build_model() raised:\n\n{traceback.format_exc()}") from error
    not_tensors = [key for key, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if not_tensors:
        raise WorkerError(
            f"{name}'s model keeps {', '.join(not_tensors)} in its state dict, which isn't a tensor and can't be exported."
        )
    return model, start


def plan_heads(
    worker: Worker, settings: Settings, model: nn.Module, batch: Batch, epoch: int | None
) -> tuple[Settings, tuple[Plan, ...]]:
    """Decides what heads train in the model, and how long.

    Args:
        batch, epoch: the first batch, and batches of a pass through the data, if that is known.

    Returns:
        The settings with the steps and the buffers that are merged; and each head's plan.

    Raises:
        WorkerError: nothing can be adapted.
        ConfigError: a setting doesn't fit the model.
    """
    train = settings.train.with_steps(count_steps(worker, settings, batch, epoch))
    lte = resolve_buffers(settings.lte, worker, model, batch, train)
    plans = make_plans(model, lte)
    if settings.merge.never_merge:
        _check_independent(plans[0])
    match_modules(model, train.checkpoint_activations)
    tensors = named_tensors(model)
    check_precision(train, {e.name: tensors[e.name] for e in plans[0].base.entries})
    for base_dtype in {spec.base_dtype for spec in plans[0].adapted} - {"fp32"}:
        check_format(base_dtype, torch.device("cpu"))
    return replace(settings, lte=lte, train=train), plans


def build_first_optimizer(worker: Worker, plan: Plan, model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """Builds the optimizer as heads do, with factors that don't train.

    Raises:
        WorkerError: the worker's code raised.
        ConfigError: as `build_optimizer` and `check_lr_scale`.
    """
    zeros = {e.name: torch.zeros(e.shape) for e in plan.contribution.entries[: 2 * len(plan.adapted)]}
    tensors = {**named_tensors(model), **zeros}
    try:
        optimizer, _ = build_optimizer(worker, plan, tensors, train)
    except UserError:
        raise
    except Exception as error:
        name = type(worker).__name__
        raise WorkerError(f"{name}'s optimizer or schedule can't be built:\n\n{traceback.format_exc()}") from error
    check_lr_scale(worker, plan, tensors, train)
    return optimizer


def _check_independent(plan: Plan) -> None:
    """Raises ConfigError if heads with independent adapters would train anything else."""
    trained = [replica.name for replica in plan.replicas if not replica.buffer]
    names = trained or [replica.name for replica in plan.replicas]
    some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    if trained:
        raise ConfigError(
            f"--never-merge trains adapters and nothing else, but {some} would train without LoRA. Add --others frozen, and "
            "leave out what excludes layers (--exclude, adapt=false)."
        )
    if names:
        raise ConfigError(
            f"--never-merge trains adapters and nothing else, but training also changes the buffers {some}, which merges "
            "average. Leave them to the heads (--merge-buffers none); batch normalization's can't be left: use another norm."
        )


def check_flops(worker: Worker) -> None:
    """Raises WorkerError if the worker's `flops_per_sample` isn't a number above 0, or raises."""
    try:
        flops_per_sample(worker)
    except UserError:
        raise
    except Exception as error:
        raise WorkerError(f"{type(worker).__name__}.flops_per_sample raised:\n\n{traceback.format_exc()}") from error


def check_saved_state(worker: Worker, plan: Plan, train: TrainConfig) -> None:
    """Takes a step of the worker's optimizer with tiny parameters, to find out before the run whether its state can be saved.

    Raises:
        WorkerError: it can't.
    """
    named: dict[str, Tensor] = {}
    for entry in plan.contribution.entries:
        tiny = torch.zeros([min(2, size) for size in entry.shape])
        named[entry.name] = tiny if any(r.buffer and r.name == entry.name for r in plan.replicas) else nn.Parameter(tiny)
    try:
        optimizer, schedule = build_optimizer(worker, plan, named, train)
        for parameter in named.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    except Exception:
        return  # with parameters of other shapes it tells nothing
    optimizer_state(optimizer, schedule)


def read_first_batches(worker: Worker, settings: Settings) -> tuple[Batch, ShardReads]:
    """Reads the first batches of the first and the last head.

    Returns:
        The first head's, and what the worker reads of its shard.

    Raises:
        WorkerError: `train_batches` raised, or yielded nothing.
    """
    batches, reads = {}, ShardReads()
    for head in sorted({0, settings.lte.num_heads - 1}):
        try:
            shard = Shard(head, settings.lte.num_heads, settings.train.seed)
            own = own_worker(copy.copy(worker)) if head else worker  # it may keep a part of a batch for the loss
            batches[head] = next(endless_batches(own, observe_shard(shard, reads)))
        except UserError:
            raise
        except Exception as error:
            name = type(worker).__name__
            raise WorkerError(f"{name}.train_batches() raised, for head {head}:\n\n{traceback.format_exc()}") from error
    return batches[0], reads


def extend_plans(initial: Initial, heads: int) -> Initial:
    """Adds plans for a run that may grow to `heads` heads: further heads are like the last.

    Raises:
        ConfigError: the heads differ, so that it isn't clear what further heads are like.
    """
    added = heads - len(initial.plans)
    if added <= 0:
        return initial
    if len(set(initial.plans)) > 1:
        raise ConfigError(
            f"--max-heads is {heads}, but ranks or alphas are given for each of {len(initial.plans)} heads. Give one number "
            "for all."
        )
    return replace(initial, plans=initial.plans + initial.plans[-1:] * added)


def describe_low_rank(plans: tuple[Plan, ...]) -> str:
    """Says by how much the ranks of all heads together are below the highest rank that a weight's change can have.

    Returns:
        A sentence with the weight for which that is worst, and the rank that would do; empty if there is none.
    """
    worst: tuple[float, int, Adapted] | None = None
    for specs in zip(*(plan.adapted for plan in plans), strict=True):
        total, smaller = sum(spec.rank for spec in specs), min(specs[0].matrix)
        if total < smaller and (worst is None or total / smaller < worst[0]):
            worst = (total / smaller, total, specs[0])
    if worst is None:
        return ""
    _, total, spec = worst
    out, inner = spec.matrix
    needed = math.ceil(min(out, inner) / len(plans))
    return (
        f"The ranks of {len(plans)} head(s) add up to {total}, but {spec.name} is {out} x {inner}, so a merge can't change it "
        f"in all directions. That suits fine-tuning. To train from scratch, raise --lora-r towards {needed}, or --num-heads."
    )


def describe_cut_ranks(initial: Initial, num_heads: int) -> str:
    """Says which ranks are cut to the size of their matrix, if the heads' optimizer is slower for it.

    With Adam, the loss after 50 steps was 1.2 times that with the ranks that were asked for, in small networks with layers of
    10 and 12 outputs. LoRA-Muon's steps have one size whatever the rank, so it isn't told.

    Returns:
        Sentences with the first such weight; empty if there is none.
    """
    if isinstance(initial.optimizer, LoRAMuon):
        return ""
    cut: dict[str, tuple[int, Adapted]] = {}
    for head, plan in enumerate(initial.plans[:num_heads]):
        if head and plan == initial.plan:
            continue
        asked = requested_ranks(initial.model, initial.lte, plan, head)
        cut |= {s.name: (asked[s.name], s) for s in plan.adapted if asked.get(s.name, 0) > s.rank and s.name not in cut}
    if not cut:
        return ""
    asked_rank, spec = next(iter(cut.values()))
    out, inner = spec.matrix
    more = f" (the ranks of {len(cut) - 1} more are cut, too)" if len(cut) > 1 else ""
    return (
        f"--lora-r is {asked_rank} for {spec.name}, which is {out} x {inner}, so its factors get rank {spec.rank}{more}. That "
        "is enough for any change, but with Adam such a layer learns more slowly: in small networks, the loss was 1.2 times as "
        f"high. Train it in full (--exclude {spec.name}), or use LoRA-Muon (--optimizer lora-muon, lte_ray.optim.LoRAMuon)."
    )


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of an unconverted model that a plan can name: parameters and buffers."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def load_base(model: nn.Module, plan: Plan, base: Tensor) -> None:
    """Copies a flat base into an unconverted model; tensors that aren't trained stay as they were built."""
    tensors = named_tensors(model)
    for name, value in views(plan.base, base).items():
        copy_rounded(tensors[name], value)


def merged_state_dict(model: nn.Module, plan: Plan, base: Tensor) -> dict[str, Tensor]:
    """The complete state dict of the unconverted model with the base's weights, in its own types and under its own names.

    Tied weights are there under each of their names, so that `load_state_dict(strict=True)` accepts it.
    """
    load_base(model, plan, base)
    state: Mapping[str, Tensor] = model.state_dict()
    return {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
