"""llama-server's watchdog, gpu-server/llama/start.sh: the real server below it, and others that misbehave.

Time is short here: a look every second, two seconds without progress.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.processes.helpers import REPOSITORY, Process, free_port, wait_http, wait_until
from tests.tiny_models import KNOWN_ANSWER, make_chat_model

SCRIPT = REPOSITORY / "gpu-server" / "llama" / "start.sh"
REAL = REPOSITORY / "gpu-server" / "local"
KEY = "of-the-farm"
# Exit code of the script when the watchdog ended the server.
ENDED = 75
NO_LLAMA_VARIABLES = {name: None for name in os.environ if name.startswith("LLAMA_")}
QUICK = {"CORRAL_WATCH_S": "1", "CORRAL_STALL_S": "2", "CORRAL_LOOP_S": "2", "CORRAL_CARD_EVERY": "1"}

FAKE_SERVER = """
import http.server, sys, time
manner, port = sys.argv[1], int(sys.argv[2])
began = time.monotonic()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        moved = int(10 * (time.monotonic() - began)) if manner == "busy" else 0
        busy = 0 if manner == "idle" else 1
        lines = [f"llamacpp:requests_processing {busy}", "llamacpp:requests_deferred 0",
                 f"llamacpp:n_decode_total {moved}", "llamacpp:tokens_predicted_total 7"]
        self.send_response({"loading": 503, "old": 501}.get(manner, 200))
        self.end_headers()
        self.wfile.write("\\n".join(lines).encode() + b"\\n")
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
import threading
threading.Thread(target=server.serve_forever, daemon=True).start()
while True:
    if manner in ("computing", "loading"):
        end = time.monotonic() + 0.4
        while time.monotonic() < end: pass
    time.sleep(0.1)
"""


class Watched:
    """A server below its watchdog."""

    def __init__(self, process: Process, port: int) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    @property
    def server(self) -> psutil.Process:
        """The server itself."""
        return next(item for item in psutil.Process(self.process.pid).children() if str(self.port) in item.cmdline())

    def ask(self, text: str = "What is the capital of France?", **fields: object) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], **fields}
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=headers, trust_env=False, timeout=300)

    def health(self) -> subprocess.CompletedProcess[str]:
        """What the container's health check says."""
        words = ["sh", str(SCRIPT), "health", str(self.port)]
        environment = self.process.environment
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=10)

    def ended(self, words: str, within_s: float = 15) -> None:
        """The watchdog has ended the server for this reason, and everything is gone."""
        assert self.process.wait(within_s) == ENDED
        assert words in self.process.output
        wait_until(lambda: not _of_group(self.process.pid), 3, "all is gone")


def _of_group(pid: int) -> list[psutil.Process]:
    """What is left of a process group, but for the last sleep of the watchdog."""
    found = []
    for item in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(item.pid) == pid and item.name() != "sleep" and item.status() != psutil.STATUS_ZOMBIE:
                found.append(item)
    return found


@contextmanager
def started(
    folder: Path, *arguments: str | Path, environment: Mapping[str, str] | None = None, programs: Path = REAL
) -> Iterator[Watched]:
    port = free_port()
    (folder / "temp").mkdir(exist_ok=True)
    (folder / "state").mkdir(exist_ok=True)
    (folder / "key").write_text(f"# of the farm\n{KEY}\n")
    settings = {
        **NO_LLAMA_VARIABLES,
        **QUICK,
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CORRAL_NAME": "chat-1",
        "CORRAL_TEMP_DIR": str(folder / "temp"),
        "CORRAL_STATE_DIR": str(folder / "state"),
        **(environment or {}),
    }
    words = ["sh", SCRIPT, *arguments, "--port", str(port), "--api-key-file", folder / "key"]
    with Process(words, folder / "log", environment=settings) as process:
        yield Watched(process, port)


@contextmanager
def serving(folder: Path, model: Path, *more: str, **environment: str) -> Iterator[Watched]:
    """The real server with a real model, ready."""
    arguments = ["--model", str(model), "--threads", "1", "--metrics", "--parallel", "1", "--cache-ram", "0", *more]
    with started(folder, *arguments, environment=environment) as watched:
        wait_http(watched.url + "/health", process=watched.process)
        yield watched


