"""Every Python block in the documentation runs as written. test_commands.py runs those that need a finished run."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lte_ray import LTEConfig, LTETrainer, Shard
from lte_ray.config import LayerConfig
from lte_ray.engine.in_process import evaluate_base, run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from tests.docs.pages import blocks, page_blocks
from tests.support.image_folders import write_idx_folder
from tests.support.run_folders import make_run
from tests.support.sink_rows import evaluation_row, merge_row, named, run_info

ELSEWHERE = {
    ("README.md", 0): "conftest.py writes mine.py, and test_commands.py trains it",
    ("README.md", 1): "test_readme.py",
    ("docs/export.md", 0): "test_commands.py",
    ("docs/faults.md", 0): "test_commands.py",
    ("docs/runs.md", 0): "test_commands.py",
    ("docs/merge-policies.md", 0): "test_merge_policies.py",
    ("docs/merge-policies.md", 1): "test_merge_policies.py",
    ("docs/merge-policies.md", 2): "test_merge_policies.py",
    ("docs/plan.md", 1): "test_commands.py",
    ("docs/sweep.md", 0): "tests/integration/test_sweep.py",
}
"""Blocks that other tests run, by page and number on it, and where."""

HERE = {
    ("docs/callbacks.md", 0),
    ("docs/check.md", 0),
    *(("docs/data.md", number) for number in range(5)),
    ("docs/fit.md", 0),
    ("docs/fit.md", 1),
    ("docs/from-lte.md", 0),
    ("docs/logging.md", 0),
    ("docs/logging.md", 1),
    ("docs/models.md", 0),
    ("docs/plan.md", 0),
    ("docs/recipes.md", 0),
    ("docs/report.md", 0),
    ("docs/security.md", 0),
    ("docs/workers.md", 0),
    ("docs/workers.md", 1),
    ("docs/workers.md", 2),
    ("docs/workers.md", 3),
}


def run(page: str, number: int, **names: Any) -> dict[str, Any]:
    """Executes a block with these names, and returns all names after it."""
    exec(page_blocks(page, "python")[number], names)
    return names


def test_every_block_has_a_test() -> None:
    """A new block must be listed, and one that is gone must be removed."""
    pages = sorted(block.page for block in blocks("python"))
    numbered = {(page, number) for page, group in itertools.groupby(pages) for number, _ in enumerate(group)}
    assert numbered == HERE | set(ELSEWHERE)


def test_a_worker_can_make_batches_from_their_numbers() -> None:
    """docs/workers.md: the same number gives the same batch, whichever head trains it."""
    train_batches = run("docs/workers.md", 0, torch=torch)["train_batches"]
    first, second = itertools.islice(train_batches(None, Shard(0, 1, seed=3)), 2)
    (other,) = itertools.islice(train_batches(None, Shard(1, 2, seed=3)), 1)
    assert first.shape == (32, 64)
    assert not torch.equal(first, second)
    assert torch.equal(second, other)


def test_a_worker_can_train_on_image_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/recipes.md: batches of resized images with their labels, from the files of a folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    colors = (np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3)), np.arange(40))
    write_idx_folder(tmp_path / "data", colors, colors)
    train_batches = run("docs/recipes.md", 0)["train_batches"]
    images, labels = next(train_batches(SimpleNamespace(folder=tmp_path / "data"), Shard(0, 1, seed=3)))
    assert images.shape == (32, 3, 64, 64)
    assert len(set(labels.tolist())) == 32


def test_a_worker_can_train_on_any_data_set() -> None:
    """docs/data.md: with an index, in batches of its own making, through torch's DataLoader, and as a stream."""
    shard = Shard(1, 2, seed=3)
    numbers = SimpleNamespace(dataset=lambda: list(range(100)), stream=lambda seed: range(seed, 100), collate=torch.tensor)
    expected = next(shard.indices(100, 32)).tolist()
    assert next(iter(run("docs/data.md", 0)["train_batches"](numbers, shard))).tolist() == expected
    assert next(iter(run("docs/data.md", 2)["train_batches"](numbers, shard))).tolist() == expected
    assert next(iter(run("docs/data.md", 3)["train_batches"](numbers, shard))).tolist() == list(range(32, 64))
    texts = SimpleNamespace(dataset=lambda: [{"tokens": [1] * (1 + n % 3), "id": n} for n in range(12)])
    assert next(iter(run("docs/data.md", 1)["train_batches"](texts, shard))).shape[0] == 4


def test_a_worker_reads_a_copy_of_data_in_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/data.md: local_copy gives a path on the node; here of a file that stands for the copy."""
    (tmp_path / "articles.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    monkeypatch.setattr("lte_ray.data.local_copy", lambda url: str(tmp_path / url.rpartition("/")[2]))
    assert run("docs/data.md", 4)["dataset"](None) == [{"text": "a"}, {"text": "b"}]


def test_a_model_trains_without_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/fit.md: both blocks, with the engine in this process instead of Ray; the notebook runs `fit` on Ray."""

    def train(trainer: LTETrainer) -> SimpleNamespace:
        settings = Settings("run", trainer.lte, trainer.merge, trainer.train)
        done = run_in_process(trainer.worker, settings)
        return SimpleNamespace(path="", metrics=evaluate_base(trainer.worker, prepare(trainer.worker, settings), done.base))

    monkeypatch.setattr(LTETrainer, "fit", train)
    names = run("docs/fit.md", 0)
    assert names["result"].metrics["validation_loss"] < 0.5
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=20, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    row = torch.arange(8)
    rows = [{"input_ids": row, "labels": row}] * 8
    assert run("docs/fit.md", 1, **{**names, "folder": tmp_path, "rows": rows})["result"].metrics == {}


