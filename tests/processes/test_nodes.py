"""Servers that the kit does not start, each in its own wire format, behind real LiteLLM and HAProxy (000-01, 001-13).

The site is inventories/neural-farm.yaml with other addresses, and a few nodes more. The Pixel is a real llama-server.
"""

from __future__ import annotations

import io
import json
import re
import secrets
import shutil
import sys
import tempfile
import wave
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from corral.build import build_plan
from corral.config.load import load_inventory
from corral.config.source import read_source
from corral.render.output import write
from corral.render.secrets import initialise
from corral.render.tree import render
from corral.runtime.haproxy import balancer_of
from tests.model_files import make_rerank_model
from tests.processes import farm as farms
from tests.processes.farm import HOST, Extras, Farm, Streamed
from tests.processes.helpers import REPOSITORY, Process, wait_http, wait_until
from tests.processes.interfaces import INTERFACES, Said, events_of
from tests.processes.wires import orders
from tests.processes.wires.orders import LOOPBACK, order
from tests.processes.wires.rest import SOUND
from tests.tiny_models import CHAT_TEMPLATE, KNOWN_ANSWER, make_chat_model

pytestmark = [pytest.mark.needs("haproxy"), pytest.mark.xdist_group("nodes")]

KEY = "value-of-the-key"
# So soon a dead node is routed around, and a node that is back is used again (000-10).
WITHIN_S = 30.0
PHONES = ("iphone15", "iphone16")
WIRES: dict[str, tuple[str, ...]] = {
    "mac": ("mlx",), "iphone15": ("inferrlm",), "iphone16": ("inferrlm",), "desk": ("ollama",),
    "lab": ("rest", "X-Api-Key"), "studio": ("rest", "Authorization"), "raw": ("rest", "Authorization"),
    "voices": ("rest", "Authorization"), "account": ("anthropic",), "own": ("rest", "Authorization"),
}  # fmt: skip
# As strict as the chat templates of Qwen and Gemma together.
STRICT = (
    "{%- set turns = messages[1:] if messages[0].role == 'system' else messages -%}"
    "{%- for message in messages -%}{%- if message.content is not string -%}"
    "{{ raise_exception('type must be string, but is array') }}{%- endif -%}{%- endfor -%}"
    "{%- for message in turns -%}{%- if message.role == 'system' -%}"
    "{{ raise_exception('System message must be at the beginning.') }}{%- endif -%}"
    "{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate') }}{%- endif -%}{%- endfor -%}"
) + CHAT_TEMPLATE
SERVERS = {"pixel": CHAT_TEMPLATE, "strict": STRICT}
# Pools of one node, each of another wire format.
NODE_OF_POOL = {"smart": "mac", "desk": "desk", "lab": "lab", "studio": "studio"}


class Nodes(Farm):
    """The farm, and what its fakes saw."""

    processes: dict[str, Process]

    def requests_of(self, node: str) -> list[dict[str, Any]]:
        """Requests for inference that reached a node: path, headers and body of each."""
        told: list[dict[str, Any]] = orders.seen_by(self.ports[node])["requests"]
        return told

    def in_flight_at_most(self, node: str) -> int:
        most: int = orders.seen_by(self.ports[node])["most_in_flight"]
        return most

    def phone(self, name: str, content: str, **fields: Any) -> httpx.Response:
        """The answer of one of the phones, which share a pool with the Pixel."""
        for _ in range(12):
            answer = self.ask("primary", content, **fields).raise_for_status()
            if self.replica(answer) == name:
                return answer
        raise AssertionError(f"{name} answered none of twelve requests")

    def phone_streamed(self, name: str, content: str, **fields: object) -> Streamed:
        for _ in range(12):
            answer = self.ask_streamed("primary", content, **fields)
            if self.replica(answer.response) == name:
                return answer
        raise AssertionError(f"{name} answered none of twelve requests")


