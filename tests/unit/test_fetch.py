"""Downloads against a server that does what servers do (004-28): nothing looks complete that is not."""

from __future__ import annotations

import errno
import hashlib
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from corral.errors import CorralError
from corral.verbs.models.fetch import (
    ChecksumError,
    Content,
    FetchError,
    MissingError,
    Net,
    Origin,
    fetch,
    look,
    note_of,
    open_client,
    origin_of,
    part_of,
    settle,
)
from tests.weight_server import Shop, weight_server

CONTENT = random.Random(1).randbytes(3_000_000)  # noqa: S311 - the same in every run
SHA256 = hashlib.sha256(CONTENT).hexdigest()
PINNED = Content(len(CONTENT), SHA256)


@pytest.fixture
def shop() -> Iterator[Shop]:
    with weight_server() as found:
        yield found


@pytest.fixture
def net() -> Iterator[Net]:
    with open_client() as client:
        yield Net(client, pause_s=0.001)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "models" / "m.bin"


def at(shop: Shop, path: str = "/m.bin") -> Origin:
    return Origin(shop.address + path, shop.address + path)


def nothing_lies_there(target: Path) -> bool:
    return not target.exists() and not part_of(target).exists() and not note_of(target).exists()


def test_a_file_arrives_whole_and_gets_its_name_last(shop: Shop, net: Net, target: Path) -> None:
    shop.put("/m.bin", CONTENT)
    told: list[int] = []
    found = fetch(at(shop), target, Content(), net, lambda there, _size: told.append(there))
    assert (found.size, found.sha256) == (len(CONTENT), SHA256)
    assert told[-1] == len(CONTENT)
    assert told == sorted(told)
    assert not target.exists()
    settle(target)
    assert target.read_bytes() == CONTENT
    assert target.stat().st_mode & 0o777 == 0o644
    assert sorted(path.name for path in target.parent.iterdir()) == ["m.bin"]


def test_a_broken_connection_goes_on_where_it_broke(shop: Shop, net: Net, target: Path) -> None:
    shop.put("/m.bin", CONTENT, breaks_after=[1_000_000, 700_000])
    assert fetch(at(shop), target, PINNED, net).sha256 == SHA256
    assert shop.ranges() == ["", "bytes=1000000-", "bytes=1700000-"]
    assert shop.sent == len(CONTENT)


def test_a_later_run_goes_on_too(shop: Shop, net: Net, target: Path) -> None:
    file = shop.put("/m.bin", CONTENT, breaks_after=[1_000_000, 0, 0, 0, 0, 0])
    with pytest.raises(FetchError, match=r"broke off.*it goes on where it stopped"):
        fetch(at(shop), target, Content(), net)
    assert part_of(target).stat().st_size == 1_000_000
    assert not target.exists()
    file.breaks_after.clear()
    assert fetch(at(shop), target, Content(), net).sha256 == SHA256
    assert shop.sent == len(CONTENT)


def test_what_a_killed_run_left_whole_is_not_fetched_again(shop: Shop, net: Net, target: Path) -> None:
    shop.put("/m.bin", CONTENT)
    fetch(at(shop), target, PINNED, net)  # killed before `settle`
    shop.seen.clear()
    assert fetch(at(shop), target, PINNED, net).sha256 == SHA256
    assert not shop.seen


def test_a_server_without_ranges_starts_again(shop: Shop, net: Net, target: Path) -> None:
    shop.put("/m.bin", CONTENT, has_ranges=False, breaks_after=[1_000_000])
    assert fetch(at(shop), target, Content(), net).sha256 == SHA256
    assert shop.sent == 1_000_000 + len(CONTENT)


def test_a_file_that_changed_in_between_is_not_mixed(shop: Shop, net: Net, target: Path) -> None:
    shop.put("/m.bin", bytes(len(CONTENT)), breaks_after=[1_000_000, 0, 0, 0, 0, 0])
    with pytest.raises(FetchError):
        fetch(at(shop), target, Content(), net)
    shop.put("/m.bin", CONTENT, etag='"two"')
    assert fetch(at(shop), target, Content(), net).sha256 == SHA256
    assert [headers["if-range"] for _, headers in shop.seen if "if-range" in headers][-1] == '"one"'


def test_bytes_that_nobody_can_vouch_for_are_not_gone_on_with(shop: Shop, net: Net, target: Path) -> None:
    """No strong ETag, no date, no checksum: the server may have other content by now."""
    shop.put("/m.bin", bytes(len(CONTENT)), etag='W/"weak"', breaks_after=[1_000_000, 0, 0, 0, 0, 0])
    with pytest.raises(FetchError):
        fetch(at(shop), target, Content(), net)
    shop.put("/m.bin", CONTENT, etag='W/"weak"')
    assert fetch(at(shop), target, Content(), net).sha256 == SHA256


