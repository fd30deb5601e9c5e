"""causal-lm and classify: what they read from records, what trains, what they evaluate, and what they refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from lte_ray.recipes.causal_lm import IGNORED, CausalLM
from lte_ray.recipes.classify import Classify, padding
from lte_ray.recipes.text import hold_out

from lte_ray import LTEConfig, MergeConfig, Shard, TrainConfig
from lte_ray.engine.prepare import prepare
from lte_ray.engine.settings import Settings
from lte_ray.errors import UserError
from lte_ray.run.record import copy_files, write_files
from lte_ray.storage import RunDirectory
from tests.support.text_models import CHAT, WORDS, text_records, write_jsonl, write_model, write_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache folder, and no network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a model and its tokenizer, which has a chat template."""
    return str(write_model(tmp_path_factory.mktemp("model"), chat=CHAT))


def settings_of_run(train: TrainConfig | None = None) -> Settings:
    return Settings("x", LTEConfig(num_heads=2, lora_r=4), MergeConfig(), train or TrainConfig())


def worker(model: str, data: Path, **settings: Any) -> CausalLM:
    return CausalLM(model, str(data), **{"context": 32, "batch_size": 2, **settings})


def decoded(one: CausalLM, tokens: torch.Tensor) -> str:
    return one.load_tokenizer().decode(tokens[tokens >= 0])


def test_text_is_packed(model: str, tmp_path: Path) -> None:
    """Sequences follow each other without padding; the targets are the next tokens; a record ends with its own token."""
    one = worker(model, write_jsonl(tmp_path / "a.jsonl", text_records()))
    inputs, targets = next(iter(one.train_batches(Shard(0, 2, seed=0))))
    assert inputs.shape == targets.shape == (2, 32)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    data, counted = one.tokens("train")
    assert counted is None
    assert data.tokens.dtype == np.uint16
    assert 40 < (data.tokens == 0).sum() < 60


def test_validation_holds_out_records(model: str, tmp_path: Path) -> None:
    """About the part that was asked for, none of which is in the training data; a small change moves nothing else."""
    records = text_records(100)
    one = worker(model, write_jsonl(tmp_path / "a.jsonl", records), held_out=0.2)
    splits = {split: one.tokens(split)[0].tokens for split in ("train", "validation")}
    share = len(splits["validation"]) / sum(map(len, splits.values()))
    assert 0.2 <= share < 0.23
    texts = {split: set(one.load_tokenizer().decode(tokens).split("<end>")) - {""} for split, tokens in splits.items()}
    assert not texts["train"] & texts["validation"]
    assert len(texts["train"]) + len(texts["validation"]) == 100


def test_a_text_file_is_one_document(model: str, tmp_path: Path) -> None:
    """Its pieces have no end between them."""
    text = "\n\n".join(record["text"] for record in text_records(80))
    (tmp_path / "a.txt").write_text(text)
    one = worker(model, tmp_path / "a.txt", validation=str(tmp_path / "a.txt"))
    assert one.load_tokenizer().decode(one.tokens("train")[0].tokens) == text + "<end>"


def test_the_loss_counts_the_completion(model: str, tmp_path: Path) -> None:
    """Of records with prompt and completion; its end counts, too."""
    one = worker(
        model, write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"Question {n}?", "completion": "Yes."} for n in range(60)])
    )
    _, targets = next(iter(one.train_batches(Shard(0, 1, seed=0))))
    counted = decoded(one, targets[0])
    assert counted.count("Yes.<end>") >= 1
    assert "Ask" not in counted
    assert (targets == IGNORED).any()


def test_a_column_that_is_named_wins(model: str, tmp_path: Path) -> None:
    """Over prompt and completion: all its tokens count."""
    records = [{"body": f"Number {n}.", "prompt": "Why?", "completion": "So."} for n in range(60)]
    data, counted = worker(model, write_jsonl(tmp_path / "a.jsonl", records), column="body").tokens("train")
    assert counted is None
    assert "Why" not in decoded(worker(model, tmp_path / "a.jsonl"), torch.from_numpy(data.tokens.astype(np.int64)))


