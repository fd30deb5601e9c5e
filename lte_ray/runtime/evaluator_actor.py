"""The evaluator's process: evaluates merged weights, or each head's own, in an unconverted model while the heads train."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import torch
from torch import Tensor, nn

from lte_ray import fault_injection
from lte_ray.engine.coordinator.ema import with_ema
from lte_ray.engine.gpu_memory import explaining_limit, limit_gpu_memory
from lte_ray.engine.head.rng import preserve_generators
from lte_ray.engine.independent import evaluate_heads, head_weights
from lte_ray.engine.initial_weights import build_initial_model
from lte_ray.engine.prepare import load_base
from lte_ray.errors import LTEError, WorkerFailed
from lte_ray.layout import Plan
from lte_ray.runtime.context import RunContext
from lte_ray.runtime.object_store import Handle
from lte_ray.worker import evaluate


class EvaluatorActor:
    """Has one unconverted model in eval mode, and loads one base after another into it.

    Args:
        context: what every actor gets.
        plans: each head's.
        threads: that torch uses.
        gpu: whether the actor has a GPU.
        gpu_memory: part of the GPU's memory that it may use; 1: no limit.
    """

    def __init__(self, context: RunContext, plans: Sequence[Plan], threads: int, gpu: bool, gpu_memory: float = 1.0) -> None:
        fault_injection.arm(context.fault_script)
        self._context, self._plans, self._threads = context, plans, threads
        self._gpu_memory = gpu_memory
        self._device = torch.device("cuda:0" if gpu else "cpu")
        self._model: nn.Module | None = None
        self._worker: Any = None

    def evaluate(
        self, base: Handle, ema: Handle | None = None, adapters: Mapping[int, Handle] | None = None
    ) -> dict[str, float]:
        """Returns the worker's figures for one base, by name, and as ``ema_NAME`` those of its moving average, if any.

        Args:
            base, ema: flat.
            adapters: by head, its factors, flat, where nothing is merged: the figures are then those of `evaluate_heads`.

        Raises:
            WorkerFailed: the worker's code raised, or returned something else than numbers by name.
        """
        fetch = self._context.transport.fetch
        if adapters:
            factors = {head: fetch(handle) for head, handle in adapters.items()}
            return evaluate_heads(self._plans, fetch(base), factors, self._figures)
        values = self._figures(fetch(base))
        if ema is None:
            return values
        with preserve_generators(self._device):  # the figures of the bases are those of a run without an average
            return with_ema(values, self._figures(fetch(ema)))

    def _figures(self, weights: Tensor) -> dict[str, float]:
        with explaining_limit(self._gpu_memory, "The evaluator"), self._model_of(weights) as model:
            return evaluate(self._worker, model)

    @ray.method(concurrency_group="ctl")
    def alive(self) -> bool:
        """Answers, even while a model is being evaluated."""
        return True

    def sample(self, base: Handle, adapters: Mapping[int, Handle] | None = None) -> str | None:
        """Returns what the worker's `sample` gives for the merged weights, or each head's; None if there is no such method."""
        sample = getattr(self._load_worker(), "sample", None)
        if sample is None:
            return None
        fetch, samples = self._context.transport.fetch, []
        for head, handle in sorted((adapters or {}).items()):
            with self._model_of(head_weights(self._plans[head], fetch(base), fetch(handle))) as model:
                samples.append(f"head {head}: {sample(model)}")
        if samples:
            return "\n".join(samples)
        with self._model_of(fetch(base)) as model:
            return str(sample(model))

    def _load_worker(self) -> Any:
        self._worker = self._worker or self._context.worker.load()
        return self._worker

    @contextmanager
    def _model_of(self, weights: Tensor) -> Iterator[nn.Module]:
        torch.set_num_threads(self._threads)
        try:
            if self._model is None:
                limit_gpu_memory(self._gpu_memory, self._device)
                self._model = build_initial_model(self._load_worker(), self._context.settings.train).to(self._device)
            load_base(self._model, self._plans[0], weights)
            fault_injection.inject("evaluates")
            with torch.no_grad():
                yield self._model.eval()
        except LTEError:
            raise
        except Exception as error:
            raise WorkerFailed("the evaluator", None, traceback.format_exc()) from error
