"""What no optimizer trains: buffers that training changes nevertheless, and tensors that must be equal in every process."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lte_ray.config import LTEConfig, TrainConfig
from lte_ray.engine.head.trial import trial_conditions, trial_copies
from lte_ray.errors import WorkerError
from lte_ray.layout import Plan
from lte_ray.worker import Batch, Worker

SAMPLED = 1 << 20
"""Elements of a tensor that its fingerprint covers, at most."""

FEW = 1 << 12
"""The same where fingerprints are made again and again."""

Fingerprints = tuple[tuple[str, float], ...]
"""Names of tensors, and a number for each that depends on its values and their order."""


def mergeable_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of the model's state dict that have elements. Complex ones can't be averaged, but must not change either."""
    saved = model.state_dict(keep_vars=True)
    return {name: b for name, b in model.named_buffers() if name in saved and b.numel() and not b.is_meta}


def find_changing_buffers(worker: Worker, model: nn.Module, batch: Batch, train: TrainConfig) -> tuple[str, ...]:
    """Names of the buffers that computing a loss in training mode changes, such as codebooks and running averages.

    Those of batch normalization aren't among them: it is known what they are. The loss is computed with copies of the model and
    of the worker, which keep what they had. If it can't be computed here (a kernel that only a GPU has), or the model can't be
    copied, all buffers that can be merged count.

    Raises:
        WorkerError: a buffer changes its shape, is removed, or is complex.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)}
    statistics = {f"{name}.{key}".lstrip(".") for name, m in norms.items() for key in m._buffers}
    candidates = {name: buffer for name, buffer in mergeable_buffers(model).items() if name not in statistics}
    if not candidates:
        return ()
    try:
        own, probe, given = trial_copies(worker, model, batch)
        buffers = dict(probe.named_buffers())
        with trial_conditions(train), _WatchWrites() as writes:
            _compute_loss(own, probe, given)
    except Exception:  # heads compute it on other devices, and report what fails there
        return tuple(name for name, buffer in candidates.items() if not buffer.is_complex())
    found = []
    now = dict(probe.named_buffers())
    for name, before in candidates.items():
        if name not in now or now[name].shape != before.shape:
            raise WorkerError(
                f"The model changes the shape of its buffer {name} in training, or removes it, so heads can't merge it. Give "
                "it its final shape in build_model(), or register it with persistent=False."
            )
        replaced = now[name] is not buffers[name]
        if replaced or writes.changed(now[name]) or not torch.equal(now[name], before):
            if before.is_complex():
                raise WorkerError(f"The model changes its buffer {name}, which is complex. Keep its parts as two real ones.")
            found.append(name)
    return tuple(found)


class _WatchWrites(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the memory that operations write to: a slow copy of a weight is written to, but equal to the weight at first."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = args[place] if place < len(args) else kwargs.get(argument.name)
                    self._written |= {t.untyped_storage()._cdata for t in tree_leaves(value) if isinstance(t, Tensor)}
        return func(*args, **kwargs)

    def changed(self, tensor: Tensor) -> bool:
        """Whether an operation has written to the tensor's memory."""
        return tensor.untyped_storage()._cdata in self._written


def _compute_loss(worker: Worker, model: nn.Module, batch: Batch) -> None:
    try:
        with torch.no_grad():
            worker.loss(model, batch)
    except RuntimeError:  # a loss that differentiates itself needs a graph
        worker.loss(model, batch)


def resolve_buffers(lte: LTEConfig, worker: Worker, model: nn.Module, batch: Batch, train: TrainConfig) -> LTEConfig:
    """Names the buffers that are merged, where the settings leave that open."""
    if "auto" not in lte.merge_buffers:
        return lte
    found = find_changing_buffers(worker, model, batch, train)
    return dataclasses.replace(lte, merge_buffers=tuple(dict.fromkeys([*lte.merge_buffers, *found])))


