"""The page about the farm, in a real browser: what a person reads there, with and without a key."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.processes.browser import Tab, browsing
from tests.processes.farm import EVEN, LINK, Farm, in_modes
from tests.processes.helpers import wait_until
from tests.processes.test_keys import key_of

pytestmark = [in_modes("slots"), pytest.mark.needs("chromium", "postgres", "prisma-engine")]

PHONE, DESKTOP = (390, 844), (1280, 900)
UPDATED_S = 20.0


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browsing(tmp_path_factory.mktemp("browser")) as found:
        yield found


def open_page(tab: Tab, farm: Farm) -> None:
    tab.open(f"http://127.0.0.1:{farm.ports['gateway']}/")
    tab.wait_text("replicas up", "#totals")


def card(tab: Tab, pool: str) -> str:
    """What is to be read on the card of a pool."""
    cards = "[...document.querySelectorAll('.pool')].map((card) => card.innerText)"
    texts: list[str] = tab.value(cards)
    return next(text for text in texts if text.startswith(f"{pool}\n"))


def test_the_page_shows_the_load_of_every_pool_as_it_changes(farm: Farm, tab: Tab) -> None:
    open_page(tab, farm)
    assert farm.plan.inventory.name == tab.text("h1") == tab.value("document.title")
    assert set(farm.plan.inventory.pools) == set(
        tab.value("[...document.querySelectorAll('h3')].map((t) => t.innerText)")
    )
    assert "0 of 3 slots busy · queue 0 of 4" in card(tab, "even")
    assert "embedding" in card(tab, "embed")
    port = farm.ports["admin"]
    assert f"ssh -L {port}:127.0.0.1:{port} 127.0.0.1, then open http://127.0.0.1:{port}/ui" in tab.text("#admin")
    with ThreadPoolExecutor(5) as threads, farm.fakes.behaving(EVEN, "hold"):
        for _ in range(5):
            threads.submit(farm.ask, "even")
        wait_until(
            lambda: "3 of 3 slots busy · queue 2 of 4" in card(tab, "even"), UPDATED_S, "the page shows the load"
        )
        assert tab.value("document.querySelectorAll('.slots .busy').length") >= 3


def test_a_key_shows_its_pools_and_limits_and_a_wrong_one_why_not(farm: Farm, tab: Tab) -> None:
    open_page(tab, farm)
    tab.type("#key", "sk-nothing")
    tab.wait_text("this key is not known here", "#key-answer")
    open_page(tab, farm)
    tab.type("#key", key := key_of(farm, "VISTA"))
    tab.wait_text("Limits: 35 requests a minute · 2 requests at the same time.", "#key-answer")
    assert tab.text("#key-answer").startswith("It opens chat, even, ")
    assert ("your key does not open it" in card(tab, "mixed"), "your key" in card(tab, "even")) == (True, False)
    assert f"http://127.0.0.1:{farm.ports['gateway']}/v1/chat/completions" in tab.text("#example")
    assert key not in tab.text()
    assert tab.value("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


@pytest.mark.parametrize(("width", "height"), [PHONE, DESKTOP])
def test_the_page_fits_calls_only_the_farm_and_runs_no_name(farm: Farm, tab: Tab, width: int, height: int) -> None:
    tab.resize(width, height, is_dark=width < height)
    open_page(tab, farm)
    assert tab.text("#links") == LINK
    assert tab.value("document.querySelectorAll('#links img').length") == 0
    assert tab.value("document.documentElement.scrollWidth <= innerWidth")
    assert tab.value("(() => { const s = document.createElement('script'); s.text = 'window.ran = 1';"
                     " document.head.append(s); return window.ran ?? 0 })()") == 0  # fmt: skip
    base = f"http://127.0.0.1:{farm.ports['gateway']}/"
    assert {url for url in tab.requests if not url.startswith((base, "data:"))} == set()
    assert {base, f"{base}page.js", f"{base}page.css", f"{base}page.json", f"{base}health"} <= set(tab.requests)
    assert [text for text in tab.complaints if "inline script" not in text] == []