def test_a_small_validation_file_is_named(model: str, tmp_path: Path) -> None:
    """Not the training data."""
    small = write_jsonl(tmp_path / "small.jsonl", [{"text": "a"}])
    one = worker(model, write_jsonl(tmp_path / "a.jsonl", text_records()), validation=str(small))
    with pytest.raises(UserError, match=r"small\.jsonl leaves \d+ tokens for validation"):
        one.tokens("train")


def test_the_loss_counts_what_the_assistant_says(model: str, tmp_path: Path) -> None:
    """If the chat template marks it."""
    turns = [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "It is 3."}]
    one = worker(model, write_jsonl(tmp_path / "a.jsonl", [{"messages": turns, "id": n} for n in range(60)]))
    inputs, targets = next(iter(one.train_batches(Shard(0, 1, seed=0))))
    assert "Add 1 and 2." in decoded(one, inputs[0])
    assert set(decoded(one, targets.flatten()).split("<end>")) <= {"It is 3.", "", *("It is 3."[n:] for n in range(8))}


def test_without_marks_the_loss_counts_all_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In one line."""
    plain = write_model(tmp_path / "model", chat="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    turns = [{"role": "user", "content": "Add 1 and 2."}]
    one = worker(str(plain), write_jsonl(tmp_path / "a.jsonl", [{"messages": turns, "id": n} for n in range(60)]))
    assert one.tokens("train")[1] is None
    assert [r.message for r in caplog.records if "the loss counts all tokens" in r.message] == caplog.messages[-1:]


def test_evaluation_is_the_mean_over_counted_tokens(model: str, tmp_path: Path) -> None:
    """And the perplexity its exponential: near the vocabulary's size for an untrained model."""
    one = worker(model, write_jsonl(tmp_path / "a.jsonl", text_records()))
    with torch.no_grad():
        figures = one.evaluate(one.build_model())
    assert math.isclose(figures["perplexity"], math.exp(figures["validation_loss"]))
    assert abs(figures["validation_loss"] - math.log(WORDS)) < 0.2


def test_fine_tuning_takes_smaller_steps(model: str, tmp_path: Path) -> None:
    """A tenth of the default rates, but a rate that is given stays; from scratch the defaults are kept."""
    data = write_jsonl(tmp_path / "a.jsonl", text_records())

    def rates(train: TrainConfig, **settings: Any) -> dict[str, float]:
        one = worker(model, data, **settings)
        initial = prepare(one, settings_of_run(train))
        return {group["name"]: group["initial_lr"] for group in initial.optimizer.param_groups}

    assert rates(TrainConfig()) == pytest.approx({"lora": 0.005, "replica": 0.001})
    assert rates(TrainConfig(), scratch=True) == pytest.approx({"lora": 0.05, "replica": 0.01})
    assert rates(TrainConfig(lr=0.02)) == pytest.approx({"lora": 0.02, "replica": 0.001})
    assert rates(TrainConfig(optimizer="adamw", lr=0.02)) == pytest.approx({"lora": 0.02, "replica": 0.02})


def test_from_scratch_with_another_tokenizer(model: str, tmp_path: Path) -> None:
    """The model's vocabulary becomes the tokenizer's."""
    write_tokenizer(tmp_path / "words", words=400)
    one = worker(model, write_jsonl(tmp_path / "a.jsonl", text_records()), scratch=True, tokenizer=str(tmp_path / "words"))
    assert one.build_model().get_input_embeddings().num_embeddings == 400


