"""What leads a head's process to the newest version."""

from __future__ import annotations

from lte_ray.engine.coordinator import Coordinator
from lte_ray.engine.downlink import Downlink
from lte_ray.messages import Update
from lte_ray.runtime.publisher import Masters, Published, Publisher
from lte_ray.runtime.records import Records


class Updates:
    """Makes the coordinator's answers to heads, without a verdict.

    Args:
        engine: gives the newest version, and what each head is to do.
        masters: publish the base.
        downlink: the merges that heads can redo.
        records: has the newest checksum.
        groups: how many there are.
    """

    def __init__(self, engine: Coordinator, masters: Masters, downlink: Downlink, records: Records, groups: int) -> None:
        self._engine, self._downlink, self._records, self._groups = engine, downlink, records, range(groups)
        self._publisher = Publisher(masters, lambda: engine.version)

    async def since(self, numbers: tuple[int, ...], have: int) -> Update:
        """What leads a process with these heads from version `have` (-1: from nothing) to the newest."""
        published, chain = Published(self._engine.version), self._downlink.chain(have)
        if chain is not None:
            published = await self._publisher.newest(self._downlink.dense, references=False)
            chain = self._downlink.chain(have)  # merges go on while parts are published
        if chain is None:
            published = await self._publisher.newest(self._groups, references=self._downlink.factored)
        version, engine = published.version, self._engine
        return Update(
            None,
            version,
            published.parts,
            tuple(merged for merged in chain or () if merged.version <= version),
            published.references,
            accepted={n: v.sequence for n in numbers if (v := engine.accepted.get(n)) is not None and v.version <= version},
            orders={n: engine.order(n) for n in numbers},
            checksum=self._records.checksum,
        )