def inventory_of(ports: dict[str, int]) -> dict[str, Any]:
    site: dict[str, Any] = read_source(REPOSITORY / "inventories" / "neural-farm.yaml").data
    site["hosts"] = {HOST: {"runtime": "local", "address": LOOPBACK}}
    for name, node in site["nodes"].items():
        node["url"] = f"http://{LOOPBACK}:{ports[name]}"
    url = {name: f"http://{LOOPBACK}:{ports[name]}" for name in WIRES}
    rest = {"engine": "openai", "model": "some-model", "api_key": "LAB_KEY"}
    site["nodes"] |= {
        "desk": {
            "url": url["desk"],
            "engine": "ollama",
            "models": ["qwen3:4b", "llama3.2:3b"],
            "slots": 2,
            "thinking": "off",
        },
        "lab": {"url": f"{url['lab']}/v1", **rest, "slots": 4, "key_header": "X-Api-Key"},
        "studio": {"url": url["studio"], **rest, "engine": "lmstudio"},
        "raw": {"url": url["raw"], **rest, "thinking": "shown"},
    }
    site["nodes"]["strict"] = site["nodes"]["pixel"] | {"url": f"http://{LOOPBACK}:{ports['strict']}"}
    site["pools"] |= {name: {"on": {"node": name}} for name in ("lab", "studio", "raw", "strict")}
    for name, model in (("desk", "qwen3:4b"), ("herd", "llama3.2:3b")):
        site["pools"][name] = {"on": {"node": "desk", "model": model}, "queue": {"depth": 2, "timeout_s": 30}}
    # Of inventories/jarvis.yaml, at an address of its own.
    account = read_source(REPOSITORY / "inventories" / "jarvis.yaml").data["nodes"]["anthropic"]
    site["nodes"]["account"] = account | {"url": url["account"], "api_key": "ACCOUNT_KEY"}
    site["nodes"]["own"] = {"url": url["own"], **rest}
    site["pools"]["cloud"] = {"on": {"node": "account"}}
    site["pools"]["house"] = {"on": {"node": "own"}, "fallback": ["cloud"]}
    models = {"whisper-1": {"kind": "transcription"}, "tts-1": {"kind": "speech"}}
    site["nodes"]["voices"] = {"url": f"{url['voices']}/v1", "api_key": "LAB_KEY", "models": models}
    for name, model in (("ear", "whisper-1"), ("mouth", "tts-1")):
        place = {"node": "voices", "model": model}
        site["pools"][name] = {"on": place, "editor_names": True, "queue": {"depth": 1, "timeout_s": 30}}
    site["models"] = {"tiny-rank": {"source": "rank.gguf", "kind": "rerank", "context": 256}}
    site["pools"]["ranks"] = {
        "model": "tiny-rank", "on": {"host": HOST}, "ports": ports["rank"], "engine": {"threads": 1},
    }  # fmt: skip
    site["gateway"] |= {
        "host": HOST, "port": ports["gateway"], "admin_port": ports["admin"], "litellm_port": ports["litellm"],
        "balancer_port": ports["balancer"], "stats_port": ports["stats"],
    }  # fmt: skip
    return site


@contextmanager
def running() -> Iterator[Nodes]:
    wanted = [*WIRES, *SERVERS, "rank", "gateway", "admin", "litellm", "balancer", "stats", "fakes"]
    ports = dict(zip(wanted, _free_ports(), strict=False))
    folder = Path(tempfile.mkdtemp(prefix="corral-nodes-"))
    folder.chmod(0o755)
    try:
        path = folder / "inventory.yaml"
        path.write_text(yaml.safe_dump(inventory_of(ports), sort_keys=False), encoding="utf-8")
        plan = build_plan(load_inventory(path))
        write(render(plan), folder)
        (folder / HOST / ".env").write_text(f"LAB_KEY={KEY}\nACCOUNT_KEY={KEY}\n", encoding="utf-8")
        initialise({HOST: plan.secrets_of(HOST)}, folder)
        (folder / HOST / "models").mkdir()
        make_rerank_model(folder / HOST / "models" / "rank.gguf")
        farm = Nodes("slots", folder, plan, ports, Extras())
        farm.processes = {}
        farm.client.event_hooks = {"request": [_alone]}
        with ExitStack() as stack:
            for name in [*WIRES, *SERVERS]:
                farm.processes[name] = stack.enter_context(_process(farm, name))
            stack.enter_context(farms._started(farm))
            stack.enter_context(farm.client)
            yield farm
    finally:
        shutil.rmtree(folder)


def _alone(request: httpx.Request) -> None:
    """Makes every request a conversation of its own, which returns to no node."""
    request.headers.setdefault("x-litellm-session-id", secrets.token_hex())


def _free_ports() -> list[int]:
    return list(farms.choose_ports().values())


def _process(farm: Nodes, name: str) -> Process:
    """One of the nodes, not started yet."""
    if name in WIRES:
        wire, *further = WIRES[name]
        return Process(orders.command(wire, farm.ports[name], *further), farm.folder / f"{name}.log")
    model = farm.folder / f"{name}.gguf"
    make_chat_model(model, template=SERVERS[name])
    program = REPOSITORY / "gpu-server" / "local" / "llama-server"
    words = f"--model {model} --host {LOOPBACK} --port {farm.ports[name]} --parallel 2 --ctx-size 4096 --threads 1"
    return Process([sys.executable, program, *words.split()], farm.folder / f"{name}.log")


@pytest.fixture(scope="module")
def farm() -> Iterator[Nodes]:
    with running() as nodes:
        yield nodes


def content_of(answer: httpx.Response) -> Any:
    return answer.raise_for_status().json()["choices"][0]["message"]["content"]


# --- every kind of node answers, plain and streamed (000-01, 000-11)

# What a careless filter would damage (000-12): white space at the edges of pieces, things that are almost tags.
TEXT = ["  Grüße, ", "<b>world</b>", " 1 < 2 and\n\n", "```x```", " <thin", " ice> 🦙", " <"]


@pytest.mark.parametrize("pool", NODE_OF_POOL)
def test_answers_arrive_as_they_were_said(farm: Nodes, pool: str) -> None:
    assert content_of(farm.ask(pool, order(TEXT))) == "".join(TEXT)
    streamed = farm.ask_streamed(pool, order(TEXT))
    assert streamed.text == "".join(TEXT)
    assert streamed.finish_reasons == ["stop"]
    assert farm.replica(streamed.response) == NODE_OF_POOL[pool]