def test_a_part_with_damage_inside_is_fetched_once_more(shop: Shop, net: Net, target: Path) -> None:
    shop.put("/m.bin", CONTENT, breaks_after=[1_000_000, 0, 0, 0, 0, 0])
    with pytest.raises(FetchError):
        fetch(at(shop), target, PINNED, net)
    part = bytearray(part_of(target).read_bytes())
    part[500] ^= 1
    part_of(target).write_bytes(part)
    shop.put("/m.bin", CONTENT)
    assert fetch(at(shop), target, PINNED, net).sha256 == SHA256


def test_a_wrong_checksum_leaves_nothing(shop: Shop, net: Net, target: Path) -> None:
    shop.put("/m.bin", bytes(len(CONTENT)))
    with pytest.raises(ChecksumError, match="damaged on the way, or another file"):
        fetch(at(shop), target, PINNED, net)
    assert nothing_lies_there(target)


def test_a_wrong_length_leaves_nothing(shop: Shop, net: Net, target: Path) -> None:
    shop.put("/m.bin", CONTENT + b"more")
    with pytest.raises(ChecksumError, match=f"has {len(CONTENT) + 4} bytes, expected {len(CONTENT)}"):
        fetch(at(shop), target, PINNED, net)
    assert nothing_lies_there(target)
    shop.put("/m.bin", CONTENT[:-4], says_length=False)
    with pytest.raises(FetchError, match="broke off after"):
        fetch(at(shop), target, Content(len(CONTENT)), net)
    assert not target.exists()


def test_a_server_that_says_no_length_is_read_to_its_end(shop: Shop, net: Net, target: Path) -> None:
    shop.put("/m.bin", CONTENT, says_length=False, has_ranges=False)
    assert look(at(shop), net) == Content()
    assert fetch(at(shop), target, Content(), net).sha256 == SHA256


def test_more_than_is_there_was_asked_for(shop: Shop, net: Net, target: Path) -> None:
    """416: the file has become shorter than what is here."""
    shop.put("/m.bin", CONTENT, breaks_after=[2_000_000, 0, 0, 0, 0, 0])
    with pytest.raises(FetchError):
        fetch(at(shop), target, Content(), net)
    shop.put("/m.bin", CONTENT[:1_000_000])
    assert fetch(at(shop), target, Content(), net).size == 1_000_000


def test_a_part_from_another_place_is_thrown_away(shop: Shop, net: Net, target: Path) -> None:
    shop.put("/m.bin", CONTENT, wrong_start=7, breaks_after=[1_000_000])
    assert fetch(at(shop), target, PINNED, net).sha256 == SHA256
    assert shop.ranges() == ["", "bytes=1000000-", ""]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(shop: Shop, net: Net, target: Path, status: int) -> None:
    shop.put("/m.bin", CONTENT, statuses=[status, status, status])
    assert fetch(at(shop), target, PINNED, net).sha256 == SHA256


@pytest.mark.parametrize(("status", "kind"), [(404, MissingError), (403, MissingError), (418, FetchError)])
def test_a_refusal_is_final(shop: Shop, net: Net, target: Path, status: int, kind: type[CorralError]) -> None:
    shop.put("/m.bin", CONTENT, statuses=[status])
    with pytest.raises(kind):
        fetch(at(shop), target, PINNED, net)
    assert len(shop.seen) == 1
    assert nothing_lies_there(target)


def test_a_server_that_is_away_is_explained(net: Net, target: Path) -> None:
    with weight_server() as gone:
        origin = at(gone)
    with pytest.raises(FetchError, match=r"cannot be reached.*HTTPS_PROXY"):
        fetch(origin, target, PINNED, net)


def test_two_processes_do_not_write_the_same_file(shop: Shop, net: Net, target: Path) -> None:
    pause = threading.Event()
    shop.put("/m.bin", CONTENT, pause=pause)
    begun = threading.Event()
    first = threading.Thread(target=lambda: fetch(at(shop), target, PINNED, net, lambda _there, _size: begun.set()))
    first.start()
    try:
        assert begun.wait(30)
        with pytest.raises(CorralError, match="models pull is at work here already"):
            fetch(at(shop), target, PINNED, net)
    finally:
        pause.set()
        first.join()
    assert part_of(target).stat().st_size == len(CONTENT)


def test_stopping_leaves_a_part_that_is_gone_on_with(shop: Shop, net: Net, target: Path) -> None:
    shop.put("/m.bin", CONTENT)
    stopped = Net(net.client, pause_s=0.001)
    with pytest.raises(KeyboardInterrupt):
        fetch(at(shop), target, PINNED, stopped, lambda _there, _size: stopped.stop.set())
    assert not target.exists()
    assert 0 < part_of(target).stat().st_size < len(CONTENT)
    assert fetch(at(shop), target, PINNED, net).sha256 == SHA256
    assert shop.ranges()[-1] != ""


