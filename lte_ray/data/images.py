"""Image sets: labeled images of one size in memory-mapped files, so that the heads on a node share their pages."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import platformdirs
from numpy.typing import NDArray

from lte_ray.data.image_files import ImageSource, Shape, find_images
from lte_ray.errors import DataError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("lte_ray")

VERSION = 2
"""Of the cached files: a change of how images are read needs another."""


@dataclass(frozen=True)
class ImageSet:
    """The images and labels of a split.

    Attributes:
        images: (n, channels, height, width), unsigned bytes, read-only.
        labels: (n,), counted from 0, read-only.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def open(cls, folder: Path, split: str) -> ImageSet:
        """Memory-maps the files of a split that `cached_images` wrote."""
        images, labels = (np.lib.format.open_memmap(path, mode="r") for path in _paths(folder, split))
        return cls(images, labels)


def cached_images(folder: Path, shape: Shape) -> dict[str, ImageSet]:
    """Returns the splits "train" and "test" of a data set of images, all brought to one shape.

    `lte_ray.data.image_files.find_images` says which formats a folder may have. On first use the images are decoded and written
    to the user's cache folder, once per machine: n x channels x height x width bytes. A change of any of their files makes a
    new copy.

    Args:
        folder: the data set's.
        shape: channels, height and width.

    Raises:
        DataError: the data are missing, incomplete or damaged, or can't have this shape.
    """
    sources = find_images(folder, shape)
    cache = Path(platformdirs.user_cache_dir("lte-ray")) / "images" / _key(folder, shape, sources)
    if not _is_complete(cache, sources):
        cache.parent.mkdir(parents=True, exist_ok=True)
        with _one_process_at_a_time(cache.parent / f"{cache.name}.lock"):
            if not _is_complete(cache, sources):
                _write(cache, sources, shape)
    return {split: ImageSet.open(cache, split) for split in sources}


def _paths(folder: Path, split: str) -> tuple[Path, Path]:
    return folder / f"{split}-images.npy", folder / f"{split}-labels.npy"


def _is_complete(cache: Path, splits: Mapping[str, ImageSource]) -> bool:
    return all(path.is_file() for split in splits for path in _paths(cache, split))


def _key(folder: Path, shape: Shape, sources: Mapping[str, ImageSource]) -> str:
    digest = hashlib.sha256(repr((VERSION, str(folder.resolve()), shape)).encode())
    for split, source in sources.items():
        for path in source.files:
            stat = path.stat()
            digest.update(repr((split, str(path.relative_to(folder)), stat.st_size, stat.st_mtime_ns)).encode())
    return f"{folder.resolve().name}-{digest.hexdigest()[:16]}"


def _write(cache: Path, sources: Mapping[str, ImageSource], shape: Shape) -> None:
    """Writes all splits; the cache folder has its name only when they are complete."""
    partial = Path(tempfile.mkdtemp(dir=cache.parent, prefix=cache.name, suffix=".part"))
    try:
        for split, source in sources.items():
            count, chunks = source.read()
            if not count:
                raise DataError(f"{source.files[0]}: the {split} split has no images.")
            log.info("decoding %d images of the %s split to %s", count, split, cache)
            image_file, label_file = _paths(partial, split)
            images = np.lib.format.open_memmap(image_file, "w+", dtype=np.uint8, shape=(count, *shape))
            labels, done = np.empty(count, dtype=np.int64), 0
            for some_images, some_labels in chunks:
                images[done : done + len(some_labels)], labels[done : done + len(some_labels)] = some_images, some_labels
                done += len(some_labels)
            images.flush()
            if labels.min() < 0:
                raise DataError(f"{source.files[0]}: the {split} split has the label {labels.min()}. Labels count from 0.")
            np.save(label_file, labels)
        shutil.rmtree(cache, ignore_errors=True)  # perhaps incomplete
        os.rename(partial, cache)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _one_process_at_a_time(path: Path) -> Iterator[None]:
    """Of several heads on a node one decodes the images; the others wait for it. The system releases the lock of a dead one."""
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
