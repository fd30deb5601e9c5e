"""A head's optimizer step: mixed precision, accumulation, clipping, learning-rate multipliers, activation checkpointing."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from lte_ray.adapters.plan import match_patterns
from lte_ray.config import TrainConfig
from lte_ray.engine.head.default_optimizer import has_schedule, make_optimizer, make_schedule
from lte_ray.engine.head.measures import total_norm
from lte_ray.errors import ConfigError
from lte_ray.layout import Plan
from lte_ray.worker import Worker

AUTOCAST_DTYPES = {"bf16-mixed": torch.bfloat16, "fp16-mixed": torch.float16}


def autocast(train: TrainConfig, device: torch.device) -> AbstractContextManager[Any]:
    """The context in which a head computes its loss."""
    if train.precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST_DTYPES[train.precision])


def check_precision(train: TrainConfig, trained: Mapping[str, Tensor]) -> None:
    """Raises ConfigError if --precision needs scaled gradients, and a trained tensor's can't be scaled."""
    half = [name for name, tensor in trained.items() if tensor.dtype == torch.float16]
    if train.precision == "fp16-mixed" and half:
        raise ConfigError(
            f"--precision fp16-mixed needs parameters in float32, but build_model() gives {len(half)} in float16, e.g. "
            f"{half[0]}, whose gradients can't be scaled. Build the model in float32 (model.float())."
        )


def build_optimizer(
    worker: Worker, plan: Plan, tensors: Mapping[str, Tensor], train: TrainConfig
) -> tuple[torch.optim.Optimizer, Any]:
    """Builds the optimizer for the plan's parameters, and the schedule if there is one: the worker's, or the settings'.

    The worker gets parameter groups named "lora" and "replica", one of each for every learning-rate multiplier. A "lora" group
    has A and B of each weight in turn, and each product's s in "scalings". In full rank, groups named "weight" take its place,
    with the matrices that would have factors. The multiplier is applied to the group's rate that the worker chose, before the
    schedule is built.

    Args:
        tensors: factors and replicas by their names in the contribution layout; buffers among them aren't optimized.
        train: names the optimizer and schedule of a worker that builds none; `lr_scale` is another multiplier of all rates.

    Raises:
        ConfigError: there are multipliers, but the optimizer doesn't keep the groups that it was given, or the schedule
            doesn't begin from their rates; or the optimizer is for parameters that don't train here.
    """
    groups: dict[tuple[str, float], list[Tensor]] = {}
    scalings: dict[float, list[float]] = {}
    for spec in plan.adapted:
        groups.setdefault(("lora", spec.lr), []).extend([tensors[spec.a_name], tensors[spec.b_name]])
        scalings.setdefault(spec.lr, []).append(spec.scaling)
    for replica in plan.replicas:
        if isinstance(tensors[replica.name], nn.Parameter):
            name = "weight" if replica.weight else "replica"
            groups.setdefault((name, replica.lr), []).append(tensors[replica.name])
    several = any(lr != 1.0 for _, lr in groups)
    param_groups: list[dict[str, Any]] = []
    for (name, lr), params in groups.items():
        extra = {"scalings": scalings[lr]} if name == "lora" else {}
        param_groups.append({"params": params, "name": name, **extra, **({"lr_multiplier": lr} if several else {})})
    build = getattr(worker, "build_optimizer", None)
    optimizer: torch.optim.Optimizer = (
        build(param_groups) if build else make_optimizer(train, param_groups, getattr(worker, "default_lr_factor", 1.0))
    )
    _check_optimizer(optimizer)
    if several:
        expected = {id(p): lr for (_, lr), params in groups.items() for p in params}
        kept = {id(p): g.get("lr_multiplier") for g in optimizer.param_groups for p in g["params"]}
        if any(kept.get(p, lr) != lr for p, lr in expected.items()):
            raise ConfigError(
                "--layers gives learning-rate multipliers (lr=...), but build_optimizer() doesn't keep the parameter groups "
                "that it is given. Pass `params` on as it is, or copy each group with its keys: {**group, 'lr': ...}."
            )
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group.get("lr_multiplier", 1.0)
    if train.lr_scale != 1.0:
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * train.lr_scale
    schedule = getattr(worker, "build_schedule", None)
    if schedule is None:
        return optimizer, make_schedule(train, optimizer) if has_schedule(worker, train) else None
    return optimizer, build_schedule(schedule, optimizer, train.steps, several)


def build_schedule(build: Callable[..., Any], optimizer: torch.optim.Optimizer, total_steps: int, several: bool) -> Any:
    """Builds the optimizer's schedule. With several multipliers, groups must begin at different rates.

    Raises:
        ConfigError: groups of different rates begin at the same one, as with one rate for all in `OneCycleLR`; or it isn't
            a schedule that is stepped without arguments.
    """
    before = [group["lr"] for group in optimizer.param_groups]
    schedule = build(optimizer, total_steps)
    _check_schedule(schedule)
    now = {lr: group["lr"] for lr, group in zip(before, optimizer.param_groups, strict=True)}
    nonzero = [lr for lr in now.values() if lr]  # all may be 0 as a warm-up begins
    if several and len(set(nonzero)) < len(nonzero):
        raise ConfigError(
            "--layers gives learning-rate multipliers (lr=...), but build_schedule() begins at one rate "
            f"({max(nonzero, key=nonzero.count):g}) for groups that had {', '.join(f'{lr:g}' for lr in now)}. Let it "
            "begin from each group's own, as in OneCycleLR(optimizer, max_lr=[g['lr'] for g in optimizer.param_groups], ...)."
        )
    return schedule


def _check_optimizer(optimizer: Any) -> None:
    """Raises ConfigError unless this is one optimizer whose steps need no closure."""
    needed = ("step", "zero_grad", "state_dict", "load_state_dict", "param_groups")
    missing = [name for name in needed if not hasattr(optimizer, name)]
    if isinstance(optimizer, list | tuple | dict):
        raise ConfigError(
            f"build_optimizer() returned a {type(optimizer).__name__} of {len(optimizer)}. A head steps one optimizer: give "
            "each group its own settings in one, by the group's name ('lora' or 'replica')."
        )
    if missing:
        raise ConfigError(
            f"build_optimizer() returned a {type(optimizer).__name__} without {missing[0]}, which isn't a torch optimizer."
        )
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigError(
            f"build_optimizer() returned {type(optimizer).__name__}, whose step() computes the loss again by a closure. A head "
            "computes each loss once: choose an optimizer that steps from the gradients."
        )


def _check_schedule(schedule: Any) -> None:
    """Raises ConfigError unless the schedule can be stepped without arguments, saved and restored."""
    if schedule is None:
        return
    kind = type(schedule).__name__
    missing = [name for name in ("step", "state_dict", "load_state_dict") if not callable(getattr(schedule, name, None))]
    if missing:
        raise ConfigError(f"build_schedule() returned a {kind} without {missing[0]}(), so it isn't a learning-rate schedule.")
    asked = [
        p.name
        for p in inspect.signature(schedule.step).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if asked:
        raise ConfigError(
            f"build_schedule() returned {kind}, whose step() needs {', '.join(asked)}. A head steps its schedule after each "
            "step, without arguments: choose one that follows the number of steps, such as a cosine."
        )


CHECKED_STEPS = 2000
"""Steps of a schedule that `check_lr_scale` follows, at most."""


def check_lr_scale(worker: Worker, plan: Plan, tensors: Mapping[str, Tensor], train: TrainConfig) -> None:
    """Checks that the worker's schedule keeps `train.lr_scale`: that the highest rate of each group is that much higher.

    Args:
        tensors: as for `build_optimizer`; they don't change.

    Raises:
        ConfigError: the schedule sets rates of its own, as `OneCycleLR` with one number for `max_lr`.
    """
    if train.lr_scale == 1.0:
        return
    plain, scaled = (
        _highest_rates(*build_optimizer(worker, plan, tensors, each), train) for each in (replace(train, lr_scale=1.0), train)
    )
    for one, other in zip(plain, scaled, strict=True):
        if abs(other - train.lr_scale * one) > 0.05 * train.lr_scale * one:
            raise ConfigError(
                f"--lr-scale is {train.lr_scale:g}, but build_schedule() makes the highest rate {other:g}, where it is {one:g} "
                "without. Let it begin from each group's own rate, as in OneCycleLR(optimizer, max_lr=[g['lr'] for g in "
                "optimizer.param_groups], ...)."
            )


def _highest_rates(optimizer: torch.optim.Optimizer, schedule: Any, train: TrainConfig) -> list[float]:
    """The highest rate of each group, in the first steps of a schedule."""
    rates = [[float(group["lr"]) for group in optimizer.param_groups]]
    with warnings.catch_warnings():  # the optimizer takes no steps
        warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step", UserWarning)
        for _ in range(min(train.steps, CHECKED_STEPS) if schedule is not None else 0):
            schedule.step()
            rates.append([float(group["lr"]) for group in optimizer.param_groups])
    return [max(column) for column in zip(*rates, strict=True)]


ROUNDING_STEPS = 1e-6
"""The part of a step that a sum of rates may lack by rounding."""


class OptimizerStep:
    """Turns the gradients of `accumulate` batches into one step of the optimizer and its schedule.

    Attributes:
        position: where the schedule stands, in steps of `TrainConfig.steps`.
        scaler: of fp16 gradients.
        gradient_norm: of the last gradient that was measured, before clipping; None if none was, or it was empty.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Any, train: TrainConfig, device: torch.device) -> None:
        self._optimizer, self._schedule, self._train = optimizer, schedule, train
        self.position = 0.0
        self.gradient_norm: Tensor | None = None
        self.scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16-mixed")

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The value to differentiate instead of a batch's loss: the loss divided by `accumulate`, and scaled for fp16."""
        share = loss / self._train.accumulate if self._train.accumulate > 1 else loss
        scaled: Tensor = self.scaler.scale(share)
        return scaled

    def advance_to(self, progress: float) -> None:
        """Advances the schedule to this fraction of the run, unless it is there already."""
        by = progress * self._train.steps - self.position
        if by > 0:
            with warnings.catch_warnings():  # a head that joins late advances before its optimizer's first step
                warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step", UserWarning)
                self._advance(by)

    def step(self, rate: float = 1.0, measure: bool = False) -> None:
        """Clips the gradients, takes the step, and clears the gradients; advances the schedule by `rate` steps.

        A step whose fp16 gradients overflowed is skipped, as torch does. With `measure`, sets `gradient_norm`.
        """
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        norm: Tensor | None = None
        if self._train.clip_norm:
            self.scaler.unscale_(self._optimizer)
            norm = nn.utils.clip_grad_norm_(parameters, self._train.clip_norm)
        elif measure:
            norm = total_norm(parameters)
            if norm is not None and self.scaler.is_enabled():
                norm = norm / self.scaler.scale(torch.ones_like(norm))
        if measure:
            self.gradient_norm = norm
        self.scaler.step(self._optimizer)
        self.scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self._advance(rate)

    def _advance(self, by: float) -> None:
        before = int(self.position + ROUNDING_STEPS)
        self.position = min(max(self.position, self.position + by), float(max(before, self._train.steps)))
        if self._schedule is not None:
            for _ in range(int(self.position + ROUNDING_STEPS) - before):
                self._schedule.step()