def test_the_tokenizer_is_kept_with_the_run(model: str, tmp_path: Path) -> None:
    """And copied to an export, where files that are there stay."""
    directory = RunDirectory.open(str(tmp_path), "run")
    write_files(directory, worker(model, tmp_path / "a.jsonl"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer_config.json").write_text("{}")
    copy_files(directory, out)
    assert (out / "tokenizer.json").read_bytes() == Path(model, "tokenizer.json").read_bytes()
    assert (out / "tokenizer_config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("records", "settings", "says"),
    [
        (text_records(1, 100), {}, "tokens for training, too few for a sequence of 32"),
        (text_records(5, 100), {"batch_size": 64}, "fewer than one batch of 64 for each of 2 heads"),
        ([{"body": "x"}], {}, r"line 1: a record needs the column text .* The columns are: body"),
        ([{"text": 5}], {}, "line 1: the text must be a string, but it is a int"),
        (
            [{"messages": [{"role": "user"}], "id": n} for n in range(3)],
            {},
            r"line 1: messages must be .* with role and content.* but one is",
        ),
        ([{"messages": [{"from": "human", "value": "x"}]}], {}, r"line 1: messages must be .* but one is .*human"),
        (
            [{"messages": [{"role": "user", "content": "Add 1 and 2."}], "id": n} for n in range(60)],
            {},
            r"a\.jsonl has \d+ record\(s\) for training, but the loss counts none of their tokens",
        ),
        ([{"text": "x", "prompt": "a", "completion": "b"}], {"column": "body"}, "line 1: there is no column body"),
        (text_records(1), {"context": 8}, "One record can't be divided: give --worker.validation"),
        ([], {}, "is empty: it has no records"),
        (text_records(), {"context": 256}, "--worker.context is 256, but the model has 128 positions"),
        (text_records(), {"held_out": 1.0}, "--worker.held-out is 1.0, but it must be between 0 and 1"),
        (text_records(), {"batch_size": 0}, "--worker.batch-size is 0, but it must be at least 1"),
        (text_records(), {"tokenizer": "./none"}, "--worker.tokenizer is .*none', but there is no such folder"),
    ],
)
def test_what_cannot_train_is_refused(model: str, tmp_path: Path, records: Any, settings: Any, says: str) -> None:
    """Before a run: one sentence that names the record or the setting."""
    data = write_jsonl(tmp_path / "a.jsonl", records)
    with pytest.raises(UserError, match=says):
        prepare(worker(model, data, **settings), settings_of_run())


def test_a_model_that_does_not_fit_its_tokenizer_is_refused(model: str, tmp_path: Path) -> None:
    """Or isn't there, or isn't a model."""
    data = write_jsonl(tmp_path / "a.jsonl", text_records())
    write_tokenizer(tmp_path / "words", words=400)
    with pytest.raises(UserError, match=r"has 400 tokens, but the model embeds 300.*--worker\.tokenizer"):
        worker(model, data, tokenizer=str(tmp_path / "words")).build_model()
    with pytest.raises(UserError, match=r"--worker\.model is .*nowhere', but there is no such folder"):
        worker(str(tmp_path / "nowhere"), data).build_model()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"--worker\.model is .*empty', which Auto\w+ can't load: \w+: "):
        worker(str(tmp_path / "empty"), data).build_model()


def labeled_records(count: int = 60) -> list[dict]:
    return [{"text": f"The number {n} is {'even' if n % 2 == 0 else 'odd'}.", "label": "ab"[n % 2]} for n in range(count)]


def classifier(model: str, data: Path, **settings: Any) -> Classify:
    return Classify(model, str(data), **{"length": 24, "batch_size": 4, **settings})


def test_labels_become_numbers(model: str, tmp_path: Path) -> None:
    """Sorted by name, or by number; the model knows both. Padding is hidden from it."""
    one = classifier(model, write_jsonl(tmp_path / "a.jsonl", labeled_records()))
    ids, mask, labels = next(one.train_batches(Shard(0, 2, seed=0)))
    assert ids.shape == mask.shape
    for row, length, label in zip(ids, mask.sum(1), labels, strict=True):
        assert ("odd" in one.load_tokenizer().decode(row[:length])) == bool(label)
    built = one.build_model()
    assert built.config.id2label == {0: "a", 1: "b"}
    assert one.loss(built, (ids, mask, labels)).isfinite()
    numbers = [{**record, "label": n % 12} for n, record in enumerate(labeled_records())]
    assert classifier(model, write_jsonl(tmp_path / "b.jsonl", numbers)).label_names() == [str(n) for n in range(12)]


def test_labels_that_mean_the_same_are_one(model: str, tmp_path: Path) -> None:
    """Whole numbers in any type, and texts with spaces around them; a digit that isn't decimal is a text."""
    values = [1, 1.0, "1 ", "1.0", 0.0, " a", "a", "²", -1, 0.5]
    records = [{**record, "label": values[n % len(values)]} for n, record in enumerate(labeled_records())]
    one = classifier(model, write_jsonl(tmp_path / "a.jsonl", records))
    assert one.label_names() == ["0", "1", "-1", "0.5", "a", "²"]
    config = one.build_model().config
    assert config.pad_token_id == padding(one.load_tokenizer())


@pytest.mark.parametrize(
    ("lengths", "wanted", "most"),
    [([20] * 40 + [100_000], 5_000, 10_000), ([100, 100], 10, 100), ([7, 100], 10, 7), ([10] * 100, 50, 100)],
)
def test_a_long_record_is_not_all_for_validation(lengths: list[int], wanted: int, most: int) -> None:
    """What is held out is near what is wanted, whatever the order of the records' hashes; never nothing, and never all."""
    for salt in range(20):
        records = [(f"line {n}", {"text": f"{salt} {n}"}) for n in range(len(lengths))]
        chosen = hold_out(records, lengths, wanted)
        held = sum(length for length, out in zip(lengths, chosen, strict=True) if out)
        assert 0 < held <= most
        assert held < sum(lengths)


def test_a_text_longer_than_the_model_is_refused(model: str, tmp_path: Path) -> None:
    """With the number of its positions."""
    one = classifier(model, write_jsonl(tmp_path / "a.jsonl", labeled_records()), length=256)
    with pytest.raises(UserError, match=r"--worker\.length is 256, but the model has 128 positions"):
        one.build_model()


def test_evaluation_of_a_classifier(model: str, tmp_path: Path) -> None:
    """The held-out part: a tenth of the records."""
    one = classifier(model, write_jsonl(tmp_path / "a.jsonl", labeled_records()), scratch=True)
    assert len(one.column("validation-labels")) == 6
    with torch.no_grad():
        figures = one.evaluate(one.build_model())
    assert 0 <= figures["accuracy"] <= 1
    assert 0.3 < figures["validation_loss"] < 1.5


@pytest.mark.parametrize(
    ("records", "validation", "says"),
    [
        ([{"text": "x", "class": 1}], [], "line 1: there is no column label. The columns are: text, class"),
        ([{"text": "x", "label": 1}] * 9, [], r"has 1 label\(s\) in the column label, but at least 2"),
        (labeled_records(), [{"text": "x", "label": "c"}], "line 1: the label 'c' isn't among those of .*: a, b"),
        ([{"text": "x", "label": None}], [], "line 1: the label must be a text or a number, but it is 'None'"),
        ([{"text": "x", "label": float("nan")}], [], "line 1: the label must be a text or a number, but it is 'nan'"),
        ([{"text": "x", "label": ["a"]}], [], "line 1: the label must be a text or a number"),
        (
            [{"text": "x", "label": n / 7} for n in range(30)],
            [],
            r"column label: 30 of 30 records have a label that occurs only once, such as '0'\. .*Group numbers into ranges",
        ),
        (labeled_records(4), [], "has 3 samples, fewer than one batch of 4 for each of 2 heads"),
    ],
)
def test_labels_that_cannot_train_are_refused(model: str, tmp_path: Path, records: Any, validation: Any, says: str) -> None:
    """With the record's line, and what was expected."""
    data = write_jsonl(tmp_path / "a.jsonl", records)
    other = {"validation": str(write_jsonl(tmp_path / "b.jsonl", validation))} if validation else {}
    with pytest.raises(UserError, match=says):
        prepare(classifier(model, data, **other), settings_of_run())


def test_without_transformers_one_sentence_says_what_to_install(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra's name."""
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UserError, match=r"needs transformers .*: pip install 'lte-ray\[hf\]'\.$"):
        CausalLM(model, "a.jsonl").build_model()


def test_settings_can_be_recorded(model: str, tmp_path: Path) -> None:
    """Paths are absolute, names of the hub stay."""
    assert CausalLM("gpt2", "hf:some/data").model == "gpt2"
    assert CausalLM(model, "hf:some/data:test").data == "hf:some/data:test"
    assert json.dumps(CausalLM("./x", "~/a.jsonl").data).startswith('"/')
