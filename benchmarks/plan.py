"""Predicted memory and bytes against real heads, and the time and memory of planning for eight billion parameters.

A head trains in this process: what it keeps is the memory of all its tensors after a merge, with gradients. The peak of a
step is that of torch's allocator.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from typing import Any

from benchmarks.report import progress, report
from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.engine.settings import Settings
from lte_ray.planning import plan, total
from tests.support.real_memory import measure_real_head
from tests.support.small_llama import LLAMA_8B, SmallLlama
from workers.gpt import GPT

MEMORY_LIMIT, SECONDS_LIMIT, BYTES_LIMIT = 0.1, 20.0, 2 * 1024**3
FORMATS = ("fp32", "bf16", "int8", "nf4")
WORKERS = {"gpt": GPT(depth=2), "llama": SmallLlama()}
PRECISIONS = ("fp32", "bf16-mixed")


def compare(worker: Any, base_dtype: str, precision: Any) -> dict[str, float]:
    """Ratios of predicted to real bytes: of what a head keeps, and of the peak of a step."""
    lte, merge = LTEConfig(lora_r=16, base_dtype=base_dtype), MergeConfig(policy="average")  # type: ignore[arg-type]
    train = TrainConfig(steps=20, precision=precision)
    parts = dict(plan(worker, lte, merge, train).head)
    kept, peak = measure_real_head(worker, Settings("real", lte, merge, train))
    activations = parts.pop("activations") or 0
    step = activations + (parts["gradients"] or 0) + (parts["batch"] or 0)
    return {"kept": (total(parts) or 0) / kept, "peak": step / peak}


def plan_8b() -> None:
    """Plans for a Llama of eight billion parameters, and prints seconds and peak bytes of this process."""
    begin = time.perf_counter()
    plan(SmallLlama(**LLAMA_8B), LTEConfig(num_heads=8, base_dtype="nf4"), gpu="80GB", num_gpus=8, link="1Gbit")
    print(time.perf_counter() - begin, time.process_time(), 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    ratios = {}
    for name, worker in WORKERS.items():
        for base_dtype in FORMATS:
            for precision in PRECISIONS:
                case = f"{name}, {base_dtype} weights, {precision}"
                ratios[case] = compare(worker, base_dtype, precision)
                progress(len(ratios), len(WORKERS) * len(FORMATS) * len(PRECISIONS), f"{case}: {ratios[case]}")
    code = "from benchmarks.plan import plan_8b; plan_8b()"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, processor, peak = map(float, out.split())
    worst = max(abs(ratio - 1) for each in ratios.values() for ratio in each.values())
    report(
        "plan",
        limits={
            "memory": f"predictions within {MEMORY_LIMIT:.0%}",
            "8b": f"an 8B Llama in <= {SECONDS_LIMIT:g} s of processor time and {BYTES_LIMIT / 1024**3:g} GiB",
        },
        met={"memory": worst <= MEMORY_LIMIT, "8b": processor <= SECONDS_LIMIT and peak <= BYTES_LIMIT},
        figures={"ratios": ratios, "8b": {"seconds": seconds, "processor_seconds": processor, "peak_bytes": peak}},
    )


if __name__ == "__main__":
    main()
