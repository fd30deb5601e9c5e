"""Tiny models of transformers in a folder, with tokenizers that are trained on the standard library's source."""

from __future__ import annotations

import functools
import json
import sysconfig
from pathlib import Path

import torch

WORDS = 300
"""Tokens of the tokenizer."""

CHAT = (
    "{% for m in messages %}{{ m['role'] + ': ' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
)
"""A chat template that marks the assistant's tokens."""


@functools.lru_cache
def source_text() -> str:
    """Some of the standard library."""
    return "\n\n".join(
        Path(sysconfig.get_path("stdlib"), f"{name}.py").read_text() for name in ("ast", "csv", "heapq", "queue")
    )


def write_tokenizer(folder: Path, *, chat: str | None = None, words: int = WORDS) -> None:
    """Trains a byte-pair tokenizer, and saves it as transformers does."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=words, special_tokens=["<end>"], initial_alphabet=alphabet)
    model.train_from_iterator([source_text()[:50_000]], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(str(folder))


def write_model(folder: Path, *, words: int = WORDS, chat: str | None = None, positions: int = 128) -> Path:
    """Saves a Llama of some thousand weights, and its tokenizer."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=words, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=positions, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(str(folder))
    write_tokenizer(folder, chat=chat)
    return folder


def write_jsonl(path: Path, records: list[dict]) -> Path:
    """Writes records, one a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def text_records(count: int = 60, size: int = 400) -> list[dict]:
    """Pieces of the standard library's source."""
    text = source_text()
    return [{"text": text[n * size : (n + 1) * size]} for n in range(count)]
