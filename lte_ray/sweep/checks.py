"""Checks a sweep before its first trial: every configuration must be possible."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from lte_ray.config.sweep import SweepConfig, Values
from lte_ray.engine.prepare import Initial, prepare, read_first_batches
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError, UserError, WorkerFailed
from lte_ray.ladder import Figure
from lte_ray.ladder.figures import evaluate
from lte_ray.merging.registry import make_policy
from lte_ray.sweep.trials import Trial, TrialSettings
from lte_ray.worker import count_samples


@dataclass(frozen=True)
class Checked:
    """What was found out about a sweep.

    Attributes:
        figure: that is compared.
        samples: of the longest training.
        halves: whether trainings may end early.
        notes: what people should know.
    """

    figure: Figure
    samples: int
    halves: bool
    notes: list[str]


def check_trials(
    trials: Sequence[Trial], make: Callable[[Trial], TrialSettings], to_prepare: Collection[Values], config: SweepConfig
) -> Checked:
    """Makes the worker and the settings of every trial, and the model of those that `to_prepare` names.

    Raises:
        UserError: as a run's; the message begins with the configuration. Or there is no such figure.
    """
    figure: Figure | None = None
    samples, halves, late = 0, True, ""
    for trial in trials:
        settings = make(trial)
        try:
            given = _check_settings(trial, settings)
            if trial.values in to_prepare:
                initial = prepare(settings.worker, given.resolved())
                samples = max(samples, _count_samples(settings, given, initial))
                if figure is None:
                    figure = Figure.choose(settings.storage.best_by, evaluate(settings.worker, initial.model), "--best-by")
                late = late or _describe_late(settings, initial.steps)
        except WorkerFailed:
            raise
        except UserError as error:
            raise type(error)(f"With {trial.label}: {error}") from error
    assert figure is not None, "a sweep has trials"
    notes = []
    if config.scheduler == "asha" and late:
        raise ConfigError(f"--scheduler is asha, but {late}")
    halves = config.scheduler == "asha" or (config.scheduler == "auto" and len(trials) > config.asha_factor and not late)
    if config.scheduler == "auto" and len(trials) > config.asha_factor and late:
        notes.append(f"No training ends early: {late}")
    return Checked(figure, samples, halves, notes)


def _check_settings(trial: Trial, settings: TrialSettings) -> Settings:
    """Returns the settings of the trial's run. Raises ConfigError if they contradict each other."""
    given = Settings(trial.name, settings.lte, settings.merge, settings.train)
    settings.failure.check_heads(settings.lte.num_heads)
    if settings.merge.policy != "auto" and not settings.train.baseline:
        make_policy(settings.merge)
    return given


def _count_samples(settings: TrialSettings, given: Settings, initial: Initial) -> int:
    """The samples that all heads of a trial train, together."""
    batch, _ = read_first_batches(settings.worker, given.resolved())
    return int(initial.steps * settings.lte.num_heads * settings.train.accumulate * count_samples(batch))


def _describe_late(settings: TrialSettings, steps: int) -> str:
    """Says that a trial is evaluated at its end only; empty if it isn't, or if that can't be told."""
    merge, every = settings.merge, settings.train.eval_every
    if merge.merge_every or merge.merge_schedule or merge.match_speed:
        return ""
    merges = max(1, steps // merge.merge_iter)
    if merge.when != "barrier" and not settings.train.baseline:
        merges *= settings.lte.num_heads
    if every and every < merges:
        return ""
    return (
        f"trainings are evaluated only at their end: --eval-every is {every}, and there are {merges} merges. Lower "
        "--eval-every or --merge-iter."
    )