@pytest.mark.parametrize("name", PHONES)
def test_a_phone_answers_in_its_own_dialect(farm: Nodes, name: str) -> None:
    assert content_of(farm.phone(name, order(TEXT), max_tokens=77)) == "".join(TEXT)
    request = farm.requests_of(name)[-1]
    assert request["path"] == "/api/chat"
    assert request["body"]["options"] == {"max_tokens": 77}
    assert request["body"]["stream"] is False
    streamed = farm.phone_streamed(name, order(TEXT))
    assert streamed.text == "".join(TEXT)
    assert streamed.finish_reasons == ["stop"]


def test_the_pixel_is_a_llama_server(farm: Nodes) -> None:
    streamed = farm.phone_streamed("pixel", "hello")
    assert streamed.text == KNOWN_ANSWER
    assert content_of(farm.phone("pixel", "hello")) == KNOWN_ANSWER


def test_ollama_gets_its_own_options_and_its_figures_are_used(farm: Nodes) -> None:
    answer = farm.ask("desk", "hello", max_tokens=5, presence_penalty=0.5)
    assert answer.raise_for_status().json()["usage"]["prompt_tokens"] == 7
    assert farm.requests_of("desk")[-1]["body"]["options"] == {"num_predict": 5}
    streamed = farm.ask_streamed("desk", "hello", stream_options={"include_usage": True})
    assert streamed.events[-1]["usage"]["prompt_tokens"] == 7


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
# Nodes that are told not to think.
SILENT = ("smart", "desk")


@pytest.mark.parametrize("is_streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("pool", NODE_OF_POOL)
def test_every_interface_delivers_what_the_server_says(
    farm: Nodes, pool: str, interface: str, *, is_streamed: bool
) -> None:
    """Content, thought, stop reason and usage, in the shape that the interface has by its documentation."""
    client = INTERFACES[interface]
    for finish in ("stop", "length"):
        asked = {"role": "user", "content": order(TEXT, think=["two ", "and two"], finish=finish)}
        said = client.ask(
            farm, {"model": pool, **client.body("be brief", [*TURNS, asked], 77)}, is_streamed=is_streamed
        )
        thought = "" if pool in SILENT or interface == "completions" else "two and two"
        assert said == Said("".join(TEXT), thought, [], client.stops[finish], (7, 3))
        body = farm.requests_of(NODE_OF_POOL[pool])[-1]["body"]
        if interface != "completions":
            texts = [(message["role"], message["content"]) for message in body["messages"]]
            told = [("system", "be brief"), *((turn["role"], turn["content"]) for turn in (*TURNS, asked))]
            assert texts == told
        assert 77 in (body | body.get("options", {})).values()


SYSTEM = [{"type": "text", "text": text, "cache_control": {"type": "ephemeral"}} for text in ("be brief", "be kind")]
NOW = {"role": "system", "content": "now"}
# What coding agents send: an interface, and fields. Of Codex the second message describes where it runs.
AGENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "Claude Code": ("messages", {"system": SYSTEM, "messages": [*TURNS, TURNS[0], NOW]}),
    "Claude Code, later": ("messages", {"system": SYSTEM, "messages": [
        TURNS[0], NOW, TURNS[1], {"role": "user", "content": [
            {"type": "text", "text": "one"}, {"type": "text", "text": "two"},
        ]},
    ]}),
    "Codex": ("responses", {"instructions": "be brief", "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "be kind"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "in /tmp"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
    ]}),
    "Codex, later": ("responses", {"instructions": "be brief", "input": [
        *TURNS, {"role": "developer", "content": "now"}, {"role": "user", "content": "and?"},
    ]}),
}  # fmt: skip


