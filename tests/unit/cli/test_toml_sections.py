"""Settings files with the sections of the help, and the file that `--print-config` prints."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from lte_ray.cli.flags import TRAIN, Parsed, parse
from lte_ray.cli.main import main
from lte_ray.config import LTEConfig, MergeConfig, TrainConfig
from lte_ray.errors import ConfigError
from workers.regression import Regression

GOOD = "workers.regression:Regression"


def parsed(tmp_path: Path, text: str, *flags: str) -> Parsed:
    """The settings that a file gives."""
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return parse(Regression, GOOD, ["--config", str(path), *flags])


def test_sections_give_the_same_as_flat_names(tmp_path: Path) -> None:
    """With [worker] and [policy_args] beside them, and settings without a section before them."""
    text = """
        steps = 7
        [heads]
        num_heads = 3
        [merging]
        policy = "nesterov"
        deadline = "1m"
        when = "quorum"
        [policy_args]
        lr = 0.5
        [worker]
        batch_size = 8
    """
    found = parsed(tmp_path, text, "--num-heads", "4")
    assert (found.lte, found.train) == (LTEConfig(num_heads=4), TrainConfig(steps=7))
    assert (found.merge.policy, found.merge.deadline, found.merge.policy_args["lr"]) == ("nesterov", 60, 0.5)  # type: ignore[index]
    assert found.worker.batch_size == 8


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[heads]\nsteps = 3", r"settings.toml: \[heads\] has the setting steps. It belongs in \[training\]."),
        ("[heads]\nnum_haeds = 3", r"\[heads\] has an unknown setting num_haeds. Did you mean num_heads\?"),
        ("[head]\nnum_heads = 3", r"an unknown section \[head\]. Did you mean heads\?"),
        ("[lte]\nnum_heads = 3", r"an unknown section \[lte\]. Sections are: \[heads\], \[merging\].* may also stand without"),
        ("steps = 3\n[training]\nsteps = 4", r"has steps twice: in \[training\] and without a section"),
        ("[merging]\npolicy = 5", "policy must be text"),
        ("[training]\nsteps = 'many'", "steps is 'many', but it must be a whole number"),
    ],
)
def test_a_misplaced_setting_is_one_clear_error(tmp_path: Path, text: str, says: str) -> None:
    """It names the section that the setting belongs in."""
    with pytest.raises(ConfigError, match=says):
        parsed(tmp_path, text)


@pytest.mark.parametrize(("name", "kind"), [("s.yaml", "YAML"), ("s.yml", "YAML"), ("s.json", "JSON")])
def test_another_format_is_one_clear_error(tmp_path: Path, name: str, kind: str) -> None:
    """It says how to write the same in TOML."""
    (tmp_path / name).write_text("num_heads: 2\n" if kind == "YAML" else '{"num_heads": 2}')
    with pytest.raises(ConfigError, match=f"is {kind}, but settings files are TOML: num_heads = 4"):
        parse(Regression, GOOD, ["--config", str(tmp_path / name)])


SETTINGS = (
    "",
    "--num-heads 3 --lora-r 8 8 16 --exclude a b* --layers @linear:~lr=2 --no-wait --keep-checkpoints None",
    "--policy nesterov --policy.lr 0.25 --when quorum --deadline 2m --worker.batch-size 8 --worker.lr 0.5",
    "--epochs 2 --lr 0.5 --name mine --storage runs --quiet --address auto --merge-every 30s",
)


@pytest.mark.parametrize("given", SETTINGS)
def test_the_printed_file_gives_the_same_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str) -> None:
    """All settings stand in it, each with its help as a comment."""
    flags = [flag.replace("~", " ") for flag in given.split()]
    with pytest.raises(SystemExit) as leaving:
        main(["train", GOOD, *flags, "--print-config"])
    assert leaving.value.code == 0
    text = capsys.readouterr().out
    content = tomllib.loads(text)
    assert set(TRAIN.titles.values()) <= set(content)
    assert "# Number of LoRA heads." in text
    assert parsed(tmp_path, text) == parse(Regression, GOOD, flags)


def test_the_settings_are_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """With --json, all of them are one object, by section; what isn't set is null."""
    with pytest.raises(SystemExit):
        main(["train", GOOD, "--num-heads", "3", "--json", "--print-config"])
    content = json.loads(capsys.readouterr().out)
    assert set(TRAIN.titles.values()) <= set(content)
    assert content["heads"]["num_heads"] == 3
    assert content["merging"]["max_lag"] is None


def test_the_printed_file_holds_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a storage's credentials nor a worker's token."""
    (tmp_path / "mine.py").write_text(
        "from workers.regression import Regression\n\n"
        "class Mine(Regression):\n"
        "    def __init__(self, api_token: str = ''):\n"
        "        super().__init__()\n"
        "        self.api_token = api_token\n"
    )
    flags = ["--storage", "s3://KEY:HIDDEN@bucket/x", "--worker.api-token", "HIDDEN", "--print-config"]
    with pytest.raises(SystemExit):
        main(["train", f"{tmp_path / 'mine.py'}:Mine", *flags])
    text = capsys.readouterr().out
    assert "HIDDEN" not in text
    assert "# worker.api_token is a secret: give it as a flag." in text
    tomllib.loads(text)


def test_merge_config_defaults_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    """The file of the defaults reads back as the defaults."""
    with pytest.raises(SystemExit):
        main(["train", GOOD, "--print-config"])
    content = tomllib.loads(capsys.readouterr().out)
    assert content["merging"]["merge_iter"] == MergeConfig().merge_iter
