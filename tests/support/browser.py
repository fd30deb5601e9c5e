"""A headless Chromium for tests of pages, driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest

T = TypeVar("T")

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find_chromium() -> str:
    """The browser's program. Skips the test if there is none."""
    found = os.environ.get("CHROMIUM") or next((path for name in NAMES if (path := shutil.which(name))), "")
    if not found:
        pytest.skip("there is no Chromium here (install it, or name it in CHROMIUM)")
    return found


@dataclass
class Page:
    """An open page.

    Attributes:
        errors: what the console has said that is no plain log.
        requests: the addresses that the page has asked for.
    """

    socket: aiohttp.ClientWebSocketResponse
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    _number: int = 0
    _events: list[dict[str, Any]] = field(default_factory=list)

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        self._number += 1
        await self.socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._receive()
            if message.get("id") == self._number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    async def wait(self, event: str) -> None:
        """Waits for an event since the last wait."""
        while not any(message.get("method") == event for message in self._events):
            await self._receive()
        self._events.clear()

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def open(self, file: Path, width: int = 1280, height: int = 900, *, dark: bool = False) -> None:
        """Opens a file and waits until it is loaded."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        await self.call("Emulation.setEmulatedMedia", features=scheme)
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self._events.clear()
        await self.call("Page.navigate", url=file.resolve().as_uri())
        await self.wait("Page.loadEventFired")

    async def screenshot(self, file: Path, *, whole: bool = True) -> None:
        """Writes a picture (PNG) of the page, or of what is in the window."""
        result = await self.call("Page.captureScreenshot", captureBeyondViewport=whole, **(await self._clip() if whole else {}))
        file.write_bytes(base64.b64decode(result["data"]))

    async def _clip(self) -> dict[str, Any]:
        size = (await self.call("Page.getLayoutMetrics"))["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    async def _receive(self) -> dict[str, Any]:
        message: dict[str, Any] = await self.socket.receive_json(timeout=60)
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(message["params"]["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded":
            self.errors.append(message["params"]["entry"]["text"])
        elif message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        self._events.append(message)
        return message


@contextlib.asynccontextmanager
async def _opened_page(program: str) -> AsyncIterator[Page]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-port=0"]
        browser = await asyncio.create_subprocess_exec(
            program, *flags, f"--user-data-dir={profile}", "about:blank",
            stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            assert browser.stderr is not None
            while b"DevTools listening on ws://" not in (line := await browser.stderr.readline()):
                assert line, "Chromium ended without saying where it listens"
            drain = asyncio.create_task(browser.stderr.read())
            place = line.decode().split("ws://")[1].split("/")[0]
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://{place}/json") as answer:
                    target = next(each for each in await answer.json() if each["type"] == "page")
                async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    yield Page(socket)
            drain.cancel()
        finally:
            browser.terminate()
            await browser.wait()


def with_page(use: Callable[[Page], Awaitable[T]]) -> T:
    """Calls `use` with an empty page in a new browser, and returns its result. Skips the test without a browser."""
    program = find_chromium()

    async def run() -> T:
        async with _opened_page(program) as page:
            return await use(page)

    return asyncio.run(run())