@pytest.mark.parametrize("is_streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("agent", AGENTS)
def test_a_strict_chat_template_accepts_what_agents_send(farm: Nodes, agent: str, *, is_streamed: bool) -> None:
    name, fields = AGENTS[agent]
    client = INTERFACES[name]
    body = {"model": "strict", **client.body("", [], 7), **fields}
    assert client.ask(farm, body, is_streamed=is_streamed).text == KNOWN_ANSWER[: len("Tiny: 1 2 3 4 5 6")]


def test_a_later_system_text_does_not_change_the_beginning(farm: Nodes) -> None:
    """A server reads again what comes after the first change, which takes minutes on old cards."""
    for agent, first in (("Claude Code", "be brief\n\nbe kind"), ("Codex, later", "be brief")):
        name, fields = AGENTS[agent]
        body = {"model": "lab", **INTERFACES[name].body("", [], 7), **fields}
        farm.client.post(INTERFACES[name].path, json=body).raise_for_status()
        system, *turns, last = farm.requests_of("lab")[-1]["body"]["messages"]
        assert (system, turns) == ({"role": "system", "content": first}, TURNS)
        assert last["role"] == "user"
        assert "now" in last["content"]


def test_a_chat_request_keeps_its_messages(farm: Nodes) -> None:
    messages = [{"role": "system", "content": "be brief"}, *TURNS, NOW, TURNS[0], TURNS[0]]
    farm.client.post("/v1/chat/completions", json={"model": "lab", "messages": messages}).raise_for_status()
    assert farm.requests_of("lab")[-1]["body"]["messages"] == messages


@pytest.mark.parametrize("sequence", ["###", "another"])
def test_a_stop_sequence_is_named_if_the_server_names_it(farm: Nodes, sequence: str) -> None:
    """vLLM does."""
    plain, streamed = said(farm, "lab", order(["4"], stop="###"), stop_sequences=[sequence])
    is_named = sequence == "###"
    wanted = ("stop_sequence", "###") if is_named else ("end_turn", None)
    [end] = [event for event in events_of(streamed) if event["type"] == "message_delta"]
    for told in (plain, end["delta"]):
        assert (told["stop_reason"], told["stop_sequence"]) == wanted
    assert end["usage"]["output_tokens"] == plain["usage"]["output_tokens"]
    assert "".join(texts_of(streamed)) == "4"


# --- images and rerank requests


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"}}


def test_pictures_reach_the_server(farm: Nodes) -> None:
    parts = [{"type": "text", "text": "What is this?"}, PICTURE]
    messages = [{"role": "user", "content": parts}]
    for pool in ("lab", "desk"):
        body = {"model": pool, "messages": messages}
        farm.client.post("/v1/chat/completions", json=body).raise_for_status()
    assert farm.requests_of("lab")[-1]["body"]["messages"] == messages
    ollama = farm.requests_of("desk")[-1]["body"]["messages"][0]
    assert (ollama["content"], ollama["images"]) == ("What is this?", ["iVBORw0KGgo="])


def test_documents_are_ranked_by_a_real_llama_server(farm: Nodes) -> None:
    documents = ["the cat is in the river", "gpu queue model server", "berlin germany"]
    body = {"model": "ranks", "query": "cat", "documents": documents, "top_n": 2}
    results = farm.client.post("/v1/rerank", json=body).raise_for_status().json()["results"]
    scores = [result["relevance_score"] for result in results]
    assert len(results) == 2
    assert scores == sorted(scores, reverse=True)
    address = f"http://{LOOPBACK}:{farm.ports['rank']}/v1/rerank"
    headers = {"Authorization": f"Bearer {farm.secrets['LLAMA_API_KEY']}"}
    direct = httpx.post(address, json=body, headers=headers, trust_env=False).raise_for_status().json()["results"]
    assert [result["index"] for result in results] == [result["index"] for result in direct]
    assert scores == pytest.approx([result["relevance_score"] for result in direct], abs=1e-4)


# --- speech


def recording(seconds: float = 0.5) -> bytes:
    """A WAV file with silence."""
    made = io.BytesIO()
    with wave.open(made, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(2 * int(16_000 * seconds)))
    return made.getvalue()


def heard(farm: Nodes, model: str = "ear", sound: bytes = b"", key: str = "", **fields: str) -> httpx.Response:
    """The answer to a recording, which is sent as clients send it: a form of several parts."""
    files = {"file": ("a talk.wav", sound or recording(), "audio/wav")}
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return farm.client.post("/v1/audio/transcriptions", data={"model": model, **fields}, files=files, headers=headers)


def spoken(farm: Nodes, model: str = "mouth", text: str = "hello", key: str = "") -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"model": model, "input": text, "voice": "af_heart", "response_format": "mp3"}
    return farm.client.post("/v1/audio/speech", json=body, headers=headers)


@pytest.mark.parametrize("model", ["ear", "whisper-1"])
def test_a_recording_becomes_text(farm: Nodes, model: str) -> None:
    sound = recording()
    answer = heard(farm, model, sound, language="de", translate="true", prompt=order(["Guten ", "Tag"]))
    assert answer.raise_for_status().json()["text"] == "Guten Tag"
    assert farm.replica(answer) == "voices"
    request = farm.requests_of("voices")[-1]
    wanted = {
        "model": "whisper-1",
        "language": "de",
        "translate": "true",
        "bytes": len(sound),
        "filename": "a talk.wav",
    }
    assert wanted.items() <= request["body"].items()
    assert request["headers"]["authorization"] == f"Bearer {KEY}"


def test_a_long_recording_passes(farm: Nodes) -> None:
    sound = recording(240)
    assert heard(farm, sound=sound).raise_for_status().json()["text"] == "an answer"
    assert farm.requests_of("voices")[-1]["body"]["bytes"] == len(sound) > 7 * 1024**2
    assert heard(farm, sound=recording(600)).status_code == 413


@pytest.mark.parametrize("model", ["mouth", "tts-1"])
def test_a_text_becomes_sound(farm: Nodes, model: str) -> None:
    answer = spoken(farm, model, "Guten Tag").raise_for_status()
    assert answer.content == SOUND
    assert answer.headers["content-type"] == "audio/mpeg"
    wanted = {"model": "tts-1", "input": "Guten Tag", "voice": "af_heart", "response_format": "mp3"}
    assert wanted.items() <= farm.requests_of("voices")[-1]["body"].items()


def test_speech_is_refused_like_all_else(farm: Nodes) -> None:
    assert heard(farm, key="sk-unknown").status_code == spoken(farm, key="sk-unknown").status_code == 401
    assert heard(farm, "no-such-pool").status_code == spoken(farm, "no-such-pool").status_code == 404
    assert farm.client.get("/v1/audio/speech").status_code == 405
    assert farm.client.post("/v1/audio/translations", json={}).status_code == 404


