"""IDX files: what was written is read, and each kind of damage is one clear error."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lte_ray.data.idx import read_idx
from lte_ray.errors import DataError
from tests.support.image_folders import idx_bytes

IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_an_array_is_read_as_it_was_written(tmp_path: Path, shape: list[int], compress: bool) -> None:
    """Of any shape, plain or compressed, whatever the file's name."""
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(idx_bytes(array)) if compress else idx_bytes(array))
    read = read_idx(path, (len(shape),))
    assert read.dtype == np.uint8
    assert read.shape == array.shape
    assert np.array_equal(read, array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx_bytes(IMAGES)[:-1], r"damaged: its header announces 2 x 3 x 4 = 24 bytes, but 23 bytes follow"),
        (idx_bytes(IMAGES) + b"\0", r"damaged: its header announces 2 x 3 x 4 = 24 bytes, but 25 bytes follow"),
        (idx_bytes(IMAGES)[:10], r"damaged: its header announces 3 dimensions, but 0 bytes follow"),
        (gzip.compress(idx_bytes(IMAGES))[:-9], r"damaged: gzip can't decompress it"),
        (idx_bytes(np.arange(4)), r"isn't an IDX file of 3 dimension\(s\).* begins with 00 00 08 01, not 00 00 08 03"),
        (b"\x89PNG....", r"isn't an IDX file of 3 dimension\(s\).* begins with 89 50 4e 47, not 00 00 08 03"),
        (b"", r"isn't an IDX file .* begins with \(nothing\)"),
    ],
    ids=["truncated", "too long", "cut in the header", "truncated gzip", "labels", "another format", "empty"],
)
def test_a_damaged_file_is_one_error(tmp_path: Path, content: bytes, message: str) -> None:
    """It names the file and what is wrong with it."""
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"train-images-idx3-ubyte.*{message}"):
        read_idx(path, (3,))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    """It says that the file can't be read, and why."""
    with pytest.raises(DataError, match=r"nothing can't be read: No such file"):
        read_idx(tmp_path / "nothing", (3,))
