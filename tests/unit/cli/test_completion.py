"""The scripts with which shells complete the command line."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from lte_ray.cli.completion import make_parser
from lte_ray.cli.main import COMMANDS, main


def script(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The printed script as a file."""
    assert main(["completion", shell]) == 0
    path = tmp_path / f"complete.{shell}"
    path.write_text(capsys.readouterr().out)
    return path


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_valid_and_names_commands_and_flags(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shell itself parses it, where it is installed."""
    path = script(shell, tmp_path, capsys)
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(path)], check=True)
    text = path.read_text()
    for word in (*COMMANDS, "num-heads", "no-wait", "bandwidth", "print-config", "barrier"):
        assert word in text, word


def test_bash_completes_commands_flags_and_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As after pressing Tab."""
    path = script("bash", tmp_path, capsys)
    typed = {"lte-ray tr": "train", "lte-ray train gpt --num-h": "--num-heads", "lte-ray train gpt --when b": "barrier"}
    for line, expected in typed.items():
        words = " ".join(f'"{word}"' for word in line.split())
        code = (
            f'source {path}; COMP_WORDS=({words}); COMP_CWORD={len(line.split()) - 1}; COMP_LINE="{line}"; '
            "_shtab_lte_ray; echo ${COMPREPLY[@]}"
        )
        done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False)
        assert expected in done.stdout.split(), (line, done)


def test_every_command_is_completed() -> None:
    """A new subcommand is in the scripts, too."""
    (subparsers,) = (action for action in make_parser()._actions if action.choices)
    assert set(subparsers.choices or ()) == set(COMMANDS)


def test_another_shell_is_one_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    """It names the shells."""
    assert main(["completion", "tcsh"]) == 2
    assert "SHELL is 'tcsh', but it must be one of: bash, zsh, fish" in capsys.readouterr().err
