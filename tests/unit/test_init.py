"""`init` on machines of straw: their tools' real output as commands on PATH, and the inventory that each gets."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from corral.cli import main
from corral.config.model_lock import ModelLock
from corral.config.source import plain_yaml
from corral.verbs.init import look
from corral.verbs.init.cards import FoundCard, cards_in
from corral.verbs.init.init import default_text, proposal_for
from corral.verbs.init.servers import FoundServer, servers_in
from tests.model_headers import write_header
from tests.model_stores import put_in_ollama
from tests.processes.helpers import free_port, serving_http
from tests.trees import ROOT

FOLDER = ROOT / "tests" / "init"
MACHINES: dict[str, dict[str, Any]] = plain_yaml((FOLDER / "machines.yaml").read_bytes())
# What every machine has; everything else is of straw.
REAL = ("sh", "mktemp", "rm", "cat", "find", "sleep", "sed", "tr", "mv", "head", "curl")
DISK = "Filesystem 1024-blocks Used Available Capacity Mounted on\n/dev/nvme0n1p2 976762584 500000000 427819008 54% /"
# What servers answer, by path.
WIRE: dict[str, dict[str, str]] = plain_yaml((FOLDER / "answers.yaml").read_bytes())


def _server(kind: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = WIRE[kind].get(self.path)
            body = known or '{"error": "not found"}'
            self.send_response(200 if known else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _tool(path: Path, said: Any) -> None:
    """A command that prints this: one text, or one by its last argument (`info` and `compose` are Docker's first)."""
    if said == "hangs":
        text = "trap '' TERM\nwhile :; do sleep 0.2; done"
    elif isinstance(said, dict):
        rows = "".join(f"*' {key} '*) cat <<'END'\n{value}\nEND\n;;\n" for key, value in said.items())
        text = f'case " $* " in\n{rows}*) exit 1 ;;\nesac'
    else:
        text = f"cat <<'END'\n{said.rstrip()}\nEND"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def _furnish(machine: dict[str, Any], home: Path, tools: Path, kernel: Path) -> None:
    """Puts a machine's commands, cards and model files there."""
    for tool, said in {"df": DISK, "stat": "", "lscpu": "", **machine["tools"]}.items():
        _tool(tools / tool, said)
    for slot, values in machine["kernel"].items():
        (kernel / slot).mkdir()
        for file, value in values.items():
            (kernel / slot / file).write_text(f"{value}\n")
    for file, header in machine["files"].items():
        path = home / file
        path.parent.mkdir(parents=True, exist_ok=True)
        write_header(path, header) if header else path.write_bytes(b"not a model")
    for model, header in machine.get("ollama", {}).items():
        name, tag = model.split("/")
        put_in_ollama(home / ".ollama" / "models", name, tag, b"GGUF")
        (blob,) = (home / ".ollama" / "models" / "blobs").iterdir()
        write_header(blob, header)  # its content is not what its name says, which `init` does not look at


Run = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `init` on one of the machines: exit code, the inventory, and what was said."""
    home, tools, kernel = tmp_path / "home", tmp_path / "bin", tmp_path / "sys" / "bus" / "pci" / "devices"
    for folder in (home, tools, kernel):
        folder.mkdir(parents=True)
    for name in REAL:
        (tools / name).symlink_to(str(shutil.which(name)))
    for name in ("HF_HOME", "HF_HUB_CACHE", "OLLAMA_MODELS", "LLAMA_CACHE"):
        monkeypatch.delenv(name, raising=False)
    port = free_port()
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(look, "SYSTEM", str(tmp_path / "sys"))
    monkeypatch.setattr(look, "MORE_PATH", "")
    monkeypatch.setattr(look, "PORTS", (port,))

    def call(name: str) -> tuple[int, str, str]:
        machine = MACHINES[name]
        monkeypatch.setattr(look, "LIMIT_S", machine.get("limit_s", look.LIMIT_S))
        _furnish(machine, home, tools, kernel)
        monkeypatch.setenv("PATH", str(tools))
        capsys.readouterr()
        with ExitStack() as stack:
            if kind := machine.get("server"):
                address = "127.0.0.1" if name == "ollama-on-loopback" else "0.0.0.0"  # noqa: S104 - as OLLAMA_HOST=0.0.0.0
                stack.enter_context(serving_http(_server(kind), port, address))
            code = main(["init", *(word for folder in machine.get("folders", []) for word in ("--models", folder))])
        said = capsys.readouterr().err
        text = Path("inventory.yaml").read_text() if Path("inventory.yaml").exists() else ""
        shown = [
            part.replace(str(home), "/home/ann").replace(
                str(port), "1234" if machine.get("server") == "lmstudio" else "11434"
            )
            for part in (text, said)
        ]
        return code, shown[0], shown[1]

    return call


@pytest.mark.parametrize("name", MACHINES)
def test_text_for_a_machine(name: str, run: Run, update_golden: bool) -> None:  # noqa: FBT001
    code, text, said = run(name)
    assert code == 0, said
    for path, found in ((FOLDER / f"{name}.yaml", text), (FOLDER / f"{name}.txt", said)):
        if update_golden:
            path.write_text(found)
        assert found == path.read_text()
    assert main(["check"]) == 0


def test_a_machine_in_short() -> None:
    card, file = FoundCard("nvidia", "NVIDIA GeForce RTX 3090", 24576), look.FoundFile("a.gguf", "", "a.gguf")
    server = FoundServer("ollama", 11434, {"llama3": "chat"})
    rich = look.Machine("box", "", cards=(card, card), files=(file,), servers=(server,))
    assert rich.in_short == "2 cards (rtx-3090), 1 model file, ollama"
    assert look.Machine("box", "").in_short == ""


@pytest.mark.parametrize(
    ("answers", "engine", "models", "slots"),
    [
        (
            """8000 /v1/models {"object":"list","data":[{"id":"Qwen/Qwen3-32B","owned_by":"vllm","root":"x"}]}""",
            "vllm", ["Qwen/Qwen3-32B"], 16,
        ),
        (
            """8080 /v1/models {"models":[{"name":"m.gguf"}],"data":[{"id":"m.gguf","owned_by":"llamacpp"}]}
8080 /api/tags {"models":[{"name":"m.gguf"}]}
8080 /props {"total_slots":4,"model_path":"/srv/m.gguf"}""",
            "llama.cpp", ["m.gguf"], 4,
        ),
        (
            """8080 /v1/models {"data":[{"id":"mlx-community/Qwen3-8B-4bit","object":"model","created":1}]}""",
            "mlx", ["mlx-community/Qwen3-8B-4bit"], 1,
        ),
        (
            """4000 /v1/models {"error":{"message":"Authentication Error","code":"401"}}
4000 /health/liveliness "I'm alive!\"""",
            "litellm", [], 1,
        ),
        ("9000 /v1/models {broken\n9000 /props [1]", "", [], 1),
    ],
)  # fmt: skip
def test_what_answers_on_a_port(answers: str, engine: str, models: list[str], slots: int) -> None:
    (found,) = servers_in(answers)
    assert (found.engine, list(found.models), found.slots, found.is_open) == (engine, models, slots, False)


