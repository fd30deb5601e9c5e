"""A checkpoint of a head, written and read back; and whether a head that resumes from it goes on like the one that it is of."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable

import torch

from lte_ray import checkpoint
from lte_ray.checking.batches import same
from lte_ray.checking.model import Examined
from lte_ray.checking.report import Findings
from lte_ray.checking.training import Trained, WatchedHead
from lte_ray.checking.words import numbers
from lte_ray.engine.head.snapshot import restore, snapshot
from lte_ray.engine.prepare import Initial
from lte_ray.messages import CheckpointRequest
from lte_ray.run.display import format_bytes
from lte_ray.run.record import object_name, write_files
from lte_ray.storage import RunDirectory
from lte_ray.worker import Worker

PART = "saving"

ROUNDING = 1e-2
"""How much the steps of the two heads may differ, relative to their size, by the order of sums on a GPU."""


def check_saving(made: Examined, trained: Trained | None, source: Callable[[], Worker], findings: Findings) -> None:
    """Writes a checkpoint into a temporary folder, resumes a head from it, and compares it with the one that goes on.

    Args:
        source: gives the worker as another process gets it.
    """
    with tempfile.TemporaryDirectory(prefix="lte-ray-check-") as folder:
        directory = RunDirectory.open(folder, "check")
        directory.create()
        with findings.looking_at("files"):
            write_files(directory, made.worker)
        if findings.has_failed(PART):  # the state can't be saved
            return
        if trained is None or made.initial is None or trained.coordinator is None:
            findings.skip(PART, f"Nothing was saved, since {made.obstacle or 'nothing could be merged'}.")
            return
        if trained.heads[0].outstanding:
            findings.skip(PART, "Nothing was saved, since the policy hasn't decided on what head 0 has trained.")
            return
        with findings.looking_at(PART):
            resumed, size = _save_and_resume(directory, made.initial, trained, source, findings)
            _compare(trained.heads[0], resumed, size, findings)


def _save_and_resume(
    directory: RunDirectory, initial: Initial, trained: Trained, source: Callable[[], Worker], findings: Findings
) -> tuple[WatchedHead, int]:
    """Returns a head that has resumed from a checkpoint of the first head, and the bytes of the checkpoint."""
    head, coordinator = trained.heads[0], trained.coordinator
    assert coordinator is not None
    version, plan, policy = coordinator.version, initial.plan, object_name(trained.settings.merge.policy)
    with findings.timing("save"):
        state = snapshot(head, CheckpointRequest(version, {head.number: head.state.merged.sequence}))
        references = {h.number: r for h in trained.heads if (r := coordinator.reference(h.number)) is not None}
        files = [
            checkpoint.write_base(directory, version, plan, coordinator.base),
            checkpoint.write_references(directory, version, references),
            checkpoint.write_policy(directory, version, policy, coordinator.policy_state()),
            checkpoint.write_head(directory, version, head.number, *state),
        ]
        checkpoint.commit(directory, version, [head.number], files, coordinator.checkpoint_facts())
    with findings.timing("resume"):
        manifest = checkpoint.read_manifest(directory, version)
        checkpoint.read_policy(directory, manifest, policy)
        checkpoint.read_references(directory, manifest, initial.plans)
        resumed = WatchedHead(source(), trained.settings, head.number, head.device)
        restore(
            resumed, checkpoint.read_head(directory, manifest, head.number), checkpoint.read_base(directory, manifest, plan)
        )
    return resumed, sum(file.size for file in files)


def _compare(head: WatchedHead, resumed: WatchedHead, size: int, findings: Findings) -> None:
    """Takes a step of both heads, and says what differs."""
    written = f"A checkpoint of one head ({format_bytes(size)}) is written and read back"
    if not head.steps_left:
        findings.ok(PART, f"{written}. The run ends before a resumed head takes a step (--steps).")
        return
    before = {name: p.detach().clone() for name, p in resumed.trained_parameters.items()}
    for each in (head, resumed):
        each.train(1)
    moved = difference = 0.0
    for name, parameter in head.trained_parameters.items():
        moved += float((parameter.detach() - before[name]).double().square().sum())
        difference += float((parameter.detach() - resumed.trained_parameters[name].detach()).double().square().sum())
    one, other = head.last_loss, resumed.last_loss
    same_loss = one == other or abs(one - other) <= 1e-5 * abs(one) or (math.isnan(one) and math.isnan(other))
    if not same(head.last_batch, resumed.last_batch):
        findings.fail(
            PART,
            "A head that resumes gets another batch than one that goes on. What train_batches() yields must depend on the "
            "shard and on the random numbers since the last batch alone.",
        )
    elif not same_loss:
        findings.fail(
            PART,
            f"For the same batch, the loss of a head that resumes is {other:.5g}, and {one:.5g} of one that goes on: something "
            "isn't saved. Keep what the worker counts or collects in state_dict() and load_state_dict(), and what the model "
            "does in persistent buffers.",
        )
    elif head.rates != resumed.rates:
        findings.fail(
            PART,
            f"The learning rates of a head that resumes are {numbers(resumed.rates)}, and {numbers(head.rates)} of one that "
            "goes on. The schedule's state_dict() must hold all that its rates depend on.",
        )
    elif math.sqrt(difference) > ROUNDING * math.sqrt(moved):
        findings.fail(
            PART,
            "From the same batch and loss, a head that resumes takes another step than one that goes on. The optimizer's "
            "state_dict() must hold all that its steps depend on.",
        )
    else:
        exactly = "bit for bit" if not difference and torch.tensor(one).equal(torch.tensor(other)) else "up to rounding"
        findings.ok(PART, f"{written}. A head that resumes from it goes on {exactly}.")
