"""One LoRA head: trains alone, offers what it learned, and rebases onto newer main weights.

It owns its model (with its own copy of the main weights), factors, optimizer, data cursor and generators. It knows
neither Ray nor other heads; whoever drives it carries contributions and bases to and fro (see `engine.simulate`).
"""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lte_ray.adapters.convert import convert, share_frozen
from lte_ray.adapters.effective_parameter import computing
from lte_ray.adapters.quantization import check_format
from lte_ray.engine.head.batch_stream import BatchStream
from lte_ray.engine.head.main_weights import MainWeights
from lte_ray.engine.head.optimization import OptimizerStep, autocast, build_optimizer, check_loss, checkpoint_activations
from lte_ray.engine.head.optimizer_state import user_buffers
from lte_ray.engine.head.rng import Generators, head_seed, watch_draws
from lte_ray.engine.settings import Settings
from lte_ray.errors import LTEError, WorkerFailed
from lte_ray.merging.flat_buffer import base_replicas, factor_views, factors_part, gather, replica_part, replica_views
from lte_ray.merging.low_rank import Share, squared_norm
from lte_ray.messages import CommittedPosition, Contribution, ContributionResult, HeadDirective, HeadStatus, HeadTimes
from lte_ray.worker import Batch, Worker, build_model, count_samples, to_device

if TYPE_CHECKING:
    from lte_ray.transfer.codec import Codec


def _fingerprint(tensor: Tensor) -> Tensor:
    """Two numbers that any change of a tensor is all but sure to change."""
    exact = tensor.detach().double()
    return torch.stack([exact.sum(), exact.square().sum()])


