"""docs/merge-policies.md: its examples pass the conformance kit and train from the command line as printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lte_ray.cli.flags import parse
from lte_ray.merging import POLICIES
from lte_ray.merging.policy_args import list_arguments
from tests.support.ray_runs import ROOT
from workers.regression import Regression

PAGE = (ROOT / "docs" / "merge-policies.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
COMMAND = re.search(r"^lte-ray train (\S+) (.*--policy my_policies\.py:by_loss.*)$", PAGE, flags=re.MULTILINE)


def test_the_examples_pass_the_conformance_kit_as_printed(mine: Path) -> None:
    """The page's last block checks the others with check_policy."""
    assert len(BLOCKS) == 3
    exec(BLOCKS[-1], {})


def test_the_first_example_is_ten_lines() -> None:
    """As the page says, without blank lines and comments."""
    lines = [line for line in BLOCKS[0].splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 10


def test_the_command_gives_the_example_its_argument(mine: Path) -> None:
    """The command is parsed as printed."""
    assert COMMAND is not None
    merge = parse(Regression, COMMAND[1], COMMAND[2].split()).merge
    assert (merge.policy, merge.policy_args) == ("my_policies.py:by_loss", {"power": 2.0})


@pytest.mark.slow
@pytest.mark.ray
def test_the_command_trains(mine: Path, local_ray: None) -> None:
    """It trains to the end, and run.toml records the policy and its argument."""
    from lte_ray.cli.main import main

    assert COMMAND is not None
    assert main(["train", COMMAND[1], *COMMAND[2].split(), "--storage", "runs", "--name", "r"]) == 0
    assert "[policy_args]\npower = 2.0\n" in (mine / "runs" / "r" / "run.toml").read_text()


def test_arguments_that_the_page_names_exist() -> None:
    """Every --policy.NAME is an argument of a built-in policy or of the example."""
    known = {name.replace("_", "-") for kind in POLICIES.values() for name in list_arguments(kind)} | {"power", "ARGUMENT"}
    assert set(re.findall(r"--policy\.([\w-]+)", PAGE)) <= known
