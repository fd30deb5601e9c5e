"""One LoRA head: trains alone, contributes what it learned, and rebases onto newer main weights.

A head owns its model (with its own copy of the main weights), factors, optimizer, batch stream and generators. It knows
neither Ray nor other heads: its caller carries contributions to the coordinator and bases back (see `engine.in_process`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from lte_ray.adapters.convert import convert, share_frozen_weights
from lte_ray.adapters.quantization import check_format
from lte_ray.engine.head.batch_stream import BatchStream
from lte_ray.engine.head.compilation import COMPILATION
from lte_ray.engine.head.first_backward import first_backward
from lte_ray.engine.head.loss import compute_loss
from lte_ray.engine.head.main_weights import MainWeights
from lte_ray.engine.head.measures import Meter
from lte_ray.engine.head.optimization import OptimizerStep, autocast, build_optimizer, checkpoint_activations
from lte_ray.engine.head.rng import Generators, head_seed, watch_draws
from lte_ray.engine.head.state import HeadState
from lte_ray.engine.head.timing import HeadTimer
from lte_ray.engine.head.untrained import FrozenParameters, UnmergedBuffers, check_equal_builds, fingerprints
from lte_ray.engine.head.worker_state import own_worker
from lte_ray.engine.initial_weights import build_initial_model
from lte_ray.engine.settings import Settings
from lte_ray.engine.spans import span
from lte_ray.errors import worker_errors
from lte_ray.merging.flat_buffer import factors_part
from lte_ray.merging.low_rank import Share, squared_norm
from lte_ray.messages import CommittedPosition, Contribution, ContributionResult, HeadDirective, HeadStatus
from lte_ray.transfer.codec import Codec
from lte_ray.worker import Batch, Worker, count_samples, to_device


class Head:
    """One head of a run.

    Args:
        worker: the user's program.
        settings: the run's settings.
        number: this head's number, 0 to num_heads - 1.
        device: where the head trains.
        dtype: of everything that is merged; float64 in tests, float32 in runs.
        incarnation: how often this head was started before.
        separate_reference: keep the main weights equal to the base and compute the reference apart from them, so that heads
            that share them can be computed at once.
        share_weights: a head whose main weights this one uses too. Without `separate_reference` they take turns: each folds
            its reference into the weights before it trains a round.
        alone: whether no other head will share this one's main weights.

    Attributes:
        state: what the head has trained, and its positions.
        timer, meter: where its time goes, and what else is measured.
        average_gradients: called before every optimizer step, where several processes train the head together.
        interrupted: called before every step of a round; if it returns true, the head leaves the rest of the round for later.
        trained_parameters: factors and replica parameters, by their names in the contribution.
        untrained_weights: names of weights on which no loss of the first round depended.
        loss_draws: whether the loss drew from the global generators before the head's first contribution.
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
        self.worker, self.settings, self.number, self.incarnation = own_worker(worker), settings, number, incarnation
        self.device, self.dtype = torch.device(device), dtype
        self.average_gradients: Callable[[], None] = lambda: None
        self.interrupted: Callable[[], bool] = lambda: False
        self.loss_draws = self._draws_known = False
        self.untrained_weights: list[str] = []
        self._with_gradient: set[str] = set()
        self.timer, self.meter = HeadTimer(), Meter(self.worker, self.device)
        self.batch_stream = BatchStream(self.worker, number, settings.lte.num_heads, settings.train.seed)
        self.step_limit, self.limit_is_final, self._schedule_rate = settings.train.steps, True, 1.0
        self._highest_limit = 0  # of those that the coordinator has given
        self._last_was_discarded = False
        # The model is built under the run's seed; what the head draws after that is its own.
        self.rng = Generators(head_seed(settings.train.seed, number), self.device)
        with self.rng.swapped_in(), self.worker_errors(None):
            model, seed = build_initial_model(self.worker, settings.train), settings.train.seed
            self.converted = convert(model, settings.lte, seed=seed, head=number, separate_reference=separate_reference)
            self.model, self.plan = self.converted.model.to(self.device).train(), self.converted.plan
            self.converted.make_masters()
            self.converted.keep_buffers()  # finds them, now that they are on the device
            for base_dtype in {spec.base_dtype for spec in self.plan.adapted} if self.device.type != "cpu" else ():
                check_format(base_dtype, self.device)  # the driver has checked it on its CPU
            if share_weights is not None:
                share_frozen_weights(self.converted, share_weights.converted)
            shared = None if share_weights is None else share_weights.main_weights
            self.main_weights: MainWeights = MainWeights(self.converted, shared, alone, settings.merge.never_merge)
            checkpoint_activations(self.model, settings.train.checkpoint_activations)
            if settings.train.compile:
                self.model.compile()
                for main in self.converted.main_weights.values():
                    if main.separate_reference:  # from the start, so that the first merge doesn't compile the model again
                        main.factors.reserve_reference()
        self.rng = Generators(head_seed(settings.train.seed, number, incarnation), self.device)
        tensors, start = self.converted.tensors(), CommittedPosition(incarnation, lanes=self.batch_stream.partitions)
        factors, replicas = self.converted.factors, self.converted.replicas()
        self.trained_parameters = factors | {n: r for n, r in replicas.items() if isinstance(r, nn.Parameter)}
        self.state = HeadState(self.plan, settings.lte.reset, dtype, self.device, factors, replicas, start, start)
        with self.worker_errors(None):
            self.optimizer, self.schedule = build_optimizer(self.worker, self.plan, {**factors, **replicas}, settings.train)
            check_equal_builds(fingerprints(tensors, self.plan), settings.untrained)
        self.optimizer_step = OptimizerStep(self.optimizer, self.schedule, settings.train, self.device)
        self._frozen = FrozenParameters(self.converted.frozen)
        self._unmerged = UnmergedBuffers(self.model, settings.lte.merge_buffers, self.state.replicas)

    def start(self, version: int, base: Tensor, ahead: Mapping[str, Tensor] | None = None) -> None:
        """Adopts the first base before any step is taken.

        Args:
            version: of `base`.
            base: the main weights and replicas, flat, in the plan's base layout.
            ahead: what the head has trained of its replicas that the base doesn't hold, where it resumes.
        """
        self._rebase(version, base, contained=None, ahead=ahead)
        self.timer.activity = "training"
        self.timer.split()

    def resume(self, position: CommittedPosition, reference: Tensor | None) -> None:
        """Takes over what a base holds of this head, its position and its factors; to be called before `start`.

        The head's next contribution holds what it trains from there. Without a reference B is zero.
        """
        self.state.resume_at(position, reference, self.incarnation)

    def mark_done(self) -> None:
        """Records that this head won't train any more."""
        self.timer.activity = "done"

    # -- positions -------------------------------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """The version of the adopted base."""
        return self.state.version

    @property
    def step(self) -> int:
        """Local steps taken since the run began."""
        return self.state.step

    @property
    def samples(self) -> int:
        """Samples trained on since the run began."""
        return self.state.samples

    @property
    def sequence(self) -> int:
        """The number of the last contribution."""
        return self.state.sequence

    @property
    def position(self) -> CommittedPosition:
        """Where the head is now: its committed position once everything it has trained is merged."""
        stream, state = self.batch_stream, self.state
        taken, partitions = stream.batches_taken, stream.partitions
        return CommittedPosition(self.incarnation, state.sequence, state.version, state.step, state.samples, taken, partitions)

    @property
    def steps_since_contribution(self) -> int:
        """Local steps since the last contribution was made."""
        return self.state.step - self.state.contributed.step

    @property
    def steps_left(self) -> int:
        """Local steps that the head may take."""
        return max(0, self.step_limit - self.state.step)

    @property
    def done(self) -> bool:
        """Whether all local steps were taken."""
        return self.limit_is_final and self.steps_left == 0

    @property
    def outstanding(self) -> bool:
        """Whether a contribution was made that has no answer yet."""
        return self.state.pending is not None

    @property
    def finished(self) -> bool:
        """Whether all local steps were taken, and merged unless the policy discarded the last of them."""
        state = self.state
        settled = state.merged.step == state.step or (self._last_was_discarded and state.contributed.step == state.step)
        return self.done and state.pending is None and settled

    # -- training --------------------------------------------------------------------------------------------------------

    def apply_directive(self, directive: HeadDirective) -> None:
        """Follows the coordinator's directive: how many steps, where the learning-rate schedule stands, which data."""
        if directive.limit >= self._highest_limit:  # else a newer directive came before this one
            self.step_limit, self.limit_is_final, self._highest_limit = directive.limit, directive.final, directive.limit
        self._schedule_rate = directive.rate
        self.optimizer_step.advance_to(directive.progress)
        self.batch_stream.apply_assignments(directive.assignments, directive.revocation)

    @property
    def round_steps(self) -> int:
        """The local steps of the round that has begun, or begins now, where no speed decides."""
        begun = self.step - self.steps_since_contribution
        return self.settings.merge.steps_between(begun / self.settings.train.steps)

    def train_round(self) -> Contribution:
        """Takes a round of local steps (fewer at the end of the run) and makes the contribution.

        Raises:
            WorkerFailed: the worker's code raised; names the head and the step.
        """
        self.train(self.round_steps)
        return self.contribute()

    def train(
        self, steps: int, read_context: Callable[[Head], AbstractContextManager[None]] | None = None, share: float = 1.0
    ) -> None:
        """Takes local steps, fewer at the end of the run.

        Args:
            steps: how many.
            read_context: for heads that train concurrently: the context in which each batch is read, with this head's
                generators swapped in. By default they are swapped in for the whole call.
            share: the part of the elapsed time that counts as this head's.

        Raises:
            WorkerFailed: the worker's code raised; names the head and the step.
        """
        self.prepare_to_train()
        with nullcontext() if read_context else self.rng.swapped_in(), self.timer.measure("train", share):
            for _ in range(min(steps, self.steps_left)):
                if self.interrupted():
                    break
                self.record_loss(self._train_step(read_context))

    def prepare_to_train(self) -> None:
        """Puts this head's main weights in place, where heads take turns on them; to be called before steps are taken."""
        if self.main_weights.takes_turns:
            self.main_weights.load(self.state.reference, {})
        self._frozen.record()
        self._unmerged.record()
        COMPILATION.register()
        self.timer.activity = "training"

    def record_loss(self, loss: Tensor) -> None:
        """Adds a step's loss to the next contribution's mean."""
        self.state.losses.append(loss)

    def _train_step(self, read_context: Callable[[Head], AbstractContextManager[None]] | None) -> Tensor:
        losses = []
        with self.worker_errors(self.step + 1):
            for _ in range(self.settings.train.accumulate):
                with span("read batch"), read_context(self) if read_context else nullcontext():
                    batch = self.next_batch()
                with span("forward and backward"):
                    losses.append(self.backward(batch))
        self.average_gradients()  # outside the block: what fails there isn't the worker's code
        with self.worker_errors(self.step + 1), span("optimizer step"):
            self.finish_step()
        return torch.stack(losses).mean()

    def next_batch(self) -> Batch:
        """The next batch of this head's shard, on its device."""
        with self.converted.user_parameters.reading():  # batches may be made by the model
            batch = to_device(self.batch_stream.next_batch(), self.device)
        samples = count_samples(batch)
        self.state.samples += samples
        self.meter.count(batch, samples)
        return batch

    def backward(self, batch: Batch) -> Tensor:
        """Adds the batch's gradient to the accumulated one; returns the batch's loss."""
        if self._draws_known:
            return self._backward(batch)
        with watch_draws(self.device) as drew:
            if self.converted.user_parameters.watched:
                loss = self._backward(batch)
            else:
                loss = first_backward(self._backward, batch, self.worker, self.model, self.optimizer, self.device)
            self.loss_draws = self.loss_draws or drew()
        return loss

    def _backward(self, batch: Batch) -> Tensor:
        users = self.converted.user_parameters
        with users.track():
            with autocast(self.settings.train, self.device):
                loss, figures = compute_loss(self.worker, self.model, batch)
            users.end_forward()
            torch.autograd.backward(self.optimizer_step.scale_loss(loss))
        self.converted.keep_buffers()
        self.state.figures.add(figures)
        return loss.detach()

    def finish_step(self) -> None:
        """Takes the optimizer's and the schedule's step with the accumulated gradients."""
        if self.state.sequence == 0:
            self._with_gradient |= {name for name, p in self.state.factors.items() if p.grad is not None}
        self.optimizer_step.step(self._schedule_rate, measure=self.steps_since_contribution == 0)
        self.state.step += 1
        self.timer.record_step()

    # -- contributing ----------------------------------------------------------------------------------------------------

    def contribute(self) -> Contribution:
        """Makes the contribution of the steps taken since the last one.

        Its `buffer` is a flat tensor on the head's device that is never written to again; `encode` turns it into what is sent.

        Raises:
            WorkerFailed: the model wrote to parameters that don't train.
        """
        state, stream = self.state, self.batch_stream
        assert state.pending is None, "a head has at most one contribution outstanding"
        with self.timer.measure("train"):  # until here the device may be computing
            figures = state.close_losses()
        self._draws_known = True
        with self.worker_errors(self.step):
            self.converted.user_parameters.check_unwritten()
            self._unmerged.check()
            self._frozen.check(thoroughly=state.sequence == 0)
            if state.sequence == 0:
                self.untrained_weights = [s.name for s in self.plan.adapted if not {s.a_name, s.b_name} & self._with_gradient]
        state.sequence += 1  # before it is pending: another thread may ask whether this one was accepted
        with self.timer.measure("publish"):
            state.pending = state.gather_contribution()
        with self.worker_errors(self.step):
            measures = self.meter.close(self.optimizer, self.optimizer_step.gradient_norm, state.samples - state.merged.samples)
        state.contributed = self.position
        seconds, stall = self.timer.split()
        return Contribution(
            run=self.settings.run,
            head=self.number,
            incarnation=self.incarnation,
            sequence=state.sequence,
            version=state.version,
            step=state.step,
            steps=state.step - state.merged.step,
            samples=state.samples - state.merged.samples,
            loss=state.loss,
            figures=figures,
            measures=measures,
            base_error=self.main_weights.quantization_error,
            seconds=seconds,
            stall=stall,
            batches=stream.batches_taken,
            partitions=stream.partitions,
            assignment_id=stream.assignment_id,
            revoked=stream.revoked,
            buffer=state.pending,
        )

    def encode(self, contribution: Contribution, codec: Codec) -> Contribution:
        """The contribution in the transfer format: `buffer` becomes one buffer for each group of layers.

        From here on what receivers will decode counts as contributed, so that what rounding left out is part of the next
        contribution. May run while the head trains, in another thread.
        """
        state = self.state
        assert state.pending is not None
        buffers, state.pending = codec.encode(state.pending, state.reference)
        norm = None
        if self.settings.merge.max_norm_z:  # computed here, where it costs the coordinator nothing
            norm = math.sqrt(squared_norm(Share(1.0, self.plan, state.pending, state.reference)))
        return replace(contribution, buffer=buffers, norm=norm)

    # -- rebasing --------------------------------------------------------------------------------------------------------

    def adopt(
        self, result: ContributionResult | None, version: int, base: Tensor | None, staged: Mapping[str, Tensor] | None = None
    ) -> None:
        """Takes the result of the outstanding contribution and rebases onto `base`, losing no step.

        May be called at any time between two steps; steps taken since the contribution stay in the factors and replicas.

        If the contribution was accepted, the reference becomes its factors, A', B' := A^c, B^c. If it was refused, the
        reference stays, so that the progress is part of the next contribution; or the progress is dropped (`rewind`), if the
        result says that it is unusable. Then W~ := W_v - s B' A' and p := P_v + (p - what version v holds of it).

        Args:
            result: of the outstanding contribution; None if `base` is newer but doesn't settle it, or none is outstanding.
            version: of `base`.
            base: flat, in the base layout; None if the head has that version already. Heads that take turns on their main
                weights keep it until the next, so it must not be written to.
            staged: what `stage` returned for it.
        """
        state = self.state
        with self.timer.measure("rebase"):
            contained = None
            if result is not None:
                assert result.sequence == state.sequence and state.pending is not None
                contribution, state.pending = state.pending, None
                self._last_was_discarded = result.discarded
                if result.accepted:
                    assert base is not None
                    contained, state.merged = contribution, state.contributed
                if result.harmful:
                    self.rewind()
            if base is not None:
                self._rebase(version, base, contained, staged or {})

    def stage(self, base: Tensor, accepted: bool) -> dict[str, Tensor]:
        """Computes the main weights that `adopt` will put in place; may run while the head trains, in another thread.

        Args:
            base: the base to adopt.
            accepted: whether it holds the outstanding contribution.

        Returns:
            Weights by name; none for those that are quantized, or shared with other heads of the process.
        """
        reference = self.state.reference
        if accepted:
            assert self.state.pending is not None
            reference = factors_part(self.plan, self.state.pending)
        return self.main_weights.stage(base, reference)

    def catch_up(self) -> None:
        """Rebases onto the newest version that a head which shares the main weights has adopted meanwhile."""
        newest, base = self.main_weights.newest_base
        if self.version < newest:
            assert base is not None and self.state.pending is None
            with self.timer.measure("rebase"):
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
        state = self.state
        ahead = state.replica_changes_beyond(contained) if ahead is None else ahead
        if contained is not None:
            state.set_reference(contained)
        self.main_weights.set_base(version, base)
        if not self.main_weights.takes_turns:
            self.main_weights.load(state.reference, staged or {})
        state.rebase_replicas(base, ahead)
        state.version = version

    def rewind(self) -> None:
        """Drops all that was trained since the last merged contribution, and the optimizer's state; the data isn't rewound."""
        self.state.drop_unmerged()
        self.optimizer.state.clear()
        self.state.merged = self.state.contributed = replace(self.position, sequence=self.state.merged.sequence)

    # -- what others may ask ---------------------------------------------------------------------------------------------

    def status(self) -> HeadStatus:
        """The head's progress; safe to call from another thread."""
        return HeadStatus(
            head=self.number,
            step=self.step,
            samples=self.samples,
            loss=self.state.loss,
            version=self.version,
            state="compiling" if COMPILATION.active else self.timer.activity,
            device=str(self.device),
            times=self.timer.times,
            first_step_at=self.timer.first_step_at,
            last_step_at=self.timer.last_step_at,
        )

    def local_buffers(self) -> list[tuple[str, Tensor]]:
        """The model's own buffers that aren't merged."""
        return [(name, b) for name, b in self.model.named_buffers() if name not in self.state.replicas]

    def worker_errors(self, step: int | None) -> AbstractContextManager[None]:
        """Turns what the worker's code raises into a WorkerFailed that names the head and the step."""
        return worker_errors(f"head {self.number}", step)
