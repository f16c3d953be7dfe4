"""Jobs that wait: the rendered store, API and workers of the default farm behind its door, and real faults."""

from __future__ import annotations

import base64
import hmac
import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
import redis
import yaml

from corral.runtime import supervisor
from tests.processes.browser import browsing
from tests.processes.fakes import LOOPBACK, PIECES
from tests.processes.farm import (
    BRIEF,
    EVEN,
    JOBS_MIB,
    MIXED,
    MOST_JOBS,
    POOLS,
    SPARE_TIME,
    Farm,
    body_of,
    in_modes,
    key_of,
)
from tests.processes.helpers import REPOSITORY, Process, serving_http, wait_until

in_slots_mode = in_modes("slots")
pytestmark = pytest.mark.needs("redis")
RUNS = 200
CHAT: Literal["/v1/chat/completions"] = "/v1/chat/completions"
POLLER_KEY = "JOBS_POLLER_TAB"
# On a machine that does much else.
SLOW_S = 240.0
FINISHED = {"succeeded", "failed", "cancelled", "expired"}


def job_of(model: str, text: str = "", **fields: Any) -> dict[str, Any]:
    """A job with a chat request."""
    stream = {"stream": True} if fields.pop("stream", False) else {}
    return {"type": "chat", "request": body_of(model, text, **stream)} | fields


def send(farm: Farm, job: dict[str, Any], **headers: str) -> dict[str, Any]:
    """The job as the farm has taken it; a busy LiteLLM may not answer for a new key in time."""
    answers: list[httpx.Response] = []

    def is_heard() -> bool:
        answers.append(farm.client.post("/v1/jobs", json=job, headers=headers))
        return answers[-1].status_code != 503

    wait_until(is_heard, 60, "the farm hears it")
    assert answers[-1].status_code in {200, 202}, answers[-1].text
    found: dict[str, Any] = answers[-1].json()
    return found


def job(farm: Farm, name: str) -> dict[str, Any]:
    """A job as the farm shows it, once its store answers."""
    answers: list[httpx.Response] = []

    def is_there() -> bool:
        answers.append(farm.client.get(f"/v1/jobs/{name}"))
        return answers[-1].status_code != 503

    wait_until(is_there, 60, "the store answers")
    found: dict[str, Any] = answers[-1].raise_for_status().json()
    return found


def finished(farm: Farm, name: str, deadline_s: float = 60) -> dict[str, Any]:
    """The job once it is finished."""
    wait_until(lambda: job(farm, name)["status"] in FINISHED, deadline_s, f"{name} is finished")
    return job(farm, name)


def succeeded(farm: Farm) -> float:
    """How many jobs have, ever; 0 while the store does not answer."""
    text = httpx.get(f"http://{LOOPBACK}:{farm.ports['jobs']}/metrics", trust_env=False, timeout=60).text
    return sum(float(value) for value in re.findall(r'^corral_jobs_total{what="succeeded"} (\S+)$', text, re.MULTILINE))


def answer_of(found: dict[str, Any]) -> str:
    text: str = found["result"]["choices"][0]["message"]["content"]
    return text


def events(farm: Farm, name: str, last: str = "", most: int | None = None) -> list[tuple[str, str, dict[str, Any]]]:
    """The id, name and data of a job's events after `last`, until the stream ends or there are enough."""
    found: list[tuple[str, str, dict[str, Any]]] = []
    headers = {"Last-Event-ID": last} if last else {}
    with farm.client.stream("GET", f"/v1/jobs/{name}/events", headers=headers) as answer:
        lines: dict[str, str] = {}
        for line in answer.iter_lines():
            if line:
                name_of_field, _, value = line.partition(": ")
                lines[name_of_field] = value
            elif "id" in lines:
                found.append((lines["id"], lines["event"], json.loads(lines["data"])))
                lines = {}
                if len(found) == most:
                    break
    return found


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def worker(farm: Farm, log: Path) -> Process:
    """One more worker of the farm, with two runs at a time."""
    environment: dict[str, str | None] = {"CORRAL_SECRETS_DIR": str(farm.folder / "secrets")}
    return Process([sys.executable, farm.folder / "jobs" / "worker.py"], log, environment=environment)


@contextmanager
def changed(farm: Farm, program: str, **settings: object) -> Iterator[None]:
    """One of the farm's programs with other settings."""
    path = farm.folder / "jobs" / "settings.yaml"
    before = path.read_text()
    assert set(settings) <= set(yaml.safe_load(before))
    path.write_text(yaml.safe_dump(yaml.safe_load(before) | settings))
    try:
        farm.restart(program)
        yield
    finally:
        path.write_text(before)
        farm.restart(program)


@contextmanager
def store_of(farm: Farm) -> Iterator[redis.Redis]:
    """The store, with the rights of the API."""
    password = farm.secrets["JOBS_STORE_PASSWORD"]
    with redis.Redis(LOOPBACK, farm.ports["jobs-store"], username="jobs", password=password) as store:
        yield store


