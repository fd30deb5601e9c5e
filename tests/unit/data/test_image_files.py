"""Data sets of images in each format: what they contain, how images get their shape, and errors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from lte_ray.data.image_files import CHUNK, SPLITS, ImageSource, Shape, find_images, to_shape
from lte_ray.errors import DataError
from tests.support.image_folders import (
    Split,
    encode,
    idx_bytes,
    stripes,
    write_class_folders,
    write_idx_folder,
    write_parquet,
)

TRAIN, TEST = stripes(10), stripes(6, seed=1)
GRAY: Shape = (1, 8, 8)


def read(source: ImageSource) -> Split:
    """Returns all images and labels of a source."""
    count, chunks = source.read()
    images, labels = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    assert len(images) == len(labels) == count
    return images, labels


def write_binary_parquet(folder: Path) -> None:
    for name, (images, labels) in (("train-00000-of-00001", TRAIN), ("test-00000-of-00001", TEST)):
        write_parquet(folder / f"{name}.parquet", [encode(image) for image in images], labels)


def write_huggingface_parquet(folder: Path) -> None:
    """In two files, with structs as of the `datasets` library, and in the folder where its repositories have them."""
    for name, (images, labels) in (("train", TRAIN), ("validation", TEST)):
        structs = [{"bytes": encode(image), "path": None} for image in images]
        for part, rows in enumerate((slice(4), slice(4, None))):
            path = folder / "data" / f"{name}-{part:05}-of-00002.parquet"
            write_parquet(path, structs[rows], labels[rows], image="img", label="fine_label")


def write_nested_parquet(folder: Path) -> None:
    for name, (images, labels) in (("train", TRAIN), ("test", TEST)):
        write_parquet(folder / f"{name}.parquet", images.tolist(), labels.astype(np.uint8))


def write_flat_parquet(folder: Path) -> None:
    for name, (images, labels) in (("train", TRAIN), ("test", TEST)):
        flat = pa.FixedSizeListArray.from_arrays(pa.array(images.reshape(-1)), 64)
        write_parquet(folder / f"{name}.parquet", flat, labels, image="pixels")


FORMATS: dict[str, Callable[[Path], object]] = {
    "idx": lambda folder: write_idx_folder(folder, TRAIN, TEST),
    "idx.gz": lambda folder: write_idx_folder(folder, TRAIN, TEST, compress=True),
    "parquet": write_binary_parquet,
    "hugging face": write_huggingface_parquet,
    "nested lists": write_nested_parquet,
    "flat lists": write_flat_parquet,
    "class folders": lambda folder: write_class_folders(folder, TRAIN, TEST),
}


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_every_format_gives_the_same_images(tmp_path: Path, write: Callable[[Path], object]) -> None:
    """Both splits are there with all images and labels; only class folders sort them by class."""
    write(tmp_path)
    sources = find_images(tmp_path, GRAY)
    assert list(sources) == ["train", "test"]
    for split, (images, labels) in (("train", TRAIN), ("test", TEST)):
        order = np.argsort(labels, kind="stable") if write is FORMATS["class folders"] else np.arange(len(labels))
        found_images, found_labels = read(sources[split])
        assert (found_images.dtype, found_labels.dtype) == (np.uint8, np.int64)
        assert np.array_equal(found_images, images[order][:, None])
        assert np.array_equal(found_labels, labels[order])
        assert all(path.is_file() for path in sources[split].files)


def test_more_images_than_one_chunk_stay_in_order(tmp_path: Path) -> None:
    """Chunks follow each other without gaps or repeats."""
    many = stripes(CHUNK + 3)
    images, labels = read(find_images(write_idx_folder(tmp_path, many, TEST), GRAY)["train"])
    assert np.array_equal(images[:, 0], many[0])
    assert np.array_equal(labels, many[1])


def test_color_images_have_their_channels_first(tmp_path: Path) -> None:
    """From IDX files of four dimensions, from PNG, and from nested lists."""
    colors = np.random.default_rng(0).integers(0, 256, (5, 6, 6, 3)).astype(np.uint8)
    split = (colors, np.arange(5))
    write_idx_folder(tmp_path / "idx", split, split)
    for name, images in (("png", [encode(image) for image in colors]), ("lists", colors.tolist())):
        for part in ("train", "test"):
            write_parquet(tmp_path / name / f"{part}.parquet", images, split[1])
    for name in ("idx", "png", "lists"):
        found, _ = read(find_images(tmp_path / name, (3, 6, 6))["train"])
        assert np.array_equal(found, colors.transpose(0, 3, 1, 2)), name


def test_encoded_images_are_converted_to_the_channels_asked(tmp_path: Path) -> None:
    """Gray images become three equal channels, colored ones one."""
    write_class_folders(tmp_path, TRAIN, TEST)
    images, _ = read(find_images(tmp_path, (3, 8, 8))["test"])
    assert images.shape == (6, 3, 8, 8)
    assert np.array_equal(images[:, 0], images[:, 2])
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    for part in ("train", "test"):
        write_parquet(tmp_path / "red" / f"{part}.parquet", [encode(red)], [0])
    (gray,), _ = read(find_images(tmp_path / "red", (1, 4, 4))["train"])
    assert (gray == 76).all()  # 0.299 of 255


def test_hidden_files_and_folders_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither an editor's folders nor macOS' copies are classes or images; other files that aren't read are named once."""
    write_class_folders(tmp_path, TRAIN, TEST)
    expected = {split: read(source) for split, source in find_images(tmp_path, GRAY).items()}
    for split in ("train", "test"):
        (tmp_path / split / ".ipynb_checkpoints").mkdir()
        (tmp_path / split / "class-0" / "._0000.png").write_bytes(b"no image")
        (tmp_path / split / "class-0" / "notes.txt").touch()
    for split, source in find_images(tmp_path, GRAY).items():
        images, labels = read(source)
        assert np.array_equal(images, expected[split][0])
        assert np.array_equal(labels, expected[split][1])
    assert "train/class-0 has files that aren't read, such as notes.txt" in caplog.text