@pytest.mark.parametrize(
    ("tool", "said", "kind", "device"),
    [
        (
            "xpu-smi",
            """{"device_list":[{"device_id":0,"device_name":"Intel(R) Arc(TM) A770 Graphics","device_type":"GPU",
"pci_bdf_address":"0000:03:00.0","uuid":"00000000-0000-0003-0000-000856a08086"}]}""",
            "arc-a770", "0000:03:00.0",
        ),
        (
            "amd-smi",
            """[{"gpu":0,"asic":{"market_name":"AMD Instinct MI210","asic_serial":"0x5C88007D3A4A1D2E"},"bus":{"bdf":
"0000:43:00.0"},"vram":{"type":"HBM2E","size":{"value":65520,"unit":"MB"}}}]""",
            "mi210", "GPU-5c88007d3a4a1d2e",
        ),
        ("graphics", "0000:43:00.0|0x1002|0x740f|68702699520|0|0||", "amd-740f", "0000:43:00.0"),
    ],
)  # fmt: skip
def test_cards_by_other_tools(tool: str, said: str, kind: str, device: str) -> None:
    ((card,), notes) = cards_in({tool: said})
    assert (card.kind, card.uuid or card.pci, notes) == (kind, device, [])


def test_text_for_several_machines(tmp_path: Path, update_golden: bool) -> None:  # noqa: FBT001
    def machine(number: int, name: str, card: str = "", mib: int = 0, **more: Any) -> look.Machine:
        address, uuid = f"192.0.2.{number}", f"GPU-000000{number}-abcd-0000-0000-000000000000"
        ssh = f"ann@{address}" if number > 1 else ""
        cards = (FoundCard("nvidia", card, mib, 10, uuid),) if card else ()
        return look.Machine(name, ssh, words=name, cores=8, ram_gib=62, address=address, cards=cards, **more)

    def ollama(*models: str) -> tuple[FoundServer, ...]:
        return (FoundServer("ollama", 11434, dict.fromkeys(models, "chat"), is_open=True),)

    machines = [
        machine(1, "laptop"),
        machine(20, "rig", "NVIDIA GeForce RTX 3090", 24576),
        machine(21, "old", "Tesla P40", 23040),
        machine(30, "mac", is_mac=True, servers=ollama("qwen3:8b", "qwen3:8b-q8_0")),
        machine(31, "desk", servers=ollama("qwen3:8b")),
    ]
    found = proposal_for(machines, ModelLock(), [], [])
    if update_golden:
        (FOLDER / "several.yaml").write_text(found.text)
    assert found.text == (FOLDER / "several.yaml").read_text()
    (tmp_path / "inventory.yaml").write_text(found.text)
    assert main(["check", "--inventory", str(tmp_path / "inventory.yaml")]) == 0


def test_an_inventory_of_ones_own_stays(run: Run) -> None:
    Path("inventory.yaml").write_text("mine: true\n")
    code, text, said = run("bare")
    assert (code, text) == (2, "mine: true\n")
    assert "nothing was written: name another file with --output" in said


def test_the_shipped_example_gives_way(run: Run) -> None:
    Path("inventory.yaml").write_text(default_text())
    code, text, said = run("amd")
    assert code == 0
    assert "attic:" in text
    assert "over the example that came with the kit" in said


def test_the_default_is_the_committed_inventory() -> None:
    assert default_text() == (ROOT / "inventory.yaml").read_text()
