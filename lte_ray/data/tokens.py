"""Token sets: a flat array of tokens in an Arrow file, memory-mapped, so that the heads on a node share its pages."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs
import pyarrow as pa
from numpy.typing import NDArray

COLUMN = "tokens"


@dataclass(frozen=True)
class TokenSet:
    """A sequence of tokens, cut into windows of `length` + 1 tokens: `length` inputs with their targets.

    Attributes:
        tokens: 1-D array of unsigned integers, read-only.
        length: the model's context length in tokens.
    """

    tokens: NDArray[np.generic]
    length: int

    @classmethod
    def open(cls, path: Path, length: int) -> TokenSet:
        """Memory-maps a file that `write_tokens` wrote.

        Raises:
            ValueError: the file has too few tokens for one window.
        """
        with pa.memory_map(str(path)) as source:
            column = pa.ipc.open_file(source).read_all().column(COLUMN)
        if len(column) <= length:
            raise ValueError(f"{path} has {len(column)} tokens, too few for one window of {length}")
        return cls(column.chunk(0).to_numpy(zero_copy_only=True), length)

    def __len__(self) -> int:
        """Returns the number of windows. They don't overlap, but the last target of one is the first input of the next."""
        return (len(self.tokens) - 1) // self.length

    def windows(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the windows with these indices: (len(indices), length + 1), int64."""
        starts = np.asarray(indices)[:, None] * self.length
        windows: NDArray[np.int64] = self.tokens[starts + np.arange(self.length + 1)].astype(np.int64)
        return windows


def write_tokens(path: Path, tokens: NDArray[np.generic]) -> None:
    """Writes a 1-D token array as an Arrow IPC file, atomically, even if several processes write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({COLUMN: pa.array(tokens)})
    temporary = f"{path}.{secrets.token_hex(8)}.part"  # mkstemp would keep it to its owner
    try:
        with pa.OSFile(temporary, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def cached_tokens(key: str, make: Callable[[], dict[str, NDArray[np.generic]]]) -> dict[str, Path]:
    """Returns the paths of a data set's token files by split name; makes them on first use, in the user's cache folder.

    Args:
        key: names the data set and everything that it depends on (version, tokenizer).
        make: returns its token arrays by split name; called only if a split's file is missing.
    """
    folder = Path(platformdirs.user_cache_dir("lte-ray")) / "tokens" / key
    done = folder / "splits.txt"
    names = done.read_text().splitlines() if done.is_file() else []
    if not names or not all((folder / f"{name}.arrow").is_file() for name in names):
        splits = make()
        for split, tokens in splits.items():
            write_tokens(folder / f"{split}.arrow", tokens)
        _write_text(done, "\n".join(splits) + "\n")
    return {split: folder / f"{split}.arrow" for split in done.read_text().splitlines()}


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_text(text)
    os.replace(temporary, path)
