"""LTE compared with ordinary training at equal samples: the tables of docs/tuning.md.

Each job (`benchmarks.quality_arms`) trains a worker with equally large batches in all, whatever the number of heads: alone in
the ordinary way (AdamW, Muon), as LTE with the library's defaults, as LTE in the paper's way (AdamW, average), and in full rank
with an outer optimizer (DiLoCo, MuLoCo). Every arm has its rates swept on a seed of its own, then trains on the seeds that
count.

Trainings take minutes to an hour each. Results are kept in ``benchmarks/results/quality-JOB.json`` after each, and a second
call continues, so that arms can be run one by one, also at the same time: ``python -m benchmarks.quality main --arms "LTE, 4
heads" --seeds 0``. The table shows all arms that are done at these seeds, also those that weren't swept (rate x1).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.quality_arms import JOBS, MUON, Job, Limit
from benchmarks.report import RESULTS, machine, progress
from lte_ray.ladder import Arm, ArmResult, ProcessRunner, ResultsFile, RungResult, climb
from lte_ray.ladder.picture import draw
from lte_ray.ladder.summary import Summary, summarize
from lte_ray.storage import RunDirectory

RATES, TUNING_SEED = (0.5, 1.0, 2.0), 100
TRIED = tuple(2.0**power for power in range(-5, 6))
"""Rates that a sweep may have reached."""


class NotTrained(Exception):
    """An arm has no result yet, and isn't to be trained now."""


@dataclass
class Results:
    """The results of a job, in its file."""

    name: str
    file: ResultsFile = field(init=False)

    def __post_init__(self) -> None:
        directory = RunDirectory.open(str(RESULTS.parent), RESULTS.name)
        job = JOBS[self.name]
        settings = {"worker": repr(job.worker), "batch": job.batch, "steps": job.steps}
        self.file = ResultsFile(directory, f"quality-{self.name}.json", settings)
        self.file.load()

    def look_up(self, arm: Arm) -> ArmResult:
        """Returns an arm's result. Raises NotTrained."""
        if result := self.file.get(arm):
            return result
        raise NotTrained

    def rates(self, arm: Arm) -> list[float]:
        """The rates at which an arm was trained on the seed of sweeps."""
        return [rate for rate in TRIED if self.file.get(arm.with_rate(rate, TUNING_SEED))]

    def train(self, arm: Arm) -> ArmResult:
        """Returns an arm's result, after training if there is none."""
        if self.file.get(arm) is None:
            result = ProcessRunner(JOBS[self.name].worker)(arm)
            self.file.load()  # another process may have added arms
            date = datetime.datetime.now(datetime.UTC).date().isoformat()
            self.file.add(result, command=f"python -m benchmarks.quality {self.name}", date=date, machine=machine())
            figure = JOBS[self.name].figure
            progress(len(self.file), len(self.file), f"{arm.label}: {result.final(figure.name):.4f} in {result.seconds:.0f} s")
        return self.look_up(arm)


def run_arms(name: str, chosen: set[str], seeds: list[int], rates: list[float]) -> list[RungResult]:
    """Trains the chosen arms as far as that isn't done; returns the results of all arms that are done."""
    job, results, done = JOBS[name], Results(name), []
    for arm in job.arms:
        if arm.rung in chosen:
            tuning_seed = TUNING_SEED if len(rates) > 1 else seeds[0]
            done.append(climb(arm, rates, seeds, results.train, job.figure, tuning_seed=tuning_seed))
            continue
        swept = [rate for rate in results.rates(arm) if len(rates) > 1]
        with contextlib.suppress(NotTrained):
            tuning_seed = TUNING_SEED if swept else seeds[0]
            found = climb(arm, swept or [1.0], seeds, results.look_up, job.figure, tuning_seed=tuning_seed, extend=False)
            done.append(found)
    return done


def check(limit: Limit, summaries: dict[str, Summary]) -> float | None:
    """The figure that a limit bounds; None if an arm isn't done, or there are too few seeds."""
    arm, other = summaries.get(limit.arm), summaries.get(limit.other)
    if arm is None or other is None:
        return None
    if arm is other:
        return max(arm.values) / min(arm.values) if len(arm.values) >= 10 else None
    if limit.kind == "bytes":
        return arm.sent / other.sent
    return arm.mean / other.mean if limit.kind == "ratio" else other.mean - arm.mean


def rows(job: Job, summaries: dict[str, Summary]) -> Iterator[str]:
    """The lines of the table, then a line for each limit that can be checked."""
    muon = summaries.get(MUON)
    yield f"arm | rate | {job.figure.name} (lowest to highest) | ratio to AdamW | to Muon | samples to AdamW's | MB a head"
    for s in summaries.values():
        to_muon = s.mean / muon.mean if muon else float("nan")
        yield (
            f"{s.name} | x{s.result.rate:g} | {s.mean:.4f} ({min(s.values):.4f} to {max(s.values):.4f}) | {s.ratio:.3f} | "
            f"{to_muon:.3f} | {s.reached:.2f} | {s.sent / 1e6:.0f}"
        )
    for limit in job.limits:
        found = check(limit, summaries)
        if found is not None:
            what = {"ratio": "ratio to", "bytes": "ratio of bytes to", "below": "how far below"}[limit.kind]
            if limit.arm == limit.other:
                what = "highest to lowest seed of"
            verdict = "met   " if found <= limit.bound else "MISSED"
            yield f"{verdict}  {limit.arm}: {what} {limit.other} {found:.3f} <= {limit.bound}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=sorted(JOBS), nargs="?", default="main")
    parser.add_argument("--arms", nargs="*", metavar="NAME", help="names of arms to train; by default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="multipliers of the rates")
    options = parser.parse_args()
    job = JOBS[options.job]
    names = [arm.rung for arm in job.arms]
    if unknown := set(options.arms or ()) - set(names):
        parser.error(f"no arm is called {', '.join(sorted(unknown))}; there are: {'; '.join(names)}")
    results = run_arms(options.job, set(names if options.arms is None else options.arms), options.seeds, options.rates)
    if not results:
        parser.exit(1, "No arm is done at these seeds and rates.\n")
    summaries = summarize(results, job.figure)
    title = f"{type(job.worker).__name__}, {options.job} job, {job.batch} samples a step"
    (RESULTS / f"quality-{options.job}.svg").write_bytes(draw(summaries, title))
    lines = list(rows(job, {s.name: s for s in summaries}))
    print("\n".join(lines))
    sys.exit(1 if any(line.startswith("MISSED") for line in lines) else 0)


if __name__ == "__main__":
    main()
