"""Inference servers that run already, by what their APIs say on loopback."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from corral.units import grouped
from corral.verbs.init.said import items, mapping

EMBEDS = re.compile(r"(?i)embed|\bbge-m|nomic-|minilm|\bbert")


@dataclass(frozen=True, slots=True)
class FoundServer:
    """A server: what it is, where it listens, its models and their kinds, and its requests at the same time."""

    engine: str
    port: int
    models: Mapping[str, str]
    slots: int = 1
    # Whether it listens on the machine's network address, too.
    is_open: bool = False


def servers_in(text: str) -> tuple[FoundServer, ...]:
    """The servers of a machine, from lines `PORT PATH ANSWER`."""
    rows = [line.split(" ", 2) for line in text.splitlines() if re.match(r"\d+ ", line)]
    return tuple(_server(port, answers) for port, answers in grouped((int(row[0]), row[1:]) for row in rows).items())


def _server(port: int, rows: list[list[str]]) -> FoundServer:
    said = {path: _data(rest[0] if rest else "") for path, *rest in rows}
    listed = [item for item in items(mapping(said.get("/v1/models")).get("data")) if item.get("id")]
    owner = str(listed[0].get("owned_by", "")) if listed else ""
    studio, props = items(mapping(said.get("/api/v0/models")).get("data")), said.get("/props")
    slots, models = 1, {str(item["id"]): _kind(str(item["id"])) for item in listed}
    if "version" in mapping(said.get("/api/version")) and "models" in mapping(said.get("/api/tags")):
        engine, models = "ollama", dict(_of_ollama(said["/api/tags"]))
    elif studio:
        engine = "lmstudio"
        kinds = {"embeddings": "embedding"}
        models = {str(item["id"]): kinds.get(str(item.get("type")), "chat") for item in studio if item.get("id")}
    elif owner == "vllm":
        engine, slots = "vllm", 16
    elif owner == "llamacpp" or "total_slots" in mapping(props):
        engine, slots = "llama.cpp", int(mapping(props).get("total_slots") or 1)
    elif "alive" in str(said.get("/health/liveliness")):
        engine, models = "litellm", {}
    elif listed:
        engine = "mlx" if all("/" in name for name in models) and not owner else "openai"
    else:
        engine, models = "", {}
    return FoundServer(engine, port, models, slots, "open" in said)


def _of_ollama(answer: Any) -> Iterator[tuple[str, str]]:
    for item in items(mapping(answer).get("models")):
        family = str(mapping(item.get("details")).get("family", ""))
        if item.get("name") and not item.get("remote_host"):
            name = str(item["name"])
            yield name, "embedding" if "bert" in family else _kind(name)


def _kind(name: str) -> str:
    return "embedding" if EMBEDS.search(name) else "chat"


def _data(text: str) -> Any:
    with suppress(ValueError):
        return json.loads(text)
    return text
