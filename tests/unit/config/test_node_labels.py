"""Labels of nodes: how settings write them, and which nodes Ray chooses by them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray._private.label_utils import validate_label_selector

from lte_ray.config import PlacementConfig
from lte_ray.config.node_labels import matches, parse_labels
from lte_ray.errors import ConfigError

WORDS = st.from_regex(r"[a-zA-Z0-9]([a-z0-9._-]{0,9}[a-z0-9])?", fullmatch=True)
VALUES = st.builds(
    lambda no, words, several: no + (f"in({','.join(words)})" if several else words[0]),
    st.sampled_from(["", "!"]), st.lists(WORDS, min_size=1, max_size=3), st.booleans(),
)  # fmt: skip


@given(
    st.dictionaries(st.builds("{}{}".format, st.sampled_from(["", "ray.io/", "a-b.example.com/"]), WORDS), VALUES, min_size=1)
)
def test_ray_takes_every_selector_that_settings_take(selector: dict[str, str]) -> None:
    """A mapping and texts give the same setting, from which the selector comes back, and Ray finds no fault in it."""
    config = PlacementConfig(head_labels=selector)  # type: ignore[arg-type]
    assert config == PlacementConfig(head_labels=tuple(f"{key}={value}" for key, value in selector.items()))
    assert parse_labels("head_labels", config.head_labels) == selector
    assert validate_label_selector(selector) is None


def test_spaces_are_left_out() -> None:
    """Ray takes the space of 'in(a, b)' as a part of b, and then finds no node labeled b."""
    assert PlacementConfig(head_labels=("mine=in(a, b)",)).head_labels == ("mine=in(a,b)",)


@pytest.mark.parametrize(
    "text", ["spot", "=spot", "mine=", "mine=-a", "mine!=a", "mine=in()", "mine=!!a", "mine=a=b", "a/b/c=d", "-a/b=c", "ä=b"]
)
def test_what_is_no_label_is_refused(text: str) -> None:
    """The message names the flag and the text, and says how labels are written."""
    for name in ("head_labels", "coordinator_labels"):
        with pytest.raises(
            ConfigError, match=rf"^--{name.replace('_', '-')} is .*must be KEY=VALUE, such as ray.io/market-type"
        ):
            PlacementConfig(**{name: (text,)})  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", [("a=b", "a=c"), ("a=b", "x=y", "a=!d")])
def test_a_key_is_given_once(labels: tuple[str, ...]) -> None:
    """A selector has one value a key."""
    with pytest.raises(ConfigError, match=r"^--head-labels has a twice. .*'a=in\(a,b\)'"):
        PlacementConfig(head_labels=labels)


def test_words_of_the_coordinator_stand_alone() -> None:
    """auto and none say something else than labels."""
    for word in ("auto", "none"):
        assert PlacementConfig(coordinator_labels=(word,)).coordinator_labels == (word,)
        with pytest.raises(ConfigError, match=f"^--coordinator-labels is {word} a=b, but {word} stands alone. Leave one out.$"):
            PlacementConfig(coordinator_labels=(word, "a=b"))
        with pytest.raises(ConfigError, match=f"--head-labels is '{word}', but it must be KEY=VALUE"):
            PlacementConfig(head_labels=(word,))


@pytest.mark.parametrize(
    ("selector", "labels", "expected"),
    [
        ({}, {}, True),
        ({"a": "b"}, {"a": "b", "c": "d"}, True),
        ({"a": "b"}, {"a": "c"}, False),
        ({"a": "b"}, {}, False),
        ({"a": "!b"}, {}, True),
        ({"a": "!b"}, {"a": "b"}, False),
        ({"a": "in(b,c)"}, {"a": "c"}, True),
        ({"a": "in(b,c)"}, {"a": "d"}, False),
        ({"a": "!in(b,c)"}, {"a": "c"}, False),
        ({"a": "!in(b,c)"}, {}, True),
        ({"a": "b", "c": "d"}, {"a": "b"}, False),
    ],
)
def test_a_node_matches_as_in_ray(selector: dict[str, str], labels: dict[str, Any], expected: bool) -> None:
    """A node without the key has no value of it, so "not b" chooses it, and "b" doesn't."""
    assert matches(selector, labels) is expected
