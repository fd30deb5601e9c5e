"""Help and mistakes: fast, plain, by topic, and with a hint."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from lte_ray.cli.flags import TRAIN, parse
from lte_ray.cli.hints import ELSEWHERE
from lte_ray.cli.ladder import LADDER
from lte_ray.cli.main import COMMANDS, main
from lte_ray.cli.simulate import SIMULATE
from lte_ray.errors import ConfigError
from workers.regression import Regression

GOOD = "workers.regression:Regression"

HEAVY = {"torch", "ray", "pyarrow", "numpy"}

LIGHT_CALLS = [
    ["--help"], ["--version"], [], ["unknown"], ["train"], ["train", "--help"], ["train", "--help-all"], ["ladder", "--help"],
    ["simulate", "--help-all"], ["export", "--help"], ["audit"], ["train", "--stepz", "3"], ["submit"],
    ["submit", "--help"], ["submit", "mine.py:Net"],
]  # fmt: skip


def test_help_and_mistakes_import_nothing_heavy() -> None:
    """All of them in one process; `import lte_ray` doesn't, either."""
    code = (
        "import sys, contextlib, io\nimport lte_ray\nfrom lte_ray.cli.main import main\n"
        f"for call in {LIGHT_CALLS!r}:\n"
        "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "        main(call)\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The help, which must end with exit code 0."""
    with pytest.raises(SystemExit) as leaving:
        main([*arguments])
    assert leaving.value.code == 0
    return capsys.readouterr().out


def test_the_short_help_shows_common_flags_and_the_workers_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten of ours; the others are in `--help-all`, under their topics. Both are plain text."""
    short = shown(capsys, "train", GOOD, "--help")
    flags = re.findall(r"^  --(?!no-)([\w.-]+)", short, flags=re.MULTILINE)
    common = [name.replace("_", "-") for name in TRAIN.common]
    assert flags[:10] == common
    assert "worker.batch-size" in flags
    full = shown(capsys, "train", GOOD, "--help-all")
    titles = re.findall(r"^([a-z].*):$", full, flags=re.MULTILINE)
    assert titles == [*TRAIN.titles.values(), f"the worker's own ({GOOD})", "in general"]
    assert (short + full).isprintable() or set(short + full) - {"\n"} <= {c for c in short + full if c.isprintable()}
    assert "│" not in short + full
    assert "{None}" not in short + full


@pytest.mark.parametrize("subcommand", [TRAIN, LADDER, SIMULATE], ids=lambda subcommand: subcommand.name)
def test_common_flags_exist(subcommand: object, capsys: pytest.CaptureFixture[str]) -> None:
    """Each stands once in the short help."""
    short = shown(capsys, subcommand.name, "--help")  # type: ignore[attr-defined]
    for name in subcommand.common:  # type: ignore[attr-defined]
        assert len(re.findall(rf"^  --{name.replace('_', '-')}\b(?!-)", short, flags=re.MULTILINE)) == 1, name


def test_values_are_named_so_that_people_understand(capsys: pytest.CaptureFixture[str]) -> None:
    """N or several, TIME, and the choices."""
    full = shown(capsys, "train", "--help-all")
    for form in ("--lora-r N [N ...]", "--deadline TIME", "--lr X", "--exclude [TEXT ...]", "--wait, --no-wait", "--name NAME"):
        assert form in full
    assert "--bandwidth RATE" in shown(capsys, "simulate", "--help")


def unknown(*arguments: str) -> str:
    with pytest.raises(ConfigError) as raised:
        parse(Regression, GOOD, list(arguments))
    return str(raised.value)


def test_an_unknown_flag_is_one_sentence() -> None:
    """Its value isn't a second unknown flag; the nearest name is offered, also the worker's."""
    assert unknown("--stepz", "3") == "lte-ray train has no flag --stepz. Did you mean --steps?"
    assert unknown("--num_heds=3") == "lte-ray train has no flag --num-heds. Did you mean --num-heads?"
    assert (
        unknown("--batch-size", "8") == "lte-ray train has no flag --batch-size. It is the worker's: write --worker.batch-size."
    )
    assert unknown("--zzz") == "lte-ray train has no flag --zzz. See lte-ray train --help-all."
    assert unknown("-x", "3").startswith("lte-ray train has no flag -x.")
    assert unknown("--worker.widht", "3").endswith("has no argument --worker.widht. Did you mean --worker.width?")


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_other_tools_names_are_explained_with_flags_that_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The hint isn't given for a flag of ours, and each flag that it names is one."""
    known = set(re.findall(r"--[a-z][\w-]*", shown(capsys, "train", "--help-all")))
    assert f"--{name}" not in known
    named = set(re.findall(r"--[a-z][a-z-]*", ELSEWHERE[name]))
    assert named - {"--worker", "--policy"} <= known, named - known


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps"], "--steps needs a value."),
        (["--lora-r"], "--lora-r needs at least one value."),
        (["--wait=yes"], "--wait takes no value, but was given 'yes'."),
        (["--steps", "3", "4"], "The value '4' is one too many: --steps takes fewer values."),
        (["stray"], "The value 'stray' is one too many: no argument is expected there."),
        (["--lr", "fast"], "--lr is 'fast', but it must be a number or 'None'."),
        (["--worker.batch-size", "many"], "--worker.batch-size is 'many', but it must be a whole number."),
        (["--worker.batch-size"], "--worker.batch-size needs a value."),
        (["--worker.batch-size", "3", "4"], "The value '4' is one too many: --worker.batch-size takes fewer values."),
    ],
)
def test_values_that_do_not_fit_are_one_sentence(arguments: list[str], says: str) -> None:
    """In the same words for our flags and the worker's."""
    assert unknown(*arguments) == says


def test_every_command_has_a_help(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` and `--help-all`."""
    for name in COMMANDS:
        assert shown(capsys, name, "--help").startswith(f"usage: lte-ray {name}")
        assert shown(capsys, name, "--help-all").startswith(f"usage: lte-ray {name}")
