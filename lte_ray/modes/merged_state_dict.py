"""Reads a prepared model's merged weights under the names of the unconverted model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lte_ray.modes.base import ModeLayer
from lte_ray.modes.head_loop import HeadLoop
from lte_ray.modes.replica import MultiheadReplicaLayer


def merged_state_dict(model: nn.Module) -> dict[str, Any]:
    """The merged weights of a prepared model, as a state dict that the unconverted model's `load_state_dict` takes.

    In modes "ddp" and "dmp" these are the weights as of the last merge, which evaluation uses; they lack what heads have
    learned since. In mode "mhlora" they include (1/H) sum_h s B_h A_h. Tensors are copies.
    """
    state: dict[str, Any] = {}
    _collect(_unwrap(model), "", state)
    return state


def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch's wrappers: (Distributed)DataParallel and `torch.compile`."""
    while True:
        inner = model._modules.get("module" if isinstance(model, DistributedDataParallel | nn.DataParallel) else "_orig_mod")
        if inner is None:
            return model
        model = inner


def _collect(module: nn.Module, prefix: str, state: dict[str, Any]) -> None:
    """Adds the tensors of `module` and of the modules below it to `state`."""
    if isinstance(module, MultiheadReplicaLayer):
        return _collect(module.main, prefix, state)
    stored: dict[str, Any] = {}
    module._save_to_state_dict(stored, prefix, False)
    added: set[str] = set()
    if isinstance(module, ModeLayer):
        added = module.lte_added_names
        stored.update({f"{prefix}{name}": value for name, value in module.merged_tensors().items()})
    if isinstance(module, HeadLoop):
        added = added | {copy_name for parameter in module.lte_looped_parameters for copy_name in parameter.copies}
    below: dict[str, Any] = {name: value for name, value in stored.items() if name.removeprefix(prefix) not in added}
    for name, child in module._modules.items():
        if child is not None and name not in added:
            _collect(child, f"{prefix}{name}.", below)
    if "lte_was_torch_attention" in module.__dict__:
        below = {_torch_name(name, prefix): value for name, value in below.items()}
    state.update({k: v.clone() if isinstance(v, Tensor) else v for k, v in below.items()} if not prefix else below)
    return None


def _torch_name(name: str, prefix: str) -> str:
    """The name in `nn.MultiheadAttention`: in_proj.weight -> in_proj_weight. Its out_proj is a layer, so it keeps its name."""
    layer, _, part = name.removeprefix(prefix).partition(".")
    return f"{prefix}{layer}_{part}" if layer in ("in_proj", "q_proj", "k_proj", "v_proj") else name
