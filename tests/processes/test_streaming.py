"""When the tokens of a streamed answer arrive: one by one and at once, on every interface, as from LiteLLM alone."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import yaml

from tests.processes.fakes import LOOPBACK
from tests.processes.farm import EVEN, Farm, in_modes
from tests.processes.helpers import Process, free_port, wait_http
from tools.bench_gateway import Stack, litellm_command, percentile, stream

pytestmark = in_modes("slots")

TOKENS = 24
GAP_MS = 30
# Of the tokens so many may come with another. Held back for 200 ms at a time, 21 did.
MOST_TOGETHER = 4
CHAT = "/v1/chat/completions"
SPARE_MS = 10
# LiteLLM has more work with the other interfaces than with chats, which is what it is compared with.
TRANSLATED_SPARE_MS = 50
# A busy machine makes an answer late now and then; what holds tokens back makes every one late.
ROUNDS = 12
WISH = f"{TOKENS} stamps, {GAP_MS} ms apart"
MESSAGES = [{"role": "user", "content": WISH}]
INTERFACES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": MESSAGES},
    "/v1/completions": {"prompt": WISH},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 99},
    "/v1/responses": {"input": WISH},
}

QUIET = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION"}
START_S = 240


@pytest.fixture(scope="module")
def plain(running_farm: Farm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """LiteLLM alone, before one of the farm's fakes."""
    port = free_port()
    parameters = {
        "model": "openai/fake-model",
        "api_base": f"http://{LOOPBACK}:{running_farm.ports[EVEN[0]]}/v1",
        "api_key": "none",
    }
    configuration = tmp_path_factory.mktemp("plain") / "config.yaml"
    models = [{"model_name": "even", "litellm_params": parameters}]
    configuration.write_text(yaml.safe_dump({"model_list": models, "general_settings": {"master_key": "sk-plain"}}))
    log = configuration.with_suffix(".log")
    with Process(litellm_command(configuration, str(port)), log, environment=QUIET) as process:
        base = f"http://{LOOPBACK}:{port}"
        wait_http(f"{base}/health/liveliness", START_S, process=process)
        yield Stack("plain", {"even": base}, "sk-plain")


class Arrival(NamedTuple):
    """How the tokens of one answer arrived; less is better everywhere."""

    # How late the first was.
    first_ms: float
    # How late the others were, 95th percentile.
    late_ms: float
    # Tokens that came with another.
    together: float


NEVER = Arrival(math.inf, math.inf, TOKENS)


def arrival(stack: Stack, path: str) -> Arrival:
    found = asyncio.run(stream(stack, "even", path, **INTERFACES[path]))
    assert len(found.late_ms) == TOKENS
    return Arrival(found.late_ms[0], percentile(found.late_ms, 95), TOKENS - found.reads)


@pytest.mark.parametrize("path", INTERFACES)
def test_tokens_arrive_one_by_one_and_on_time(farm: Farm, plain: Stack, path: str) -> None:
    gateway = Stack("gateway", {"even": f"http://{LOOPBACK}:{farm.ports['gateway']}"}, farm.key)
    spare_ms = SPARE_MS if path == CHAT else TRANSLATED_SPARE_MS
    ours = theirs = NEVER
    for _ in range(ROUNDS):
        theirs = Arrival(*map(min, theirs, arrival(plain, CHAT)))
        ours = Arrival(*map(min, ours, arrival(gateway, path)))
        late_ms = max(ours.first_ms - theirs.first_ms, ours.late_ms - theirs.late_ms)
        if late_ms <= spare_ms and ours.together <= MOST_TOGETHER:
            return
    pytest.fail(f"{path}: {ours}; plain LiteLLM: {theirs}")
