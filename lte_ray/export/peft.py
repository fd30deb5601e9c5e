"""Writes a change as a LoRA adapter for PEFT: `PeftModel.from_pretrained(model, folder)` computes what our model does.

PEFT's own classes create the adapter and write it. The factors' scaling and weight are folded into B, and alpha is the rank, so
that PEFT's scaling is 1.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lte_ray.adapters.layer_kinds import TRANSPOSED_LINEAR, kind_of
from lte_ray.engine.head.rng import preserve_generators
from lte_ray.engine.prepare import load_base, named_tensors
from lte_ray.errors import ConfigError, UserError
from lte_ray.export import delta as changes
from lte_ray.export.delta import ModelDelta, dense_factors
from lte_ray.export.peft_targets import ALTERNATIVE, PeftTargets, plan_targets, target_modules, tensor_owners
from lte_ray.export.pretrained import names_outside, pretrained_part, require_package
from lte_ray.export.run_reader import SavedRun, Written
from lte_ray.layout import Plan
from lte_ray.merging.flat_buffer import views
from lte_ray.worker import build_model

ADAPTER = "default"
"""PEFT's default name of an adapter."""

TASKS: dict[str, tuple[str, tuple[str, ...]]] = {
    "SEQ_2_SEQ_LM": ("SEQ_TO_SEQ_CAUSAL_LM", ()),
    "CAUSAL_LM": ("CAUSAL_LM", ()),
    "SEQ_CLS": ("SEQUENCE_CLASSIFICATION", ("classifier", "score")),
    "TOKEN_CLS": ("TOKEN_CLASSIFICATION", ("classifier", "score")),
    "QUESTION_ANS": ("QUESTION_ANSWERING", ("qa_outputs",)),
}
"""PEFT's tasks: the name of transformers' mapping of classes, and the layers that PEFT then copies in full."""

Pair = tuple[Tensor, Tensor]
"""B (out x r), A (r x in)."""


def write_adapter(saved: SavedRun, folder: Path, head: int | None, rank: int | None) -> Written:
    """Writes an adapter into an empty folder.

    One head's adapter applies to the merged weights of the version, that of the average (`head` None) to the initial model. So
    does a head's if heads never merge.

    Raises:
        UserError: PEFT isn't installed or can't represent the change.
    """
    if rank is not None and rank < 1:
        raise ConfigError(f"--rank is {rank}, but it must be at least 1.")
    if not saved.plan.adapted:
        raise ConfigError(
            f"{saved.directory.display} was trained in full rank, so an adapter of low rank can't hold its change. Export the "
            "weights instead: --to safetensors or --to pretrained."
        )
    if head is None:
        saved.check_merged()
    peft = require_package("peft")
    change = changes.average_delta(saved, rank) if head is None else changes.head_delta(saved, head, rank)
    of_merged = head is not None and not saved.never_merged
    # Then it isn't for the weights with that name.
    model, names = _target_model(saved, change)
    base_name = "" if of_merged or saved.record.get("init_from") else _name_of(model)
    drawn = _drawn_weights(saved) if base_name else set()
    load_base(saved.model, saved.plan, change.start)
    matrices = [names[spec.name] for spec in changes.matrix_weights(saved.plan.adapted) if spec.name in names]
    drawn = {names[name] for name in drawn if name in names}
    if drawn.issuperset(matrices):  # trained from scratch: only the architecture has that name
        base_name, drawn = "", set()
    factors = {names[name]: pair for name, pair in change.factors.items() if names[name] not in drawn}
    final = {names[name]: value for name, value in _final_values(saved.plan, change).items() if name in names}
    matrices = [name for name in matrices if name not in drawn]
    changed = {names[name] for name in _changed_names(saved.plan, change)} | drawn
    placement = plan_targets(model, matrices, factors, changed - set(matrices))
    pairs = {
        layer: factors[name] if name in factors else _full_rank_pair(model, layer, final.get(name))
        for layer, name in placement.lora.items()
    }
    with ignore_warnings():
        adapted = _make_peft_model(peft, model, placement, pairs, final)
        adapted.peft_config[ADAPTER].task_type = _task_type(model, placement)
        if head is not None or base_name or _name_of(model):
            adapted.peft_config[ADAPTER].base_model_name_or_path = base_name
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
    with safe_open(folder / "adapter_model.safetensors", "pt") as written:
        if placement.bias and not any(key.endswith(".base_layer.bias") for key in written.keys()):  # noqa: SIM118 - no dict
            raise UserError(f"peft {peft.__version__} leaves out the biases of layers with LoRA: pip install -U peft.")
    ranks = [b.shape[1] for b, _ in pairs.values()]
    return Written(_summary(saved, change, head, placement, ranks, type(model).__name__), max(ranks), change.error)