def test_speech_waits_and_is_counted_like_all_else(farm: Nodes) -> None:
    text = order(["done"], service_s=2.5)
    with ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(spoken, farm, "mouth", text), threads.submit(heard, farm, prompt=text)]
        wait_until(lambda: farm.queue("node.voices") == 1, WITHIN_S, "one request waits")
        refused = [heard(farm), spoken(farm)]
        assert [answer.status_code for answer in refused] == [429, 429]
        assert all(answer.headers["retry-after"] for answer in refused)
        assert {answer.result().status_code for answer in answers} == {200}
    assert farm.in_flight_at_most("voices") == 1
    served = farm.balancer_figures("haproxy_server_http_responses_total", "code")
    assert served["node.voices/2xx"] >= 2


def test_speech_is_counted_and_costs_nothing(farm: Nodes) -> None:
    """The node's models have names for which LiteLLM knows OpenAI's prices."""
    for answer in (heard(farm), spoken(farm)):
        answer.raise_for_status()
    address = f"http://{LOOPBACK}:{farm.ports['litellm']}/metrics/"

    def figures(name: str) -> dict[str, str]:
        text = httpx.get(address, headers={"Authorization": f"Bearer {farm.key}"}, trust_env=False).text
        return dict(re.findall(rf'^{name}{{[^}}]*model_id="(ear|mouth)"[^}}]*}} (\S+)$', text, re.MULTILINE))

    wait_until(lambda: len(figures("litellm_spend_metric_total")) == 2, WITHIN_S, "both are counted")
    assert max(map(float, figures("litellm_spend_metric_total").values())) < 1e-20
    assert set(figures("litellm_request_total_latency_metric_count")) == {"ear", "mouth"}


# --- keys in the header that a server wants (001-13)


@pytest.mark.parametrize(
    ("pool", "header", "value"), [("lab", "x-api-key", KEY), ("studio", "authorization", f"Bearer {KEY}")]
)
def test_key_goes_into_its_header_and_no_other(farm: Nodes, pool: str, header: str, value: str) -> None:
    farm.ask(pool).raise_for_status()
    headers = farm.requests_of(pool)[-1]["headers"]
    assert headers[header] == value
    assert [name for name, text in headers.items() if KEY in text] == [header]
    assert farm.key not in str(headers)


# --- thoughts: 000-12, 000-13

THOUGHT = "<think>\nHm, <think>nested</think> is < allowed.\n</think>\n\n"


def cuts(text: str) -> list[list[str]]:
    """The text in two pieces, cut at every place of its tags, and letter by letter."""
    places = [place for place, letter in enumerate(text) if "<" in text[max(0, place - 8) : place + 1]]
    return [[text[:place], text[place:]] for place in places[::3]] + [list(text)]


@pytest.mark.parametrize("pool", NODE_OF_POOL)
def test_thoughts_do_not_reach_the_client(farm: Nodes, pool: str) -> None:
    text = f"{THOUGHT}The answer <b>is</b> 4 <think>or 5?</think> indeed."
    wanted = "The answer <b>is</b> 4  indeed."
    assert content_of(farm.ask(pool, order([text]))) == wanted
    for pieces in cuts(text):
        streamed = farm.ask_streamed(pool, order(pieces))
        assert streamed.text == wanted, pieces
        assert streamed.finish_reasons == ["stop"]


@pytest.mark.parametrize("name", PHONES)
def test_thoughts_of_a_phone_do_not_reach_the_client(farm: Nodes, name: str) -> None:
    text = f"{THOUGHT}4"
    assert content_of(farm.phone(name, order([text]))) == "4"
    assert farm.phone_streamed(name, order(list(text))).text == "4"


def test_unclosed_thought_leaves_an_empty_answer(farm: Nodes) -> None:
    pieces = ["<thi", "nk>I wonder", " whether"]
    assert content_of(farm.ask("studio", order(pieces))) == ""
    streamed = farm.ask_streamed("studio", order(pieces))
    assert (streamed.text, streamed.finish_reasons) == ("", ["stop"])


