"""`grafana push | check` against a stand-in for Grafana before a real Prometheus with recorded figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from corral.cli import main
from corral.components.grafana import PASSWORD as PASSWORD_NAME
from corral.load import load_inventory
from corral.ops.grafana import TOKEN as TOKEN_NAME
from corral.ops.grafana import filled, pages
from corral.plan import build_plan
from tests.monitoring import figures
from tests.monitoring.fake_grafana import PASSWORD, TOKEN, FakeGrafana, running
from tests.trees import ROOT

INVENTORY = ROOT / "inventory.yaml"
BUSY = figures.END - figures.SPAN_S // 3
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_NAME, TOKEN)


@pytest.fixture
def grafana() -> Iterator[FakeGrafana]:
    """One with a Prometheus that nobody runs."""
    with running(FakeGrafana(prometheus="http://127.0.0.1:1")) as fake:
        fake.add_source("prometheus", is_default=True)
        yield fake


@pytest.fixture
def busy(prometheus: str) -> Iterator[FakeGrafana]:
    """One whose Prometheus has the recorded farm."""
    with running(FakeGrafana(prometheus=prometheus, now=BUSY)) as fake:
        fake.add_source("prometheus", is_default=True)
        yield fake


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str, inventory: Path = INVENTORY) -> tuple[int, str, str]:
        code = main(["grafana", *words, "--inventory", str(inventory)])
        found = capsys.readouterr()
        return code, found.out, found.err

    return call


def site_pages() -> dict[str, dict[str, Any]]:
    return {page["uid"]: page for page in pages(build_plan(load_inventory(INVENTORY)))}


# --- push ------------------------------------------------------------------------------------------------------------


def test_push_puts_the_pages_that_the_sites_own_grafana_has(grafana: FakeGrafana, run: Run) -> None:
    code, out, _ = run("push", "--url", grafana.url)
    shipped = sorted(path.name for path in (ROOT / "compose/box/grafana/pages").iterdir())
    assert code == 0
    assert sorted(grafana.pages) == [f"corral-{name.removesuffix('.json')}" for name in shipped]
    assert out.split() == [f"{grafana.url}/d/{uid}" for uid in sorted(grafana.pages)]
    ours = site_pages()
    assert {uid: page | {"id": 1} for uid, page in ours.items()} == grafana.pages
    assert list(grafana.folders.values()) == [load_inventory(INVENTORY).inventory.name]


def test_a_second_push_goes_over_the_first_and_into_the_same_folder(grafana: FakeGrafana, run: Run) -> None:
    for _ in range(2):
        assert run("push", "--url", grafana.url, "--folder", "GPU farm")[0] == 0
    assert list(grafana.folders.values()) == ["GPU farm"]


def test_push_chooses_the_data_source_at_the_top_of_each_page(grafana: FakeGrafana, run: Run) -> None:
    grafana.sources.clear()
    grafana.add_source("logs", kind="loki", is_default=True)
    grafana.add_source("another", uid="aaa")
    grafana.add_source("Farm", uid="bbb")
    assert run("push", "--url", grafana.url, "--source", "Farm")[0] == 0
    chosen = {page["templating"]["list"][0]["current"]["value"] for page in grafana.pages.values()}
    assert chosen == {"bbb"}
    assert run("push", "--url", grafana.url)[0] == 0
    assert grafana.pages["corral-farm"]["templating"]["list"][0]["current"] == {"text": "Farm", "value": "bbb"}


def test_a_grafana_below_a_path_is_found(run: Run) -> None:
    with running(FakeGrafana(prefix="/metrics/grafana")) as fake:
        fake.add_source("prometheus")
        assert run("push", "--url", f"{fake.url}/")[0] == 0
        assert fake.pages


def test_pages_from_files_are_not_pushed_over(grafana: FakeGrafana, run: Run) -> None:
    grafana.provisioned = set(site_pages())
    code, out, err = run("push", "--url", grafana.url)
    assert (code, out) == (1, "")
    assert "from files already" in err


# --- what can be wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["push", "check"])
def test_clear_words_for_what_is_wrong(
    verb: str, grafana: FakeGrafana, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(verb, "--url", "http://127.0.0.1:1")[::2] == (
        1, "corral: Grafana does not answer at http://127.0.0.1:1 ([Errno 111] Connection refused); is --url right?\n",
    )  # fmt: skip
    assert "no Prometheus is called" in run(verb, "--url", grafana.url, "--source", "promethius")[2]
    grafana.role = "Viewer"
    assert "give the token's service account the role Admin" in run(verb, "--url", grafana.url)[2]
    grafana.role, grafana.sources = "Admin", []
    assert "has no data source of type Prometheus" in run(verb, "--url", grafana.url)[2]
    grafana.is_grafana = False
    assert "is not Grafana" in run(verb, "--url", grafana.url)[2]
    grafana.is_grafana = True
    monkeypatch.setenv(TOKEN_NAME, "glsa_wrong")
    code, out, err = run(verb, "--url", grafana.url)
    assert (code, out) == (1, "")
    assert "refuses GRAFANA_TOKEN; the token is wrong, has expired" in err
    assert "glsa_wrong" not in err
    monkeypatch.delenv(TOKEN_NAME)
    assert "GRAFANA_TOKEN is not set" in run(verb, "--url", grafana.url)[2]


@pytest.mark.parametrize("url", ["grafana", "ftp://x", "http://", "http://admin:secret@x", "http://x:port"])
def test_an_address_is_looked_at_before_anything_is_sent(url: str, run: Run) -> None:
    code, _, err = run("check", "--url", url)
    assert code == 2
    assert "secret" not in err


def test_a_token_can_be_in_a_file(
    grafana: FakeGrafana, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(TOKEN_NAME)
    file = tmp_path / "token"
    assert run("push", "--url", grafana.url, "--token-file", str(file))[0] == 2
    file.write_text("\n")
    assert "is empty" in run("push", "--url", grafana.url, "--token-file", str(file))[2]
    file.write_text(f"{TOKEN}\nand more\n")
    assert "more than one word or line" in run("push", "--url", grafana.url, "--token-file", str(file))[2]
    file.write_text(f"{TOKEN}\n")
    assert run("push", "--url", grafana.url, "--token-file", str(file))[0] == 0


def own_site(folder: Path, url: str, *, grafana: bool = True) -> Path:
    """An inventory whose Grafana is at this address."""
    text = INVENTORY.read_text(encoding="utf-8")
    monitoring = "monitoring: {host: box}"
    assert monitoring in text
    port = url.rsplit(":", 1)[1]
    more = f"grafana_port: {port}" if grafana else "grafana: false"
    made = folder / "inventory.yaml"
    made.write_text(text.replace(monitoring, f"monitoring: {{host: box, {more}}}"), encoding="utf-8")
    return made


def test_the_sites_own_grafana_is_opened_by_its_admins_password(grafana: FakeGrafana, run: Run, tmp_path: Path) -> None:
    """The token in the environment, which is for another Grafana, is not sent to it."""
    made = own_site(tmp_path, grafana.url)
    out = tmp_path / "compose"
    assert "has no GRAFANA_ADMIN_PASSWORD" in run("push", "--out", str(out), inventory=made)[2]
    (out / "box").mkdir(parents=True)
    (out / "box" / ".env").write_text(f"{PASSWORD_NAME}='{PASSWORD}'\n")
    assert run("push", "--out", str(out), inventory=made)[0] == 0
    (out / "box" / ".env").write_text(f"{PASSWORD_NAME}={TOKEN}\n")
    assert f"refuses {PASSWORD_NAME} of {out}/box/.env" in run("push", "--out", str(out), inventory=made)[2]
    without = own_site(tmp_path, grafana.url, grafana=False)
    assert "no Grafana of its own" in run("push", inventory=without)[2]
    assert run("push", "--url", grafana.url, inventory=without)[0] == 0


def test_data_sources_of_the_site_have_to_be_in_its_own_grafana(grafana: FakeGrafana, run: Run, tmp_path: Path) -> None:
    (tmp_path / "box").mkdir()
    (tmp_path / "box" / ".env").write_text(f"{PASSWORD_NAME}='{PASSWORD}'\n")
    grafana.sources.clear()
    grafana.add_source("somebody's")
    code, out, _ = run("check", "--out", str(tmp_path), inventory=own_site(tmp_path, grafana.url))
    assert code == 1
    assert "fails  data source: prometheus: not there" in out


# --- check -----------------------------------------------------------------------------------------------------------


def test_check_names_pages_that_are_not_there_and_sources_that_do_not_answer(grafana: FakeGrafana, run: Run) -> None:
    code, out, err = run("check", "--url", grafana.url)
    assert code == 1
    assert "fails  data source: prometheus: connection refused - There was an error\n" in out
    assert "fails  Farm: not in this Grafana; ./generate.py grafana push puts it there\n" in out
    assert "0 queries" in err


def test_values_are_filled_in_for_the_pages_variables_only() -> None:
    asked = 'a{b=~"$host", c=~"${gpu:regex}", d="$hostess"}[$__rate_interval]'
    assert filled(asked, {"host": ".*", "gpu": "1"}) == 'a{b=~".*", c=~"1", d="$hostess"}[$__rate_interval]'


@pytest.mark.needs("prometheus", "promtool")
def test_every_query_of_a_busy_farm_shows_something_through_grafana(busy: FakeGrafana, run: Run) -> None:
    assert run("push", "--url", busy.url)[0] == 0
    code, out, err = run("check", "--url", busy.url)
    assert (code, out) == (0, "")
    count = sum(len(panel.get("targets", ())) for page in site_pages().values() for panel in page["panels"])
    assert f"data source prometheus: {count} queries, 0 fail, 0 empty" in err
    assert sum(len(body["queries"]) for body in busy.asked) == count
    assert not any("$host" in json.dumps(body) for body in busy.asked)


@pytest.mark.needs("prometheus", "promtool")
def test_check_names_what_fails_and_what_is_empty(busy: FakeGrafana, run: Run) -> None:
    assert run("push", "--url", busy.url)[0] == 0
    spoilt = {"Queue": "pool:queue{", "Requests": "no_such_metric", "First token": "0 * pool:queue / 0"}
    for panel in busy.pages["corral-farm"]["panels"]:
        if panel["title"] in spoilt:
            panel["targets"][0]["expr"] = spoilt[panel["title"]]
    code, out, err = run("check", "--url", busy.url)
    assert code == 1
    fails, *empty = out.splitlines()
    assert fails.startswith("fails  Farm: Queue A: bad_data: ")
    assert empty == ["empty  Farm: Requests A: no data", "empty  Farm: First token A: no data"]
    assert "1 fail, 2 empty" in err
    data = json.loads(run("check", "--url", busy.url, "--json")[1])
    assert [(found["page"], found["panel"], found["query"]) for found in data["failing"]] == [("Farm", "Queue", "A")]
    assert [found["panel"] for found in data["empty"]] == ["Requests", "First token"]


@pytest.mark.needs("prometheus", "promtool")
def test_empty_queries_alone_are_no_failure(busy: FakeGrafana, run: Run) -> None:
    """A farm that nobody has used yet has empty panels."""
    assert run("push", "--url", busy.url)[0] == 0
    busy.now = figures.BEGIN - 7200
    code, out, _ = run("check", "--url", busy.url)
    assert code == 0
    assert "empty  Farm: Requests A: no data" in out
    assert "fails" not in out
