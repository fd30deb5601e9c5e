"""Text classification: any encoder or language model of transformers, with a label for each text, fine-tuned.

Needs `pip install 'lte-ray[hf]'`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_ray import Shard
from lte_ray.data import TokenSet, cached_tokens
from lte_ray.data.loader import check_size
from lte_ray.errors import DataError

from .text import (
    TextWorker,
    cache_key,
    check_classes,
    check_positions,
    check_vocabulary,
    hold_out,
    labeled,
    load,
    transformers,
)


@dataclass
class Classify(TextWorker):
    """Fine-tunes a model of transformers to classify texts; `evaluate` returns the validation loss and the accuracy."""

    model: str
    """The model: a folder that save_pretrained wrote, or a name on Hugging Face's hub."""
    data: str
    """Records with a text and a label: a file (.jsonl, .json, .csv, .parquet), a folder, a pattern, a URI, or hf:NAME."""
    text: str = "text"
    """The column of texts."""
    label: str = "label"
    """The column of labels: names or numbers."""
    scratch: bool = False
    """Whether to train from scratch: only the model's config is used, not its weights."""
    tokenizer: str = ""
    """The tokenizer's folder or name; by default the model's."""
    length: int = 128
    """Tokens of a text that the model sees, at most."""
    batch_size: int = 16
    """Texts in one head's batch."""
    validation: str = ""
    """Records for validation; by default a part of the data."""
    held_out: float = 0.1
    """The part of the data that is kept for validation."""

    def __post_init__(self) -> None:
        self.check_settings("length", "batch_size")

    def build_model(self) -> nn.Module:
        tokenizer, names = self.load_tokenizer(), self.label_names()
        labels = {"num_labels": len(names), "id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
        config = load("AutoConfig", self.model, "--worker.model", **labels)
        config.pad_token_id = padding(tokenizer)  # a model's own may differ: it finds a text's last token by it
        check_positions(config, "--worker.length", self.length)
        if self.scratch:
            model = transformers().AutoModelForSequenceClassification.from_config(config)
        else:
            settings = {"config": config, "ignore_mismatched_sizes": True}  # another number of labels
            model = load("AutoModelForSequenceClassification", self.model, "--worker.model", **settings)
        check_vocabulary(model, tokenizer, self.tokenizer or self.model)
        return model

    def files(self) -> dict[str, Path]:
        """The cached tokens, lengths and labels of both splits, and the labels' names."""
        tokenizer = self.load_tokenizer()
        key = cache_key("classify", tokenizer, self.sources(), self.text, self.label, self.length, self.held_out)
        return cached_tokens(key, lambda: self.tokenize(tokenizer))

    def column(self, name: str) -> np.ndarray:
        return TokenSet.open(self.files()[name], 0).tokens

    def label_names(self) -> list[str]:
        """The names of the labels, by their numbers."""
        names: list[str] = json.loads(self.column("names").tobytes().decode())
        return names

    def tokenize(self, tokenizer: Any) -> dict[str, np.ndarray]:
        """Reads the records, and returns tokens, lengths and labels of both splits."""
        records = list(labeled(self.data, self.text, self.label))
        if self.validation:
            train, validation = records, list(labeled(self.validation, self.text, self.label))
        else:
            as_records = [(place, {"text": text, "label": label}) for place, text, label in records]
            chosen = hold_out(as_records, [1] * len(records), math.ceil(self.held_out * len(records)))
            train = [one for one, out in zip(records, chosen, strict=True) if not out]
            validation = [one for one, out in zip(records, chosen, strict=True) if out]
        check_classes([label for _, _, label in records], f"{self.data}, column {self.label}")
        known = {label for _, _, label in records}
        names = sorted(known, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
        if len(names) < 2:
            raise DataError(f"{self.data} has {len(names)} label(s) in the column {self.label}, but at least 2 are needed.")
        arrays = {"names": np.frombuffer(json.dumps(names).encode(), dtype=np.uint8)}
        for split, rows in (("train", train), ("validation", validation)):
            for place, _, label in rows:
                if label not in known:
                    raise DataError(f"{place}: the label {label!r} isn't among those of {self.data}: {', '.join(names[:20])}.")
            if not rows:
                raise DataError(f"{self.data} has {len(records)} record(s), so none is left for {split}. Use more data.")
            ids = tokenizer([text for _, text, _ in rows], truncation=True, max_length=self.length).input_ids
            padded = np.full((len(rows), self.length), padding(tokenizer), dtype=np.uint32)
            for row, tokens in zip(padded, ids, strict=True):
                row[: len(tokens)] = tokens
            arrays[split] = padded.reshape(-1)
            arrays[f"{split}-lengths"] = np.array([max(1, len(tokens)) for tokens in ids], np.uint32)
            arrays[f"{split}-labels"] = np.array([names.index(label) for _, _, label in rows], np.uint32)
        return arrays

    def batches(self, split: str, order: Iterator[np.ndarray]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yields tokens, their attention mask, and labels; without columns that are padding in all rows."""
        tokens = self.column(split).reshape(-1, self.length)
        lengths, labels = self.column(f"{split}-lengths"), self.column(f"{split}-labels")
        for indices in order:
            longest = int(lengths[indices].max())
            ids = torch.from_numpy(tokens[indices, :longest].astype(np.int64))
            mask = torch.arange(longest) < torch.from_numpy(lengths[indices].astype(np.int64))[:, None]
            yield ids, mask.long(), torch.from_numpy(labels[indices].astype(np.int64))

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        size = len(self.column("train-labels"))
        check_size(size, self.batch_size, shard, f"{self.data}, without the part for validation,")
        yield from self.batches("train", shard.indices(size, self.batch_size))

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        ids, mask, labels = batch
        return F.cross_entropy(model(input_ids=ids, attention_mask=mask).logits.float(), labels)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        size, device = len(self.column("validation-labels")), next(model.parameters()).device
        loss = correct = 0.0
        order = iter(np.array_split(np.arange(size), math.ceil(size / self.batch_size)))
        for batch in self.batches("validation", order):
            ids, mask, labels = (part.to(device) for part in batch)
            logits = model(input_ids=ids, attention_mask=mask).logits.float()
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            correct += float((logits.argmax(1) == labels).sum())
        return {"validation_loss": loss / size, "accuracy": correct / size}  # policies minimize the first


def padding(tokenizer: Any) -> int:
    """The token that fills short texts; the attention mask hides it."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
