"""The clients of clients/ at a farm that has less room than they have requests: refused, but answered in the end."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from email.utils import formatdate
from pathlib import Path

import httpx
import pytest
from openai import OpenAIError

from clients import patient
from tests.processes.fakes import LOOPBACK
from tests.processes.farm import EVEN, EVEN_DEPTH, LIMIT_RPM, Farm, in_modes
from tests.processes.helpers import REPOSITORY, Process, wait_until

IN_FLIGHT = 3
QUESTIONS = 4
CLIENTS = 4
NAIVE = 5
# In a slot or in the queue.
PLACES = len(EVEN) + EVEN_DEPTH
REFUSED = "refused, back in"
DONE_S = 240


def environment(farm: Farm) -> dict[str, str | None]:
    return {
        "OPENAI_BASE_URL": f"http://{LOOPBACK}:{farm.ports['gateway']}/v1", "OPENAI_API_KEY": farm.key,
        "http_proxy": None, "HTTP_PROXY": None, "all_proxy": None, "ALL_PROXY": None,
    }  # fmt: skip


@contextmanager
def full(farm: Farm, clients: list[Process]) -> Iterator[None]:
    """All these clients at once while no answer comes: on return every place is taken, and the rest was refused."""
    farm.fakes.tell(EVEN, "hold")
    with ExitStack() as running:
        for client in clients:
            running.enter_context(client)
        wait_until(lambda: farm.fakes.in_flight(EVEN) == len(EVEN), DONE_S, "all slots are taken")
        wait_until(lambda: farm.queue("even") == EVEN_DEPTH, DONE_S, "the queue is full")
        wait_until(lambda: any(REFUSED in client.output for client in clients), DONE_S, "a client was refused")
        yield
        farm.fakes.tell(EVEN, service_s=0.05)
        codes = [client.wait(DONE_S) for client in clients]
        assert codes == [0] * len(clients), "\n".join(client.output for client in clients)


def ask_at_once(farm: Farm, count: int) -> list[httpx.Response]:
    with ThreadPoolExecutor(count) as threads:
        return list(threads.map(lambda _: farm.ask("even"), range(count)))


@in_modes("slots")
def test_patient_clients_are_all_answered_where_naive_ones_are_refused(farm: Farm, tmp_path: Path) -> None:
    """004-F17: at overload every request of those who keep the contract is answered, each exactly once."""
    clients = []
    for number in range(CLIENTS):
        asked = tmp_path / f"questions-{number}.txt"
        asked.write_text("".join(f"client {number}, question {item}\n" for item in range(QUESTIONS)))
        words = [sys.executable, str(REPOSITORY / "clients" / "patient.py"), "even", "--in-flight", str(IN_FLIGHT)]
        command = ["sh", "-c", 'exec "$@" < "$0"', str(asked), *words]
        clients.append(Process(command, tmp_path / f"{number}.log", environment=environment(farm)))
    assert CLIENTS * IN_FLIGHT > PLACES
    with full(farm, clients):
        refused = ask_at_once(farm, NAIVE)
        assert [answer.status_code for answer in refused] == [429] * NAIVE
        assert all(float(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert farm.fakes.in_flight(EVEN) + farm.queue("even") == PLACES
    for client in clients:
        rows = [json.loads(line) for line in client.output.splitlines() if line.startswith("{")]
        assert [row["question"] for row in rows] == Path(client.command[3]).read_text().splitlines()
        assert all(row["answer"].startswith("piece0 ") for row in rows)
    seen = farm.fakes.seen()
    assert sum(seen[name].arrivals for name in EVEN) == CLIENTS * QUESTIONS
    assert {seen[name].most_in_flight for name in EVEN} == {1}


@pytest.mark.needs("curl")
@in_modes("slots")
def test_the_shell_client_comes_back_until_it_is_answered(farm: Farm, tmp_path: Path) -> None:
    """004-F17: the same with xargs and curl."""
    count = PLACES + IN_FLIGHT
    for number in range(count):
        body = {"model": "even", "messages": [{"role": "user", "content": f"question {number}"}]}
        (tmp_path / f"{number}.json").write_text(json.dumps(body))
    line = f"printf '%s\\n' \"$0\"/*.json | xargs -n 1 -P {count} clients/ask.sh"
    client = Process(["sh", "-c", line, str(tmp_path)], tmp_path / "log", environment=environment(farm))
    with full(farm, [client]):
        pass
    assert client.output.count("answer of even-") == count
    assert client.output.count(REFUSED) >= IN_FLIGHT
    assert sum(farm.fakes.arrivals(EVEN).values()) == count
    assert farm.key not in client.output


@pytest.mark.needs("curl")
@in_modes("slots")
def test_the_shell_client_says_what_is_wrong(farm: Farm, tmp_path: Path) -> None:
    (tmp_path / "body.json").write_text(json.dumps({"model": "no-such", "messages": []}))
    client = Process(["clients/ask.sh", tmp_path / "body.json"], tmp_path / "log", environment=environment(farm))
    with client:
        assert client.wait(DONE_S) == 1
    assert "no-such" in client.output


@in_modes("slots")
def test_a_stream_that_breaks_is_no_answer(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    """B5: what came of it is handed on, the end is an error, and nobody asks again."""
    for name, value in environment(farm).items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    farm.fakes.tell(EVEN, "break", service_s=1.2)
    pieces = []
    with pytest.raises((patient.BrokenStreamError, OpenAIError)):  # noqa: PT012 - pieces before the error count
        for piece in patient.PatientClient(1).stream(model="even", messages=[{"role": "user", "content": "hello"}]):
            pieces.append(piece)  # noqa: PERF402
    assert pieces == ["piece0 ", "piece1 ", "piece2 "]
    assert sum(farm.fakes.arrivals(EVEN).values()) == 1


@in_modes("slots")
def test_refusals_by_a_limit_say_when_to_come_back(farm: Farm) -> None:
    """What the contract rests on: the pool's limit a minute says Retry-After, too."""
    answers = [farm.ask("limited") for _ in range(LIMIT_RPM + 1)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert all(patient.pause_s(answer.headers.get("retry-after"), 0) for answer in refused)


@pytest.mark.parametrize("attempt", [0, 1, 5, 40])
def test_nobody_returns_early_and_the_range_doubles(attempt: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda _least, most: most)
    assert patient.pause_s("2", attempt) == 2 + min(patient.LONGEST_SPREAD_S, 2 * 2**attempt)
    monkeypatch.setattr(random, "uniform", lambda least, _most: least)
    assert patient.pause_s("2", attempt) == 2


def test_a_date_in_retry_after_is_understood_and_none_is_final() -> None:
    wait = patient.pause_s(formatdate(usegmt=True), 0)
    assert wait is not None
    assert 0 <= wait <= 1
    assert patient.pause_s(None, 0) is None