def assert_shown(answer: httpx.Response) -> None:
    """LiteLLM itself puts a thought at the beginning of a plain answer where servers that separate it put it."""
    message = answer.raise_for_status().json()["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("4", "2 and 2")


def test_client_may_ask_for_thoughts(farm: Nodes) -> None:
    farm.client.headers["x-corral-thinking"] = "show"
    try:
        assert_shown(farm.ask("studio", order(["<think>2 and 2</think>4"])))
        assert farm.ask_streamed("studio", order(list(f"{THOUGHT}4"))).text == f"{THOUGHT}4"
    finally:
        del farm.client.headers["x-corral-thinking"]


def test_inventory_may_show_thoughts(farm: Nodes) -> None:
    assert_shown(farm.ask("raw", order(["<think>2 and 2</think>4"])))
    assert farm.ask_streamed("raw", order(list(f"{THOUGHT}4"))).text == f"{THOUGHT}4"


def test_what_a_server_separates_stays_separate(farm: Nodes) -> None:
    text = order(["4"], think=["two and ", "two"])
    message = farm.ask("studio", text).raise_for_status().json()["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("4", "two and two")
    streamed = farm.ask_streamed("studio", text)
    deltas = [choice["delta"] for event in streamed.events for choice in event["choices"]]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "two and two"
    assert streamed.text == "4"


@pytest.mark.parametrize("pool", ["smart", "desk"])
def test_thinking_is_turned_off_where_the_server_can(farm: Nodes, pool: str) -> None:
    text = order(["4"], think=["two and two"])
    for stream in (False, True):
        answer = farm.ask_streamed(pool, text).response if stream else farm.ask(pool, text)
        assert answer.is_success
    body = farm.requests_of(NODE_OF_POOL[pool])[-1]["body"]
    assert body.get("think") is False or body["chat_template_kwargs"] == {"enable_thinking": False}
    assert "reasoning" not in farm.ask(pool, text).text


def test_other_interfaces_hide_thoughts_too(farm: Nodes) -> None:
    for pieces in ([f"{THOUGHT}4 <"], list(f"{THOUGHT}4 <")):
        plain, streamed = said(farm, "studio", order(pieces))
        assert "think>" not in json.dumps(plain)
        assert [block["text"] for block in plain["content"]] == ["4 <"]
        assert (plain["stop_reason"], plain["usage"]["output_tokens"]) == ("end_turn", 3)
        assert "".join(texts_of(streamed)) == "4 <"
        assert "think" not in streamed
        body = {"model": "studio", "input": order(pieces)}
        plain = farm.client.post("/v1/responses", json=body).raise_for_status().json()
        assert "think>" not in json.dumps(plain)
        said_items = [item for item in plain["output"] if item["type"] == "message"]
        assert [part["text"] for item in said_items for part in item["content"]] == ["4 <"]
        streamed = farm.client.post("/v1/responses", json=body | {"stream": True}).raise_for_status().text
        assert "think>" not in streamed
        assert "".join(re.findall(r'"response.output_text.delta".*"delta":"([^"]*)"', streamed)) == "4 <"


@pytest.mark.parametrize("pool", NODE_OF_POOL)
def test_messages_carry_their_text_whatever_the_server_speaks(farm: Nodes, pool: str) -> None:
    plain, streamed = said(farm, pool, order(TEXT), stop_sequences=["###"], top_k=5)
    assert [block["text"] for block in plain["content"]] == ["".join(TEXT)]
    assert "".join(texts_of(streamed)) == "".join(TEXT)
    for request in farm.requests_of(NODE_OF_POOL[pool])[-2:]:
        wishes = request["body"].get("options") or request["body"]
        assert (wishes["stop"], wishes["top_k"]) == (["###"], 5)


def test_a_separate_thought_has_a_signature_that_clients_accept(farm: Nodes) -> None:
    """Anthropic's and Vercel's libraries want a text there; what a local model thinks has none."""
    plain, streamed = said(farm, "studio", order(["4"], think=["two and two"]), thinking=THINKING)
    thought, text = plain["content"]
    assert (thought["type"], thought["thinking"], thought["signature"]) == ("thinking", "two and two", "")
    assert text["text"] == "4"
    assert "two and two" in streamed
    assert '"signature": null' not in streamed
    unasked, _ = said(farm, "studio", order(["4"], think=["two and two"]))
    assert unasked["content"] == [text]


THINKING = {"type": "enabled", "budget_tokens": 1024}


def said(farm: Nodes, pool: str, text: str, **fields: Any) -> tuple[dict[str, Any], str]:
    """The answer by Anthropic's interface: the plain one, and the events of a stream."""
    body = {"model": pool, "messages": [{"role": "user", "content": text}], "max_tokens": 9} | fields
    plain: dict[str, Any] = farm.client.post("/v1/messages", json=body).raise_for_status().json()
    return plain, farm.client.post("/v1/messages", json=body | {"stream": True}).raise_for_status().text


def texts_of(events: str) -> list[str]:
    """The texts of Anthropic's events."""
    data = [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if line.startswith("data: {")]
    return [event["delta"]["text"] for event in data if event.get("delta", {}).get("type") == "text_delta"]


# --- unlike servers of one pool: slots, queue, faults (000-06, 000-07, 000-09, 000-10)


def test_unlike_servers_take_turns_when_idle(farm: Nodes) -> None:
    shares = Counter(farm.replica(farm.ask("primary", "hello", max_tokens=4)) for _ in range(30))
    assert set(shares) == {"pixel", *PHONES}
    assert max(shares.values()) <= 15


def burst(farm: Nodes, count: int, service_s: float) -> list[httpx.Response]:
    text = order(["done"], service_s=service_s)
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda _: farm.ask("primary", text), range(count)))


def test_no_node_gets_more_than_its_slots_and_the_queue_is_bounded(farm: Nodes) -> None:
    answers = burst(farm, 40, 1.0)
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 429}
    assert all(answer.headers["retry-after"] for answer in answers if answer.status_code == 429)
    for name in PHONES:
        assert farm.in_flight_at_most(name) == 1
    assert {farm.replica(answer) for answer in answers if answer.is_success} == {"pixel", *PHONES}


@pytest.fixture
def all_fakes(farm: Nodes) -> Iterator[Nodes]:
    """The farm with a fake instead of the real llama-server, which is too fast to be busy."""
    balancer = balancer_of(farm.plan, farm.out)
    assert balancer is not None
    pixel, real = balancer.servers()["pixel"], farm.processes["pixel"]

    @contextmanager
    def changed() -> Iterator[None]:
        balancer.take_out(pixel)
        yield
        balancer.put_back(pixel)
        wait_until(lambda: "pixel" not in farm.down(), WITHIN_S, "the Pixel is used")

    with ExitStack() as stack:
        with changed():
            real.__exit__(None, None, None)
            stack.enter_context(Process(orders.command("rest", farm.ports["pixel"]), farm.folder / "fake-pixel.log"))
            wait_http(f"http://{LOOPBACK}:{farm.ports['pixel']}/health")
        yield farm
        with changed():
            stack.close()
            real.__enter__()
            wait_http(f"http://{LOOPBACK}:{farm.ports['pixel']}/health")


