"""The merge policy's own arguments as flags and in TOML files."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import tomli_w

from lte_ray.cli.flags import parse
from lte_ray.cli.main import main
from lte_ray.config import FailureConfig, LTEConfig, MergeConfig, PlacementConfig, StorageConfig, TrainConfig
from lte_ray.engine.settings import Settings
from lte_ray.errors import ConfigError
from lte_ray.merging.registry import make_policy, resolved_arguments
from lte_ray.run import record as run_record
from lte_ray.run import start as run_start
from lte_ray.storage import RunDirectory
from workers.regression import Regression

GOOD = "workers.regression:Regression"

MINE = '''
class Mine:
    """Mine.

    Args:
        alpha: how much
            each counts.
        names: some names.
    """

    def __init__(
        self, alpha: float = 1.0, on: bool = True, names: tuple[str, ...] = ("a",), limit: float | None = None, bare=3
    ) -> None:
        self.alpha, self.on, self.names, self.limit, self.bare = alpha, on, names, limit, bare

    def merge(self, pending, roster):
        return {p.head: self.alpha / roster.num_heads for p in pending}

class Needy(Mine):
    def __init__(self, k: int):
        self.k = k

class Odd(Mine):
    def __init__(self, k: "NoSuchType" = None, *, m: dict = {}, n=None):
        pass

class Odder(Mine):
    def __init__(self, k: object):
        pass

def rule(pending, roster, share: float = 0.5):
    return {p.head: share for p in pending}

def bare(pending, roster, share, on=None, whole=1):
    return {p.head: share for p in pending}

made = Mine(alpha=0.25)
'''


@pytest.fixture
def mine(tmp_path: Path) -> str:
    """A user's file with policies."""
    (tmp_path / "mine.py").write_text(MINE)
    return str(tmp_path / "mine.py")


def merge_of(*arguments: str) -> MergeConfig:
    return parse(Regression, GOOD, list(arguments)).merge


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error output of `lte-ray train`, which must exit with 2."""
    try:
        code = main(["train", GOOD, *arguments])
    except SystemExit as leaving:
        code = leaving.code  # type: ignore[assignment]
    assert code == 2
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_flags_give_the_policys_arguments(mine: str) -> None:
    """For a user's class and function, and for built-in policies; arguments that aren't given have their defaults."""
    merge = merge_of("--policy", f"{mine}:Mine", "--policy.alpha", "0.5", "--policy.no-on", "--policy.names", "b", "c")
    assert merge.policy == f"{mine}:Mine"
    assert merge.policy_args == {"alpha": 0.5, "on": False, "names": ("b", "c"), "limit": None, "bare": 3}
    assert merge_of(f"--policy={mine}:rule", "--policy.share", "1").policy_args == {"share": 1.0}
    given = merge_of("--policy", "nesterov", "--policy.lr=0.5", "--policy.replica-lr", "0.4").policy_args
    rates = {"lr": 0.5, "momentum": 0.9, "replica_lr": 0.4, "replica_momentum": None}
    assert given == {**rates, "final_lr": 1.0, "warmup": 0}
    assert merge_of("--policy", f"{mine}:Odd", "--policy.n", "x").policy_args == {"k": None, "n": "x"}
    bare = merge_of("--policy", f"{mine}:bare", "--policy.share", "0.5", "--policy.on", "True", "--policy.whole", "1.5")
    assert bare.policy_args == {"share": 0.5, "on": True, "whole": 1.5}
    bare = merge_of("--policy", f"{mine}:bare", "--policy.share", "2", "--policy.on", "false")
    assert [(type(v), v) for v in bare.policy_args.values()] == [(int, 2), (bool, False), (int, 1)]
    assert merge_of("--policy", f"{mine}:bare", "--policy.share", "much").policy_args["share"] == "much"
    assert merge_of("--policy.k", "3", "--policy", f"{mine}:Needy").policy_args == {"k": 3}
    assert merge_of("--policy", f"{mine}:Mine", "--policy", "average").policy_args is None


def test_a_policy_without_arguments_has_no_section(mine: str) -> None:
    """A policy without arguments and a policy object get none."""
    assert merge_of().policy_args is None
    assert merge_of("--policy", f"{mine}:made").policy_args is None


@pytest.mark.parametrize("policy", ["gated", "stale", "clip", "delayed_nesterov", "krum", "adam"])
def test_built_in_policies_can_be_made_from_their_flags(policy: str) -> None:
    """The defaults of the flags give the same policy as the defaults in Python."""
    merge = merge_of("--policy", policy)
    assert resolved_arguments(merge) == resolved_arguments(MergeConfig(policy=policy)) == merge.policy_args
    make_policy(merge)


def test_help_lists_the_chosen_policys_arguments(capsys: pytest.CaptureFixture[str], mine: str) -> None:
    """With their help from the docstring. Arguments of other policies, and `policy_args` itself, aren't flags."""
    with pytest.raises(SystemExit) as leaving:
        main(["train", GOOD, "--policy", f"{mine}:Mine", "--help"])
    assert leaving.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--policy.alpha FLOAT how much each counts. (default: 1.0)" in shown
    assert "--policy.bare INT" in shown
    assert "--policy.lr" not in shown
    assert "policy-args" not in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--policy", "nesterov", "--policy.momentun", "0.5"],
            "no argument --policy.momentun. Did you mean --policy.momentum?",
        ),
        (["--policy", "nesterov", "--policy.lr", "x"], "--policy.lr is 'x', but it must be a number"),
        (["--policy", "nesterov", "--policy.momentum", "1"], "--policy.momentum is 1.0, but it must be at least 0 and below"),
        (["--policy", "stale", "--policy.discount", "linear"], "--policy.discount is 'linear', but it must be one of"),
        (["--policy.lr", "0.5"], "The policy auto has no argument --policy.lr. It has none."),
        (["--policy", "nestrov", "--policy.lr", "0.5"], "--policy is 'nestrov', but the built-in policies are"),
        (["--policy", "MINE:Needy"], "--policy.k"),
        (["--policy", "MINE:Odder"], "mine.py:Odder needs k, which can't be a flag: annotate it as int, float"),
        (["--policy", "MINE:Mien"], "Did you mean Mine? Its classes and functions are: Mine, Needy, Odd, Odder, rule, bare."),
        (["--policy", "MINE:Rule"], "Did you mean rule?"),
        (["--policy-args", "3"], "lte-ray train has no flag --policy-args."),
        (["--quorum", "2"], "--quorum is 2, but it only counts with --when quorum, not barrier."),
    ],
)
def test_bad_policy_flags_are_one_clear_error(
    capsys: pytest.CaptureFixture[str], mine: str, arguments: list[str], says: str
) -> None:
    """Exit code 2; the message names the flag."""
    assert says in complaint(capsys, *[argument.replace("MINE", mine) for argument in arguments])


