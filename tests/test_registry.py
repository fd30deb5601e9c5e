"""How a merge policy is found: by name, as an object or class, in a module or file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from lte_ray.config import MergeConfig
from lte_ray.errors import ConfigError
from lte_ray.merging import POLICIES, Average, Decision, MergePolicy, Pending, Roster, Wait
from lte_ray.merging.registry import make_policy


class Mine:
    """A policy of a user's."""

    def decide(self, pending: Sequence[Pending], roster: Roster) -> Decision:
        return Wait()


class Empty:
    """No policy."""


class Raising(Mine):
    """Can't be made."""

    def __init__(self) -> None:
        raise KeyError("no key")


class Asking(Mine):
    """Needs an argument."""

    def __init__(self, k: int) -> None:
        self.k = k


a_policy = Mine()


@pytest.mark.parametrize("name", list(POLICIES))
def test_every_built_in_name_makes_its_policy(name: str) -> None:
    """Each is a MergePolicy of its class, made anew."""
    policy = make_policy(name)
    assert type(policy) is POLICIES[name]
    assert isinstance(policy, MergePolicy)
    assert make_policy(name) is not policy


def test_the_default_is_the_papers_average() -> None:
    """MergeConfig's default policy is Average."""
    assert isinstance(make_policy(MergeConfig().policy), Average)


def test_an_object_is_taken_as_it_is() -> None:
    """A policy object is itself; a class is made without arguments."""
    assert make_policy(a_policy) is a_policy
    assert type(make_policy(Mine)) is Mine


def test_a_policy_is_found_in_a_module_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By module:Class, module:object and path/to/file.py:Class."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    assert type(make_policy(f"{__name__}:Mine")) is Mine
    assert make_policy(f"{__name__}:a_policy") is a_policy
    (tmp_path / "policy_h.py").write_text("class Own:\n    def decide(self, pending, roster): return 'own'")
    assert make_policy(f"{tmp_path}/policy_h.py:Own").decide([], None) == "own"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("avrage", r"--policy is 'avrage', but the built-in policies are: average.* Did you mean average\? Give your own as"),
        ("zzz", r"--policy is 'zzz', but the built-in policies are: average\S* Give your own as module:Class or path"),
        ("", r"--policy is '', but the built-in policies are: average"),
        ("nowhere_i:Own", "--policy 'nowhere_i:Own': there is no module nowhere_i"),
        ("lte_ray.merging.average:Avrage", r"has no Avrage. Did you mean Average\?"),
        (f"{__name__}:Empty", r"is a Empty without a decide\(pending, roster\) method"),
        (Empty, "without a decide"),
        (Empty(), "without a decide"),
        (None, "is a NoneType without a decide"),
        (3, "is a int without a decide"),
        (Raising, r"Raising\(\) raised KeyError: 'no key'"),
        (f"{__name__}:Raising", r"--policy \S+:Raising: Raising\(\) raised KeyError: 'no key'"),
        (Asking, r"Asking\(\) raised TypeError: .*missing 1 required positional argument: 'k'"),
        ("lte_ray.config:near", "is a function without a decide"),
    ],
)
def test_what_is_no_policy_is_a_config_error(policy: object, message: str) -> None:
    """The error names the flag, what was found, and what to give instead."""
    with pytest.raises(ConfigError, match=message) as raised:
        make_policy(policy)
    assert "--policy" in str(raised.value)
