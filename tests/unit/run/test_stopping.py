"""When a run ends early without an error."""

from __future__ import annotations

import math
import time

import pytest

from lte_ray.config import TrainConfig
from lte_ray.config.stopping import Condition, parse_condition
from lte_ray.errors import ConfigError
from lte_ray.messages import MergeRecord
from lte_ray.run.stopping import Stop, StopRules


def rules(best_by: str = "", began: float = 0.0, **train: object) -> StopRules:
    return StopRules(TrainConfig(**train), best_by, began)  # type: ignore[arg-type]


def merge(**losses: float) -> MergeRecord:
    return MergeRecord(1, 1.0, (), 1, 1, {int(head[1:]): loss for head, loss in losses.items()}, 0, 0, 1)


@pytest.mark.parametrize(
    ("text", "condition"),
    [
        ("loss<2.3", Condition("loss", "<", 2.3)),
        (" val accuracy >= .9 ", Condition("val accuracy", ">=", 0.9)),
        ("a/b<=-1e-3", Condition("a/b", "<=", -1e-3)),
        ("loss > 5", Condition("loss", ">", 5.0)),
    ],
)
def test_conditions_are_a_name_an_operator_and_a_number(text: str, condition: Condition) -> None:
    """With spaces or without, and any name."""
    assert parse_condition(text) == condition


@pytest.mark.parametrize("text", ["loss", "loss<", "<2", "loss<two", "loss=2", "loss==2", "loss<nan", "loss<<2", "a<inf"])
def test_other_texts_are_no_condition(text: str) -> None:
    """The error shows one, and says that shells need quotes."""
    with pytest.raises(ConfigError, match=r"--stop-when is .*, but it must be a figure, one of < <= > >=, and a number"):
        TrainConfig(stop_when=text)


@pytest.mark.parametrize(
    ("operator", "value", "holds"),
    [("<", 2.0, False), ("<=", 2.0, True), (">", 2.0, False), (">=", 2.0, True), ("<", 1.9, True), (">", math.nan, False)],
)
def test_a_condition_holds_as_its_operator_says(operator: str, value: float, holds: bool) -> None:
    """NaN meets none."""
    assert Condition("loss", operator, 2.0).holds(value) is holds


def test_a_figure_of_the_evaluation_ends_the_run() -> None:
    """At the first evaluation that meets the condition."""
    run = rules(stop_when="accuracy>0.9")
    for accuracy in (0.5, math.nan, 0.9):
        run.record_evaluation({"accuracy": accuracy})
        assert run.stop is None
    run.record_evaluation({"accuracy": 0.91})
    assert run.stop == Stop("stop-when", "accuracy is 0.91 (--stop-when 'accuracy>0.9')")


def test_the_training_loss_is_the_mean_of_the_heads_newest() -> None:
    """One head alone doesn't end the run."""
    run = rules(stop_when="train_loss<1", eval_every=0)
    run.record_merge(merge(h0=1.5, h1=2.0))
    run.record_merge(merge(h0=0.5))
    assert run.stop is None
    run.record_merge(merge(h1=1.0))
    assert run.stop is not None
    assert run.stop.reason == "train_loss is 0.75 (--stop-when 'train_loss<1')"


@pytest.mark.parametrize(
    ("best_by", "values", "after"),
    [
        ("", [3.0, 2.0, 2.5, 1.0, 1.0, 1.5], 6),
        ("-accuracy", [0.1, 0.2, 0.3, 0.2, 0.3], 5),
        ("accuracy", [math.nan, math.nan], 2),
        ("accuracy", [1.0, math.nan, 0.5, 2.0], None),
    ],
)
def test_patience_counts_evaluations_since_the_best(best_by: str, values: list[float], after: int | None) -> None:
    """The first figure by default, lowest is best; an equal one, or NaN, is no improvement."""
    run = rules(best_by, patience=2)
    stopped = None
    for number, value in enumerate(values, 1):
        run.record_evaluation({"accuracy": value, "other": 0.0})
        stopped = stopped or (number if run.stop else None)
    assert stopped == after
    assert run.stop is None or run.stop.kind == "patience"


def test_unknown_figures_are_named_at_the_first_evaluation() -> None:
    """With those that there are."""
    with pytest.raises(ConfigError, match=r"the evaluation has no los\. It has loss, accuracy; train_loss is the"):
        rules(stop_when="los<1").record_evaluation({"loss": 1.0, "accuracy": 0.5})
    with pytest.raises(ConfigError, match=r"--best-by is 'los', but the evaluation has no such figure\. It has loss"):
        rules("-los", patience=1).record_evaluation({"loss": 1.0})
    with pytest.raises(ConfigError, match=r"--patience is 1, but the evaluation has no such figure\. It has no figures"):
        rules(patience=1).record_evaluation({})


def test_time_ends_the_run_once_it_is_over() -> None:
    """Counted from when this process began; without a limit never."""
    for limit, stops in ((0.0, False), (3600.0, False), (5.0, True)):
        run = rules(began=time.monotonic() - 60, max_time=limit)
        run.check_time()
        assert (run.stop is not None) is stops
    assert TrainConfig(max_time="3h").max_time == 10800.0  # type: ignore[arg-type]


def test_the_first_reason_counts() -> None:
    """Later ones don't replace it."""
    run = rules()
    run.request(Stop("request", "enough"))
    run.request(Stop("max-time", "late"))
    assert run.stop == Stop("request", "enough")


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ({"patience": 3, "eval_every": 0}, "--patience needs evaluations during the run, but --eval-every is 0"),
        ({"stop_when": "loss<1", "eval_every": 0}, "--stop-when 'loss<1' needs evaluations during the run"),
        ({"patience": -1}, "--patience is -1, but it must be at least 0"),
        ({"patience": 1.5}, "--patience is 1.5, but it must be a whole number"),
        ({"max_time": "soon"}, "--max-time is 'soon', but it must be a time such as"),
        ({"max_time": -1.0}, "--max-time is -1.0, but it must be at least 0"),
        ({"stop_when": 3}, "--stop-when is 3, but it must be a figure"),
        ({"callback": "one.py:A"}, "--callback is 'one.py:A', but it must be a list of names"),
    ],
)
def test_bad_settings_are_one_error(train: dict[str, object], says: str) -> None:
    """Which names the flag, what it is and what it must be."""
    with pytest.raises(ConfigError, match=says):
        TrainConfig(**train)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["max_time", "stop_when", "patience", "callback"])
def test_what_runs_to_its_end_refuses_stops(name: str) -> None:
    """A ladder and a simulation don't end early."""
    value: object = {"max_time": 60.0, "stop_when": "a<1", "patience": 2, "callback": ("a.py:B",)}[name]
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is .*, but rungs are equal. Leave it out"):
        TrainConfig(**{name: value}).check_runs_to_end("rungs are equal")  # type: ignore[arg-type]
    TrainConfig().check_runs_to_end("rungs are equal")
