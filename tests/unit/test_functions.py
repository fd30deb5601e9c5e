"""Training from functions and data sets: `lte_ray.fit` and `FunctionWorker`."""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lte_ray
from lte_ray.config import SECTIONS, LTEConfig, MergeConfig, PlacementConfig, StorageConfig, TrainConfig
from lte_ray.data import Shard
from lte_ray.engine.in_process import evaluate_base, run_in_process
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError, WorkerError
from lte_ray.functions import FunctionWorker, fit, sort_settings
from lte_ray.run.record import recorded_arguments, to_plain
from lte_ray.worker import evaluate, evaluates


def pairs(size: int = 48, seed: int = 0) -> TensorDataset:
    x = torch.randn(size, 6, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.roll(1, dims=1).sin())


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))


class Own(nn.Module):
    """Returns its own loss, as models of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.mse_loss(self.layer(x), labels)}


class Stream(IterableDataset[Any]):
    """40 pairs in order."""

    def __iter__(self) -> Iterator[Any]:
        return iter([pairs()[k] for k in range(40)])


def run(worker: FunctionWorker, steps: int = 12) -> dict[str, float]:
    """Trains in this process; returns the figures of the merged weights."""
    settings = Settings("run", LTEConfig(num_heads=2, lora_r=4), MergeConfig(merge_iter=4), TrainConfig(steps=steps))
    done = run_in_process(worker, settings)  # type: ignore[arg-type]
    return dict(evaluate_base(worker, prepare(worker, settings), done.base))  # type: ignore[arg-type]


@pytest.mark.parametrize("given", ["function", "model", "dataset function", "stream", "rows"])
def test_every_form_of_model_and_data_trains(given: str) -> None:
    """The merged weights are better than the untrained ones, by the mean loss over the validation set."""
    train: Any = {"dataset function": pairs, "stream": Stream(), "rows": [pairs()[k] for k in range(48)]}.get(given, pairs())
    torch.manual_seed(0)
    worker = FunctionWorker(net() if given == "model" else net, train, pairs(20, seed=1), criterion=F.mse_loss, batch_size=8)
    before = evaluate(worker, prepare(worker, Settings("r", LTEConfig(), MergeConfig(), TrainConfig(steps=1))).model)  # type: ignore[arg-type]
    assert run(worker)["validation_loss"] < 0.9 * before["validation_loss"]


def test_a_head_reads_its_shard_of_the_data() -> None:
    """The batches of two heads are the permutation of the samples."""
    worker = FunctionWorker(net, list(range(24)), batch_size=4)
    batches = [worker.train_batches(Shard(head, 2, seed=3)) for head in range(2)]
    seen = [int(x) for _ in range(3) for head in batches for x in next(head)]
    assert sorted(seen) == list(range(24))


def test_a_model_that_returns_its_loss_needs_no_loss() -> None:
    """It is called with the batch's entries by name, or in their order."""
    rows = [{"x": x, "labels": y} for x, y in pairs()]
    worker = FunctionWorker(Own, rows, rows[:8], batch_size=8)
    assert run(worker)["validation_loss"] < 1
    model = Own()
    x, y = pairs()[:4]
    assert torch.equal(worker.loss(model, (x, y)), model(x, y)["loss"])


def test_the_validation_loss_is_that_of_all_samples() -> None:
    """Also where the last batch is smaller; figures that the loss returns are averaged likewise."""
    data = pairs(21)

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        difference = model(batch[0]) - batch[1]
        return difference.square().mean(), {"error": difference.abs().mean()}

    worker, model = FunctionWorker(net, data, data, loss=loss, batch_size=8), net()
    x, y = data.tensors
    figures = evaluate(worker, model)
    with torch.no_grad():
        difference = model(x) - y
    assert figures["validation_loss"] == pytest.approx(float(difference.square().mean()), rel=1e-6)
    assert figures["validation_error"] == pytest.approx(float(difference.abs().mean()), rel=1e-6)
    stream = FunctionWorker(net, Stream(), lambda: (data[k] for k in range(21)), loss=loss, batch_size=8)
    assert evaluate(stream, model) == figures
    assert evaluate(stream, model) == figures  # the generator is made again
    loaded = FunctionWorker(net, Stream(), DataLoader(data, 8), loss=loss, batch_size=8)
    assert evaluate(loaded, model) == figures


def test_what_evaluates_is_optional() -> None:
    """Neither validation data nor a function: nothing. A function comes before the data."""
    assert not evaluates(FunctionWorker(net, pairs()))
    worker = FunctionWorker(net, pairs(), pairs(), evaluate=lambda model: {"parameters": len(list(model.parameters()))})
    assert evaluate(worker, net()) == {"parameters": 4}


def test_a_worker_travels_without_the_data_that_it_has_made() -> None:
    """A function that makes the data is called once in each process."""
    worker = FunctionWorker(net, pairs)
    assert worker._dataset("train") is worker._dataset("train")
    again = pickle.loads(pickle.dumps(worker))
    assert again._made == {}
    assert len(again._dataset("train")) == 48