def state(farm: Nodes) -> dict[str, Any]:
    """The farm's state, as every client may ask for it."""
    found: dict[str, Any] = farm.client.get("/health", headers={"Authorization": ""}).json()
    return found


def test_the_page_finds_every_pool_in_the_farms_state(farm: Nodes) -> None:
    """Pools with a queue of their own, with leased slots, and on one server; `auto` and a cloud account have none."""
    told, found = farm.client.get("/page.json").json(), state(farm)
    queues, replicas = ({item["name"] for item in found[field]} for field in ("pools", "nodes"))
    pools = {pool["name"]: pool for pool in told["pools"]}
    assert pools.keys() == {*farm.plan.inventory.pools, "auto"}
    bare = {name for name, pool in pools.items() if pool["queue"] not in queues or not pool["replicas"]}
    assert bare == {"auto", "cloud"}
    assert {name for pool in pools.values() for name in pool["replicas"]} == replicas
    assert pools["primary"]["queue"] == "primary"
    assert pools["desk"]["queue"] == pools["herd"]["queue"]


def test_six_run_ten_wait_and_the_next_is_refused(all_fakes: Nodes) -> None:
    """000-06, 000-07, 000-08: over both tiers, which spill into each other."""
    farm, text = all_fakes, order(["done"], service_s=3.0)
    before = {name: len(farm.requests_of(name)) for name in ("mac", "pixel", *PHONES)}
    with ThreadPoolExecutor(16) as threads:
        answers = [threads.submit(farm.ask, "auto", text) for _ in range(16)]
        wait_until(lambda: (state(farm)["busy"], state(farm)["queued"]) == (6, 10), WITHIN_S, "six run and ten wait")
        refused = farm.ask("auto", text)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        assert Counter(answer.result().status_code for answer in answers) == {200: 16}
    assert sum(len(farm.requests_of(name)) - before[name] for name in before) == 16
    assert [farm.in_flight_at_most(name) for name in ("mac", "pixel", *PHONES)] == [2, 2, 1, 1]
    assert state(farm)["busy"] == state(farm)["queued"] == 0


def test_waiting_request_takes_the_first_slot_of_any_node(all_fakes: Nodes) -> None:
    farm = all_fakes
    with ThreadPoolExecutor(5) as threads:
        long = [threads.submit(farm.ask, "primary", order(["done"], service_s=9.0)) for _ in range(3)]
        threads.submit(farm.ask, "primary", order(["done"], service_s=3.0))
        wait_until(lambda: state(farm)["busy"] == 4, WITHIN_S, "all are busy")
        with farm.leaving("primary"):
            wait_until(lambda: farm.queue("Leases.primary") == 1, WITHIN_S, "a client waits, and leaves")
        wait_until(lambda: farm.queue("Leases.primary") == 0, WITHIN_S, "its place is free")
        assert farm.ask("primary", "hello").is_success
        assert not any(answer.done() for answer in long)


def test_killed_phone_costs_what_was_in_flight_on_it(all_fakes: Nodes) -> None:
    farm = all_fakes
    with ThreadPoolExecutor(14) as threads:
        answers = [threads.submit(farm.ask, "primary", order(["done"], service_s=1.5)) for _ in range(14)]
        wait_until(lambda: farm.queue("Leases.primary") == 10, WITHIN_S, "ten wait")
        farm.processes["iphone15"].__exit__(None, None, None)
        try:
            failed = [answer.result() for answer in answers if not answer.result().is_success]
        finally:
            farm.processes["iphone15"].__enter__()
    assert len(failed) <= 1, [answer.text for answer in failed]
    wait_until(lambda: "iphone15" not in farm.down(), WITHIN_S, "it is up again")


def test_requests_that_meet_a_dead_node_move_on(all_fakes: Nodes) -> None:
    """Also those that are too long for HAProxy to repeat: nothing has told it yet that the node is gone."""
    farm = all_fakes
    farm.processes["iphone16"].__exit__(None, None, None)
    try:
        answers = [farm.ask("primary", f"hello {'x' * 20_000 * (turn % 2)}") for turn in range(8)]
    finally:
        farm.processes["iphone16"].__enter__()
    assert {answer.status_code for answer in answers} == {200}
    wait_until(lambda: "iphone16" not in farm.down(), WITHIN_S, "it is up again")


