"""Pools that take turns on one llama-server, and `models ps | load | unload | swap`: real engine, router, HAProxy,
LiteLLM (000-19, 001-07, 002-02, 002-03)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from corral.render.secrets import read_env
from tests.compose.images.build import ensure_images
from tests.compose.project import PREFIX, docker_logs, patiently, streamed_text
from tests.compose.site_up import Site as UpSite
from tests.model_stores import put_in_hub, put_in_ollama
from tests.processes.helpers import wait_until
from tests.tiny_models import make_chat_model

pytestmark = [pytest.mark.needs("docker-engine", "mmdebstrap"), pytest.mark.usefixtures("engine")]

HOST = "ua"
SITE = f"{PREFIX}up"
PORT = 21000
SERVER_PORT = 21190
SLOW, QUICK, LONE = " ".join(map(str, range(1, 350))), "the other one says hello", "alone"
LISTENS = "listening on http://127.0.0.1"
NAMES = ("slow", "quick", "broken")
INVENTORY = """\
schema_version: 1
name: {site}
hosts:
  {host}:
    address: 127.0.0.1
    models_dir: {models}
    model_stores: {{hub: {folder}/hub, ollama: {folder}/ollama}}
    shared: {{turns: {{loaded: 1, turn_s: 2, port: {port}}}}}
models:
  slow: {{source: "slow model.gguf", kind: chat, context: 2048, size_gib: 0.1}}
  quick: {{source: hf:o/quick/sub/quick.gguf, kind: chat, context: 2048, size_gib: 0.01, engine: {{sleep_idle_s: 3}}}}
  broken: {{source: broken.gguf, kind: chat, context: 2048, size_gib: 0.01}}
  lone: {{source: ollama:lone:1b, kind: chat, context: 2048, size_gib: 0.01}}
defaults: {{chat: {{slots: 2, threads: 1, memory_mib: 512}}}}
pools:
  slow: {{model: slow, on: {{host: {host}, shared: turns}}}}
  quick: {{model: quick, on: {{host: {host}, shared: turns}}}}
  broken: {{model: broken, on: {{host: {host}, shared: turns}}}}
  lone: {{model: lone, on: {{host: {host}}}}}