def written(tmp_path: Path, text: str) -> str:
    (tmp_path / "settings.toml").write_text(text)
    return str(tmp_path / "settings.toml")


def test_a_toml_table_gives_arguments_and_flags_win(tmp_path: Path, mine: str) -> None:
    """A table [policy_args] with TOML's types."""
    text = tomli_w.dumps({"policy": f"{mine}:Mine", "policy_args": {"alpha": 2, "on": False, "names": [], "limit": 0.5}})
    path = written(tmp_path, text)
    assert merge_of("--config", path).policy_args == {"alpha": 2.0, "on": False, "names": (), "limit": 0.5, "bare": 3}
    assert merge_of("--config", path, "--policy.alpha", "3").policy_args == {
        "alpha": 3.0, "on": False, "names": (), "limit": 0.5, "bare": 3,
    }  # fmt: skip


def test_a_file_gives_no_arguments_to_another_policy(tmp_path: Path) -> None:
    """The same policy, named again by a flag, gets them."""
    path = written(tmp_path, 'policy = "nesterov"\n[policy_args]\nlr = 0.25\n')
    assert merge_of("--config", path, "--policy", "krum").policy_args == {"faulty": 1, "keep": 0}
    again = merge_of("--config", path, "--policy", "nesterov").policy_args
    assert again is not None
    assert (again["lr"], again["momentum"]) == (0.25, 0.9)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('policy = "nesterov"\n[policy_args]\nmomentun = 0.5', r"policy nesterov has no argument momentun .* mean momentum\?"),
        ("[policy_args]\nlr = 0.5", r"settings.toml: the policy auto has no argument lr \(--policy.lr\). It has none."),
        ("policy_args = 3", r"policy_args must be a table \[policy_args\]"),
        ('policy = "nestrov"', "Did you mean nesterov"),
    ],
)
def test_a_bad_toml_table_is_one_clear_error(tmp_path: Path, text: str, says: str) -> None:
    """The error names the file and the key."""
    with pytest.raises(ConfigError, match=says):
        merge_of("--config", written(tmp_path, text))


@pytest.mark.parametrize(
    "merge",
    [
        MergeConfig(),
        MergeConfig(policy="nesterov"),
        MergeConfig(policy="nesterov", policy_args={"lr": 0.25}, when="quorum", quorum=2),
        MergeConfig(policy="gated", policy_args={"policy": "nesterov", "args": ("lr=0.5",), "max_rise": 0.1}),
        MergeConfig(policy="MINE:Mine", policy_args={"limit": None, "names": (), "on": False}),
        MergeConfig(policy="MINE:rule", policy_args={"share": 0.25}),
    ],
    ids=lambda merge: f"{merge.policy}",
)
def test_a_runs_record_gives_its_policy_again(tmp_path: Path, mine: str, merge: MergeConfig) -> None:
    """`--config run.toml` gives the same policy with the same arguments, including those that were defaults."""
    merge = dataclasses.replace(merge, policy=merge.policy.replace("MINE", mine))
    merge = dataclasses.replace(merge, policy_args=resolved_arguments(merge) or None)  # as the trainer does
    settings, storage = Settings("first", LTEConfig(), merge, TrainConfig()), StorageConfig(name="first", storage=str(tmp_path))
    directory = RunDirectory.open(str(tmp_path), "first")
    run_start.create_run(
        directory, run_record.make_record(Regression(), GOOD, settings, PlacementConfig(), storage, FailureConfig()), storage
    )
    record = tmp_path / "first" / "run.toml"
    assert merge_of("--config", str(record)) == merge
    assert bool(re.search(r"^\[policy_args\]$", record.read_text(), flags=re.MULTILINE)) or merge.policy_args is None


def test_functions_and_objects_are_recorded_by_name(mine: str) -> None:
    """A function by its own name, an object by its class."""
    assert run_record.object_name(complaint) == f"{__name__}:complaint"
    assert run_record.object_name(MergeConfig()) == "lte_ray.config.merge:MergeConfig"