class Sink:
    """A receiver of callbacks that refuses as often as it is told."""

    def __init__(self) -> None:
        self.refusals = 0
        self.seen: list[tuple[bytes, dict[str, str]]] = []
        self.taken: list[dict[str, Any]] = []
        self.faults: list[Callable[[], object]] = []
        """What happens between a callback and its answer, one after the other."""

    @contextmanager
    def listening(self, port: int) -> Iterator[None]:
        sink = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                sink.seen.append((body, dict(self.headers.items())))
                is_refused = len(sink.seen) <= sink.refusals
                if not is_refused:
                    sink.taken.append(json.loads(body))
                if sink.faults:
                    sink.faults.pop(0)()
                self.send_response(500 if is_refused else 204)
                self.end_headers()

            def do_GET(self) -> None:
                """A page without anything, for its origin."""
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        with serving_http(Handler, port):
            yield

    def url(self, farm: Farm) -> str:
        return f"http://{LOOPBACK}:{farm.ports['sink']}/results"


# --- one run


@in_slots_mode
def test_fifty_equal_posts_make_one_run(farm: Farm) -> None:
    sent = job_of("brief", "only once")
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: send(farm, sent, **{"Idempotency-Key": "fifty"}), range(50)))
    assert len({item["id"] for item in found}) == 1
    assert Counter(item["deduped"] for item in found) == {True: 49, False: 1}
    assert answer_of(finished(farm, found[0]["id"])) == "answer of brief-1"
    assert sum(farm.fakes.arrivals(BRIEF).values()) == 1


@in_slots_mode
def test_every_job_is_run_once_while_workers_are_killed_and_frozen_and_the_store_dies(
    farm: Farm, tmp_path: Path
) -> None:
    """Eight runs at a time; only what a lost worker had in hand is run again, and its late result is refused."""
    logs = [tmp_path / f"worker-{number}.log" for number in range(3)]
    farm.fakes.tell(MIXED, service_s=0.2)
    requests = [{"request": body_of("mixed", f"job {number}.")} for number in range(RUNS)]
    before = succeeded(farm)
    batch = send(farm, {"type": "batch", "requests": requests})["id"]

    def done() -> float:
        return succeeded(farm) - before

    with ExitStack() as stack:
        stack.callback(farm.client.delete, f"/v1/jobs/{batch}")
        killed, stopped, _ = [stack.enter_context(worker(farm, log)) for log in logs]
        wait_until(lambda: done() > 30, SLOW_S, "some are done")
        with frozen(stopped.pid):
            os.kill(killed.pid, signal.SIGKILL)
            wait_until(lambda: done() > 60, SLOW_S, "others go on")
            os.kill(farm.pid("jobs-store"), signal.SIGKILL)
            farm.wait_healthy(["jobs-store", "jobs"])
            wait_until(lambda: done() > 120, SLOW_S, "they go on after the store has died")
        found = finished(farm, batch, SLOW_S)
        wait_until(lambda: "the result is refused" in stopped.output, 20, "what the frozen worker says late is refused")
    assert found["status"] == "succeeded"
    runs = found["requests"]
    assert Counter(item["status"] for item in runs) == {"succeeded": RUNS}
    again = [item for item in runs if item["attempts"] > 1]
    # Two runs of each lost worker; those that were being given out as the store died; what a slow machine calls lost.
    assert 1 <= len(again) <= RUNS / 4
    seen = [body["messages"][0]["content"] for fake in farm.fakes.seen().values() for body in fake.bodies]
    times = Counter(seen)
    assert set(times) >= {f"job {number}." for number in range(RUNS)}
    assert sum(times.values()) - RUNS <= sum(item["attempts"] - 1 for item in again)
    for item in again:
        names = [name for _, name, _ in events(farm, item["id"])]
        assert names.count("succeeded") == 1
        assert names[-1] == "succeeded"


@in_slots_mode
def test_a_worker_that_is_stopped_gives_its_job_back(farm: Farm) -> None:
    """Its lease would last for a minute; the fake sees the run that was broken off, and the one that answers."""
    with changed(farm, "jobs-worker", lease_s=60), farm.fakes.behaving(BRIEF, "hold"):
        sent = send(farm, job_of("brief"))["id"]
        wait_until(lambda: farm.fakes.in_flight(BRIEF) == 1, 10, "it runs")
        supervisor.call(farm.folder, "stopProcess", "jobs-worker")
        assert job(farm, sent)["status"] == "queued"
        wait_until(lambda: farm.fakes.in_flight(BRIEF) == 0, 10, "its request is gone")
    found = finished(farm, sent)
    assert (found["status"], found["attempts"]) == ("succeeded", 1)
    assert sum(farm.fakes.arrivals(BRIEF).values()) == 2


@in_slots_mode
def test_restarts_of_all_three_services_lose_no_job(farm: Farm) -> None:
    farm.fakes.tell(MIXED, service_s=0.2)
    requests = [{"request": body_of("mixed", f"job {number}.")} for number in range(60)]
    batch = send(farm, {"type": "batch", "requests": requests})["id"]
    for _ in range(2):
        for program in ("jobs-worker", "jobs", "jobs-store"):
            farm.restart(program)
    found = finished(farm, batch, SLOW_S)
    assert Counter(item["status"] for item in found["requests"]) == {"succeeded": len(requests)}
    for item in found["requests"]:
        assert [name for _, name, _ in events(farm, item["id"])].count("succeeded") == 1


