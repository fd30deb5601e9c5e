"""The parameters of a model in one of the modes, grouped for the optimizers of `lte_ray.optim`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lte_ray.modes.dmp import DMPLayer, HeadFactor
from lte_ray.modes.stacked_factors import StackedFactors


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Returns the groups "lora" and "replica" of a prepared model's trained parameters.

    "lora" has A and B of each layer in turn: stacked (H x r x in, H x out x r), or in dmp of one head after the other. Each
    pair's "scalings" entry is s, or a list of each head's s if they differ. In mhlora it is s, too, though the layer adds the
    mean over the heads: a step of `lte_ray.optim.LoRAMuon` then has the size that it has after a merge.
    """
    pairs: dict[Tensor, tuple[Tensor, float | list[float]]] = {}
    for module in model.modules():
        if isinstance(module, StackedFactors):
            scaling = module.scaling
            pairs[module.lora_A_weight] = (module.lora_B_weight, scaling if isinstance(scaling, float) else list(scaling))
        elif isinstance(module, DMPLayer):
            for spec, a, b in zip(module.specs, module.lora_A, module.lora_B, strict=True):
                assert isinstance(a, HeadFactor) and isinstance(b, HeadFactor)
                pairs[a.weight] = (b.weight, spec.scaling)
    factors = [p for a, (b, _) in pairs.items() for p in (a, b)]
    known = set(factors)
    replicas = [p for p in model.parameters() if p.requires_grad and p not in known]
    groups: list[dict[str, Any]] = [
        {"params": factors, "name": "lora", "scalings": [scaling for _, scaling in pairs.values()]},
        {"params": replicas, "name": "replica"},
    ]
    return [group for group in groups if group["params"]]
