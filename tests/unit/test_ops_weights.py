import struct
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from corral.errors import CorralError
from corral.verbs.models.weights import canonical, find_weights
from tests.weight_server import Shop, weight_server

# A header without keys and tensors, and some bytes more.
CONTENT = struct.pack("<4sIQQ", b"GGUF", 3, 0, 0) + bytes(range(256)) * 100


def talk() -> Console:
    return Console(file=StringIO())


def refusal(spec: str | Path) -> str:
    with pytest.raises(CorralError) as caught:
        find_weights(str(spec), talk())
    return str(caught.value)


def test_a_file_is_used_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my model.gguf").write_bytes(CONTENT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for spec in ("my model.gguf", "./my model.gguf", "~/my model.gguf", str(tmp_path / "my model.gguf")):
        assert find_weights(spec, talk()) == tmp_path / "my model.gguf"
        assert canonical(spec) == str(tmp_path / "my model.gguf")


def test_slips_are_explained(tmp_path: Path) -> None:
    (tmp_path / "llama-8b.gguf").write_bytes(CONTENT)
    (tmp_path / "weights.safetensors").write_bytes(b"{}")
    (tmp_path / "empty.gguf").touch()
    assert refusal(tmp_path / "lama-8b.gguf").endswith('there is no such file; did you mean "llama-8b.gguf"?')
    assert refusal(tmp_path).endswith("name the .gguf file in it; known: empty.gguf, llama-8b.gguf")
    assert "is not a GGUF file" in refusal(tmp_path / "weights.safetensors")
    assert "is not a GGUF file" in refusal(tmp_path / "empty.gguf")
    assert "one part of several" in refusal("big-00001-of-00003.gguf")
    assert "is an address" in refusal("https://example.com/model.gguf")
    for wrong in ("hf:", "hf:owner/file.gguf", "hf:owner/repo/file.bin", "hf:owner/repo/../file.gguf"):
        assert "write hf:owner/repo/file.gguf" in refusal(wrong)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    """A hub on loopback, and empty caches."""
    from huggingface_hub import constants, file_download

    for module in (constants, file_download):
        monkeypatch.setattr(module, "HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with weight_server() as shop:
        monkeypatch.setenv("HF_ENDPOINT", shop.address)
        shop.put_hub("owner/repo", "sub/model.gguf", CONTENT)
        yield shop


def test_a_hub_file_is_fetched_once(hub: Shop, tmp_path: Path) -> None:
    console = talk()
    path = find_weights("hf:owner/repo/sub/model.gguf", console)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path / "cache")
    assert "fetching hf:owner/repo/sub/model.gguf" in str(getattr(console.file, "getvalue", str)())
    hub.files.clear()
    seen = len(hub.seen)
    assert find_weights("hf:owner/repo/sub/model.gguf", talk()) == path
    assert len(hub.seen) == seen, "from now on nobody is asked"


def test_a_broken_download_goes_on_and_damage_is_found(hub: Shop) -> None:
    hub.put_hub("owner/repo", "sub/model.gguf", CONTENT, breaks_after=[5000, 0, 0, 0, 0, 0])
    assert "goes on where it stopped" in refusal("hf:owner/repo/sub/model.gguf")
    hub.put_hub("owner/repo", "sub/model.gguf", CONTENT)
    hub.sent = 0
    assert find_weights("hf:owner/repo/sub/model.gguf", talk()).read_bytes() == CONTENT
    assert hub.sent <= len(CONTENT) - 5000 + 1
    hub.put_hub("owner/repo", "bad.gguf", CONTENT, headers={"X-Linked-Etag": '"' + "0" * 64 + '"'})
    assert "damaged on the way" in refusal("hf:owner/repo/bad.gguf")


def test_what_the_hub_does_not_have_is_explained(hub: Shop) -> None:
    words = refusal("hf:owner/repo/other.gguf")
    assert "the source has no such file" in words
    assert "set HF_TOKEN" in words


def test_without_network_it_says_so_soon(hub: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    with weight_server() as gone:
        monkeypatch.setenv("HF_ENDPOINT", gone.address)
    words = refusal("hf:owner/repo/sub/model.gguf")
    assert "cannot be reached" in words
    assert "make demo MODEL=path/to/model.gguf" in words
