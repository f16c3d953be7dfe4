"""`backup` and `restore` in a real engine: keys, spend, accounts and files survive the loss of the machine."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from corral.build import Plan, build_plan
from corral.config.load import load_inventory
from corral.gateway.routes import CONSUMER_ROUTES
from corral.render.secrets import read_env
from corral.verbs.archives import passphrase
from tests.compose import command
from tests.compose.far import Sshd, client_config
from tests.compose.images.build import ensure_images
from tests.compose.project import PREFIX, Client, Project, docker, docker_logs, patiently, reached_from
from tests.processes.helpers import Process, wait_until
from tests.processes.wires import orders
from tests.tiny_models import KNOWN_ANSWER, make_chat_model

pytestmark = pytest.mark.needs("docker-engine", "mmdebstrap", "open-webui", "prisma-engine", "sshd")

HOST = "ba"
SITE = f"{PREFIX}backup"
PORT = 21700
ADMIN_PORT = 21702
TUNNEL, LAPTOP, OLLAMA = 21710, 21711, 21713
PAGE_PORT = 21703
PAGE = f"http://127.0.0.1:{PAGE_PORT}"
READER = {"name": "Reader", "email": "reader@example.com", "password": "a long enough one", "role": "user"}
QUESTION = "Where is the barley?"
PASSPHRASE = "open sesame, slowly"
RUN_LIMIT_S = 900
WRITTEN_LIMIT_S = 300
START_LIMIT_S = "600"
KEPT = "a picture's settings"
CORRAL = (sys.executable, "-c", "import sys; from corral.cli import main; sys.exit(main())")
INVENTORY = """\
schema_version: 1
name: {site}
hosts:
  {host}: {{address: 127.0.0.1, models_dir: {models}}}   # one machine
models:
  tiny: {{source: tiny.gguf, kind: chat, context: 2048, size_gib: 0.01}}
  painter:
    {{source: "hf:example/painter", revision: "1111111111111111111111111111111111111111", kind: image, size_gib: 0.01}}
nodes:
  laptop: {{dials_in: 21711, engine: ollama, model: "llama3.2:3b"}}   # dials in
pools:
  far: {{on: {{node: laptop}}}}
  chat:
    model: tiny
    on: {{host: {host}}}
    engine: {{slots: 2, threads: 1, memory_mib: 512}}
    price: {{input_usd_per_million: 1000, output_usd_per_million: 1000}}   # so that there is something to spend
  image: {{model: painter, on: {{host: {host}}}, engine: {{memory_mib: 512}}}}
gateway:
  host: {host}
  port: {port}
  admin_port: 21702
  cache: false
  conversations: {{keep: 24h}}
  tunnel: {{port: 21710}}
