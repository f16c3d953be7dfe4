"""When the tokens of a streamed answer arrive: one by one and at once, on every interface, as from LiteLLM alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.processes.fakes import LOOPBACK
from tests.processes.farm import EVEN, Farm, in_modes
from tests.processes.helpers import Process, free_port, wait_http
from tools.bench_gateway import Stack, Stream, litellm_command, percentile, stream

pytestmark = in_modes("slots")

TOKENS = 24
GAP_MS = 30
READS = 20
"""At least so many pieces the tokens arrive in. Held back for 200 ms at a time they came in three."""
SPARE_MS = 10
FIRST_SPARE_MS = 50
ROUNDS = 12
"""A busy machine makes an answer late now and then; what holds tokens back makes every one late."""
WISH = f"{TOKENS} stamps, {GAP_MS} ms apart"
MESSAGES = [{"role": "user", "content": WISH}]
INTERFACES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES},
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


def best(stack: Stack, path: str, before: Stream | None) -> Stream:
    """The better of the answer before and one more: fewest milliseconds, most pieces."""
    found = asyncio.run(stream(stack, "even", path, **INTERFACES[path]))
    assert len(found.late_ms) == TOKENS
    if before is None:
        return found
    late_ms = min(found.late_ms, before.late_ms, key=lambda values: percentile(values, 95))
    return Stream(min(found.first_ms, before.first_ms), late_ms, max(found.reads, before.reads))


@pytest.mark.parametrize("path", INTERFACES)
def test_tokens_arrive_one_by_one_and_on_time(farm: Farm, plain: Stack, path: str) -> None:
    gateway = Stack("gateway", {"even": f"http://{LOOPBACK}:{farm.ports['gateway']}"}, farm.key)
    ours = theirs = None
    for _ in range(ROUNDS):
        theirs = best(plain, "/v1/chat/completions", theirs)
        ours = best(gateway, path, ours)
        is_late = percentile(ours.late_ms, 95) > percentile(theirs.late_ms, 95) + SPARE_MS
        is_slow = ours.first_ms > theirs.first_ms + FIRST_SPARE_MS
        if ours.reads >= READS and not is_late and not is_slow:
            return
    pytest.fail(f"{path} {ours}\nplain LiteLLM {theirs}")
