"""Small data sets of images, in each of the formats that `lte_ray.data.image_files` reads."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

Split = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images (n, height, width) or (n, height, width, channels), and labels."""


def stripes(count: int, side: int = 8, classes: int = 4, seed: int = 0) -> Split:
    """Returns noisy gray images of horizontal stripes; the label is the stripes' distance. Soon learned."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    rows = (np.arange(side)[None] // (labels[:, None] + 1)) % 2
    images = rows[:, :, None] * 200 + random.integers(0, 56, (count, side, side))
    return images.astype(np.uint8), labels.astype(np.int64)


def idx_bytes(array: NDArray[np.generic]) -> bytes:
    """Returns an IDX file of unsigned bytes."""
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx_folder(folder: Path, train: Split, test: Split, *, compress: bool = False) -> Path:
    """Writes the four files of a data set like MNIST."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (images, labels) in (("train", train), ("t10k", test)):
        for kind, array in ((f"images-idx{images.ndim}", images), ("labels-idx1", labels)):
            content = idx_bytes(array)
            path = folder / f"{name}-{kind}-ubyte{'.gz' if compress else ''}"
            path.write_bytes(gzip.compress(content) if compress else content)
    return folder


def encode(image: NDArray[np.uint8], kind: str = "PNG") -> bytes:
    """Encodes an image (height, width) or (height, width, 3). Needs Pillow."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path: Path, images: pa.Array | list, labels: pa.Array | list, **names: str) -> Path:
    """Writes a Parquet file with the columns image and label, or other names for them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {names.get("image", "image"): pa.array(images), names.get("label", "label"): pa.array(labels)}
    pq.write_table(pa.table(columns), path)
    return path


def write_class_folders(folder: Path, train: Split, test: Split, kind: str = "PNG") -> Path:
    """Writes each image to a file in the folder of its class."""
    for split, (images, labels) in (("train", train), ("test", test)):
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / split / f"class-{label}" / f"{number:04}.{kind.lower()}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(image, kind))
    return folder
