"""From one's own jsonl to an exported language model: three commands, no code."""

from __future__ import annotations

from pathlib import Path

import pytest

from lte_ray.cli.main import main
from tests.support.text_models import text_records, write_jsonl, write_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_language_model_is_fine_tuned_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """After the installation two commands: train and export. The folder has weights and tokenizer, and generates text."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_model(tmp_path / "tiny")
    write_jsonl(tmp_path / "my.jsonl", text_records(120))
    train = "train causal-lm --worker.model tiny --worker.data my.jsonl --worker.context 64 --lora-r 8 --num-heads 2 --steps 40"
    assert main([*train.split(), "--storage", "runs", "--name", "lm"]) == 0
    assert "perplexity" in capfd.readouterr().out
    assert main(["export", "runs/lm", "out", "--to", "pretrained"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained("out")
    tokenizer = transformers.AutoTokenizer.from_pretrained("out")
    prompt = tokenizer("def ", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=5, do_sample=False)[0])
    assert text.startswith("def ")
    before = transformers.AutoModelForCausalLM.from_pretrained("tiny")
    sample = tokenizer(text_records()[0]["text"], return_tensors="pt").input_ids[:, :64]
    assert model(sample, labels=sample).loss < before(sample, labels=sample).loss - 0.2
    assert main(["export", "runs/lm", "adapter", "--to", "peft"]) == 0
    assert (tmp_path / "adapter" / "tokenizer.json").is_file()
