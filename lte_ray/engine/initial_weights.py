"""The model that a run starts from: as the worker builds it, with the weights that ``--init-from`` names."""

from __future__ import annotations

import copy
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor, nn

from lte_ray.config import TrainConfig
from lte_ray.errors import ConfigError, UserError
from lte_ray.merging.flat_buffer import copy_rounded
from lte_ray.storage import MODEL, RUN, RunDirectory, split_run_path
from lte_ray.worker import Worker, build_model

INDEX = MODEL + ".index.json"
"""What transformers writes for weights in several files."""

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
"""Endings of files that only unpickling reads."""

MAX_NAMES = 5
"""Names that a message lists, at most."""


def build_initial_model(worker: Worker, train: TrainConfig) -> nn.Module:
    """Builds the worker's model under the run's seed, and loads the weights that `train.init_from` names into it.

    Raises:
        WorkerError: as `build_model`.
        ConfigError: as `load_initial_weights`.
    """
    model = build_model(worker, train.seed)
    if train.init_from:
        load_initial_weights(model, train.init_from)
    return model


@torch.no_grad()
def load_initial_weights(model: nn.Module, source: str) -> str:
    """Loads weights by their names, in the types that the model has.

    Args:
        source: the directory of a finished run (path or URI), a .safetensors file, a folder in which transformers has saved
            a model, or one in which PEFT has saved an adapter, which is merged into the model.

    Returns:
        Which weights the model and the source don't share, in words; empty if they have the same.

    Raises:
        ConfigError: there are no such weights, they can't be read, or their names or shapes don't fit the model.
    """
    path = Path(source).expanduser()
    if (path / ADAPTER_CONFIG).is_file():
        _merge_adapter(model, path)
        return ""
    own, loaded, unknown = _own_tensors(model), set[int](), []
    for name, value in _read_weights(source, path):
        if name not in own:
            unknown.append(name)
            continue
        if own[name].shape != value.shape:
            raise ConfigError(
                f"--init-from {source}: {name} has shape {tuple(value.shape)}, but the model's has {tuple(own[name].shape)}. "
                "Build the model that these weights are of."
            )
        copy_rounded(own[name], value)
        loaded.add(id(own[name]))
    missing = [name for name, tensor in own.items() if id(tensor) not in loaded]
    if not loaded:
        raise ConfigError(
            f"--init-from {source} has no weight of this model. It has {_listed(unknown)}; the model has {_listed(missing)}."
        )
    kept = f"{_listed(missing)} {'stays' if len(missing) == 1 else 'stay'} as build_model() gives them" if missing else ""
    left = f"{_listed(unknown)} of the file {'is' if len(unknown) == 1 else 'are'} not in the model" if unknown else ""
    return f"--init-from {source}: {'; '.join(filter(None, [kept, left]))}." if kept or left else ""


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the model's state by name; tied weights have several."""
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    saved = model.state_dict()
    return {name: tensor for name, tensor in named.items() if name in saved}


def _read_weights(source: str, path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields the names and tensors of a source that isn't an adapter."""
    try:
        if "://" in source:
            yield from _of_run(source, RunDirectory.open(*split_run_path(source.rstrip("/"))))
        elif path.is_dir() and (path / RUN).is_file():
            yield from _of_run(source, RunDirectory.open(str(path.absolute().parent), path.absolute().name))
        elif path.is_dir() and (path / INDEX).is_file():
            for file in sorted({*_weight_map(path / INDEX)}):
                yield from _of_file(path / file)
        elif path.is_dir():
            yield from _of_file(path / MODEL)
        else:
            yield from _of_file(path)
    except UserError:  # it says all
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"--init-from {source} can't be read: {error}. It must be the directory of a finished run, a .safetensors file, or "
            "a folder with a model of transformers or an adapter of PEFT."
        ) from error


def _of_run(source: str, directory: RunDirectory) -> Iterator[tuple[str, Tensor]]:
    if not directory.exists(RUN):
        raise ConfigError(f"--init-from {source} has no {RUN}, so it isn't the directory of a run.")
    if not directory.exists(MODEL):
        raise ConfigError(
            f"--init-from {source} has no {MODEL}, since the run hasn't ended, or its heads never merge. Continue it with "
            "--resume, or export a checkpoint of it (lte-ray export RUN OUT --to safetensors) and start from that."
        )
    yield from load(directory.read(MODEL)).items()


def _of_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    if path.suffix in PICKLED:
        raise ValueError(f"{path.suffix} files are pickles, which can run code: save the weights as safetensors")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 - no dict
            yield name, file.get_tensor(name)


def _weight_map(index: Path) -> list[str]:
    files: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
    if any(Path(name).name != name for name in files.values()):
        raise ValueError(f"{index.name} names files outside of the folder")
    return list(files.values())


def _merge_adapter(model: nn.Module, folder: Path) -> None:
    """Merges PEFT's adapter into the module of the model that it was made for."""
    try:
        peft: Any = importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError(
            f"--init-from {folder} is an adapter of PEFT, which can't be imported ({error}): pip install 'lte-ray[hf]'."
        ) from error
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ConfigError(f"--init-from {folder} has no {ADAPTER_WEIGHTS}. Save the adapter as safetensors.")
    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        names = [name.removeprefix("base_model.model.") for name in file.keys()]  # noqa: SIM118 - no dict
    layers = {re.split(r"\.(?:lora_|base_layer\.)|\.[^.]*$", name)[0] for name in names}
    part = next((m for m in model.modules() if layers <= {name for name, _ in m.named_modules()}), None)
    if part is None:
        raise ConfigError(f"--init-from {folder} adapts {_listed(sorted(layers))}, which the model doesn't have.")
    try:
        merged = peft.PeftModel.from_pretrained(copy.deepcopy(part), str(folder)).merge_and_unload()
        part.load_state_dict(merged.state_dict())
    except Exception as error:
        raise ConfigError(
            f"--init-from {folder}: PEFT can't load the adapter into the model: {type(error).__name__}: {error}"
        ) from error


def _listed(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + f" and {len(names) - MAX_NAMES} more" * (len(names) > MAX_NAMES) or "nothing"
