"""Model, layers, first loss and optimizer of a worker, each looked at even if another one fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lte_ray.checking.report import Findings
from lte_ray.checking.words import join, plural
from lte_ray.engine.default_policy import choose_policy
from lte_ray.engine.first_loss import check_first_loss, describe_first_loss
from lte_ray.engine.head.default_optimizer import check_optimizer_settings
from lte_ray.engine.head.untrained import check_equal_builds, fingerprints
from lte_ray.engine.head.worker_state import own_worker, worker_state
from lte_ray.engine.initial_weights import build_initial_model
from lte_ray.engine.prepare import (
    Initial,
    build_first_model,
    build_first_optimizer,
    check_flops,
    check_saved_state,
    describe_cut_ranks,
    describe_low_rank,
    make_initial,
    named_tensors,
    plan_heads,
    read_first_batches,
)
from lte_ray.engine.settings import Settings
from lte_ray.layout import Plan
from lte_ray.worker import ShardReads, Worker


@dataclass
class Examined:
    """What could be made of a worker in one process, before any head.

    Attributes:
        worker: that made it.
        model: the unconverted model; None if it can't be built.
        batch: the first one; None if there is none.
        reads: what the worker reads of its shard.
        initial: what heads start from; None if they can't.
        settings: complete, if heads can start.
        obstacle: why they can't, as a clause.
    """

    worker: Worker
    settings: Settings
    model: nn.Module | None = None
    batch: Any = None
    reads: ShardReads | None = None
    initial: Initial | None = None
    obstacle: str = ""


def examine(worker: Worker, settings: Settings, findings: Findings) -> Examined:
    """Makes all that a run needs before its heads start, and looks at each part."""
    worker = own_worker(worker)
    made, start, optimizer, loss_fails = Examined(worker, settings), "", None, False
    with findings.looking_at("worker"):
        check_flops(worker)
    with findings.looking_at("model"), findings.timing("model"):
        made.model, start = build_first_model(worker, settings.train)
    with findings.looking_at("data"):
        made.batch, made.reads = read_first_batches(worker, settings)
    if made.model is None or made.reads is None:
        made.obstacle = "the model can't be built" if made.model is None else "there are no batches"
        return made
    try:
        _check_loss(made, settings, findings)
    except Exception as error:
        loss_fails = True
        findings.fail_with("loss", error)
    plans: tuple[Plan, ...] = ()
    with findings.looking_at("layers"):
        settings, plans = plan_heads(worker, settings, made.model, made.batch, made.reads.epoch)
    if not plans:
        made.obstacle = "it isn't clear what heads train"
        return made
    with findings.looking_at("optimizer"):
        check_optimizer_settings(worker, settings.train)
        optimizer = build_first_optimizer(worker, plans[0], made.model, settings.train)
    with findings.looking_at("saving"):
        worker_state(worker)
        check_saved_state(worker, plans[0], settings.train)
    if optimizer is None or loss_fails:
        made.obstacle = "there is no optimizer" if optimizer is None else "there is no loss"
        return made
    initial = made.initial = make_initial(worker, settings, made.model, plans, optimizer, made.reads, start)
    made.settings = initial.complete(replace(settings, merge=choose_policy(settings, initial)))
    _describe_layers(initial, settings, findings)
    return made


def _check_loss(made: Examined, settings: Settings, findings: Findings) -> None:
    assert made.model is not None
    loss = check_first_loss(made.worker, made.model, made.batch, settings.train)
    if loss is None:  # heads compute it on their device
        return
    if problem := describe_first_loss(loss):
        findings.fail("loss", problem)
    else:
        findings.ok("loss", f"The loss of the first batch is {float(loss):.5g}.")


def _describe_layers(initial: Initial, settings: Settings, findings: Findings) -> None:
    """Says how much trains; `lte-ray plan` shows which layers."""
    plan, heads, parameters = initial.plan, settings.lte.num_heads, list(initial.model.parameters())
    in_full = sum(not replica.buffer for replica in plan.replicas)
    frozen = len(parameters) - len(plan.adapted) - in_full
    findings.ok(
        "layers",
        f"{plural(len(plan.adapted), 'weight')} with factors, {plural(in_full, 'parameter')} in full, {frozen} frozen. A head "
        f"trains {plan.contribution.size:,} values; the model has {sum(p.numel() for p in parameters):,}.",
    )
    low_rank = "" if settings.merge.never_merge else describe_low_rank(initial.plans[:heads])
    for note in (low_rank, describe_cut_ranks(initial, heads), initial.start):
        if note:
            findings.warn("layers", note)


def check_builds(made: Examined, worker: Worker, findings: Findings) -> nn.Module | None:
    """Builds the model again, as another process does, and compares it with the first.

    Args:
        worker: as another process gets it.

    Returns:
        The second model; None if it can't be built.
    """
    first, name = made.model, type(made.worker).__name__
    if first is None:
        return None
    second: nn.Module | None = None
    with findings.looking_at("model"):
        second = build_initial_model(worker, made.settings.train)
        one, other = named_tensors(first), named_tensors(second)
        if not _compare(name, one, other, made.initial.plan if made.initial else None, findings):
            made.initial, made.obstacle = None, "each process would build another model"
    return second


def _compare(name: str, one: Mapping[str, Tensor], other: Mapping[str, Tensor], plan: Plan | None, findings: Findings) -> bool:
    """Says how two builds differ. Returns whether they have the same layers."""
    changed = sorted({n for n in one.keys() | other.keys() if n not in one or n not in other or one[n].shape != other[n].shape})
    if changed:
        findings.fail(
            "model",
            f"build_model() gives other layers when it is called again: {join(changed)} differ in name or shape. Build the "
            "same model in every process: from settings, not from the order of a set or from what an earlier call has left.",
        )
        return False
    if plan is not None:
        check_equal_builds(fingerprints(other, plan), fingerprints(one, plan))
    names = one if plan is None else [entry.name for entry in plan.base.entries]
    trained = [name for name in names if not torch.equal(one[name], other[name])]
    if trained:
        findings.warn(
            "model",
            f"build_model() isn't deterministic: {join(trained)} begin with other values when it is called again. All heads "
            "of a run train the driver's, but a second run begins with others. Draw from torch's global generator, which has "
            "the run's seed.",
        )
        return True
    parameters = sum(value.numel() for value in one.values())
    findings.ok("model", f"{name} builds a model of {parameters:,} values, and the same one when it builds it again.")
    return True
