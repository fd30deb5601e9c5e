"""What no optimizer trains: buffers that training changes nevertheless, and tensors that must be equal in every process."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from lte_ray.config import LTEConfig, TrainConfig
from lte_ray.engine.head.optimization import autocast
from lte_ray.errors import WorkerError
from lte_ray.layout import Plan
from lte_ray.worker import Batch, Worker

SAMPLED = 1 << 20
"""Elements of a tensor that its fingerprint covers, at most."""

Fingerprints = tuple[tuple[str, float], ...]
"""Names of tensors, and a number for each that depends on its values and their order."""


def mergeable_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that can be averaged: real numbers, of the model's state dict."""
    saved = model.state_dict(keep_vars=True)
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if name in saved and buffer.dtype != torch.bool and not buffer.is_complex() and buffer.numel() and not buffer.is_meta
    }


def find_changing_buffers(worker: Worker, model: nn.Module, batch: Batch, train: TrainConfig) -> tuple[str, ...]:
    """Names of the buffers that computing a loss in training mode changes, such as codebooks and running averages.

    Those of batch normalization aren't among them: it is known what they are.

    Buffers keep the values that they had; so do the worker's attributes. If the loss can't be computed here (a kernel that only
    a GPU has), all buffers that can be merged count.

    Raises:
        WorkerError: a buffer changes its shape.
    """
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._NormBase)}
    statistics = {f"{name}.{key}".lstrip(".") for name, m in norms.items() for key in m._buffers}
    candidates = {name: buffer for name, buffer in mergeable_buffers(model).items() if name not in statistics}
    found: set[str] = set()
    if candidates:
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        versions = {name: (id(buffer), buffer._version) for name, buffer in candidates.items()}
        was_training = model.training
        try:
            _compute_loss(copy.copy(worker), model.train(), batch, train)
            now = dict(model.named_buffers())
            resized = [name for name in candidates if now[name].shape != before[name].shape]
            if resized:
                raise WorkerError(
                    f"The model changes the shape of its buffer {resized[0]} in training, so heads can't merge it. Give it its "
                    "final shape in build_model(), or register it with persistent=False."
                )
            # A slow copy of a weight is written to, but equal to the weight at first.
            written = {name for name in candidates if (id(now[name]), now[name]._version) != versions[name]}
            found = written | {name for name in candidates if not torch.equal(now[name], before[name])}
        except WorkerError:
            raise
        except Exception:  # heads compute it on other devices, and report what fails there
            found.update(candidates)
        finally:
            model.train(was_training)
            _restore(model, before)
    return tuple(name for name, _ in model.named_buffers() if name in found)


def _compute_loss(worker: Worker, model: nn.Module, batch: Batch, train: TrainConfig) -> None:
    with autocast(train, torch.device("cpu")):
        try:
            with torch.no_grad():
                worker.loss(model, batch)
        except RuntimeError:  # a loss that differentiates itself needs a graph
            worker.loss(model, batch)


@torch.no_grad()
def _restore(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        if name in before and buffer.shape == before[name].shape:
            buffer.copy_(before[name])


def resolve_buffers(lte: LTEConfig, worker: Worker, model: nn.Module, batch: Batch, train: TrainConfig) -> LTEConfig:
    """Names the buffers that are merged, where the settings leave that open."""
    if "auto" not in lte.merge_buffers:
        return lte
    found = find_changing_buffers(worker, model, batch, train)
    return dataclasses.replace(lte, merge_buffers=tuple(dict.fromkeys([*lte.merge_buffers, *found])))


class UnmergedBuffers:
    """Finds buffers that begin to change after the run has begun, so that nobody knew that they must be merged.

    Args:
        model: a converted model.
        settings: `LTEConfig.merge_buffers`; without "auto", other buffers are meant to be each head's own.
        merged: names of the buffers that are merged.
    """

    def __init__(self, model: nn.Module, settings: Collection[str], merged: Collection[str]) -> None:
        self._model = model
        self._names = [name for name in mergeable_buffers(model) if name not in merged] if "auto" in settings else []
        self._known: dict[str, tuple[int, int, float]] = {}

    def record(self) -> None:
        """Records the buffers, at the first call."""
        if not self._known:
            buffers = dict(self._model.named_buffers())
            self._known = {n: (id(buffers[n]), buffers[n]._version, _fingerprint(buffers[n])) for n in self._names}

    def check(self) -> None:
        """Raises WorkerError if a buffer has changed since `record`."""
        buffers = dict(self._model.named_buffers())
        touched = [n for n, known in self._known.items() if (id(buffers[n]), buffers[n]._version) != known[:2]]
        changed = [n for n in touched if _fingerprint(buffers[n]) != self._known[n][2]]
        if changed:
            raise WorkerError(
                f"The model changes its buffer {_list(changed)} in training, but didn't when the run began, so it isn't "
                f"merged. Name it: --merge-buffers auto {' '.join(changed[:8])}. Or, if it means nothing to the merged model, "
                "register it with persistent=False."
            )


class FrozenParameters:
    """Finds a model that writes to parameters that don't train: they are neither merged nor saved."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._known: dict[str, float] = {}

    def record(self) -> None:
        """Records the values, at the first call."""
        self._known = self._known or {name: _fingerprint(p) for name, p in self._parameters.items()}

    def check(self) -> None:
        """Raises WorkerError if a parameter has changed since `record`."""
        written = [name for name, p in self._parameters.items() if _fingerprint(p) != self._known[name]]
        if written:
            raise WorkerError(
                f"the model writes to {_list(written)}, parameters that don't train (requires_grad=False), which are neither "
                "saved nor a head's own. Make them buffers (register_buffer), which are merged."
            )


def fingerprints(tensors: Mapping[str, Tensor], plan: Plan) -> Fingerprints:
    """Fingerprints of the tensors that the plan doesn't train: they stay as each process has built them."""
    trained = {entry.name for entry in plan.base.entries}
    return tuple((name, _fingerprint(tensor)) for name, tensor in tensors.items() if name not in trained and tensor.numel())


def check_equal_builds(mine: Fingerprints, theirs: Fingerprints) -> None:
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


def _fingerprint(tensor: Tensor) -> float:
    if not tensor.numel():
        return 0.0
    values = tensor.detach().reshape(-1)
    values = values[:: -(-values.numel() // SAMPLED)]
    if values.is_complex():
        values = torch.view_as_real(values).reshape(-1)
    exact = values.double().nan_to_num()
    weights = torch.arange(exact.numel(), dtype=torch.float64, device=exact.device).mul_(0.7).cos_()
    return float((exact * weights).sum() + exact.abs().sum())  # the second part is the larger: it is the scale of differences


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
