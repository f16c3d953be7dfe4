"""Servers that the kit does not start: one machine with many models, and speech."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from corral.build import Plan, build_plan
from corral.checks.policy import check_tree
from corral.config.load import validate
from corral.config.source import parse
from corral.declarations import ASSETS
from corral.errors import SiteError
from corral.render.tree import render

BOX = {"url": "http://192.0.2.21:11434", "engine": "ollama", "slots": 2}
BOTH = {"models": ["qwen3:8b", "gemma3:12b"]}
QWEN, GEMMA = ({"on": {"node": "box", "model": name}} for name in BOTH["models"])


def plan_of(nodes: dict[str, Any], pools: dict[str, Any], **more: Any) -> Plan:
    """The plan of a site with these nodes and pools."""
    site = {
        "schema_version": 1,
        "name": "site",
        "hosts": {"rig": {"address": "192.0.2.10"}},
        "nodes": nodes,
        "pools": pools,
        "gateway": {"host": "rig"},
    } | more
    return build_plan(validate(parse(yaml.safe_dump(site), "inventory.yaml")))


def words_of(nodes: dict[str, Any], pools: dict[str, Any]) -> str:
    """What is said of a site that is refused."""
    with pytest.raises(SiteError) as refused:
        plan_of(nodes, pools)
    return str(refused.value)


def file_of(plan: Plan, path: str) -> str:
    """A rendered file."""
    return render(plan)[path].decode()


# --- row 46; 002-03, 002-04: one Ollama with several models, one card behind them ------------------------------------


LAB = {"url": "http://192.0.2.22:8000", "engine": "vllm", "model": "qwen3"}


def balancer_of(plan: Plan) -> dict[str, list[str]]:
    """HAProxy's servers of every backend that is a pool's or a node's, as they are rendered."""
    found: dict[str, list[str]] = {}
    for part in file_of(plan, "rig/haproxy/haproxy.cfg").split("# pool ")[1:]:
        name = part.split("backend ")[1].split()[0]
        found[name] = [line.strip() for line in part.splitlines() if line.startswith("    server ")]
    return found


def deployments_of(plan: Plan) -> dict[str, tuple[str, str]]:
    """Name of the pool and address of every deployment in LiteLLM's list, by its id."""
    models = yaml.safe_load(file_of(plan, "rig/litellm/config.yaml"))["model_list"]
    assert len({item["model_info"]["id"] for item in models}) == len(models)
    return {
        item["model_info"]["id"]: (item["model_name"], item["litellm_params"].get("api_base", "")) for item in models
    }


def test_one_server_is_one_backend_whatever_pools_point_to_it() -> None:
    plan = plan_of({"box": BOX | BOTH | {"api_key": "BOX_KEY"}}, {"qwen": QWEN, "gemma": GEMMA})

    assert balancer_of(plan) == {
        "node.box": ["server box 192.0.2.21:11434 id 1 maxconn 2 weight 2 inter 5s downinter 4s"]
    }
    address = "http://haproxy:8081/node.box/any"
    assert deployments_of(plan) == {"qwen": ("qwen", address), "gemma": ("gemma", address)}
    facts = [fact for fact in plan.contributions.facts if fact.name == "inventory:replica_slots"]
    assert [(fact.value, fact.labels["pool"]) for fact in facts] == [(2, "node.box")]


def test_a_pool_may_have_a_replica_elsewhere() -> None:
    places = [QWEN["on"], {"node": "lab"}]
    plan = plan_of({"box": BOX | BOTH, "lab": LAB}, {"qwen": {"on": places}, "gemma": GEMMA})

    assert list(balancer_of(plan)) == ["node.box", "qwen.lab", "Leases.qwen"]
    assert list(deployments_of(plan)) == ["gemma", "qwen.box", "qwen.lab"]


@pytest.mark.parametrize("balancing", ["least-busy", "direct"])
def test_deployments_have_names_of_their_own(balancing: str) -> None:
    plan = plan_of({"box": BOX | BOTH}, {"qwen": QWEN, "gemma": GEMMA}, gateway={"host": "rig", "balancing": balancing})
    assert list(deployments_of(plan)) == ["gemma.box", "qwen.box"]


def test_models_may_differ_in_kind() -> None:
    models = {"qwen3:8b": {"thinking": "shown"}, "bge-m3": {"kind": "embedding"}}
    plan = plan_of(
        {"box": BOX | {"models": models}}, {"qwen": QWEN, "embed": {"on": {"node": "box", "model": "bge-m3"}}}
    )
    found = yaml.safe_load(file_of(plan, "rig/litellm/config.yaml"))["model_list"]
    assert [(item["litellm_params"]["model"], item["model_info"]["mode"]) for item in found] == [
        ("ollama/bge-m3", "embedding"), ("ollama_chat/qwen3:8b", "chat"),
    ]  # fmt: skip
    assert "thinking" not in found[1]["model_info"]


def test_one_model_in_two_pools_is_told_the_way_out() -> None:
    words = words_of(
        {"box": BOX | {"model": "qwen3:8b"}}, {"qwen": {"on": {"node": "box"}}, "gemma": {"on": {"node": "box"}}}
    )
    assert "write models: [NAME, …]" in words


