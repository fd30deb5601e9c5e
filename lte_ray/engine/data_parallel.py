"""Ordinary training in several processes: each computes the gradients of its share of every step's batches.

All processes hold the same weights and the same optimizer's state. Before each optimizer step they average their gradients, so
each takes the step that one process with all batches would take, up to rounding. Each also merges for itself, as a run in one
process does: the contributions are equal, and so are the results. Only what the process doesn't have yet is exchanged.

Gradients are averaged by one all-reduce of all of them, flattened, and not by torch's DistributedDataParallel. That wraps the
model, which the worker's `loss` then can't use as it built it. It also communicates in each backward pass, where a step
accumulates the gradients of several batches, and must be told which parameters get none. The price is that communication
doesn't overlap the last backward pass.
"""

from __future__ import annotations

import json
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from lte_ray.engine.coordinator.coordinator import Coordinator
from lte_ray.engine.head.batch_stream import BatchStream
from lte_ray.engine.head.head import Head
from lte_ray.engine.head.loss import Sums
from lte_ray.engine.head.rng import Generators, head_seed
from lte_ray.engine.head.snapshot import SavedState, rejoin, restore
from lte_ray.engine.settings import Settings
from lte_ray.errors import ContributionRefused
from lte_ray.messages import MergeRecord
from lte_ray.worker import Worker

AllReduce = Callable[[Tensor], None]
"""Replaces a tensor by its sum over all processes, in each of them."""