@contextmanager
def pretending(folder: Path, manner: str, said: str = "", **environment: str) -> Iterator[Watched]:
    """A server that behaves in a manner of its own, and says something first."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    (programs / "fake.py").write_text(FAKE_SERVER)
    (programs / "said").write_text(said)
    script = f'#!/bin/sh\ncat {programs}/said >&2\nexec {sys.executable} {programs}/fake.py {manner} "$2"\n'
    if manner == "ends":
        script = f"#!/bin/sh\ncat {programs}/said >&2\nexit 134\n"
    (programs / "llama-server").write_text(script)
    (programs / "llama-server").chmod(0o755)
    with started(folder, environment=environment, programs=programs) as watched:
        yield watched


def fake_driver(folder: Path, words: str) -> None:
    """An nvidia-smi that says this."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    (programs / "words").write_text(words)
    (programs / "nvidia-smi").write_text(f"#!/bin/sh\ncat {programs}/words\n")
    (programs / "nvidia-smi").chmod(0o755)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("model") / "chat.gguf"
    make_chat_model(file, context=131072)
    return file


# --- what it ends


def test_frozen_server_is_ended_and_starts_afresh(tmp_path: Path, model: Path) -> None:
    with serving(tmp_path, model) as watched:
        watched.server.suspend()
        watched.ended("no answer for ", 30)
    with serving(tmp_path, model) as watched:
        assert watched.ask().json()["choices"][0]["message"]["content"] == KNOWN_ANSWER
        assert watched.health().returncode == 0


def test_server_frozen_with_a_request_in_it_is_ended(tmp_path: Path, model: Path) -> None:
    with serving(tmp_path, model) as watched:
        asking = threading.Thread(target=suppressed, args=(watched,))
        asking.start()
        time.sleep(1)
        watched.server.suspend()
        watched.ended("no answer for ", 30)
        asking.join(10)
        assert not asking.is_alive()


def suppressed(watched: Watched) -> None:
    with suppress(httpx.HTTPError):
        watched.ask(max_tokens=100_000, ignore_eos=True)


@pytest.mark.parametrize("manner", ["hung", "computing"])
def test_busy_server_without_progress_is_ended(tmp_path: Path, manner: str) -> None:
    with pretending(tmp_path, manner) as watched:
        watched.ended("busy, but no batch was done for 2 s")


@pytest.mark.parametrize(
    "line",
    [
        "CUDA error: an illegal memory access was encountered",
        "0.42.678.638 E CUDA error: unspecified launch failure",
        "ggml_cuda_init: failed to initialize CUDA: no CUDA-capable device is detected",
        "NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus.",
        "warning: no usable GPU found, --gpu-layers option will be ignored",
    ],
)
def test_card_in_trouble_ends_it(tmp_path: Path, line: str) -> None:
    manner = "ends" if line.startswith("NVRM") else "idle"
    with pretending(tmp_path, manner, f"loading\n{line}\nmore\n", CORRAL_COMPUTES_ON="card") as watched:
        watched.ended(f": {line}\n")


@pytest.mark.parametrize(
    "words",
    [
        "Unable to determine the device handle for GPU0: 0000:01:00.0: Unknown Error",
        "No devices were found",
        "Failed to initialize NVML: Unknown Error",
    ],
)
def test_card_that_the_driver_has_lost_ends_it(tmp_path: Path, words: str) -> None:
    fake_driver(tmp_path, words)
    with pretending(tmp_path, "idle", CORRAL_COMPUTES_ON="card") as watched:
        watched.ended(f"the driver has lost the card: {words}")


# --- what it leaves alone


