"""Reads data sets of labeled images: IDX files, Parquet files, or one folder of images for each class.

`find_images` recognizes the format. Images are brought to one size here, so that readers of the result need no decoder.
"""

from __future__ import annotations

import importlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lte_ray.data.idx import read_idx
from lte_ray.data.warn_once import warn_once
from lte_ray.errors import DataError

Chunk = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images (n, channels, height, width) and labels (n,)."""

Shape = tuple[int, int, int]
"""Channels, height and width of an image."""

SPLITS = {"train": ("train",), "test": ("validation", "valid", "val", "test", "t10k")}
"""The names that files and folders of a split begin with; of several, the first that exists counts."""

IMAGE_COLUMNS = ("image", "img", "pixels", "image_bytes")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
CHUNK = 256
"""Images that are decoded at a time."""


@dataclass(frozen=True)
class ImageSource:
    """One split of a data set, in the files of its author.

    Attributes:
        files: all of them; if none has changed, neither have the images.
        read: returns the number of images, and an iterator over all of them, in order. Both raise DataError if a file is
            damaged, or isn't what its format and the shape require.
    """

    files: tuple[Path, ...]
    read: Callable[[], tuple[int, Iterator[Chunk]]]


def find_images(folder: Path, shape: Shape) -> dict[str, ImageSource]:
    """Returns the splits "train" and "test" of a data set.

    A folder has one of three formats. Test splits may also be named validation, valid or val.

    - IDX: ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, for the test split with ``t10k`` or ``test`` instead of
      ``train``, each perhaps with ``.gz``.
    - Parquet: ``train*.parquet`` and ``test*.parquet``, here or in ``data/``, with a column of images (encoded as PNG, JPEG and
      the like; Hugging Face's structs of these; or lists of pixels) and one of labels.
    - Class folders: ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg``. The sorted names of the classes are numbered from 0.

    Args:
        folder: the data set's.
        shape: of every image that is read. Larger and smaller ones are resized, keeping their aspect ratio, and cut to their
            center. Encoded images are converted to gray (1 channel) or RGB (3 channels).

    Raises:
        DataError: there is no such folder, it has none of these formats, or lacks a split.
    """
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder} of images.")
    for find in (_find_idx, _find_parquet, _find_class_folders):
        splits = find(folder, shape)
        if splits:
            missing = [split for split in SPLITS if split not in splits]
            if missing:
                names = " or ".join(f"{name}..." for name in SPLITS[missing[0]])
                raise DataError(f"{folder} has no {missing[0]} split: no file or folder of images is named {names}.")
            return splits
    content = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise DataError(
        f"{folder} has no images in a known format; it has {content}. Expected are train-images-idx3-ubyte[.gz] and its "
        "relatives (IDX), train*.parquet and test*.parquet, or folders train/CLASS and test/CLASS of image files."
    )


def _first(names: Sequence[str], match: Callable[[str], list[Path]]) -> list[Path]:
    """Returns what the first of these names matches that matches anything."""
    return next((found for found in map(match, names) if found), [])


# -- IDX ---------------------------------------------------------------------------------------------------------------------


def _find_idx(folder: Path, shape: Shape) -> dict[str, ImageSource]:
    files = sorted(path for path in folder.iterdir() if re.search(r"idx[134][-.]ubyte(\.gz)?$", path.name))

    def named(kind: str, split: str) -> list[Path]:
        return [path for path in files if re.match(rf"{split}[-._]{kind}", path.name)]

    splits = {}
    for split, names in SPLITS.items():
        images, labels = _first(names, partial(named, "images")), _first(names, partial(named, "labels"))
        if bool(images) != bool(labels):
            raise DataError(
                f"{folder} has {(images or labels)[0].name}, but no file of the {'labels' if images else 'images'} of this "
                f"split. Put both there: {names[-1]}-images-idx3-ubyte and {names[-1]}-labels-idx1-ubyte, perhaps with .gz."
            )
        if images:
            pair = (images[0], labels[0])
            splits[split] = ImageSource(pair, partial(_read_idx_files, *pair, shape))
    return splits


def _read_idx_files(image_file: Path, label_file: Path, shape: Shape) -> tuple[int, Iterator[Chunk]]:
    images, labels = read_idx(image_file, (3, 4)), read_idx(label_file, (1,))
    if len(images) != len(labels):
        raise DataError(
            f"{image_file} has {len(images)} images, but {label_file} has {len(labels)} labels. One of them is of another data "
            "set or split."
        )

    starts = range(0, len(images), CHUNK)
    return len(images), (
        (to_shape(images[n : n + CHUNK], shape, str(image_file)), labels[n : n + CHUNK].astype(np.int64)) for n in starts
    )


# -- Parquet -----------------------------------------------------------------------------------------------------------------


def _find_parquet(folder: Path, shape: Shape) -> dict[str, ImageSource]:
    splits = {}
    for split, names in SPLITS.items():
        files = _first(names, lambda name: sorted([*folder.glob(f"{name}*.parquet"), *folder.glob(f"data/{name}*.parquet")]))
        if files:
            splits[split] = ImageSource(tuple(files), partial(_read_parquet_files, files, shape))
    return splits


def _read_parquet_files(files: list[Path], shape: Shape) -> tuple[int, Iterator[Chunk]]:
    import pyarrow.parquet as pq

    opened = []
    for path in files:
        try:
            opened.append(pq.ParquetFile(path))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} can't be read as Parquet: {error}") from error
    schema = opened[0].schema_arrow
    image, label = (_choose_column(schema, names, files[0]) for names in (IMAGE_COLUMNS, LABEL_COLUMNS))

    def chunks() -> Iterator[Chunk]:
        for path, file in zip(files, opened, strict=True):
            try:
                for batch in file.iter_batches(CHUNK, columns=[image, label]):
                    yield _images_of(batch.column(image), shape, path), _labels_of(batch.column(label), path)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{path} is damaged: {error}") from error

    return sum(file.metadata.num_rows for file in opened), chunks()


def _choose_column(schema: Any, names: tuple[str, ...], path: Path) -> str:
    for name in names:
        if name in schema.names:
            return name
    raise DataError(f"{path} has no column {' or '.join(names)}; its columns are: {', '.join(schema.names)}. Rename one.")


def _labels_of(column: Any, path: Path) -> NDArray[np.int64]:
    if column.null_count or not pa.types.is_integer(column.type):
        nulls = " with nulls" if column.null_count else ""
        raise DataError(f"{path}: labels must be integers, counted from 0, but the column has {column.type}{nulls}.")
    labels: NDArray[np.int64] = column.to_numpy(zero_copy_only=False).astype(np.int64)
    return labels


def _images_of(column: Any, shape: Shape, path: Path) -> NDArray[np.uint8]:
    """Returns a column's images: encoded ones, structs of these, or lists of pixels."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        column = column.field("bytes")
        kind = column.type
    if column.null_count:
        raise DataError(f"{path}: {column.null_count} of {len(column)} rows have no image.")
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _decode_all([(io.BytesIO(value), f"{path}, an image") for value in column.to_pylist()], shape)
    return to_shape(_pixels_of(column, shape, path), shape, str(path))


def _pixels_of(column: Any, shape: Shape, path: Path) -> NDArray[np.uint8]:
    """Returns a column of (nested) lists of pixels as an array (images, ...)."""
    import pyarrow.compute as pc

    sizes, values = [len(column)], column
    while pa.types.is_list(values.type) or pa.types.is_large_list(values.type) or pa.types.is_fixed_size_list(values.type):
        lengths = pc.unique(pc.list_value_length(values))
        if len(lengths) != 1:
            raise DataError(f"{path}: images given as lists of pixels must all have one size. Encode them as PNG instead.")
        sizes.append(lengths[0].as_py())
        values = values.flatten()
    if len(sizes) == 1 or not pa.types.is_integer(values.type) or values.null_count:
        raise DataError(
            f"{path}: images must be encoded bytes (PNG, JPEG), structs with such bytes, or lists of integers from 0 to 255, "
            f"but the column has {column.type}."
        )
    pixels = values.to_numpy(zero_copy_only=False)
    if len(pixels) and not (pixels.min() >= 0 and pixels.max() <= 255):
        raise DataError(f"{path}: pixels must be from 0 to 255, but they are from {pixels.min()} to {pixels.max()}.")
    if len(sizes) == 2:
        if sizes[1] != np.prod(shape):
            raise DataError(
                f"{path}: a flat list of {sizes[1]} pixels isn't an image of {' x '.join(map(str, shape))} (channels, height, "
                "width). Set the size of the images."
            )
        sizes = [sizes[0], *shape]
    array: NDArray[np.uint8] = pixels.astype(np.uint8).reshape(sizes)
    return array


# -- Folders of image files --------------------------------------------------------------------------------------------------


def _find_class_folders(folder: Path, shape: Shape) -> dict[str, ImageSource]:
    splits: dict[str, ImageSource] = {}
    classes: list[str] = []
    for split, names in SPLITS.items():
        roots = _first(names, lambda name: [folder / name] if (folder / name).is_dir() else [])
        if not roots:
            continue
        root = roots[0]
        found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        classes = classes or found
        unknown = sorted(set(found) - set(classes))
        if unknown:
            raise DataError(f"{root} has classes that the train split lacks: {', '.join(unknown[:8])}.")
        files = [path for name in found for path in _images_in(root / name)]
        empty = [name for name in found if not any(path.parent.name == name for path in files)]
        if files and empty and split == "train":
            raise DataError(
                f"{root / empty[0]} has no images in a known format ({', '.join(SUFFIXES)}), so no head could learn that "
                "class. Add some, convert them, or remove the folder."
            )
        if files:
            splits[split] = ImageSource(tuple(files), partial(_read_image_files, files, classes, shape))
    return splits


def _images_in(folder: Path) -> list[Path]:
    """The images of a class, in order, without hidden files. Raises DataError for folders within it, which aren't read."""
    entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    inner = next((entry for entry in entries if entry.is_dir()), None)
    if inner is not None:
        raise DataError(
            f"{folder} is the folder of a class, but it has the folder {inner.name}. Move its images up, or remove it."
        )
    images = [entry for entry in entries if entry.suffix.lower() in SUFFIXES]
    other = next((entry for entry in entries if entry not in images), None)
    if images and other is not None:
        warn_once(f"{folder} has files that aren't read, such as {other.name}: images are {', '.join(SUFFIXES)}.")
    return images


def _read_image_files(files: list[Path], classes: list[str], shape: Shape) -> tuple[int, Iterator[Chunk]]:
    numbers = {name: number for number, name in enumerate(classes)}

    def chunks() -> Iterator[Chunk]:
        for begin in range(0, len(files), CHUNK):
            chunk = files[begin : begin + CHUNK]
            labels = np.array([numbers[path.parent.name] for path in chunk], dtype=np.int64)
            yield _decode_all([(path, str(path)) for path in chunk], shape), labels

    return len(files), chunks()


def _decode_all(images: list[tuple[Any, str]], shape: Shape) -> NDArray[np.uint8]:
    """Decodes encoded images, each given as a path or file and a name for messages."""
    try:
        image_module = importlib.import_module("PIL.Image")
    except ImportError as error:
        raise DataError(
            f"{images[0][1]}: decoding images needs Pillow, which can't be imported. Install it on every node: "
            "pip install 'lte-ray[images]'."
        ) from error

    def decode(entry: tuple[Any, str]) -> NDArray[np.uint8]:
        source, name = entry
        try:
            with image_module.open(source) as image:
                pixels = np.asarray(_to_eight_bits(image).convert("L" if shape[0] == 1 else "RGB"), dtype=np.uint8)
        except (OSError, ValueError, SyntaxError, image_module.DecompressionBombError) as error:
            raise DataError(f"{name} can't be decoded: {error}") from error
        fitted: NDArray[np.uint8] = to_shape(pixels.reshape(1, *pixels.shape[:2], -1), shape, name)[0]
        return fitted

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without Python's lock
        return np.stack(list(pool.map(decode, images)))


def _to_eight_bits(image: Any) -> Any:
    """The image with 8 bits for a channel: Pillow's own conversion of 16-bit gray cuts off what is above 255.

    Raises:
        ValueError: its values have no known range.
    """
    deep = image.mode.startswith("I;16")
    if image.mode in ("I", "F"):
        low, high = image.getextrema()
        deep = image.mode == "I" and low >= 0 and 255 < high < 2**16  # how older versions of Pillow read 16-bit gray
        if not deep and (image.mode == "F" or low < 0 or high > 255):
            raise ValueError(f"its pixels are from {low:g} to {high:g}; save it with 8 or 16 bits")
    if deep:
        return importlib.import_module("PIL.Image").fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    return image


# -- Shape -------------------------------------------------------------------------------------------------------------------


def to_shape(images: NDArray[np.uint8], shape: Shape, name: str) -> NDArray[np.uint8]:
    """Brings images of one size to a shape.

    The shorter side is resized (bilinear, with antialiasing), and the longer is cut to the center.

    Args:
        images: (n, height, width), (n, height, width, channels) or (n, channels, height, width).
        shape: of the result, (n, channels, height, width).
        name: of the images, for messages.

    Raises:
        DataError: the images have another number of channels, or no pixels.
    """
    channels, height, width = shape
    if images.ndim == 3 and channels == 1:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[3] == channels and images.shape[1] != channels:
        images = images.transpose(0, 3, 1, 2)
    if images.ndim != 4 or images.shape[1] != channels or 0 in images.shape[1:]:
        raise DataError(
            f"{name}: an image has the shape {' x '.join(map(str, images.shape[1:]))}, not that of {channels} channel(s). Set "
            "the number of channels to that of the data."
        )
    if images.shape[2:] == (height, width):
        return np.ascontiguousarray(images)
    scale = max(height / images.shape[2], width / images.shape[3])
    size = (max(height, round(images.shape[2] * scale)), max(width, round(images.shape[3] * scale)))
    resized = F.interpolate(torch.tensor(images), size, mode="bilinear", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return np.ascontiguousarray(resized[:, :, top : top + height, left : left + width].numpy())
