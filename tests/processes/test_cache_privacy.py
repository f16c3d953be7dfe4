"""Prompt caches that tell one key nothing of another's prompts, with real llama-servers and LiteLLM's router."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import httpx
import pytest
import yaml

from corral.build import build_plan
from corral.config.load import validate
from corral.config.source import parse
from corral.plan.site import HERE
from corral.render.output import write
from corral.render.tree import render
from tests.callbacks import load_callback
from tests.processes.fakes import LOOPBACK
from tests.processes.helpers import REPOSITORY, Process, free_port, wait_http
from tests.tiny_models import make_chat_model

SERVER = REPOSITORY / "gpu-server" / "local" / "llama-server"
KEY = "key-of-the-servers"
Cache = Literal["private", "shared"]
SECRET = "My account number is 4711 and my number for the bank is 8302, please help me with the river and the bank."
RIGHT, WRONG = SECRET[:60], SECRET[:40] + "something else and nothing"


def inventory_of(cache: Cache, port: int) -> str:
    pool = {
        "model": "tiny",
        "on": {"host": "here"},
        "ports": port,
        "engine": {"threads": 1, "slots": 2},
        "cache": cache,
    }
    inventory = {
        "schema_version": 1,
        "name": "caches",
        "hosts": {"here": {"runtime": "local"}},
        "models": {"tiny": {"source": "chat.gguf", "kind": "chat", "context": 2048}},
        "pools": {"chat": pool},
        "gateway": {"host": "here", "database": False, "cache": False},
    }
    return yaml.safe_dump(inventory)


def start(stack: ExitStack, folder: Path, cache: Cache) -> str:
    """The address of a llama-server, started as the kit renders it for a pool with this cache."""
    port = free_port()
    plan = build_plan(validate(parse(inventory_of(cache, port), "inventory.yaml")))
    write(render(plan), folder)
    here = folder / "here"
    [service] = [service for service in plan.services_of("here") if service.component == "llama"]
    words = [word.replace(HERE, str(here)) for word in service.args]
    model, key_file = (Path(words[words.index(name) + 1]) for name in ("--model", "--api-key-file"))
    for file in (model, key_file):
        file.parent.mkdir(exist_ok=True)
    make_chat_model(model)
    key_file.write_text(KEY)
    process = stack.enter_context(Process([sys.executable, SERVER, *words], folder / "llama.log", folder=here))
    wait_http(f"http://{LOOPBACK}:{port}/health", process=process)
    return f"http://{LOOPBACK}:{port}/v1"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Cache, str]]:
    kinds: tuple[Cache, ...] = ("private", "shared")
    with ExitStack() as stack:
        yield {kind: start(stack, tmp_path_factory.mktemp(kind), kind) for kind in kinds}


def cached(base: str, text: str) -> int:
    """Tokens of the prompt that the server says it had computed before."""
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx.post(f"{base}/chat/completions", json=body, headers=headers, trust_env=False, timeout=30)
    return int(answer.raise_for_status().json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_private_server_reuses_nothing_of_earlier_prompts(servers: dict[Cache, str]) -> None:
    cached(servers["private"], SECRET)
    assert [cached(servers["private"], text) for text in (RIGHT, WRONG, SECRET)] == [0, 0, 0]


def test_a_shared_server_reuses_them(servers: dict[Cache, str]) -> None:
    cached(servers["shared"], SECRET)
    right, wrong = cached(servers["shared"], RIGHT), cached(servers["shared"], WRONG)
    assert right > wrong > 0


# --- servers that the kit does not start, or that have a salt: by the gateway's callback


@pytest.fixture(scope="module")
def callback() -> ModuleType:
    return load_callback("corral_cache")


async def routed(callback: ModuleType, base: str, field: str, key: str, text: str, **fields: object) -> Any:
    """The answer to a request of this key through LiteLLM's router, to a deployment with this field."""
    import litellm
    from litellm.router import Router

    info = {"id": "one", **({"cache_field": field} if field else {})}
    deployment = {
        "model_name": "chat",
        "litellm_params": {"model": "openai/chat", "api_base": base, "api_key": KEY},
        "model_info": info,
    }
    litellm.callbacks = [callback.corral_cache]
    await callback.corral_cache.async_pre_call_hook(SimpleNamespace(api_key=key), None, {}, "acompletion")
    router: Any = Router(model_list=[deployment])
    messages = [{"role": "user", "content": text}]
    return await router.acompletion(model="chat", messages=messages, max_tokens=1, **fields)


@pytest.fixture(autouse=True)
def _no_callbacks_left(monkeypatch: pytest.MonkeyPatch) -> None:
    import litellm

    monkeypatch.setattr(litellm, "callbacks", [])


def test_a_client_cannot_turn_the_cache_of_a_private_node_on(callback: ModuleType, servers: dict[Cache, str]) -> None:
    async def reused(field: str, key: str, text: str, **fields: object) -> int:
        answer = await routed(callback, servers["shared"], field, key, text, **fields)
        return int(answer.usage.prompt_tokens_details.cached_tokens)

    async def run() -> None:
        await reused("cache_prompt", "alice", SECRET)
        for text in (RIGHT, WRONG):
            assert await reused("cache_prompt", "mallory", text, cache_prompt=True) == 0
            assert await reused("cache_prompt", "mallory", text, extra_body={"cache_prompt": True, "id_slot": 0}) == 0
        await reused("", "alice", SECRET)
        assert await reused("", "mallory", RIGHT) > 0

    asyncio.run(run())
