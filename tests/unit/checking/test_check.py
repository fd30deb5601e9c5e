"""The check of a worker: what it says of a good one, and of one with each mistake."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lte_ray
from lte_ray import LTEConfig, MergeConfig, TrainConfig
from lte_ray.checking import CheckReport
from lte_ray.errors import ConfigError, WorkerError
from tests.support import mistaken_workers as w

SHARD = "Take the batches of shard.indices(size, batch_size) or of shard.slots()."


def run_check(kind: type, **merge: Any) -> CheckReport:
    """Checks a worker of this class, with three heads of rank 2."""
    return lte_ray.check(kind(), LTEConfig(num_heads=3, lora_r=2, lora_alpha=2.0), MergeConfig(**merge), TrainConfig(steps=10))


def texts(report: CheckReport, part: str, status: str) -> list[str]:
    """What a report says of a part."""
    return [finding.text for finding in report.findings if (finding.part, finding.status) == (part, status)]


def test_a_good_worker_has_no_mistakes() -> None:
    """All parts are in order, and all times are there."""
    report = run_check(w.Good)
    assert report.ok, report
    assert not [finding for finding in report.findings if finding.status == "skipped"]
    assert [finding.part for finding in report.findings if finding.status == "ok"] == [
        "sending", "model", "data", "loss", "layers", "steps", "gradients", "merge", "evaluation", "saving", "devices",
    ]  # fmt: skip
    assert set(report.times) == {
        "model", "first batch", "batch", "step", "merge", "evaluation", "save", "resume",
    }  # fmt: skip
    assert texts(report, "data", "ok") == [
        "Batches of 4 samples: the same when read again, others for each head, continued at shard.cursor."
    ]
    assert texts(report, "saving", "ok")[0].endswith("A head that resumes from it goes on bit for bit.")


MISTAKES = [
    (
        w.LossOfEachSample,
        "loss",
        "LossOfEachSample.loss() can't be used, as its first batch shows: loss() must return a scalar tensor, the mean over "
        "the batch, or (loss, figures); it returned shape (4,)",
    ),
    (
        w.RaisingLoss,
        "loss",
        "RaisingLoss.loss() can't be used, as its first batch shows: RuntimeError: mat1 and mat2 shapes cannot be multiplied "
        "(4x3 and 2x1)",
    ),
    (
        w.NaNLoss,
        "loss",
        "The loss of the first batch is nan, so nothing can be learned from it. Look for log(0), a division by 0, and values "
        "in the data that are too large or missing.",
    ),
    (
        w.NaNGradient,
        "gradients",
        "The gradient of 0.weight, 2.weight, 0.bias, 2.bias isn't finite in head 0 at step 1. Look for sqrt(0), log(0) and a "
        "division by 0 in loss(), and for values in the data that are too large.",
    ),
    (
        w.SameForAllHeads,
        "data",
        f"SameForAllHeads.train_batches() gives heads 0 and 1 the same first batch, so they learn the same. {SHARD}",
    ),
    (
        w.WithoutCursor,
        "data",
        "WithoutCursor.train_batches() begins with the first batch again where shard.cursor is 1, so a resumed run repeats "
        f"its data. Begin after shard.cursor batches. {SHARD}",
    ),
    (
        w.SkipsAhead,
        "data",
        "SkipsAhead.train_batches() begins with another batch than the second one where shard.cursor is 1, so a resumed run "
        f"doesn't continue where it was. Begin after shard.cursor batches. {SHARD}",
    ),
    (
        w.OtherEachTime,
        "data",
        "OtherEachTime.train_batches() gives another first batch when it is called again for head 0, so a resumed run doesn't "
        f"continue where it was. Draw from shard.seed, and keep no iterator in the worker. {SHARD}",
    ),
    (
        w.NoData,
        "data",
        "NoData.train_batches() raised, for head 0: FileNotFoundError: no such file: data.csv",
    ),
    (
        w.BrokenBuild,
        "model",
        "BrokenBuild.build_model() raised: FileNotFoundError: no such file: config.json",
    ),
    (
        w.OtherBuild,
        "model",
        "build_model() isn't deterministic: table differs between processes, and nothing trains or merges it. Seed every "
        "generator that build_model() makes (default_rng(0), torch.Generator().manual_seed(0)), and don't build from the "
        "order of a set.",
    ),
    (
        w.Grows,
        "model",
        "build_model() gives other layers when it is called again: 2.bias, 2.weight differ in name or shape. Build the same "
        "model in every process: from settings, not from the order of a set or from what an earlier call has left.",
    ),
    (
        w.UnsavableSchedule,
        "saving",
        "The optimizer's or schedule's state can't be saved: schedule.started has the type float32. Keep numbers, text and "
        "tensors in it, and make anything else in the constructor (or leave it out of state_dict()).",
    ),
    (
        w.ForgetfulSchedule,
        "saving",
        "The learning rates of a head that resumes are 0.01, 0.01, and 0.03, 0.03 of one that goes on. The schedule's "
        "state_dict() must hold all that its rates depend on.",
    ),
    (
        w.ForgetfulOptimizer,
        "saving",
        "From the same batch and loss, a head that resumes takes another step than one that goes on. The optimizer's "
        "state_dict() must hold all that its steps depend on.",
    ),
    (w.RaisingEvaluation, "evaluation", "evaluate() raised IndexError: tuple index out of range"),
    (
        w.EvaluationIsANumber,
        "evaluation",
        "evaluate() must return a dict of names and numbers, but returned 0.5",
    ),
    (
        w.EvaluationIsNaN,
        "evaluation",
        "evaluate() returned loss = nan, which isn't finite. Look for a mean of nothing and a division by 0.",
    ),
    (
        w.EvaluationWrites,
        "evaluation",
        "evaluate() changes the model: 2.bias. Its figures would depend on earlier evaluations. Evaluate a copy "
        "(copy.deepcopy(model)), or leave the model in eval mode, in which batch normalization counts nothing.",
    ),
    (
        w.NeedsBatches,
        "evaluation",
        "evaluate() raised AttributeError: 'NeedsBatches' object has no attribute 'classes'",
    ),
]


@pytest.mark.parametrize(("kind", "part", "text"), MISTAKES, ids=lambda value: getattr(value, "__name__", ""))
def test_a_mistake_is_an_error_in_the_users_words(kind: type, part: str, text: str) -> None:
    """It is the only error, and the report isn't ok."""
    report = run_check(kind)
    assert texts(report, part, "error") == [text], report
    assert not report.ok
    follow = {"saving"} if part == "data" else {"steps"} if kind is w.NaNLoss else set[str]()
    assert {finding.part for finding in report.errors} - follow == {part}, report


