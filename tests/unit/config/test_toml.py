"""Values of settings files are converted to the types of settings, or are one clear error."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch

from lte_ray.config.toml import convert, read_value
from lte_ray.errors import ConfigError


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (3, int, 3),
        (3, float, 3.0),
        ("3", int, 3),
        ("1e3", float, 1000.0),
        (True, bool, True),
        (5, str, "5"),
        ("None", int | None, None),
        ("None", str | None, None),
        ("None", str, "None"),
        ("5", int | str, "5"),
        ("b", Literal["a", "b"], "b"),
        ("2", Literal[1, 2], 2),
        ("BLUE", Color, Color.BLUE),
        (["BLUE", "RED"], tuple[Color, ...], (Color.BLUE, Color.RED)),
        ("/x", Path | None, Path("/x")),
        ([1, 2], tuple[float, ...], (1.0, 2.0)),
        ([1, "a"], tuple[int, str], (1, "a")),
        ([[1, 2], [3]], list[list[int]], [[1, 2], [3]]),
        ("a", tuple[str, ...], ("a",)),
        (["a", "a"], set[str], {"a"}),
        ([1], int | tuple[int, ...], (1,)),
        ({"a": 1}, Mapping[str, Any] | None, {"a": 1}),
        (4, Annotated[float, "documented"], 4.0),
        ("cpu", torch.device, torch.device("cpu")),
        ([1, {"a": 2}], Any, [1, {"a": 2}]),
    ],
)
def test_a_value_gets_the_annotated_type(value: Any, annotation: Any, expected: Any) -> None:
    """As the text of a flag would: numbers in quotes, members of an Enum by name, a single value as a list of one."""
    converted = convert(value, annotation)
    assert (converted, type(converted)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        ("many", int, "x is 'many', but it must be a whole number."),
        (1.5, int, "x is 1.5, but it must be a whole number."),
        (True, int | None, "x is true, but it must be a whole number or 'None'."),
        ("yes", bool, "x is 'yes', but it must be true or false."),
        ("re", Literal["red", "blue"], "x is 're', but it must be one of: red, blue (Did you mean red?)."),
        ("GREEN", Color, "x is 'GREEN', but it must be one of: RED, BLUE."),
        ([["a"]], tuple[str, ...], "x is [['a']], but it must be a list, each item text."),
        ([1], tuple[int, str], "x is [1], but it must be a list of 2 values (a whole number, text)."),
        ({"a": 1}, str, "x is a table, but it must be text."),
        ("nowhere", torch.device, "x is 'nowhere', but it must be left out, since a file can't give a device."),
        (5, torch.dtype, "x is 5, but it must be left out, since a file can't give a dtype."),
    ],
)
def test_a_value_of_another_type_is_an_error(value: Any, annotation: Any, message: str) -> None:
    """It says what the file has, and what it must be."""
    with pytest.raises(ConfigError) as caught:
        read_value("f.toml", "x", value, annotation)
    assert str(caught.value) == f"f.toml: {message}"


def test_an_error_shows_no_secret() -> None:
    """The value of a secret's name is masked, and a long value is shortened."""
    with pytest.raises(ConfigError, match=r"worker\.api_token is \*\*\*, but it must be a whole number"):
        read_value("f.toml", "worker.api_token", "SECRET", int)
    with pytest.raises(ConfigError, match=r"x is 'y{76}\.\.\., but"):
        read_value("f.toml", "x", "y" * 500, int)


def test_a_value_equal_to_its_default_needs_no_conversion() -> None:
    """Whatever the annotation: a run.toml holds defaults of types that TOML lacks as text."""
    assert read_value("f.toml", "x", 3, torch.dtype, 3) == 3
    assert read_value("f.toml", "x", "None", torch.dtype, None) is None
