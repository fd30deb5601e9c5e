"""A small Llama of transformers as a worker, on random tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lte_ray import Shard


@dataclass
class SmallLlama:
    """A Llama of any size: the default one is small, `LLAMA_8B` are the sizes of Llama 3's with eight billion parameters."""

    hidden: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    inner: int = 344
    vocabulary: int = 512
    context: int = 64
    batch_size: int = 4

    def build_model(self) -> nn.Module:
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            use_cache=False,
        )
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
        return model

    def train_batches(self, shard: Shard) -> Iterator[dict[str, Tensor]]:
        for slot in shard.slots():
            generator = torch.Generator().manual_seed(slot)
            ids = torch.randint(self.vocabulary, (self.batch_size, self.context), generator=generator)
            yield {"input_ids": ids, "labels": ids}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss


LLAMA_8B: dict[str, Any] = {
    "hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "inner": 14336, "vocabulary": 128256, "context": 2048,
    "batch_size": 1,
}  # fmt: skip
"""The sizes of a Llama 3 with eight billion parameters, and a batch of one sequence."""