WARNINGS = [
    (
        w.UnusedLayer,
        "gradients",
        "No loss of 2 steps depends on head.weight, head.bias, so they do not train. Use them in loss(), or freeze them in "
        "build_model() (requires_grad_(False)).",
    ),
    (
        w.MutedLayer,
        "gradients",
        "The gradient of head.weight, head.bias was 0 everywhere in all 2 steps, so they do not learn. Look for a "
        "multiplication by 0, a detach(), or activations that are always cut off.",
    ),
    (
        w.LeavesOutBiases,
        "gradients",
        "build_optimizer() leaves out 0.bias, 2.bias, so they do not train. Give the optimizer all groups of `params`; or "
        "freeze what shouldn't train in build_model() (requires_grad_(False)).",
    ),
    (
        w.RateZero,
        "steps",
        "2 steps changed nothing that trains: the learning rates are 0, 0 after them. Raise them, or begin the schedule above "
        "0.",
    ),
    (
        w.OtherWeights,
        "model",
        "build_model() isn't deterministic: 0.weight begin with other values when it is called again. All heads of a run "
        "train the driver's, but a second run begins with others. Draw from torch's global generator, which has the run's "
        "seed.",
    ),
    (
        w.GlobalDraws,
        "data",
        "GlobalDraws.train_batches() doesn't read its shard, so every head trains on all the data, in its own order, and a "
        f"resumed run repeats some of it. {SHARD}",
    ),
    (
        w.EvaluationOfNothing,
        "evaluation",
        "evaluate() returned no figures. Return a dict of names and numbers, such as {'loss': 2.3}.",
    ),
    (
        w.EvaluationTrains,
        "evaluation",
        "evaluate() leaves the model in training mode. The next evaluation sets eval mode again; leave it so.",
    ),
    (
        w.LossOnCPU,
        "devices",
        "loss() mixes tensors of the CPU with those of the model's device, which fails on a GPU. Make tensors where the batch "
        "is (device=x.device), and let the model keep its own as buffers (register_buffer).",
    ),
    (
        w.EvaluationOnCPU,
        "devices",
        "evaluate() mixes tensors of the CPU with those of the model's device, which fails on a GPU. Move its data to the "
        "model's device: next(model.parameters()).device.",
    ),
    (
        w.Large,
        "sending",
        "Large has 24 MB, which every process gets. Keep settings only in its attributes; make models and data in the methods "
        "that use them.",
    ),
]