@in_slots_mode
def test_restarts_of_the_gateway_are_no_attempts(farm: Farm) -> None:
    """The run is broken off twice: LiteLLM ends behind HAProxy, and then HAProxy itself."""
    with farm.fakes.behaving(BRIEF, "hold"):
        sent = send(farm, job_of("brief", retries=0))["id"]
        for program in ("litellm", "haproxy"):
            wait_until(lambda: farm.fakes.in_flight(BRIEF) == 1, 60, "it runs")
            os.kill(farm.pid(program), signal.SIGKILL)
            wait_until(lambda: farm.fakes.in_flight(BRIEF) == 0, 30, "its run is broken off")
            farm.wait_healthy([program])
    found = finished(farm, sent)
    assert (found["status"], found["attempts"]) == ("succeeded", 1), found
    assert sum(farm.fakes.arrivals(BRIEF).values()) == 3


@in_slots_mode
def test_a_job_without_model_waits_behind_live_requests(farm: Farm) -> None:
    """It takes the name of a pool's `background`; every slot is held, and one server is let go."""
    slots = sum(POOLS["mixed"].values())
    with farm.fakes.behaving(MIXED, "hold"), ThreadPoolExecutor(slots + 1) as pool:
        held = [pool.submit(farm.ask, "mixed") for _ in range(slots)]
        wait_until(lambda: farm.fakes.in_flight(MIXED) == slots, 30, "all slots are held")
        sent = send(farm, {"request": {"messages": [{"role": "user", "content": "may wait"}]}})["id"]
        wait_until(lambda: farm.queue("mixed") == 1, 20, "the job waits in HAProxy")
        live: Future[httpx.Response] = pool.submit(farm.ask, "mixed", "live")
        wait_until(lambda: farm.queue("mixed") == 2, 20, "a live request waits behind it")
        farm.fakes.tell(["mixed-1"])
        assert finished(farm, sent)["status"] == "succeeded"
        bodies = farm.fakes.seen()["mixed-1"].bodies
        assert [body["messages"][0]["content"] for body in bodies[-2:]] == ["live", "may wait"]
        farm.fakes.tell(MIXED)
        assert {answer.result().status_code for answer in (*held, live)} == {200}
    assert SPARE_TIME in (farm.folder / "jobs" / "settings.yaml").read_text()


@in_slots_mode
def test_a_lost_worker_ends_a_job_without_retries_and_its_late_result_is_refused(farm: Farm, tmp_path: Path) -> None:
    log = farm.folder / "logs" / "jobs-worker.log"
    before = log.stat().st_size
    with farm.fakes.behaving(BRIEF, "hold"):
        sent = send(farm, job_of("brief", retries=0))["id"]
        wait_until(lambda: farm.fakes.in_flight(BRIEF) == 1, 20, "it runs")
        with frozen(farm.pid("jobs-worker")), worker(farm, tmp_path / "other.log"):
            found = finished(farm, sent)
            farm.fakes.tell(BRIEF)
            wait_until(lambda: farm.fakes.in_flight(BRIEF) == 0, 10, "its answer is there")
    assert (found["status"], found["error"]["code"]) == ("failed", "worker_lost")
    late = f"job {sent}: the lease was lost, the result is refused"
    wait_until(lambda: late in log.read_text()[before:], 20, "the late result is refused")
    assert job(farm, sent) == found


@in_slots_mode
def test_a_store_that_is_put_back_has_what_was_kept(farm: Farm, tmp_path: Path) -> None:
    """As `backup` and `restore` do it in containers: a copy of the folder while the program stands still."""
    folder, copy = farm.folder / "data" / "jobs", tmp_path / "copy"
    done = send(farm, job_of("brief"))["id"]
    assert finished(farm, done)["status"] == "succeeded"
    with frozen(farm.pid("jobs-worker")):
        waiting = send(farm, job_of("brief"))["id"]
        with frozen(farm.pid("jobs-store")):
            shutil.copytree(folder, copy)
        farm.client.delete(f"/v1/jobs/{waiting}").raise_for_status()
        supervisor.call(farm.folder, "stopProcess", "jobs-store")
        shutil.rmtree(folder)
        shutil.copytree(copy, folder)
        farm.restart("jobs-store")
        assert job(farm, waiting)["status"] == "queued"
    assert finished(farm, waiting)["status"] == "succeeded"
    assert answer_of(job(farm, done)) == "answer of brief-1"


@in_slots_mode
def test_nothing_starts_after_its_expiry(farm: Farm) -> None:
    sink = Sink()
    with sink.listening(farm.ports["sink"]):
        with frozen(farm.pid("jobs-worker")):
            late = send(farm, job_of("brief", ttl_s=1, callback=sink.url(farm)))["id"]
            time.sleep(1.1)  # the job's own time
        assert finished(farm, late)["status"] == "expired"
        wait_until(lambda: len(sink.taken) == 1, 10, "its sender is told")
    assert sink.taken[0]["error"]["code"] == "expired"
    assert sum(farm.fakes.arrivals(BRIEF).values()) == 0
    stale = farm.client.post("/v1/jobs", json=job_of("brief", ttl_s=5, created_at=time.time() - 6))
    assert (stale.status_code, stale.json()["error"]["code"]) == (400, "expired")


