"""Settings that suit a model and given GPUs: how many heads, in which format, how often they merge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lte_ray.config import BASE_DTYPES
from lte_ray.config.hardware import Hardware
from lte_ray.engine.head.measures import PEAK_FLOPS
from lte_ray.engine.settings import Settings
from lte_ray.layout import Plan
from lte_ray.planning.measure import StepMemory
from lte_ray.planning.memory import MemoryModel, total
from lte_ray.planning.traffic import Traffic

USABLE = 0.9
"""The part of a GPU's memory to fill: the rest is for the CUDA context, kernels' workspaces and fragmentation."""

MERGE_SHARE = 0.05
"""The part of the time that merging may take, if heads wait."""

UTILIZATION = {"fp32": 0.05, "bf16-mixed": 0.4, "fp16-mixed": 0.4}
"""The part of a GPU's highest rate, which is that of 16-bit products, at which a step is assumed to compute."""

ASSUMED_GPU = "A100"
"""Whose rate counts for GPUs that are known by their memory only."""

RARE_MERGES = 500
"""Local steps between merges above which it is doubtful that heads learn as well."""


@dataclass(frozen=True)
class Recommendation:
    """Settings for a cluster.

    Attributes:
        fits: whether a head fits into a GPU at all. If not, the other numbers are None.
        num_heads: heads in all.
        heads_per_gpu: on each GPU.
        base_dtype: format of the main weights.
        lora_r: rank for fine-tuning: that of the settings.
        lora_r_from_scratch: rank with which merges can change the widest matrices in all directions.
        transfer, send_down: formats of a merge.
        merge_iter: local steps between merges.
        bytes_per_gpu: that are used.
        step_seconds: of a local step, as given or estimated.
        flags: the same as flags of ``lte-ray train``.
        reasons: sentences.
    """

    fits: bool
    reasons: tuple[str, ...]
    num_heads: int | None = None
    heads_per_gpu: int | None = None
    base_dtype: str | None = None
    lora_r: int | None = None
    lora_r_from_scratch: int | None = None
    transfer: str | None = None
    send_down: str | None = None
    merge_iter: int | None = None
    bytes_per_gpu: int | None = None
    step_seconds: float | None = None
    flags: str = ""


