"""Real clients against a rendered farm: installs them, runs the checks of try_clients.yaml, prints a table of results.

The farm runs on this machine, with LiteLLM, HAProxy and a fake server that gives the same answer to everything. The
clients come from PyPI and npm, each into a folder of its own; with `--folder` these stay for the next run.

    make clients ARGS="openai LangChain"
"""

from __future__ import annotations

import argparse
import os
import shutil
import string
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from tests.processes.farm import (  # noqa: E402 - the checkout is not installed
    Extras,
    Farm,
    Mode,
    inventory_of,
    keep_only,
    running,
)
from tools.make_env import Pip, settings_of_pip  # noqa: E402

CLIENTS = Path(__file__).with_suffix(".yaml")
# The fake server's answers: whole and streamed.
EXPECTED = ("answer of ", "piece0 piece1 ")
UV = Path(sys.executable).with_name("uv")
CHECK_S = 180
INSTALL_S = 1200
SUFFIXES = {"python": "py", "node": "mjs"}


@dataclass(frozen=True)
class Client:
    """A client's entry in try_clients.yaml."""

    client: str
    checks: Mapping[str, Any]
    python: tuple[str, ...] = ()
    node: tuple[str, ...] = ()
    setup: str = ""
    files: Mapping[str, str] | None = None

    @property
    def language(self) -> str:
        """Where its packages come from, and what its code is written in."""
        return "python" if self.python else "node"

    def bin(self, folder: Path) -> Path:
        """Where its programs are."""
        return folder / ("bin" if self.python else "node_modules/.bin")

    def install(self, folder: Path) -> str:
        """Installs its packages, and returns the version of the first one."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.python:
            _run([UV, "--no-config", "venv", "--quiet", "--allow-existing", "--python", sys.executable, folder])
            _run([UV, "--no-config", "pip", "install", "--quiet", "--python", folder, *self.python])
            name = self.python[0].partition("[")[0]
            asked = f"import importlib.metadata as m; print(m.version({name!r}))"
            return _run([folder / "bin/python", "-c", asked]).strip()
        _run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", folder, *self.node])
        package = folder / "node_modules" / self.node[0] / "package.json"
        return str(yaml.safe_load(package.read_text(encoding="utf-8"))["version"])

    def command(self, check: Any, folder: Path, names: Mapping[str, str]) -> list[str]:
        """The command line of a check."""
        if isinstance(check, list):
            return [string.Template(word).safe_substitute(names) for word in check]
        file = folder / f"check.{SUFFIXES[self.language]}"
        file.write_text(f"{self.setup.rstrip()}\n{check}\n", encoding="utf-8")
        return [str(folder / "bin/python") if self.python else "node", str(file)]


def _run(command: list[Any]) -> str:
    """What an installing command prints; uv uses the package index that pip is set up for."""
    known = {**os.environ, **settings_of_pip(Pip([sys.executable, "-m", "pip"], {}))}
    done = subprocess.run(
        list(map(str, command)), text=True, capture_output=True, timeout=INSTALL_S, check=False, env=known
    )
    if done.returncode:
        raise SystemExit(f"corral: {' '.join(map(str, command))}:\n{done.stderr[-2000:]}")
    return done.stdout


def site(mode: Mode, ports: dict[str, int], extras: Extras) -> dict[str, Any]:
    """A farm of two pools, under every name that clients have built in."""
    made = inventory_of(mode, ports, extras)
    keep_only(made, "even", "vectors")
    chat, embed = made["pools"].pop("even"), made["pools"].pop("vectors")
    chat.pop("aliases", None)
    made["pools"] = {"chat": chat | {"editor_names": True}, "embed": embed | {"editor_names": True}}
    made.pop("jobs", None)
    made["gateway"].pop("extra", None)
    made.pop("consumers", None)
    return made


def results(client: Client, farm: Farm, folder: Path) -> Iterator[tuple[str, str]]:
    """Every check and what came of it: `ok`, or the last words of what it printed."""
    url = f"http://127.0.0.1:{farm.ports['gateway']}"
    with tempfile.TemporaryDirectory() as home:
        names = {"bin": str(client.bin(folder)), "home": home, "url": url}
        for path, text in (client.files or {}).items():
            file = Path(home, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(string.Template(text).safe_substitute(names), encoding="utf-8")
        own = {
            "HOME": home, "LLM_USER_PATH": f"{home}/io.datasette.llm", "PATH": os.environ["PATH"], "NO_COLOR": "1",
            "OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_BASE": f"{url}/v1", "OPENAI_API_KEY": farm.key,
            "ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": farm.key,
        }  # fmt: skip
        for name, check in client.checks.items():
            expect, code = (check["expect"], check["code"]) if isinstance(check, Mapping) else (None, check)
            yield name, _result(client.command(code, folder, names), own, home, expect)


def _result(command: list[str], environment: Mapping[str, str], folder: str, expect: str | None) -> str:
    try:
        done = subprocess.run(
            command, env=dict(environment), cwd=folder, text=True, timeout=CHECK_S, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no end after {CHECK_S} s"
    told = any(text in done.stdout for text in ([expect] if expect else EXPECTED))
    return "ok" if told and not done.returncode else " ".join(done.stdout.split())[-300:] or f"exit {done.returncode}"


def main() -> None:
    """Prints a table in Markdown; exits with 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of clients' names; all if there is none")
    parser.add_argument("--folder", type=Path, help="where the clients are installed (a temporary folder)")
    options = parser.parse_args()
    known = [Client(**item) for item in yaml.safe_load(CLIENTS.read_text(encoding="utf-8"))]
    chosen = [item for item in known if not options.names or item.client.startswith(tuple(options.names))]
    folder = options.folder or Path(tempfile.mkdtemp(prefix="corral-clients-"))
    has_failed = False
    print("| client | version | works | fails |\n|---|---|---|---|", flush=True)
    try:
        with running("slots", site) as farm:
            for client in chosen:
                own = folder.resolve() / "".join(filter(str.isalnum, client.client))
                version = client.install(own)
                found = dict(results(client, farm, own))
                failed = {name: word for name, word in found.items() if word != "ok"}
                works = "; ".join(name for name in found if name not in failed)
                fails = "; ".join(f"{name}: {word}" for name, word in failed.items())
                print(f"| {client.client} | {version} | {works} | {fails} |", flush=True)
                has_failed = has_failed or bool(failed)
    finally:
        if not options.folder:
            shutil.rmtree(folder)
    sys.exit(has_failed)


if __name__ == "__main__":
    main()