@in_slots_mode
def test_a_failure_that_may_pass_is_tried_again_and_kept_as_a_dead_letter(farm: Farm) -> None:
    failed = finished(farm, send(farm, job_of("mixed", "poison", retries=1))["id"])
    assert (failed["status"], failed["attempts"]) == ("failed", 2)
    assert failed["error"]["message"]
    listed = farm.client.get("/v1/jobs", params={"status": "failed"}).json()["data"]
    assert failed["id"] in {item["id"] for item in listed}
    before = sum(farm.fakes.arrivals(MIXED).values())
    assert farm.client.post(f"/v1/jobs/{failed['id']}/again", json={}).json()["status"] == "queued"
    assert finished(farm, failed["id"])["status"] == "failed"
    assert sum(farm.fakes.arrivals(MIXED).values()) > before
    wrong = finished(farm, send(farm, job_of("no-such-model"))["id"])
    assert (wrong["status"], wrong["attempts"]) == ("failed", 1)


# --- answers


@in_slots_mode
def test_a_stream_of_events_is_resumed_without_loss(farm: Farm) -> None:
    sent = send(farm, job_of("brief", "24 stamps, 60 ms apart", stream=True))["id"]
    first = events(farm, sent, most=4)
    assert job(farm, sent)["status"] == "running", "pieces come before the end"
    rest = events(farm, sent, first[-1][0])
    assert [name for _, name, _ in first[:2]] == ["queued", "running"]
    assert rest[-1][1] == "succeeded"
    pieces = [data["text"] for _, name, data in (*first, *rest) if name == "piece"]
    found = job(farm, sent)
    assert "".join(pieces) == answer_of(found)
    assert len(pieces) > 5
    assert found["result"]["choices"][0]["finish_reason"] == "stop"


@in_slots_mode
def test_a_stream_that_broke_off_begins_anew_and_repeats_nothing(farm: Farm) -> None:
    """The first run is cut after three pieces, slowly enough for some of them to be kept."""
    farm.fakes.tell(BRIEF, "break", service_s=PIECES * 0.4)
    sent = send(farm, job_of("brief", stream=True))["id"]
    wait_until(lambda: farm.fakes.seen()["brief-1"].left == 1, 20, "it is cut")
    farm.fakes.tell(BRIEF)
    assert finished(farm, sent)["attempts"] == 2
    seen = [(name, data.get("text", "")) for _, name, data in events(farm, sent)]
    last = max(at for at, (name, _) in enumerate(seen) if name == "running")
    texts = [["".join(text for _, text in part)] for part in (seen[:last], seen[last:])]
    assert texts == [[texts[0][0]], [answer_of(job(farm, sent))]]
    assert texts[0][0].startswith("piece0 ")
    assert texts[1][0].split() == [f"piece{number}" for number in range(PIECES)]


@in_slots_mode
def test_a_cancelled_job_leaves_its_server(farm: Farm) -> None:
    with farm.fakes.behaving(BRIEF, "hold"):
        sent = send(farm, job_of("brief"))["id"]
        wait_until(lambda: farm.fakes.in_flight(BRIEF) == 1, 10, "it runs")
        assert farm.client.delete(f"/v1/jobs/{sent}").json()["status"] == "cancelled"
        wait_until(lambda: farm.fakes.in_flight(BRIEF) == 0, 10, "its request is gone")
    assert job(farm, sent)["status"] == "cancelled"


@in_slots_mode
def test_embeddings_and_pictures_are_jobs_too(farm: Farm) -> None:
    request = {"model": "vectors", "input": "some text"}
    vectors = finished(farm, send(farm, {"type": "embeddings", "request": request})["id"])
    assert vectors["result"]["data"][0]["embedding"] == [0.25, -0.5]
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, picture]}]
    seen = finished(farm, send(farm, {"type": "vision", "request": {"model": "mixed", "messages": messages}})["id"])
    assert answer_of(seen).startswith("answer of mixed")
    function = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    forced: dict[str, Any] = {"tools": [function], "tool_choice": {"type": "function", "function": {"name": "weather"}}}
    called = finished(farm, send(farm, {"request": body_of("mixed", stream=True, **forced)})["id"])
    call = called["result"]["choices"][0]["message"]["tool_calls"][0]["function"]
    assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Paris"})
    for wrong in ({"type": "adapter_train", "request": {}}, {"request": {"model": "mixed"}}, {"type": "batch"}):
        refused = farm.client.post("/v1/jobs", json=wrong)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_job")
    assert farm.client.get("/v1/jobs/a/b").json()["error"]["code"] == "not_found"


# --- OpenAI's files and batches


@contextmanager
def openai_of(farm: Farm, key: str) -> Iterator[openai.OpenAI]:
    base = f"http://{LOOPBACK}:{farm.ports['gateway']}/v1"
    with openai.OpenAI(base_url=base, api_key=key, max_retries=0, http_client=httpx.Client(trust_env=False)) as client:
        yield client


