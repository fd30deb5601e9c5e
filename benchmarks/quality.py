"""LTE's loss beside ordinary training's, at equal samples: the table of docs/tuning.md.

Each job trains `workers.gpt:GPT` with batches of 32 windows in all, whatever the number of heads: alone in the ordinary way
(AdamW, Muon), as LTE with the library's defaults, as LTE in the paper's way (AdamW, average), and in full rank with an outer
optimizer (DiLoCo, MuLoCo). Every arm has its rates swept on a seed of its own, then trains on the seeds that count.

Trainings take minutes to an hour each. Results are kept in ``benchmarks/results/quality-JOB.json`` after each, and a second
call continues, so that arms can be run one by one: ``python -m benchmarks.quality main --arms "LTE, 4 heads" --seeds 0``.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks.report import RESULTS, machine, progress
from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.ladder import Arm, ArmResult, Figure, ProcessRunner, ResultsFile, RungResult, climb
from lte_ray.ladder.picture import draw
from lte_ray.ladder.summary import summarize
from lte_ray.storage import RunDirectory
from workers.gpt import GPT

FIGURE = Figure("bits_per_byte")
BATCH = 32
"""Windows in a step of all heads together."""

ORDINARY, MUON = "ordinary", "ordinary, Muon"
RATES, TUNING_SEED = (0.5, 1.0, 2.0), 100


@dataclass(frozen=True)
class Job:
    """A model and a length of training.

    Attributes:
        worker: trains it.
        steps: local steps of a head, and steps of ordinary training.
        rank: of LTE's heads.
    """

    worker: GPT
    steps: int
    rank: int = 32


JOBS = {
    "main": Job(GPT(validation_windows=1024), 700),
    "long": Job(GPT(width=64, depth=2, context=64, validation_windows=1024), 4000),
}

LIMITS: Mapping[str, tuple[str, float]] = {
    "LTE, 2 heads": (ORDINARY, 0.96),
    "LTE, 4 heads": (ORDINARY, 0.97),
    "LTE, 8 heads": (ORDINARY, 1.00),
    "LTE, 4 heads, merge_iter 50": (ORDINARY, 1.00),
    "LTE, 8 heads, merge_iter 50": (ORDINARY, 1.04),
}
"""The highest ratio of an arm's loss to that of another."""

MUON_LIMITS = {"LTE, 2 heads": 1.05, "LTE, 4 heads": 1.08, "LTE, 8 heads": 1.12}
"""The same, to ordinary Muon."""


def make_arms(job: Job) -> Iterator[Arm]:
    """All arms of a job, at the first rate and seed."""
    every = job.steps // 14 // 50 * 50 or 50
    adamw = {"optimizer": "adamw", "lr": 4e-3, "schedule": "cosine"}
    muon = {"optimizer": "muon", "lr": 0.05, "replica_lr": 0.016, "schedule": "cosine"}

    def arm(rung: str, heads: int, merge: MergeConfig, *, full_rank: bool = False, **train: object) -> Arm:
        return Arm(
            rung,
            LTEConfig(num_heads=heads, lora_r=job.rank, lora_alpha=2.0 * job.rank, full_rank=full_rank),
            merge,
            TrainConfig(steps=job.steps, eval_every=0, **train),  # type: ignore[arg-type]
            worker={"batch_size": BATCH // heads},
            evaluate_every=every,
        )

    yield arm(ORDINARY, 1, MergeConfig(every), baseline=True, **adamw)
    yield arm(MUON, 1, MergeConfig(every), baseline=True, **muon)
    for heads in (2, 4, 8):
        yield arm(f"LTE, {heads} heads", heads, MergeConfig())
    for heads in (4, 8):
        yield arm(f"LTE, {heads} heads, merge_iter 50", heads, MergeConfig(50))
    for heads in (2, 4, 8):
        yield arm(f"LTE as in the paper, {heads} heads", heads, MergeConfig(policy="average"), **adamw)
    for heads in (4, 8):
        nesterov = MergeConfig(policy="nesterov", policy_args={"lr": 0.7, "momentum": 0.6})
        yield arm(f"MuLoCo, {heads} heads", heads, nesterov, full_rank=True, **muon)
        yield arm(f"DiLoCo, {heads} heads", heads, MergeConfig(policy="average"), full_rank=True, **adamw)


def run_arms(name: str, arms: list[Arm], seeds: list[int], rates: list[float]) -> list[RungResult]:
    """Trains what isn't trained yet; returns each arm's results."""
    job, directory = JOBS[name], RunDirectory.open(str(RESULTS.parent), RESULTS.name)
    file = ResultsFile(directory, f"quality-{name}.json", {"job": repr(job)})
    file.load()
    runner = ProcessRunner(job.worker)
    about = {"date": datetime.datetime.now(datetime.UTC).date().isoformat(), "machine": machine()}

    def run(arm: Arm) -> ArmResult:
        if file.get(arm) is None:
            file.add(runner(arm), command=f"python -m benchmarks.quality {name}", **about)
            result = file.get(arm)
            assert result is not None
            progress(len(file), len(file), f"{arm.label}: {result.final(FIGURE.name):.4f} in {result.seconds:.0f} s")
        result = file.get(arm)
        assert result is not None
        return result

    tuning_seed = TUNING_SEED if len(rates) > 1 else seeds[0]
    return [climb(arm, rates, seeds, run, FIGURE, tuning_seed=tuning_seed) for arm in arms]


def show(results: list[RungResult]) -> bool:
    """Prints a table and the limits; returns whether all that were measured are met."""
    summaries = {s.name: s for s in summarize(results, FIGURE)}
    muon = summaries.get(MUON)
    print("arm | rate | bits per byte (lowest to highest) | to AdamW | to Muon | samples to AdamW's loss")
    for s in summaries.values():
        to_muon = s.mean / muon.mean if muon else float("nan")
        print(
            f"{s.name} | x{s.result.rate:g} | {s.mean:.4f} ({min(s.values):.4f} to {max(s.values):.4f}) | {s.ratio:.3f} | "
            f"{to_muon:.3f} | {s.reached:.2f}"
        )
    met = []
    for name, (other, limit) in LIMITS.items():
        if name in summaries and other in summaries:
            met.append((f"{name}: ratio to {other}", summaries[name].mean / summaries[other].mean, limit))
    for name, limit in MUON_LIMITS.items():
        if name in summaries and muon:
            met.append((f"{name}: ratio to {MUON}", summaries[name].mean / muon.mean, limit))
    for text, found, limit in met:
        print(f"{'met   ' if found <= limit else 'MISSED'}  {text} {found:.3f} <= {limit}")
    spreads = [statistics.fmean(s.values) for s in summaries.values()]
    return all(found <= limit for _, found, limit in met) and bool(spreads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=sorted(JOBS), nargs="?", default="main")
    parser.add_argument("--arms", nargs="+", metavar="NAME", help="names of arms; by default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="multipliers of the rates")
    options = parser.parse_args()
    arms = list(make_arms(JOBS[options.job]))
    names = [arm.rung for arm in arms]
    if unknown := set(options.arms or ()) - set(names):
        parser.error(f"no arm is called {', '.join(sorted(unknown))}; there are: {'; '.join(names)}")
    chosen = [arm for arm in arms if options.arms is None or arm.rung in options.arms]
    results = run_arms(options.job, chosen, options.seeds, options.rates)
    title = f"GPT, {options.job} job, {BATCH} windows a step"
    (RESULTS / f"quality-{options.job}.svg").write_bytes(draw(summarize(results, FIGURE), title))
    sys.exit(0 if show(results) else 1)


if __name__ == "__main__":
    main()
