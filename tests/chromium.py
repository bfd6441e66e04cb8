"""A headless Chromium, driven by its own DevTools protocol: enough to use a page as a person would."""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

BINARY = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """One open page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self.errors: list[str] = []

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol; what the page logs as an error meanwhile is kept in `errors`."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            told = await self._socket.receive_json(timeout=60)
            if told.get("method") == "Runtime.exceptionThrown":
                self.errors.append(told["params"]["exceptionDetails"]["text"])
            if told.get("method") == "Log.entryAdded" and told["params"]["entry"]["level"] == "error":
                self.errors.append(told["params"]["entry"]["text"])
            if told.get("id") == number:
                assert "error" not in told, f"{method}: {told['error']}"
                result: dict[str, Any] = told["result"]
                return result

    async def value(self, script: str) -> Any:
        """What a script in the page comes to; a promise is waited for."""
        told = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told["exceptionDetails"]
        return told["result"].get("value")

    async def until(self, script: str, timeout_s: float = 30) -> Any:
        """The first value of a script that is true."""
        deadline = time.monotonic() + timeout_s
        while not (value := await self.value(script)):
            assert time.monotonic() < deadline, f"never true: {script}; errors: {self.errors}"
            await asyncio.sleep(0.1)
        return value

    async def upload(self, selector: str, path: Path) -> None:
        """Choose a file in an input."""
        root = (await self.call("DOM.getDocument"))["root"]["nodeId"]
        node = (await self.call("DOM.querySelector", nodeId=root, selector=selector))["nodeId"]
        await self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    async def screenshot(self, path: Path) -> None:
        """What is seen, as PNG."""
        path.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot", format="png"))["data"]))


@asynccontextmanager
async def opened(url: str, *, width: int = 800, height: int = 900) -> AsyncIterator[Page]:
    """A browser of its own with `url` open."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            *(str(BINARY), "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"),
            *(f"--user-data-dir={profile}", "--no-first-run", "--disable-dev-shm-usage", "about:blank"),
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port_file, deadline = Path(profile) / "DevToolsActivePort", time.monotonic() + 60
            while not port_file.is_file() or "\n" not in port_file.read_text():
                assert process.poll() is None, "Chromium ended"
                assert time.monotonic() < deadline, "Chromium does not come up"
                await asyncio.sleep(0.1)
            port = port_file.read_text().splitlines()[0]
            async with aiohttp.ClientSession() as session:
                targets = await (await session.get(f"http://127.0.0.1:{port}/json")).json()
                address = next(target for target in targets if target["type"] == "page")["webSocketDebuggerUrl"]
                async with session.ws_connect(address, max_msg_size=2**26) as socket:
                    page = Page(socket)
                    for domain in ("Page", "Runtime", "Log"):
                        await page.call(f"{domain}.enable")
                    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
                    await page.call("Emulation.setDeviceMetricsOverride", **size)
                    await page.call("Page.navigate", url=url)
                    await page.until("location.protocol !== 'about:' && document.readyState === 'complete'")
                    yield page
        finally:
            process.kill()
            process.wait()
