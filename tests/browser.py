"""A real headless Chromium for the tests, spoken to over its debugging protocol."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from websockets.sync.client import connect

from tests.fleet import READY_S, need, wait_for

PHONE = (390, 844)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)


class Browser:
    """One tab of a browser with a profile of its own.

    `errors` are what the page threw, or wrote to the console as an error: a refused script or style is one of them.
    """

    def __init__(self, env: Mapping[str, str], size: tuple[int, int] = (1280, 800), dark: bool = False) -> None:
        need("chromium")
        self.folder = Path(tempfile.mkdtemp(prefix="browser-"))
        self.errors: list[str] = []
        self.traced: list[dict[str, Any]] = []
        self.traced_all = False
        argv = ["chromium", *FLAGS, f"--user-data-dir={self.folder}", "about:blank"]
        with open(self.folder / "log", "wb") as log:
            options: dict[str, Any] = {"env": dict(env), "start_new_session": True}
            self.process = subprocess.Popen(argv, stdout=log, stderr=log, **options)
        try:
            # entered by hand: it lives as long as the browser
            self.socket = connect(self._find_tab(), max_size=None).__enter__()
            self.number = 0
            for domain in ("Page", "Runtime", "Log"):
                self.command(f"{domain}.enable")
            self.look(size, dark=dark)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _find_tab(self) -> str:
        port_file = self.folder / "DevToolsActivePort"

        def address() -> str:
            with suppress(OSError, ValueError, IndexError):
                port = int(port_file.read_text().split()[0])
                tabs = json.load(urlopen(f"http://127.0.0.1:{port}/json", timeout=5))
                return next((str(tab["webSocketDebuggerUrl"]) for tab in tabs if tab["type"] == "page"), "")
            return ""

        return wait_for(address, lambda: f"the browser answers: {(self.folder / 'log').read_text()}")

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if hasattr(self, "socket"):
            self.socket.close_socket()
        shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and its result; what else was told meanwhile is looked at for errors."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=READY_S))
            if message.get("id") == self.number:
                assert "error" not in message, (method, message["error"])
                result: dict[str, Any] = message["result"]
                return result
            self._hear(message)

    def _hear(self, event: dict[str, Any]) -> None:
        told = event.get("params", {})
        match event.get("method"):
            case "Tracing.dataCollected":
                self.traced += told["value"]
            case "Tracing.tracingComplete":
                self.traced_all = True
            case "Runtime.exceptionThrown":
                details = told["exceptionDetails"]
                self.errors.append(str(details.get("exception", {}).get("description") or details["text"]))
            case "Log.entryAdded" if told["entry"]["level"] == "error":
                self.errors.append(told["entry"]["text"])
            case "Runtime.consoleAPICalled" if told["type"] == "error":
                self.errors.append(str([part.get("description") or part.get("value") for part in told["args"]]))

    def trace(self) -> None:
        """Note from now on what each task of the page costs."""
        wanted = {"includedCategories": ["toplevel"], "traceBufferSizeInKb": 200_000}
        self.command("Tracing.start", transferMode="ReportEvents", traceConfig=wanted)

    def longest_task(self) -> tuple[float, float]:
        """Milliseconds of the page's thread that its most expensive task since `trace` took, and those that passed
        in the slowest: on a machine that others use as well the second says more of them than of the page."""
        self.traced, self.traced_all = [], False
        self.command("Tracing.end")

        def ended() -> bool:
            self.js("0")  # what was traced arrives with the answer
            return self.traced_all

        wait_for(ended, "the trace arrives")
        named = [event for event in self.traced if event["name"] == "thread_name"]
        pages = {(event["pid"], event["tid"]) for event in named if event["args"]["name"] == "CrRendererMain"}
        tasks = [event for event in self.traced if (event["pid"], event["tid"]) in pages and "RunTask" in event["name"]]
        assert tasks, "the trace has the page's tasks"
        cpu_us = max(task.get("tdur", 0) for task in tasks)
        return cpu_us / 1000, max(task.get("dur", 0) for task in tasks) / 1000

    def look(self, size: tuple[int, int], dark: bool = False) -> None:
        """How large the window is, and which colours its owner likes."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        still = {"name": "prefers-reduced-motion", "value": "reduce"}
        self.command("Emulation.setEmulatedMedia", features=[scheme, still])
        narrow = size[0] < 600
        self.command(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=narrow
        )

    def open(self, url: str) -> None:
        """Load a page anew, also where only what follows the # differs."""
        self.command("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank'")
        self.command("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def js(self, code: str) -> Any:
        """What an expression is worth in the page; a promise is awaited."""
        options = {"awaitPromise": True, "returnByValue": True, "userGesture": True}
        answer = self.command("Runtime.evaluate", expression=code, **options)
        if details := answer.get("exceptionDetails"):
            raise AssertionError(f"{code}: {details.get('exception', {}).get('description') or details['text']}")
        return answer["result"].get("value")

    def wait(self, condition: str, timeout_s: float = READY_S) -> None:
        """Until an expression is true; what it throws until then, for want of an element, counts as not yet."""
        code = f"(() => {{ try {{ return !!({condition}) }} catch {{ return false }} }})()"
        wait_for(lambda: self.js(code), lambda: f"in the page: {condition}\n{self.text()}", timeout_s)

    def text(self, of: str = "body") -> str:
        """The text that is to be seen."""
        return str(self.js(f"document.querySelector({json.dumps(of)}).innerText"))

    def key(self, *names: str) -> None:
        """Press and release keys one after the other; a name of more than one letter is the key's, else the letter."""
        codes = {"Enter": 13, "Tab": 9, "Escape": 27, "ArrowUp": 38, "ArrowDown": 40, "Home": 36, "End": 35}
        codes |= {"PageUp": 33, "PageDown": 34}
        for name in names:
            text = {"Enter": "\r"}.get(name, name if len(name) == 1 else "")
            pressed = {"key": name, "windowsVirtualKeyCode": codes.get(name, 0), "text": text}
            self.command("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **pressed)
            self.command("Input.dispatchKeyEvent", type="keyUp", **pressed)

    def type(self, text: str) -> None:
        """Type a text into what has the focus."""
        self.key(*text)

    def picture(self, path: Path) -> None:
        """A PNG of what is to be seen."""
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"]))

    def settle(self, seconds: float = 0.3) -> None:
        """Time for a frame or two, before a picture is taken."""
        time.sleep(seconds)