def checkpoint_activations(model: nn.Module, patterns: Sequence[str]) -> None:
    """Has the modules that the patterns name compute their activations again in the backward pass, instead of keeping them.

    Of nested modules the outermost is wrapped.

    Raises:
        ConfigError: a pattern matches no module.
    """
    if not patterns:
        return
    modules = dict(model.named_modules())
    chosen = match_modules(model, patterns)
    for name in sorted(chosen):
        if not any(name.startswith(other + ".") for other in chosen):
            module = modules[name]
            norms = [m for m in module.modules() if isinstance(m, _NormBase) and m.track_running_stats]
            options: dict[str, Any] = {"context_fn": functools.partial(_contexts, norms)} if norms else {}
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False, **options)


def match_modules(model: nn.Module, patterns: Sequence[str]) -> set[str]:
    """The names of the modules that the patterns name.

    Raises:
        ConfigError: a pattern matches no module that can be called.
    """
    containers = (nn.ModuleList, nn.ModuleDict)  # which aren't called
    names = [name for name, module in model.named_modules() if name and not isinstance(module, containers)]
    return set().union(*match_patterns(patterns, names, "module", "--checkpoint-activations").values())


def _contexts(norms: Sequence[_NormBase]) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts for computing the activations, and for computing them again."""
    return nullcontext(), _frozen_statistics(norms)


@contextmanager
def _frozen_statistics(norms: Sequence[_NormBase]) -> Iterator[None]:
    """Within the block batch normalization doesn't update its running statistics: each batch counts once."""
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count