class TrainingProcess:
    """One process of ordinary training.

    Args:
        worker: the user's program.
        settings: of the run, resolved: with one head, which `baseline_processes` processes train.
        coordinator: the version to start from. It is this process's own.
        rank: of this process, from 0.
        all_reduce: sums over the processes.
        device: where the process trains.
        dtype: of the weights that are merged, as for `Head`.

    Attributes:
        head: the model, the optimizer and the position in the data. Its samples count those of all processes once a round
            ends.
        stop_requested: asked at the end of each round; if it returns true in any process, all of them stop.
        stopped: whether they do.
    """

    def __init__(
        self,
        worker: Worker,
        settings: Settings,
        coordinator: Coordinator,
        rank: int,
        all_reduce: AllReduce,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        train, self._processes = settings.train, settings.train.baseline_processes
        share = replace(train, accumulate=train.accumulate // self._processes, baseline_processes=1)
        self._coordinator, self._rank, self._all_reduce = coordinator, rank, all_reduce
        self.head = head = Head(worker, replace(settings, train=share), 0, device=device, dtype=dtype)
        head.batch_stream = BatchStream(worker, 0, 1, train.seed, (rank, self._processes))
        head.average_gradients = self._average_gradients
        numbered = [(zlib.crc32(gpu.encode()), peak) for gpu, peak in head.meter.peaks.items()] or [(0, 0.0)]
        self._own_gpu = [float(value) if n == rank else 0.0 for value in numbered[0] for n in range(self._processes)]
        self.stop_requested: Callable[[], bool] = lambda: False
        self.stopped = False

    def start(self, saved: SavedState | None = None) -> None:
        """Starts from the coordinator's version.

        Args:
            saved: the head's state in the checkpoint of that version, whichever number of processes wrote it. Without it
                the head starts from what the version holds of it.

        Raises:
            StorageError: the saved state isn't one of this model.
        """
        head, coordinator = self.head, self._coordinator
        coordinator.join(0, 0)
        base = coordinator.base.clone()
        if saved is not None:
            restore(head, saved, base)
        else:
            rejoin(head, coordinator.start_head(0), None, coordinator.version, base, None)
        if self._rank:  # else all processes would draw the same masks; the first one draws what a single process would
            seed = head_seed(head.settings.train.seed, self._rank, coordinator.version)
            head.rng = Generators(seed, head.device)
        head.apply_directive(coordinator.next_directive(0))

    @property
    def done(self) -> bool:
        """Whether nothing is left to train."""
        return self.stopped or self.head.finished

    def train_round(self) -> tuple[MergeRecord, ...]:
        """Takes the steps of one round together with the other processes, and hands over the weights.

        Raises:
            WorkerFailed: the worker's code raised.
            ContributionRefused: the weights diverged again and again.
            RuntimeError: another process is gone.
        """
        head, coordinator = self.head, self._coordinator
        before = head.samples
        head.train(head.round_steps - head.steps_since_contribution)
        self._combine(before)
        contribution = head.contribute()
        assert contribution.buffer is not None
        event = coordinator.receive(contribution, contribution.buffer.to("cpu"))
        base = coordinator.base.clone() if event.merges else None
        for result in event.results:
            head.adopt(result, coordinator.version, base)
            if result.quarantined:
                raise ContributionRefused(
                    f"The weights were refused again and again: {result.reason}. If the loss diverged, lower the learning rate."
                )
        return event.merges

    @torch.no_grad()
    def _average_gradients(self) -> None:
        """Averages the gradients over the processes. A parameter without one counts as 0, unless no process has one."""
        by_type: defaultdict[tuple[torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        for group in self.head.optimizer.param_groups:
            for parameter in group["params"]:
                by_type[parameter.dtype, parameter.device].append(parameter)
        for (dtype, device), parameters in by_type.items():
            present = [p.grad is not None for p in parameters]
            flags = torch.tensor(present, dtype=dtype, device=device)
            flat = torch.cat([*(_flat_gradient(p) for p in parameters), flags])
            self._all_reduce(flat)
            flat /= self._processes
            if not all(present):  # only then: reading them waits for the device
                present = [flag > 0 for flag in flat[-len(parameters) :].tolist()]
            gradients = torch.split(flat, [*(p.numel() for p in parameters), len(parameters)])
            for parameter, gradient, anywhere in zip(parameters, gradients, present, strict=False):
                if anywhere:
                    parameter.grad = gradient.view_as(parameter)

    @torch.no_grad()
    def _combine(self, before: int) -> None:
        """Makes equal what the processes have counted apart: losses, the worker's figures, samples and running statistics.

        Also shares a wish to stop.

        Args:
            before: the samples when the round began.
        """
        head, state = self.head, self.head.state
        sums = state.figures.sums()
        names = json.dumps(sorted(sums)).encode() if sums else b""
        lengths = [float(len(names)) if rank == self._rank else 0.0 for rank in range(self._processes)]
        counts = [float(head.samples - before), float(self.stop_requested()), *lengths, *self._own_gpu]
        numbers = torch.tensor(counts, dtype=torch.float64, device=head.device)
        if state.losses:
            numbers = torch.cat([numbers, torch.stack(state.losses).double()])
        self._all_reduce(numbers)
        samples, stop, *rest = numbers[: len(counts)].tolist()
        lengths, ids, peaks = (rest[n : n + self._processes] for n in range(0, 3 * self._processes, self._processes))
        head.meter.peaks = {f"{number:.0f}": peak for number, peak in zip(ids, peaks, strict=True) if peak}
        state.samples, self.stopped = before + round(samples), stop > 0
        state.losses = list(numbers[len(counts) :] / self._processes)
        if any(lengths):
            state.figures.load(self._sum_figures(sums, names, [round(length) for length in lengths]))
        for statistics in state.replicas.values():
            if statistics.is_floating_point() and not isinstance(statistics, nn.Parameter):
                self._all_reduce(statistics)
                statistics.div_(self._processes)

    def _sum_figures(self, sums: Sums, names: bytes, lengths: list[int]) -> Sums:
        """The sums of the worker's figures over all processes, which may have figures of different names.

        Args:
            sums: this process's.
            names: their names as a JSON list; empty if there are none.
            lengths: of each process's names, in bytes.
        """
        texts = [torch.zeros(length, dtype=torch.int32) for length in lengths]
        texts[self._rank] += torch.tensor(list(names), dtype=torch.int32)
        flat = torch.cat(texts).to(self.head.device)
        self._all_reduce(flat)
        everywhere = [json.loads(bytes(part.tolist())) for part in torch.split(flat.cpu(), lengths) if len(part)]
        union = sorted({name for each in everywhere for name in each})
        own = [sums.get(name, (0.0, 0)) for name in union]
        totals = torch.tensor(own, dtype=torch.float64, device=self.head.device)
        self._all_reduce(totals)
        return {name: (total, round(count)) for name, (total, count) in zip(union, totals.tolist(), strict=True)}


def _flat_gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter).flatten()
    gradient = parameter.grad
    return (gradient.to_dense() if gradient.is_sparse else gradient).flatten()
