"""Reads records from the files that people have: JSONL, JSON, CSV, Parquet and text, or a data set of Hugging Face's hub."""

from __future__ import annotations

import csv
import hashlib
import importlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lte_ray.data.node_cache import DataFile, find_data
from lte_ray.data.warn_once import warn_once
from lte_ray.errors import DataError

Record = dict[str, Any]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".txt", ".md")

PIECE = 4000
"""Characters of a piece of a text file, at least. Pieces end at blank lines, so that some can be held out for validation."""

TEXT = (".txt", ".md")
"""Formats of text. In a folder that has files with records, they are notes, not data."""

CONTINUES = "continues"
"""Key of a text file's pieces: whether another piece of the file follows."""

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""In JSON: a half of a character that is written in two halves."""

HUB = "hf:"


def find_files(source: str) -> list[DataFile]:
    """Returns the files that a source names: a file, a folder with everything in it, a pattern, or a URI of these, in order.

    In a folder, hidden files and folders are left out, and so are texts if there are files with records. If files' names begin
    with "train" and others with "test", "val" or "dev", the former are taken, and the log says so.

    Raises:
        DataError: there is none, or none of a known format.
    """
    found, folder = find_data(source)
    if not found:
        raise DataError(f"There is no file {source}. Give the path of a file, a folder or a pattern that every node can read.")
    known = [file for file in found if file.suffix in SUFFIXES and not Path(file.path).name.startswith(".")]
    if not known:
        raise DataError(
            f"{source} has no file of a known format: found {Path(found[0].path).name}, but the formats are "
            f"{', '.join(SUFFIXES)}."
        )
    return _data_of_folder(source, known) if folder else known


def _data_of_folder(source: str, files: list[DataFile]) -> list[DataFile]:
    files = [file for file in files if file.suffix not in TEXT] or files
    train = [file for file in files if _split_of(file.path) == "train"]
    others = [file for file in files if _split_of(file.path) == "other"]
    if train and others:
        warn_once(f"{source}: the data are the {len(train)} file(s) named train*; {Path(others[0].path).name} isn't read.")
        return train
    return files


def _split_of(file: str) -> str:
    name = re.split(r"[^a-z]", Path(file).name.lower())[0]
    return {"train": "train", **dict.fromkeys(("test", "validation", "valid", "val", "dev", "eval"), "other")}.get(name, "")


def fingerprint(source: str) -> str:
    """Returns a text that changes when any file of the source does."""
    if source.startswith(HUB):
        return str(getattr(load_from_hub(source), "_fingerprint", source))
    digest = hashlib.sha256()
    for file in find_files(source):
        digest.update(repr((file.name, file.size, file.state)).encode())
    return digest.hexdigest()


def read_records(source: str) -> Iterator[tuple[str, Record]]:
    """Yields where a record is (for messages) and the record, in the order of files and lines.

    A text file yields pieces ``{"text": ..., "continues": ...}`` that end at blank lines, or else at the ends of lines.

    Args:
        source: a file, a folder, a pattern, a URI of these, or ``hf:NAME``, ``hf:NAME:SPLIT`` of Hugging Face's hub.

    Raises:
        DataError: it is missing, empty or damaged. The message names the file, and the line or byte.
    """
    if source.startswith(HUB):
        for row, record in enumerate(load_from_hub(source)):
            yield f"{source}, row {row}", dict(record)
        return
    empty = True
    for file in find_files(source):
        for place, record in _read_file(file):
            empty = False
            yield place, record
    if empty:
        raise DataError(f"{source} is empty: it has no records.")


def check_columns(record: Mapping[str, Any], columns: Sequence[str], place: str) -> None:
    """Raises DataError unless the record has all these columns; names those that it has."""
    missing = [column for column in columns if column not in record]
    if missing:
        raise DataError(f"{place}: there is no column {', '.join(missing)}. The columns are: {', '.join(map(str, record))}.")


def load_from_hub(source: str) -> Any:
    """Loads ``hf:NAME`` or ``hf:NAME:SPLIT`` with the package datasets; by default the split train.

    Raises:
        DataError: datasets isn't installed, or can't load it.
    """
    name, _, split = source.removeprefix(HUB).partition(":")
    if not name:
        raise DataError(f"{source} names no data set: give hf:NAME or hf:NAME:SPLIT.")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(f"{source} needs the package datasets: pip install 'lte-ray[hf]'.") from error
    try:
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{source} can't be loaded: {type(error).__name__}: {reason}") from error


def _read_file(file: DataFile) -> Iterator[tuple[str, Record]]:
    path = file.local()
    if file.suffix == ".parquet":
        return _read_parquet(file.name, path)
    return READERS.get(file.suffix, _read_lines)(file.name, read_text(file.name, path))


def _read_parquet(file: str, path: Path) -> Iterator[tuple[str, Record]]:
    try:
        with path.open("rb") as opened:
            rows = pq.read_table(opened).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} can't be read as Parquet: {error}") from error
    yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows))


def _read_pieces(file: str, text: str) -> Iterator[tuple[str, Record]]:
    pieces = list(_pieces(text.replace("\r\n", "\n")))
    for number, piece in enumerate(pieces):
        yield f"{file}, piece {number}", {"text": piece, CONTINUES: number + 1 < len(pieces)}


def _read_csv(file: str, text: str) -> Iterator[tuple[str, Record]]:
    reader, number = csv.DictReader(io.StringIO(text, newline="")), 0
    while True:
        number += 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{file}, row {number}, isn't CSV that can be read: {error}.") from error
        names = reader.fieldnames or ()
        twice = next((name for name in names if list(names).count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{file} has two columns {twice!r}. Rename one.")
        if None in row or None in row.values():
            raise DataError(f"{file}, row {number}: the number of fields isn't that of the first line.")
        yield f"{file}, row {number}", row


def _read_json(file: str, text: str) -> Iterator[tuple[str, Record]]:
    records = _parse(text, file)
    if not isinstance(records, list):
        raise DataError(f"{file} must be a list of records, but it is a {type(records).__name__}. Is it JSONL (.jsonl)?")
    for number, record in enumerate(records):
        yield f"{file}, record {number}", _check_record(record, f"{file}, record {number}")


def _read_lines(file: str, text: str) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"{file}, line {number}"
            yield place, _check_record(_parse(line, place), place)


READERS = {".txt": _read_pieces, ".md": _read_pieces, ".csv": _read_csv, ".json": _read_json}
"""Of text files by their suffix; other files are JSONL."""


def read_text(file: str, path: Path) -> str:
    """Reads a text file in UTF-8; `file` is its name for messages.

    Raises:
        DataError: it can't be read, or isn't UTF-8. The message names the byte.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{file} can't be read: {error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} isn't text in UTF-8: byte {error.start} is 0x{data[error.start]:02x}. Convert it, e.g. with iconv."
        ) from error


def _parse(text: str, place: str) -> Any:
    try:
        value = json.loads(text)
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise DataError(f"{place} has {half}, which is half of a character. Remove it, or write both halves.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} isn't JSON: {error}. It begins with {text.strip()[:40]!r}.") from error


def _check_record(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f'{place} must be an object such as {{"text": ...}}, but it is a {type(value).__name__}.')
    return value


def _pieces(text: str) -> Iterator[str]:
    """Cuts a text at blank lines into pieces of at least `PIECE` characters (but the last). Together they are the text.

    A piece without a blank line within twice that many characters ends at a line's end.
    """
    start = 0
    while start < len(text):
        least = start + PIECE
        border = "\n\n" if text.find("\n\n", least, least + PIECE) >= 0 else "\n"
        end = text.find(border, least)
        end = len(text) if end < 0 else end + len(border)
        yield text[start:end]
        start = end
