"""Image sets: the cache of decoded images, and what makes a new one."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lte_ray.data import ImageSet, cached_images
from lte_ray.data import images as images_module
from lte_ray.errors import DataError
from tests.support.image_folders import stripes, write_idx_folder, write_parquet

TRAIN, TEST = stripes(10), stripes(6, seed=1)
GRAY = (1, 8, 8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the folder of a small data set, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_idx_folder(tmp_path / "data set.v1", TRAIN, TEST)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns the list in which each writing of the cache is recorded."""
    calls: list[int] = []
    write = images_module._write
    monkeypatch.setattr(images_module, "_write", lambda *args: (calls.append(1), write(*args)))
    return calls


def test_both_splits_are_memory_mapped(folder: Path, reads: list[int]) -> None:
    """They have all images and labels, read-only, and the second call decodes nothing."""
    first, second = cached_images(folder, GRAY), cached_images(folder, GRAY)
    assert len(reads) == 1
    for sets in (first, second):
        for split, (images, labels) in (("train", TRAIN), ("test", TEST)):
            data = sets[split]
            assert isinstance(data, ImageSet)
            assert isinstance(data.images, np.memmap)
            assert not data.images.flags.writeable
            assert len(data) == len(labels)
            assert np.array_equal(data.images[:, 0], images)
            assert np.array_equal(data.labels, labels)


def test_a_change_of_a_file_is_seen(folder: Path, reads: list[int]) -> None:
    """Other content, or another time of its last change, makes a new copy; so does another shape."""
    cached_images(folder, GRAY)
    write_idx_folder(folder, stripes(12, seed=5), TEST)
    assert len(cached_images(folder, GRAY)["train"]) == 12
    os.utime(folder / "t10k-labels-idx1-ubyte", ns=(1, 1))
    cached_images(folder, GRAY)
    assert cached_images(folder, (1, 4, 4))["test"].images.shape == (6, 1, 4, 4)
    assert len(reads) == 4


def test_a_missing_file_of_the_cache_is_made_again(folder: Path, tmp_path: Path, reads: list[int]) -> None:
    """A file that was removed from the cache folder is there again after the next call, and nothing else remains."""
    cached_images(folder, GRAY)
    next((tmp_path / "cache").rglob("test-labels.npy")).unlink()
    assert np.array_equal(cached_images(folder, GRAY)["test"].labels, TEST[1])
    assert len(reads) == 2
    assert len([path for path in (tmp_path / "cache").rglob("*") if path.is_file()]) == 5  # four arrays and the lock


def test_a_failure_leaves_no_cache(folder: Path, tmp_path: Path) -> None:
    """After an error the next call reads the data as if it were the first."""
    path = folder / "t10k-images-idx3-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte is damaged"):
        cached_images(folder, GRAY)
    assert not list((tmp_path / "cache").rglob("*.npy"))
    path.write_bytes(content)
    assert len(cached_images(folder, GRAY)["test"]) == 6


def test_only_one_process_decodes_the_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second one that has seen an empty cache waits for the first, and uses what that has written."""
    write, is_complete = images_module._write, images_module._is_complete
    writes, second_has_looked = [], threading.Event()
    with ThreadPoolExecutor(1) as pool:  # a lock of a file is one of each opening, so threads are like processes
        second: list[Future] = []

        def write_slowly(*args: object) -> None:
            writes.append(1)
            if len(writes) == 1:
                second.append(pool.submit(cached_images, folder, GRAY))
                assert second_has_looked.wait(60)
            write(*args)  # type: ignore[arg-type]

        def look(*args: object) -> bool:
            complete = is_complete(*args)  # type: ignore[arg-type]
            if threading.current_thread() is not threading.main_thread():
                second_has_looked.set()
            return complete

        monkeypatch.setattr(images_module, "_write", write_slowly)
        monkeypatch.setattr(images_module, "_is_complete", look)
        first = cached_images(folder, GRAY)
        assert len(first["train"]) == len(second[0].result()["train"]) == 10
    assert writes == [1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [([-1, 0], "the train split has the label -1. Labels count from 0"), ([], "the train split has no images")],
)
def test_labels_that_are_none_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: list[int], message: str
) -> None:
    """-1 is how some data sets mark images without a label."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for part in ("train", "test"):
        write_parquet(tmp_path / "data" / f"{part}.parquet", TRAIN[0][: len(labels)].tolist(), labels)
    with pytest.raises(DataError, match=rf"train.parquet: {message}"):
        cached_images(tmp_path / "data", GRAY)
