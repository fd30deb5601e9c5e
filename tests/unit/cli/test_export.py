"""`lte-ray export`: its files, its output, and its errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from lte_ray.cli.main import main
from tests.support.export_runs import built, save_run, settings


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(tmp_path_factory.mktemp("runs"), "gpt2", settings(), ahead=True)[0]


def export(run: Path | str, out: Path | str, *flags: str) -> int:
    return main(["export", str(run), str(out), *flags])


def test_every_format_is_written_and_reported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line names the place, its contents, and the rank and error of an adapter."""
    pytest.importorskip("peft")
    assert export(run, tmp_path / "a.safetensors", "--to", "safetensors") == 0
    assert capsys.readouterr().out == f"{tmp_path}/a.safetensors: the run's final merged weights.\n"
    built("gpt2").load_state_dict(safetensors.torch.load_file(tmp_path / "a.safetensors"), strict=True)
    assert export(run, tmp_path / "b", "--to", "pretrained", "--version", "3") == 0
    assert "/b: GPT2LMHeadModel with the merged weights of version 3." in capsys.readouterr().out
    assert (tmp_path / "b" / "config.json").exists()
    assert export(run, tmp_path / "c", "--to", "peft") == 0
    said = capsys.readouterr().out
    assert "/c: LoRA adapter of rank 4 on 8 layer(s) of the GPT2LMHeadModel: the change from the initial model" in said
    assert "8 module(s) are included in full: lm_head, transformer.h.0.ln_1" in said
    assert export(run, tmp_path / "d", "--to", "peft", "--head", "1", "--rank", "3") == 0
    assert "/d: LoRA adapter of rank 3 on 8 layer(s)" in capsys.readouterr().out
    assert (tmp_path / "d" / "adapter_config.json").exists()


def test_the_worker_may_have_moved(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--worker` names it, here as a file; it gets the settings of the run."""
    (tmp_path / "moved.py").write_text("from tests.support.export_runs import ExportWorker\n")
    monkeypatch.chdir(tmp_path)
    assert export(run, "out", "--to", "safetensors", "--version", "3", "--worker", "moved.py:ExportWorker") == 0
    left = safetensors.torch.load_file(run / "model.safetensors")
    found = safetensors.torch.load_file("out/model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in left.items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--to", "safetensor"),
            "--to is 'safetensor', but it must be one of: safetensors, pretrained, peft (Did you mean safetensors?).",
        ),
        (("--to", "pretrained", "--rank", "1"), "--rank is for adapters: it needs --to peft, not --to pretrained."),
        (("--to", "safetensors", "--rank", "1"), "--rank is for adapters: it needs --to peft, not --to safetensors."),
        (("--to", "peft", "--head", "2"), "--head is 2, but the heads of"),
        (("--to", "peft", "--head", "1", "--ema"), "--ema and --head 1 contradict each other"),
        (
            ("--to", "safetensors", "--ema"),
            "--ema needs the moving average of the merged weights, but the checkpoint of version 3",
        ),
        (("--to", "peft", "--version", "1"), "--version is 1, but the complete checkpoints in"),
    ],
)
def test_bad_flags_are_errors(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    """Exit code 2, one message, and no file."""
    pytest.importorskip("peft")
    assert export(run, tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_missing_arguments_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Missing arguments end with exit code 2; the help lists all flags."""
    assert main(["export", "run"]) == 2
    assert "lte-ray export needs OUT, --to: lte-ray export RUN OUT --to FORMAT" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main(["export", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(flag in said for flag in ("RUN", "OUT", "--to", "--head", "--version", "--rank", "--worker"))


def test_the_usage_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """A mistyped command gets a suggestion."""
    assert main([]) == 2
    assert "lte-ray export RUN OUT --to FORMAT [flags]" in capsys.readouterr().out
    assert main(["exprot"]) == 2
    assert "Did you mean export?" in capsys.readouterr().err


def test_an_interrupt_says_that_nothing_was_written(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 130, and no file."""

    def interrupted(saved: object, folder: Path, *_: object) -> None:
        (folder / "half").write_text("half")
        raise KeyboardInterrupt

    pytest.importorskip("transformers")
    monkeypatch.setattr("lte_ray.export.pretrained.write_pretrained", interrupted)
    assert export(run, tmp_path / "out", "--to", "pretrained") == 130
    assert "Interrupted. Nothing was written." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
