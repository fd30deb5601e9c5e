"""Training from functions and data sets, without a class: `lte_ray.fit`.

result = lte_ray.fit(make_model, train_dataset, validation_dataset, criterion=F.cross_entropy, num_heads=4, epochs=3)
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, default_collate

from lte_ray.config import SECTIONS, suggest
from lte_ray.data import loader, read_records
from lte_ray.data.shard import Shard
from lte_ray.errors import ConfigError, UserError, WorkerError
from lte_ray.trainer import LTETrainer
from lte_ray.worker import count_samples, to_device

if TYPE_CHECKING:
    import ray.train

SECTION_NAMES = dict(zip(SECTIONS, ("lte", "merge", "train", "scaling_config", "failure", "run_config"), strict=True))
"""The argument of `LTETrainer` that takes each settings class."""


class FunctionWorker:
    """A worker made of functions and data sets.

    Args:
        model: a function that builds the model, or a model; then every process gets a copy of it.
        train_dataset: what `lte_ray.data.loader` takes: a `torch.utils.data.Dataset`, a `datasets.Dataset` of Hugging Face, a
            list, an iterable, files. Or a function without arguments that makes it, called once in each process: use that for
            data that are too large to send, and for generators. f(epoch) makes the stream of a pass.
        validation_dataset: likewise; without it and `evaluate`, nothing is evaluated. A stream must end.
        loss: f(model, batch), the mean loss of a batch.
        criterion: f(output, target), the mean loss for a data set of pairs: criterion(model(input), target). Without `loss`
            and `criterion` the model is called with the batch (``model(**batch)`` for a mapping, ``model(*batch)`` for a tuple
            or list) and must return its loss, as an attribute ``loss`` or under that name, as models of transformers do.
        evaluate: f(model), figures by name; by default "validation_loss", the mean over `validation_dataset`.
        batch_size: samples in one head's batch. None if the data sets give batches.
        collate: makes a batch of a list of samples; by default torch's `default_collate`.
        num_workers: processes that read the training data of each head.

    Raises:
        WorkerError: an argument has the wrong type, or `loss` and `criterion` are both given.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module] | nn.Module,
        train_dataset: Any,
        validation_dataset: Any = None,
        *,
        loss: Callable[[nn.Module, Any], Any] | None = None,
        criterion: Callable[[Any, Any], Tensor] | None = None,
        evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
        batch_size: int | None = 32,
        collate: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
    ) -> None:
        for name, function in {"model": model, "loss": loss, "criterion": criterion, "evaluate": evaluate}.items():
            if function is not None and not callable(function):
                raise WorkerError(f"{name} is {function!r:.80}, but it must be a function.")
        if loss is not None and criterion is not None:
            raise WorkerError("loss and criterion are both given. loss gets the model and the batch, criterion the output and "
                              "the target: leave one of them out.")  # fmt: skip
        if inspect.isclass(criterion):
            raise WorkerError(f"criterion is the class {criterion.__name__}. Give an instance: {criterion.__name__}().")
        for name, dataset in {"train_dataset": train_dataset, "validation_dataset": validation_dataset}.items():
            if isinstance(dataset, Iterator):
                kind = type(dataset).__name__
                raise WorkerError(f"{name} is a {kind}, which can be read only once. Give a function that makes it.")
        self.batch_size, self.num_workers = batch_size, num_workers
        self._model, self._loss, self._criterion, self._evaluate, self._collate = model, loss, criterion, evaluate, collate
        self._datasets = {"train": train_dataset, "validation": validation_dataset}
        self._made: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}

    def build_model(self) -> nn.Module:
        return copy.deepcopy(self._model) if isinstance(self._model, nn.Module) else self._model()

    def train_batches(self, shard: Shard) -> Iterator[Any]:
        return loader(self._dataset("train"), shard, self.batch_size, collate=self._collate, num_workers=self.num_workers)

    def describe_data(self) -> str:
        """The training data's type and size, path, or function: the same in each process."""
        given = self._datasets["train"]
        if isinstance(given, str | Path):
            return str(given)
        if _makes_data(given):
            return str(getattr(given, "__qualname__", type(given).__qualname__))
        try:
            return f"{type(given).__name__} of {len(given)}"
        except (TypeError, NotImplementedError):
            return type(given).__name__

    def loss(self, model: nn.Module, batch: Any) -> Any:
        if self._loss is not None:
            return self._loss(model, batch)
        if self._criterion is None:
            return own_loss(model, batch)
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(
                f"criterion needs batches of two, input and target, but the data set gives a {type(batch).__name__}"
                + (f" of {len(batch)}" if hasattr(batch, "__len__") else "")
                + ". Give loss=f(model, batch) instead"
            )
        return self._criterion(model(batch[0]), batch[1])

    @property
    def evaluate(self) -> Callable[[nn.Module], Mapping[str, float]]:
        """The function that evaluates. Raises AttributeError if there is nothing to evaluate with."""
        if self._evaluate is None and self._datasets["validation"] is None:
            raise AttributeError("there is neither evaluate nor validation_dataset")
        return self._evaluate or self._validation_loss

    def _validation_loss(self, model: nn.Module) -> dict[str, float]:
        """The mean loss of a sample, and the means of the figures that `loss` returns with it."""
        device, total, sums = next(model.parameters()).device, 0, dict[str, float]()
        for batch in self._validation_batches():
            moved = to_device(batch, device)
            loss, size = self.loss(model, moved), count_samples(moved)
            loss, figures = loss if isinstance(loss, tuple) else (loss, {})
            for name, value in {"validation_loss": loss, **{f"validation_{n}": v for n, v in figures.items()}}.items():
                sums[name] = sums.get(name, 0.0) + float(value) * size
            total += size
        if not total:
            raise ValueError("validation_dataset is empty")
        return {name: value / total for name, value in sums.items()}

    def check_validation(self) -> None:
        """Reads a batch of the validation data, if the worker evaluates with them.

        Raises:
            WorkerError: there is none, or reading it raises.
        """
        if self._evaluate is not None or self._datasets["validation"] is None:
            return
        try:
            batch = next(iter(self._validation_batches()), None)
        except UserError:
            raise
        except Exception as error:
            raise WorkerError(f"validation_dataset can't be read:\n\n{traceback.format_exc()}") from error
        if batch is None:
            raise WorkerError("validation_dataset is empty.")

    def _validation_batches(self) -> Iterable[Any]:
        dataset = self._dataset("validation")
        if hasattr(dataset, "iter_rows"):  # of ray.data
            dataset = dataset.iter_rows()
        if self.batch_size is None or isinstance(dataset, DataLoader):
            return dataset  # type: ignore[no-any-return]
        if not hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset):
            dataset = _Stream(dataset)
        return DataLoader(dataset, self.batch_size, collate_fn=self._collate or default_collate)

    def _dataset(self, split: str) -> Any:
        given = self._datasets[split]
        if isinstance(given, str | Path):  # read once in each process
            if split not in self._made:
                self._made[split] = [record for _, record in read_records(str(given))]
            return self._made[split]
        if not _makes_data(given):
            return given
        if _takes_epoch(given):
            return given if split == "train" else given(0)
        made = self._made.get(split)
        if made is None:
            made = given()
            if isinstance(made, Iterator):  # it can be read only once
                return (lambda epoch: given()) if split == "train" else made
            self._made[split] = made
        return made