def test_servers_that_work_are_left_alone(tmp_path: Path) -> None:
    """One beside the other, as on a host: idle, busy, loading, of an older version, computing, and without a card."""
    said = 'a client said: CUDA error: x\nllama: "CUDA error: y"\n'
    card = {"CORRAL_COMPUTES_ON": "card"}
    cases = {name: (name, said, card) for name in ("idle", "busy", "loading", "old")}
    cases["batch"] = ("computing", "", {"CORRAL_LOOP_S": "60"})
    no_card = "warning: no usable GPU found, --gpu-layers option will be ignored\n"
    cases["processor"] = ("idle", no_card, {"CORRAL_COMPUTES_ON": "processor"})
    with ExitStack() as stack:
        running = {}
        for name, (manner, words, environment) in cases.items():
            folder = tmp_path / name
            folder.mkdir()
            if environment is card:
                fake_driver(folder, "0, NVIDIA P104-100")
            running[name] = stack.enter_context(pretending(folder, manner, words, **environment))
        time.sleep(6)
        ended = {
            name: watched.process.output for name, watched in running.items() if watched.process.exit_code() is not None
        }
        assert ended == {}


def test_batch_that_takes_long_is_ended_once_it_does_not_compute(tmp_path: Path) -> None:
    with pretending(tmp_path, "hung", CORRAL_LOOP_S="60") as watched:
        watched.ended("busy, but no batch was done for 2 s")


def test_real_server_at_work_is_left_alone(tmp_path: Path, model: Path) -> None:
    with serving(tmp_path, model) as watched:
        end = time.monotonic() + 8
        while time.monotonic() < end:
            assert watched.ask(max_tokens=3000, ignore_eos=True).status_code == 200
        assert watched.process.exit_code() is None


def test_long_prompt_is_left_alone(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "wide.gguf", width=768, layers=8, context=8192)
    limits = {"CORRAL_STALL_S": "4", "CORRAL_LOOP_S": "4", "CORRAL_FIRST_S": "4"}
    few = ("--batch-size", "64", "--ubatch-size", "64")
    with serving(tmp_path, tmp_path / "wide.gguf", *few, **limits) as watched:
        began = time.monotonic()
        answers = [watched.ask(text="the cat " * 1500, max_tokens=1)]
        while time.monotonic() - began < 8:  # on a fast machine
            answers.append(watched.ask(text=f"{len(answers)} cats " * 1500, max_tokens=1))
        assert {answer.status_code for answer in answers} == {200}
        assert watched.process.exit_code() is None


# --- how it ends otherwise


def test_killed_server_ends_it_with_the_same_code(tmp_path: Path, model: Path) -> None:
    with serving(tmp_path, model) as watched:
        watched.server.kill()
        assert watched.process.wait(10) == 128 + signal.SIGKILL
        assert not list((tmp_path / "state").iterdir())


def test_server_that_cannot_start_ends_it_with_the_same_code(tmp_path: Path) -> None:
    with started(tmp_path, "--model", "nowhere.gguf") as watched:
        assert watched.process.wait(20) == 1
        assert "cannot read --model nowhere.gguf" in watched.process.output


def test_term_ends_both_at_once(tmp_path: Path, model: Path) -> None:
    with serving(tmp_path, model) as watched:
        os.kill(watched.process.pid, signal.SIGTERM)
        assert watched.process.wait(2) == 0
        assert not _of_group(watched.process.pid)


# --- the budget


def test_past_its_budget_it_parks_until_somebody_restarts_it(tmp_path: Path) -> None:
    line = "CUDA error: uncorrectable ECC error encountered"
    for _ in range(3):
        with pretending(tmp_path, "ends", line + "\n", CORRAL_RESTARTS="2") as watched:
            watched.ended(line)
    with pretending(tmp_path, "idle", CORRAL_RESTARTS="2") as watched:
        wait_until(lambda: "corral: parked: " in watched.process.output, 5, "parked")
        said = watched.health()
        assert said.returncode == 1
        assert said.stdout == f"parked: ended 3 times in 60 min, last: {line}\n"
        assert [item.name() for item in psutil.Process(watched.process.pid).children()] == ["sleep"]
        os.kill(watched.process.pid, signal.SIGTERM)
        assert watched.process.wait(2) == 0
    with pretending(tmp_path, "idle", CORRAL_RESTARTS="2") as watched:
        wait_http(watched.url + "/health", 10, process=watched.process)
        assert watched.health().returncode == 0


def test_old_ends_are_forgiven(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    old = int(time.time()) - 4000
    (tmp_path / "state" / "chat-1").write_text(f"{old} frozen\n" * 9)
    with pretending(tmp_path, "idle") as watched:
        wait_http(watched.url + "/health", 10, process=watched.process)
