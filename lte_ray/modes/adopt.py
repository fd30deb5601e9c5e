"""The layers of a model made layers of a mode, in place."""

from __future__ import annotations

import math

from torch import nn

from lte_ray.adapters.kinds import kind_of
from lte_ray.config import LTEConfig
from lte_ray.layout import Adapted
from lte_ray.modes.base import ModeLayer, class_of
from lte_ray.modes.ddp import DDPLayer
from lte_ray.modes.dmp import Copies, DMPLayer
from lte_ray.modes.guard import note_calls
from lte_ray.modes.mhlora import MHLoRALayer
from lte_ray.modes.stack import Stack

MODES: dict[str, type[ModeLayer]] = {"ddp": DDPLayer, "dmp": DMPLayer, "mhlora": MHLoRALayer}


def draw_anew(model: nn.Module, adapted: set[int]) -> None:
    """Draws adapted layers' weights and biases as their constructors do."""
    for module in model.modules():
        if not any(id(p) in adapted for p in module.parameters(recurse=False)):
            continue
        reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
        if callable(reset):
            reset()
        else:  # transformers' Conv1D
            nn.init.normal_(module.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def adopt_all(model: nn.Module, config: LTEConfig, mode: str, specs: dict[int, tuple[Adapted, ...]], seed: int) -> None:
    """Makes all layers with an adapted weight layers of the mode; what they share is made once. The model notes its calls."""
    made: dict[int, Stack | Copies] = {}
    biases: dict[int, Stack | nn.Parameter] = {}
    for module in list(model.modules()):
        weight = module._parameters.get("weight")
        if weight is None or id(weight) not in specs or kind_of(module) is None:
            continue
        own, bias = specs[id(weight)], module._parameters.get("bias")
        if id(weight) not in made:
            build = Copies if mode == "dmp" else Stack
            made[id(weight)] = build(own, weight, seed, config.reset)
        if bias is not None and id(bias) not in biases:
            if id(bias) in specs:
                biases[id(bias)] = Stack(specs[id(bias)], bias, seed, config.reset)
                bias.requires_grad_(False)
            elif bias.requires_grad and mode != "mhlora":
                biases[id(bias)] = nn.Parameter(bias.detach().expand(len(own), -1).clone())
                bias.requires_grad_(False)
        before = {*module._parameters, *module._buffers, *module._modules}
        module.__class__ = class_of(MODES[mode], type(module))
        assert isinstance(module, ModeLayer)
        alpha = own[0].scaling * (math.sqrt(own[0].rank) if config.rslora else own[0].rank)
        module.take(own, alpha, biases.get(id(bias)), statistics=mode != "mhlora")
        factors = made[id(weight)]
        if isinstance(module, DMPLayer):
            assert isinstance(factors, Copies)
            module.take_copies(factors)
        else:
            assert isinstance(factors, Stack)
            module.lora = factors
        module.lte_names = {*module._parameters, *module._buffers, *module._modules} - before
        module.train(module.training)
    if not isinstance(model, ModeLayer):
        note_calls(model)
