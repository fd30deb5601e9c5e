"""The Python API: `LTETrainer(worker, ...).fit()` runs a training from start to end and returns Ray's `Result`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lte_ray import checkpoint, fault_injection
from lte_ray.config import (
    FailureConfig,
    LTEConfig,
    MergeConfig,
    PlacementConfig,
    StorageConfig,
    TrainConfig,
    check_run_name,
    ray_fields,
)
from lte_ray.config.baseline import baseline_failure
from lte_ray.config.independent import check_failures
from lte_ray.config.stopping import TRAIN_LOSS, parse_condition
from lte_ray.engine.default_policy import choose_policy
from lte_ray.engine.head.virtual import check_stackable
from lte_ray.engine.prepare import Initial, describe_cut_ranks, describe_low_rank, extend_plans, prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError, Interrupted, LTEError, RunError
from lte_ray.merging.registry import make_policy, may_merge_by_weights, resolved_arguments
from lte_ray.messages import HeadTimes
from lte_ray.run import record as run_record
from lte_ray.run import run_toml
from lte_ray.run.callbacks import Callback, CallbackList, Run, load_callbacks
from lte_ray.run.display import automatic_display
from lte_ray.run.history import best_checkpoints, read_rows, to_dataframe
from lte_ray.run.metrics import Progress, Reporter, latest_figures, throughput
from lte_ray.run.reporting import report_run
from lte_ray.run.sinks import Sink, make_sinks, recordable_names
from lte_ray.run.start import RunClaim
from lte_ray.run.stopping import StopRules
from lte_ray.storage import RunDirectory, default_storage, split_run_path
from lte_ray.worker import evaluates

if TYPE_CHECKING:
    import ray.train

    from lte_ray.merging.policy import MergePolicy
    from lte_ray.runtime.context import RunContext
    from lte_ray.runtime.controller.controller import TrainController
    from lte_ray.runtime.controller.data_parallel import DataParallelController
    from lte_ray.runtime.coordinator_state import CoordinatorState
    from lte_ray.runtime.placement import Placement


log = logging.getLogger("lte_ray")

NOTHING_KEPT = "There is no complete checkpoint; --resume would start from the beginning."


@dataclass
class LTETrainer:
    """Trains a worker's model with LoRA heads on Ray.

    Uses the Ray that is initialized already; else connects to RAY_ADDRESS; else starts a local Ray for the run.

    Args:
        worker: what to train: an instance of a `lte_ray.Worker` (or its class, if it needs no arguments).
        lte: the heads: how many, their rank and alpha.
        merge: when and how they merge; `policy` may be a policy object.
        train: steps, seed, and how often to evaluate and save.
        scaling_config: resources per head, as `ray.train.ScalingConfig` or `lte_ray.config.PlacementConfig`. By default
            a GPU for each process of heads if the cluster has enough of them, else equal shares of its CPUs. What a run
            doesn't follow in Ray's classes is a ConfigError, here and in `run_config`.
        run_config: name, storage and checkpoints to keep, as `ray.train.RunConfig` or `lte_ray.config.StorageConfig`
            (which can also resume or overwrite a run).
        failure: what happens when processes die, and how few and how many heads the run may have; by default what Ray's
            `RunConfig` says (`FailureConfig(max_failures=...)`), else `lte_ray.FailureConfig()`.
        reporter: shows progress; by default a live display on a terminal, else lines.
        program: how ``run.toml`` names the worker; by default its module and class.
        log: where figures go in addition to ``metrics.jsonl``: names as for ``--log``, and objects with the methods of
            `lte_ray.Sink`. By default what `run_config` says. ``run.toml`` has the names only: give objects to `restore` again.
        callbacks: `lte_ray.Callback`s that follow the run, or their classes; in addition to those of `TrainConfig.callback` and
            of Ray's `RunConfig`. ``run.toml`` doesn't record them.
    """

    worker: Any
    lte: LTEConfig = field(default_factory=LTEConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    scaling_config: ray.train.ScalingConfig | PlacementConfig | None = None
    run_config: ray.train.RunConfig | StorageConfig | None = None
    failure: FailureConfig | None = None
    reporter: Reporter | None = None
    program: str | None = None
    log: Sequence[str | Sink] | None = None
    callbacks: Sequence[Callback | type[Callback]] = ()

    def __post_init__(self) -> None:
        if isinstance(self.worker, type):
            self.worker = self.worker()

    @classmethod
    def restore(cls, path: str | os.PathLike[str], worker: Any = None, **changed: Any) -> LTETrainer:
        """Returns a trainer that continues the run in `path` from its newest complete checkpoint once `fit` is called.

        The settings are those in the run's ``run.toml``. The worker that it names is imported: restore only runs of people whom
        you trust.

        Args:
            path: the run's directory, as in ``Result.path``, or its URI.
            worker: replaces the one that ``run.toml`` names; needed if that can't be imported, or holds a secret.
            changed: arguments of `LTETrainer` that replace those of the run, e.g. `train` with more steps.

        Raises:
            StorageError: there is no run, or ``run.toml`` is damaged.
            ConfigError: a setting in ``run.toml`` or in `changed` has the wrong type or is out of range.
            WorkerError: the worker can't be made.
        """
        from lte_ray.export.worker_factory import make_worker

        place, name = split_run_path(os.fspath(path))
        check_run_name(name, "path")
        directory = RunDirectory.open(place, name)
        record = run_toml.read(directory)
        settings = {
            "lte": record.settings(LTEConfig),
            "merge": record.settings(MergeConfig),
            "train": record.settings(TrainConfig),
            "scaling_config": record.settings(PlacementConfig),
            "failure": record.settings(FailureConfig),
            "program": record.content.get("program"),
        }
        storage = dataclasses.replace(record.settings(StorageConfig), name=name, storage=place, resume=True)
        return cls(make_worker(record.content, worker), **{**settings, "run_config": storage, **changed})

    def fit(self) -> ray.train.Result:
        """Runs the training to its end.

        Returns:
            `metrics` (the last evaluation's figures, also under "evaluation"; the worker's own figures of the training, the
            mean over the heads, under "figures", and also at the top where no other has that name; baseline, train_loss, step,
            samples, samples_per_second, tokens_per_second and mfu (if known), version, seconds, `times`, where the heads' time
            went, all heads' bytes; `stopped`, the kind and the reason if the run ended early without an error, else None),
            `checkpoint`, and `path` (the run directory, which holds ``model.safetensors``, unless heads never merge, and with
            `TrainConfig.ema` ``model-ema.safetensors``); `metrics_dataframe`, as `lte_ray.read_metrics` reads it; and
            `best_checkpoints`, the evaluated ones, best first.

        Raises:
            UserError: bad input; no actor was started.
            RunError: the run ended early; its complete checkpoints remain in the run directory.
        """
        began = time.monotonic()
        callbacks = load_callbacks(self.callbacks, self.train.callback)
        storage, filesystem = _storage(self.run_config, self.log)
        sinks = make_sinks(storage.log if self.log is None else self.log, {"prometheus": _prometheus_sink})
        failure = _failure(self.run_config, self.failure, self.lte.num_heads, self.merge.never_merge)
        name = storage.name or f"{type(self.worker).__name__.lower()}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        given = Settings(name, self.lte, _with_policy_name(self.merge), self.train)
        settings, heads, is_baseline = given.resolved(), self.lte.num_heads, self.train.baseline
        policy = make_policy(settings.merge if is_baseline else self.merge)
        run_failure = baseline_failure(failure) if is_baseline else failure
        initial = extend_plans(prepare(self.worker, settings), run_failure.max_heads)
        settings, given = initial.complete(settings), initial.complete(given)
        _warn(initial, settings.lte.num_heads, settings.merge.never_merge)
        if settings.merge.policy == "auto":
            settings = given = _with_policy(settings, initial)
            policy = make_policy(settings.merge)
        settings = _with_evaluation(self.worker, settings, storage)
        directory = RunDirectory.open(storage.storage or default_storage(), name, filesystem, patience=storage.storage_patience)
        claim = RunClaim(directory, storage, settings, initial, self.train.length)
        callbacks += _ray_callbacks(self.run_config, directory)

        from lte_ray.runtime import placement as placing
        from lte_ray.runtime.cluster import connected, will_start
        from lte_ray.runtime.context import PickledObject, RetentionPolicy, RunContext
        from lte_ray.runtime.object_store import ObjectStore

        placement_config, ray_options = placing.from_scaling_config(self.scaling_config, heads)
        if placement_config.stack_heads == "always" and placement_config.heads_per_actor > 1 and not is_baseline:
            check_stackable(self.train, initial.plans)
        pickled_worker, pickled_policy = PickledObject.pickle(self.worker), PickledObject.pickle(policy)
        reporter = self.reporter or automatic_display()
        show = _notes(reporter, name, settings.train, claim)
        show(_connecting(will_start()))
        with contextlib.closing(reporter), connected():
            processes = settings.train.baseline_processes
            placement = placing.resolve_run(placement_config, self.lte, self.train, **ray_options)
            show(_starting(processes if is_baseline else 0))
            heads_by_actor = placing.assign_heads(placement, settings.lte.num_heads)
            record = run_record.make_record(self.worker, self.program, given, placement_config, storage, failure)
            with _telling_what_is_kept(directory), contextlib.ExitStack() as stack:
                # Ray Train reserves for its processes itself.
                reservation = stack.enter_context(
                    _reserve(placement, heads_by_actor if processes == 1 else [], run_failure, show, directory)
                )
                groups = placing.transfer_groups(
                    settings.merge, initial.plans, reservation.nodes if reservation else 1, may_merge_by_weights(policy)
                )
                directory, acquired, resume = stack.enter_context(claim.acquire(record, self.worker))
                context = RunContext(
                    worker=pickled_worker,
                    settings=settings,
                    directory=directory,
                    transport=ObjectStore(),
                    groups=groups,
                    retention=RetentionPolicy(storage.keep_checkpoints, storage.keep_best, storage.best_by),
                    rejoin=failure.rejoin,
                    fault_script=os.environ.get(fault_injection.VARIABLE),
                    run_toml=acquired,
                    evaluates=evaluates(self.worker),
                )
                start = _start(context, initial, resume, policy)
                following = CallbackList(
                    callbacks,
                    Run(name, directory.path, run_record.to_plain(record), StopRules(settings.train, storage.best_by, began)),
                    directory,
                )
                results = stack.enter_context(following.running())
                controller = _make_controller(
                    {"placement": placement}
                    if reservation is None
                    else {"reservation": reservation, "stack_heads": placement_config.stack_heads},
                    context=context,
                    initial=initial,
                    start=start,
                    callbacks=following,
                    policy=pickled_policy,
                    failure=run_failure,
                    reporter=reporter,
                    export=lambda final, ema: run_record.write_model(directory, initial, final, ema),
                )
                with report_run(
                    sinks,
                    directory,
                    controller.state.log,
                    self.worker,
                    acquired,
                    claim.position,
                    controller.state.devices,
                ):
                    controller.run()
                results.append(_result(controller, directory, storage.best_by, settings.merge.never_merge))
        return results[0]


@contextlib.contextmanager
def _reserve(
    placement: Placement,
    heads_by_actor: list[tuple[int, ...]],
    failure: FailureConfig,
    show: Callable[[str], None],
    directory: RunDirectory,
) -> Iterator[Any]:
    """Reserves the actors' places for the block, if there are some, and checks the nodes before an actor starts there."""
    from lte_ray.runtime import placement as placing
    from lte_ray.runtime.node_check import check_nodes

    reserved = placing.reserve(placement, heads_by_actor, failure, show) if heads_by_actor else contextlib.nullcontext()
    with reserved as reservation:
        check_nodes(directory, placement.labels, placement.coordinator_labels)
        yield reservation


def _with_policy_name(merge: MergeConfig) -> MergeConfig:
    """Settings go to all actors. They hold the policy's name: the policy itself goes to the coordinator only."""
    name = run_record.object_name(merge.policy)
    return dataclasses.replace(merge, policy=name, policy_args=resolved_arguments(merge) or None)


def _with_policy(settings: Settings, initial: Initial) -> Settings:
    """Returns the settings with the policy that suits the heads' optimizer."""
    merge = choose_policy(settings, initial)
    return dataclasses.replace(settings, merge=dataclasses.replace(merge, policy_args=resolved_arguments(merge) or None))


def _with_evaluation(worker: Any, settings: Settings, storage: StorageConfig) -> Settings:
    """Returns the settings, without evaluations if the worker has no `evaluate`.

    Raises:
        ConfigError: the worker has none, but a setting needs figures.
    """
    if evaluates(worker):
        return settings
    gated = settings.merge.policy == "gated"
    train = settings.train
    of_evaluation = train.stop_when and parse_condition(train.stop_when).name != TRAIN_LOSS
    needs = {
        "--stop-when": of_evaluation,
        "--patience": train.patience,
        "--keep-best": storage.keep_best,
        "--best-by": storage.best_by,
        "--policy gated": gated,
    }
    if given := " and ".join(name for name, value in needs.items() if value):
        raise ConfigError(f"{given} needs figures, but {type(worker).__name__} has no evaluate(model). Give it one.")
    return dataclasses.replace(settings, train=dataclasses.replace(train, eval_every=0))


def _warn(initial: Initial, num_heads: int, never_merge: bool = False) -> None:
    low_rank = "" if never_merge else describe_low_rank(initial.plans[:num_heads])
    ranks = (low_rank, describe_cut_ranks(initial, num_heads))
    for note in (*ranks, initial.data_problem, initial.start, initial.loss_problem):
        if note:
            log.warning(note)


def _notes(reporter: Reporter, name: str, train: TrainConfig, claim: RunClaim) -> Callable[[str], None]:
    """Returns a function that shows what a run without heads yet does."""
    return lambda note: reporter.update(Progress.starting(name, train.steps, note, train.baseline, claim.position))


def _starting(processes: int) -> str:
    """What a display says while the heads start, or that many processes of ordinary training."""
    return f"starting {'the process' if processes == 1 else f'{processes} processes' if processes else 'the heads'}"


def _connecting(starts: bool) -> str:
    return "starting Ray" if starts else "connecting to Ray"


@contextlib.contextmanager
def _telling_what_is_kept(directory: RunDirectory) -> Iterator[None]:
    """If the block is interrupted or the run ends early, the exception says which checkpoint there is."""
    try:
        yield
    except KeyboardInterrupt:
        newest, kept = None, "Complete checkpoints, if there are any, are kept; --resume continues from the last one."
        with contextlib.suppress(LTEError):
            newest = _newest(directory)
            kept = NOTHING_KEPT if newest is None else f"Checkpoint {newest} is complete; continue from it with --resume."
        raise Interrupted(kept, newest) from None
    except RunError as error:
        with contextlib.suppress(LTEError):
            error.checkpoint = _newest(directory)
        raise


def _newest(directory: RunDirectory) -> int | None:
    """Returns the version of the newest complete checkpoint."""
    return (checkpoint.complete_versions(directory) or [None])[-1]  # type: ignore[list-item]


def _start(context: RunContext, initial: Initial, resume: checkpoint.Manifest | None, policy: MergePolicy) -> CoordinatorState:
    """Returns the state that a run starts from: that of a checkpoint, or the first base."""
    from lte_ray.runtime.coordinator_state import CoordinatorState, load_checkpoint

    if resume is None:
        return CoordinatorState(0, context.transport.publish(initial.base))
    return load_checkpoint(context, initial.plans, resume.version, context.settings.lte.num_heads, policy)


def _make_controller(places: dict[str, Any], **common: Any) -> TrainController | DataParallelController:
    """Returns the controller of the run: Ray Train's processes of ordinary training have no reservation of ours."""
    if "reservation" in places:
        from lte_ray.runtime.controller.controller import TrainController

        return TrainController(**places, **common)
    from lte_ray.runtime.controller.data_parallel import DataParallelController  # imports Ray Train's part for torch

    return DataParallelController(**places, **common)


def _prometheus_sink() -> Sink:
    from lte_ray.runtime.prometheus import PrometheusSink

    return PrometheusSink()


def _storage(config: Any, log: Sequence[str | Sink] | None = None) -> tuple[StorageConfig, Any]:
    """Returns Ray's RunConfig (or ours) as ours, and the filesystem that it names. Raises ConfigError for what is ignored."""
    logged: dict[str, Any] = {} if log is None else {"log": recordable_names(log)}
    if config is None or isinstance(config, StorageConfig):
        return dataclasses.replace(config or StorageConfig(), **logged), None
    ray_fields.check_followed(config, ray_fields.RUN)
    check_run_name(config.name)
    retention: dict[str, Any] = {"keep_checkpoints": None}
    if config.checkpoint_config:
        retention = _retention(config.checkpoint_config)
    return StorageConfig(name=config.name, storage=config.storage_path, **retention, **logged), config.storage_filesystem


def _retention(config: ray.train.CheckpointConfig) -> dict[str, Any]:
    """Returns which checkpoints Ray's rule keeps: the newest `num_to_keep`; with a score the best, and always the newest."""
    ray_fields.check_followed(config, ray_fields.CHECKPOINTS)
    number, figure = config.num_to_keep, config.checkpoint_score_attribute
    if number is None or figure is None:
        return {"keep_checkpoints": number}
    best_by = figure if config.checkpoint_score_order == "min" else f"-{figure}"
    return {"keep_checkpoints": 1, "keep_best": number, "best_by": best_by}


def _ray_callbacks(config: Any, directory: RunDirectory) -> list[Callback]:
    if not getattr(config, "callbacks", None):
        return []
    from lte_ray.runtime.ray_callbacks import adapt_callbacks

    return adapt_callbacks(config, directory)


def _failure(config: Any, given: FailureConfig | None = None, num_heads: int = 1, never_merge: bool = False) -> FailureConfig:
    """Returns what is given, else what Ray's RunConfig says. Its default, 0, is ignored: a lost machine shouldn't end a run."""
    failures = getattr(config, "failure_config", None)
    if failures is not None:
        ray_fields.check_followed(failures, ray_fields.FAILURES)
    max_failures = getattr(failures, "max_failures", 0)
    failure = given or (FailureConfig(max_failures=max_failures) if max_failures else FailureConfig())
    failure.check_heads(num_heads)
    if never_merge:
        check_failures(failure, num_heads)
    return failure


def _result(
    controller: TrainController | DataParallelController, directory: RunDirectory, best_by: str, independent: bool
) -> ray.train.Result:
    import ray.train

    state, progress = controller.state, controller.progress.snapshot()
    statuses = list(state.statuses.values())
    evaluation = progress.evaluation.values if progress.evaluation else {}
    figures = latest_figures(state.merges)
    metrics: dict[str, Any] = {
        **figures,
        **evaluation,  # if both have a name, it is this one's
        "figures": figures,
        "evaluation": evaluation,
        "baseline": progress.baseline,
        "independent": independent,
        "train_loss": progress.train_loss,
        "step": progress.step,
        "samples": progress.samples,
        "samples_per_second": progress.samples_per_second,
        "version": progress.version,
        "seconds": progress.seconds,
        "times": {
            field.name: sum(getattr(status.times, field.name) for status in statuses) / len(statuses)
            for field in dataclasses.fields(HeadTimes)
        },
        "merge_seconds": sum(merge.merge_seconds for merge in state.merges),
        "bytes_up": sum(status.bytes_up for status in statuses),
        "bytes_down": sum(status.bytes_down for status in statuses),
        "bytes_ddp": sum(merge.alternative_bytes.get("ddp", 0) for merge in state.merges),
        "resyncs": sum(status.resyncs for status in statuses),
        "stopped": None if state.stopped is None else dataclasses.asdict(state.stopped),
    }
    metrics |= {name: rate for name, rate in throughput(state.merges).items() if name not in metrics}
    if state.sample is not None:
        metrics["sample"] = state.sample

    def saved(version: int) -> ray.train.Checkpoint:
        return ray.train.Checkpoint(directory.path_to(checkpoint.version_folder(version)), directory.filesystem)

    result = ray.train.Result(
        metrics=metrics,
        checkpoint=None if state.checkpoint is None else saved(state.checkpoint),
        error=None,
        path=directory.path,
        _storage_filesystem=directory.filesystem,
    )
    try:
        rows = read_rows(directory)
        result.metrics_dataframe = to_dataframe(rows)
        result.best_checkpoints = [(saved(v), figures) for v, figures in best_checkpoints(directory, rows, best_by)]
    except (LTEError, ImportError) as error:  # the run itself is done
        log.warning("The result has no metrics_dataframe: %s", error)
    return result
