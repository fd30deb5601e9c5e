"""`prepare_model_for_lte`: converts a model, in place, to one with many LoRA heads in one process."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules import batchnorm

from lte_ray.adapters.convert import replace_modules, split_attention_projections
from lte_ray.adapters.layer_kinds import kind_of
from lte_ray.adapters.plan import make_plan
from lte_ray.config import LTEConfig, suggest
from lte_ray.errors import ConfigError
from lte_ray.layout import Adapted
from lte_ray.misc.attention import MultiheadAttention
from lte_ray.misc.convert import leave_fast_path
from lte_ray.modes.base import ModeLayer, mode_class
from lte_ray.modes.batch_split import MAYBE_SEQUENCE, MODEL_BATCH, ModelBatch, check_not_one_sequence
from lte_ray.modes.ddp import DDPLayer
from lte_ray.modes.dmp import DMPLayer, HeadCopies
from lte_ray.modes.head_loop import HeadLoop, convert_to_head_loop
from lte_ray.modes.mhlora import MHLoRALayer
from lte_ray.modes.parameter_guard import track_calls
from lte_ray.modes.replica import MultiheadReplicaLayer, ReplicaParameters
from lte_ray.modes.replica_selection import CONTAINERS, NORMS, Selection, select_parameters
from lte_ray.modes.stacked_factors import StackedFactors

MODES: dict[str, type[ModeLayer]] = {"ddp": DDPLayer, "dmp": DMPLayer, "mhlora": MHLoRALayer}
CHUNKS = ("layer", "model")
SEQUENCE_LAYERS = (nn.MultiheadAttention, MultiheadAttention, nn.RNNBase)


def prepare_model_for_lte(
    model: nn.Module,
    lora_config: LTEConfig,
    copy_weights: bool = True,
    strict: bool = True,
    replica_layers: Sequence[Any] = (),
    mode: str = "ddp",
    use_special_attention_scaling: bool = False,
    *,
    seed: int | None = None,
    chunk: str = "layer",
) -> nn.Module:
    """Gives a model `lora_config.num_heads` LoRA heads in this process; its outputs don't change at first.

    Layers stay the same objects; their class changes to one that is an `LTELayer` too. `nn.MultiheadAttention` is replaced by
    an attention whose projections are layers, and modules that train as replicas by `MultiheadReplicaLayer`.

    Parameters that don't train stay as they are. If nothing trains, the model is adapted as if everything that LoRA supports
    trained.

    Args:
        model: any module; it is changed in place.
        lora_config: settings of the heads.
        copy_weights: keep the model's weights; if False, those of adapted layers are initialized again.
        strict: raise if a parameter trains that nothing mentions; if False, warn and train it as a replica.
        replica_layers: modules, parameters, or names of these with wildcards, that train as one copy for each head.
        mode: "ddp" (one main weight), "dmp" (a copy of the main weight for each head), or "mhlora" (all heads see all data).
        use_special_attention_scaling: layers whose name contains in_proj, q_proj, or k_proj get sqrt(alpha) as alpha, as
            in the first commit of the authors' library.
        seed: draw A of each head from (seed, head, name), as Ray heads do. None: draw the seed from torch's generator.
        chunk: "layer": each layer splits its input over heads. "model": the model's input is split and the model runs once
            for each head, for models that aren't batch-first inside.

    Returns:
        The model; another object only if the model itself is an `nn.MultiheadAttention`.

    Raises:
        ConfigError: a setting is unknown, contradicts another, or is for Ray heads only; or, with `strict`, parameters train
            that nothing mentions (the message lists them).
        WorkerError: nothing in the model can be adapted.
    """
    for name, value, known in (("mode", mode, tuple(MODES)), ("chunk", chunk, CHUNKS)):
        if value not in known:
            raise ConfigError(f"{name} is {value!r}, but it must be one of: {', '.join(known)}.{suggest(str(value), known)}")
    if any(isinstance(m, ModeLayer) for m in model.modules()):
        raise ConfigError("The model is prepared for LTE already; pass an unconverted one.")
    if lora_config.full_rank:
        raise ConfigError("full_rank is for runs of LTETrainer; in one process, train the model without preparing it.")
    config = lora_config
    with _adaptable_parameters_train(model, config) as frozen:
        selection = select_parameters(
            model, config, replica_layers, strict=strict, mode=mode, special_attention_scaling=use_special_attention_scaling
        )
    if frozen:
        selection = dataclasses.replace(selection, replicas=())  # layers in replica_layers stay frozen
    parameters = dict(model.named_parameters())
    specs = {id(parameters[name]): head_specs for name, head_specs in selection.specs.items()}
    if not copy_weights:
        _initialize_again(model, set(specs))
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in selection.replicas)
    model, attentions = split_attention_projections(model, set(specs))
    for module in attentions:
        module.__dict__["lte_was_torch_attention"] = True
    _convert_layers(model, config, mode, specs, seed)
    leave_fast_path(model, nn.Module)
    if mode == "mhlora":
        return model
    replicas = ReplicaParameters(config.num_heads)
    _insert_replica_layers(model, selection, mode, replicas)
    _insert_head_loops(model, replicas, chunk)
    _watch_inputs(model, chunk)
    if chunk == "layer":
        _warn_if_sequence_first(model)
    return model


@contextmanager
def _adaptable_parameters_train(model: nn.Module, config: LTEConfig) -> Iterator[bool]:
    """If nothing in the model trains ("freeze all, then add LoRA"), what can have factors trains within the block.

    Yields whether that is so. Afterwards such a model is all frozen again.
    """
    frozen = [] if any(p.requires_grad for p in model.parameters()) else list(model.named_parameters())
    sparse = {id(p) for m in model.modules() if getattr(m, "sparse", False) is True for p in m.parameters(recurse=False)}
    candidates = [
        (name, p)
        for name, p in frozen
        if not nn.parameter.is_lazy(p)
        and p.is_floating_point()
        and p.layout is torch.strided
        and (id(p) not in sparse or "embedding" in config.adapt)
    ]
    try:
        for _, parameter in candidates:
            parameter.requires_grad_(True)
        plan = make_plan(model, dataclasses.replace(config, strict=False)) if candidates else None
        adapted = {spec.name for spec in plan.adapted} if plan is not None else set()
        for name, parameter in candidates:
            parameter.requires_grad_(name in adapted)
        yield bool(candidates)
    finally:
        for _, parameter in frozen:
            parameter.requires_grad_(False)


def _initialize_again(model: nn.Module, adapted: set[int]) -> None:
    """Initializes weights and biases of adapted layers (ids of their weights) as the layers' constructors do."""
    for module in model.modules():
        if not any(id(p) in adapted for p in module.parameters(recurse=False)):
            continue
        reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
        if callable(reset):
            reset()
        else:  # transformers' Conv1D
            nn.init.normal_(module.weight, std=0.02)  # type: ignore[arg-type]
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def _convert_layers(model: nn.Module, config: LTEConfig, mode: str, specs: dict[int, tuple[Adapted, ...]], seed: int) -> None:
    """Converts all layers with an adapted weight to layers of the mode, and has the model track its calls.

    Layers that share a weight or bias share its factors or copies. `specs` is by the weight's id.
    """
    factors_by_weight: dict[int, StackedFactors | HeadCopies] = {}
    biases: dict[int, StackedFactors | nn.Parameter] = {}
    for module in list(model.modules()):
        weight = module._parameters.get("weight")
        if weight is None or id(weight) not in specs or kind_of(module) is None:
            continue
        head_specs, bias = specs[id(weight)], module._parameters.get("bias")
        if id(weight) not in factors_by_weight:
            factors_class = HeadCopies if mode == "dmp" else StackedFactors
            factors_by_weight[id(weight)] = factors_class(head_specs, weight, seed, config.reset)
        if bias is not None and id(bias) not in biases:
            if id(bias) in specs:
                biases[id(bias)] = StackedFactors(specs[id(bias)], bias, seed, config.reset)
                bias.requires_grad_(False)
            elif bias.requires_grad and mode != "mhlora":
                biases[id(bias)] = nn.Parameter(bias.detach().expand(len(head_specs), -1).clone())
                bias.requires_grad_(False)
        names_before = {*module._parameters, *module._buffers, *module._modules}
        module.__class__ = mode_class(MODES[mode], type(module))
        assert isinstance(module, ModeLayer)
        alpha = head_specs[0].scaling * (math.sqrt(head_specs[0].rank) if config.rslora else head_specs[0].rank)
        module.configure(head_specs, alpha, biases.get(id(bias)), statistics=mode != "mhlora")
        factors = factors_by_weight[id(weight)]
        if isinstance(module, DMPLayer):
            assert isinstance(factors, HeadCopies)
            module.set_copies(factors)
        else:
            assert isinstance(factors, StackedFactors)
            module.lora = factors
        module.lte_added_names = {*module._parameters, *module._buffers, *module._modules} - names_before
        module.train(module.training)
    if not isinstance(model, ModeLayer):
        track_calls(model)


