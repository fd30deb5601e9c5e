"""Measured bytes of a head relative to the sum of its parts, for main weights in fp32, bf16 and nf4.

Each head trains a GPT in its own process, without Ray. "measured" is torch's peak allocation during some rounds of steps and
rebases, including everything that the head was built with. The parts are counted from tensors: main weights, factors and
replicas, their gradients, optimizer state, references, the contribution in flight, and the activations that autograd keeps for
the backward pass. "resident" is the memory of the process: on CPUs it includes the allocator's unused memory, since heads keep
freed memory (`engine/process_tuning.py`). The nf4 main weights are also compared with bf16.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import progress, report, spread
from lte_ray.adapters.quantization import QuantizedWeight
from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.head.head import Head
from lte_ray.engine.prepare import prepare
from lte_ray.engine.process_tuning import keep_freed_memory, release_freed_memory
from lte_ray.engine.settings import Settings
from lte_ray.messages import ContributionResult
from workers.gpt import GPT

FORMATS, RUNS, RANK = ("fp32", "bf16", "nf4"), 3, 32
WORKER = GPT(width=768, depth=8, attention_heads=12, context=128, batch_size=4)


class AllocatedBytes:
    """The bytes that torch allocates within the block, less those that it frees: at the end, and at the peak."""

    def __enter__(self) -> AllocatedBytes:
        self._profile = torch.profiler.profile(profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._profile.__exit__(*error)
        assert self._profile.profiler is not None
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        sums = list(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
        self.end, self.peak = sums[-1], max(sums)


def resident(line: str = "VmRSS") -> int:
    """Resident bytes of this process: now (VmRSS), or the maximum since the last reset (VmHWM)."""
    text = Path("/proc/self/status").read_text()
    return next(int(row.split()[1]) * 1024 for row in text.splitlines() if row.startswith(line))


def measure_here(base_dtype: str, resident_only: bool) -> dict[str, int]:
    """Trains one head in this process, and returns the measured bytes and the parts."""
    torch.set_num_threads(1)
    keep_freed_memory()
    settings = Settings(
        "memory", LTEConfig(lora_r=RANK, base_dtype=base_dtype), MergeConfig(merge_iter=2), TrainConfig(steps=100)
    )
    tiny = GPT(width=64, depth=1, context=16, batch_size=2)
    _rounds(Head(tiny, settings, 0), prepare(tiny, settings).base)  # loads everything that is loaded only once
    base = prepare(WORKER, settings).base  # belongs to the coordinator: in a run it is in the object store
    release_freed_memory()
    before = resident()
    if resident_only:  # the profiler would count, too
        head = Head(WORKER, settings, 0)
        _rounds(head, base)
        release_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        _rounds(head, base, first=False)
        return {"resident": resident("VmHWM") - before}
    with AllocatedBytes() as built:
        head = Head(WORKER, settings, 0)
        _rounds(head, base)
    with AllocatedBytes() as trained:
        _rounds(head, base, first=False)
    return {"measured": built.end + trained.peak, **parts(head)}


def _rounds(head: Head, base: Tensor, first: bool = True) -> None:
    """Two rounds of steps and rebases."""
    if first:
        head.start(0, base)
    for _ in range(2):
        contribution = head.train_round()
        head.adopt(ContributionResult(0, contribution.sequence, True, head.version + 1), head.version + 1, base)


def parts(head: Head) -> dict[str, int]:
    """Bytes of everything that a head needs, counted from its tensors."""
    trained = [p for group in head.optimizer.param_groups for p in group["params"]]
    states = [value for state in head.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    mains = [main.stored for main in head.converted.main_weights.values()]
    frozen = {id(p) for p in head.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(tensor) not in frozen and storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in head.model.parameters()}
    weights |= {b.untyped_storage().data_ptr() for b in head.model.buffers()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        head.worker.loss(head.model, head.next_batch())
    references = [t for t in (head.state.reference, head.state.replica_reference) if t is not None]
    return {
        "main_weights": sum(m.nbytes for m in mains),
        "factors_and_replicas": nbytes(trained),
        "gradients": nbytes(trained),
        "optimizer": nbytes(states),
        "references": nbytes(references),
        "contribution": 4 * head.plan.contribution.size,
        "activations": sum(kept.values()),
    }


def nbytes(tensors: Iterable[Tensor | QuantizedWeight]) -> int:
    return sum(t.nbytes for t in tensors)


def _measure(*arguments: str) -> dict[str, int]:
    """Measures in another process."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.memory", *arguments], capture_output=True, check=True)
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    measured: dict[str, list[dict[str, int]]] = {f: [] for f in FORMATS}
    for run in range(1, RUNS + 1):
        for base_dtype in FORMATS:
            figures_of_run = {**_measure(base_dtype), **_measure(base_dtype, "resident")}
            measured[base_dtype].append(figures_of_run)
            progress(run, RUNS, f"{base_dtype}: {figures_of_run['measured'] / 2**20:.1f} MiB measured")
    figures: dict[str, Any] = {}
    for base_dtype, runs in measured.items():
        sums = [sum(v for k, v in run.items() if k not in ("measured", "resident")) for run in runs]
        figures[base_dtype] = {
            "MiB": {k: round(v / 2**20, 1) for k, v in runs[0].items()},
            "resident_over_parts": spread([run["resident"] / total for run, total in zip(runs, sums, strict=True)]),
            "measured_over_parts": spread([run["measured"] / total for run, total in zip(runs, sums, strict=True)]),
        }
    weights = {f: runs[0]["main_weights"] for f, runs in measured.items()}
    figures["nf4_main_weights_over_bf16"] = round(weights["nf4"] / weights["bf16"], 4)
    limits = {f: f"measured bytes, ratio to the sum of the parts, {f}, median <= 1.10" for f in FORMATS}
    met = {f: figures[f]["measured_over_parts"]["median"] <= 1.10 for f in FORMATS}
    report(
        "memory",
        limits={**limits, "main weights": "nf4, ratio to bf16 <= 0.30"},
        met={**met, "main weights": figures["nf4_main_weights_over_bf16"] <= 0.30},
        figures=figures,
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure_here(sys.argv[1], "resident" in sys.argv)))
    else:
        main()
