"""Sizes that are guessed from names, against files that exist."""

import pytest

from corral.config.inventory import Model, ServerSettings
from corral.plan.sizes import billions, kv_cache_mib, replica_mib, weights_mib

GB = 1e9 / 1024**2


def model(source: str, kind: str = "chat", **more: object) -> Model:
    return Model.model_validate({"source": source, "kind": kind, **more})


@pytest.mark.parametrize(
    ("source", "expected_gb", "tolerance"),
    [
        ("hf:bartowski/Llama-3.1-8B-Stheno-v3.4-GGUF/Llama-3.1-8B-Stheno-v3.4-Q5_K_M.gguf", 5.73, 0.05),
        ("Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf", 4.92, 0.05),
        ("Meta-Llama-3.1-8B-Instruct-Q8_0.gguf", 8.54, 0.05),
        ("Meta-Llama-3.1-70B-Instruct-Q4_K_M.gguf", 42.5, 0.05),
        ("Qwen2.5-32B-Instruct-Q6_K.gguf", 26.9, 0.05),
        ("mixtral-8x7b-instruct-v0.1.Q4_K_M.gguf", 26.4, 0.1),
        ("gpt-oss-20b-mxfp4.gguf", 12.1, 0.1),
        ("gemma-3-270m-it-F16.gguf", 0.54, 0.05),
        ("Qwen3-0.6B-Q8_0.gguf", 0.64, 0.05),
    ],
)
def test_weights_are_guessed_from_the_name(source: str, expected_gb: float, tolerance: float) -> None:
    assert weights_mib(model(source)) == pytest.approx(expected_gb * GB, rel=tolerance)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("llama-8b-q4_k_m.gguf", 8.0),
        ("Qwen2.5-1.5B-Instruct-Q4_0.gguf", 1.5),
        ("hf:owner/Foo-13B-GGUF/model-q4_0.gguf", 13.0),
        ("mixtral-8x22b.gguf", 8 * 22 * 0.83),
        ("bge-large-335M-F16.gguf", 0.335),
        ("phi-3-mini-4k-Q4_K_M.gguf", None),
        ("model-v2b3.gguf", None),
        ("nomic-embed-text-v1.5.Q8_0.gguf", None),
        ("4bit.gguf", None),
    ],
)
def test_parameters_are_read_from_the_name(source: str, expected: float | None) -> None:
    assert billions(model(source)) == (pytest.approx(expected) if expected else None)


def test_a_size_that_is_said_counts() -> None:
    assert weights_mib(model("llama-8b-q4_0.gguf", size_gib=4.5)) == 4608


def test_without_any_word_the_usual_size_of_the_kind_counts() -> None:
    assert weights_mib(model("x.gguf")) == 5 * 1024
    assert weights_mib(model("x.gguf", "embedding")) == 307


def test_without_a_quantization_the_weights_have_16_bits() -> None:
    assert weights_mib(model("llama-8b.gguf")) == pytest.approx(16 * GB, rel=0.01)


@pytest.mark.parametrize(
    ("source", "kib_per_token", "tolerance"),
    [
        ("Qwen3-0.6B-Q8_0.gguf", 112, 0.01),
        ("Llama-3.2-3B-Instruct-Q4_0.gguf", 112, 0.01),
        ("Llama-3.1-8B-Q4_0.gguf", 128, 0.01),
        ("Qwen2.5-32B-Q4_0.gguf", 256, 0.01),
        ("Llama-3.1-70B-Q4_0.gguf", 320, 0.2),
    ],
)
def test_the_cache_is_near_that_of_real_models(source: str, kib_per_token: int, tolerance: float) -> None:
    found = kv_cache_mib(model(source, context=16384), ServerSettings(slots=1, cache_type="f16"))

    assert found == pytest.approx(kib_per_token * 16384 / 1024, rel=tolerance)


def test_the_cache_grows_with_slots_and_context_and_shrinks_with_its_type() -> None:
    small = kv_cache_mib(model("x-8b.gguf", context=4096), ServerSettings(slots=1, cache_type="f16"))

    assert kv_cache_mib(model("x-8b.gguf", context=4096), ServerSettings(slots=4, cache_type="f16")) == pytest.approx(
        4 * small, abs=2
    )
    assert kv_cache_mib(model("x-8b.gguf", context=8192), ServerSettings(slots=1, cache_type="f16")) == pytest.approx(
        2 * small, abs=2
    )
    assert kv_cache_mib(model("x-8b.gguf", context=4096), ServerSettings(slots=1, cache_type="q8_0")) == pytest.approx(
        0.53 * small, abs=2
    )


def test_only_chat_models_keep_a_cache_worth_counting() -> None:
    embedder = model("x.gguf", "embedding", context=8192)

    assert kv_cache_mib(embedder, ServerSettings(slots=4, cache_type="f16")) == 0
    assert replica_mib(embedder, ServerSettings(slots=4, cache_type="f16")) == 307 + 150


def test_seed_004_s_cards_hold_a_chat_and_an_embedding_server() -> None:
    """Its operators measured 7.4 of 8 GB with both on one P104-100."""
    chat = model("Llama-3.1-8B-Stheno-v3.4-Q5_K_M.gguf", context=16384)
    embedder = model("nomic-embed-text-v1.5.Q8_0.gguf", "embedding", context=2048, size_gib=0.14)

    both = replica_mib(chat, ServerSettings(cache_type="q8_0")) + replica_mib(
        embedder, ServerSettings(slots=1, cache_type="f16")
    )

    assert both == pytest.approx(7.4 * 1024, rel=0.06)
