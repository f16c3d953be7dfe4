"""Real processes for tests: a free port, a process that never outlives its test, and waiting until it answers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

REPOSITORY = Path(__file__).resolve().parents[2]
POLL_S = 0.02
STOP_S = 5.0


def free_port() -> int:
    """A TCP port of the loopback address that nothing listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def serving_http(handler: type[BaseHTTPRequestHandler], port: int = 0, address: str = "127.0.0.1") -> Iterator[int]:
    """The port of an address (a free one for 0) where this answers, in a thread, until the block ends."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = type("Server", (ThreadingHTTPServer,), {"address_family": family})
    with kind((address, port), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": POLL_S})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


class Process:
    """A program in a process group of its own, started by `with` and gone with all its children after it.

    Its output goes to the file `log`. `environment` adds to this process's own; a value of None takes a variable away.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        log: Path,
        *,
        environment: Mapping[str, str | None] | None = None,
        folder: Path = REPOSITORY,
    ) -> None:
        self.command = [str(word) for word in command]
        self.log = log
        self.folder = folder
        merged = {**os.environ, **(environment or {})}
        self.environment = {name: value for name, value in merged.items() if value is not None}

    def __enter__(self) -> Self:
        with self.log.open("wb") as output:
            self.popen = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._signal_group(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(STOP_S)
        self._signal_group(signal.SIGKILL)
        self.popen.wait(STOP_S)

    @property
    def pid(self) -> int:
        """Of the program, and of its process group."""
        return self.popen.pid

    @property
    def output(self) -> str:
        """All it has printed until now, on both streams."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        return self.popen.poll()

    def wait(self, deadline_s: float) -> int:
        """Its exit code; TimeoutError when it is still running after the deadline."""
        try:
            return self.popen.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.command[0]} still runs after {deadline_s} s:\n{self.output[-2000:]}") from None

    def _signal_group(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)


def wait_until(is_true: Callable[[], bool], deadline_s: float, what: str) -> None:
    """Return once the condition holds; TimeoutError naming `what` when it does not within the deadline.

    Waits as long as a look took before the next one, so that looking takes at most half of a processor.
    """
    began = time.monotonic()
    end = began + deadline_s
    while not is_true():
        now = time.monotonic()
        if now > end:
            raise TimeoutError(f"not within {deadline_s} s: {what}")
        time.sleep(max(POLL_S, now - began))
        began = time.monotonic()


def wait_http(
    url: str, deadline_s: float = 30.0, *, process: Process | None = None, headers: Mapping[str, str] | None = None
) -> httpx.Response:
    """The first answer with a 2xx status.

    TimeoutError with the last answer after the deadline; ChildProcessError with its output as soon as `process` ends.
    """
    end = time.monotonic() + deadline_s
    with httpx.Client(trust_env=False, timeout=deadline_s) as client:
        while True:
            try:
                response = client.get(url, headers=dict(headers or {}))
            except httpx.TransportError as error:
                last = repr(error)
            else:
                if response.is_success:
                    return response
                last = f"{response.status_code} {response.text[:200]}"
            if process is not None and process.exit_code() is not None:
                raise ChildProcessError(
                    f"{process.command[0]} ended with {process.exit_code()}:\n{process.output[-2000:]}"
                )
            if time.monotonic() > end:
                raise TimeoutError(f"{url} does not answer after {deadline_s} s, but: {last}")
            time.sleep(POLL_S)