def test_images_of_16_bits_keep_their_contrast(tmp_path: Path) -> None:
    """65535 is white, and so on: Pillow's own conversion cuts off what is above 255."""
    values = np.array([[0, 257, 1000, 60000, 65535]], np.uint16).repeat(5, axis=0)
    for split in ("train", "test"):
        path = tmp_path / split / "a" / "deep.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(encode(values))
    for channels in (1, 3):
        images, _ = read(find_images(tmp_path, (channels, 5, 5))["train"])
        assert np.array_equal(images[0, -1, 0], [0, 1, 4, 233, 255])


@pytest.mark.parametrize("kind", ["JPEG", "BMP", "WEBP"])
def test_files_of_other_kinds_are_decoded(tmp_path: Path, kind: str) -> None:
    """Images of different sizes come out at one size, near their values."""
    for split in ("train", "test"):
        for side, value in ((8, 40), (20, 200)):
            path = tmp_path / split / f"of-{value}" / f"a.{kind.lower()}"
            path.parent.mkdir(parents=True)
            path.write_bytes(encode(np.full((side, side + 4), value, np.uint8), kind))
    images, labels = read(find_images(tmp_path, GRAY)["test"])
    assert labels.tolist() == [0, 1]
    assert np.abs(images[:, 0].astype(int) - np.array([200, 40])[:, None, None]).max() <= 2  # "of-200" comes before "of-40"


def test_images_are_resized_and_cut_to_their_center() -> None:
    """A smooth ramp of 12 x 24 pixels at 6 x 6: the middle half of the columns, each the mean of about two."""
    ramp = np.broadcast_to(np.arange(24, dtype=np.uint8) * 10, (1, 12, 24))
    (result,) = to_shape(ramp, (1, 6, 6), "ramp")[:, 0]
    expected = np.arange(24).reshape(12, 2).mean(1)[3:9] * 10
    assert result.shape == (6, 6)
    assert np.abs(result - expected).max() <= 1
    assert to_shape(ramp, (1, 24, 24), "ramp").shape == (1, 1, 24, 24)


def test_images_of_the_right_shape_stay_as_they_are() -> None:
    """No value changes."""
    images = TRAIN[0]
    assert np.array_equal(to_shape(images, GRAY, "")[:, 0], images)


def write_only(folder: Path, **files: bytes) -> None:
    for name, content in files.items():
        (folder / name.replace("__", "-")).write_bytes(content)


def parquets(folder: Path, images: object, labels: object, **names: str) -> None:
    for part in ("train", "test"):
        write_parquet(folder / f"{part}.parquet", images, labels, **names)  # type: ignore[arg-type]


