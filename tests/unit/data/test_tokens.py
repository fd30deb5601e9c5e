"""Token sets: windows, Arrow files, the cache, and the text that the GPT worker reads."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from lte_ray import Shard
from lte_ray.data import TokenSet, cached_tokens, write_tokens
from workers.gpt import END, GPT, read_standard_library


@given(st.integers(1, 9), st.integers(2, 60))
def test_windows_overlap_by_one_target(length: int, count: int) -> None:
    """Window i contains tokens i L to (i + 1) L inclusive: its last target is the next window's first input."""
    tokens = np.arange(count, dtype=np.uint8)
    data = TokenSet(tokens, length)
    assert len(data) == (count - 1) // length
    windows = data.windows(np.arange(len(data)))
    assert windows.dtype == np.int64
    assert windows.tolist() == [list(range(i * length, (i + 1) * length + 1)) for i in range(len(data))]


def test_windows_come_in_the_order_asked() -> None:
    """Indices may be in any order and repeat."""
    data = TokenSet(np.arange(10, dtype=np.uint16), 3)
    assert data.windows(np.array([2, 0, 2])).tolist() == [[6, 7, 8, 9], [0, 1, 2, 3], [6, 7, 8, 9]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_written_tokens_open_as_they_were(tmp_path: Path, dtype: type) -> None:
    """The file contains the same tokens of the same type, read-only, and no other file remains."""
    tokens = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, 1000, endpoint=True).astype(dtype)
    path = tmp_path / "new" / "train.arrow"
    write_tokens(path, tokens)
    data = TokenSet.open(path, 7)
    assert data.tokens.dtype == dtype
    assert np.array_equal(data.tokens, tokens)
    assert not data.tokens.flags.writeable
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("count", [0, 1, 7])
def test_too_few_tokens_for_a_window_are_an_error(tmp_path: Path, count: int) -> None:
    """A window of 7 needs 8 tokens; the error names the file and its number of tokens."""
    path = tmp_path / "short.arrow"
    write_tokens(path, np.zeros(count, dtype=np.uint8))
    with pytest.raises(ValueError, match=f"short.arrow has {count} tokens, too few for one window of 7"):
        TokenSet.open(path, 7)


def test_others_may_read_the_tokens(tmp_path: Path) -> None:
    """The file has the permissions of a new file."""
    write_tokens(tmp_path / "tokens.arrow", np.arange(3))
    (tmp_path / "new").touch()
    assert (tmp_path / "tokens.arrow").stat().st_mode == (tmp_path / "new").stat().st_mode


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    """An array that can't be written leaves no file, not even a partial one."""
    with pytest.raises(Exception, match="1-dimensional"):
        write_tokens(tmp_path / "bad.arrow", np.zeros((2, 2), dtype=np.uint8))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sets up an empty cache folder, and returns the list in which `make` records its calls."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return []


def cached(calls: list[int]) -> dict[str, Path]:
    def make() -> dict[str, NDArray[np.generic]]:
        calls.append(1)
        return {"train": np.arange(9, dtype=np.uint8), "validation": np.arange(5, dtype=np.uint8)}

    return cached_tokens("a-key", make)


def test_cached_tokens_are_made_once(tmp_path: Path, calls: list[int]) -> None:
    """The first call makes the files under the user's cache folder, the second finds them."""
    first, second = cached(calls), cached(calls)
    assert first == second
    assert len(calls) == 1
    assert sorted(first) == ["train", "validation"]
    assert all(path.is_relative_to(tmp_path / "cache") for path in first.values())
    assert TokenSet.open(first["train"], 2).tokens.tolist() == list(range(9))


def test_a_missing_file_of_the_cache_is_made_again(calls: list[int]) -> None:
    """A split's file that was removed from the cache folder is there again after the next call."""
    cached(calls)["validation"].unlink()
    assert all(path.is_file() for path in cached(calls).values())
    assert len(calls) == 2


def test_a_make_that_fails_leaves_no_cache(calls: list[int]) -> None:
    """After an error the next call makes the tokens as if it were the first."""
    with pytest.raises(ZeroDivisionError):
        cached_tokens("a-key", lambda: {"train": np.zeros(1 // 0)})
    cached(calls)
    assert len(calls) == 1


def write_library(root: Path, content: str) -> dict[str, str]:
    """Writes 200 source files and some to be skipped; returns the contents of the former by name."""
    files = {f"package{i % 3}/module{i}.py": f"# {i} {content}" for i in range(200)}
    skipped = {"test/a.py": "# test", "x/tests/b.py": "# tests", "site-packages/c.py": "# site", "d.txt": "text"}
    for name, text in (files | skipped).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return files


def test_the_standard_library_is_split_by_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is in exactly one split, whatever its content, followed by a zero byte; tests and other files in none."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    membership = []
    for content in ("one", "another"):
        files = write_library(tmp_path, content)
        parts = {s: bytes(t).decode().split(chr(END)) for s, t in read_standard_library().items()}
        assert sorted(parts) == ["train", "validation"]
        assert all(texts.pop() == "" and texts for texts in parts.values())
        assert sorted(parts["train"] + parts["validation"]) == sorted(files.values())
        membership.append({name for name, text in files.items() if text in parts["validation"]})
    assert membership[0] == membership[1]
    assert 0 < len(membership[0]) < 30  # 5% of 200 expected


def test_no_source_files_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python without the sources of its library can't be trained on."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match="too few Python source files under"):
        read_standard_library()


def test_the_gpt_worker_trains_on_shifted_bytes_of_its_python(calls: list[int]) -> None:
    """Targets are the inputs moved by one; this Python's own library is large and mostly for training."""
    worker = GPT(width=16, depth=1, attention_heads=2, context=8, batch_size=4)
    inputs, targets = next(worker.train_batches(Shard(0, 2, 0)))
    assert inputs.shape == targets.shape == (4, 8)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    train, validation = len(worker.tokens("train").tokens), len(worker.tokens("validation").tokens)
    assert train + validation > 1_000_000
    assert 0.005 < validation / train < 0.2