def test_a_worker_can_give_replicas_another_learning_rate() -> None:
    """docs/workers.md: each group gets its own rate, which the schedule keeps apart."""
    names = run("docs/workers.md", 1, torch=torch)
    groups = [{"params": [nn.Parameter(torch.zeros(2))], "name": name} for name in ("lora", "replica")]
    optimizer = names["build_optimizer"](None, groups)
    assert [group["lr"] for group in optimizer.param_groups] == [4e-3, 1e-3]
    names["build_schedule"](None, optimizer, 10)
    assert [group["max_lr"] for group in optimizer.param_groups] == [4e-3, 1e-3]


def test_a_callback_can_end_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/callbacks.md: once an evaluation is good enough."""
    watch, reasons = run("docs/callbacks.md", 0)["Watch"](), []
    follow = SimpleNamespace(name="mine", stop=reasons.append)
    for loss in (0.5, 0.05):
        watch.on_evaluation(follow, {"version": 3, "values": {"validation_loss": loss}})
    assert reasons == ["the loss is low enough"]
    assert capsys.readouterr().out.startswith("mine 3 {'validation_loss': 0.5}")


def test_a_loss_can_return_figures() -> None:
    """docs/workers.md: the share of words that the model gets right."""
    words = torch.tensor([0, 1, 2, 1])
    model = lambda given: torch.eye(3)[given].requires_grad_()  # noqa: E731
    loss = run("docs/workers.md", 2, F=nn.functional)["loss"]
    _, figures = loss(None, model, (words, torch.tensor([0, 1, 0, 0])))
    assert figures == {"accuracy": torch.tensor(0.5)}


def test_a_worker_can_train_with_lora_muon() -> None:
    """docs/workers.md: factors and replicas get their own rates."""
    pair = [nn.Parameter(torch.ones(1, 2)), nn.Parameter(torch.zeros(3, 1))]
    groups = [{"params": pair, "name": "lora", "scalings": [2.0]}, {"params": [nn.Parameter(torch.ones(2))], "name": "replica"}]
    names = run("docs/workers.md", 3)
    optimizer = names["build_optimizer"](None, groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.01]
    names["build_schedule"](None, optimizer, 700)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05 / 50, 0.01 / 50]


def test_a_sink_of_ones_own_gets_the_losses(tmp_path: Path) -> None:
    """docs/logging.md: it follows rows as a run gives them."""
    sink = run("docs/logging.md", 0)["LossFile"]()
    sink.open(run_info(tmp_path / "LossFile"))
    for row in named(merge_row(1, 2.0), evaluation_row(1, 0.5), merge_row(2, 1.5)):
        sink.row(row)
    sink.close("finished")
    assert (tmp_path / "LossFile" / "losses.txt").read_text() == "# r from step 0, lr None\n10 100 2.0\n20 200 1.5\n"


def test_the_metrics_of_a_run_are_read_in_a_notebook(tmp_path: Path) -> None:
    """docs/logging.md: losses by samples."""
    rows = [merge_row(1, 2.0), evaluation_row(1, 0.5), merge_row(2, 1.5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("docs/logging.md", 1, path=tmp_path)["losses"].to_dict() == {100: 2.0, 200: 1.5}


def test_a_report_is_written_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """docs/report.md: its size, and that nothing was merged yet."""
    monkeypatch.chdir(tmp_path)
    run("docs/report.md", 0, path=make_run(tmp_path / "r").path)
    assert capsys.readouterr().out.startswith(str((tmp_path / "report.html").stat().st_size))


def test_a_worker_can_be_checked_in_python(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/check.md: the README's worker has no mistakes."""
    run("docs/check.md", 0)
    assert capsys.readouterr().out.startswith("True [] 0.")


def test_a_run_can_be_planned_in_python(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/plan.md: the bytes of factors and of a contribution, and flags for the GPUs."""
    run("docs/plan.md", 0)
    factors, up, *flags = capsys.readouterr().out.split()
    assert int(factors) <= int(up)
    assert flags[:2] == ["--num-heads", "4"]


def test_rules_for_layers_can_be_given_in_python() -> None:
    """docs/models.md: as an expression of the two settings classes."""
    run("docs/models.md", 0, LTEConfig=LTEConfig, LayerConfig=LayerConfig)


def test_a_worker_can_read_a_secret_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/security.md: when it trains, not when it is made."""
    made = run("docs/security.md", 0, os=os)["Mine"]()
    monkeypatch.setenv("HF_TOKEN", "a secret")
    made.train_batches(Shard(0, 1, seed=0))
    assert not vars(made)


@pytest.mark.slow
@pytest.mark.ray
def test_the_authors_users_can_go_on_to_ray(mine: Path, home: Path, local_ray: None) -> None:
    """docs/from-lte.md: with a worker of their own, here the README's."""
    from mine import Net  # type: ignore[import-not-found]

    names = run("docs/from-lte.md", 0, MyWorker=Net)
    assert (Path(names["result"].path) / "model.safetensors").exists()