chat: {{port: 21703, pools: [chat]}}
jobs: {{workers: 1}}
"""


@dataclass(slots=True)
class Place:
    """A folder on a machine with an inventory and its rendering, or without any yet."""

    folder: Path
    environment: Mapping[str, str]

    @property
    def out(self) -> Path:
        return self.folder / "compose"

    @property
    def plan(self) -> Plan:
        return build_plan(load_inventory(self.folder / "inventory.yaml"))

    @property
    def project(self) -> Project:
        return Project(self.plan, HOST, self.out, f"{SITE}-{HOST}")

    @property
    def secrets(self) -> dict[str, str]:
        return read_env(self.out / HOST / ".env")

    def arguments(self, *words: str) -> list[str]:
        return [*words, "--inventory", str(self.folder / "inventory.yaml"), "--out", str(self.out)]

    def corral(self, *words: str, code: int = 0, **environment: str) -> str:
        """All that a verb prints; it has to end with the given code."""
        done = command.run(self.arguments(*words), {**self.environment, **environment}, is_joined=True)
        assert done.returncode == code, f"{words} ended with {done.returncode}:\n{done.stdout}"
        assert "Traceback" not in done.stdout, done.stdout
        return done.stdout

    def start(self) -> None:
        """`up`, with patience for a busy machine."""
        patiently(
            lambda: self.corral("up", "--timeout", START_LIMIT_S),
            lambda: set(self.project.states().values()) == {"healthy"},
        )

    def client(self, key: str = "") -> Client:
        return Client(f"http://127.0.0.1:{PORT}", key or self.secrets["LITELLM_MASTER_KEY"])


@dataclass(slots=True)
class Reader:
    """What an account of the chat page keeps there."""

    conversation: str
    file: str


@dataclass(slots=True)
class Talk:
    """A conversation that the gateway keeps: an answer, a session, and the tokens that the next turn has before it."""

    answer: str
    session: str
    tokens: int


@dataclass(slots=True)
class Saved:
    """A running site, a key with what it has spent, and the backup of it."""

    place: Place
    archive: Path
    key: str
    spend: float
    # A job that is done.
    job: str
    reader: Reader
    talk: Talk
    # What a machine needs to dial in.
    worker: Path


@pytest.fixture(scope="module")
def saved(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    folder = tmp_path_factory.mktemp("backup")
    (folder / "models").mkdir()
    (folder / "first").mkdir()
    make_chat_model(folder / "models" / "tiny.gguf", context=2048)
    (folder / "models" / "example--painter--111111111111").mkdir()
    place = Place(folder / "first", {"CORRAL_PASSPHRASE": PASSPHRASE})
    text = INVENTORY.format(site=SITE, host=HOST, models=folder / "models", port=PORT)
    (place.folder / "inventory.yaml").write_text(text)
    (place.folder / "models.lock.json").write_text('{"version": 1, "files": {}}\n')
    ensure_images([place.plan])
    place.corral("render", "--quiet")
    with place.project:
        place.corral("secrets", "init")
        place.start()
        wanted = {"models": ["chat"], "key_alias": "client", "allowed_routes": CONSUMER_ROUTES}
        made = place.client().admin(ADMIN_PORT).send("POST", "/key/generate", wanted)
        key = str(made.raise_for_status().json()["key"])
        assert place.client(key).chat_text("chat") == KNOWN_ANSWER
        wait_until(lambda: spend_of(place, key) > 0, WRITTEN_LIMIT_S, "the gateway writes down what was spent")
        spent = spend_of(place, key)
        job = send_job(place, key)
        wait_until(lambda: state_of(place, key, job)["status"] == "succeeded", WRITTEN_LIMIT_S, "the job is done")
        wait_until(lambda: spend_of(place, key) > spent, WRITTEN_LIMIT_S, "its spending, too, is written down")
        reader, talk = keep_something(place), begin_talk(place, key)
        place.corral("workers", "issue", "laptop", "--port", str(OLLAMA), "--to", str(folder / "worker"))
        worker_answers(place, folder / "worker")
        docker(
            "exec",
            "--privileged",
            f"{HOST}-image-1",
            "sh",
            "-c",
            f'echo "{KEPT}" >/data/kept && chown 123:456 /data/kept',
        )
        archive = folder / "site.backup"
        written = spend_of(place, key)  # the gateway writes later requests down after a while
        said = place.corral("backup", "--to", str(archive))
        assert said.splitlines()[-1] == str(archive)
        place.project.wait_healthy(WRITTEN_LIMIT_S)
        yield Saved(place, archive, key, written, job, reader, talk, folder / "worker")


def spend_of(place: Place, key: str) -> float:
    found = place.client().admin(ADMIN_PORT).send("GET", f"/key/info?key={key}")
    return float(found.raise_for_status().json()["info"]["spend"])


def send_job(place: Place, key: str) -> str:
    request = {"model": "chat", "messages": [{"role": "user", "content": "hello"}]}
    return str(place.client(key).send("POST", "/v1/jobs", {"request": request}).raise_for_status().json()["id"])


def state_of(place: Place, key: str, job: str) -> dict[str, Any]:
    state: dict[str, Any] = place.client(key).send("GET", f"/v1/jobs/{job}").raise_for_status().json()
    return state


@contextmanager
def person(email: str, password: str) -> Iterator[httpx.Client]:
    """A person who has signed in to the chat page."""
    with httpx.Client(base_url=PAGE, trust_env=False, timeout=60) as client:
        answer = client.post("/api/v1/auths/signin", json={"email": email, "password": password})
        client.headers["Authorization"] = f"Bearer {answer.raise_for_status().json()['token']}"
        yield client


def keep_something(place: Place) -> Reader:
    """The administrator makes an account, with which a person asks and leaves a file."""
    with person("admin@example.com", place.secrets["CHAT_ADMIN_PASSWORD"]) as admin:
        admin.post("/api/v1/auths/add", json=READER).raise_for_status()
    with person(READER["email"], READER["password"]) as reader:
        message = {"role": "user", "content": QUESTION}
        asked = {"model": "chat", "messages": [message], "stream": False}
        answer = reader.post("/api/chat/completions", json=asked).raise_for_status().json()
        said = answer["choices"][0]["message"]
        assert said["content"] == KNOWN_ANSWER
        chat = {"title": "Barley", "models": ["chat"], "messages": [message, said]}
        kept = reader.post("/api/v1/chats/new", json={"chat": chat}).raise_for_status().json()
        file = {"file": ("barn.txt", KEPT.encode(), "text/plain")}
        sent = reader.post("/api/v1/files/", params={"process": "false"}, files=file).raise_for_status().json()
    return Reader(kept["id"], sent["id"])


def answer_of(place: Place, key: str, **more: str) -> dict[str, Any]:
    request = {"model": "chat", "input": QUESTION, **more}
    answer: dict[str, Any] = place.client(key).send("POST", "/v1/responses", request).raise_for_status().json()
    return answer


def begin_talk(place: Place, key: str) -> Talk:
    """Two turns of a conversation, and one of a session."""
    first = answer_of(place, key)
    second = answer_of(place, key, previous_response_id=first["id"])
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]
    session = place.client(key).send("POST", "/v1/sessions", {}).raise_for_status().json()["id"]
    assert place.client(key).chat_text("chat", content=QUESTION, session_id=session) == KNOWN_ANSWER
    return Talk(first["id"], session, second["usage"]["input_tokens"])


def all_is_kept(place: Place, saved: Saved) -> None:
    """What the gateway keeps of conversations; and both accounts, the conversation and the file on the chat page."""
    reader, talk = saved.reader, saved.talk
    turn = answer_of(place, saved.key, previous_response_id=talk.answer)
    assert turn["usage"]["input_tokens"] == talk.tokens
    told = place.client(saved.key).send("GET", f"/v1/sessions/{talk.session}/messages").raise_for_status().json()
    assert [message["content"] for message in told["data"]] == [QUESTION, KNOWN_ANSWER]
    admin = person("admin@example.com", place.secrets["CHAT_ADMIN_PASSWORD"])
    with admin, person(READER["email"], READER["password"]) as client:
        chat = client.get(f"/api/v1/chats/{reader.conversation}").raise_for_status().json()["chat"]
        assert [message["content"] for message in chat["messages"]] == [QUESTION, KNOWN_ANSWER]
        assert client.get(f"/api/v1/files/{reader.file}/content").raise_for_status().text == KEPT


@contextmanager
def dialling(place: Place, folder: Path) -> Iterator[str]:
    """A worker that connects with Docker and what `workers issue` gave it, and answers: its container."""
    project = f"{PREFIX}worker"
    words = ("compose", "--project-name", project, "--file", str(folder / "compose.yaml"), "--profile", "worker")
    with Process(orders.command("ollama", OLLAMA), folder.with_suffix(".log")):
        try:
            docker(*words, "up", "--detach")
            wait_until(lambda: is_connected(place), WRITTEN_LIMIT_S, "the worker is connected")
            yield f"{project}-corral-worker-laptop-1"
        finally:
            docker(*words, "down", "--timeout", "1")


def is_connected(place: Place) -> bool:
    rows = {row["name"]: row for row in json.loads(place.corral("workers", "ls", "--json"))}
    return bool(rows["laptop"]["connected"])


def worker_answers(place: Place, folder: Path) -> None:
    with dialling(place, folder):
        assert place.client().chat_text("far", content=orders.order(["from the laptop"])) == "from the laptop"


def empty_place(saved: Saved, name: str) -> Place:
    folder = saved.place.folder.parent / name
    folder.mkdir()
    return Place(folder, saved.place.environment)


# --- what is in it ---------------------------------------------------------------------------------------------------


def test_a_backup_is_its_owners_alone_and_lists_what_it_has(saved: Saved) -> None:
    assert saved.archive.stat().st_mode & 0o777 == 0o600
    said = saved.place.corral("restore", str(saved.archive), "--list", COLUMNS="160")
    for words in (
        "ba/postgres: database (keys, budgets and spend)",
        "ba/image-1: data",
        "ba/jobs-store: ",
        "ba/postgres: open_webui (accounts and conversations of the chat page)",
        "ba/chat: chat-files",
        "secrets, sealed",
        "whole",
    ):
        assert words in said
    listed: dict[str, Any] = json.loads(saved.place.corral("restore", str(saved.archive), "--list", "--json"))
    assert listed["has_secrets"]
    saved_states = {"chat-files", "configuration", "data", "database", "jobs", "open_webui"}
    assert {state["name"] for state in listed["states"]} == saved_states
    assert set(listed["images"][HOST]) == {service.image for service in saved.place.plan.services_of(HOST)}
    assert all(image.startswith("sha256:") for image in listed["images"][HOST].values())


def test_nothing_can_be_read_in_a_backup_and_no_secret_in_what_is_sealed(saved: Saved) -> None:
    assert b"LITELLM_MASTER_KEY" not in saved.archive.read_bytes()
    with saved.archive.open("rb") as file:
        assert file.readline() == passphrase.MARK
        with passphrase.decrypted(file, PASSPHRASE) as inside:
            content = gzip.decompress(inside.read())
    assert b"LITELLM_MASTER_KEY" in content  # names, yes
    assert [name for name, value in saved.place.secrets.items() if value.encode() in content] == []
    assert saved.key.encode() not in content


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_damaged_archive_and_a_wrong_passphrase_change_nothing(saved: Saved) -> None:
    place = empty_place(saved, "refused")
    data = bytearray(saved.archive.read_bytes())
    data[len(data) // 2] ^= 1
    damaged = saved.archive.with_name("damaged.backup")
    damaged.write_bytes(data)
    assert "damaged" in place.corral("restore", str(damaged), code=1)
    assert "damaged" in place.corral("restore", str(damaged), "--list", code=1)
    said = place.corral("restore", str(saved.archive), code=1, CORRAL_PASSPHRASE="open barley")
    assert "the passphrase is wrong" in said
    assert "set CORRAL_PASSPHRASE" in place.corral("restore", str(saved.archive), code=2, CORRAL_PASSPHRASE="")
    assert list(place.folder.iterdir()) == []


def test_a_place_that_is_not_empty_is_left_alone(saved: Saved) -> None:
    before = saved.place.project.ids()
    inventory = saved.place.folder / "inventory.yaml"
    text = inventory.read_text()
    inventory.write_text(f"{text}# changed since\n")
    try:
        said = saved.place.corral("restore", str(saved.archive), code=2)
        for words in (
            "inventory.yaml, another one",
            "10 containers of this site",
            f"{SITE}-{HOST}_database",
            "--replace",
        ):
            assert words in said
        said = saved.place.corral("restore", str(saved.archive), "--replace", code=2)
        assert "this would be lost" in said
        assert "--yes" in said
        assert inventory.read_text() != text
    finally:
        inventory.write_text(text)
    assert saved.place.project.ids() == before


def test_an_existing_file_and_a_short_passphrase_are_refused_before_anything_is_asked_of_the_host(saved: Saved) -> None:
    said = saved.place.corral("backup", "--to", str(saved.archive), code=1)
    assert "is there already; name another file" in said
    said = saved.place.corral("backup", code=2, CORRAL_PASSPHRASE="short")
    assert "at least 12 characters" in said


# --- bad weather -----------------------------------------------------------------------------------------------------


def test_a_killed_backup_leaves_no_file_and_no_service_standing_still(saved: Saved) -> None:
    target = saved.archive.with_name("killed.tar.gz")
    part = target.with_name(f".{SITE}.backup.part")
    words = [*CORRAL, *saved.place.arguments("backup", "--to", str(target))]
    with Process(words, saved.archive.with_name("log"), environment=dict(saved.place.environment)) as process:
        wait_until(lambda: part.is_dir() and any(part.iterdir()), RUN_LIMIT_S, "the first part of the backup")
        os.kill(process.pid, signal.SIGKILL)
        process.wait(RUN_LIMIT_S)
    assert not target.exists()
    wait_until(lambda: "paused" not in saved.place.project.states().values(), RUN_LIMIT_S, "nothing stands still")
    saved.place.corral("backup", "--plain", "--to", str(target))
    assert tarfile.is_tarfile(target)
    assert "whole" in saved.place.corral("restore", str(target), "--list")
    assert not part.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="mounts need root")
def test_a_full_disk_is_said_and_leaves_nothing(saved: Saved, tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=True)
    try:
        said = saved.place.corral("backup", "--to", str(tmp_path / "a.tar.gz"), code=1)
        assert "No space left on device; there is no backup of this run" in said
        assert list(tmp_path.iterdir()) == []
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert "paused" not in saved.place.project.states().values()


def test_a_service_that_does_not_run_cannot_be_saved_and_is_named(saved: Saved) -> None:
    docker("stop", f"{HOST}-postgres")
    try:
        said = saved.place.corral("backup", "--to", str(saved.archive.with_name("never.tar.gz")), code=1)
        assert "ba/postgres: database (keys, budgets and spend) cannot be saved" in said
        assert "./generate.py up --host ba" in said
    finally:
        docker("start", f"{HOST}-postgres")
        saved.place.project.wait_healthy()


# --- the drill -------------------------------------------------------------------------------------------------------


@pytest.mark.needs("sshd")
@pytest.mark.skipif(os.getuid() != 0, reason="sshd needs root")
def test_over_ssh_and_without_secrets_it_says_what_to_supply_and_the_data_comes_back(
    saved: Saved, tmp_path: Path
) -> None:
    """Saved from and brought back to a host behind ssh; the secrets of the new place are others."""
    with Sshd("corral-test", tmp_path / "sshd", docker_host=os.environ.get("DOCKER_HOST", "")) as sshd:
        far = Place(saved.place.folder, client_config([sshd], tmp_path / "ssh_config"))
        inventory = saved.place.folder / "inventory.yaml"
        text = inventory.read_text()
        inventory.write_text(text.replace("models_dir:", f"ssh: corral-test, folder: {tmp_path}/far, models_dir:"))
        archive = tmp_path / "far.tar.gz"
        try:
            far.corral("backup", "--without-secrets", "--to", str(archive))
        finally:
            inventory.write_text(text)
        saved.place.corral("down", "--volumes", "--yes")
        place = Place(empty_place(saved, "second").folder, far.environment)
        said = place.corral("restore", str(archive), code=2)
        assert "ssh corral-test" in said
        assert "if that is meant, add --yes" in said
        said = place.corral("restore", str(archive), "--yes", code=1)
        assert "NOT AUTHENTICATED" in said
        for words in ("the backup has no secrets", f"{place.out}/{HOST}/.env", "LITELLM_SALT_KEY  (encrypts", "again"):
            assert words in said
        place.corral("secrets", "init")
        said = place.corral("restore", str(archive), "--yes")
        assert "ba/postgres: database (keys, budgets and spend): is back" in said
        query = "SELECT count(*) FROM \"LiteLLM_VerificationToken\" WHERE key_alias = 'client' AND spend > 0"
        login = ["--port", "5432", "--username", "litellm", "--dbname", "corral"]
        psql = ["psql", *login, "--tuples-only", "--no-align", "--command", query]
        assert docker("exec", f"{HOST}-postgres", *psql).strip() == "1"
        assert (tmp_path / "far" / "compose.yaml").is_file()
        place.corral("down", "--volumes", "--yes")


def test_keys_spend_and_files_survive_the_loss_of_the_machine(saved: Saved) -> None:
    plan = saved.place.plan
    saved.place.corral("down", "--volumes", "--yes")
    shutil.rmtree(saved.place.folder)
    place = empty_place(saved, "new")
    with Project(plan, HOST, place.out, f"{SITE}-{HOST}"):
        said = place.corral("restore", str(saved.archive))
        assert said.rstrip().splitlines()[-1].startswith("restored; next: ./generate.py up --inventory")
        assert not (place.out / ".restore.json").exists()
        assert (place.folder / "models.lock.json").is_file()
        place.start()
        assert place.client(saved.key).chat_text("chat") == KNOWN_ANSWER
        assert spend_of(place, saved.key) >= saved.spend > 0
        assert place.client("sk-wrong").chat("chat").status_code == httpx.codes.UNAUTHORIZED
        result = state_of(place, saved.key, saved.job)["result"]
        assert result["choices"][0]["message"]["content"] == KNOWN_ANSWER
        kept = docker("exec", f"{HOST}-image-1", "sh", "-c", "cat /data/kept; ls -n /data/kept")
        assert kept.startswith(f"{KEPT}\n")
        assert kept.splitlines()[1].split()[2:4] == ["123", "456"]
        assert "nothing to do" in place.corral("up")
        all_is_kept(place, saved)
        worker_answers(place, saved.worker)
        nothing_is_lost_when_the_inventory_changes(place, saved)
        no_job_is_lost_during(place, saved.key, "restart", "jobs-store", "jobs", "jobs-worker", "tunnel")
        all_is_kept(place, saved)
        with dialling(place, saved.worker) as container:
            the_tunnel_leads_nowhere_else(place.project)
            place.corral("workers", "revoke", "laptop")
            refused = "Permission denied (publickey)"
            wait_until(lambda: refused in docker_logs(place.project, container), WRITTEN_LIMIT_S, "it is refused")
            wait_until(lambda: not is_connected(place), WRITTEN_LIMIT_S, "the balancer knows that it is gone")


def the_tunnel_leads_nowhere_else(project: Project) -> None:
    """The balancer alone reaches a worker's port, and the tunnel's container the balancer's doors and figures alone."""
    found = {service.name: reached_from(project, service.name) for service in project.plan.services_of(HOST)}
    assert {name for name, places in found.items() if ("tunnel", LAPTOP) in places} == {"haproxy", "tunnel"}
    doors = {("haproxy", PORT), ("haproxy", PAGE_PORT), ("haproxy", 8404)}
    assert found["tunnel"] == {("tunnel", TUNNEL), ("tunnel", LAPTOP), *doors}