gateway: {{host: {host}, port: 21000, database: false, cache: false, queue: {{depth: 10, timeout_s: 60}}}}
monitoring: {{host: {host}, port: 21090, node_exporter: false, grafana: false, scrape_interval_s: 1}}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpSite]:
    """Three models that take turns, one of them with a file that ends too early, and a server of its own.

    Two of the files are in a Hugging Face cache and in Ollama's folder, and are read there.
    """
    folder = tmp_path_factory.mktemp("shared")
    folder.chmod(0o755)
    models = folder / "models"
    models.mkdir()
    # Slow enough that a stream of it is in flight for seconds.
    make_chat_model(
        models / "slow model.gguf", context=2048, answer=SLOW, width=1024, layers=8, ff=2048, weight_type="q8_0"
    )
    make_chat_model(folder / "quick", context=2048, answer=QUICK)
    make_chat_model(folder / "lone", context=2048, answer=LONE)
    whole = (folder / "quick").read_bytes()
    put_in_hub(folder / "hub", "o/quick", {"sub/quick.gguf": whole})
    put_in_ollama(folder / "ollama", "lone", "1b", (folder / "lone").read_bytes())
    (models / "broken.gguf").write_bytes(whole[: len(whole) // 2])
    made = UpSite(folder)
    made.inventory.write_text(INVENTORY.format(site=SITE, host=HOST, models=models, folder=folder, port=SERVER_PORT))
    ensure_images([made.plan])
    assert "0 were fetched" in made.corral("models", "pull", "quick", "lone")
    made.corral("render", "--quiet")
    made.corral("secrets", "init")
    with made.project:
        patiently(lambda: made.corral("up", "--render"), lambda: set(made.project.states().values()) == {"healthy"})
        yield made


@pytest.fixture
def router(site: UpSite) -> Iterator[httpx.Client]:
    """Somebody with the servers' key at the shared server's own port."""
    key = read_env(site.out / HOST / ".env")["LLAMA_API_KEY"]
    headers = {"Authorization": f"Bearer {key}"}
    base = f"http://127.0.0.1:{SERVER_PORT}"
    # No connection twice: llama-server closes one after a hundred requests, or after five idle seconds, at any moment.
    once = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=base, headers=headers, trust_env=False, timeout=60, limits=once) as client:
        yield client


def states(site: UpSite) -> dict[str, str]:
    return {item["pool"]: item["state"] for item in site.data("models", "ps")}


def in_memory(site: UpSite) -> set[str]:
    return {pool for pool, state in states(site).items() if pool in NAMES and state in {"loaded", "sleeping"}}


def is_answered(site: UpSite) -> bool:
    """Whether the slow model answers; only the beginning, because all of it takes seconds."""
    text = site.client.chat_text("slow", max_tokens=8)
    return bool(text) and SLOW.startswith(text)


def stream(site: UpSite) -> httpx.Response:
    return site.client.chat("slow", stream=True)


def is_streaming(site: UpSite, router: httpx.Client) -> bool:
    """Whether the slow model is at work; asking makes nothing load."""
    answer = router.get("/metrics", params={"model": "slow", "autoload": "false"})
    return "llamacpp:requests_processing 1" in answer.text


def test_requests_swap_models_and_answers_in_flight_end_first(site: UpSite, router: httpx.Client) -> None:
    """002-03: the least recently used goes when another one is asked for; whoever is being answered gets all of it."""
    assert is_answered(site)
    assert in_memory(site) == {"slow"}

    with ThreadPoolExecutor() as pool:
        streaming = pool.submit(stream, site)
        wait_until(lambda: is_streaming(site, router), 30, "a stream in flight")
        assert site.client.chat_text("quick") == QUICK
        assert streamed_text(streaming.result().text) == SLOW

    assert in_memory(site) == {"quick"}


def test_the_command_line_swaps_after_the_stream_in_flight_has_ended(site: UpSite, router: httpx.Client) -> None:
    """000-19, 001-07: `models load`, `unload` and `swap`; already there is no error; nobody is cut off."""
    site.corral("models", "load", "slow")
    assert "in memory already" in site.corral("models", "load", "slow")
    with ThreadPoolExecutor() as pool:
        streaming = pool.submit(stream, site)
        wait_until(lambda: is_streaming(site, router), 30, "a stream in flight")
        words = site.corral("models", "swap", "quick")
        assert "waits for answers in flight to end" in words
        assert streaming.done(), "it was swapped while it answered"
        assert streamed_text(streaming.result().text) == SLOW
    assert in_memory(site) == {"quick"}

    site.corral("models", "load", "slow")
    with ThreadPoolExecutor() as pool:
        streaming = pool.submit(stream, site)
        wait_until(lambda: is_streaming(site, router), 30, "a stream in flight")
        site.corral("models", "unload", "slow")
        assert streamed_text(streaming.result().text) == SLOW
    assert in_memory(site) == set()
    assert is_answered(site), "it comes back when a client asks"


def test_a_swap_that_fails_brings_back_what_ran(site: UpSite) -> None:
    """000-19: a model whose file is broken leaves everything as it was."""
    site.corral("models", "load", "slow")

    words = site.corral("models", "swap", "broken", "--instead-of", "slow", code=1)

    assert "broken does not load" in words
    assert "slow is in memory again, as before" in words
    assert in_memory(site) == {"slow"}
    assert states(site)["broken"] == "failed"
    assert is_answered(site)
    assert "quick is not in memory there" in site.corral("models", "swap", "broken", "--instead-of", "quick", code=2)


def test_what_a_model_takes_is_told_and_given_back(site: UpSite) -> None:
    """002-02: memory of each model, as the kernel counts it for the model's own process."""
    site.corral("models", "load", "slow")
    found = {item["pool"]: item for item in site.data("models", "ps")}

    assert found["slow"]["memory_mib"] > found["lone"]["memory_mib"] > 5, found
    assert found["quick"]["memory_mib"] is None
    assert found["slow"]["planned_mib"] == 512
    assert found["slow"]["card_mib"] is None, "there are no cards"

    site.corral("models", "unload", "slow")
    assert {item["pool"]: item["memory_mib"] for item in site.data("models", "ps")}["slow"] is None


def test_an_idle_model_sleeps_and_figures_do_not_wake_it(site: UpSite) -> None:
    """002-03: auto-unload when idle; Prometheus asks every second all the while, and nothing is loaded by that."""
    assert site.client.chat_text("quick") == QUICK
    before = {item["pool"]: item["memory_mib"] for item in site.data("models", "ps")}["quick"]
    wait_until(lambda: states(site)["quick"] == "sleeping", 30, "the idle model sleeps")
    time.sleep(4)

    found = {item["pool"]: item for item in site.data("models", "ps")}
    assert found["quick"]["state"] == "sleeping"
    assert found["quick"]["memory_mib"] < before
    assert found["slow"]["state"] == "unloaded"
    assert figures(site, 'up{job="llama-shared"}') == {"quick": 1, "slow": 0, "broken": 0}
    assert site.client.chat_text("quick") == QUICK, "a request wakes it"


def figures(site: UpSite, query: str) -> dict[str, int]:
    """Values by pool, from the site's Prometheus."""
    with httpx.Client(trust_env=False) as client:
        answer: Any = client.get("http://127.0.0.1:21090/api/v1/query", params={"query": query}).json()
    return {item["metric"]["pool"]: int(item["value"][1]) for item in answer["data"]["result"]}


def test_the_server_with_one_model_is_stopped_and_started(site: UpSite) -> None:
    """001-07: unload and load without touching anything else."""
    before = site.ids()
    assert site.client.chat_text("lone") == LONE, "LiteLLM has a connection to the balancer on which it was answered"
    site.corral("models", "unload", "lone")
    assert states(site)["lone"] == "stopped"
    assert {site.client.chat("lone").status_code for _ in range(2)} == {503}
    site.corral("models", "load", "lone")

    assert states(site)["lone"] == "running"
    assert site.client.chat_text("lone") == LONE
    assert site.ids() == before


def test_over_http_the_servers_own_key_opens_its_models(site: UpSite, router: httpx.Client) -> None:
    """002-02: load and unload over HTTP, with the key that `secrets init` made; nothing without it."""
    site.corral("models", "load", "slow")
    with httpx.Client(base_url=router.base_url, trust_env=False) as stranger:
        for method, path in (("GET", "/models"), ("POST", "/models/load"), ("POST", "/models/unload")):
            assert stranger.request(method, path, json={"model": "slow"}).status_code == 401
            key = {"Authorization": "Bearer wrong"}
            assert stranger.request(method, path, json={"model": "slow"}, headers=key).status_code == 401
    assert in_memory(site) == {"slow"}

    assert router.post("/models/unload", json={"model": "slow"}).status_code == 200
    wait_until(lambda: in_memory(site) == set(), 30, "nothing in memory")
    assert router.post("/models/load", json={"model": "quick"}).status_code == 200
    wait_until(lambda: in_memory(site) == {"quick"}, 30, "loaded over HTTP")
    listed = {item["id"]: item["status"]["value"] for item in router.get("/models").json()["data"]}
    assert listed["quick"] in {"loaded", "sleeping"}


def test_over_http_a_swap_waits_for_answers_in_flight(site: UpSite, router: httpx.Client) -> None:
    """Asking for another model's properties loads it as a request would: after what is in flight has ended."""
    site.corral("models", "load", "slow")
    with ThreadPoolExecutor() as pool:
        streaming = pool.submit(stream, site)
        wait_until(lambda: is_streaming(site, router), 30, "a stream in flight")
        answer = router.get("/props", params={"model": "quick"})
        assert answer.status_code == 200
        assert streamed_text(streaming.result().text) == SLOW
    assert in_memory(site) == {"quick"}


@pytest.fixture
def door(site: UpSite, router: httpx.Client) -> Iterator[httpx.Client]:
    """Somebody with the servers' key where clients come in."""
    with httpx.Client(
        base_url="http://127.0.0.1:21000", headers=router.headers, trust_env=False, timeout=120
    ) as client:
        yield client


def test_over_http_models_are_swapped_and_unloaded_once_their_answers_have_ended(
    site: UpSite, router: httpx.Client, door: httpx.Client
) -> None:
    """000-19, 002-02: where llama-server's own address would cut answers off, the farm's lets them end."""
    for path, body, state in (
        ("/models/swap", {"model": "quick", "instead_of": "slow"}, {"quick"}),
        ("/models/load", {"model": "quick"}, {"quick"}),
        ("/models/unload", {"model": "slow"}, set()),
    ):
        site.corral("models", "load", "slow")
        with ThreadPoolExecutor() as pool:
            streaming = pool.submit(stream, site)
            wait_until(lambda: is_streaming(site, router), 30, "a stream in flight")
            changing = pool.submit(door.post, path, json=body)
            assert streamed_text(streaming.result().text) == SLOW, path
            answer = changing.result()
        assert answer.status_code == 200, answer.text
        assert in_memory(site) == state, (path, answer.text)
        assert is_answered(site), "requests load it again"


def test_over_http_a_swap_that_fails_brings_back_what_ran(site: UpSite, door: httpx.Client) -> None:
    site.corral("models", "load", "slow")
    answer = door.post("/models/swap", json={"model": "broken", "instead_of": "slow"})
    assert answer.status_code == 502
    assert "slow is in memory again, as before" in answer.json()["error"]["message"]
    assert in_memory(site) == {"slow"}
    assert is_answered(site)


def test_over_http_who_asks_for_nonsense_or_without_the_key_changes_nothing(site: UpSite, door: httpx.Client) -> None:
    site.corral("models", "load", "slow")
    for key in (
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {site.client.key}"},
        {"Authorization": ""},
    ):
        for path in ("/models/load", "/models/unload", "/models/swap"):
            assert door.post(path, json={"model": "slow"}, headers=key).status_code == 401
    asked = {
        400: ({"model": "quick", "instead_of": "broken"}, {}),
        404: ({"model": "lone"}, {"model": 7}, {"model": 'sl"ow'}),
    }
    for status, bodies in asked.items():
        for body in bodies:
            answer = door.post("/models/swap", json=body)
            assert (answer.status_code, bool(answer.json()["error"]["message"])) == (status, True), body
    assert in_memory(site) == {"slow"}


def test_a_pool_that_always_has_a_request_gives_way_to_another(site: UpSite) -> None:
    """llama-server itself would keep the busy one's place for ever; here each has its turn."""
    stop = threading.Event()
    busy: list[int] = []

    def ask_again_and_again() -> None:
        while not stop.is_set():
            busy.append(site.client.chat("quick").status_code)

    assert site.client.chat_text("quick") == QUICK
    with ThreadPoolExecutor() as pool:
        clients = [pool.submit(ask_again_and_again) for _ in range(3)]
        wait_until(lambda: len(busy) > 10, 30, "one pool that is always asked")
        assert is_answered(site)
        before = len(busy)
        wait_until(lambda: len(busy) > before + 10, 60, "the busy one goes on")
        assert is_answered(site), "and gives way again"
        stop.set()
        for client in clients:
            client.result()
    assert set(busy) == {200}


def test_restart_drains_every_pool_of_the_server(site: UpSite, router: httpx.Client) -> None:
    site.corral("models", "load", "slow")
    with ThreadPoolExecutor() as pool:
        streaming = pool.submit(stream, site)
        wait_until(lambda: is_streaming(site, router), 30, "a stream in flight")
        site.corral("restart", "quick")
        assert streamed_text(streaming.result().text) == SLOW
    assert site.client.chat_text("quick") == QUICK


def test_a_model_is_warmed_up_before_its_first_request(site: UpSite) -> None:
    """llama-server makes an empty run by itself once a model is loaded; nothing that is rendered turns that off."""
    text = "".join(path.read_text() for path in sorted((site.out / HOST / "llama").iterdir()) if path.is_file())
    assert "no-warmup" not in text
    assert "turns" in text
    site.edit("threads: 1, memory_mib", "threads: 1, extra_args: [--verbose], memory_mib")
    site.corral("up", "--render")
    assert site.client.chat_text("quick") == QUICK

    wait_until(lambda: LISTENS in docker_logs(site.project, f"{HOST}-turns"), 20, "the engine has its whole log")
    log = docker_logs(site.project, f"{HOST}-turns")
    assert log.index("warming up the model with an empty run") < log.index(LISTENS)


def test_the_models_folder_is_as_it_was(site: UpSite) -> None:
    """Nothing was fetched: the router serves what its presets name, and no more."""
    folder = Path(site.folder / "models")
    assert sorted(path.name for path in folder.iterdir()) == ["broken.gguf", "slow model.gguf"]


def test_a_server_that_is_no_longer_in_the_inventory_ends_its_answers_first(site: UpSite, router: httpx.Client) -> None:
    """The last test here: all pools but one are gone after it."""
    site.corral("models", "load", "slow")
    for name in NAMES:
        site.edit(f"  {name}: {{model: {name}, on: {{host: {HOST}, shared: turns}}}}\n", "")
    with ThreadPoolExecutor() as pool:
        streaming = pool.submit(stream, site)
        wait_until(lambda: is_streaming(site, router), 30, "a stream in flight")
        assert f"{HOST}-turns is not in the inventory any more" in site.corral("up", "--render")
        assert streamed_text(streaming.result().text) == SLOW
    assert f"{HOST}-turns" not in site.project.states()
    assert site.client.chat_text("lone") == LONE