def test_conversation_returns_to_its_node(farm: Nodes) -> None:
    name = {"x-litellm-session-id": "one-and-the-same"}
    body = {"model": "primary", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    answers = [farm.client.post("/v1/chat/completions", json=body, headers=name) for _ in range(6)]
    assert len({farm.replica(answer) for answer in answers}) == 1


def test_models_of_one_server_share_its_slots_and_its_queue(farm: Nodes) -> None:
    before = len(farm.requests_of("desk"))
    with ThreadPoolExecutor(4) as threads:
        pools, text = ("desk", "herd", "herd", "desk"), order(["done"], service_s=2.5)
        answers = [threads.submit(farm.ask, pool, text) for pool in pools]
        wait_until(lambda: farm.queue("node.desk") == 2, WITHIN_S, "two requests wait")
        assert sum(farm.balancer_figures("haproxy_backend_current_queue").values()) == 2
        refused = [farm.ask(pool, "hello") for pool in ("desk", "herd")]
        assert [answer.status_code for answer in refused] == [429, 429]
        assert all(answer.headers["retry-after"] for answer in refused)
        assert {answer.result().status_code for answer in answers} == {200}
    assert farm.in_flight_at_most("desk") == 2
    models = Counter(request["body"]["model"] for request in farm.requests_of("desk")[before:])
    assert models == {"qwen3:4b": 2, "llama3.2:3b": 2}


@pytest.mark.parametrize("name", ["iphone15", "pixel"])
def test_dead_node_is_routed_around_and_used_again(farm: Nodes, name: str) -> None:
    farm.processes[name].__exit__(None, None, None)
    wait_until(lambda: name in farm.down(), WITHIN_S, f"{name} is down")
    answers = [farm.ask("primary", "hello", max_tokens=4) for _ in range(8)]
    assert {answer.status_code for answer in answers} == {200}
    assert name not in {farm.replica(answer) for answer in answers}
    farm.processes[name].__enter__()
    wait_until(lambda: name not in farm.down(), WITHIN_S, f"{name} is up again")
    assert name in {farm.replica(farm.ask("primary", "hello", max_tokens=4)) for _ in range(8)}


def test_only_node_of_a_pool_dies_and_comes_back(farm: Nodes) -> None:
    farm.processes["mac"].__exit__(None, None, None)
    wait_until(lambda: "mac" in farm.down(), WITHIN_S, "the Mac is down")
    assert farm.ask("smart").status_code == 503
    farm.processes["mac"].__enter__()
    wait_until(lambda: farm.ask("smart").is_success, WITHIN_S, "the Mac answers again")


# --- a cloud account (001-13)


@pytest.mark.parametrize("is_streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("interface", INTERFACES)
def test_a_cloud_account_answers_in_every_interface(farm: Nodes, interface: str, *, is_streamed: bool) -> None:
    client = INTERFACES[interface]
    for finish in ("stop", "length"):
        asked = {"role": "user", "content": order(TEXT, finish=finish)}
        body = {"model": "cloud", **client.body("be brief", [*TURNS, asked], 2000)}
        said = client.ask(farm, body, is_streamed=is_streamed)
        assert said == Said("".join(TEXT), "", [], client.stops[finish], (7, 3))
        request = farm.requests_of("account")[-1]
        assert request["path"] == "/v1/messages"
        assert request["headers"]["x-api-key"] == KEY
        assert farm.key not in str(request)
        assert (request["body"]["model"], request["body"]["max_tokens"]) == ("claude-sonnet-4-5", 2000)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ("rate_limit_error", 429),
        ("overloaded_error", 500),
        ("api_error", 500),
        ("invalid_request_error", 400),
        ("authentication_error", 503),
    ],
)
def test_an_error_of_a_cloud_account_is_told_as_any_other(farm: Nodes, error: str, status: int) -> None:
    """That the account refuses the farm's key is no error of the client's key."""
    answer = farm.ask("cloud", error)
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert KEY not in answer.text
    assert ("this farm has" in answer.text) == (error == "authentication_error")


@pytest.mark.parametrize("is_streamed", [False, True], ids=["plain", "streamed"])
@pytest.mark.parametrize("interface", INTERFACES)
def test_a_refused_key_of_the_farm_is_not_the_clients(farm: Nodes, interface: str, *, is_streamed: bool) -> None:
    client = INTERFACES[interface]
    asked = {"role": "user", "content": "authentication_error"}
    body = {"model": "cloud", "stream": is_streamed, **client.body("", [asked], 2000)}
    answer = farm.client.post(client.path, json=body)
    assert answer.status_code == 503, answer.text
    assert "refuses the key that this farm has" in answer.text


def test_requests_go_to_the_account_while_the_house_is_down(farm: Nodes) -> None:
    text = order(["in ", "the house"])
    assert farm.replica(farm.ask("house", text)) == "own"
    before = len(farm.requests_of("account"))
    farm.processes["own"].__exit__(None, None, None)
    try:
        assert content_of(farm.ask("house", text)) == "in the house"
        assert farm.ask_streamed("house", text).text == "in the house"
        assert len(farm.requests_of("account")) == before + 2
    finally:
        farm.processes["own"].__enter__()
    wait_until(lambda: "own" not in farm.down(), WITHIN_S, "it is up again")
    assert farm.replica(farm.ask("house", text)) == "own"
    assert len(farm.requests_of("account")) == before + 2


def test_health_is_asked_without_inference(farm: Nodes) -> None:
    before = {name: len(farm.requests_of(name)) for name in WIRES}
    text = wait_http(f"http://{LOOPBACK}:{farm.ports['stats']}/metrics").text
    assert 'haproxy_server_check_status{proxy="node.desk"' in text
    assert {name: len(farm.requests_of(name)) for name in WIRES} == before
