"""What a plan relies on when it makes physical batches small or lets slots share a context (field rows 30, 37)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.model_files import make_random_model
from tests.processes.test_xllama import serving

TEXT = " ".join(f"w{number % 700}" for number in range(150))
EMBEDDING = ("--embeddings", "--parallel", "1", "--ctx-size", "2048", "--batch-size", "2048")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "decoder.gguf"
    make_random_model("qwen3", path)
    return path


def test_the_last_tokens_vector_needs_no_batch_as_long_as_the_input(decoder: Path, tmp_path: Path) -> None:
    """An embedder that takes the last token's vector reads a long input in parts, with the same result."""
    found = []
    for size in ("64", "1024"):
        words = (*EMBEDDING, "--ubatch-size", size, "--pooling", "last")
        with serving(decoder, tmp_path / f"{size}.log", *words) as server:
            answer = server.post("/v1/embeddings", {"input": TEXT})
            assert answer.status_code == 200, answer.text
            assert answer.json()["usage"]["prompt_tokens"] > 2 * 64
            found.append(answer.json()["data"][0]["embedding"])
    assert found[0] == pytest.approx(found[1], abs=2e-2)


def test_any_other_vector_needs_the_whole_input_in_one_batch(decoder: Path, tmp_path: Path) -> None:
    with serving(decoder, tmp_path / "log", *EMBEDDING, "--ubatch-size", "64", "--pooling", "mean") as server:
        answer = server.post("/v1/embeddings", {"input": TEXT})
        assert answer.status_code == 500
        assert "too large" in answer.text


def test_slots_share_one_context(decoder: Path, tmp_path: Path) -> None:
    """With `--kv-unified` each of two slots may use all of the context, instead of half of it."""
    for words, tokens in (((), 512), (("--kv-unified",), 1024)):
        log = tmp_path / f"{tokens}.log"
        with serving(decoder, log, "--parallel", "2", "--ctx-size", "1024", *words) as server:
            assert server.get("/props").json()["default_generation_settings"]["n_ctx"] == tokens
