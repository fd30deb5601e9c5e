"""Steps of a few heads, and a merge of what they have trained."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lte_ray.checking.model import Examined
from lte_ray.checking.report import Findings
from lte_ray.checking.words import join, numbers, plural
from lte_ray.engine.coordinator.coordinator import Coordinator, EventResult
from lte_ray.engine.head.head import Head
from lte_ray.engine.in_process import LoopbackTransport, evaluate_base
from lte_ray.engine.prepare import Initial
from lte_ray.engine.settings import Settings
from lte_ray.merging.registry import make_policy
from lte_ray.worker import Batch, Worker, copy_batch

HEADS = 2
"""Heads that train, at most: two show what heads have to do with each other."""

STEPS = 2
"""Local steps of each before the merge."""

BATCHES = 2
"""Batches of a step with --accumulate, at most."""


class WatchedHead(Head):
    """A head that records its batches, and which parameters get which gradients.

    Attributes:
        last_batch: the newest, as it was before the loss saw it.
        with_gradient: names of parameters that got one.
        nonzero: names of parameters that got a gradient other than 0.
        nonfinite: by name of a parameter, the first step in which its gradient had a value that isn't finite.
    """

    def __init__(self, worker: Worker, settings: Settings, number: int, device: torch.device) -> None:
        super().__init__(worker, settings, number, device=device)
        self.last_batch: Batch = None
        self.with_gradient: set[str] = set()
        self.nonzero: set[str] = set()
        self.nonfinite: dict[str, int] = {}
        self.average_gradients = self._watch

    def next_batch(self) -> Batch:
        """The next batch. Keeps a copy of it."""
        batch = super().next_batch()
        self.last_batch = copy_batch(batch)
        return batch

    def _watch(self) -> None:
        for name, parameter in self.trained_parameters.items():
            gradient = parameter.grad
            if gradient is None:
                continue
            gradient = gradient.detach()
            self.with_gradient.add(name)
            if bool(gradient.any()):
                self.nonzero.add(name)
            if not bool(gradient.isfinite().all()):
                self.nonfinite.setdefault(name, self.step + 1)

    @property
    def last_loss(self) -> float:
        """The loss of the newest step."""
        return float(self.state.losses[-1])

    @property
    def rates(self) -> list[float]:
        """The optimizer's learning rates, by group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]


@dataclass
class Trained:
    """Heads that have trained, and their coordinator once they were merged."""

    heads: list[WatchedHead]
    settings: Settings
    coordinator: Coordinator | None = None


def settings_to_try(settings: Settings) -> tuple[Settings, list[str]]:
    """The settings with which a check trains, and in which way they aren't the run's."""
    train, notes = settings.train, []
    if train.compile:
        notes.append("The check doesn't compile the model (--compile).")
    if train.accumulate > BATCHES:
        notes.append(f"A step of the check takes {BATCHES} of {train.accumulate} batches (--accumulate).")
    train = replace(train, compile=False, accumulate=min(BATCHES, train.accumulate), baseline_processes=1)
    # Differences between builds are reported as a finding of their own, so they must not end the check.
    return replace(settings, train=train, untrained=()), notes


def train_heads(made: Examined, source: Callable[[], Worker], device: torch.device, findings: Findings) -> Trained | None:
    """Takes a few steps of a few heads. Returns None if they can't be taken."""
    initial = made.initial
    if initial is None:
        findings.skip("steps", f"No step was taken, since {made.obstacle}.")
        return None
    settings, notes = settings_to_try(made.settings)
    for note in notes:
        findings.ok("steps", note)
    heads: list[WatchedHead] = []
    try:
        for number in range(min(HEADS, settings.lte.num_heads)):
            head = WatchedHead(source(), settings, number, device)
            head.start(0, initial.base)
            heads.append(head)
        before = [{name: p.detach().clone() for name, p in head.trained_parameters.items()} for head in heads]
        losses = [[_take_step(head, findings) for _ in range(min(STEPS, head.steps_left))] for head in heads]
    except Exception as error:
        made.obstacle = "no step could be taken"
        findings.fail_with("steps", error)
        return None
    made.obstacle = _find_nonfinite(heads, losses, settings, findings)
    if made.obstacle:
        return None
    _judge_losses(heads, losses, before, device, findings)
    _judge_gradients(heads, findings)
    return Trained(heads, settings)