def _makes_data(given: Any) -> bool:
    """Whether this is a function that makes the data, and no data set."""
    return callable(given) and not hasattr(given, "__getitem__") and not hasattr(given, "__iter__")


def _takes_epoch(make: Callable[..., Any]) -> bool:
    """Whether a function that makes data must be given the number of the pass."""
    try:
        parameters = inspect.signature(make).parameters.values()
    except ValueError:  # a builtin function
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)


class _Stream(IterableDataset[Any]):
    """Any iterable as torch's loader takes it."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """Calls the model with a batch, and returns the loss that it returns.

    Raises:
        TypeError: it returns none.
    """
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(output, tuple) and not hasattr(output, "loss") and isinstance(output[0], Tensor) and not output[0].ndim:
        loss = output[0]  # as models of transformers without return_dict
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{type(model).__name__} returned a {type(output).__name__} without a loss. Models of transformers return one if "
            "the batch has labels. Otherwise give loss=f(model, batch), or criterion=f(output, target)"
        )
    return loss


def fit(
    model: Callable[[], nn.Module] | nn.Module,
    train_dataset: Any,
    validation_dataset: Any = None,
    *,
    loss: Callable[[nn.Module, Any], Any] | None = None,
    criterion: Callable[[Any, Any], Tensor] | None = None,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    batch_size: int | None = 32,
    collate: Callable[[list[Any]], Any] | None = None,
    num_workers: int = 0,
    **settings: Any,
) -> ray.train.Result:
    """Trains a model with LoRA heads on Ray, from functions and data sets.

    Args:
        model, train_dataset, validation_dataset, loss, criterion, evaluate, batch_size, collate, num_workers: as
            `FunctionWorker`.
        settings: any setting of a run by its name (``num_heads=4``, ``steps=200``, ``lr=0.01``, ``name="first"``), as the
            flags of ``lte-ray train`` have it; or an argument of `LTETrainer` (``run_config=...``) instead of its settings.

    Returns:
        As `LTETrainer.fit`.

    Raises:
        UserError, RunError: as `LTETrainer.fit`.
    """
    worker = FunctionWorker(
        model, train_dataset, validation_dataset, loss=loss, criterion=criterion, evaluate=evaluate, batch_size=batch_size,
        collate=collate, num_workers=num_workers,
    )  # fmt: skip
    trainer = LTETrainer(worker, **sort_settings(settings))
    worker.check_validation()
    return trainer.fit()


def sort_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `LTETrainer` for settings by name.

    Raises:
        ConfigError: there is no such setting, or a settings class is given together with one of its settings.
    """
    homes = {field.name: kind for kind in SECTIONS for field in dataclasses.fields(kind)}
    arguments = {name: value for name, value in settings.items() if name in _trainer_arguments()}
    sections: dict[type, dict[str, Any]] = {}
    for name, value in settings.items():
        if name in arguments:
            continue
        if name not in homes:
            raise ConfigError(f"There is no setting {name!r}.{suggest(name, [*homes, *_trainer_arguments()])}")
        sections.setdefault(homes[name], {})[name] = value
    for kind, values in sections.items():
        argument = SECTION_NAMES[kind]
        if argument in arguments:
            raise ConfigError(f"{argument} and {', '.join(values)} are both given. Put {next(iter(values))} into {argument}.")
        arguments[argument] = kind(**values)
    return arguments


def _trainer_arguments() -> set[str]:
    return {field.name for field in dataclasses.fields(LTETrainer) if field.init} - {"worker", "program"}
