"""What every actor of a run gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lte_ray.engine.settings import Settings
from lte_ray.engine.threads import MOST_REDOING, merge_threads
from lte_ray.layout import Plan
from lte_ray.merging.transfer import Codec, Group
from lte_ray.runtime.package import Package
from lte_ray.runtime.transport import Transport
from lte_ray.storage import RunDirectory


@dataclass(frozen=True)
class Keep:
    """Checkpoints that are kept: the `last` (None: all), and the `best` by an evaluation's figure."""

    last: int | None = None
    best: int = 0
    best_by: str = ""


@dataclass(frozen=True)
class Common:
    """The run's worker, settings and folder, the way tensors travel and in which groups, and which checkpoints are kept.

    `rejoin` says how a head that died begins; `faults` names a script of faults (`points`); `config` is what ``run.toml`` says.
    """

    worker: Package
    settings: Settings
    directory: RunDirectory
    transport: Transport
    groups: tuple[Group, ...]
    keep: Keep = Keep()
    rejoin: str = "merged"
    faults: str | None = None
    config: str = ""

    def threads(self, part: Plan, whole: Plan) -> int:
        """Threads to merge `part` of the `whole` plan with; where heads redo merges, the same everywhere."""
        configured, heads = self.settings.merge.merge_threads, self.settings.lte.num_heads
        if any(group.by_factors for group in self.groups):
            return merge_threads(configured, whole, heads, MOST_REDOING)
        return merge_threads(configured, part, heads)

    def codecs(self, plans: Sequence[Plan]) -> list[Codec]:
        """Each head's codec; heads with equal plans share one."""
        made = {plan: Codec(plan, self.groups, self.settings.merge) for plan in set(plans)}
        return [made[plan] for plan in plans]
