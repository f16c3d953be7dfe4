"""The local llama-server: real processes, real models, over HTTP."""

from __future__ import annotations

import itertools
import json
import math
import operator
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from corral.config.gguf_header import facts_of, read_header
from tests.model_files import make_adapter, make_embedding_model, make_rerank_model
from tests.processes.helpers import REPOSITORY, Process, free_port, wait_http, wait_until
from tests.tiny_models import KNOWN_ANSWER, make_chat_model
from xllama import READY, parse

SCRIPT = REPOSITORY / "gpu-server" / "local" / "llama-server"
NO_LLAMA_VARIABLES = {name: None for name in os.environ if name.startswith("LLAMA_")}
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


class Server:
    """A running server, and a client that talks to it with its key."""

    def __init__(self, process: Process, port: int, key: str) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(
            base_url=self.url, trust_env=False, timeout=30, headers={"Authorization": f"Bearer {key}"} if key else {}
        )

    def get(self, path: str) -> httpx.Response:
        return self.client.get(path)

    def post(self, path: str, body: Mapping[str, object]) -> httpx.Response:
        return self.client.post(path, json=dict(body))

    def say(self, **options: object) -> dict[str, Any]:
        response = self.post("/v1/chat/completions", {"messages": QUESTION, **options})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer


@contextmanager
def serving(
    model: Path, log: Path, *arguments: str, key: str = "", environment: Mapping[str, str] | None = None
) -> Iterator[Server]:
    port = free_port()
    command: list[str | Path] = [sys.executable, SCRIPT, "--model", model, "--port", str(port), "--threads", "1"]
    with Process([*command, *arguments], log, environment={**NO_LLAMA_VARIABLES, **(environment or {})}) as process:
        server = Server(process, port, key)
        wait_http(server.url + "/health", process=process)
        wait_until(lambda: READY in process.output, 5, "signal handlers are there")
        with server.client:
            yield server


def errors_of(*arguments: str | Path) -> str:
    """What a server that does not start writes to stderr."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_")}
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
        env=environment,
    )
    assert done.returncode == 1, done
    assert "Traceback" not in done.stderr
    return done.stderr


def exhaust(lines: Iterator[str]) -> None:
    for _line in lines:
        pass


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_chat_model(folder / "chat.gguf")
    make_chat_model(folder / "long.gguf", context=131072)
    make_embedding_model(folder / "embed.gguf")
    make_rerank_model(folder / "rerank.gguf")
    return folder


@pytest.fixture(scope="module")
def chat(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the arguments that the kit renders for a chat model."""
    folder = tmp_path_factory.mktemp("chat")
    keys = folder / "keys"
    keys.write_text("# keys of the farm\nfirst-key\n\nsecond-key\n")
    arguments = [
        *("--alias", "small,tiny", "--host", "127.0.0.1", "--api-key-file", str(keys)),
        *("--ctx-size", "4096", "--parallel", "2", "--batch-size", "512", "--ubatch-size", "256"),
        *("--flash-attn", "on", "--cache-type-k", "q8_0", "--cache-type-v", "q8_0", "--cache-ram", "64"),
        *("--fit", "off", "--metrics", "--n-gpu-layers", "0", "--cache-reuse", "256"),
        *("--no-warmup", "--jinja", "--offline", "--no-webui"),
        *("--reasoning-format", "none", "--threads-http", "4", "--chat-template-kwargs", '{"enable_thinking": false}'),
    ]
    with serving(models / "chat.gguf", folder / "log", *arguments, key="second-key") as server:
        yield server


# --- answers


def test_known_answer_byte_for_byte(chat: Server) -> None:
    answer = chat.say()
    choice = answer["choices"][0]
    assert choice["message"]["content"].encode() == KNOWN_ANSWER.encode()
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] >= 100


def test_known_answer_streamed(chat: Server) -> None:
    body = {"messages": QUESTION, "stream": True}
    with chat.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    pieces = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert "".join(pieces).encode() == KNOWN_ANSWER.encode()
    assert sum(map(bool, pieces)) >= 100