def _take_step(head: WatchedHead, findings: Findings) -> float:
    begin = time.perf_counter()
    head.train(1)
    loss = head.last_loss  # waits for the device
    findings.times["step"] = time.perf_counter() - begin
    return loss


def _find_nonfinite(
    heads: Sequence[WatchedHead], losses: Sequence[Sequence[float]], settings: Settings, findings: Findings
) -> str:
    """Returns what isn't finite, as a clause; empty if everything is. What comes first is the finding."""
    for head, values in zip(heads, losses, strict=True):
        for step, loss in enumerate(values, 1):
            if not math.isfinite(loss):
                findings.fail(
                    "steps",
                    f"The loss of head {head.number} is {loss} at step {step} ({numbers(values)}), with learning rates "
                    f"{numbers(head.rates)}. Try lower ones, and look for log(0) and a division by 0.",
                )
                return "the losses aren't finite"
            wrong = [name for name, names in _trained(head) if any(head.nonfinite.get(each) == step for each in names)]
            if wrong and settings.train.precision != "fp16-mixed":  # which skips steps whose gradients overflow
                findings.fail(
                    "gradients",
                    f"The gradient of {join(wrong)} isn't finite in head {head.number} at step {step}. Look for sqrt(0), "
                    "log(0) and a division by 0 in loss(), and for values in the data that are too large.",
                )
                return "the gradients aren't finite"
    return ""


def _trained(head: WatchedHead) -> list[tuple[str, set[str]]]:
    """What a head trains: names in the model, with the names of the parameters that stand for each."""
    factors = [(spec.name, {spec.a_name, spec.b_name}) for spec in head.plan.adapted]
    return factors + [(replica.name, {replica.name}) for replica in head.plan.replicas if not replica.buffer]


def _judge_losses(
    heads: Sequence[WatchedHead],
    losses: Sequence[Sequence[float]],
    before: Sequence[Mapping[str, Tensor]],
    device: torch.device,
    findings: Findings,
) -> None:
    """Says what the losses are, and whether the steps have changed anything."""
    shown, steps = "; ".join(numbers(values) for values in losses), plural(len(losses[0]), "step")
    pairs = [(p, old[name]) for head, old in zip(heads, before, strict=True) for name, p in head.trained_parameters.items()]
    if all(torch.equal(now, old) for now, old in pairs):
        findings.warn(
            "steps",
            f"{steps} changed nothing that trains: the learning rates are {numbers(heads[0].rates)} after them. Raise them, or "
            "begin the schedule above 0.",
        )
    else:
        findings.ok("steps", f"{steps} of {plural(len(heads), 'head')} on {device}, with losses {shown}.")


def _judge_gradients(heads: Sequence[WatchedHead], findings: Findings) -> None:
    """Says which parameters got no gradient, or one that is 0, or aren't optimized."""
    part, first = "gradients", heads[0]
    groups = _trained(first)
    got, nonzero = (set[str]().union(*(getattr(head, name) for head in heads)) for name in ("with_gradient", "nonzero"))
    optimized = {id(p) for group in first.optimizer.param_groups for p in group["params"]}
    left_out = {name for name, p in first.trained_parameters.items() if id(p) not in optimized}
    without = [name for name, names in groups if not names & got]
    zero = [name for name, names in groups if names & got and not names & nonzero]
    forgotten = [name for name, names in groups if names & left_out]
    if forgotten:
        findings.warn(
            part,
            f"build_optimizer() leaves out {join(forgotten)}, so {_do(forgotten)} not train. Give the optimizer all groups of "
            "`params`; or freeze what shouldn't train in build_model() (requires_grad_(False)).",
        )
    if without:
        findings.warn(
            part,
            f"No loss of {STEPS} steps depends on {join(without)}, so {_do(without)} not train. Use {_them(without)} in "
            f"loss(), or freeze {_them(without)} in build_model() (requires_grad_(False)).",
        )
    if zero:
        findings.warn(
            part,
            f"The gradient of {join(zero)} was 0 everywhere in all {STEPS} steps, so {_do(zero)} not learn. Look for a "
            "multiplication by 0, a detach(), or activations that are always cut off.",
        )
    if not (without or zero or forgotten):
        findings.ok(part, f"All {len(groups)} weights and parameters that train get gradients.")


