"""Writes merged weights with `save_pretrained` of transformers, and finds the part of a model that this applies to."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lte_ray.engine.prepare import load_base, named_tensors
from lte_ray.errors import UserError
from lte_ray.export.run_reader import SavedRun, Written


def write_pretrained(saved: SavedRun, folder: Path, weights: Tensor, what: str) -> Written:
    """Writes weights (flat, in the base layout; in words: `what`) into an empty folder.

    Weights have the type in which the worker builds the model; tied weights stay tied.

    Raises:
        UserError: transformers isn't installed, the model isn't a model of transformers, or other parts are trained, too.
    """
    require_package("transformers")
    name, model = pretrained_part(saved.model)
    if model is None:
        raise UserError(
            f"--to pretrained needs a model of transformers, but the worker builds a {type(saved.model).__name__}, which "
            f"{'contains several' if name else 'is none and contains none'}. Use --to safetensors."
        )
    outside = names_outside(saved.model, name, [e.name for e in saved.plan.base.entries])
    if outside:
        raise UserError(
            f"--to pretrained would lose what the worker's model trains outside of its {type(model).__name__}: "
            f"{', '.join(outside[:5])}{', ...' if len(outside) > 5 else ''}. Use --to safetensors."
        )
    load_base(saved.model, saved.plan, weights)
    model.save_pretrained(folder)
    return Written(f"{type(model).__name__} with {what}")


def pretrained_part(model: nn.Module) -> tuple[str, Any]:
    """Returns the name and the module of the one model of transformers that `model` is ("") or contains.

    The module is None if there is none or several; then the name is not empty only if there are several.
    """
    try:
        kind: Any = importlib.import_module("transformers").PreTrainedModel
    except ImportError:
        return "", None
    parts: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, kind) and not any(outer == "" or name.startswith(f"{outer}.") for outer in parts):
            parts[name] = module
    return next(iter(parts.items())) if len(parts) == 1 else (next(iter(parts), ""), None)


def names_outside(model: nn.Module, part: str, names: Collection[str]) -> list[str]:
    """Returns those of the parameters and buffers `names` that aren't in the module `part`."""
    inner = model.get_submodule(part)
    inside = {id(tensor) for tensor in named_tensors(inner).values()}
    tensors = named_tensors(model)
    return [name for name in names if id(tensors[name]) not in inside]


def require_package(package: str) -> Any:
    """Imports a package; raises UserError if it isn't installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"This export needs {package}, which can't be imported ({error}): pip install 'lte-ray[hf]'."
        ) from error