def test_max_tokens_cuts_the_answer(chat: Server) -> None:
    choice = chat.say(max_tokens=7)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert KNOWN_ANSWER.startswith(choice["message"]["content"])
    assert 0 < len(choice["message"]["content"]) < 30


@pytest.mark.parametrize(
    "answer", ["a", " the", "Grüße, 世界! 🙂 the end", "two\n\nparagraphs. Two, two, two.", "the the the the"]
)
def test_any_other_answer_is_said_too(answer: str, tmp_path: Path) -> None:
    make_chat_model(tmp_path / "chat.gguf", answer=answer, width=64, layers=1, weight_type="q8_0")
    with serving(tmp_path / "chat.gguf", tmp_path / "log", "--ctx-size", "1024", "--parallel", "1") as server:
        body = {"prompt": "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n", "n_predict": 100}
        said = server.post("/completion", body).json()
        assert said["content"].encode() == answer.encode()
        assert said["stop_type"] == "eos"


def test_tool_call_is_parsed(tmp_path: Path) -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    make_chat_model(tmp_path / "chat.gguf", answer=call)
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    with serving(tmp_path / "chat.gguf", tmp_path / "log", "--ctx-size", "4096", "--parallel", "1") as server:
        choice = server.say(tools=tools)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    function = choice["message"]["tool_calls"][0]["function"]
    assert (function["name"], json.loads(function["arguments"])) == ("weather", {"city": "Paris"})


def test_larger_quantized_model_says_the_same(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "chat.gguf", width=256, layers=4, weight_type="q8_0")
    arguments = [
        "--ctx-size",
        "1024",
        "--parallel",
        "1",
        "--flash-attn",
        "on",
        "--cache-type-k",
        "q4_0",
        "--cache-type-v",
        "q4_0",
    ]
    with serving(tmp_path / "chat.gguf", tmp_path / "log", *arguments) as server:
        assert server.say()["choices"][0]["message"]["content"] == KNOWN_ANSWER


# --- what the arguments change


def test_key_file_lets_its_keys_in_and_nothing_else(chat: Server) -> None:
    def status(**headers: str) -> int:
        return httpx.get(chat.url + "/slots", headers=headers, trust_env=False).status_code

    assert status() == 401
    for key, expected in {"first-key": 200, "second-key": 200, "# keys of the farm": 401, "wrong": 401}.items():
        assert status(Authorization=f"Bearer {key}") == expected, key


def test_aliases_are_the_model_names(chat: Server) -> None:
    [model] = chat.get("/v1/models").json()["data"]
    assert model["id"] == "small"
    assert model["aliases"] == ["small", "tiny"]


def test_its_own_page_is_off(chat: Server) -> None:
    assert chat.get("/").status_code == httpx.codes.NOT_FOUND


def test_slots_share_the_context(chat: Server) -> None:
    slots = chat.get("/slots").json()
    assert [slot["n_ctx"] for slot in slots] == [2048, 2048]
    properties = chat.get("/props").json()
    assert properties["total_slots"] == 2
    assert properties["default_generation_settings"]["n_ctx"] == 2048


def test_context_overflow_is_refused(chat: Server) -> None:
    response = chat.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "zq " * 3000}]})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "exceed_context_size_error"


def test_metrics_count_with_the_switch(chat: Server) -> None:
    chat.say()
    lines = chat.get("/metrics").text.splitlines()
    counted = [float(line.split()[1]) for line in lines if line.startswith("llamacpp:tokens_predicted_total ")]
    assert counted
    assert counted[0] >= 100


def test_properties_and_log_show_what_was_set(chat: Server) -> None:
    properties = chat.get("/props").json()
    assert properties["endpoint_metrics"] is True
    assert "n_threads = 1" in chat.process.output
    assert "n_slots = 2, n_ctx_slot = 2048" in chat.process.output


