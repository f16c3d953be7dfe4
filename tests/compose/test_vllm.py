"""vLLM in a real engine that hands out cards: a stand-in under upstream's name, behind the real HAProxy and LiteLLM.

The stand-in speaks vLLM's protocol, and computes nothing. What it is told on its command line, vLLM's own parser was
asked about (tests/consumers/test_vllm.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.compose.engines import Engine
from tests.compose.images.build import ensure_images
from tests.compose.project import PREFIX, Project, docker_logs, make_models, render_site
from tests.trees import inventory_of

pytestmark = pytest.mark.needs("docker-engine", "mmdebstrap", "network-namespaces", "prisma-engine")

SERVERS = ("chat-1", "calm-3")
ASK = """\
import json, sys, urllib.error, urllib.request
url, key, body = sys.argv[1:]
headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
request = urllib.request.Request(url, body.encode() or None, headers)
try:
    with urllib.request.urlopen(request, timeout=60) as answer:
        print(json.dumps([answer.status, answer.read().decode()]))
except urllib.error.HTTPError as error:
    print(json.dumps([error.code, error.read().decode()]))
"""


@pytest.fixture(scope="module")
def box(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """Two vLLM servers and the gateway, in an engine of their own that knows the driver "nvidia"."""
    tree = tmp_path_factory.mktemp("vllm")
    plan = render_site(inventory_of("vllm"), tree)
    make_models(plan, "box", tree / "box" / "models")
    ensure_images([plan])
    wanted = [item for item in plan.services_of("box") if item.name in (*SERVERS, "haproxy", "litellm")]
    images = sorted({service.image for service in wanted})
    own = Engine("vllm", "192.0.2.77/24", tmp_path_factory.mktemp("engine") / "vllm", images)
    with own, Project(plan, "box", tree, f"{PREFIX}vllm", own.words) as project:
        project.up(*(service.name for service in wanted))
        yield project


def ask(
    box: Project, url: str, key: str, body: dict[str, Any] | None = None, *, of: str = "litellm"
) -> tuple[int, str]:
    """Status and text of a request from inside the farm: from the gateway, or from the server itself."""
    text = json.dumps(body) if body else ""
    said = box.docker("exec", f"box-{of}", "python3", "-c", ASK, url, key, text)
    status, answer = json.loads(said)
    return int(status), str(answer)


def chat(box: Project, model: str, **fields: Any) -> tuple[int, str]:
    body = {"model": model, "messages": [{"role": "user", "content": "hello"}], **fields}
    return ask(box, "http://haproxy:4000/v1/chat/completions", box.secrets["LITELLM_MASTER_KEY"], body)


def heard(answer: tuple[int, str]) -> dict[str, Any]:
    """What the stand-in says that it was asked for."""
    status, text = answer
    assert status == 200, text
    found: dict[str, Any] = json.loads(json.loads(text)["choices"][0]["message"]["content"])
    return found


def test_every_server_is_well_and_has_the_cards_of_its_placement(box: Project) -> None:
    assert {box.states()[f"box-{name}"] for name in SERVERS} == {"healthy"}
    requests = {name: box.inspect(f"box-{name}")["HostConfig"]["DeviceRequests"][0] for name in SERVERS}
    assert {name: (item["Driver"], item["DeviceIDs"]) for name, item in requests.items()} == {
        "chat-1": ("nvidia", ["0", "1"]),
        "calm-3": ("nvidia", ["2"]),
    }


def test_an_adapter_is_asked_for_by_its_own_name(box: Project) -> None:
    """001-11: LoRA for each request; the pool's keys, slots and queue hold for it."""
    assert heard(chat(box, "chat"))["model"] == "chat"
    assert heard(chat(box, "chat:sql"))["model"] == "chat:sql"
    assert heard(chat(box, "chat:law"))["model"] == "chat:law"
    assert chat(box, "chat:none")[0] == 404


def test_a_streamed_answer_arrives(box: Project) -> None:
    status, text = chat(box, "chat:sql", stream=True)
    parts = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: {")]
    said = "".join(part["choices"][0]["delta"].get("content") or "" for part in parts if part["choices"])
    assert status == 200
    assert json.loads(said)["model"] == "chat:sql"


def test_thinking_is_turned_off_where_the_pool_says_so(box: Project) -> None:
    assert heard(chat(box, "calm"))["template"] == {"enable_thinking": False}
    assert heard(chat(box, "chat"))["template"] is None


def test_the_servers_refuse_strangers_and_show_figures(box: Project) -> None:
    models = "http://chat-1:8101/v1/models"
    assert ask(box, models, "wrong", of="chat-1")[0] == 401
    found = json.loads(ask(box, models, box.secrets["VLLM_API_KEY"], of="chat-1")[1])
    names = [item["id"] for item in found["data"]]
    assert names == ["chat", "chat:sql", "chat:law"]
    assert "vllm:num_requests_running" in ask(box, "http://chat-1:8101/metrics", "", of="chat-1")[1]


def test_the_key_is_in_no_declared_environment_and_in_no_command_line(box: Project) -> None:
    told = json.dumps(box.inspect("box-chat-1")["Config"])
    assert box.secrets["VLLM_API_KEY"] not in told
    assert box.secrets["VLLM_API_KEY"] not in docker_logs(box, "box-chat-1")