def _drawn_weights(saved: SavedRun) -> set[str]:
    """Names of the tensors of the initial model that come from random numbers, such as a new classifier's.

    The model that they begin from doesn't have them, so an adapter must hold them whole. Another seed gives others.
    """
    with preserve_generators(torch.device("cpu")):
        other = named_tensors(build_model(saved.worker, int(saved.record.get("seed", 0)) + 1))
    mine = named_tensors(saved.model)
    return {name for name, tensor in mine.items() if name not in other or not torch.equal(tensor, other[name])}


def _target_model(saved: SavedRun, change: ModelDelta) -> tuple[nn.Module, dict[str, str]]:
    """Returns the model for the adapter, and a mapping from names in the worker's model to names in it.

    It is the one model of transformers in the worker's model if nothing else has changed; else the worker's model.
    """
    name, part = pretrained_part(saved.model)
    if part is None or names_outside(saved.model, name, _changed_names(saved.plan, change)):
        part = saved.model
    inner_names = {id(tensor): inner for inner, tensor in named_tensors(part).items()}
    outer_tensors = named_tensors(saved.model)
    return part, {outer: inner_names[id(tensor)] for outer, tensor in outer_tensors.items() if id(tensor) in inner_names}


def _changed_names(plan: Plan, change: ModelDelta) -> list[str]:
    """Returns the names of all parameters and buffers that have changed."""
    start, final = views(plan.base, change.start), views(plan.base, change.final)
    return [name for name in final if not torch.equal(start[name], final[name])] + list(change.buffers)


def _final_values(plan: Plan, change: ModelDelta) -> dict[str, Tensor]:
    return {**views(plan.base, change.final), **change.buffers}


@torch.no_grad()
def _full_rank_pair(model: nn.Module, layer: str, final: Tensor | None) -> Pair:
    """Returns B, A of full rank for a layer without known factors: the change times the identity."""
    module: Any = model.get_submodule(layer)
    kind, weight = kind_of(module), module.weight
    delta = torch.zeros_like(weight) if final is None else final - weight
    matrix = delta.t() if kind is not None and kind.transposed else delta.flatten(1)
    if not matrix.any():
        return matrix[:, :1], matrix[:1]
    return dense_factors(matrix)