def test_defaults_have_no_metrics_and_no_key(models: Path, tmp_path: Path) -> None:
    with serving(models / "chat.gguf", tmp_path / "log") as server:
        assert server.get("/metrics").status_code == 501
        assert server.post("/props", {}).status_code == 501
        page = server.get("/")
        assert (page.status_code, page.headers["content-type"].split(";")[0]) == (200, "text/html")
        assert server.get("/props").json()["total_slots"] == 4
        assert server.say(max_tokens=3)["choices"][0]["finish_reason"] == "length"


def test_idle_server_sleeps_and_wakes(models: Path, tmp_path: Path) -> None:
    with serving(models / "chat.gguf", tmp_path / "log", "--sleep-idle-seconds", "1", "--parallel", "1") as server:
        end = time.monotonic() + 20
        while not server.get("/props").json()["is_sleeping"]:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert server.say()["choices"][0]["message"]["content"] == KNOWN_ANSWER


def test_embeddings_are_nearer_for_texts_that_share_words(models: Path, tmp_path: Path) -> None:
    texts = ["the cat is in the river", "the dog is in the river", "gpu queue model server"]
    with serving(
        models / "embed.gguf", tmp_path / "log", "--embeddings", "--pooling", "mean", "--alias", "e"
    ) as server:
        answer = server.post("/v1/embeddings", {"model": "e", "input": texts}).json()
        assert server.post("/v1/chat/completions", {"messages": QUESTION}).status_code >= 400
    vectors = [item["embedding"] for item in sorted(answer["data"], key=lambda item: item["index"])]
    assert [len(vector) for vector in vectors] == [128, 128, 128]
    assert all(math.isclose(math.hypot(*vector), 1, abs_tol=1e-3) for vector in vectors)

    def nearness(first: int, second: int) -> float:
        return float(sum(map(operator.mul, vectors[first], vectors[second])))

    assert nearness(0, 1) > nearness(0, 2)


def test_rerank_scores_every_document(models: Path, tmp_path: Path) -> None:
    body = {"query": "capital of france", "documents": ["paris", "the river", "a gpu"]}
    with serving(models / "rerank.gguf", tmp_path / "log", "--reranking") as server:
        results = server.post("/v1/rerank", body).json()["results"]
    assert sorted(result["index"] for result in results) == [0, 1, 2]
    assert len({result["relevance_score"] for result in results}) == 3