def lines_of(url: str, *bodies: dict[str, Any]) -> bytes:
    """A file of requests."""
    told = [
        {"custom_id": f"row {at}", "method": "POST", "url": url, "body": body} for at, body in enumerate(bodies)
    ]  # fmt: skip
    return "\n".join(map(json.dumps, told)).encode()


@in_slots_mode
@pytest.mark.needs("postgres", "prisma-engine")
def test_a_batch_of_openais_client(farm: Farm) -> None:
    with openai_of(farm, farm.key) as client, openai_of(farm, key_of(farm, "guest")) as stranger:
        rows = lines_of(CHAT, body_of("mixed", "first."), body_of("no-such-model"), body_of("mixed", "third."))
        sent = client.files.create(file=("rows.jsonl", rows), purpose="batch")
        assert (sent.filename, sent.bytes, client.files.content(sent.id).read()) == ("rows.jsonl", len(rows), rows)
        made = client.batches.create(
            input_file_id=sent.id, endpoint=CHAT, completion_window="24h", metadata={"of": "me"}
        )
        wait_until(lambda: client.batches.retrieve(made.id).status == "completed", 60, "all rows are done")
        done = client.batches.retrieve(made.id)
        assert (done.metadata, done.input_file_id, done.endpoint) == ({"of": "me"}, sent.id, CHAT)
        assert done.request_counts
        counts = done.request_counts
        assert (counts.total, counts.completed, counts.failed) == (3, 2, 1)
        assert done.output_file_id
        assert done.error_file_id
        answers = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
        assert {line["custom_id"] for line in answers} == {"row 0", "row 2"}
        assert answers[0]["response"]["body"]["choices"][0]["message"]["content"].startswith("answer of mixed")
        assert client.files.retrieve(done.output_file_id).purpose == "batch_output"
        [error] = [json.loads(line) for line in client.files.content(done.error_file_id).text.splitlines()]
        assert (error["custom_id"], error["error"]["code"]) == ("row 1", "model_not_found")
        assert made.id in {batch.id for batch in client.batches.list(limit=5)}
        assert sent.id in {file.id for file in client.files.list()}
        for asked in (
            lambda: stranger.batches.retrieve(made.id),
            lambda: stranger.files.content(sent.id),
            lambda: stranger.files.content(str(done.output_file_id)),
            lambda: stranger.batches.create(input_file_id=sent.id, endpoint=CHAT, completion_window="24h"),
        ):
            with pytest.raises(openai.NotFoundError):
                asked()
        assert not list(stranger.batches.list())
        assert not list(stranger.files.list())


@in_slots_mode
def test_a_batch_of_embeddings_is_cancelled_and_wrong_ones_are_refused(farm: Farm) -> None:
    with openai_of(farm, farm.key) as client:
        rows = lines_of("/v1/embeddings", *[{"model": "vectors", "input": "x"}] * 3)
        sent = client.files.create(file=("rows.jsonl", rows), purpose="batch").id
        with frozen(farm.pid("jobs-worker")):
            made = client.batches.create(input_file_id=sent, endpoint="/v1/embeddings", completion_window="24h")
            assert made.status == "in_progress"
            assert client.batches.cancel(made.id).status == "cancelled"
        again = client.batches.create(input_file_id=sent, endpoint="/v1/embeddings", completion_window="24h")
        wait_until(lambda: client.batches.retrieve(again.id).status == "completed", 60, "the second one is done")
        done = client.batches.retrieve(again.id)
        first = json.loads(client.files.content(str(done.output_file_id)).text.splitlines()[0])
        assert first["response"]["body"]["data"][0]["embedding"] == [0.25, -0.5]
        with pytest.raises(openai.BadRequestError) as refused:
            client.batches.create(input_file_id=sent, endpoint=CHAT, completion_window="24h")
        assert (refused.value.code, "line 1" in refused.value.message) == ("invalid_line", True)
        with pytest.raises(openai.BadRequestError):
            client.files.create(file=("rows.jsonl", rows), purpose="fine-tune")
        assert client.files.delete(sent).deleted
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(sent)


# --- pollers


@contextmanager
def polling(farm: Farm) -> Iterator[httpx.Client]:
    """A client with the key of the poller `tab`, whose model is `even`."""
    with farm.new_client((farm.folder / "secrets" / POLLER_KEY).read_text().strip()) as client:
        yield client


def work(client: httpx.Client, path: str, **body: Any) -> httpx.Response:
    return client.post(f"/v1/work/{path}", json=body)