@pytest.mark.parametrize(("kind", "part", "text"), WARNINGS, ids=lambda value: getattr(value, "__name__", ""))
def test_what_may_be_wrong_is_a_warning(kind: type, part: str, text: str) -> None:
    """It is said, and the report is ok."""
    report = run_check(kind)
    assert texts(report, part, "warning") == [text], report
    assert report.ok, report


def test_a_worker_that_cannot_be_sent_is_checked_all_the_same() -> None:
    """The attribute is named, and everything else is looked at."""
    report = run_check(w.WithGenerator)
    (text,) = texts(report, "sending", "error")
    assert text.startswith("WithGenerator can't be sent to other processes: its attribute lines is a generator: ")
    assert text.endswith("Keep settings only in its attributes; open files, models and data in the methods that use them.")
    assert texts(report, "saving", "ok")
    assert len(report.errors) == 1


def test_a_loss_that_depends_on_what_is_not_saved_is_found() -> None:
    """The loss counts calls: a head that resumes counts from the start."""
    (text,) = texts(run_check(w.CountsCalls), "saving", "error")
    assert text.startswith("For the same batch, the loss of a head that resumes is ")
    assert "something isn't saved. Keep what the worker counts or collects in state_dict() and load_state_dict()" in text


def test_a_loss_that_explodes_is_found() -> None:
    """It names the step, the losses and the rates."""
    (text,) = texts(run_check(w.InfinityLater), "steps", "error")
    assert text.startswith("The loss of head 0 is inf at step 2 (")
    assert text.endswith("with learning rates 1e+38, 1e+38. Try lower ones, and look for log(0) and a division by 0.")


def test_all_mistakes_are_found_at_once() -> None:
    """A loss that can't be used hides neither data nor evaluation; what it does hide is named."""
    report = run_check(w.TwoMistakes)
    assert [finding.part for finding in report.errors] == ["data", "loss", "evaluation"]
    assert texts(report, "steps", "skipped") == ["No step was taken, since there is no loss."]
    assert texts(report, "merge", "skipped") == ["Nothing was merged, since there is no loss."]
    assert texts(report, "saving", "skipped") == ["Nothing was saved, since there is no loss."]


def test_an_unsavable_schedule_hides_neither_steps_nor_merge() -> None:
    """The heads train all the same."""
    report = run_check(w.UnsavableSchedule)
    assert texts(report, "steps", "ok")
    assert texts(report, "merge", "ok")


def test_details_are_the_lines_of_the_users_code() -> None:
    """An error has the place where it was raised."""
    (finding,) = run_check(w.RaisingLoss).errors
    assert "mistaken_workers.py" in finding.details
    assert "torch.ones(2, 1)" in finding.details
    assert "lte_ray/engine" not in finding.details
    assert not run_check(w.LossOfEachSample).errors[0].details


