"""Figures that a worker returns with its loss: averaged by head until the next contribution, however heads compute."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lte_ray.config import TrainConfig
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.loss import MAX_KEPT_BYTES, Figures, compute_loss
from lte_ray.engine.head.snapshot import restore, snapshot
from lte_ray.engine.in_process import InProcessRun, run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.errors import WorkerError, WorkerFailed
from lte_ray.messages import CheckpointRequest
from lte_ray.run.metrics import MetricsLog
from lte_ray.storage import RunDirectory
from tests.support.tiny_worker import BATCH, Tiny, make_settings


@dataclass
class Scored(Tiny):
    """Also counts the words of a batch, and measures the mean word and how often the model is right."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float | Tensor]]:
        words, following = batch
        logits = model(words)
        hits = (logits.argmax(-1) == following).float().mean()
        loss = nn.functional.cross_entropy(logits, following)
        return loss, {"hits": hits, "words": len(words), "mean_word": words.double().mean(), "double": 2 * loss}


def figures_of(run: InProcessRun) -> list[dict[str, dict[int, float]]]:
    return [merge.figures for merge in run.merges]


def assert_alike(one: InProcessRun, other: InProcessRun, tolerance: float = 1e-12) -> None:
    """Both runs have the same figures of the same heads at every merge."""
    for mine, others in zip(figures_of(one), figures_of(other), strict=True):
        assert mine.keys() == others.keys()
        for name, values in mine.items():
            assert values == pytest.approx(others[name], rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_figures_are_means_over_the_batches_of_a_round(accumulate: int) -> None:
    """Of each head by itself; a figure of the loss is twice the loss, and the weights are those of a run without figures."""
    settings = replace(make_settings(heads=3), train=TrainConfig(steps=8, seed=3, accumulate=accumulate))
    run = run_in_process(Scored(), settings, torch.float64)
    plain = run_in_process(Tiny(), settings, torch.float64)
    assert torch.equal(run.base, plain.base)
    assert [merge.steps for merge in run.merges] == [9, 9, 6]  # the last round is shorter
    for merge in run.merges:
        assert list(merge.figures) == ["hits", "words", "mean_word", "double"]
        assert merge.figures["words"] == dict.fromkeys(range(3), float(BATCH))
        assert merge.figures["double"] == pytest.approx({head: 2 * loss for head, loss in merge.losses.items()}, rel=1e-12)
        assert len(set(merge.figures["mean_word"].values())) > 1
        assert all(0 <= value <= 1 for value in merge.figures["hits"].values())
    assert plain.merges[0].figures == {}


@pytest.mark.parametrize(
    ("how", "train"),
    [
        ({"heads_per_actor": 2}, {}),
        ({"heads_per_actor": 3, "concurrent_heads": 2}, {}),
        ({"heads_per_actor": 3, "stack_heads": "always"}, {}),
        ({"heads_per_actor": 3, "stack_heads": "always"}, {"accumulate": 2}),
        ({"heads_per_actor": 3, "stack_heads": "always"}, {"clip_norm": 0.1}),
    ],
)
def test_virtual_heads_have_the_figures_of_separate_ones(how: dict[str, object], train: dict[str, object]) -> None:
    """In turns, in threads, and as one batch, where a figure has one value for each head."""
    settings = replace(make_settings(heads=3), train=TrainConfig(steps=8, seed=3, **train))  # type: ignore[arg-type]
    together = run_in_process(Scored(), settings, torch.float64, **how)  # type: ignore[arg-type]
    assert_alike(together, run_in_process(Scored(), settings, torch.float64))


def test_figures_in_mixed_precision_are_summed_in_float64() -> None:
    """Values in bfloat16 are exact here, and so is their mean over 3 batches."""

    class Rounded(Tiny):
        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            return super().loss(model, batch), {"large": torch.tensor(256.0 + float(batch[0][0]), dtype=torch.bfloat16)}

    settings = replace(make_settings(), train=TrainConfig(steps=3, seed=3, precision="bf16-mixed"))
    values = run_in_process(Rounded(), settings).merges[0].figures["large"]
    assert all(256 <= value <= 264 for value in values.values())
    assert any(value % 1 for value in values.values())


def test_names_may_change_from_batch_to_batch() -> None:
    """Each figure is the mean over the batches that had it."""

    @dataclass
    class Changing(Tiny):
        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> object:
            first = float(batch[0][0])
            return super().loss(model, batch), {"odd" if first % 2 else "even": first}

    seen: dict[str, set[float]] = {"odd": set(), "even": set()}
    run = run_in_process(Changing(), make_settings(), torch.float64)
    for figures in figures_of(run):
        for name, values in figures.items():
            seen[name] |= set(values.values())
    assert min(seen["odd"]) >= 1 and max(seen["even"]) <= 6 and all(seen.values())


def test_figures_without_tensors_leave_stacked_heads_stacked() -> None:
    """A loss that returns numbers only is still one batched computation."""

    class Counting(Tiny):
        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> object:
            return super().loss(model, batch), {"words": len(batch[0]), "half": np.float32(0.5), "known": True}

    run = run_in_process(Counting(), make_settings(), torch.float64, heads_per_actor=2, stack_heads="always")
    assert run.merges[-1].figures == {"words": {0: 4.0, 1: 4.0}, "half": {0: 0.5, 1: 0.5}, "known": {0: 1.0, 1: 1.0}}


def test_a_checkpoint_keeps_the_figures_of_the_round_that_it_interrupts() -> None:
    """The restored head contributes the means over the whole round."""
    settings, worker = make_settings(heads=1, merge_iter=6), Scored()
    initial = prepare(worker, settings, torch.float64)
    head, restored = (Head(worker, settings, 0, dtype=torch.float64) for _ in range(2))
    head.start(0, initial.base.clone())
    head.train(2)
    restore(restored, snapshot(head, CheckpointRequest(0, {0: 0})), initial.base.clone())
    for each in (head, restored):
        each.train(4)
    assert restored.contribute().figures == pytest.approx(head.contribute().figures, rel=1e-12)


def test_a_head_that_drops_its_steps_drops_their_figures() -> None:
    """Its next contribution has the figures of the steps that it holds."""
    settings, worker = make_settings(heads=1), Scored()
    head = Head(worker, settings, 0, dtype=torch.float64)
    head.start(0, prepare(worker, settings, torch.float64).base)
    head.train(2)
    head.rewind()
    assert head.contribute().figures == {}


def test_a_value_does_not_keep_the_tensor_that_it_is_part_of() -> None:
    """Nor its graph."""
    figures, logits = Figures(), torch.ones(MAX_KEPT_BYTES, requires_grad=True) * 3
    figures.add({"one": logits[0]})
    figures.add({"one": 1.0})
    (kept, _) = figures._values["one"]
    assert isinstance(kept, Tensor) and kept.untyped_storage().nbytes() == 4 and not kept.requires_grad
    assert figures.close() == {"one": 2.0}
    assert figures.close() == {}


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ({"accuracy": torch.ones(2)}, r"a figure 'accuracy' that isn't a number: a tensor of shape \(2,\), torch.float32"),
        ({"accuracy": "high"}, "a figure 'accuracy' that isn't a number: 'high'"),
        ({"accuracy": None}, "a figure 'accuracy' that isn't a number: None"),
        ({"phase": torch.tensor(1j)}, r"a figure 'phase' that isn't a number: a tensor of shape \(\), torch.complex64"),
        ({3: 1.0}, "a figure named 3; its name must be text"),
        ({"": 1.0}, "a figure named ''; its name must be text"),
        ({"loss": 1.0}, "a figure named 'loss', as the loss itself is called"),
        ({"train_loss": 1.0}, "a figure named 'train_loss', as the loss itself is called"),
        ([1.0], r"loss\(\) returned \(loss, list\); what comes after the loss must be a dict"),
    ],
)
@pytest.mark.parametrize("stack_heads", ["never", "auto"])
def test_bad_figures_are_one_error_in_words(
    returned: object, says: str, stack_heads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the figure, what it is, and what it must be: before the run, or in a head if it wasn't found there."""

    class Bad(Tiny):
        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> object:
            return super().loss(model, batch), returned

    with pytest.raises(WorkerError, match=says):
        prepare(Bad(), make_settings())
    monkeypatch.setattr("lte_ray.engine.prepare.check_first_loss", lambda *arguments: None)
    with pytest.raises(WorkerFailed, match=says):
        run_in_process(Bad(), make_settings(), torch.float64, heads_per_actor=2, stack_heads=stack_heads)


def test_a_longer_tuple_is_not_a_loss() -> None:
    """The error says what `loss` may return."""

    class Three(Tiny):
        def loss(self, model: nn.Module, batch: object) -> object:
            return torch.ones(()), {}, {}

    with pytest.raises(TypeError, match=r"must return a scalar tensor, the mean over the batch, or \(loss, figures\)"):
        compute_loss(Three(), nn.Identity(), None)  # type: ignore[arg-type]


def test_rows_of_merges_have_the_figures_by_name_and_head(tmp_path: Path) -> None:
    """NaN is null, as elsewhere; a run without figures has none in its rows."""
    directory = RunDirectory.open(str(tmp_path), "r")
    directory.create()
    log, rows = MetricsLog(directory), []
    log.listeners.append(rows.append)
    record = run_in_process(Tiny(), make_settings(), torch.float64).merges[0]
    log.record_merge(record)
    log.record_merge(replace(record, figures={"accuracy": {0: 0.5, 1: math.nan}}))
    assert "figures" not in rows[0]
    assert rows[1]["figures"] == {"accuracy": {"0": 0.5, "1": None}}
