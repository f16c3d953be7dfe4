"""What the gateway's callback tells the balancer about the key of a request."""

from __future__ import annotations

import asyncio
import hashlib
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from corral.gateway.keys import hash_of
from tests.callbacks import load_callback

KEY = hash_of("sk-alice")


@pytest.fixture(scope="module")
def gateway() -> ModuleType:
    return load_callback("corral_gateway")


def sent(gateway: ModuleType, call: str, key: object, **data: object) -> dict[str, Any]:
    """The request as the hook leaves it."""
    found: dict[str, Any] = asyncio.run(
        gateway.CorralGateway().async_pre_call_hook(key, None, {"model": "m", **data}, call)
    )
    return found


@pytest.mark.parametrize(
    ("call", "place"), [("acompletion", "extra_headers"), ("aembedding", "headers"), ("arerank", "headers")]
)
def test_the_key_and_its_weight_go_to_the_balancer(gateway: ModuleType, call: str, place: str) -> None:
    key = SimpleNamespace(api_key=KEY, metadata={"corral_weight": 3})
    assert sent(gateway, call, key)[place] == {"x-corral-consumer": KEY[:32], "x-corral-weight": "3"}
    plain = SimpleNamespace(api_key=KEY, metadata={})
    assert sent(gateway, call, plain)[place] == {"x-corral-consumer": KEY[:32]}


@pytest.mark.slow
def test_the_master_key_is_known_by_its_hash_too(gateway: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    from litellm.proxy import proxy_server

    monkeypatch.setattr(proxy_server, "master_key", "sk-master")
    key = SimpleNamespace(api_key="litellm_proxy_master_key", metadata=None)
    digest = hashlib.sha256(b"sk-master").hexdigest()
    assert gateway.consumer_headers(key) == {"x-corral-consumer": digest[:32]}


def test_a_clients_own_headers_of_the_kit_do_not_count(gateway: ModuleType) -> None:
    key = SimpleNamespace(api_key=KEY, metadata={})
    given = {
        "X-Corral-Consumer": "other",
        "x-corral-weight": "100",
        "X-Corral-Class": "",
        "x-corral-class": "background",
    }
    headers = sent(gateway, "acompletion", key, extra_headers={**given, "x-mine": "1"})["extra_headers"]
    assert headers == {"x-mine": "1", "x-corral-class": "background", "x-corral-consumer": KEY[:32]}
