"""A farm that an older version rendered and started is taken over by this one: its own code, in the real engine.

`releases/9bd54e3.tar.xz` is that version's source, as `git archive` wrote it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from corral.render.secrets import read_env
from tests.compose.project import Client
from tests.compose.site_up import HOST, PORT, RUN_LIMIT_S, Site, site_in
from tests.tiny_models import KNOWN_ANSWER

pytestmark = pytest.mark.needs("docker-engine", "mmdebstrap", "prisma-engine")

RELEASES = Path(__file__).with_name("releases")
OLD = "corral-9bd54e3"
# Longest time without an answer: HAProxy and LiteLLM are made anew.
RESTART_S = 120
COMMAND = "import sys; from corral.cli import main; sys.exit(main())"


def _old(root: Path, site: Site, *words: str) -> None:
    """Run a command of the old version; it takes what it ships from its own folder."""
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *words, "--inventory", str(site.inventory), "--out", str(site.out)],
        cwd=root, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=RUN_LIMIT_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{OLD}: {words} ended with {done.returncode}:\n{done.stdout}"


def _ask_until_answered(client: Client, content: str) -> str:
    """The answer to one question, asked again while the gateway restarts, as OpenAI's library does.

    A broken connection, 429 and 5xx are asked again; another status is an error.
    """
    deadline = time.monotonic() + RESTART_S
    while time.monotonic() < deadline:
        try:
            response = client.chat("chat", content=content)
        except httpx.TransportError:
            time.sleep(0.5)
            continue
        if response.status_code != 429 and response.status_code < 500:
            assert response.status_code == 200, f"{response.status_code} {response.text}"
            return str(response.json()["choices"][0]["message"]["content"])
        time.sleep(float(response.headers.get("retry-after", 1)))
    return f"no answer in {RESTART_S} s"


@contextmanager
def _clients(client: Client, answers: list[str], number: int = 2) -> Iterator[None]:
    """Clients that ask one question after the other until the block ends; an error of one of them is raised then."""
    stop = threading.Event()

    def ask(name: int) -> None:
        while not stop.is_set():
            answers.append(_ask_until_answered(client, f"question {name} {len(answers)}"))

    with ThreadPoolExecutor(number) as pool:
        asking = [pool.submit(ask, name) for name in range(number)]
        try:
            yield
        finally:
            stop.set()
    for done in asking:
        done.result()


def test_up_takes_a_farm_of_9bd54e3_over(engine: None, tmp_path: Path) -> None:
    with tarfile.open(RELEASES / "9bd54e3.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    with site_in(tmp_path) as site:
        site.edit("database: false, cache: false", "database: true, cache: true")
        site.edit("\nmonitoring:", "\n# monitoring:")
        shutil.rmtree(site.out)
        for words in (("render",), ("secrets", "init"), ("up",)):
            _old(tmp_path / OLD, site, *words)
        containers, volumes = site.project.objects("container"), site.project.objects("volume")
        one_for_all = {f"{site.project.name}_{name}" for name in ("farm", "door")}
        assert one_for_all <= site.project.objects("network")
        secrets = read_env(site.out / HOST / ".env")
        made = site.client.send("POST", "/key/generate", {"models": ["chat"], "key_alias": "before"})
        client = Client(f"http://127.0.0.1:{PORT}", made.json()["key"])

        answers: list[str] = []
        with _clients(client, answers):
            site.corral("secrets", "init")
            site.corral("up", "--render")
        assert set(answers) == {KNOWN_ANSWER}
        assert client.chat_text() == KNOWN_ANSWER

        assert containers <= site.project.objects("container")
        assert volumes <= site.project.objects("volume")
        assert not one_for_all & site.project.objects("network")
        assert secrets.items() <= read_env(site.out / HOST / ".env").items()
        assert client.chat("solo").status_code in (401, 403)
        assert "nothing to do" in site.corral("up")
