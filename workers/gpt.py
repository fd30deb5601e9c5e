"""The main example: a small GPT learns to write Python, from scratch, from the source of Python's standard library.

Its tokens are bytes, so nothing is downloaded: every machine with Python has the text.
"""

from __future__ import annotations

import hashlib
import math
import platform
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lte_ray import Shard
from lte_ray.data import TokenSet, cached_tokens

VOCABULARY = 256
END = 0  # a zero byte ends each file
SKIP = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3"}


class Block(nn.Module):
    """Pre-norm transformer block: causal attention, then a 4x MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Byte-level GPT: (batch, length) tokens to (batch, length, 256) logits. The embedding is tied to the output."""

    def __init__(self, width: int, depth: int, heads: int, context: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, VOCABULARY, bias=False)
        self.logits.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth) if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.logits(self.norm(x))


@dataclass
class GPT:
    """A byte-level GPT on the standard library's source files; `evaluate` returns validation bits per byte."""

    width: int = 128
    """Width of the residual stream."""
    depth: int = 4
    """Number of blocks."""
    attention_heads: int = 4
    """Attention heads in each block."""
    context: int = 128
    """Length of the context in bytes."""
    batch_size: int = 16
    """Windows of `context` bytes in one head's batch."""
    validation_windows: int = 256
    """Windows of `context` bytes that `evaluate` uses, spread evenly over the validation files."""

    def tokens_per_sample(self) -> int:
        return self.context

    def build_model(self) -> nn.Module:
        return Transformer(self.width, self.depth, self.attention_heads, self.context)

    def tokens(self, split: str) -> TokenSet:
        files = cached_tokens(f"stdlib-bytes-v1-python-{platform.python_version()}", read_standard_library)
        return TokenSet.open(files[split], self.context)

    def train_batches(self, shard: Shard) -> Iterator[tuple[Tensor, Tensor]]:
        data = self.tokens("train")
        for indices in shard.indices(len(data), self.batch_size):
            window = torch.from_numpy(data.windows(indices))
            yield window[:, :-1], window[:, 1:]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        data = self.tokens("validation")
        device = next(model.parameters()).device
        indices = np.linspace(0, len(data) - 1, min(self.validation_windows, len(data)), dtype=np.int64)
        windows = torch.from_numpy(data.windows(indices)).to(device)
        losses = [self.loss(model, (w[:, :-1], w[:, 1:])) * len(w) for w in windows.split(32)]
        return {"bits_per_byte": float(torch.stack(losses).sum() / len(windows)) / math.log(2)}

    def sample(self, model: nn.Module) -> str:
        """Returns a continuation of ``def `` by 300 bytes, at temperature 0.8."""
        text = list(b"\ndef ")
        generator = torch.Generator().manual_seed(0)
        device = next(model.parameters()).device
        for _ in range(300):
            seen = torch.tensor([text[-self.context :]], device=device)
            probabilities = F.softmax(model(seen)[0, -1].float().cpu() / 0.8, dim=-1)
            text.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        return bytes(text).decode(errors="replace").strip("\n")


def read_standard_library() -> dict[str, np.ndarray]:
    """Returns all source files of the standard library as bytes, split by a hash of the file's name (5% validation).

    Raises:
        FileNotFoundError: this Python ships no source files.
    """
    root = Path(sysconfig.get_path("stdlib"))
    parts: dict[str, list[bytes]] = {"train": [], "validation": []}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not SKIP.intersection(relative.parts):
            digest = hashlib.sha256(relative.as_posix().encode()).digest()
            parts["validation" if digest[0] < 13 else "train"].append(path.read_bytes() + bytes([END]))
    if not all(parts.values()):
        raise FileNotFoundError(f"too few Python source files under {root} to train on")
    return {split: np.frombuffer(b"".join(files), dtype=np.uint8) for split, files in parts.items()}
