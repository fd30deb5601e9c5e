"""A worker's model and first batch without the model's values: torch's fake tensors have shapes and types, but no memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from lte_ray.adapters.plan import make_plans
from lte_ray.data.shard import Shard
from lte_ray.engine.head.untrained import mergeable_buffers
from lte_ray.engine.settings import Settings
from lte_ray.errors import UserError, WorkerError
from lte_ray.layout import Plan
from lte_ray.worker import Batch, Worker, build_model, check_worker, endless_batches


@dataclass(frozen=True)
class Shapes:
    """What a worker trains, by shapes.

    Attributes:
        mode: in which all computations with the model must be made (`computing`).
        model: the unconverted model, of fake tensors.
        plans: each head's.
        batch: the first head's first batch, of real tensors; None if there is none.
        notes: what couldn't be found out, in sentences.
    """

    mode: FakeTensorMode
    model: nn.Module
    plans: tuple[Plan, ...]
    batch: Batch | None
    notes: tuple[str, ...]

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within the block, tensors have no values, whatever makes them."""
        with warnings.catch_warnings(), self.mode:
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            yield


def read_shapes(worker: Worker, settings: Settings) -> Shapes:
    """Builds the worker's model without values, decides what trains, and reads the first batch.

    A model that can't be built so, because it computes with values or loads weights, is built on the CPU.

    Raises:
        WorkerError: the model can't be built on the CPU either, or it can't be trained so.
        ConfigError: the settings don't fit the model.
    """
    check_worker(worker)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    shapes = Shapes(mode, nn.Module(), (), None, ())
    notes = []
    try:
        with shapes.computing():
            model = build_model(worker, settings.train.seed)
    except UserError:
        raise
    except Exception as error:
        notes.append(
            f"The model was built on the CPU, with its values, because building it from shapes alone failed: {brief(error)}"
        )
        model = _build_on_cpu(worker, settings.train.seed)
    _forget_values(model, mode)
    plans = make_plans(model, settings.lte)
    if "auto" in settings.lte.merge_buffers and (names := _other_buffers(model, plans[0])):
        notes.append(
            f"Whether training changes the buffers {', '.join(names[:5])}{', ...' if len(names) > 5 else ''} isn't known from "
            "shapes. They count as unchanged; those that change are merged, too."
        )
    batch, problem = _first_batch(worker, settings)
    return Shapes(mode, model, plans, batch, (*notes, *filter(None, [problem])))


def _build_on_cpu(worker: Worker, seed: int) -> nn.Module:
    try:
        return build_model(worker, seed)
    except UserError:
        raise
    except Exception as error:
        raise WorkerError(
            f"{type(worker).__name__}.build_model() raised, so there is nothing to plan: {brief(error)} Make the model build "
            "on this machine."
        ) from error


def _forget_values(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replaces real parameters and buffers by fake ones. What is tied stays tied."""
    replaced: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and not isinstance(tensor, FakeTensor):
                    replaced.setdefault(id(tensor), without_values(tensor, mode))
                    tensors[name] = replaced[id(tensor)]  # type: ignore[assignment]


def without_values(tensor: Tensor, mode: FakeTensorMode, device: str = "cpu") -> Tensor:
    """A fake tensor of the same shape, type and kind, on that device."""
    if nn.parameter.is_lazy(tensor) or tensor.layout is not torch.strided:
        return tensor  # make_plans says what is wrong with it
    with mode:
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _other_buffers(model: nn.Module, plan: Plan) -> list[str]:
    """Names of the buffers that training may change, but that aren't merged."""
    merged = {replica.name for replica in plan.replicas}
    return [name for name in mergeable_buffers(model) if name not in merged]


def _first_batch(worker: Worker, settings: Settings) -> tuple[Any, str]:
    """Returns the first head's first batch; or None, and why there is none."""
    try:
        return next(endless_batches(worker, Shard(0, settings.lte.num_heads, settings.train.seed))), ""
    except Exception as error:  # a plan without data is worth something, too
        return None, f"There is no batch, so activations aren't known: train_batches() raised {brief(error)}"


def brief(error: Exception) -> str:
    """An exception's type and the first line of its message, as a sentence."""
    first = next(iter(str(error).strip().splitlines()), "").strip()
    return f"{type(error).__name__}: {first[:200].rstrip('.')}." if first else f"{type(error).__name__}."