def _insert_replica_layers(model: nn.Module, selection: Selection, mode: str, replicas: ReplicaParameters) -> None:
    """Replaces selected modules, and norms that train or keep statistics, by `MultiheadReplicaLayer`."""
    replaced = {id(m): m for m in selection.modules}
    inside = {id(m) for outer in selection.modules for m in outer.modules()}
    for module in model.modules():
        keeps_statistics = isinstance(module, batchnorm._NormBase) and (
            module.track_running_stats or not isinstance(module, nn.modules.instancenorm._InstanceNorm)
        )
        trains = isinstance(module, (*NORMS, nn.RNNBase)) and any(p.requires_grad for p in module.parameters())
        if (keeps_statistics or trains) and id(module) not in inside and not isinstance(module, ModeLayer):
            replaced[id(module)] = module
    for name, module in model.named_modules():
        if id(module) in replaced:
            module.__dict__["lte_name"] = name  # for errors
    replace_modules(model, {key: MultiheadReplicaLayer(m, replicas.num_heads, mode, replicas) for key, m in replaced.items()})


def _insert_head_loops(model: nn.Module, replicas: ReplicaParameters, chunk: str) -> None:
    """Converts modules that hold parameters which train as replicas to head loops; with chunk "model" the root too."""
    parameters_by_caller: dict[str, list[tuple[str, str]]] = {"": []} if chunk == "model" else {}
    skipped: set[int] = set()
    copied = replicas.ids()
    for name, module in model.named_modules():
        if isinstance(module, MultiheadReplicaLayer):
            skipped |= {id(m) for m in module.modules()}
        if isinstance(module, ModeLayer):
            added = module.lte_added_names & {*module._modules}
            skipped |= {id(m) for child in added for m in module.get_submodule(child).modules()}
        if id(module) in skipped or isinstance(module, ModeLayer):
            continue
        for part, parameter in module._parameters.items():
            if parameter is not None and (parameter.requires_grad or id(parameter) in copied):
                caller = _nearest_called(model, name)
                parameters_by_caller.setdefault(caller, []).append((name.removeprefix(caller).lstrip("."), part))
    for caller, parameters in parameters_by_caller.items():
        module = model.get_submodule(caller)
        module.__dict__["lte_name"] = caller  # for errors
        convert_to_head_loop(module, parameters, replicas)


