"""Heads of one process that train at the same time, in lanes of one thread or a few each.

On CPUs two heads on a core each are faster than one head on both: the threads of one operation wait for each other.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Lock

import torch

from lte_ray.engine.head import Head
from lte_ray.engine.rng import drawn
from lte_ray.engine.threads import torch_threads


class Lanes:
    """Takes local steps of all heads: the heads of one lane in turn and the lanes at once.

    Batches are read one at a time, each under its head's generators, as in turns. What else runs at once mustn't draw from
    the global generators, since lanes can't have one each. Two calls, in part in turns, show whether it does, and a third
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
        self._rounds, self._alone = 0, 0.0  # seconds of one head's step in turns
        self._fastest_apart = False
        self.note = ""

    def train(self, todo: Mapping[Head, int]) -> None:
        """Takes each head's local steps.

        Raises:
            WorkerFailed: as `Head.train`; the other lanes have taken their steps, too.
        """
        if self.note:
            self._in_turns(todo, self._threads if self._fastest_apart else torch.get_num_threads())
            return
        self._rounds += 1
        apart = dict(list(todo.items())[:2] if self._rounds <= 2 else [])  # the first time warms up
        rest = {head: steps for head, steps in todo.items() if head not in apart}
        self._in_turns(apart, self._threads)
        if self.note:
            self._in_turns(rest, torch.get_num_threads())
            return
        begun = time.perf_counter()
        self._at_once(rest)
        if self._rounds == 3 and time.perf_counter() - begun > self._alone * sum(rest.values()):
            self._fastest_apart, self.note = True, "the heads train in turns, which is faster for this model"

    def _in_turns(self, todo: Mapping[Head, int], threads: int) -> None:
        with torch_threads(threads):
            for head, steps in todo.items():
                begun = time.perf_counter()
                head.train(steps)
                self._alone = (time.perf_counter() - begun) / steps
                self._check(head.draws)

    def _at_once(self, todo: Mapping[Head, int]) -> None:
        if not todo:
            return
        with drawn(next(iter(todo)).device) as changed:
            futures = [self._pool.submit(self._train, {h: todo[h] for h in lane if h in todo}) for lane in self._lanes]
            wait(futures)
            self._check(changed())
        for future in futures:
            future.result()

    def _check(self, drew: bool) -> None:
        if drew:
            self.note = "the heads train in turns, since computing the loss draws random numbers"

    def _train(self, todo: Mapping[Head, int]) -> None:
        for head, steps in todo.items():
            head.train(steps, self._read, 1 / len(self._lanes))

    @contextmanager
    def _read(self, head: Head) -> Iterator[None]:
        with self._reading, head.rng.swapped_in():
            yield