def recommend(
    memory: MemoryModel,
    step: StepMemory,
    traffic: Callable[[int], Sequence[Traffic]],
    settings: Settings,
    hardware: Hardware,
) -> Recommendation:
    """Recommends settings for `hardware.num_gpus` GPUs.

    - The format of main weights is the first of fp32, bf16, int8 and nf4, from that of the settings on, in which the heads
      fit; fewer bits cost accuracy, and time in each step.
    - Each GPU gets a head. It gets more if the settings have more heads than GPUs: these share its main weights.
    - A merge is in the first of the formats fp32, bf16, int8 in which merging takes at most 5% of the time at the settings'
      `merge_iter`. If it takes more in all of them, `merge_iter` is raised.

    Args:
        traffic: gives the traffic of a merge in several formats, for a number of heads, each on a machine of its own.
    """
    usable = USABLE * hardware.gpu_bytes
    each = -(-settings.lte.num_heads // hardware.num_gpus)
    if total(memory.head(step)) is None:
        return Recommendation(False, ("What a head needs isn't known, so nothing can be recommended: see the notes.",))
    formats = BASE_DTYPES[BASE_DTYPES.index(settings.lte.base_dtype) :]
    if settings.lte.full_rank or not settings.lte.adapt:
        formats = formats[:1]
    needs = {f: _gpu_bytes(memory, step, f, each) for f in formats}
    fitting = [f for f in formats if needs[f] <= usable]
    reasons = []
    if not fitting:
        least = formats[-1]
        who = f"{each} heads a GPU need" if each > 1 else "A head needs"
        reasons.append(
            f"{who} {_size(needs[least])} with --base-dtype {least}, but only {_size(usable)} of a GPU's "
            f"{_size(hardware.gpu_bytes)} should be filled. Use smaller batches, --checkpoint-activations, --precision "
            "bf16-mixed or --others frozen" + (", or fewer heads." if each > 1 else ".")
        )
        return Recommendation(False, tuple(reasons))
    same_ranks = len(set(memory.plans)) == 1
    base_dtype, heads = fitting[0], each * hardware.num_gpus if same_ranks else settings.lte.num_heads
    if base_dtype != settings.lte.base_dtype:
        before = formats[formats.index(base_dtype) - 1]
        reasons.append(f"--base-dtype {base_dtype}: with {before} a GPU would need {_size(needs[before])}.")
    seconds, how = step_seconds(step, settings, hardware)
    seconds *= 1 if hardware.step_time else each
    ways, merge_iter = traffic(heads), None
    chosen = ways[0]
    if seconds:
        chosen, merge_iter = _choose_merging(ways, settings, seconds)
        reasons.append(
            f"With {how}, merging every {merge_iter} steps takes {_share(chosen, merge_iter, seconds):.1%} of the time if "
            "heads wait."
        )
        if merge_iter > RARE_MERGES:
            reasons.append("That is rare: heads may learn less well than with more merges (lte-ray ladder measures it).")
    else:
        reasons.append("How often to merge depends on the time of a step, which isn't known: give --step-time.")
    lora_r = settings.lte.lora_r if isinstance(settings.lte.lora_r, int) else None
    scratch = _full_rank(memory.plan, heads)
    if lora_r and scratch and scratch > lora_r:
        reasons.append(
            f"--lora-r {lora_r} suits fine-tuning. From scratch, {heads} heads can change every matrix in all directions with "
            f"--lora-r {scratch}."
        )
    flags = {"num-heads": heads, "heads-per-actor": each, "gpus-per-head": 1, "base-dtype": base_dtype}
    flags |= {"transfer": chosen.transfer, "send-down": chosen.send_down, "merge-iter": merge_iter}
    usual = {"heads-per-actor": 1, "base-dtype": "fp32", "transfer": "fp32", "send-down": "auto", "merge-iter": None}
    return Recommendation(
        fits=True,
        reasons=tuple(reasons),
        num_heads=heads,
        heads_per_gpu=each,
        base_dtype=base_dtype,
        lora_r=lora_r,
        lora_r_from_scratch=scratch,
        transfer=chosen.transfer,
        send_down=chosen.send_down,
        merge_iter=merge_iter,
        bytes_per_gpu=needs[base_dtype],
        step_seconds=seconds or None,
        flags=" ".join(f"--{name} {value}" for name, value in flags.items() if usual.get(name, "") != value),
    )


def step_seconds(step: StepMemory, settings: Settings, hardware: Hardware) -> tuple[float, str]:
    """Returns the time of a local step, and where it comes from; 0 if nothing is known."""
    if hardware.step_time:
        return hardware.step_time, f"steps of {_time(hardware.step_time)}"
    if not step.flops:
        return 0.0, ""
    known = [name for name in PEAK_FLOPS if name in hardware.gpu.upper()]
    name = known[0] if known else ASSUMED_GPU
    share = UTILIZATION[settings.train.precision]
    seconds = step.flops * settings.train.accumulate / (share * PEAK_FLOPS[name])
    gpu = f"{share:.0%} of the {PEAK_FLOPS[name] / 1e12:.0f} Tflop/s of an {name}"
    return seconds, f"steps of {_time(seconds)} ({gpu}; give --step-time if you know it)"


def _choose_merging(traffic: Sequence[Traffic], settings: Settings, seconds: float) -> tuple[Traffic, int]:
    """The formats, and the steps between merges."""
    steps = settings.merge.merge_iter
    for way in traffic:
        if _share(way, steps, seconds) <= MERGE_SHARE:
            return way, steps
    fastest = min(traffic, key=lambda way: way.seconds)
    needed = fastest.seconds * (1 - MERGE_SHARE) / (MERGE_SHARE * seconds)
    return fastest, 10 * math.ceil(needed / 10)


def _share(way: Traffic, steps: int, seconds: float) -> float:
    return way.seconds / (way.seconds + steps * seconds)


def _gpu_bytes(memory: MemoryModel, step: StepMemory, base_dtype: str, heads: int) -> int:
    shared, own = total(memory.shared_weights(base_dtype)), total(memory.own(step, base_dtype))
    assert shared is not None and own is not None
    return shared + heads * own


def _full_rank(plan: Plan, heads: int) -> int | None:
    """The rank with which heads can change every matrix in all directions; None without factors."""
    smaller = [min(spec.matrix) for spec in plan.adapted if len(spec.shape) > 1]
    return math.ceil(max(smaller) / heads) if smaller else None


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _size(count: float) -> str:
    return f"{count / 1e9:.3g} GB"
