"""What every actor of a run gets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from lte_ray.checkpoint import Manifest, read_head
from lte_ray.engine.settings import Settings
from lte_ray.engine.threads import MOST_REDOING, merge_threads
from lte_ray.layout import Plan
from lte_ray.merging.transfer import Codec, Group
from lte_ray.runtime.package import Package
from lte_ray.runtime.transport import Transport
from lte_ray.storage import RunDirectory


@dataclass(frozen=True)
class Common:
    """The run's worker, settings and folder, the way tensors travel and in which groups, and the checkpoint to go on from."""

    worker: Package
    settings: Settings
    directory: RunDirectory
    transport: Transport
    groups: tuple[Group, ...]
    resume: Manifest | None = None

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

    def saved_heads(self) -> Iterator[tuple[int, int, Tensor | None]]:
        """Of each head in the checkpoint to go on from: its number, its local steps, and its factors that the base holds."""
        if self.resume is None:
            return
        for head in self.resume.heads:
            tensors, meta = read_head(self.directory, self.resume, head)
            yield head, meta["step"], tensors.get("reference")