@in_slots_mode
def test_a_poller_fetches_a_job_and_brings_its_answer(farm: Farm) -> None:
    result = {"choices": [{"message": {"role": "assistant", "content": "from a tab"}}]}
    with frozen(farm.pid("jobs-worker")), polling(farm) as tab, ThreadPoolExecutor() as pool:
        send(farm, job_of("brief", ttl_s=1))  # not this poller's
        assert work(tab, "claim", wait_s=0).status_code == 204
        waiting = pool.submit(work, tab, "claim", wait_s=20)
        sent = send(farm, job_of("even", "for a tab"))["id"]
        claimed = waiting.result().json()
        assert (claimed["id"], claimed["type"]) == (sent, "chat")
        assert claimed["request"]["messages"][0]["content"] == "for a tab"
        told = {"lease": claimed["lease"]}
        for _ in range(2):  # a piece that is sent again is one piece
            assert work(tab, f"{sent}/heartbeat", **told, text="from ", number=1).status_code == 200
        assert [name for _, name, _ in events(farm, sent, most=3)] == ["queued", "running", "piece"]
        assert work(tab, f"{sent}/finish", **told).status_code == 400
        assert work(tab, f"{sent}/finish", lease="of another", result=result).status_code == 409
        assert work(tab, f"{sent}/finish", **told, result=result).status_code == 200
        following = send(farm, job_of("even"))["id"]
        second = work(tab, "claim", wait_s=0).json()
        third = send(farm, job_of("even"))["id"]
        told = {"lease": second["lease"], "result": result, "next": {"wait_s": 0}}
        handed = work(tab, f"{following}/finish", **told).json()["next"]
        assert (second["id"], handed["id"]) == (following, third)
        told |= {"lease": handed["lease"]}
        assert work(tab, f"{third}/finish", **told).json() == {"id": third, "next": None}
    assert answer_of(job(farm, sent)) == "from a tab"
    assert sum(farm.fakes.arrivals(EVEN).values()) == 0


@in_slots_mode
@pytest.mark.needs("chromium")
def test_a_page_of_an_allowed_origin_works_as_a_poller(farm: Farm, tmp_path: Path) -> None:
    """In a real browser, through the entrance; a page of another origin gets nothing."""
    key = (farm.folder / "secrets" / POLLER_KEY).read_text().strip()
    script = f"""(async () => {{
        const post = async (path, body) => {{
            const headers = {{"Authorization": "Bearer {key}", "Content-Type": "application/json"}};
            const url = "http://{LOOPBACK}:{farm.ports["entrance"]}/v1/work/" + path;
            return fetch(url, {{method: "POST", headers, body: JSON.stringify(body)}});
        }};
        const {{id, lease, request}} = await (await post("claim", {{wait_s: 10}})).json();
        const beat = await post(id + "/heartbeat", {{lease, text: "from ", number: 1}});
        const content = "from a page: " + request.messages[0].content;
        const end = await post(id + "/finish", {{lease, result: {{choices: [{{message: {{content}}}}]}}}});
        return [id, beat.status, end.status];
    }})()"""
    sink = Sink()
    with sink.listening(farm.ports["sink"]), frozen(farm.pid("jobs-worker")), browsing(tmp_path) as tab:
        tab.open(sink.url(farm))
        sent = send(farm, job_of("even", "hello"))["id"]
        assert tab.value(script) == [sent, 200, 200]
        tab.open(f"http://localhost:{farm.ports['sink']}/")
        assert tab.value(f"{script}.catch((error) => error.name)") == "TypeError"
    assert answer_of(job(farm, sent)) == "from a page: hello"
    assert [data["text"] for _, name, data in events(farm, sent) if name == "piece"] == ["from "]


@in_slots_mode
def test_a_pollers_lost_job_is_done_by_another_and_its_late_answer_refused(farm: Farm) -> None:
    with polling(farm) as tab:
        with frozen(farm.pid("jobs-worker")):
            sent = send(farm, job_of("even"))["id"]
            first = work(tab, "claim").json()
            wait_until(lambda: work(tab, "claim", wait_s=0).status_code == 200, 20, "its lease has ended")
            late = work(tab, f"{sent}/finish", lease=first["lease"], result={"late": True})
            assert (late.status_code, late.json()["error"]["code"]) == (409, "lease_lost")
            assert work(tab, f"{sent}/heartbeat", lease=first["lease"]).status_code == 409
        found = finished(farm, sent)
        late = work(tab, f"{sent}/finish", lease=first["lease"], result={"late": True})
    assert (found["status"], found["attempts"], late.status_code) == ("succeeded", 3, 409)
    assert answer_of(found).startswith("answer of even")


@in_slots_mode
def test_a_pollers_key_opens_nothing_else_and_can_be_revoked(farm: Farm) -> None:
    path = farm.folder / "secrets" / POLLER_KEY
    key = path.read_text()
    with polling(farm) as tab, frozen(farm.pid("jobs-worker")):
        sent = send(farm, job_of("even"))["id"]
        claimed = work(tab, "claim").json()
        for asked in ("/v1/models", "/v1/jobs", f"/v1/jobs/{sent}", "/key/info"):
            assert tab.get(asked).status_code == 401, asked
        assert tab.post("/v1/chat/completions", json=body_of("even")).status_code == 401
        assert tab.get("/v1/work/claim").status_code == 405
        for other in (farm.key, "sk-unknown"):
            with farm.new_client(other) as stranger:
                assert work(stranger, "claim", wait_s=0).status_code == 401
        try:
            path.write_text("sk-another")
            assert work(tab, f"{sent}/finish", lease=claimed["lease"], result={}).status_code == 401
            assert work(tab, "claim", wait_s=0).status_code == 401
        finally:
            path.write_text(key)
    assert answer_of(finished(farm, sent)).startswith("answer of even")


