"""What leads a head's process to the newest version."""

from __future__ import annotations

from lte_ray.engine.coordinator import Coordinator
from lte_ray.engine.downlink import Downlink
from lte_ray.messages import Update
from lte_ray.runtime.cuts import Cuts
from lte_ray.runtime.publisher import Masters, Publisher, known
from lte_ray.runtime.records import Records
from lte_ray.runtime.transport import Handle


class Updates:
    """Makes the coordinator's answers to heads, without a verdict.

    Args:
        engine: gives the newest version, and what each head is to do.
        masters: publish the base.
        downlink: the merges that heads can redo.
        records: has the newest checksum.
        cuts: the checkpoints that are being made, which heads are told of.
        groups: how many there are.
    """

    def __init__(
        self, engine: Coordinator, masters: Masters, downlink: Downlink, records: Records, cuts: Cuts, groups: int
    ) -> None:
        self._engine, self._downlink, self._records, self._cuts = engine, downlink, records, cuts
        self._groups, self._masters = range(groups), masters
        self._publisher = Publisher(masters, engine)

    async def reference(self, head: int) -> Handle | None:
        """The factors that the newest version holds of this head."""
        return (await self._masters.parts(self._groups, references=True)).references.get(head)

    async def since(self, numbers: tuple[int, ...], have: int) -> Update:
        """What leads a process with these heads from version `have` (-1: from nothing) to the newest."""
        published, chain = known(self._engine), self._downlink.chain(have)
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
            held=published.held,
            ledger=published.ledger,
            saves=self._cuts.wanted(numbers),
            orders={n: engine.order(n) for n in numbers},
            checksum=self._records.checksum,
        )