PNG = encode(TRAIN[0][0])
LABELS = TRAIN[1]
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda f: None, "has no images in a known format; it has nothing. Expected are train-images-idx3-ubyte"),
    "other files": (lambda f: write_only(f, readme=b""), "no images in a known format; it has readme"),
    "labels missing": (
        lambda f: write_only(f, train__images__idx3__ubyte=idx_bytes(TRAIN[0])),
        "has train-images-idx3-ubyte, but no file of the labels .* train-labels-idx1-ubyte",
    ),
    "images missing": (
        lambda f: write_only(f, train__labels__idx1__ubyte=idx_bytes(LABELS)),
        "has train-labels-idx1-ubyte, but no file of the images",
    ),
    "no test split": (
        lambda f: write_parquet(f / "train.parquet", [PNG], [0]),
        "has no test split: no file or folder of images is named validation... or valid... or val... or test... or t10k",
    ),
    "labels of another length": (
        lambda f: write_idx_folder(f, (TRAIN[0], LABELS[:-1]), TEST),
        "train-images-idx3-ubyte has 10 images, but .*train-labels-idx1-ubyte has 9 labels",
    ),
    "no parquet": (lambda f: write_only(f, **{"train.parquet": b"PK", "test.parquet": b"PK"}), "can't be read as Parquet"),
    "no column of images": (
        lambda f: parquets(f, [PNG], [0], image="picture"),
        "has no column image or img .*; its columns are: picture, label",
    ),
    "no column of labels": (lambda f: parquets(f, [PNG], [0], label="y"), "has no column label .*; its columns are: image, y"),
    "labels are text": (lambda f: parquets(f, [PNG], ["cat"]), "labels must be integers, counted from 0, .* has string"),
    "labels are missing": (lambda f: parquets(f, [PNG, PNG], [0, None]), "labels must be integers, .* has int64 with nulls"),
    "an image is missing": (lambda f: parquets(f, [PNG, None], [0, 1]), "1 of 2 rows have no image"),
    "no image": (lambda f: parquets(f, [b"hello"], [0]), "train.parquet, an image can't be decoded"),
    "text instead of images": (lambda f: parquets(f, ["hello"], [0]), "images must be encoded bytes .* the column has string"),
    "fractions": (lambda f: parquets(f, [[0.5] * 64], [0]), "images must be encoded bytes .* the column has list<"),
    "large values": (lambda f: parquets(f, [[256] * 64], [0]), "pixels must be from 0 to 255, but they are from 256 to 256"),
    "another number of pixels": (lambda f: parquets(f, [[1] * 63], [0]), "list of 63 pixels isn't an image of 1 x 8 x 8"),
    "ragged": (lambda f: parquets(f, [[1] * 64, [1] * 63], [0, 0]), "lists of pixels must all have one size"),
    "another number of channels": (
        lambda f: write_idx_folder(f, (np.zeros((2, 8, 8, 3)), LABELS[:2]), TEST),
        "an image has the shape 8 x 8 x 3, not that of 1 channel",
    ),
    "a broken file": (
        lambda f: (write_class_folders(f, TRAIN, TEST), (f / "train/class-0/0000.png").write_bytes(PNG[:40])),
        "0000.png can't be decoded",
    ),
    "a class without images": (
        lambda f: (write_class_folders(f, TRAIN, TEST), (f / "train/class-9").mkdir(), (f / "train/class-9/a.gif").touch()),
        r"train/class-9 has no images in a known format \(.png.*so no head could learn that class. Add some",
    ),
    "a folder in a class": (
        lambda f: (write_class_folders(f, TRAIN, TEST), (f / "train/class-0/more").mkdir()),
        "train/class-0 is the folder of a class, but it has the folder more. Move its images up",
    ),
    "a class without training images": (
        lambda f: write_class_folders(f, TRAIN, (TEST[0], TEST[1] + 1)),
        "test has classes that the train split lacks: class-4",
    ),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_data_are_one_clear_error(tmp_path: Path, case: tuple[Callable[[Path], object], str]) -> None:
    """It names the file or folder, what it has, and what is expected."""
    write, message = case
    folder = tmp_path / "data-set"
    folder.mkdir()
    write(folder)

    def read_all() -> None:
        for source in find_images(folder, GRAY).values():
            read(source)

    with pytest.raises(DataError, match=f"(?s)data-set.*{message}"):
        read_all()


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    """It names the folder."""
    with pytest.raises(DataError, match=r"There is no folder .*nowhere of images"):
        find_images(tmp_path / "nowhere", GRAY)


def test_without_pillow_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only encoded images need it: IDX files and lists of pixels are read without."""
    write_class_folders(tmp_path / "files", TRAIN, TEST)
    write_idx_folder(tmp_path / "idx", TRAIN, TEST)
    for name in [name for name in sys.modules if name.partition(".")[0] == "PIL"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "PIL", None)
    read(find_images(tmp_path / "idx", GRAY)["train"])
    with pytest.raises(DataError, match=r"decoding images needs Pillow, .* pip install 'lte-ray\[images\]'"):
        read(find_images(tmp_path / "files", GRAY)["train"])


def test_of_several_test_splits_the_first_name_counts(tmp_path: Path) -> None:
    """A test split without labels next to a validation split, as on ImageNet, isn't read."""
    assert SPLITS["test"].index("validation") < SPLITS["test"].index("test")
    write_parquet(tmp_path / "train.parquet", [PNG], [0])
    write_parquet(tmp_path / "validation.parquet", [PNG], [1])
    write_parquet(tmp_path / "test.parquet", [PNG], [-1])
    _, labels = read(find_images(tmp_path, GRAY)["test"])
    assert labels.tolist() == [1]
