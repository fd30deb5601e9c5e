"""Three hosts on slow links: asynchronous LTE, data-parallel training and DiLoCo.

Compute and links are in proportion as on real machines: a step's gradients take about ten times as long as the step. A GPU that
computes 150 TFLOP/s has that proportion at 100 Mbit/s if its step has a million tokens. Here a step has 128 tokens, since two
cores compute for all three hosts. Such small batches are noisy, for all ways alike.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.cluster_runs import Done, Hosts, Paced
from benchmarks.report import progress
from lte_ray.export import safetensors

HOSTS, INTERVAL, RATE = 3, 10, "100mbit"
COMMON = f"--num-heads {HOSTS} --cpus-per-head 1 --schedule constant --warmup 10 --seed 5 --keep-checkpoints None"
WAYS = {
    "LTE": (
        f"--steps 200 --merge-iter {INTERVAL} --no-wait --when quorum --quorum 3 --policy average --transfer int8 "
        "--send-down int8 --checkpoint-every 3"
    ),
    "DiLoCo": (
        f"--steps 120 --merge-iter {INTERVAL} --full-rank --optimizer adamw --lr 0.001 --checkpoint-every 1 "
        "--policy nesterov --policy.lr 0.7 --policy.momentum 0.9"
    ),
    "data-parallel": f"--steps 60 --baseline --baseline-processes {HOSTS} --lr 0.002 --checkpoint-every 6",
}
"""Rates: LTE's default; for AdamW one that works well for this model, not tuned further."""


def links() -> tuple[dict[str, Any], dict[str, tuple[str, bool]]]:
    worker = Paced()
    curves, found = dict[str, list[tuple[float, float]]](), dict[str, dict[str, Any]]()
    full = 0.0  # samples/s of heads that don't wait
    with Hosts(HOSTS) as hosts:
        hosts.network.shape(RATE)
        for number, (name, flags) in enumerate(WAYS.items(), 1):
            done = hosts.train(name.lower(), f"{flags} {COMMON}")
            curves[name] = evaluated(worker, done)
            # Data-parallel processes don't report their waits: in full rank, their steps are DiLoCo's.
            rate = done.samples_per_second()
            full = rate / done.utilisation() if name != "data-parallel" else full
            found[name] = {
                "utilisation": round(rate / full, 4),
                "samples_per_second": round(done.samples_per_second(), 2),
                "losses": [(round(seconds, 1), round(loss, 4)) for seconds, loss in curves[name]],
            }
            last = curves[name][-1]
            progress(number, len(WAYS), f"{name}: {done.samples_per_second():.1f} samples/s, {last[1]:.3f} at {last[0]:.0f} s")
    faster = {}
    for name in ("data-parallel", "DiLoCo"):
        target = max(min(loss for _, loss in curves[name]), min(loss for _, loss in curves["LTE"]))
        times = {each: seconds_to(curves[each], target) for each in ("LTE", name)}
        faster[name] = {"loss": round(target, 4), "seconds": times, "ratio": round(times[name] / times["LTE"], 2)}
    figures = {"ways": found, "time_to_a_loss": faster, "commands": WAYS, "common": COMMON}
    return figures, {
        "utilisation": (
            "100 Mbit/s: share of its time for which a head of asynchronous LTE trains >= 0.95",
            found["LTE"]["utilisation"] >= 0.95,
        ),
        "data-parallel": (
            "100 Mbit/s: time of data-parallel training to a loss, ratio to LTE's >= 10",
            faster["data-parallel"]["ratio"] >= 10,
        ),
        "diloco": ("100 Mbit/s: time of DiLoCo to a loss, ratio to LTE's >= 1.5", faster["DiLoCo"]["ratio"] >= 1.5),
    }


def evaluated(worker: Paced, done: Done) -> list[tuple[float, float]]:
    """Seconds since the first merge began to train, and bits per byte, of each version that was saved."""
    begin = done.merges[0]["at"] - (done.merges[1]["at"] - done.merges[0]["at"])
    model, curve = worker.build_model(), []
    versions = sorted(int(folder.name) for folder in (done.folder / "checkpoints").iterdir() if folder.name.isdigit())
    at = {row["version"]: row["at"] for row in done.merges}
    with tempfile.TemporaryDirectory() as folder:
        for version in versions:
            path = Path(folder) / f"{version}.safetensors"
            safetensors(done.folder, path, version=version)
            model.load_state_dict(load_file(path))
            with torch.no_grad():
                curve.append((at[version] - begin, worker.evaluate(model)["bits_per_byte"]))
    return curve


def seconds_to(curve: list[tuple[float, float]], loss: float) -> float:
    """When the loss was reached, by interpolation between two evaluations."""
    before = curve[0]
    for point in curve:
        if point[1] <= loss:
            if point is before or before[1] == point[1]:
                return point[0]
            share = (before[1] - loss) / (before[1] - point[1])
            return before[0] + share * (point[0] - before[0])
        before = point
    raise ValueError(f"the loss {loss} isn't reached")