@in_slots_mode
@pytest.mark.needs("postgres", "prisma-engine")
def test_a_poller_gets_no_job_of_a_key_that_may_not_call_its_model(farm: Farm) -> None:
    with farm.new_client(key_of(farm, "AnyDataNext")) as guest, polling(farm) as tab:
        with frozen(farm.pid("jobs-worker")):
            sent = guest.post("/v1/jobs", json=job_of("even")).json()["id"]
            assert work(tab, "claim", wait_s=0).status_code == 204
        wait_until(lambda: guest.get(f"/v1/jobs/{sent}").json()["status"] == "failed", 20, "the gateway refuses it")


# --- callbacks


@in_slots_mode
def test_a_callback_is_repeated_until_it_is_taken_and_signed(farm: Farm) -> None:
    sink = Sink()
    sink.refusals = 2
    callback = {"url": sink.url(farm), "token": "of-the-receiver"}
    with sink.listening(farm.ports["sink"]):
        sent = send(farm, job_of("brief", callback=callback, metadata={"row": 7}))["id"]
        wait_until(lambda: len(sink.taken) == 1, 30, "it is taken in the end")
        wait_until(lambda: job(farm, sent)["callback"]["status"] == "delivered", 10, "and known to be")
    assert len(sink.seen) == 3
    assert sink.taken[0]["metadata"] == {"row": 7}
    assert sink.taken[0]["result"]["choices"][0]["message"]["content"] == "answer of brief-1"
    body, headers = sink.seen[-1]
    headers = {name.lower(): value for name, value in headers.items()}
    assert headers["authorization"] == "Bearer of-the-receiver"

    key = base64.b64decode(farm.client.get("/v1/jobs/signing-key").json()["secret"].removeprefix("whsec_"))
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.digest(key, signed, "sha256")).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    for url in ("http://192.0.2.1/", f"http://{LOOPBACK}:{farm.ports['sink']}@192.0.2.1/", "file:///etc/passwd"):
        refused = farm.client.post("/v1/jobs", json=job_of("brief", callback=url))
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "callback_not_allowed")


@in_slots_mode
def test_no_callback_is_lost(farm: Farm) -> None:
    """Its receiver is away at first; the worker dies between a callback and its note, then the store."""
    sink, quick = Sink(), {"backoff_s": [0.5], "deliver_s": 2, "deliver_within_s": 1}

    def callback(name: str) -> dict[str, Any]:
        found: dict[str, Any] = job(farm, name).get("callback", {})
        return found

    for program in ("jobs-worker", "jobs-store"):
        sink.faults.append(lambda program=program: os.kill(farm.pid(program), signal.SIGKILL))  # type: ignore[misc]
    with changed(farm, "jobs-worker", **quick):
        sent, dead = [send(farm, job_of("brief", callback=sink.url(farm), retries=0))["id"] for _ in range(2)]
        wait_until(lambda: callback(dead).get("status") == "dead", 30, "there is no receiver for too long")
        listed = farm.client.get("/v1/jobs", params={"status": "undelivered"}).json()["data"]
        assert dead in {item["id"] for item in listed}
        with sink.listening(farm.ports["sink"]):
            for name in (sent, dead):
                wait_until(lambda name=name: callback(name).get("status") == "dead", 30, "it is given up")  # type: ignore[misc]
                farm.client.post(f"/v1/jobs/{name}/again", json={}).raise_for_status()
                wait_until(lambda name=name: callback(name).get("status") == "delivered", 60, "it is known")  # type: ignore[misc]
    assert not sink.faults
    assert Counter(headers["webhook-id"] for _, headers in sink.seen) == {sent: 2, dead: 1}
    assert finished(farm, dead)["status"] == "succeeded"


@in_slots_mode
def test_jarvis_clients_enqueue_as_before(farm: Farm) -> None:
    sink = Sink()
    told = {
        "job_id": "mine-1", "job_type": "vision_inference", "request": body_of("mixed"), "ttl": 60, "priority": 5,
        "created_at": "2999-01-01T00:00:00Z", "idempotency_key": "k", "callback_url": sink.url(farm),
    }  # fmt: skip
    with sink.listening(farm.ports["sink"]):
        answers = [farm.client.post("/internal/queue/enqueue", json=told).json() for _ in range(2)]
        wait_until(lambda: len(sink.taken) == 1, 20, "it is told")
        object_of = {"url": sink.url(farm), "auth_type": "bearer", "token": "of-the-receiver"}
        told |= {"job_id": "mine-2", "callback": object_of}
        del told["callback_url"]
        assert farm.client.post("/internal/queue/enqueue", json=told).json()["accepted"]
        wait_until(lambda: len(sink.taken) == 2, 20, "its object of a callback is taken, too")
    assert [answer["deduped"] for answer in answers] == [False, True]
    assert answers[0]["accepted"]
    assert (sink.taken[0]["job_id"], sink.taken[0]["status"]) == ("mine-1", "succeeded")
    assert sink.seen[-1][1]["Authorization"] == "Bearer of-the-receiver"
    schemaless = body_of("mixed", response_format={"type": "json_schema"})
    for wrong, code in (
        ({"callback": object_of | {"auth_type": "basic"}}, "invalid_job"),
        ({"callback": object_of | {"headers": {}}}, "invalid_job"),
        ({"request": schemaless}, "missing_schema"),
    ):
        refused = farm.client.post("/internal/queue/enqueue", json=told | {"job_id": "mine-3"} | wrong)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, code)