def test_settings_find_their_section() -> None:
    """By their names, which occur once; arguments of LTETrainer pass, among them `log`, which takes objects, too."""
    names = [field.name for kind in SECTIONS for field in dataclasses.fields(kind)]
    assert len(set(names)) == len(names)
    arguments = {field.name for field in dataclasses.fields(lte_ray.LTETrainer)} - {"reporter", "worker", "program"}
    assert arguments & set(names) == {"log"}
    assert sort_settings({"log": ["csv"]}) == {"log": ["csv"]}
    storage = StorageConfig(name="n")
    sorted_ = sort_settings({"num_heads": 4, "lr": 0.5, "run_config": storage, "cpus_per_head": 0.5})
    assert sorted_ == {
        "lte": LTEConfig(num_heads=4),
        "train": TrainConfig(lr=0.5),
        "run_config": storage,
        "scaling_config": PlacementConfig(cpus_per_head=0.5),
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_haeds": 4}, "There is no setting 'num_haeds'. Did you mean num_heads?"),
        ({"name": "a", "run_config": StorageConfig(name="b")}, "run_config and name are both given. Put name into run_config"),
        ({"num_heads": 0}, "--num-heads is 0, but it must be at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Before anything starts."""
    with pytest.raises(ConfigError, match=message):
        fit(net, pairs(), criterion=F.mse_loss, **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "gpt2"}, "model is 'gpt2', but it must be a function"),
        ({"evaluate": 3}, "evaluate is 3, but it must be a function"),
        ({"loss": F.mse_loss, "criterion": F.mse_loss}, "loss and criterion are both given"),
        ({"criterion": nn.MSELoss}, r"criterion is the class MSELoss. Give an instance: MSELoss\(\)"),
        ({"train_dataset": iter([1])}, "train_dataset is a list_iterator, which can be read only once"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(arguments: dict[str, Any], message: str) -> None:
    """The error names the argument."""
    with pytest.raises(WorkerError, match=message):
        FunctionWorker(**{"model": net, "train_dataset": pairs(), **arguments})


def test_data_may_be_files_and_generators(tmp_path: Path) -> None:
    """Files are read for validation as for training; a generator, or f(epoch), gives each pass."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"x": [float(k)] * 6}) + "\n" for k in range(8)))
    collate = functools.partial(collate_rows, key="x")

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).mean() * 0 + batch.mean()

    worker = FunctionWorker(net, str(path), str(path), loss=loss, batch_size=4, collate=collate)
    assert evaluate(worker, net())["validation_loss"] == 3.5
    assert {float(x) for x in next(worker.train_batches(Shard(0, 1, 0)))[:, 0]} <= set(map(float, range(8)))
    for make in (functools.partial(iter, range(8)), lambda: iter(range(8)), lambda epoch: range(8 * epoch, 8 * epoch + 8)):
        batches = FunctionWorker(net, make, loss=loss, batch_size=4).train_batches(Shard(0, 1, 0))
        firsts = [int(next(batches)[0]) for _ in range(3)]
        assert firsts in ([0, 4, 0], [0, 4, 8])


def collate_rows(rows: list[dict[str, Any]], key: str) -> Tensor:
    return torch.tensor([row[key] for row in rows])


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ([], "validation_dataset is empty"),
        (lambda: iter([]), "validation_dataset is empty"),
        ({"x": torch.ones(3)}, "(?s)validation_dataset can't be read:.*KeyError"),
    ],
)
def test_validation_data_are_read_before_anything_starts(validation: Any, message: str) -> None:
    """One batch of them."""
    with pytest.raises(WorkerError, match=message):
        fit(net, pairs(), validation, criterion=F.mse_loss)


@pytest.mark.parametrize(
    ("worker", "batch", "message"),
    [
        (FunctionWorker(net, pairs()), torch.ones(2, 6), "Sequential returned a Tensor without a loss"),
        (FunctionWorker(net, pairs(), criterion=F.mse_loss), {"x": 1}, "criterion needs batches of two, .* gives a dict of 1"),
    ],
)
def test_a_loss_that_cannot_be_computed_says_what_to_give(worker: FunctionWorker, batch: Any, message: str) -> None:
    """It is an error of the user's code, with a way out."""
    with pytest.raises(TypeError, match=message):
        worker.loss(net(), batch)


def test_the_record_of_a_run_has_no_address() -> None:
    """The worker's own methods are no arguments, and objects have the same text in each process."""
    worker = FunctionWorker(net, pairs(), pairs(8, seed=1), criterion=F.mse_loss)
    recorded = to_plain(recorded_arguments(worker)[0])
    assert not {"loss", "evaluate"} & recorded.keys()
    assert recorded["batch_size"] == 32
    assert to_plain({"a": object(), "b": [object()]}) == {"a": "<object object>", "b": ["<object object>"]}


def test_data_are_described_so_that_a_resumed_run_warns_of_others() -> None:
    """Type and size, path or function, never an address."""
    given = [pairs(48), pairs(49), [1, 2, 3], "data/a.jsonl", Path("b.txt"), pairs, Stream(), functools.partial(pairs, 9)]
    described = [FunctionWorker(net, data, criterion=F.mse_loss).describe_data() for data in given]
    assert described == [
        *("TensorDataset of 48", "TensorDataset of 49", "list of 3", "data/a.jsonl", "b.txt", "pairs", "Stream", "partial"),
    ]