def _nearest_called(model: nn.Module, name: str) -> str:
    """The name of the nearest module, at or above `name`, whose forward is called when the module's parameters are used."""
    while name:
        module, parent = model.get_submodule(name), name.rpartition(".")[0]
        if not isinstance(module, CONTAINERS) and type(model.get_submodule(parent)) is not nn.MultiheadAttention:
            return name
        name = parent
    return name


def _warn_if_sequence_first(model: nn.Module) -> None:
    """Warns if a layer outside of any head loop takes (sequence, batch, width): its batch isn't what is cut."""
    looped = {id(m) for loop in model.modules() if isinstance(loop, HeadLoop | MultiheadReplicaLayer) for m in loop.modules()}
    for name, module in model.named_modules():
        if isinstance(module, SEQUENCE_LAYERS) and not module.batch_first and (id(module) not in looped):
            warnings.warn(
                f"{name} has batch_first=False: layers split their input over heads along its first dimension, which is the "
                "sequence in this layer. Use batch_first=True, or chunk='model', which splits the model's input.",
                stacklevel=3,
            )
            return


def _watch_inputs(model: nn.Module, chunk: str) -> None:
    """Registers the hooks that record what the model is called with, so that layers can check what they are given."""
    record, forget = (_record_batch, _forget_batch) if chunk == "layer" else (_record_maybe_sequence, _forget_maybe_sequence)
    model.register_forward_pre_hook(record, with_kwargs=True)
    model.register_forward_hook(forget, always_call=True)
    for name, module in model.named_modules() if chunk == "model" else ():
        if isinstance(module, SEQUENCE_LAYERS):
            module.register_forward_pre_hook(partial(check_not_one_sequence, name), with_kwargs=True)


def _record_batch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook that sets `MODEL_BATCH` in training."""
    tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()]
    known = tensors and module.training and not isinstance(module, HeadLoop)
    MODEL_BATCH.set(ModelBatch(tensors[0].shape[0], any(t.dim() == 1 for t in tensors)) if known else None)


def _forget_batch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A forward hook that resets `MODEL_BATCH`."""
    MODEL_BATCH.set(None)


def _record_maybe_sequence(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook that sets `MAYBE_SEQUENCE` in training, unless the model's input surely has a batch dimension."""
    tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()]
    unsure = (
        module.training
        and tensors
        and tensors[0].dim() <= (2 if tensors[0].is_floating_point() else 1)  # whole numbers are words or positions
        and all(t.dim() <= 2 for t in tensors)
    )
    MAYBE_SEQUENCE.set((tensors[0].shape[0], module.lte_num_heads) if unsure and isinstance(module, HeadLoop) else None)


def _forget_maybe_sequence(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """A forward hook that resets `MAYBE_SEQUENCE`."""
    MAYBE_SEQUENCE.set(None)
