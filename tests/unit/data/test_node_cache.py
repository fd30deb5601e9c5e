"""Data in stores and on web servers: copied to a node once, and again when they change."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import fsspec
import pytest

from lte_ray.data import local_copy, node_cache, read_records
from lte_ray.data.node_cache import cache_folder
from lte_ray.data.records import fingerprint
from lte_ray.errors import DataError
from tests.support.object_stores import serving


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies go into the test's folder, and failures aren't repeated."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(node_cache, "DEFAULT_PATIENCE", 0.0)


class Site:
    """What a web server has. `requests` are those that it got; `cut` is how many bytes of a body it sends at most."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.requests: list[str] = []
        self.cut: int | None = None
        self.url = ""

    def put(self, path: str, data: bytes, etag: str = "1") -> str:
        self.files[path], self.etags[path] = data, etag
        return self.url + path

    @property
    def downloads(self) -> int:
        return sum(request.startswith("GET") for request in self.requests)


@pytest.fixture
def site() -> Iterator[Site]:
    made = Site()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            data = self._answer()
            self.wfile.write(data if made.cut is None else data[: made.cut])

        def _answer(self) -> bytes:
            path = self.path.partition("?")[0]
            made.requests.append(f"{self.command} {self.path}")
            status = 403 if path.startswith("/secret") else 200 if path in made.files else 404
            data = made.files.get(path, b"") if status == 200 else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            if status == 200:
                self.send_header("ETag", made.etags[path])
            self.end_headers()
            return data

        def log_message(self, *args: Any) -> None: ...

    with serving(Handler) as port:
        made.url = f"http://127.0.0.1:{port}"
        yield made


def test_a_local_path_is_returned_as_it_is(tmp_path: Path) -> None:
    """Nothing is copied, and nothing is looked up."""
    assert local_copy(tmp_path / "nothing") == str(tmp_path / "nothing")
    assert local_copy(f"file://{tmp_path}/a") == f"{tmp_path}/a"
    assert local_copy("~/x") == str(Path("~/x").expanduser())
    assert not cache_folder().exists()


def test_a_file_on_a_web_server_is_copied_once_until_it_changes(site: Site) -> None:
    """The copy has the file's name. Another ETag makes another copy, also of the same size."""
    url = site.put("/a/data.jsonl", b'{"a": 1}\n')
    first = local_copy(url)
    assert first == local_copy(url)
    assert (Path(first).name, Path(first).read_bytes(), site.downloads) == ("data.jsonl", b'{"a": 1}\n', 1)
    before = fingerprint(url)
    site.put("/a/data.jsonl", b'{"a": 2}\n', etag="2")
    second = local_copy(url)
    assert Path(second).read_bytes() == b'{"a": 2}\n'
    assert (site.downloads, first != second, fingerprint(url) != before) == (2, True, True)
    assert [record for _, record in read_records(url)] == [{"a": 2}]
    assert site.downloads == 2


def test_records_name_the_address_and_not_the_copy(site: Site) -> None:
    """Also with a query, which isn't part of the file's name."""
    url = site.put("/data.jsonl", b"{\n") + "?download=1"
    with pytest.raises(DataError, match=r"http://127.0.0.1:\d+/data.jsonl\?download=1, line 1 isn't JSON"):
        list(read_records(url))


def test_several_processes_of_a_node_copy_once(site: Site) -> None:
    """They ask at the same time. Threads stand for processes: each opens the lock's file by itself."""
    url = site.put("/large.bin", bytes(range(256)) * 1000)
    barrier = threading.Barrier(4)

    def ask(_: int) -> str:
        barrier.wait()
        return local_copy(url)

    with ThreadPoolExecutor(4) as pool:
        places = set(pool.map(ask, range(4)))
    assert len(places) == 1
    assert Path(places.pop()).read_bytes() == site.files["/large.bin"]
    assert site.downloads == 1


def test_a_copy_that_broke_off_is_never_seen(site: Site) -> None:
    """What a process has left that died is removed."""
    url = site.put("/data.jsonl", b"x" * 1000)
    site.cut = 10
    with pytest.raises(DataError, match=r"data.jsonl can't be copied"):
        local_copy(url)
    assert [path.suffix for path in cache_folder().iterdir()] == [".lock"]
    (name,) = [path.stem for path in cache_folder().iterdir()]
    (cache_folder() / f"{name}.partdead").mkdir()
    site.cut = None
    assert Path(local_copy(url)).read_bytes() == b"x" * 1000
    assert sorted(path.suffix for path in cache_folder().iterdir()) == ["", ".lock"]


def test_a_folder_is_copied_with_all_that_is_in_it() -> None:
    """But for hidden files. A changed file makes a new copy."""
    memory = fsspec.filesystem("memory")
    for name in ("train/cat/1.png", "train/dog/2.png", ".git/x"):
        memory.pipe(f"/pets/{name}", name.encode())
    folder = Path(local_copy("memory://pets"))
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png")) == ["train/cat/1.png", "train/dog/2.png"]
    assert (folder / "train/dog/2.png").read_bytes() == b"train/dog/2.png"
    assert not (folder / ".git").exists()
    assert local_copy("memory://pets") == str(folder)
    memory.pipe("/pets/train/cat/3.png", b"new")
    assert local_copy("memory://pets") != str(folder)
    memory.rm("/pets", recursive=True)


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores allow any name."""
    file = node_cache.DataFile("s3://b/x/../../evil", "b/x/../../evil", None, 1, "")
    monkeypatch.setattr(node_cache, "find_data", lambda place: ([file], "b/x"))
    with pytest.raises(DataError, match="isn't a path inside the folder of the data"):
        local_copy("s3://b/x")


def refuse_import(*args: Any, **kwargs: Any) -> None:
    raise ImportError("Install s3fs to access S3")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("/nothing.jsonl", r"There is no file http://127.0.0.1:\d+/nothing.jsonl"),
        ("/secret.jsonl", r"/secret.jsonl can't be listed: there is no right to it"),
    ],
)
def test_what_a_web_server_refuses_is_one_sentence(site: Site, source: str, says: str) -> None:
    """Missing, or forbidden."""
    for read in (local_copy, lambda place: list(read_records(place))):
        with pytest.raises(DataError, match=says):
            read(site.url + source)


def test_what_cannot_be_copied_is_one_sentence(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing there, several files, an unknown scheme, a missing account, a missing library, a disk that is too small."""
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT", raising=False)
    memory = fsspec.filesystem("memory")
    for name in ("a", "b"):
        memory.pipe(f"/two/{name}.jsonl", b"{}")
    with pytest.raises(DataError, match=r"memory://two/\*\.jsonl names 2 files\. Give one file"):
        local_copy("memory://two/*.jsonl")
    with pytest.raises(DataError, match=r"There is no file memory://none"):
        local_copy("memory://none")
    with pytest.raises(DataError, match=r"foo://x can't be listed: Protocol not known: foo"):
        local_copy("foo://x")
    with pytest.raises(DataError, match="az://c/x can't be listed: az:// needs the account's name in AZURE_"):
        local_copy("az://c/x")
    url = site.put("/data.jsonl", b"x" * 1000)
    monkeypatch.setattr(node_cache.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 999}))
    with pytest.raises(DataError, match=r"has 1,000 bytes, but the disk of .* has 999 left"):
        local_copy(url)
    monkeypatch.setattr(fsspec.core, "url_to_fs", refuse_import)
    with pytest.raises(DataError, match=r"needs another package: Install s3fs .* Install it on every node"):
        local_copy(url)
    memory.rm("/two", recursive=True)