def test_a_full_disk_is_an_error_with_words(shop: Shop, net: Net, target: Path) -> None:
    shop.put("/m.bin", CONTENT)
    with pytest.raises(FetchError, match="No space left on device; run again, it goes on"):
        fetch(at(shop), target, PINNED, net, _disk_full)


def _disk_full(_there: int, _size: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# --- what a source says, and who learns the login ---------------------------------------------------------------------


def test_a_hub_file_is_known_before_it_comes(shop: Shop, net: Net) -> None:
    shop.put_hub("o/r", "sub/m.gguf", CONTENT)
    origin = origin_of("hf:o/r/sub/m.gguf", "", {"HF_ENDPOINT": shop.address + "/"})
    assert origin is not None
    assert look(origin, net) == Content(len(CONTENT), SHA256, "1" * 40)


def test_the_login_goes_to_the_hub_and_nowhere_else(shop: Shop, net: Net, target: Path) -> None:
    with weight_server("localhost") as elsewhere:
        elsewhere.put("/blob", CONTENT)
        shop.put_hub("o/r", "m.gguf", CONTENT, redirect=elsewhere.address + "/blob")
        environment = {"HF_ENDPOINT": shop.address, "HF_TOKEN": "hf_of_a_person"}
        origin = origin_of("hf:o/r/m.gguf", "", environment)
        assert origin is not None
        said = look(origin, net)
        assert (said.size, said.sha256) == (len(CONTENT), SHA256)
        assert fetch(origin, target, said, net).sha256 == SHA256
        assert all(headers["authorization"] == "Bearer hf_of_a_person" for _, headers in shop.seen)
        assert elsewhere.seen
        assert not any("authorization" in headers for _, headers in elsewhere.seen)
    assert "hf_of_a_person" not in repr(origin)
    assert "hf_of_a_person" not in note_of(target).read_text()


@pytest.mark.parametrize(
    ("source", "endpoint", "is_sent"),
    [
        ("hf:o/r/m.gguf", "https://mirror.example.com", True),
        ("hf:o/r/m.gguf", "http://mirror.example.com", False),
        ("https://example.com/m.gguf", "https://mirror.example.com", False),
    ],
)
def test_the_login_never_travels_in_the_clear(source: str, endpoint: str, *, is_sent: bool) -> None:
    origin = origin_of(source, "", {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_of_a_person"})
    assert origin is not None
    assert bool(origin.headers) is is_sent


def test_sources_become_addresses() -> None:
    def url(source: str, revision: str = "", **environment: str) -> str | None:
        origin = origin_of(source, revision, environment)
        return origin.url if origin else None

    assert url("hf:o/r/a b/m.gguf") == "https://huggingface.co/o/r/resolve/main/a%20b/m.gguf"
    assert url("hf:o/r/m.gguf", "refs/pr/1") == "https://huggingface.co/o/r/resolve/refs%2Fpr%2F1/m.gguf"
    assert url("https://example.com/m.gguf") == "https://example.com/m.gguf"
    assert url("m.gguf") is None
    assert url("file:/srv/m.gguf") == ""


def test_a_file_on_this_machine_is_copied(net: Net, target: Path, tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(CONTENT)
    origin = Origin("file:m.bin", path=tmp_path / "m.bin")
    assert look(origin, net).size == len(CONTENT)
    assert fetch(origin, target, PINNED, net).sha256 == SHA256
    with pytest.raises(ChecksumError):
        fetch(origin, target.with_name("n.bin"), Content(5), net)
    with pytest.raises(MissingError, match="no such file"):
        look(Origin("file:n", path=tmp_path / "n"), net)


def test_the_note_holds_no_address_with_a_signature(shop: Shop, net: Net, target: Path) -> None:
    shop.put("/m.bin?signature=1", CONTENT)
    with pytest.raises(ChecksumError) as caught:
        fetch(at(shop, "/m.bin?signature=1"), target, Content(5), net)
    assert "signature" not in str(caught.value)
    assert nothing_lies_there(target)


def test_a_secure_source_that_leads_on_to_an_open_one_is_refused(target: Path) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.scheme == "https":
            return httpx.Response(302, headers={"Location": "http://mirror.example.com/m.gguf"})
        return httpx.Response(200, content=CONTENT)

    with httpx.Client(transport=httpx.MockTransport(answer), follow_redirects=True) as client:
        source = "https://example.com/m.gguf"
        with pytest.raises(FetchError, match=r"leads on to mirror\.example\.com over http"):
            fetch(Origin(source, source), target, Content(), Net(client, pause_s=0.001))
    assert not part_of(target).exists() or not part_of(target).stat().st_size