class Head:
    """One head of a run.

    Args:
        worker: the user's program.
        settings: the run's settings.
        head: this head's number, 0 to num_heads - 1.
        device: where it trains.
        dtype: of all that is merged; float64 in tests, float32 in runs.
        incarnation: how often this head was started before.
        hold: keep the main weights as they are in the base, and compute the reference beside them, so that heads that
            share them can be computed at once.
        share: a head whose main weights this one uses, too. Without `hold` they take turns: each folds its reference into
            them before it trains a round, so `adopt` and `train_round` leave them to whoever comes next.
        alone: whether no other head will share this one's main weights.
    """

    def __init__(
        self,
        worker: Worker,
        settings: Settings,
        number: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        incarnation: int = 0,
        separate_reference: bool = False,
        share_weights: Head | None = None,
        alone: bool = True,
    ) -> None:
        self.number, self.settings, self.incarnation = number, settings, incarnation
        self.device, self.dtype = torch.device(device), dtype
        self.version = self.step = self.samples = self.sequence = 0
        self.loss_draws = False  # whether the loss drew from the global generators in the first round here
        self._watched = self._unwanted = False
        self.interrupted: Callable[[], bool] = lambda: False
        """Asked before every step of a round; whether to leave the rest of it for later."""
        self._worker = worker
        self.batch_stream = BatchStream(worker, number, settings.lte.num_heads, settings.train.seed)
        self._since = self._offered = CommittedPosition(
            incarnation, lanes=self.batch_stream.partitions
        )  # at the last merged, and the last made
        self._limit, self._final, self._rate = settings.train.steps, True, 1.0
        self._granted = 0  # the highest limit that the coordinator has given
        self._noted = (time.perf_counter(), 0.0)  # when the last contribution was made, and the seconds stalled until then
        self._losses: list[Tensor] = []  # of the steps since the last contribution
        self._loss = float("nan")
        self._state, self._times = "starting", HeadTimes()
        self._first_step_at: float | None = None
        self._last_step_at: float | None = None
        self.rng = Generators(head_seed(settings.train.seed, number), self.device)
        with self.rng.swapped_in(), self.worker_errors(None):
            self.converted = convert(
                build_model(worker, settings.train.seed),
                settings.lte,
                seed=settings.train.seed,
                head=number,
                hold=separate_reference,
            )
            # The model is built under the run's seed; what the head draws from here on is its own.
            self.model, self.plan = self.converted.model.to(self.device).train(), self.converted.plan
            for base_dtype in {spec.base_dtype for spec in self.plan.adapted} if self.device.type != "cpu" else ():
                check_format(base_dtype, self.device)  # the driver has tried it on its CPU
            if share_weights is not None:
                share_frozen(self.converted, share_weights.converted)
            self._weights: MainWeights = MainWeights(
                self.converted, None if share_weights is None else share_weights._weights, alone
            )
            checkpoint_activations(self.model, settings.train.checkpoint_activations)
            if settings.train.compile:
                self.model.compile()
        self.rng = Generators(head_seed(settings.train.seed, number, incarnation), self.device)
        tensors = self.converted.tensors()
        self._factors = self.converted.factors
        self._replicas = {r.name: tensors[r.name] for r in self.plan.replicas}
        self._reference: Tensor | None = None  # factors that the base already holds of this head; None where B' = 0
        self._replica_reference: Tensor | None = None  # replica parameters of the adopted base
        self._outstanding: Tensor | None = None  # what was offered and not yet answered
        # Each A as it was merged last, or begun with, where no reference says so: to go back to when A is poisoned.
        self._sound = {spec.a: self._factors[spec.a].detach().to("cpu", copy=True) for spec in self.plan.adapted}
        with self.worker_errors(None):
            self.optimizer, self.schedule = build_optimizer(
                worker, self.plan, {**self._factors, **self._replicas}, settings.train.steps
            )
        self.optimizer_step = OptimizerStep(self.optimizer, self.schedule, settings.train, self.device)
        self._frozen: dict[str, Tensor] = {}

    # -- training ------------------------------------------------------------------------------------------------

    def start(self, version: int, base: Tensor, ahead: Mapping[str, Tensor] | None = None) -> None:
        """Adopts the first base (flat, in the plan's base layout) before any step is taken.

        Args:
            version: of `base`.
            base: the main weights and replicas.
            ahead: what the head has trained of its replicas that the base doesn't hold, where it goes on from elsewhere.
        """
        self._rebase(version, base, contained=None, ahead=ahead)
        self._state = "training"
        self._noted = (time.perf_counter(), self._times.stalled)

    def mark_done(self) -> None:
        """Notes that this head won't train any more."""
        self._state = "done"

    @property
    def done(self) -> bool:
        """Whether all local steps were taken."""
        return self._final and self.steps_left == 0

    def apply_directive(self, directive: HeadDirective) -> None:
        """Takes the coordinator's word on how many steps there are, and where the learning-rate schedule stands."""
        if directive.limit >= self._granted:  # else it is an older one, overtaken by another answer
            self._limit, self._final, self._granted = directive.limit, directive.final, directive.limit
        self._rate = directive.rate
        self.optimizer_step.advance_to(directive.progress)
        self.batch_stream.apply_assignments(directive.assignments, directive.revocation)

    def train_round(self) -> Contribution:
        """Takes `merge_iter` local steps (fewer at the end of the run) and makes the contribution.

        Raises:
            WorkerFailed: the worker's code raised; names the head and the step.
        """
        self.train(self.settings.merge.merge_iter)
        return self.contribute()

    def train(
        self, steps: int, read_context: Callable[[Head], AbstractContextManager[None]] | None = None, share: float = 1.0
    ) -> None:
        """Takes local steps, fewer at the end of the run.

        Args:
            steps: how many.
            reading: where heads train at the same time: what each batch is read in, this head's generators included, which
                are otherwise swapped in for the whole round.
            share: of the time that is counted as this head's.

        Raises:
            WorkerFailed: the worker's code raised; names the head and the step.
        """
        self.prepare_to_train()
        with nullcontext() if read_context else self.rng.swapped_in(), self.timed("train", share):
            for _ in range(min(steps, self.steps_left)):
                if self.interrupted():
                    break
                self.record_loss(self._train_step(read_context))

    def prepare_to_train(self) -> None:
        """Before steps are taken: puts this head's main weights in place, where heads share them."""
        if self._weights.takes_turns:
            self._weights.load(self._reference, {})
        self._frozen = self._frozen or {name: _fingerprint(p) for name, p in self.converted.frozen.items()}
        self._state = "training"

    @property
    def steps_left(self) -> int:
        """Local steps that it may take."""
        return max(0, self._limit - self.step)

    def record_loss(self, loss: Tensor) -> None:
        """Counts a step's loss towards the next contribution's mean."""
        self._losses.append(loss)

    def _train_step(self, reading: Callable[[Head], AbstractContextManager[None]] | None) -> Tensor:
        losses = []
        with self.worker_errors(self.step + 1):
            for _ in range(self.settings.train.accumulate):
                with reading(self) if reading else nullcontext():
                    batch = self.next_batch()
                losses.append(self.backward(batch))
            self.finish_step()
        return torch.stack(losses).mean()

    def next_batch(self) -> Batch:
        """The next batch of this head's shard, on its device."""
        batch = to_device(self.batch_stream.next_batch(), self.device)
        self.samples += count_samples(batch)
        return batch

    def backward(self, batch: Batch) -> Tensor:
        """Adds the batch's gradient to what there is; gives its loss."""
        if self._watched:
            return self._backward(batch)
        with watch_draws(self.device) as changed:
            loss = self._backward(batch)
            self.loss_draws = self.loss_draws or changed()
        return loss

    def _backward(self, batch: Batch) -> Tensor:
        with autocast(self.settings.train, self.device), computing():
            loss = check_loss(self._worker.loss(self.model, batch))
        torch.autograd.backward(self.optimizer_step.scale_loss(loss))
        return loss.detach()

    def finish_step(self) -> None:
        """Takes the optimizer's and the schedule's step with the gradients that are there."""
        self.optimizer_step.step(self._rate)
        self.step += 1
        self._last_step_at = time.time()
        if self._first_step_at is None:
            self._first_step_at = self._last_step_at

    @property
    def steps_since_contribution(self) -> int:
        """Local steps since the last contribution was made."""
        return self.step - self._offered.step

    @property
    def position(self) -> CommittedPosition:
        """Where the head is: what it would stand at, if all were merged that it has trained."""
        feed = self.batch_stream
        return CommittedPosition(
            self.incarnation, self.sequence, self.version, self.step, self.samples, feed.batches_taken, feed.partitions
        )

    @property
    def contributed(self) -> Tensor:
        """What receivers make of the outstanding contribution, flat; never written to."""
        assert self._outstanding is not None
        return self._outstanding

    @property
    def reference(self) -> Tensor | None:
        """The factors that the adopted base holds of this head, flat; None where B' = 0."""
        return self._reference

    @property
    def step_limit(self) -> int:
        """The step up to which it may go."""
        return self._limit

    @property
    def merged_position(self) -> CommittedPosition:
        """Where the last merged contribution, of which this head knows, has left it."""
        return self._since

    @property
    def finished(self) -> bool:
        """Whether all local steps were taken, and merged unless the policy discarded the last of them."""
        settled = self._since.step == self.step or (self._unwanted and self._offered.step == self.step)
        return self.done and self._outstanding is None and settled

    @property
    def outstanding(self) -> bool:
        """Whether a contribution was made that isn't answered yet."""
        return self._outstanding is not None

    def contribute(self) -> Contribution:
        """Makes the contribution of the steps taken since the last one.

        Its `buffer` is a flat tensor on the head's device that is never written again; `encode` makes of it what travels.
        """
        assert self._outstanding is None, "a head has at most one contribution outstanding"
        with self.timed("train"):  # until now the device may be at work
            if self._losses:
                self._loss = float(torch.stack(self._losses).double().mean())
        self._losses = []
        self._watched = True
        if self.sequence == 0:
            self._check_frozen()
        self.sequence += 1  # before it is outstanding: another thread may ask whether this one was accepted
        with self.timed("publish"):
            parts = {**self._factors, **self._replica_change()}
            self._outstanding = gather(self.plan.contribution, parts, self.dtype, self.device)
        self._offered = self.position
        before, stalled = self._noted
        self._noted = (time.perf_counter(), self._times.stalled)
        return Contribution(
            run=self.settings.run,
            head=self.number,
            incarnation=self.incarnation,
            sequence=self.sequence,
            version=self.version,
            step=self.step,
            steps=self.step - self._since.step,
            samples=self.samples - self._since.samples,
            loss=self._loss,
            base_error=self._weights.quantization_error,
            seconds=max(0.0, self._noted[0] - before - (self._noted[1] - stalled)),
            stall=self._noted[1] - stalled,
            batches=self.batch_stream.batches_taken,
            partitions=self.batch_stream.partitions,
            assignment_id=self.batch_stream.assignment_id,
            revoked=self.batch_stream.revoked,
            buffer=self._outstanding,
        )

    def encode(self, contribution: Contribution, codec: Codec) -> Contribution:
        """The contribution as it travels: `buffer` is then one buffer for each group of layers, in the transfer format.

        From here on what the receivers will decode counts as contributed, so that what rounding left out rides in the next.
        May run beside training, in another thread.
        """
        assert self._outstanding is not None
        buffers, self._outstanding = codec.encode(self._outstanding, self._reference)
        norm = None
        if self.settings.merge.max_norm_z:  # computed here, where it costs the coordinator nothing
            norm = math.sqrt(squared_norm(Share(1.0, self.plan, self._outstanding, self._reference)))
        return replace(contribution, buffer=buffers, norm=norm)

    def _check_frozen(self) -> None:
        """Raises WorkerFailed if the model writes to parameters that don't train: they are neither merged nor saved."""
        written = [name for name, p in self.converted.frozen.items() if not torch.equal(_fingerprint(p), self._frozen[name])]
        if written:
            reason = (
                f"the model writes to {', '.join(written[:8])}{', ...' if len(written) > 8 else ''}, parameters that don't "
                "train (requires_grad=False), which are neither saved nor a head's own. Make them buffers (register_buffer)."
            )
            raise WorkerFailed(f"head {self.number}", self.step, reason)

    def _replica_change(self) -> dict[str, Tensor]:
        """delta = p - p' of each replica parameter: what was trained since the adopted base."""
        assert self._replica_reference is not None, "start() comes first"
        before = replica_views(self.plan, self._replica_reference)
        return {name: p.detach().to(self.dtype) - before[name] for name, p in self._replicas.items()}

    # -- rebasing ------------------------------------------------------------------------------------------------

    def adopt(
        self, verdict: ContributionResult | None, version: int, base: Tensor | None, staged: Mapping[str, Tensor] | None = None
    ) -> None:
        """Takes the answer to the outstanding contribution and rebases onto `base`, losing no step (DESIGN 3.4, 3.6).

        At any time between two steps; steps taken since the contribution stay in the factors and replicas.

        Accepted: the reference becomes the contributed factors, A', B' := A^c, B^c. Refused: the reference stays, so
        that the progress rides in the next contribution; or it is dropped if it was poison (`rewind`). Then
        W~ := W_v - s B' A' and p := P_v + (p - what v holds).

        Args:
            verdict: of the outstanding contribution; None if `base` is newer but doesn't settle it, or there is none.
            version: of `base`.
            base: flat, in the base layout; None if the head has that version already. Heads that take turns keep it until
                the next, so nobody may write to it.
            staged: what `stage` made of it.
        """
        with self.timed("rebase"):
            contained = None
            if verdict is not None:
                assert verdict.sequence == self.sequence and self._outstanding is not None
                offered, self._outstanding = self._outstanding, None
                self._unwanted = verdict.discarded
                if verdict.accepted:
                    assert base is not None
                    contained, self._since = offered, self._offered
                if verdict.harmful:
                    self.rewind()
            if base is not None:
                self._rebase(version, base, contained, staged or {})

    def stage(self, base: Tensor, accepted: bool) -> dict[str, Tensor]:
        """The main weights that `adopt` will put in place, computed ahead; may run beside training, in another thread.

        Args:
            base: that is to be adopted.
            accepted: whether it holds the outstanding contribution.

        Returns:
            Weights by name; none for those that are quantised, or shared with other heads of the process.
        """
        reference = self._reference
        if accepted:
            assert self._outstanding is not None
            reference = factors_part(self.plan, self._outstanding)
        return self._weights.stage(base, reference)

    def catch_up(self) -> None:
        """Rebases onto the newest version that a head which shares the main weights has adopted meanwhile."""
        newest, base = self._weights.newest_base
        if self.version < newest:
            assert base is not None and self._outstanding is None
            with self.timed("rebase"):
                self._rebase(newest, base, contained=None)

    @torch.no_grad()
    def _rebase(
        self,
        version: int,
        base: Tensor,
        contained: Tensor | None,
        staged: Mapping[str, Tensor] | None = None,
        ahead: Mapping[str, Tensor] | None = None,
    ) -> None:
        ahead = self._steps_beyond(contained) if ahead is None else ahead
        if contained is not None:
            self._take_reference(contained)
        self._weights.set_base(version, base)
        if not self._weights.takes_turns:
            self._weights.load(self._reference, staged or {})
        self._replica_reference = base_replicas(self.plan, base).to(self.device, copy=True)
        self._move_replicas(ahead)
        self.version = version

    @torch.no_grad()
    def _move_replicas(self, ahead: Mapping[str, Tensor]) -> None:
        """p := p' + what the base doesn't hold of it (nothing if `ahead` is empty)."""
        assert self._replica_reference is not None
        before = replica_views(self.plan, self._replica_reference)
        for name, tensor in self._replicas.items():
            tensor.copy_(before[name] + ahead[name] if ahead else before[name])
            if tensor.dtype != self.dtype:  # p' is what this head really adopted, rounded; else every merge counts the rounding
                before[name].copy_(tensor.to(self.dtype) - ahead[name] if ahead else tensor)

    def _steps_beyond(self, contained: Tensor | None) -> dict[str, Tensor]:
        """Replica changes that the new base doesn't hold: p - p', less what was contributed; empty before the start."""
        if self._replica_reference is None:
            return {}
        change = self._replica_change()
        if contained is not None:
            for name, held in replica_views(self.plan, replica_part(self.plan, contained)).items():
                change[name] -= held
        return change

    def _take_reference(self, contained: Tensor) -> None:
        """A', B' := A^c, B^c, or B := 0 in the reset variant (which needs that no step was taken meanwhile)."""
        if self.settings.lte.reset == "B":
            self._reference, merged = None, factor_views(self.plan, factors_part(self.plan, contained))
            for spec in self.plan.adapted:
                self._factors[spec.b].zero_()
                self._sound[spec.a] = merged[spec.a]
        else:
            self._reference, self._sound = factors_part(self.plan, contained), {}

    # -- what others may ask ---------------------------------------------------------------------------------------

    def status(self) -> HeadStatus:
        """The head's progress; safe to call from another thread."""
        return HeadStatus(
            head=self.number,
            step=self.step,
            samples=self.samples,
            loss=self._loss,
            version=self.version,
            state=self._state,
            device=str(self.device),
            times=self._times,
            first_step_at=self._first_step_at,
            last_step_at=self._last_step_at,
        )

    @contextmanager
    def timed(self, part: str, share: float = 1.0) -> Iterator[None]:
        """Counts the block's time, or a share of it, as `part` of `HeadTimes`, and shows it as the head's state."""
        begun = time.perf_counter()
        self._state = {"train": "training", "wait": "waiting"}.get(part, part)
        try:
            yield
        finally:
            spent = getattr(self._times, part) + share * (time.perf_counter() - begun)
            self._times = replace(self._times, **{part: spent})

    # -- from elsewhere ----------------------------------------------------------------------------------------------

    def resume(self, position: CommittedPosition, reference: Tensor | None) -> None:
        """Before `start`: takes over what a base holds of this head, as its position and as its factors.

        What it contributes from there on is what it trains from there on. Without a reference B is zero.
        """
        self.step, self.samples, self.sequence = position.step, position.samples, position.sequence
        self._since = self._offered = replace(position, incarnation=self.incarnation)
        self._reference = None if reference is None else reference.to(self.device)
        self._reset_factors()

    @torch.no_grad()
    def rewind(self) -> None:
        """Drops all that was trained since the last merged contribution, the optimizer's state included; the data goes on."""
        assert self._outstanding is None and self._replica_reference is not None
        self._reset_factors()
        for name, value in self._sound.items() if self._reference is None else ():
            self._factors[name].copy_(value)
        for name, value in replica_views(self.plan, self._replica_reference).items():
            self._replicas[name].copy_(value)
        self.optimizer.state.clear()
        self._losses = []
        self._since = self._offered = replace(self.position, sequence=self._since.sequence)

    @torch.no_grad()
    def _reset_factors(self) -> None:
        """A, B := A', B'; without a reference B := 0, and A stays."""
        if self._reference is not None:
            for name, value in factor_views(self.plan, self._reference).items():
                self._factors[name].copy_(value)
            return
        for spec in self.plan.adapted:
            self._factors[spec.b].zero_()

    def local_buffers(self) -> list[tuple[str, Tensor]]:
        """The model's own buffers that aren't merged."""
        return [(name, b) for name, b in user_buffers(self.model) if name not in self._replicas]

    @contextmanager
    def worker_errors(self, step: int | None) -> Iterator[None]:
        """Turns what the worker's code raises into an error that names the head and the step."""
        try:
            yield
        except WorkerFailed:
            raise
        except LTEError as error:
            raise WorkerFailed(f"head {self.number}", step, str(error)) from error
        except Exception as error:
            raise WorkerFailed(f"head {self.number}", step, traceback.format_exc()) from error