@pytest.mark.parametrize(
    ("arguments", "attribute", "expected"),
    [
        ("--threads 3", "cpuparams.n_threads", 3),
        ("--threads 3", "cpuparams_batch.n_threads", 3),
        ("--threads 0", "cpuparams.n_threads", os.cpu_count()),
        ("--ctx-size 4096", "n_ctx", 4096),
        ("--parallel 3", "n_parallel", 3),
        ("", "n_parallel", -1),
        ("", "port", 8080),
        ("--batch-size 64 --ubatch-size 32", "n_batch", 64),
        ("--batch-size 64 --ubatch-size 32", "n_ubatch", 32),
        ("--n-gpu-layers 7", "n_gpu_layers", 7),
        ("--n-gpu-layers all", "n_gpu_layers", -2),
        ("--n-gpu-layers auto", "n_gpu_layers", -1),
        ("--flash-attn off", "flash_attn_type.name", "LLAMA_FLASH_ATTN_TYPE_DISABLED"),
        ("--flash-attn auto", "flash_attn_type.name", "LLAMA_FLASH_ATTN_TYPE_AUTO"),
        ("--cache-type-k iq4_nl", "cache_type_k.name", "GGML_TYPE_IQ4_NL"),
        ("--cache-type-v q8_0", "cache_type_v.name", "GGML_TYPE_Q8_0"),
        ("--cache-ram -1", "cache_ram_mib", -1),
        ("--cache-reuse 128", "n_cache_reuse", 128),
        ("--no-cache-prompt", "cache_prompt", False),
        ("--fit off", "fit_params", False),
        ("--metrics", "endpoint_metrics", True),
        ("--no-jinja", "use_jinja", False),
        ("--embeddings", "embedding", True),
        ("--reranking", "embedding", True),
        ("--reranking", "pooling_type.name", "LLAMA_POOLING_TYPE_RANK"),
        ("--pooling cls", "pooling_type.name", "LLAMA_POOLING_TYPE_CLS"),
        ("--load-mode mmap+mlock", "load_mode.name", "LLAMA_LOAD_MODE_MMAP_MLOCK"),
        ("--load-mode none", "load_mode.name", "LLAMA_LOAD_MODE_NONE"),
        ("--no-warmup", "warmup", False),
        ("--host 127.0.0.1,::1", "hostnames", ["127.0.0.1", "::1"]),
        ("--reasoning off", "enable_reasoning", 0),
        ("--reasoning off", "default_template_kwargs", {"enable_thinking": "false"}),
        ("--reasoning auto", "default_template_kwargs", {}),
        ("--reasoning-format deepseek-legacy", "reasoning_format.name", "COMMON_REASONING_FORMAT_DEEPSEEK_LEGACY"),
        ('--chat-template-kwargs {"a":[1,"ü"]}', "default_template_kwargs", {"a": '[1, "ü"]'}),
        ("--offline", "offline", True),
        ("--no-webui --webui", "ui", True),
        ("--sleep-idle-seconds 5", "sleep_idle_seconds", 5),
        ("--threads-http 3", "n_threads_http", 3),
        ("--split-mode layer", "split_mode.name", "LLAMA_SPLIT_MODE_LAYER"),
        ("--alias b,a", "model_alias", {"a", "b"}),
        ("--spec-draft-model draft.gguf", "speculative.draft.mparams.path", "draft.gguf"),
        ("--spec-draft-n-max 8", "speculative.draft.n_max", 8),
        ("--spec-draft-n-min 2", "speculative.draft.n_min", 2),
        ("--spec-draft-p-min 0.5", "speculative.draft.p_min", 0.5),
        ("--spec-draft-ngl all", "speculative.draft.n_gpu_layers", -2),
        ("--spec-draft-type-k q8_0", "speculative.draft.cache_type_k.name", "GGML_TYPE_Q8_0"),
        ("--spec-draft-type-v q4_0", "speculative.draft.cache_type_v.name", "GGML_TYPE_Q4_0"),
    ],
)
def test_arguments_become_parameters(models: Path, arguments: str, attribute: str, expected: object) -> None:
    value = parse(["--model", str(models / "chat.gguf"), *arguments.split()])
    for name in attribute.split("."):
        value = getattr(value, name)
    assert value == expected


# --- a small model that drafts


DRAFT = ("--spec-type", "draft-simple", "--spec-draft-n-max", "4", "--spec-draft-ngl", "0")


def test_a_draft_changes_nothing_but_the_number_of_steps(models: Path, tmp_path: Path) -> None:
    make_chat_model(tmp_path / "small.gguf", width=64, layers=1)
    with serving(models / "chat.gguf", tmp_path / "plain", "--parallel", "1") as server:
        alone = server.say(temperature=0)
    words = ["--parallel", "1", "--metrics", *DRAFT, "--spec-draft-model", str(tmp_path / "small.gguf")]
    with serving(models / "chat.gguf", tmp_path / "drafted", *words) as server:
        drafted = server.say(temperature=0)
        figures = server.get("/metrics").text

    assert drafted["choices"] == alone["choices"]
    assert "draft_n" not in alone["timings"]
    assert drafted["timings"]["draft_n"] >= drafted["timings"]["draft_n_accepted"] > 50
    proposed = drafted["timings"]["draft_n"]
    assert f"llamacpp:spec_decode_num_draft_tokens_total {proposed}\n" in figures