def test_a_worker_without_evaluation_is_good() -> None:
    """It is said that a run has no figures."""
    report = run_check(w.WithoutEvaluation)
    assert report.ok
    assert texts(report, "evaluation", "skipped") == [
        "WithoutEvaluation has no evaluate(model), so a run has no figures but its training loss."
    ]


def test_what_moves_with_the_model_is_on_its_device() -> None:
    """References to the model and to its weights are no mistake."""
    report = run_check(w.KeepsItsModel)
    assert report.ok, report
    assert texts(report, "devices", "ok"), report


def test_data_of_one_batch_tell_nothing_of_the_shard() -> None:
    """Equal batches are no mistake that a check can know."""
    report = run_check(w.OneBatch)
    assert report.ok
    assert texts(report, "data", "warning")


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "nesterov", "transfer": "int8", "send_down": "int8"},
        {"policy": "gated"},
        {"when": "arrival", "wait": False},
        {"when": "quorum", "quorum": 3},
        {"merge_every": "60s"},
        {"policy": "median"},
    ],
    ids=str,
)
def test_heads_merge_with_any_policy(settings: dict[str, Any]) -> None:
    """Two of three heads are enough, whatever the policy waits for."""
    report = run_check(w.Good, **settings)
    assert report.ok, report
    assert texts(report, "merge", "ok") or texts(report, "merge", "warning")


@pytest.mark.parametrize(
    ("lte", "train"),
    [
        ({"num_heads": 1}, {}),
        ({"num_heads": 2, "lora_r": (2, 3)}, {}),
        ({"full_rank": True}, {}),
        ({"reset": "B"}, {}),
        ({"base_dtype": "bf16"}, {"precision": "bf16-mixed"}),
        ({"num_heads": 4}, {"baseline": True, "baseline_processes": 4}),
        ({}, {"accumulate": 8, "steps": 1}),
        ({}, {"compile": True}),
    ],
    ids=str,
)
def test_the_settings_of_a_run_are_followed(lte: dict[str, Any], train: dict[str, Any]) -> None:
    """Each kind of head goes through all parts."""
    report = lte_ray.check(
        w.Good(), LTEConfig(**{"num_heads": 2, "lora_r": 2, **lte}), None, TrainConfig(**{"steps": 10, **train})
    )
    assert report.ok, report
    assert texts(report, "saving", "ok")


def test_settings_that_do_not_fit_the_model_are_findings() -> None:
    """An exclude pattern that matches nothing hides neither the loss nor the evaluation."""
    report = lte_ray.check(w.Good(), LTEConfig(exclude=("nothing",)))
    assert "--exclude 'nothing' matches no layer" in texts(report, "layers", "error")[0]
    assert texts(report, "loss", "ok")
    assert texts(report, "evaluation", "ok")
    assert texts(report, "steps", "skipped") == ["No step was taken, since it isn't clear what heads train."]


def test_a_check_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither files, random numbers, threads, nor changes of the worker."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    worker = w.CountsCalls()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before, threads = (random.random(), np.random.rand(), float(torch.rand(()))), torch.get_num_threads()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    lte_ray.check(worker)
    assert before == (random.random(), np.random.rand(), float(torch.rand(())))
    assert list(tmp_path.iterdir()) == []
    assert threads == torch.get_num_threads()
    assert worker.calls == 0


def test_a_class_without_methods_is_refused() -> None:
    """It is no worker."""
    with pytest.raises(WorkerError, match=r"lacks build_model\(\), train_batches\(\), loss\(\)"):
        lte_ray.check(object())  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["cuda:99", "moon", "meta"])
def test_a_device_that_cannot_be_used_is_refused(device: str) -> None:
    """One sentence names it."""
    with pytest.raises(ConfigError, match=f"device is '{device}'"):
        lte_ray.check(w.Good(), device=device)
