"""A page in a real, headless Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import connect
from websockets.sync.connection import Connection

from tests.needs import program
from tests.processes.fakes import LOOPBACK
from tests.processes.helpers import Process, wait_until

START_S = 60.0
ANSWER_S = 20.0
# Root has no sandbox; a container's /dev/shm is small.
OPTIONS = (
    "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run", "--no-proxy-server",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip


class Tab:
    """One tab. What the page asks for and what it complains of is kept."""

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._numbers = itertools.count(1)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: object) -> dict[str, Any]:
        """The result of one command of the protocol."""
        number = next(self._numbers)
        self._link.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self._link.recv(ANSWER_S))
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])
            self._note(message)

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event["method"] == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event["method"] == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif event["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")

    def open(self, url: str) -> None:
        """Goes there; what it left in the tab before is forgotten."""
        self.requests.clear()
        self.complaints.clear()
        self.call("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression comes to in the page; a promise is waited for."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def text(self, selector: str = "body") -> str:
        """What a person reads there; empty where nothing matches."""
        return str(self.value(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def wait_text(self, words: str, selector: str = "body") -> None:
        """Returns once these words are to be read there."""
        wait_until(lambda: words in self.text(selector), ANSWER_S, f"{words!r} in {selector}")

    def type(self, selector: str, text: str) -> None:
        """Types into a field and presses Enter."""
        self.value(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key="Enter", windowsVirtualKeyCode=13, text="\r")

    def resize(self, width: int, height: int, *, is_dark: bool = False) -> None:
        """The size of a phone or a desktop, in CSS pixels, and the colours that its user prefers."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browsing(folder: Path) -> Iterator[Tab]:
    """A tab of a Chromium that keeps everything in this folder and ends with the block."""
    port_file = folder / "profile" / "DevToolsActivePort"
    options = (*OPTIONS, "--remote-debugging-port=0", f"--user-data-dir={port_file.parent}", "about:blank")
    words: list[str | Path] = [program("chromium", "google-chrome"), *options]
    with Process(words, folder / "chromium.log", environment={"HOME": str(folder)}) as chromium:
        wait_until(lambda: _has_lines(port_file), START_S, f"Chromium listens: {chromium.log}")
        port = port_file.read_text().split()[0]
        tabs = httpx.get(f"http://{LOOPBACK}:{port}/json/list", trust_env=False, timeout=ANSWER_S).json()
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        with connect(address, max_size=None, proxy=None, ping_interval=None) as link:
            yield Tab(link)


def _has_lines(path: Path) -> bool:
    return path.exists() and path.read_text().count("\n") > 0