@pytest.mark.parametrize(
    ("answer", "is_used"), [(KNOWN_ANSWER, True), (KNOWN_ANSWER.replace("Tiny", "Other"), False), ("x " * 500, False)]
)
def test_a_draft_with_other_tokens_is_loaded_and_not_used(
    models: Path, tmp_path: Path, answer: str, *, is_used: bool
) -> None:
    """Which the plan refuses, since nobody else would tell (rule draft-vocabulary)."""
    make_chat_model(tmp_path / "draft.gguf", answer=answer, width=64, layers=1)
    words = ["--parallel", "1", *DRAFT, "--spec-draft-model", str(tmp_path / "draft.gguf")]
    with serving(models / "chat.gguf", tmp_path / "log", *words) as server:
        said = server.say(temperature=0)
    ours, theirs = (
        facts_of(read_header(path.open("rb").read)) for path in (models / "chat.gguf", tmp_path / "draft.gguf")
    )

    assert said["choices"][0]["message"]["content"] == KNOWN_ANSWER
    assert ("draft_n" in said["timings"]) is is_used
    assert (ours.tokens == theirs.tokens) is is_used


# --- adapters


def test_an_adapter_is_in_force_for_requests_that_ask_for_it(models: Path, tmp_path: Path) -> None:
    make_adapter(tmp_path / "late.gguf", start=50)
    make_adapter(tmp_path / "later.gguf", start=90)
    both = f"{tmp_path}/late.gguf:0,{tmp_path}/later.gguf:0"
    with serving(models / "chat.gguf", tmp_path / "log", "--parallel", "2", "--lora-scaled", both) as server:

        def said(**options: object) -> str:
            return str(server.say(temperature=0, **options)["choices"][0]["message"]["content"])

        assert [item["scale"] for item in server.get("/lora-adapters").json()] == [0, 0]
        assert said() == KNOWN_ANSWER
        assert said(lora=[{"id": 0, "scale": 1.0}]) == KNOWN_ANSWER[KNOWN_ANSWER.index(" 50 ") :]
        assert said(lora=[{"id": 1, "scale": 1.0}]) == KNOWN_ANSWER[KNOWN_ANSWER.index(" 90 ") :]
        assert said(lora=[{"id": 0, "scale": 0.1}]) == KNOWN_ANSWER
        assert said() == KNOWN_ANSWER, "nothing of it stays in the cache"


def test_wrong_adapters_end_with_a_message(models: Path, tmp_path: Path) -> None:
    assert "'x.gguf' is not FILE:SCALE" in errors_of("--model", models / "chat.gguf", "--lora-scaled", "x.gguf")


# --- loading, failing, ending


def test_health_is_good_only_once_it_can_answer(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "chat.gguf", width=768, layers=8)
    port = free_port()
    model = str(tmp_path / "chat.gguf")
    command = [
        sys.executable,
        str(SCRIPT),
        "--model",
        model,
        "--port",
        str(port),
        "--threads",
        "1",
        "--ctx-size",
        "1024",
    ]
    url = f"http://127.0.0.1:{port}"
    states: list[str] = []
    with Process(command, tmp_path / "log") as process, httpx.Client(base_url=url, trust_env=False) as client:
        while "200" not in states:
            assert process.exit_code() is None, process.output
            try:
                states.append(str(client.get("/health").status_code))
            except httpx.ConnectError:
                states.append("refused")
            time.sleep(0.005)
        said = client.post("/v1/chat/completions", json={"messages": QUESTION, "max_tokens": 4}, timeout=30)
        assert said.status_code == 200
    assert set(states[:-1]) <= {"refused", "503"}
    assert states == sorted(states, key=["refused", "503", "200"].index)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--x"], "error: unknown argument: --x"),
        (["--mlock"], "error: unknown argument: --mlock"),
        (["--model"], 'error: argument "--model" lacks its value'),
        (["--port=1"], "error: unknown argument: --port=1"),
        (["--mod", "x"], "error: unknown argument: --mod"),
        (["model.gguf"], "error: unknown argument: model.gguf"),
        ([], "error: --model is missing: there is nothing to serve"),
        (["--model", "nowhere.gguf"], "error: cannot read --model nowhere.gguf: No such file or directory"),
        (["--port", "x"], "error: argument \"--port\": 'x' is not a whole number"),
        (["--port", "70000"], 'error: argument "--port": 70000 is not between 0 and 65535'),
        (["--parallel", "0"], 'error: argument "--parallel": 0 slots serve no request; -1 lets the server choose'),
        (["--flash-attn", "yes"], "error: argument \"--flash-attn\": 'yes' is none of on, off, auto"),
        (["--chat-template-kwargs", "[]"], 'error: argument "--chat-template-kwargs": not a JSON object'),
    ],
)
def test_wrong_command_line_ends_with_one_message(arguments: list[str], message: str) -> None:
    assert errors_of(*arguments) == message + "\n"


