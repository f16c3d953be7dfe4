"""`grafana push` against a stand-in for Grafana; what its pages show is asked in test_dashboards.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from corral.build import build_plan
from corral.cli import main
from corral.config.load import load_inventory
from corral.verbs.grafana import TOKEN as TOKEN_NAME
from corral.verbs.grafana import pages
from tests.monitoring.fake_grafana import TOKEN, FakeGrafana, running
from tests.trees import ROOT

INVENTORY = ROOT / "inventory.yaml"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_NAME, TOKEN)


@pytest.fixture
def grafana() -> Iterator[FakeGrafana]:
    with running(FakeGrafana()) as fake:
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


def test_clear_words_for_what_is_wrong(grafana: FakeGrafana, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("push", "--url", "http://127.0.0.1:1")[::2] == (
        1, "corral: Grafana does not answer at http://127.0.0.1:1 ([Errno 111] Connection refused); is --url right?\n",
    )  # fmt: skip
    assert "no Prometheus is called" in run("push", "--url", grafana.url, "--source", "promethius")[2]
    grafana.role = "Viewer"
    assert "give the token's service account the role Admin" in run("push", "--url", grafana.url)[2]
    grafana.role, grafana.sources = "Admin", []
    assert "has no data source of type Prometheus" in run("push", "--url", grafana.url)[2]
    grafana.is_grafana = False
    assert "is not Grafana" in run("push", "--url", grafana.url)[2]
    grafana.is_grafana = True
    monkeypatch.setenv(TOKEN_NAME, "glsa_wrong")
    code, out, err = run("push", "--url", grafana.url)
    assert (code, out) == (1, "")
    assert "refuses GRAFANA_TOKEN; the token is wrong, has expired" in err
    assert "glsa_wrong" not in err
    monkeypatch.delenv(TOKEN_NAME)
    assert "GRAFANA_TOKEN is not set" in run("push", "--url", grafana.url)[2]


@pytest.mark.parametrize("url", ["grafana", "ftp://x", "http://", "http://admin:secret@x", "http://x:port"])
def test_an_address_is_looked_at_before_anything_is_sent(url: str, run: Run) -> None:
    code, _, err = run("push", "--url", url)
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


def test_another_grafana_has_to_be_named(run: Run) -> None:
    """The site's own has the pages from files."""
    assert run("push")[0] == 2
