"""Advice where a rung falls behind: the authors' guidelines, and what this library's measurements add, each naming its flag."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lte_ray.ladder.rungs import MHLORA, ORDINARY
from lte_ray.ladder.summary import Summary

BEHIND = 0.02
"""How much worse than another rung counts as behind it, relative to that."""


OUTER_POLICIES = ("orthogonal", "nesterov", "momentum", "delayed_nesterov", "adam")
"""Merge policies whose steps have a size and momentum of their own."""


@dataclass(frozen=True)
class Facts:
    """What advice needs to know about the comparison.

    Attributes:
        num_heads: of each rung.
        total_rank: the ranks of all heads together, for the weight whose factors are smallest relative to it.
        largest_dimension: of that weight's matrix.
        needed_rank: of each head, so that the ranks of all heads add up to the largest dimension of every adapted weight (or
            each head's rank is the highest possible); 0 if they do.
        alpha: lora_alpha.
        policy: the merge policy's name; what "auto" stands for.
        optimizers: name of the optimizer's class, by rung.
        builds_optimizer: whether the worker builds it.
    """

    num_heads: int
    total_rank: int
    largest_dimension: int
    needed_rank: int
    alpha: float
    policy: str
    optimizers: Mapping[str, str]
    builds_optimizer: bool

    @property
    def orthogonalizes(self) -> bool:
        """Whether heads train with LoRA-Muon."""
        return "LoRAMuon" in self.optimizers.values()


def advise(summaries: Sequence[Summary], facts: Facts) -> list[str]:
    """Returns sentences, the most important first: what the ladder shows, where it falls behind, and what to change."""
    named = {s.name: s for s in summaries}
    ordinary, mhlora = named.get(ORDINARY), named.get(MHLORA)
    lte = sorted((s for s in summaries if s.name not in (ORDINARY, MHLORA)), key=lambda s: s.result.arm.merge.merge_iter)
    about_rates = list(_about_rates(summaries))
    unsettled = ordinary is not None and (
        ordinary.result.edge or len(ordinary.result.sweep) == 1 or not math.isfinite(ordinary.mean)
    )
    lines = [*(about_rates if unsettled else ()), *_conclusion(ordinary, lte, facts)]
    if ordinary and mhlora:
        lines += _compare_mhlora(mhlora, ordinary, facts)
    about_averaging: list[str] = []
    if lte and lte[0].result.arm.merge.merge_iter == 1:
        about_averaging += _compare_every_step(lte[0], mhlora or ordinary)
    for more, less in pairwise(lte):
        about_averaging += _compare_intervals(more, less)
    lines += [*about_averaging, *(_improve_averaging(facts) if about_averaging else ())]
    return [*lines, *(() if unsettled else about_rates), *_about_chance(summaries)]


def _conclusion(ordinary: Summary | None, lte: Sequence[Summary], facts: Facts) -> Iterator[str]:
    if ordinary is None or not lte or not math.isfinite(ordinary.mean):
        return
    by = facts.optimizers.get(ORDINARY, "")
    compared = f"ordinary training by {by}" if set(_of_heads(facts)) - {by} else "ordinary training"
    as_good = [s for s in lte if s.behind <= BEHIND]
    if as_good:
        chosen = as_good[-1]
        yield (
            f"With {chosen.name}, LTE is {_difference(chosen.behind)} {compared} at equal samples: train with "
            f"--merge-iter {chosen.result.arm.merge.merge_iter}{_at_rate(chosen)}."
        )
        return
    best = min(lte, key=lambda s: s.behind)
    yield f"LTE is behind {compared} at equal samples: its best rung, {best.name}, is {_difference(best.behind)} it."


def _compare_mhlora(mhlora: Summary, ordinary: Summary, facts: Facts) -> Iterator[str]:
    if mhlora.behind <= BEHIND:
        return
    start = f"mhlora is {_difference(mhlora.behind)} ordinary training, although all its heads see all samples: "
    if facts.needed_rank:
        yield (
            f"{start}the factors are too small. The ranks of {facts.num_heads} heads add up to {facts.total_rank}, below the "
            f"largest dimension of an adapted weight, {facts.largest_dimension}. Raise --lora-r towards {facts.needed_rank}"
            f"{'' if facts.orthogonalizes else ', and --lora-alpha with it'}."
        )
    elif facts.orthogonalizes:
        yield f"{start}LoRA-Muon's rates don't suit it. Try other ratios of --lr to --replica-lr, or of the worker's own rates."
    else:
        yield (
            f"{start}the factors learn too slowly or too fast. Try --lora-alpha {2 * facts.alpha:g} and {facts.alpha / 2:g}; "
            "values that agree in training loss can differ in evaluation."
        )


def _compare_every_step(every: Summary, reference: Summary | None) -> Iterator[str]:
    if reference is None or not _is_behind(every, reference):
        return
    yield (
        f"merge_iter=1 is {_difference(_gap(every, reference))} {_name(reference)}, although it merges after every step: "
        "the mean of the heads' steps is less than a step on all their samples. Give each head more samples a step (a larger "
        "batch in the worker, or --accumulate)."
    )


def _compare_intervals(more: Summary, less: Summary) -> Iterator[str]:
    if not _is_behind(less, more):
        return
    yield (
        f"{less.name} is {_difference(_gap(less, more))} {more.name}: the heads drift apart between merges. Merge more often "
        f"(--merge-iter {more.result.arm.merge.merge_iter})."
    )


def _improve_averaging(facts: Facts) -> Iterator[str]:
    if not facts.orthogonalizes:
        how = "use lte_ray.optim.LoRAMuon in build_optimizer()" if facts.builds_optimizer else "--optimizer lora-muon"
        yield (
            f"Averages of LoRA-Muon's steps lose less than those of {' and '.join(_of_heads(facts))}'s: {how}, and leave "
            "--policy out, which then is one that suits it."
        )
    elif facts.policy in OUTER_POLICIES:
        yield f"Tune the outer step (--policy {facts.policy} --help lists its arguments), which can make up for a part of that."
    else:
        yield "An outer step can make up for a part of that: leave --policy out, or give --policy orthogonal or nesterov."


def _of_heads(facts: Facts) -> list[str]:
    return sorted({name for rung, name in facts.optimizers.items() if rung != ORDINARY})


def _about_rates(summaries: Sequence[Summary]) -> Iterator[str]:
    untuned = [s.name for s in summaries if len(s.result.sweep) == 1]
    if untuned:
        of = "No rung's" if len(untuned) == len(summaries) else f"{', '.join(untuned)}: no"
        yield f"{of} rate was tuned, so differences may be due to rates alone: give --rates 0.5 1 2."
    for edge, which, beyond in (("high", "highest", (2, 4)), ("low", "lowest", (0.25, 0.5))):
        at_edge = [s for s in summaries if s.result.edge == edge and math.isfinite(s.mean)]
        if at_edge:
            tried = {rate for s in at_edge for rate in s.result.sweep} | {s.result.rate * by for s in at_edge for by in beyond}
            names = ", ".join(f"{s.name} (x{s.result.rate:g})" for s in at_edge)
            yield (
                f"The best rate of {names} is the {which} that was tried, so a better one may lie beyond it: add --rates "
                f"{' '.join(f'{rate:g}' for rate in sorted(tried))}."
            )
    for s in summaries:
        failed = [rate for rate, arm in s.result.sweep.items() if not math.isfinite(arm.final(s.figure.name))]
        if len(failed) == len(s.result.sweep):
            yield f"{s.name} diverged at every rate that was tried: give lower ones (--rates)."
        elif failed:
            yield f"{s.name} diverged at {', '.join(f'x{rate:g}' for rate in failed)}."


def _about_chance(summaries: Sequence[Summary]) -> Iterator[str]:
    seeds = list(summaries[0].result.best)
    if len(seeds) == 1:
        yield "With one seed, differences of a percent or two may be chance: add --seeds 0 1 2."
        return
    spreads = [s.spread / abs(s.mean) for s in summaries if math.isfinite(s.spread) and s.mean]
    if spreads and max(spreads) > BEHIND / 2:
        yield (
            f"Seeds differ by up to {max(spreads):.1%} (standard deviation) within a rung: smaller differences between rungs "
            "may be chance. Add --seeds."
        )


def _gap(summary: Summary, reference: Summary) -> float:
    return summary.figure.loss_against(summary.mean, reference.mean)


def _is_behind(summary: Summary, reference: Summary) -> bool:
    return math.isfinite(reference.mean) and _gap(summary, reference) > BEHIND


def _difference(behind: float) -> str:
    """``3.1% behind`` or ``1.2% better than`` another, or ``level with`` it."""
    if not math.isfinite(behind):
        return "far behind"
    if abs(behind) < 0.0005:
        return "level with"
    return f"{behind:.1%} behind" if behind > 0 else f"{-behind:.1%} better than"


def _at_rate(summary: Summary) -> str:
    return "" if summary.result.rate == 1 else f" --lr-scale {summary.result.rate:g}"


def _name(summary: Summary) -> str:
    return "ordinary training" if summary.name == ORDINARY else summary.name