def test_key_file_without_a_key_does_not_open_the_server(models: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none yet\n\n")
    assert "no key in" in errors_of("--model", models / "chat.gguf", "--api-key-file", tmp_path / "keys")
    assert "No such file" in errors_of("--model", models / "chat.gguf", "--api-key-file", tmp_path / "nowhere")


@pytest.mark.parametrize("percent", [0, 1, 5, 20, 50, 80, 99])
def test_truncated_model_ends_with_a_message(models: Path, tmp_path: Path, percent: int) -> None:
    content = (models / "chat.gguf").read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content[: len(content) * percent // 100])
    port = str(free_port())
    message = f"cannot serve {broken} on 127.0.0.1:{port}; llama.cpp's log lines say why"
    if not percent:
        message = f"--model {broken} is no GGUF file"
    assert f"error: {message}\n" in errors_of("--model", broken, "--port", port, "--threads", "1")


def test_taken_port_ends_with_a_message(chat: Server, models: Path) -> None:
    port = chat.url.rpartition(":")[2]
    errors = errors_of("--model", models / "chat.gguf", "--port", port, "--threads", "1")
    assert f"error: cannot serve {models}/chat.gguf on 127.0.0.1:{port}; llama.cpp's log lines say why\n" in errors
    assert chat.get("/health").status_code == 200


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_it_at_once_even_in_the_middle_of_a_stream(
    models: Path, tmp_path: Path, number: signal.Signals
) -> None:
    body = {"prompt": "hello", "n_predict": 100_000, "ignore_eos": True, "stream": True}
    with (
        serving(models / "long.gguf", tmp_path / "log", "--ctx-size", "131072", "--parallel", "1") as server,
        server.client.stream("POST", "/completion", json=body) as response,
    ):
        lines = response.iter_lines()
        assert all(line.startswith("data: ") for line in itertools.islice(filter(None, lines), 50))
        os.kill(server.process.pid, number)
        assert server.process.wait(2.0) == 0
        with pytest.raises(httpx.RemoteProtocolError):
            exhaust(lines)


def test_idle_server_ends_and_its_port_is_free_again(models: Path, tmp_path: Path) -> None:
    port = str(free_port())
    for _round in range(2):
        command = [sys.executable, str(SCRIPT), "--model", str(models / "chat.gguf"), "--port", port, "--threads", "1"]
        with Process(command, tmp_path / "log") as process:
            wait_until(lambda: READY in process.output, 10, f"ready on {port}")
            assert wait_http(f"http://127.0.0.1:{port}/health", 1).json() == {"status": "ok"}
            os.kill(process.pid, signal.SIGTERM)
            assert process.wait(2.0) == 0


def test_signal_while_loading_ends_it_at_once(tmp_path: Path) -> None:
    make_chat_model(tmp_path / "chat.gguf", width=768, layers=8)
    port = free_port()
    command = [
        sys.executable,
        str(SCRIPT),
        "--model",
        str(tmp_path / "chat.gguf"),
        "--port",
        str(port),
        "--threads",
        "1",
    ]
    with Process(command, tmp_path / "log") as process:
        wait_until(lambda: "loading model" in process.output, 10, "loading")
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(2.0) in {0, -signal.SIGINT}  # it may just have finished loading


def test_script_runs_by_itself() -> None:
    assert os.access(SCRIPT, os.X_OK)
    assert SCRIPT.read_text().startswith("#!/usr/bin/env python3\n")
    done = subprocess.run([sys.executable, SCRIPT, "--x"], check=False, capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stderr) == (1, "error: unknown argument: --x\n")
