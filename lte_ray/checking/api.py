"""Checks a worker: builds, converts, steps, merges, evaluates, saves and resumes it in one process, without Ray."""

from __future__ import annotations

import time
from typing import Any

import torch

from lte_ray.checking.batches import check_batches
from lte_ray.checking.devices import check_devices
from lte_ray.checking.evaluation import check_evaluation
from lte_ray.checking.model import check_builds, examine
from lte_ray.checking.report import CheckReport, Findings
from lte_ray.checking.saving import check_saving
from lte_ray.checking.sending import check_sending
from lte_ray.checking.training import HEADS, merge_heads, train_heads
from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.head.rng import preserve_generators
from lte_ray.engine.head.trial import without_ray
from lte_ray.engine.prepare import load_base
from lte_ray.engine.process_tuning import available_cores, head_threads, torch_threads
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError
from lte_ray.worker import Worker, check_worker


def check(
    worker: Worker,
    lte: LTEConfig | None = None,
    merge: MergeConfig | None = None,
    train: TrainConfig | None = None,
    *,
    device: str = "auto",
) -> CheckReport:
    """Tries out a run of `lte_ray.LTETrainer` with the same settings, in this process, without Ray, and leaves nothing behind.

    Two heads take two steps each and merge; the merged weights are evaluated, saved and resumed from. A mistake in one part
    doesn't keep the others from being checked, so that the report has all of them.

    Args:
        worker: what to train; an instance, or its class if it needs no arguments.
        lte, merge, train: as for `lte_ray.LTETrainer`.
        device: on which heads train, such as ``"cpu"`` or ``"cuda:0"``; by default the first GPU if there is one.

    Returns:
        A report. Its `ok` says whether nothing is wrong; printing it shows all findings.

    Raises:
        ConfigError: settings contradict each other, or there is no such device.
        WorkerError: the worker lacks a method.
    """
    settings = Settings("check", lte or LTEConfig(), merge or MergeConfig(), train or TrainConfig())
    return check_run(worker() if isinstance(worker, type) else worker, settings, device)


def check_run(worker: Worker, settings: Settings, device: str = "auto") -> CheckReport:
    """Checks a worker with a run's complete settings, as `check`."""
    begin, on, findings = time.perf_counter(), _device(device), Findings()
    check_worker(worker)
    settings = settings.resolved()
    cores = max(1, available_cores() // settings.lte.num_heads)  # as if all heads were on this machine
    with without_ray(), preserve_generators(on), torch_threads(head_threads(settings.train.threads_per_head, cores)[1]):
        _check(worker, settings, on, findings)
    heads = min(HEADS, settings.lte.num_heads)
    seconds = time.perf_counter() - begin
    return CheckReport(type(worker).__name__, str(on), heads, findings.in_order(), findings.times, seconds)


def _check(worker: Worker, settings: Settings, device: torch.device, findings: Findings) -> None:
    source = check_sending(worker, settings.merge, findings)
    made = examine(source(), settings, findings)
    evaluator: Any = source()
    second = check_builds(made, evaluator, findings)
    if made.reads is not None:
        check_batches(made.worker, made.settings, made.reads, findings)
    initial = made.initial
    trained = train_heads(made, source, device, findings)
    merge_heads(made, trained, findings)
    if second is not None and initial is not None:
        merged = trained is not None and trained.coordinator is not None
        load_base(second, initial.plan, trained.coordinator.base if merged else initial.base)  # type: ignore[union-attr]
    check_evaluation(evaluator, second, device, findings)
    check_saving(made, trained, source, findings)
    if device.type == "cpu":
        check_devices(made, evaluator, second, findings)


def _device(name: str) -> torch.device:
    """Returns the device of this name. Raises ConfigError if torch can't use it."""
    if name == "auto":
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:
        raise ConfigError(f"device is {name!r}, which torch can't use here: {str(error).splitlines()[0]}.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}, but heads train on cpu or cuda.")
    return device
