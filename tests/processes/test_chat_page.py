"""The chat page: the real Open WebUI as rendered, on a real farm with TLS and single sign-on, in a real browser."""

from __future__ import annotations

import base64
import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from tests.needs import postgres_folder
from tests.processes.browser import Tab, browsing
from tests.processes.fakes import LOOPBACK
from tests.processes.farm import EVEN, EVEN_DEPTH, VECTORS, Extras, Farm, Mode, inventory_of, keep_only, running
from tests.processes.helpers import serving_http, wait_until
from tests.processes.identity import ACCOUNT, CLIENT, providing
from tests.processes.test_entrance import make_certificate, ssl_context

pytestmark = pytest.mark.needs("chromium", "haproxy", "open-webui", "postgres", "prisma-engine", "redis")

ADMIN, READER = "admin@example.com", "reader@example.com"
# What each account may ask for, in a minute and at once.
RPM, PARALLEL = 50, 3
READERS_PASSWORD = "a long enough one"
SLOW = "24 stamps, 60 ms apart"
SOUND = b"RIFF sound"
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
PAGE_S = 40.0
NETWORK_CHANGED = "ERR_NETWORK_CHANGED"


class Studio(BaseHTTPRequestHandler):
    """A server that paints, speaks and listens."""

    asked: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012 - of all requests

    def do_GET(self) -> None:
        self._say(b'{"object": "list", "data": []}', "application/json")

    def do_POST(self) -> None:
        told = self.rfile.read(int(self.headers["content-length"]))
        is_form = self.headers["content-type"].startswith("multipart/")
        self.asked.append(
            (self.path, {"model": "studio" if b"studio" in told else ""} if is_form else json.loads(told))
        )
        if is_form:
            assert SOUND in told
            self._say(b'{"text": "the cows are in the corn"}', "application/json")
        elif self.path.endswith("/speech"):
            self._say(SOUND, "audio/mpeg")
        else:
            self._say(json.dumps({"created": 1, "data": [{"b64_json": PIXEL}]}).encode(), "application/json")

    def _say(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with suppress(ConnectionError):  # HAProxy has seen that it is well
            self.wfile.write(body)

    def log_message(self, *_args: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    certificate = tmp_path_factory.mktemp("certificate") / "farm.pem"
    make_certificate(certificate, "farm.example.com")
    with serving_http(Studio) as studio, providing() as provider:

        def site(mode: Mode, ports: dict[str, int], extras: Extras) -> dict[str, Any]:
            made = inventory_of(mode, ports, extras)
            keep_only(made, "even", "vectors")
            del made["gateway"]["extra"], made["jobs"], made["consumers"]
            made.pop("monitoring", None)
            node = {"url": f"http://{LOOPBACK}:{studio}", "model": "studio"}
            for kind in ("image", "speech", "transcription"):
                made["nodes"][kind] = node | {"kind": kind}
                made["pools"][kind] = {"on": {"node": kind}}
            made["pools"]["even"] |= {"background": ["later"], "editor_names": False}
            made["chat"] = {"port": ports["page"], "program_port": ports["open-webui"], "titles": "later"}
            made["chat"]["per_account"] = {"rpm": RPM, "parallel": PARALLEL}
            made["chat"]["sign_on"] = {"url": provider, "client": CLIENT, "secret": "CHAT_SIGN_ON", "title": "the farm"}
            made["gateway"]["entrance"] = {"port": ports["prometheus"], "certificate": str(certificate)}
            return made

        with running("slots", site) as farm:
            yield farm


class Person:
    """Who sits before a tab."""

    def __init__(self, tab: Tab, base: str, certificate: str) -> None:
        self.tab, self.base, self.context = tab, base, ssl_context(Path(certificate))

    def client(self, **options: Any) -> httpx.Client:
        """A program that calls the page."""
        return httpx.Client(base_url=self.base, verify=self.context, trust_env=False, timeout=60, **options)

    def sign_in(self, email: str, password: str) -> None:
        """Comes without a cookie, and has the page ready to chat."""
        self.tab.call("Network.clearBrowserCookies")
        self.tab.call("Storage.clearDataForOrigin", origin=self.base, storageTypes="all")
        self.open(self.base, "#email")
        self.tab.value("document.querySelector('#email').focus()")
        self.tab.call("Input.insertText", text=email)
        self.tab.type("#password", password)
        self.wait("!!document.querySelector('#chat-input')", f"{email} is in")
        # What is new, which the first one hears.
        self.tab.value("[...document.querySelectorAll('button')].find((it) => it.innerText.includes('Okay'))?.click()")
        self.wait(
            "document.querySelector('#model-selector-model-button')?.innerText.includes('even')", "there is a model"
        )

    def open(self, url: str, selector: str) -> None:
        """Goes there; anew when a network that another test made on this machine cuts what is loading."""

        def is_there() -> bool:
            if any(NETWORK_CHANGED in text for text in self.tab.complaints):
                self.tab.open(url)
            return bool(self.tab.value(f"!!document.querySelector('{selector}')"))

        self.tab.open(url)
        wait_until(is_there, PAGE_S, f"{selector} of {url}")

    def wait(self, expression: str, what: str) -> None:
        wait_until(lambda: bool(self.tab.value(expression)), PAGE_S, f"{what}: {self.tab.text()[:500]}")

    def say(self, text: str) -> None:
        self.tab.type("#chat-input", text)

    def call(self, path: str, body: object = None, method: str = "") -> tuple[int, Any]:
        """Status and answer of a call that the page makes for its reader."""
        told = {
            "method": method or ("GET" if body is None else "POST"),
            "headers": {"Content-Type": "application/json", "Authorization": "Bearer "},
            **({} if body is None else {"body": json.dumps(body)}),
        }
        asked = f"""(async () => {{
            const told = {json.dumps(told)};
            told.headers.Authorization += localStorage.token;
            const answer = await fetch({json.dumps(path)}, told);
            return JSON.stringify([answer.status, await answer.text()]);
        }})()"""
        status, text = json.loads(self.tab.value(asked))
        return status, json.loads(text) if text[:1] in ("{", "[", '"') else text


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browsing(tmp_path_factory.mktemp("browser")) as found:
        found.resize(1280, 900)
        found.call("Security.setIgnoreCertificateErrors", ignore=True)
        yield found


@pytest.fixture
def person(farm: Farm, tab: Tab) -> Person:
    """A person at the first account."""
    farm.fakes.tell((*EVEN, *VECTORS))
    farm.fakes.reset()
    entrance = farm.plan.inventory.gateway.entrance
    assert entrance is not None
    assert entrance.certificate
    found = Person(tab, f"https://{LOOPBACK}:{farm.ports['page']}", entrance.certificate)
    found.sign_in(ADMIN, farm.secrets["CHAT_ADMIN_PASSWORD"])
    return found


def complaints(tab: Tab) -> list[str]:
    """What the page complains of, without what another test's new network did to requests of this browser."""
    is_cut = any(NETWORK_CHANGED in text for text in tab.complaints)
    return [text for text in tab.complaints if not is_cut or not re.search(f"{NETWORK_CHANGED}|Failed to fetch", text)]


def test_an_answer_streams_and_is_there_after_a_reload_and_a_restart(farm: Farm, person: Person) -> None:
    tab = person.tab
    person.say(f"How is the barley? {SLOW}")
    pieces = "((document.querySelector('main')?.innerText ?? '').match(/\\d+\\.\\d{6}/g) ?? []).length"
    wait_until(lambda: 0 < tab.value(pieces) < 24, PAGE_S, "the answer is there in part")
    wait_until(lambda: tab.value(pieces) == 24, PAGE_S, "the answer is whole")
    person.wait("location.pathname.startsWith('/c/')", "the conversation has an address")
    wait_until(lambda: sum(farm.fakes.arrivals(EVEN).values()) == 2, PAGE_S, "it has a title, too")
    asked = [body for seen in farm.fakes.seen().values() for body in seen.bodies]
    assert [body for body in asked if "tools" in body] == []

    farm.fakes.reset()
    for text in ("And the rye?", "And the oats?"):
        before = tab.value(pieces)
        person.say(text)
        wait_until(lambda before=before: tab.value(pieces) == before + 24, PAGE_S, "the conversation goes on")  # type: ignore[misc]
    assert sorted(farm.fakes.arrivals(EVEN).values()) == [0, 0, 2]  # one replica has it in its cache
    headers = [name.lower() for seen in farm.fakes.seen().values() for sent in seen.headers for name in sent]
    assert [name for name in headers if "webui" in name] == []
    assert [url for url in tab.requests if not url.startswith((person.base, "data:"))] == []
    assert complaints(tab) == []

    person.call("/api/v1/auths/admin/config", {**person.call("/api/v1/auths/admin/config")[1], "ENABLE_SIGNUP": True})
    farm.restart("chat")
    person.open(tab.value("location.href"), "#chat-input")
    wait_until(lambda: tab.value(pieces) == 3 * 24, PAGE_S, "all of it is there again, for who was signed in")
    assert not person.call("/api/config")[1]["features"]["enable_signup"]  # the inventory says so
    for name in ("chat", "haproxy", "litellm", "postgres"):
        assert "barley" not in (farm.folder / "logs" / f"{name}.log").read_text(errors="replace")


def test_a_second_person_sees_nothing_of_the_first(farm: Farm, person: Person) -> None:
    person.say("The secret of the silo")
    person.wait("location.pathname.startsWith('/c/')", "the conversation has an address")
    chat = person.tab.value("location.pathname").removeprefix("/c/")
    wait_until(lambda: person.call(f"/api/v1/chats/{chat}")[0] == 200, PAGE_S, "the conversation is kept")
    new = {"name": "Reader", "email": READER, "password": READERS_PASSWORD, "role": "user"}
    assert person.call("/api/v1/auths/add", new)[0] == 200

    person.sign_in(READER, READERS_PASSWORD)
    assert person.call(f"/api/v1/chats/{chat}")[0] in {401, 404}
    assert person.call("/api/v1/chats/")[1] == []
    person.open(f"{person.base}/c/{chat}", "#chat-input")
    assert "silo" not in person.tab.text()
    person.say("The reader's own question")
    person.wait(f"location.pathname.startsWith('/c/') && !location.pathname.endsWith('{chat}')", "it is another one")
    own = person.tab.value("location.pathname").removeprefix("/c/")

    person.sign_in(ADMIN, farm.secrets["CHAT_ADMIN_PASSWORD"])
    readers = next(user["id"] for user in person.call("/api/v1/users/")[1]["users"] if user["email"] == READER)
    assert person.call(f"/api/v1/chats/{own}")[0] in {401, 404}
    assert person.call(f"/api/v1/chats/list/user/{readers}")[0] in {401, 403}
    assert person.call("/api/v1/chats/all/db")[0] in {401, 403}


def test_a_full_farm_says_so_on_the_page(farm: Farm, person: Person) -> None:
    body = {"model": "even", "messages": [{"role": "user", "content": "hold"}]}
    with (
        ThreadPoolExecutor(len(EVEN) + EVEN_DEPTH) as threads,
        farm.fakes.behaving(EVEN, "hold"),
        farm.new_client(farm.secrets["CHAT_KEY"]) as client,
    ):
        for _ in range(len(EVEN) + EVEN_DEPTH):
            threads.submit(client.post, "/v1/chat/completions", json=body)
        wait_until(lambda: farm.queue("even") == EVEN_DEPTH, PAGE_S, "the queue is full")
        person.say("Is there room?")
        person.wait("document.body.innerText.includes('even is full: all slots are busy')", "the page says so")


def test_each_account_has_limits_of_its_own(farm: Farm, person: Person) -> None:
    body = {"model": "even", "messages": [{"role": "user", "content": "hi"}]}

    def ask(account: str, key: str = farm.secrets["CHAT_KEY"]) -> httpx.Response:
        return farm.client.post(
            "/v1/chat/completions",
            json=body,
            headers={"X-OpenWebUI-User-Id": account, "Authorization": f"Bearer {key}"},
        )

    seen = [ask("first").status_code for _ in range(RPM + 2)]
    assert (seen[:RPM], seen[-1]) == ([200] * RPM, 429)
    assert ask("second").status_code == 200
    assert "in a minute" in ask("first").json()["error"]["message"]
    assert ask("first", farm.secrets["LITELLM_MASTER_KEY"]).status_code == 200  # the header of another key says nothing
    farm.fakes.reset()
    with ThreadPoolExecutor(PARALLEL) as threads, farm.fakes.behaving(EVEN, "hold"):
        for _ in range(PARALLEL):
            threads.submit(ask, "third")
        wait_until(lambda: sum(farm.fakes.arrivals(EVEN).values()) == PARALLEL, PAGE_S, "so many requests are open")
        assert "open" in ask("third").json()["error"]["message"]
    own = {"name": "Asker", "email": "asker@example.com", "password": READERS_PASSWORD, "role": "user"}
    account = person.call("/api/v1/auths/add", own)[1]["id"]
    person.sign_in(own["email"], own["password"])
    for _ in range(RPM + 1):
        ask(account)
    person.say("May I?")
    person.wait("document.body.innerText.includes('this account has made as many requests')", "the page says so")


def test_it_has_the_farms_chat_models_documents_pictures_and_speech(farm: Farm, person: Person) -> None:
    assert [model["id"] for model in person.call("/api/models")[1]["data"]] == ["even"]
    status, pictures = person.call("/api/v1/images/generations", {"prompt": "a barn"})
    assert status == 200, pictures
    with person.client(cookies=cookies(person)) as client:
        assert client.get(pictures[0]["url"]).content == base64.b64decode(PIXEL)
    assert person.call("/api/v1/audio/speech", {"input": "good morning", "voice": "alloy"})[0] == 200
    with person.client(cookies=cookies(person)) as client:
        client.headers["Authorization"] = f"Bearer {person.tab.value('localStorage.token')}"
        heard = client.post("/api/v1/audio/transcriptions", files={"file": ("note.mp3", SOUND, "audio/mpeg")})
        assert heard.json().get("text") == "the cows are in the corn", heard.text
        answer = client.post("/api/v1/files/", files={"file": ("barn.txt", b"The barn is red.", "text/plain")})
        assert answer.status_code == 200, answer.text
        path = f"/api/v1/files/{answer.json()['id']}/process/status?stream=false"
        wait_until(lambda: client.get(path).json().get("status") == "completed", PAGE_S, "the document is read")
    assert sum(farm.fakes.arrivals(VECTORS).values()) > 0
    routes = ("images/generations", "audio/speech", "audio/transcriptions")
    assert [(path, body["model"]) for path, body in Studio.asked] == [(f"/v1/{route}", "studio") for route in routes]


def cookies(person: Person) -> dict[str, str]:
    """The cookies of the person's browser."""
    found = person.tab.call("Network.getCookies", urls=[person.base])["cookies"]
    return {item["name"]: item["value"] for item in found}


def test_people_come_with_an_account_of_the_provider_once_they_are_let_in(farm: Farm, person: Person) -> None:
    person.sign_in(ADMIN, farm.secrets["CHAT_ADMIN_PASSWORD"])
    admin = {"Authorization": f"Bearer {person.tab.value('localStorage.token')}"}
    person.tab.call("Network.clearBrowserCookies")
    person.tab.call("Storage.clearDataForOrigin", origin=person.base, storageTypes="all")
    person.open(person.base, "#email")
    person.tab.value(
        "[...document.querySelectorAll('button')].find((it) => it.innerText.includes('Continue with the farm')).click()"
    )
    person.wait("document.body?.innerText.includes('Account Activation Pending')", "a new account has to wait")
    found = person.tab.call("Network.getCookies", urls=[person.base])["cookies"]
    assert "token" in {item["name"] for item in found}
    assert [item["name"] for item in found if not (item["secure"] and item["httpOnly"])] == []
    with person.client(headers=admin) as client:
        users = client.get("/api/v1/users/").raise_for_status().json()["users"]
        new = next(user for user in users if user["email"] == ACCOUNT["email"])
        assert new["role"] == "pending"
        body = {"role": "user", **{name: new[name] for name in ("name", "email", "profile_image_url")}}
        client.post(f"/api/v1/users/{new['id']}/update", json=body).raise_for_status()
    person.open(person.base, "#chat-input")
    person.say("What does the provider say?")
    person.wait("location.pathname.startsWith('/c/')", "the new account chats")


def test_the_program_knows_that_browsers_come_over_tls_and_from_where(farm: Farm, person: Person) -> None:
    """The provider sends people back to the address that they used; what a client says of itself counts for nothing."""
    lies = {"X-Forwarded-For": "203.0.113.7", "X-Forwarded-Proto": "http", "X-Forwarded-Host": "evil.example"}
    with person.client(headers=lies) as client:
        moved = urlsplit(client.get("/oauth/oidc/login").headers["location"])
    assert parse_qs(moved.query)["redirect_uri"] == [f"{person.base}/oauth/oidc/callback"]
    assert "203.0.113.7" not in (farm.folder / "logs" / "chat.log").read_text(errors="replace")


def test_strangers_get_no_account_and_the_farms_page_leads_there(farm: Farm, person: Person) -> None:
    new = {"name": "Stranger", "email": "stranger@example.com", "password": READERS_PASSWORD}
    with person.client() as client:
        assert client.post("/api/v1/auths/signup", json=new).status_code == 403
        assert client.get("/api/models").status_code == 401
    assert ["Chat", person.base] in farm.client.get("/page.json").json()["links"]


def test_its_database_and_the_gateways_are_closed_to_each_other(farm: Farm) -> None:
    own, gateways = farm.secrets["CHAT_DATABASE_PASSWORD"], farm.secrets["POSTGRES_PASSWORD"]
    assert asked_of(farm, "open_webui", own, "open_webui") == "0"
    assert asked_of(farm, "litellm", gateways, "corral") == "0"
    assert "no pg_hba.conf entry" in asked_of(farm, "open_webui", own, "corral")
    assert "no pg_hba.conf entry" in asked_of(farm, "litellm", gateways, "open_webui")


def asked_of(farm: Farm, role: str, password: str, database: str) -> str:
    """How many superuser's rights a role has in a database, or why it may not ask."""
    folder = postgres_folder()
    assert folder is not None
    place = f"postgresql://{role}:{password}@{LOOPBACK}:{farm.ports['database']}/{database}"
    query = "SELECT count(*) FROM pg_roles WHERE rolname = current_user AND rolsuper"
    done = subprocess.run(
        [Path(folder) / "psql", place, "-tAc", query], capture_output=True, text=True, timeout=30, check=False
    )
    return done.stdout.strip() or done.stderr
