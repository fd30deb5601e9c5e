"""Results of ladders made up for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.ladder import Arm, ArmResult, Figure, Point, RungResult, Summary, summarize
from lte_ray.ladder.rungs import MHLORA, ORDINARY

LOSS = Figure("loss")
HALF, ONE, DOUBLE = 0.5, 1.0, 2.0


def make_arm(rung: str = "merge_iter=10", heads: int = 2) -> Arm:
    """Returns an arm of a rung, whose merge_iter is in its name."""
    merge_iter = int(rung.partition("=")[2] or 1)
    train = TrainConfig(steps=100, baseline=rung == ORDINARY)
    mode = "mhlora" if rung == MHLORA else "heads"
    return Arm(rung, LTEConfig(num_heads=heads), MergeConfig(merge_iter=merge_iter), train, mode=mode)  # type: ignore[arg-type]


def make_result(arm: Arm, values: Sequence[float], sent: int = 0, ddp: int = 8000, failed: str = "") -> ArmResult:
    """Returns a result with a loss after every 50 samples."""
    points = tuple(Point(10 * n, 50 * n, {"loss": value}) for n, value in enumerate(values, 1))
    return ArmResult(arm.key, arm.rung, arm.rate, arm.seed, points, 65.0, sent, ddp, failed)


def make_rung(
    rung: str,
    final: float | Sequence[float],
    *,
    best: float = ONE,
    sweep: Mapping[float, float] | None = None,
    heads: int = 2,
    sent: int = 0,
) -> RungResult:
    """Returns a rung whose loss halves to `final` (one for each seed) over four evaluations.

    Args:
        sweep: the loss at the other rates.
    """
    finals = [final] if isinstance(final, int | float) else list(final)
    arm = make_arm(rung, heads)
    curves = {s: [8 * f, 4 * f, 2 * f, f] for s, f in enumerate(finals)}
    by_seed = {s: make_result(arm.with_rate(best, s), curve, sent) for s, curve in curves.items()}
    others = {HALF: finals[0] * 1.1, DOUBLE: finals[0] * 1.1} if sweep is None else sweep
    results = {rate: make_result(arm.with_rate(rate, 0), [value]) for rate, value in others.items()}
    return RungResult(arm, dict(sorted((results | {best: by_seed[0]}).items())), by_seed, best)


def make_summaries(*rungs: RungResult, figure: Figure = LOSS) -> list[Summary]:
    """Returns the rungs' summaries."""
    return summarize(rungs, figure)