def test_two_nodes_with_one_address_are_one_machine() -> None:
    nodes = {name: {"url": "http://192.0.2.21:11434", "engine": "ollama", "model": name, "slots": 2} for name in "ab"}
    plan = plan_of(nodes, {name: {"on": {"node": name}} for name in "ab"})
    assert "a and b are one server, and each counts its own slots there" in [item.message for item in plan.warnings]


# --- row 45; 002-06, 002-25: a Whisper server and a voice that are there already --------------------------------------


def test_speech_is_a_pool_like_all_others() -> None:
    nodes = {
        "ear": {"url": "http://192.0.2.20:8000/v1", "model": "whisper-large-v3", "kind": "transcription", "slots": 2},
        "voice": {"url": "http://192.0.2.20:8880/v1", "model": "kokoro", "kind": "speech"},
    }
    plan = plan_of(
        nodes, {"dictation": {"on": {"node": "ear"}, "editor_names": True}, "tts-1": {"on": {"node": "voice"}}}
    )

    models = yaml.safe_load(file_of(plan, "rig/litellm/config.yaml"))
    assert {item["model_name"]: item["model_info"]["mode"] for item in models["model_list"]} == {
        "dictation": "audio_transcription", "tts-1": "audio_speech",
    }  # fmt: skip
    assert models["router_settings"]["model_group_alias"]["whisper-1"] == "dictation"
    haproxy = file_of(plan, "rig/haproxy/haproxy.cfg")
    assert "/v1/audio/speech /v1/audio/transcriptions " in haproxy
    assert "server ear 192.0.2.20:8000 id 1 maxconn 2" in haproxy


REVISION = "c0ffee1234" * 4
SPEECH: dict[str, Any] = {
    "models": {
        "whisper": {"source": "hf:Systran/faster-whisper-large-v3", "revision": REVISION, "kind": "transcription"},
        "kokoro": {"source": "hf:speaches-ai/Kokoro-82M-v1.0-ONNX", "revision": REVISION, "kind": "speech"},
    },
    "pools": {
        "ear": {"model": "whisper", "on": {"host": "rig", "gpus": 1}, "engine": {"slots": 2}},
        "mouth": {"model": "kokoro", "on": {"host": "rig"}},
    },
    "hosts": {"rig": {"address": "192.0.2.10", "gpus": {"card": "rtx-3060", "count": 1}}},
}


def test_the_kit_starts_servers_for_speech() -> None:
    plan = plan_of({}, **SPEECH)
    services = {service.name: service for service in plan.contributions.services if service.component == "speaches"}
    assert [services[name].image.rpartition("-")[2] for name in ("ear-1", "mouth-cpu-1")] == ["cuda", "cpu"]
    models = yaml.safe_load(file_of(plan, "rig/litellm/config.yaml"))["model_list"]
    assert {item["model_name"]: item["litellm_params"]["model"] for item in models} == {
        "ear": "openai/Systran/faster-whisper-large-v3", "mouth": "openai/speaches-ai/Kokoro-82M-v1.0-ONNX",
    }  # fmt: skip
    assert check_tree(plan, render(plan)) == {"rig": []}


READ_CACHE = """
import huggingface_hub, pathlib
print(pathlib.Path(huggingface_hub.snapshot_download("speaches-ai/Kokoro-82M-v1.0-ONNX")).name)
[found] = huggingface_hub.scan_cache_dir().repos
[revision] = found.revisions
print(found.repo_id, sorted(file.file_name for file in revision.files))
"""


def test_the_hub_finds_the_pulled_folder_without_a_network(tmp_path: Path) -> None:
    """By the Hub's own client, as speaches does; twice, as after a restart of the container."""
    plan = plan_of({}, **SPEECH)
    [service] = [service for service in plan.contributions.services if service.name == "mouth-cpu-1"]
    folder = tmp_path / Path(service.environment["CORRAL_WEIGHTS"]).name
    (tmp_path / "key").write_text("k3y")
    (tmp_path / "uvicorn").write_text('#!/bin/sh\necho "$API_KEY $*"\n')
    (tmp_path / "uvicorn").chmod(0o755)
    own = {
        "CORRAL_WEIGHTS": str(folder),
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "CORRAL_API_KEY_FILE": f"{tmp_path}/key",
    }
    environment = {**os.environ, **service.environment, **own, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def start() -> tuple[int, str]:
        script = "gpu-server/speaches/start.sh"
        done = subprocess.run(["sh", ASSETS / script], env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    assert start() == (78, "")
    (folder / "voices").mkdir(parents=True)
    for name in ("README.md", "model.onnx", "voices/all.bin"):
        (folder / name).write_text("x")
    assert start() == start() == (0, "k3y --factory speaches.main:create_app\n")
    done = subprocess.run(
        [sys.executable, "-c", READ_CACHE], env=environment, capture_output=True, text=True, check=True
    )
    name, listed = done.stdout.splitlines()
    assert name == folder.name
    assert listed == "speaches-ai/Kokoro-82M-v1.0-ONNX ['README.md', 'all.bin', 'model.onnx']"


@pytest.mark.parametrize("engine", ["ollama", "inferrlm"])
def test_servers_without_speech_are_refused(engine: str) -> None:
    node = {"url": "http://192.0.2.20:8000", "engine": engine, "model": "a", "kind": "speech"}
    assert f"{engine} has no speech requests" in words_of({"a": node}, {"a": {"on": {"node": "a"}}})
