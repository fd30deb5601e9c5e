"""The evaluator's process: judges merged weights in an unconverted model, beside the training."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
from torch import nn

from lte_ray import fault_injection
from lte_ray.engine.prepare import load_base
from lte_ray.errors import LTEError, WorkerFailed
from lte_ray.layout import Plan
from lte_ray.runtime.context import RunContext
from lte_ray.runtime.object_store import Handle
from lte_ray.worker import build_model


class EvaluatorActor:
    """Holds one unconverted model in eval mode and loads one base after another into it."""

    def __init__(self, common: RunContext, plan: Plan, threads: int, gpu: bool) -> None:
        fault_injection.arm(common.fault_script)
        self._common, self._plan, self._threads = common, plan, threads
        self._device = torch.device("cuda:0" if gpu else "cpu")
        self._model: nn.Module | None = None
        self._worker: Any = None

    def evaluate(self, base: Handle) -> dict[str, float]:
        """The worker's figures for one base.

        Raises:
            WorkerFailed: the worker's code raised, or didn't return numbers by name.
        """
        with self._merged(base) as model:
            values = self._worker.evaluate(model)
            try:
                return {str(name): float(value) for name, value in values.items()}
            except (AttributeError, TypeError, ValueError):
                raise TypeError(f"evaluate() must return a dict of names and numbers, but returned {values!r}") from None

    @ray.method(concurrency_group="ctl")
    def alive(self) -> bool:
        """Answers, also while a model is being judged."""
        return True

    def sample(self, base: Handle) -> str | None:
        """What the worker's optional `sample` makes of the merged weights."""
        sample = getattr(self._open(), "sample", None)
        if sample is None:
            return None
        with self._merged(base) as model:
            return str(sample(model))

    def _open(self) -> Any:
        self._worker = self._worker or self._common.worker.load()
        return self._worker

    @contextmanager
    def _merged(self, base: Handle) -> Iterator[nn.Module]:
        torch.set_num_threads(self._threads)
        try:
            if self._model is None:
                self._model = build_model(self._open(), self._common.settings.train.seed).to(self._device)
            load_base(self._model, self._plan, self._common.transport.fetch(base))
            fault_injection.inject("evaluates")
            with torch.no_grad():
                yield self._model.eval()
        except LTEError:
            raise
        except Exception as error:
            raise WorkerFailed("the evaluator", None, traceback.format_exc()) from error
