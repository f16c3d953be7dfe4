"""monitoring/catalogue/*.json: the names and labels of figures that each program really has, read from the program.

    python -m tools.catalogue            # starts the test farm, sends load, reads all targets

What cannot run here (GPU exporters, LocalAI, vLLM) has a file that names the source it was taken from; those stay. So
does `from_source` of a program that runs here: figures that only another machine or a rare event has.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from corral.verbs.status.figures import text as text_of_kit
from tests.figures_example import EXAMPLE
from tests.needs import find_program
from tests.processes.fakes import LOOPBACK
from tests.processes.farm import Farm, running
from tests.processes.helpers import wait_until

FOLDER = Path(__file__).resolve().parents[1] / "monitoring" / "catalogue"
# Job of the farm's Prometheus, or the kit itself: the program, and how it says its version.
PROGRAMS = {
    "llama": ("llama-server of xllamacpp", ()),
    "litellm": ("LiteLLM", ()),
    "haproxy": ("HAProxy", ("haproxy", "-v")),
    "prometheus": ("Prometheus", ("prometheus", "--version")),
    "alertmanager": ("Alertmanager", ("prometheus-alertmanager", "--version")),
    "node": ("node-exporter", ("prometheus-node-exporter", "--version")),
    "corral": ("./generate.py figures", ()),
    "postgres": ("postgres_exporter", ("prometheus-postgres-exporter", "--version")),
    "valkey": ("redis_exporter", ("prometheus-redis-exporter", "--version")),
}
TARGET_LABELS = {"instance", "job", "host", "gpu", "card", "pool", "model", "replica", "role"}
SETTLE_S = 30
LABEL = re.compile(r'([a-zA-Z_]\w*)="(?:[^"\\]|\\.)*"')


def main() -> int:
    """Reads every program of a running farm and writes what it found."""
    write("corral", text_of_kit(EXAMPLE).decode())
    with running("slots") as farm:
        _stir(farm)
        for job, text in _figures(farm):
            if job in PROGRAMS:
                write(job, text)
    return 0


def _stir(farm: Farm) -> None:
    """Work of every kind, because many figures appear with the first event that they count."""
    made = farm.admin.post("/key/generate", json={"key_alias": "catalogue", "rpm_limit": 2, "max_budget": 1.0})
    key = made.raise_for_status().json()["key"]
    for _ in range(4):
        farm.ask("chat", key=key)
        farm.ask_streamed("chat")
        farm.ask("limited")
    farm.ask("no-such-model")
    farm.client.post("/v1/embeddings", json={"model": "embed", "input": "hello"})


def _figures(farm: Farm) -> Iterator[tuple[str, str]]:
    """Job and text of every target of the farm's Prometheus; the first of each job."""
    url = f"http://{LOOPBACK}:{farm.ports['prometheus']}/api/v1/targets"

    def targets() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = httpx.get(url, trust_env=False).json()["data"]["activeTargets"]
        return found

    wait_until(lambda: all(target["health"] == "up" for target in targets()), SETTLE_S, "all targets are up")
    keys = {"litellm": farm.key, "llama": (farm.folder / "secrets" / "LLAMA_API_KEY").read_text()}
    for target in targets():
        job = str(target["labels"]["job"])
        headers = {"Authorization": f"Bearer {keys[job]}"} if job in keys else {}
        yield job, httpx.get(target["scrapeUrl"], headers=headers, trust_env=False, timeout=30).text


def write(job: str, text: str) -> None:
    """Adds what a program's text has to its catalogue: names seen before stay, because some appear with an event."""
    path = FOLDER / f"{job}.json"
    old: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"metrics": {}}
    program, command = PROGRAMS[job]
    found: dict[str, Any] = {
        "program": program,
        "version": _version(command) or old.get("version", ""),
        "how": "read from the running program",
        "metrics": dict(sorted({**old["metrics"], **metrics_in(text)}.items())),
    }
    if "from_source" in old:
        found["from_source"] = old["from_source"]
    path.write_text(one_metric_a_line(found), encoding="utf-8")


def one_metric_a_line(catalogue: dict[str, Any]) -> str:
    """A catalogue with one metric a line."""
    members = (f" {_json(key)}: {_lines(value)}" for key, value in catalogue.items())
    return "{\n" + ",\n".join(members) + "\n}\n"


def _lines(value: object) -> str:
    if not isinstance(value, dict):
        return _json(value)
    return "{\n" + ",\n".join(f"  {_json(name)}: {_json(entry)}" for name, entry in value.items()) + "\n }"


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _version(command: tuple[str, ...]) -> str:
    found = find_program(command[0]) if command else None
    if found is None:
        return ""
    done = subprocess.run([found, *command[1:]], capture_output=True, text=True, check=False)
    version = re.search(r"\d+\.\d+\.\d+", done.stdout + done.stderr)
    return version[0] if version else ""


def metrics_in(text: str) -> dict[str, dict[str, Any]]:
    """Type and labels of every series in a text of figures, by its name letter by letter."""
    types = dict(re.findall(r"^# TYPE (\S+) (\w+)$", text, re.MULTILINE))
    found: dict[str, dict[str, Any]] = {}
    for name, labels in re.findall(r"^([a-zA-Z_:][\w:]*)(\{.*\})? \S+", text, re.MULTILINE):
        family = re.sub(r"_(bucket|count|sum)$", "", name)
        entry = found.setdefault(name, {"type": types.get(name) or types.get(family, "untyped"), "labels": []})
        entry["labels"] = sorted({*entry["labels"], *LABEL.findall(labels)})
    return found


if __name__ == "__main__":
    sys.exit(main())
