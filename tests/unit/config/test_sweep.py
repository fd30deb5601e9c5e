"""What `--over` says, and the configurations that a sweep makes of it."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lte_ray.config.sweep import Axis, SweepConfig, choose_configurations, parse_axis
from lte_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("lora-r=8,16", Axis("lora-r", ("8", "16"))),
        ("--lora_r = 8, 16 ,8", Axis("lora-r", ("8", "16"))),
        ("lora-r=8 8,16 4", Axis("lora-r", ("8 8", "16 4"))),
        ("policy=mine.py:by_loss,average", Axis("policy", ("mine.py:by_loss", "average"))),
        ("lr=0.1:0.5", Axis("lr", (), 0.1, 0.5)),
        ("lr=log:1e-4:1e-2", Axis("lr", (), 1e-4, 1e-2, log=True)),
        ("num-heads=1:8", Axis("num-heads", (), 1, 8, whole=True)),
        ("worker.width=log:8:64", Axis("worker.width", (), 8, 64, log=True, whole=True)),
    ],
)
def test_values_and_ranges_are_told_apart(text: str, axis: Axis) -> None:
    """Two numbers around a colon are a range, of whole numbers if both are; anything else is a list of values."""
    assert parse_axis(text) == axis


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr", "it must be a flag, =, and its values"),
        ("=8", "it must be a flag, =, and its values"),
        ("lr=", "it must be a flag, =, and its values"),
        ("lr=1,,2", "a value between its commas is missing"),
        ("lr=2:1", "must begin with its lower end"),
        ("lr=1:1", "must begin with its lower end"),
        ("lr=log:0:1", "must begin above 0"),
        ("lr=log:a:1", "a range needs two numbers"),
        ("lr=log:1:inf", "a range needs two numbers"),
    ],
)
def test_other_forms_are_refused(text: str, says: str) -> None:
    """With what was given and how it is written."""
    with pytest.raises(ConfigError, match=says):
        SweepConfig(over=(text,))


def test_settings_out_of_range_are_refused() -> None:
    """Each with its flag."""
    for name, value in {"num_trials": 0, "finalists": 0, "max_concurrent": -1, "asha_factor": 1, "asha_start": 1.0}.items():
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is {value}"):
            SweepConfig(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--seeds is"):
        SweepConfig(seeds=(0, -1))
    with pytest.raises(ConfigError, match="--over has lora-r twice"):
        SweepConfig(over=("lora-r=1,2", "lora_r=4"))


def test_a_grid_is_complete_and_a_smaller_number_is_its_beginning() -> None:
    """All combinations once, in a random order that the seed decides; more than there are is an error."""
    axes = [parse_axis("a=1,2,3"), parse_axis("b=x,y")]
    every = choose_configurations(axes, None, 0)
    assert sorted(every) == sorted((("a", a), ("b", b)) for a in "123" for b in "xy")
    assert choose_configurations(axes, 4, 0) == every[:4]
    assert choose_configurations(axes, None, 1) != every
    with pytest.raises(ConfigError, match="--num-trials is 7, but --over has 6 combinations"):
        choose_configurations(axes, 7, 0)


@given(number=st.integers(1, 40), seed=st.integers(0, 5), log=st.booleans())
def test_a_range_is_covered_evenly(number: int, seed: int, log: bool) -> None:
    """Values are within the range; the largest gap is small, unlike that of independent draws; more trials keep the first."""
    axis = Axis("lr", (), 0.001, 1.0, log=log)
    values = [float(configuration[0][1]) for configuration in choose_configurations([axis], number, seed)]
    assert len(values) == number
    assert all(0.001 <= value <= 1.0 for value in values)
    assert [float(c[0][1]) for c in choose_configurations([axis], number + 3, seed)][:number] == values
    scale = [math.log(value, 10) / 3 + 1 if log else (value - 0.001) / 0.999 for value in values]
    edges = sorted([0.0, *scale, 1.0])
    assert max(b - a for a, b in itertools.pairwise(edges)) < 3.0 / (number + 1)


def test_whole_numbers_are_tried_once_each() -> None:
    """A range of three whole numbers has three configurations, however many trials are asked for."""
    configurations = choose_configurations([parse_axis("n=1:3")], 20, 0)
    assert sorted(configurations) == [(("n", "1"),), (("n", "2"),), (("n", "3"),)]


def test_lists_take_turns_with_ranges() -> None:
    """Each combination of the lists is taken once before one is repeated."""
    configurations = choose_configurations([parse_axis("r=1,2,4"), parse_axis("lr=0.0:1.0")], 9, 0)
    for start in (0, 3, 6):
        assert {dict(c)["r"] for c in configurations[start : start + 3]} == {"1", "2", "4"}
