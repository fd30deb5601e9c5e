"""What a user reads after interrupting a training."""

from __future__ import annotations

from pathlib import Path

import pytest

from lte_ray import trainer
from lte_ray.cli import main as command_line
from lte_ray.storage import RunDirectory


@pytest.mark.parametrize(
    ("versions", "text"),
    [
        ([], "There is no complete checkpoint; --resume would start from the beginning."),
        ([4, 8], "Checkpoint 8 is complete; continue from it with --resume."),
    ],
)
def test_an_interrupt_says_which_checkpoint_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, versions: list[int], text: str
) -> None:
    """It promises none that isn't there."""
    monkeypatch.setattr(trainer.checkpoint, "complete_versions", lambda directory: versions)
    with pytest.raises(KeyboardInterrupt) as raised, trainer._telling_what_is_kept(RunDirectory.open(str(tmp_path), "r")):
        raise KeyboardInterrupt
    assert str(raised.value) == text


@pytest.mark.parametrize(
    ("command", "kept", "text"),
    [
        ("train", "Checkpoint 8 is complete.", "Interrupted. Checkpoint 8 is complete."),
        ("train", "", "Interrupted. Training hadn't begun."),
        ("ladder", "Checkpoint 8 is complete.", "Interrupted. Trainings that are done are kept."),
    ],
)
def test_the_command_line_passes_it_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str, kept: str, text: str
) -> None:
    """A ladder's own trainings continue in another way, and an interrupt before the run has nothing to say."""

    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt(kept)

    commands = {**command_line.COMMANDS, command: command_line.COMMANDS[command]._replace(run=interrupted)}
    monkeypatch.setattr(command_line, "COMMANDS", commands)
    monkeypatch.setattr(command_line.signal, "signal", lambda *_: None)
    assert command_line.main([command]) == 130
    assert text in capsys.readouterr().err