# --- keys, limits, secrets


@in_slots_mode
def test_strangers_and_full_queues_are_refused(farm: Farm) -> None:
    sent = send(farm, job_of("brief"))["id"]
    for key in ("", "sk-unknown"):
        with farm.new_client(key) as stranger:
            assert stranger.post("/v1/jobs", json=job_of("brief")).status_code == 401
            assert stranger.get(f"/v1/jobs/{sent}").status_code == 401
    for user, password in ((None, None), ("default", ""), ("jobs", "wrong")):
        with (
            redis.Redis(LOOPBACK, farm.ports["jobs-store"], username=user, password=password) as store,
            pytest.raises(redis.AuthenticationError),
        ):
            store.ping()
    items = [{"request": body_of("brief")}] * (MOST_JOBS + 1)
    full = farm.client.post("/v1/jobs", json={"type": "batch", "requests": items})
    assert (full.status_code, full.headers["Retry-After"]) == (429, "10")


@in_slots_mode
@pytest.mark.needs("postgres", "prisma-engine")
def test_the_queue_is_bounded_over_all_keys_and_a_refused_post_leaves_its_idempotency_key_free(farm: Farm) -> None:
    def waiting() -> int:
        with store_of(farm) as store:
            return int(store.zcard("waiting"))

    wait_until(lambda: waiting() == 0, 30, "nothing waits")
    with changed(farm, "jobs", depth=2), farm.new_client(key_of(farm, "AnyDataNext")) as other:
        headers = {"Idempotency-Key": "refused at first"}
        with frozen(farm.pid("jobs-worker")):
            sent = [send(farm, job_of("brief"))["id"] for _ in range(2)]
            refused = other.post("/v1/jobs", json=job_of("mixed"), headers=headers)
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "10")
            assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert {finished(farm, name)["status"] for name in sent} == {"succeeded"}
        taken = other.post("/v1/jobs", json=job_of("mixed"), headers=headers)
        assert (taken.status_code, taken.json()["deduped"]) == (202, False)


@in_slots_mode
def test_a_full_store_takes_no_job_and_goes_on_with_those_that_it_has(farm: Farm) -> None:
    with store_of(farm) as store:
        with frozen(farm.pid("jobs-worker")):
            sent = send(farm, job_of("brief", stream=True))["id"]
            store.setrange("filler", JOBS_MIB << 20, b"x")
        try:
            assert finished(farm, sent)["status"] == "succeeded"
            refused = farm.client.post("/v1/jobs", json=job_of("brief"))
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "10")
        finally:
            store.delete("filler")
    assert finished(farm, send(farm, job_of("brief"))["id"])["status"] == "succeeded"


@in_slots_mode
@pytest.mark.needs("postgres", "prisma-engine")
def test_a_key_sees_its_own_jobs_only(farm: Farm) -> None:
    sent = send(farm, job_of("brief"))["id"]
    with farm.new_client(key_of(farm, "guest")) as guest:
        assert guest.get(f"/v1/jobs/{sent}").status_code == 404
        assert guest.delete(f"/v1/jobs/{sent}").status_code == 404
        assert guest.get("/v1/jobs").json()["data"] == []
        own = guest.post("/v1/jobs", json=job_of("mixed")).json()["id"]
        wait_until(lambda: guest.get(f"/v1/jobs/{own}").json()["status"] == "failed", 20, "its pools are its own")
    assert finished(farm, sent)["status"] == "succeeded"


@in_slots_mode
def test_no_log_and_no_store_has_what_a_job_says(farm: Farm) -> None:
    found = finished(farm, send(farm, job_of("brief", "zebra crossing", stream=True, metadata={"of": "zebra"}))["id"])
    assert found["status"] == "succeeded"
    finished(farm, send(farm, job_of("mixed", "poison of a zebra", retries=0))["id"])
    with store_of(farm) as store:
        assert store.exists(f"job:{found['id']}")
    files = [*(farm.folder / "logs").glob("jobs*"), *(farm.folder / "data" / "jobs").rglob("*.aof")]
    texts = [path.read_bytes() for path in files]
    assert any(found["id"].encode() in text for text in texts)
    for secret in (b"zebra", b"piece1", farm.key.encode()):
        assert not [path for path, text in zip(files, texts, strict=True) if secret in text]


@in_slots_mode
def test_figures_say_how_many_wait(farm: Farm) -> None:
    url = f"http://{LOOPBACK}:{farm.ports['jobs']}/metrics"
    text = httpx.get(url, trust_env=False).raise_for_status().text
    known = json.loads((REPOSITORY / "monitoring" / "catalogue" / "jobs.json").read_text())["metrics"]
    assert {line.partition(" ")[0].partition("{")[0] for line in text.splitlines()} == set(known)
