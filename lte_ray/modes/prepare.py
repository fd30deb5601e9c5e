"""Turns a model into one of many LoRA heads in one process, in place.

The layers of a model made layers of a mode, in place.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules import batchnorm

from lte_ray.adapters.convert import plain_projections, replace
from lte_ray.adapters.layer_kinds import kind_of
from lte_ray.adapters.plan import make_plan
from lte_ray.config import LTEConfig, near
from lte_ray.errors import ConfigError
from lte_ray.layout import Adapted
from lte_ray.misc.attention import MultiheadAttention
from lte_ray.misc.convert import leave_fast_path
from lte_ray.modes.base import ModeLayer, class_of
from lte_ray.modes.batch_split import BATCH, Batch
from lte_ray.modes.ddp import DDPLayer
from lte_ray.modes.dmp import Copies, DMPLayer
from lte_ray.modes.head_loop import HeadLoop, adopt_loop
from lte_ray.modes.mhlora import MHLoRALayer
from lte_ray.modes.parameter_guard import note_calls
from lte_ray.modes.replica import HeadParameters, MultiheadReplicaLayer
from lte_ray.modes.replica_selection import CONTAINERS, NORMS, Choice, choose
from lte_ray.modes.stacked_factors import StackedFactors

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
    made: dict[int, StackedFactors | Copies] = {}
    biases: dict[int, StackedFactors | nn.Parameter] = {}
    for module in list(model.modules()):
        weight = module._parameters.get("weight")
        if weight is None or id(weight) not in specs or kind_of(module) is None:
            continue
        own, bias = specs[id(weight)], module._parameters.get("bias")
        if id(weight) not in made:
            build = Copies if mode == "dmp" else StackedFactors
            made[id(weight)] = build(own, weight, seed, config.reset)
        if bias is not None and id(bias) not in biases:
            if id(bias) in specs:
                biases[id(bias)] = StackedFactors(specs[id(bias)], bias, seed, config.reset)
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
            assert isinstance(factors, StackedFactors)
            module.lora = factors
        module.lte_names = {*module._parameters, *module._buffers, *module._modules} - before
        module.train(module.training)
    if not isinstance(model, ModeLayer):
        note_calls(model)


CHUNKS = ("layer", "model")


def prepare_model_for_lte(
    model: nn.Module,
    lora_config: LTEConfig,
    copy_weights: bool = True,
    strict: bool = True,
    replica_layers: Sequence[Any] = (),
    mode: str = "ddp",
    use_special_attention_scaling: bool = True,
    *,
    seed: int | None = None,
    chunk: str = "layer",
) -> nn.Module:
    """Gives a model `lora_config.num_heads` LoRA heads in this process; its outputs stay the same at first.

    Layers stay the objects that they were; their class changes to one that is an `LTELayer` too. `nn.MultiheadAttention` is
    replaced by one whose projections are layers, and modules that train as copies by `MultiheadReplicaLayer`.

    What doesn't train is left alone. A model in which nothing trains is adapted as if all did that can have LoRA.

    Args:
        model: any module, which is changed.
        lora_config: the heads.
        copy_weights: keep the model's weights; else those of adapted layers are drawn anew.
        strict: raise if a parameter trains of which nothing was said; else warn, and it trains as a replica.
        replica_layers: modules, parameters, or names of these with wildcards, that train as one copy for each head.
        mode: "ddp" (one main weight), "dmp" (a copy of the main weight for each head) or "mhlora" (all heads see all data).
        use_special_attention_scaling: layers whose name contains in_proj, q_proj or k_proj get the root of alpha as alpha.
        seed: A of each head is drawn from (seed, head, name), as Ray heads do. None: drawn from torch's generator.
        chunk: "layer": each layer shares its batch out. "model": the model's input is shared out and the model runs once for
            each head, for models that aren't batch-first inside.

    Returns:
        The model; another object only if it is itself an `nn.MultiheadAttention`.

    Raises:
        ConfigError: a setting is unknown, contradicts another or is for Ray heads only; or `strict`, with all names.
        WorkerError: nothing of the model can be adapted.
    """
    for name, value, known in (("mode", mode, tuple(MODES)), ("chunk", chunk, CHUNKS)):
        if value not in known:
            raise ConfigError(f"{name} is {value!r}, but it must be one of: {', '.join(known)}.{near(str(value), known)}")
    if any(isinstance(m, ModeLayer) for m in model.modules()):
        raise ConfigError("The model is prepared for LTE already; give an unconverted one.")
    config = lora_config
    with _thawed(model, config) as frozen:
        choice = choose(model, config, replica_layers, strict=strict, mode=mode, rooted=use_special_attention_scaling)
    if frozen:
        choice = dataclasses.replace(choice, replicas=())  # what replica_layers names stays frozen
    parameters = dict(model.named_parameters())
    specs = {id(parameters[name]): own for name, own in choice.specs.items()}
    if not copy_weights:
        draw_anew(model, set(specs))
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in choice.replicas)
    model, attention = plain_projections(model, set(specs))
    for module in attention:
        module.__dict__["_lte_from_torch"] = True
    adopt_all(model, config, mode, specs, seed)
    leave_fast_path(model, nn.Module)
    if mode == "mhlora":
        return model
    copies = HeadParameters(config.num_heads)
    _wrap(model, choice, mode, copies)
    _loop(model, copies, chunk)
    if chunk == "layer":
        model.register_forward_pre_hook(_note_batch, with_kwargs=True)
        model.register_forward_hook(_forget_batch, always_call=True)
        _warn_of_sequence_first(model)
    return model


@contextmanager
def _thawed(model: nn.Module, config: LTEConfig) -> Iterator[bool]:
    """Of a model in which nothing trains (freeze all, then add LoRA), what can have factors counts as trained within.

    Yields whether it is such a model. Afterwards all of it is frozen again.
    """
    frozen = [] if any(p.requires_grad for p in model.parameters()) else list(model.named_parameters())
    sparse = {id(p) for m in model.modules() if getattr(m, "sparse", False) is True for p in m.parameters(recurse=False)}
    able = [
        (name, p)
        for name, p in frozen
        if not nn.parameter.is_lazy(p)
        and p.is_floating_point()
        and p.layout is torch.strided
        and (id(p) not in sparse or "embedding" in config.adapt)
    ]
    try:
        for _, parameter in able:
            parameter.requires_grad_(True)
        adapted = {spec.name for spec in make_plan(model, dataclasses.replace(config, strict=False)).adapted} if able else set()
        for name, parameter in able:
            parameter.requires_grad_(name in adapted)
        yield bool(able)
    finally:
        for _, parameter in frozen:
            parameter.requires_grad_(False)


def _wrap(model: nn.Module, choice: Choice, mode: str, copies: HeadParameters) -> None:
    """Puts `MultiheadReplicaLayer` in the place of the modules that were named, and of norms that train or count."""
    named = {id(m): m for m in choice.modules}
    inside = {id(m) for outer in choice.modules for m in outer.modules()}
    for module in model.modules():
        counts = isinstance(module, batchnorm._NormBase) and (
            module.track_running_stats or not isinstance(module, nn.modules.instancenorm._InstanceNorm)
        )
        trains = isinstance(module, (*NORMS, nn.RNNBase)) and any(p.requires_grad for p in module.parameters())
        if (counts or trains) and id(module) not in inside and not isinstance(module, ModeLayer):
            named[id(module)] = module
    for name, module in model.named_modules():
        if id(module) in named:
            module.__dict__["lte_name"] = name  # for errors
    replace(model, {key: MultiheadReplicaLayer(m, copies.num_heads, mode, copies) for key, m in named.items()})


def _loop(model: nn.Module, copies: HeadParameters, chunk: str) -> None:
    """Has modules loop over heads that own parameters which train as copies; the root too, if `chunk` is "model"."""
    slots: dict[str, list[tuple[str, str]]] = {"": []} if chunk == "model" else {}
    skipped: set[int] = set()
    known = copies.all()
    for name, module in model.named_modules():
        if isinstance(module, MultiheadReplicaLayer):
            skipped |= {id(m) for m in module.modules()}
        if isinstance(module, ModeLayer):
            skipped |= {id(m) for own in module.lte_names & {*module._modules} for m in module.get_submodule(own).modules()}
        if id(module) in skipped or isinstance(module, ModeLayer):
            continue
        for part, parameter in module._parameters.items():
            if parameter is not None and (parameter.requires_grad or id(parameter) in known):
                owner = _caller(model, name)
                slots.setdefault(owner, []).append((name.removeprefix(owner).lstrip("."), part))
    for owner, held in slots.items():
        module = model.get_submodule(owner)
        module.__dict__["lte_name"] = owner
        adopt_loop(module, held, copies)


def _caller(model: nn.Module, name: str) -> str:
    """The name of the nearest module at or above `name` whose forward is called when its parameters are used."""
    while name:
        module, above = model.get_submodule(name), name.rpartition(".")[0]
        if not isinstance(module, CONTAINERS) and type(model.get_submodule(above)) is not nn.MultiheadAttention:
            return name
        name = above
    return name


def _warn_of_sequence_first(model: nn.Module) -> None:
    """Warns if layers take (sequence, batch, width) outside of a loop over heads: their batch isn't what is cut."""
    looped = {id(m) for loop in model.modules() if isinstance(loop, HeadLoop | MultiheadReplicaLayer) for m in loop.modules()}
    for name, module in model.named_modules():
        kinds = (nn.MultiheadAttention, MultiheadAttention, nn.RNNBase)
        if isinstance(module, kinds) and not module.batch_first and (id(module) not in looped):
            warnings.warn(
                f"{name} has batch_first=False: layers share their input out over heads along its first dimension, which is "
                "the sequence there. Use batch_first=True, or chunk='model', which shares the model's input out.",
                stacklevel=3,
            )
            return


def _note_batch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()]
    known = tensors and module.training and not isinstance(module, HeadLoop)
    BATCH.set(Batch(tensors[0].shape[0], any(t.dim() == 1 for t in tensors)) if known else None)


def _forget_batch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    BATCH.set(None)