class UnmergedBuffers:
    """Finds buffers that first change during the run, when it is too late to merge them.

    Args:
        model: a converted model.
        settings: `LTEConfig.merge_buffers`; without "auto", other buffers are meant to be each head's own.
        merged: names of the buffers that are merged.
    """

    def __init__(self, model: nn.Module, settings: Collection[str], merged: Collection[str]) -> None:
        self._model = model
        self._names = [name for name in mergeable_buffers(model) if name not in merged] if "auto" in settings else []
        self._known: dict[str, float] = {}

    def record(self) -> None:
        """Records the buffers, at the first call."""
        self._known = self._known or self._now()

    def check(self) -> None:
        """Raises WorkerError if a buffer has changed since `record`."""
        now = self._now()
        changed = [name for name, value in self._known.items() if now[name] != value]
        if changed:
            raise WorkerError(
                f"The model changes its buffer {_list(changed)} in training, but didn't when the run began, so it isn't "
                f"merged. Name it: --merge-buffers auto {' '.join(changed[:8])}. Or, if it means nothing to the merged model, "
                "register it with persistent=False."
            )

    def _now(self) -> dict[str, float]:
        buffers = dict(self._model.named_buffers())
        return {name: _fingerprint(buffers[name]) if name in buffers else math.inf for name in self._names}


class FrozenParameters:
    """Finds a model that writes to parameters that don't train, or lets them train later: they are neither merged nor saved."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._known: dict[str, tuple[float, float]] = {}

    def record(self) -> None:
        """Records the values, at the first call."""
        if not self._known:
            self._known = {name: (_fingerprint(p), _fingerprint(p, FEW)) for name, p in self._parameters.items()}

    def check(self, thoroughly: bool) -> None:
        """Raises WorkerError if a parameter has changed since `record`, or requires a gradient.

        Args:
            thoroughly: whether to compare as many values as fingerprints cover; otherwise a few of each parameter.
        """
        thawed = [name for name, p in self._parameters.items() if p.requires_grad]
        if thawed:
            raise WorkerError(
                f"The loss lets {_list(thawed)} train, which build_model() has frozen, so heads don't train it. Let it require "
                "gradients in build_model(); the loss may freeze it for as long as it should wait."
            )
        sampled, which = (SAMPLED, 0) if thoroughly else (FEW, 1)
        written = [name for name, p in self._parameters.items() if _fingerprint(p, sampled) != self._known[name][which]]
        if written:
            raise WorkerError(
                f"the model writes to {_list(written)}, parameters that don't train (requires_grad=False), which are neither "
                "saved nor a head's own. Make them buffers (register_buffer), which are merged."
            )


def fingerprints(tensors: Mapping[str, Tensor], plan: Plan) -> Fingerprints:
    """Fingerprints of the tensors that the plan doesn't train: they stay as each process has built them."""
    trained = {entry.name for entry in plan.base.entries}
    return tuple((name, _fingerprint(tensor)) for name, tensor in tensors.items() if name not in trained and tensor.numel())


def check_equal_builds(mine: Fingerprints, theirs: Iterable[tuple[str, float]]) -> None:
    """Compares the fingerprints of two processes' models.

    Raises:
        WorkerError: `build_model` gave different tensors.
    """
    expected = dict(theirs)
    differing = [name for name, value in mine if name in expected and abs(value - expected[name]) > 1e-6 * (1 + abs(value))]
    if differing:
        raise WorkerError(
            f"build_model() isn't deterministic: {_list(differing)} differ{'s' if len(differing) == 1 else ''} between "
            "processes, and nothing trains or merges it. Seed every generator that build_model() makes (default_rng(0), "
            "torch.Generator().manual_seed(0)), and don't build from the order of a set."
        )


def _fingerprint(tensor: Tensor, sampled: int = SAMPLED) -> float:
    if not tensor.numel():
        return 0.0
    values = tensor.detach().reshape(-1)
    values = values[:: -(-values.numel() // sampled)]
    if values.is_complex():
        values = torch.view_as_real(values).reshape(-1)
    exact = values.double().nan_to_num()
    weights = torch.arange(exact.numel(), dtype=torch.float64, device=exact.device).mul_(0.7).cos_()
    return float((exact * weights).sum() + exact.abs().sum())  # the second part is the larger: it is the scale of differences


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
