"""A headless Chromium, spoken to over its DevTools pipe: no port, no driver, nothing to install beside it."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
]
_DEADLINE_SECONDS = 120.0


def find_chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """What a page became: its document, what it asked the network for, and what it complained about."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        self.requests: list[str] = []
        self.complaints: list[str] = []

    def evaluate(self, expression: str) -> Any:
        found = self._browser.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def screenshot(self, path: Path) -> None:
        found = self._browser.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))


class Browser:
    """One process with one tab. ``close`` ends it."""

    def __init__(self, profile: Path) -> None:
        chromium = find_chromium()
        assert chromium is not None
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()

        def place() -> None:  # The pipe's ends are numbers 3 and 4 by definition; first out of each other's way.
            read, written = os.dup(to_read), os.dup(to_write)
            high_read, high_written = os.dup(read), os.dup(written)
            os.dup2(high_read, 3)
            os.dup2(high_written, 4)

        self._process = subprocess.Popen(
            [chromium, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=place,
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer = b""
        self._events: list[dict[str, Any]] = []
        self._calls = 0
        self._session: str | None = None
        try:
            targets = self.call("Target.getTargets")["targetInfos"]
            target = next(target for target in targets if target["type"] == "page")
            self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
            for domain in ("Page", "Network", "Runtime", "Log"):
                self.call(f"{domain}.enable")
        except BaseException:
            self.close()
            raise

    def open(self, path: Path, width: int, height: int = 900, dark: bool = False) -> Page:
        """Loads a file and waits until it is there."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self._events.clear()
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._receive(deadline)
        page = Page(self)
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        for event in self._events:
            found = event["params"]
            if event["method"] == "Network.requestWillBeSent":
                page.requests.append(found["request"]["url"])
            elif event["method"] == "Log.entryAdded":
                page.complaints.append(found["entry"]["text"])
            elif event["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
                page.complaints.append(json.dumps(found))
        return page

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._calls += 1
        number = self._calls
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + _DEADLINE_SECONDS
        while True:
            found = self._receive(deadline)
            if found.get("id") == number:
                assert "error" not in found, found["error"]
                result: dict[str, Any] = found["result"]
                return result

    def _receive(self, deadline: float) -> dict[str, Any]:
        """The next message; events are kept as well."""
        while b"\0" not in self._buffer:
            answers = select.poll()  # any descriptor, where select takes the first 1024
            answers.register(self._from, select.POLLIN)
            assert answers.poll(1000 * max(0.0, deadline - time.monotonic())), "Chromium does not answer"
            received = os.read(self._from, 1 << 20)
            assert received, "Chromium has ended"
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self._events.append(message)
        return message

    def close(self) -> None:
        os.close(self._to)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._from)