def merge_heads(made: Examined, trained: Trained | None, findings: Findings) -> None:
    """Merges what the heads have trained, as the run's coordinator does."""
    if findings.has_failed("merge"):  # the policy can't be made
        return
    if trained is None or made.initial is None:
        findings.skip("merge", f"Nothing was merged, since {made.obstacle}.")
        return
    with findings.looking_at("merge"):
        _merge(made.worker, trained, made.initial, findings)


def _merge(worker: Worker, trained: Trained, initial: Initial, findings: Findings) -> None:
    settings, heads, now = trained.settings, trained.heads, 0.0
    coordinator = Coordinator(
        settings, initial.plan, initial.base.clone(), make_policy(settings.merge), plans=initial.plans, clock=lambda: now
    )
    coordinator.live &= {head.number for head in heads}  # the others have ended already, so that nothing waits for them
    transport = LoopbackTransport(initial.plans, settings.merge, coordinator, torch.float32)
    events: list[EventResult] = []
    with findings.timing("merge"):
        for head in heads:
            sent = transport(head, head.contribute())
            events.append(coordinator.receive(sent, sent.buffer))
        while coordinator.candidate is not None or (coordinator.pending_heads and coordinator.wakes_at is not None):
            if coordinator.candidate is not None:
                events.append(coordinator.receive_evaluation(evaluate_base(worker, initial, coordinator.candidate)))
            else:
                assert coordinator.wakes_at is not None
                now = max(now, coordinator.wakes_at)
                events.append(coordinator.tick())
        results = [result for event in events for result in event.results]
        for result in results:
            head = next(head for head in heads if head.number == result.head)
            newer = coordinator.version != head.version
            head.adopt(result, coordinator.version, coordinator.base.clone() if newer else None)
    trained.coordinator = coordinator
    refused = [result for result in results if not (result.accepted or result.discarded)]
    policy = settings.merge.policy if isinstance(settings.merge.policy, str) else type(settings.merge.policy).__name__
    change = (coordinator.base - initial.base).norm() / initial.base.norm().clamp_min(1e-30)
    merged = f"The policy {policy} merged {plural(len(heads), 'head')}"
    if refused:
        findings.fail("merge", f"The coordinator refuses what head {refused[0].head} has trained: {refused[0].reason}.")
    elif not coordinator.version:
        why = results[0].reason if results else coordinator.waiting_for
        findings.warn("merge", f"The policy {policy} merged nothing of {plural(len(heads), 'head')}: {why}.")
    elif not bool(coordinator.base.isfinite().all()):
        findings.fail("merge", f"The policy {policy} made merged weights that aren't finite. Try --policy average.")
    elif settings.merge.never_merge:
        findings.ok("merge", "Nothing is merged (--never-merge): each head keeps its adapter.")
    elif not bool(change):
        findings.warn(
            "merge", f"The policy {policy} merged {plural(len(heads), 'head')}, and the merged weights are as before."
        )
    else:
        findings.ok("merge", f"{merged}, which changed the weights by {float(change):.2g} of their norm.")


def _do(names: Sequence[str]) -> str:
    return "it does" if len(names) == 1 else "they do"


def _them(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"