def nothing_is_lost_when_the_inventory_changes(place: Place, saved: Saved) -> None:
    """The page, the tunnel and the workers of jobs are made anew, with other settings; jobs come all the time."""
    inventory, before = place.folder / "inventory.yaml", place.project.ids()
    text = inventory.read_text().replace(
        "  laptop: {", "  desk: {dials_in: 21712, engine: ollama, model: llama3}\n  laptop: {"
    )
    inventory.write_text(
        text.replace("{node: laptop}", "[{node: laptop}, {node: desk}]")
        .replace("pools: [chat]", "titles: chat")
        .replace("jobs: {workers: 1}", "jobs: {workers: 2}")
    )
    no_job_is_lost_during(place, saved.key, "up", "--render", "--timeout", START_LIMIT_S)
    after = place.project.ids()
    changed = {f"{HOST}-{name}" for name in ("chat", "jobs-worker", "tunnel")}
    assert {name for name, made in after.items() if made != before[name]} >= changed
    all_is_kept(place, saved)
    worker_answers(place, saved.worker)


def no_job_is_lost_during(place: Place, key: str, *words: str) -> None:
    """Sent while a verb makes services anew or restarts them; a client tries again meanwhile."""
    jobs: list[str] = []

    def send() -> bool:
        with suppress(httpx.HTTPError):
            jobs.append(send_job(place, key))
        return verb.exit_code() is not None

    log = place.folder / f"{words[0]}.log"
    with Process([*CORRAL, *place.arguments(*words)], log, environment=dict(place.environment)) as verb:
        wait_until(send, RUN_LIMIT_S, f"{words[0]} is over")
    assert verb.exit_code() == 0, verb.output
    assert jobs
    left = set(jobs)

    def are_done() -> bool:
        left.difference_update([job for job in left if state_of(place, key, job)["status"] == "succeeded"])
        return not left

    wait_until(are_done, WRITTEN_LIMIT_S, "every job is done")
