"""Records in the files that people have, and every way in which such files are damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lte_ray.data.records import PIECE, find_files, fingerprint, read_records
from lte_ray.errors import DataError


def records(source: object) -> list[dict[str, Any]]:
    return [record for _, record in read_records(str(source))]


def test_every_format_gives_the_same_records(tmp_path: Path) -> None:
    """JSONL (with a mark and empty lines), JSON, CSV and Parquet."""
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "ä\\u2028", "n": 1}\n\n{"text": "b", "n": 2}'.encode())
    (tmp_path / "b.json").write_text('[{"text": "ä\\u2028", "n": 1}, {"text": "b", "n": 2}]')
    pq.write_table(pa.table({"text": ["ä\u2028", "b"], "n": [1, 2]}), tmp_path / "c.parquet")
    expected = [{"text": "ä\u2028", "n": 1}, {"text": "b", "n": 2}]
    assert records(tmp_path / "a.jsonl") == records(tmp_path / "b.json") == records(tmp_path / "c.parquet") == expected
    (tmp_path / "d.csv").write_text('text,n\n"ä\n",1\nb,2\n')
    assert records(tmp_path / "d.csv") == [{"text": "ä\n", "n": "1"}, {"text": "b", "n": "2"}]


def test_a_folder_and_a_pattern_name_files_in_order(tmp_path: Path) -> None:
    """Files of other formats are left out, and so are hidden ones."""
    for name in ("b.jsonl", "sub/a.jsonl", "notes.xyz", ".hidden.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'{{"name": "{name}"}}')
    assert [record["name"] for record in records(tmp_path)] == ["b.jsonl", "sub/a.jsonl"]
    assert [Path(file.path).name for file in find_files(f"{tmp_path}/*.jsonl")] == ["b.jsonl"]
    assert records(f"file://{tmp_path}/b.jsonl") == [{"name": "b.jsonl"}]


def test_brackets_in_a_name_are_no_pattern_if_there_is_such_a_file(tmp_path: Path) -> None:
    """A pattern is only what isn't the name of a file."""
    (tmp_path / "data[1].jsonl").write_text('{"a": 1}\n{"a": "\\ud83d\\ude00"}\n')
    assert records(tmp_path / "data[1].jsonl") == [{"a": 1}, {"a": "\U0001f600"}]


def test_a_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    """Together the pieces are the text, and only the last says that nothing follows."""
    text = "\n\n".join(f"Paragraph {n}. " + "x" * (PIECE // 3) for n in range(20))
    (tmp_path / "book.txt").write_text(text)
    pieces = records(tmp_path / "book.txt")
    assert "".join(piece["text"] for piece in pieces) == text
    assert len(pieces) > 3
    assert [piece["continues"] for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    assert all(len(piece["text"]) >= PIECE for piece in pieces[:-1])


def test_a_text_of_lines_is_cut_at_lines(tmp_path: Path) -> None:
    """Windows' line ends become plain ones, so that blank lines are found."""
    for content in ("the cat sat\n" * 2000, "the cat sat\r\n\r\n" * 2000):
        (tmp_path / "a.txt").write_bytes(content.encode())
        pieces = [piece["text"] for piece in records(tmp_path / "a.txt")]
        assert "".join(pieces) == content.replace("\r", "")
        assert len(pieces) > 4


def test_a_folder_gives_its_training_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither copies in hidden folders, nor notes, nor the test split; a line says what isn't read."""
    names = ("train-0.jsonl", "training.jsonl", "test.jsonl", ".ipynb_checkpoints/train.jsonl", "README.md")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert [Path(file.path).name for file in find_files(str(tmp_path))] == ["train-0.jsonl"]
    assert "1 file(s) named train*; test.jsonl isn't read" in caplog.text
    (tmp_path / "test.jsonl").unlink()
    assert [Path(file.path).name for file in find_files(str(tmp_path))] == ["train-0.jsonl", "training.jsonl"]


@pytest.mark.parametrize(
    ("source", "says"), [("foo://a/b.jsonl", "foo://a/b.jsonl can't be listed: "), ("hf:", "hf: names no data set")]
)
def test_places_that_cannot_be_read_are_refused(source: str, says: str) -> None:
    """An unknown kind of URI, and no name."""
    with pytest.raises(DataError, match=says):
        records(source)


def test_the_fingerprint_changes_with_a_file(tmp_path: Path) -> None:
    """And stays the same without a change."""
    (tmp_path / "a.jsonl").write_text("{}")
    before = fingerprint(str(tmp_path))
    assert fingerprint(str(tmp_path)) == before
    (tmp_path / "a.jsonl").write_text("{} ")
    assert fingerprint(str(tmp_path)) != before


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b"", "a.jsonl is empty: it has no records"),
        ("a.jsonl", b'{"a": 1}\n{"a": }\n', "a.jsonl, line 2 isn't JSON: Expecting value.*begins with"),
        ("a.jsonl", b'{"a": 1}\n\n[1]\n', "a.jsonl, line 3 must be an object .* but it is a list"),
        ("a.jsonl", '{"a": "ä"}'.encode("latin-1"), "a.jsonl isn't text in UTF-8: byte 7 is 0xe4"),
        ("a.txt", "text".encode("utf-16"), "isn't text in UTF-8: byte 0 is 0xff"),
        ("a.json", b'{"a": 1}', "a.json must be a list of records, but it is a dict"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "a.csv, row 2: the number of fields"),
        ("a.parquet", b"no parquet", "a.parquet can't be read as Parquet"),
        ("a.bin", b"", "no file of a known format: found a.bin, but the formats are .jsonl"),
        ("a.csv", b"a,a\n1,2\n", "a.csv has two columns 'a'. Rename one"),
        ("a.csv", b"a,b\n" + b"x" * 200_000 + b",2\n", "a.csv, row 1, isn't CSV that can be read: field larger than"),
        ("a.jsonl", b'{"a": "ok"}\n{"a": "\\ud83d and"}\n', r"a.jsonl, line 2 has \\ud83d, which is half of a character"),
        ("", b"", "There is no file .*a.jsonl. Give the path"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    """The message names the file, and the line, row or byte."""
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        records(tmp_path / (name or "a.jsonl"))


def test_a_data_set_that_the_hub_lacks_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the library's own reason, in one line."""
    datasets = pytest.importorskip("datasets")

    def load_dataset(name: str, split: str) -> list[dict[str, str]]:
        if name != "some/data":
            raise FileNotFoundError(f"no {name}\nmore")
        return [{"split": split}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert records("hf:some/data:test") == [{"split": "test"}]
    with pytest.raises(DataError, match=r"^hf:other can't be loaded: FileNotFoundError: no other$"):
        records("hf:other")
