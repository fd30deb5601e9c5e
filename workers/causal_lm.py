"""Any causal language model of transformers, on your own text: fine-tuned, or from scratch.

Needs `pip install 'lte-ray[hf]'`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_ray import Shard
from lte_ray.data import TokenSet, cached_tokens, read_records
from lte_ray.data.loader import check_size
from lte_ray.errors import DataError

from .text import TEXT_COLUMN, Encoder, TextWorker, cache_key, check_positions, check_vocabulary, hold_out, load, transformers

IGNORED = -100
"""Target of a token that the loss doesn't count."""


@dataclass
class CausalLM(TextWorker):
    """Trains a causal language model of transformers on text; `evaluate` returns the validation loss and the perplexity."""

    model: str
    """The model: a folder that save_pretrained wrote, or a name on Hugging Face's hub."""
    data: str
    """The text: a file (.jsonl, .json, .csv, .parquet, .txt, .md), a folder, a pattern, a URI, or hf:NAME or hf:NAME:SPLIT of
    the hub. Records have a text, or messages, or prompt and completion."""
    scratch: bool = False
    """Whether to train from scratch: only the model's config is used, not its weights."""
    tokenizer: str = ""
    """The tokenizer's folder or name; by default the model's."""
    column: str = TEXT_COLUMN
    """The column of text. Another name than "text" wins over messages, and over prompt and completion."""
    context: int = 512
    """Tokens in a sequence. Records are put one after another and cut into sequences of this length."""
    batch_size: int = 8
    """Sequences in one head's batch."""
    validation: str = ""
    """Text for validation, named as the data are; by default a part of the data."""
    held_out: float = 0.05
    """The part of the data, in tokens, that is kept for validation; at least one sequence."""
    validation_sequences: int = 256
    """Sequences that `evaluate` uses, spread evenly over those for validation."""

    def __post_init__(self) -> None:
        self.check_settings("context", "batch_size", "validation_sequences")

    def tokens_per_sample(self) -> int:
        return self.context

    def build_model(self) -> nn.Module:
        tokenizer = self.load_tokenizer()
        if self.scratch:
            config = load("AutoConfig", self.model, "--worker.model")
            if self.tokenizer:  # the config's own vocabulary may be another tokenizer's
                config.vocab_size = len(tokenizer)
                config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
            model = transformers().AutoModelForCausalLM.from_config(config)
        else:
            model = load("AutoModelForCausalLM", self.model, "--worker.model")
        check_vocabulary(model, tokenizer, self.tokenizer or self.model)
        check_positions(model.config, "--worker.context", self.context)
        return model

    def tokens(self, split: str) -> tuple[TokenSet, TokenSet | None]:
        """The tokens of the split "train" or "validation"; and 1 for those that the loss counts, unless it counts all.

        Raises:
            DataError: the data are missing, damaged, or less than one sequence.
        """
        tokenizer = self.load_tokenizer()
        key = cache_key("causal-lm", tokenizer, self.sources(), self.column, self.context, self.held_out)
        files = cached_tokens(key, lambda: self.tokenize(tokenizer))
        counted = files.get(f"{split}-counted")
        return TokenSet.open(files[split], self.context), TokenSet.open(counted, self.context) if counted else None

    def tokenize(self, tokenizer: Any) -> dict[str, np.ndarray]:
        """Reads the records, and returns the tokens of both splits as one array each."""
        dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
        encoder = Encoder(tokenizer, self.column)

        def encode(place: str, record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
            ids, counted = encoder.encode(record, place)
            return np.array(ids, dtype), np.array(counted, np.uint8)

        splits: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        records = list(read_records(self.data))
        encoded = [encode(*one) for one in records]
        if self.validation:
            splits["train"] = encoded
            splits["validation"] = [encode(*one) for one in read_records(self.validation)]
        else:
            lengths = [len(ids) for ids, _ in encoded]
            chosen = hold_out(records, lengths, max(round(self.held_out * sum(lengths)), self.context + 1))
            splits["train"] = [one for one, out in zip(encoded, chosen, strict=True) if not out]
            splits["validation"] = [one for one, out in zip(encoded, chosen, strict=True) if out]
        arrays: dict[str, np.ndarray] = {}
        for split, parts in splits.items():
            arrays[split] = np.concatenate([np.empty(0, dtype), *(ids for ids, _ in parts)])
            counted = np.concatenate([np.empty(0, np.uint8), *(flags for _, flags in parts)])
            purpose = "training" if split == "train" else "validation"
            source = self.validation if split == "validation" and self.validation else self.data
            if len(counted) and not counted.all():
                arrays[f"{split}-counted"] = counted
            if len(arrays[split]) <= self.context:
                alone = "" if self.validation or len(records) > 1 else " One record can't be divided: give --worker.validation."
                raise DataError(
                    f"{source} leaves {len(arrays[split])} tokens for {purpose}, too few for a sequence of {self.context}. "
                    f"Use more data, or a smaller --worker.context.{alone}"
                )
            if not counted.any():
                raise DataError(
                    f"{source} has {len(parts)} record(s) for {purpose}, but the loss counts none of their tokens: no "
                    "completion has text, or no message is the assistant's. Use records with answers, or a chat template "
                    "without generation marks."
                )
        return arrays

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        data, counted = self.tokens("train")
        check_size(len(data), self.batch_size, shard, f"{self.data}, in sequences of {self.context} tokens,")
        for indices in shard.indices(len(data), self.batch_size):
            yield batch_of(data, counted, indices)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        logits = model(input_ids=inputs, use_cache=False).logits
        total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / (targets != IGNORED).sum().clamp(min=1)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        data, counted = self.tokens("validation")
        device = next(model.parameters()).device
        indices = np.linspace(0, len(data) - 1, min(self.validation_sequences, len(data)), dtype=np.int64)
        total, tokens = 0.0, 0
        for chunk in np.array_split(indices, math.ceil(len(indices) / self.batch_size)):
            inputs, targets = (part.to(device) for part in batch_of(data, counted, chunk))
            number = int((targets != IGNORED).sum())
            total, tokens = total + float(self.loss(model, (inputs, targets))) * number, tokens + number
        mean = total / max(tokens, 1)
        return {"validation_loss": mean, "perplexity": math.exp(min(mean, 700.0))}  # policies minimize the first


def batch_of(data: TokenSet, counted: TokenSet | None, indices: np.ndarray) -> tuple[Tensor, Tensor]:
    """The inputs and the targets of sequences: (n, context) each."""
    windows = torch.from_numpy(data.windows(indices))
    inputs, targets = windows[:, :-1], windows[:, 1:]
    if counted is not None:
        targets = targets.masked_fill(torch.from_numpy(counted.windows(indices))[:, 1:] == 0, IGNORED)
    return inputs, targets