def _make_peft_model(
    peft: Any, model: nn.Module, placement: PeftTargets, pairs: dict[str, Pair], final: dict[str, Tensor]
) -> Any:
    """Turns `model`, in place, into a PeftModel whose adapter contains the change."""
    names = {f"{layer}.{part}": name for name, owners in tensor_owners(model).items() for layer, part in owners}
    try:
        adapted = peft.get_peft_model(model, _make_config(peft, model, placement, pairs))
    except Exception as error:
        raise UserError(f"PEFT can't adapt the {type(model).__name__}: {type(error).__name__}: {error}") from error
    inner = adapted.get_base_model()
    layers = {n: m for n, m in inner.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    copies = {n: m for n, m in inner.named_modules() if isinstance(m, peft.utils.ModulesToSaveWrapper)}
    wrong = (set(layers) ^ set(pairs)) | {n for n in [*layers, *copies] for m in [*layers, *copies] if n.startswith(f"{m}.")}
    if wrong:
        raise UserError(
            f"PEFT selects other layers of the {type(model).__name__} than it should, since it compares the ends of names: "
            f"{', '.join(sorted(wrong)[:5])}. {ALTERNATIVE}"
        )
    with torch.no_grad():
        for name, layer in layers.items():
            _copy_factors(layer, *pairs[name])
            if placement.bias and f"{name}.bias" in names:
                layer.get_base_layer().bias.copy_(final[names[f"{name}.bias"]])
        for name, module in copies.items():
            copy = module.modules_to_save[ADAPTER]
            for part, tensor in [*copy.named_parameters(remove_duplicate=False), *copy.named_buffers(remove_duplicate=False)]:
                value = final.get(names[f"{name}.{part}"])
                if value is not None:
                    tensor.copy_(value)
    return adapted


def _make_config(peft: Any, model: nn.Module, placement: PeftTargets, pairs: dict[str, Pair]) -> Any:
    ranks = {layer: b.shape[1] for layer, (b, _) in pairs.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    pattern = {f"^{re.escape(layer)}": rank for layer, rank in ranks.items() if rank != common}
    return peft.LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=target_modules(placement.lora, model),
        modules_to_save=list(placement.full) or None,
        bias="lora_only" if placement.bias else "none",
        fan_in_fan_out=any(kind_of(model.get_submodule(layer)) is TRANSPOSED_LINEAR for layer in pairs),
    )


def _task_type(model: nn.Module, placement: PeftTargets) -> str | None:
    """Returns PEFT's task of a class of transformers: its class of adapters; None if it has none for it.

    It is set after PEFT has made the adapter: for classifiers, PEFT then copies their last layer in full. So there is none for
    one whose last layer has LoRA.
    """
    auto = "transformers.models.auto.modeling_auto"
    known: Any = importlib.import_module(auto) if type(model).__module__.startswith("transformers.") else None
    for task, (mapping, copied) in TASKS.items():
        if type(model).__name__ in getattr(known, f"MODEL_FOR_{mapping}_MAPPING_NAMES", {}).values():
            has_lora = any(part in copied for layer in placement.lora for part in layer.split("."))
            return None if has_lora else task
    return None


def _name_of(model: nn.Module) -> str:
    """Returns the name or path that a model of transformers was loaded from; "" if there is none."""
    config = getattr(model, "config", None)
    names = [getattr(config, "_name_or_path", ""), getattr(config, "name_or_path", ""), getattr(model, "name_or_path", "")]
    return next((name for name in names if isinstance(name, str) and name), "")


def _copy_factors(layer: Any, b: Tensor, a: Tensor) -> None:
    """Copies the factors into one of PEFT's layers, in PEFT's shapes."""
    if ADAPTER in layer.lora_embedding_A:  # an embedding's matrix is transposed: words are its inputs
        layer.lora_embedding_A[ADAPTER].copy_(b.t())
        layer.lora_embedding_B[ADAPTER].copy_(a.t())
    else:  # of a convolution: one with A's kernels, then one with 1 x 1 kernels
        for factor, ours in ((layer.lora_A[ADAPTER].weight, a), (layer.lora_B[ADAPTER].weight, b)):
            factor.copy_(ours.reshape(factor.shape))


@contextlib.contextmanager
def ignore_warnings() -> Iterator[None]:
    """Suppresses PEFT's warnings about what is intended here: both kinds of linear layers, tied weights, copies."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _summary(
    saved: SavedRun, change: ModelDelta, head: int | None, placement: PeftTargets, ranks: list[int], model: str
) -> str:
    span = f"rank {ranks[0]}" if len(set(ranks)) == 1 else f"ranks {min(ranks)} to {max(ranks)}"
    what = f"LoRA adapter of {span} on {len(ranks)} layer(s) of the {model}"
    version = saved.manifest.version
    if head is None:
        what += f": the change from the initial model to the {saved.weights}"
    elif saved.never_merged:
        what += f": what head {head} has trained until version {version}"
    elif not change.factors:
        what += f": zero, since all that head {head} has trained is in the merged weights of version {version}"
    else:
        what += f": what head {head} has trained beyond the merged weights of version {version}"
    if placement.full:
        what += f". {len(placement.full)} module(s) are included in full: {', '.join(placement.full[:5])}"
        what += ", ..." if len(placement.full) > 5 else ""
    what += f". Relative error of the change: {change.error:.1e}" + ("" if change.exact else " (truncated)")
    if change.not_a_sum and change.exact:
        what += (
            f". The change isn't the sum of the heads' changes of low rank, since {change.not_a_sum}. So the adapter has full "
            "rank: --rank R makes a smaller one, the best of rank R, and reports its error"
        )
    return what
