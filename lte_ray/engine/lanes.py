"""Heads of one process that train at the same time, in lanes of one thread or a few each.

On CPUs two heads on a core each are faster than one head on both: the threads of one operation wait for each other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Lock

import torch

from lte_ray.engine.head import Head
from lte_ray.engine.rng import drawn
from lte_ray.engine.threads import torch_threads
from lte_ray.messages import Contribution


class Lanes:
    """Trains a round of all heads: the heads of one lane in turn and the lanes at once.

    Batches are read one at a time, each under its head's generators, as in turns. What else runs at once mustn't draw from
    the global generators, since lanes can't have one each. Two rounds, in part in turns, show whether it does, and a third
    whether lanes are faster: they aren't for small models, whose threads wait for Python. If not, all go on in turns, and
    `note` says why. The results don't depend on it, unless something begins to draw after the first round.

    Args:
        lanes: each lane's heads, which share main weights; heads of different lanes don't.
        threads: that torch uses in each lane.
    """

    def __init__(self, lanes: Sequence[Sequence[Head]], threads: int) -> None:
        self._lanes, self._threads = lanes, threads
        self._reading = Lock()
        self._pool = ThreadPoolExecutor(len(lanes), "lane", torch.set_num_threads, (threads,))
        self._rounds, self._alone = 0, 0.0  # seconds of one head's round in turns
        self._fastest_apart = False
        self.note = ""

    def train_round(self) -> list[Contribution]:
        """The contributions of all heads that aren't done, in the order of their numbers.

        Raises:
            WorkerFailed: as `Head.train_round`; the other lanes have ended their round, too.
        """
        heads = sorted((head for lane in self._lanes for head in lane if not head.done), key=lambda head: head.head)
        if self.note:
            return self._in_turns(heads, self._threads if self._fastest_apart else torch.get_num_threads())
        self._rounds += 1
        apart = heads[:2] if self._rounds <= 2 else []  # the first time warms up
        contributions = self._in_turns(apart, self._threads)
        if self.note:
            return contributions + self._in_turns(heads[2:], torch.get_num_threads())
        begun = time.perf_counter()
        contributions += self._at_once(heads[len(apart) :])
        if self._rounds == 3 and time.perf_counter() - begun > self._alone * len(heads):
            self._fastest_apart, self.note = True, "the heads train in turns, which is faster for this model"
        return contributions

    def _in_turns(self, heads: Sequence[Head], threads: int) -> list[Contribution]:
        contributions = []
        with torch_threads(threads):
            for head in heads:
                begun = time.perf_counter()
                contributions.append(head.train_round())
                self._alone = time.perf_counter() - begun
                self._check(head.draws)
        return contributions

    def _at_once(self, heads: Sequence[Head]) -> list[Contribution]:
        if not heads:
            return []
        lanes = [[head for head in lane if head in heads] for lane in self._lanes]
        with drawn(heads[0].device) as changed:
            futures = [self._pool.submit(self._train, lane) for lane in lanes]
            wait(futures)
            self._check(changed())
        return sorted((c for future in futures for c in future.result()), key=lambda c: c.head)

    def _check(self, drew: bool) -> None:
        if drew:
            self.note = "the heads train in turns, since computing the loss draws random numbers"

    def _train(self, heads: Sequence[Head]) -> list[Contribution]:
        return [head.train_round(self._read, 1 / len(self._lanes)) for head in heads]

    @contextmanager
    def _read(self, head: Head) -> Iterator[None]:
        with self._reading, head.rng.swapped_in():
            yield
