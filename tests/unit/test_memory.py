"""Where weights and caches lie, what would fit, and plans that need neither network nor files (004-20, F6, F10)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from corral.build import load_site
from corral.cli import main
from corral.config.gguf_header import Header, facts_of, read_header
from corral.config.inventory import Model
from corral.config.load import load_inventory
from corral.config.model_lock import Gguf, LockedFile, ModelLock
from corral.plan.memory import MIB, Use, memory_of
from corral.plan.settings import gguf_of
from corral.verbs.models.models import Store
from tests.model_files import make_random_model
from tests.model_headers import write_header

# About as a real one is; its cache is known: 128 KiB for each token at 16 bits.
LLAMA_8B = Gguf(
    architecture="llama", quantization="Q4_K_M", parameters=8_030_000_000, context=131072, vocabulary=128256,
    embedding=4096, feed_forward=(14336,) * 32, heads=(32,) * 32, kv_heads=(8,) * 32, key_length=128, value_length=128,
    input_bytes=295_000_000, output_bytes=431_000_000, layer_bytes=(130_000_000,) * 32,
)  # fmt: skip


def use(**changes: object) -> Use:
    return Use(**{"slots": 1, "context": 8192, "batch": 2048, "ubatch": 512, **changes})  # type: ignore[arg-type]


def test_a_draft_takes_its_own_weights_and_cache_in_the_same_server() -> None:
    small = LLAMA_8B.model_copy(update={"layer_bytes": (10_000_000,) * 8})
    both = memory_of(LLAMA_8B, use()) + memory_of(small, use())

    assert both.weights == memory_of(LLAMA_8B, use()).weights + memory_of(small, use()).weights
    assert both.device == memory_of(LLAMA_8B, use()).device + memory_of(small, use()).device
    assert both.cache == 8192 * 128 * 1024 * 5 // 4


def test_a_known_model_has_its_known_cache() -> None:
    assert memory_of(LLAMA_8B, use()).cache == 8192 * 128 * 1024
    assert memory_of(LLAMA_8B, use(slots=3)).cache == 3 * 8192 * 128 * 1024
    assert memory_of(LLAMA_8B, use(cache_type="q8_0")).cache == 8192 * 68 * 1024


def test_layers_stay_where_they_are_told() -> None:
    whole, half, none = (memory_of(LLAMA_8B, use(gpu_layers=n)) for n in ("all", 16, 0))
    assert whole.weights == sum(LLAMA_8B.layer_bytes) + LLAMA_8B.output_bytes
    assert whole.host_weights == LLAMA_8B.input_bytes, "tokens become vectors in host memory"
    assert half.weights == sum(LLAMA_8B.layer_bytes) * 15 // 32 + LLAMA_8B.output_bytes, "15 layers and the output"
    assert (half.cache, half.host_cache) == (whole.cache * 15 // 32, whole.cache * 17 // 32)
    assert none.device == 0
    assert none.host > whole.device
    assert memory_of(LLAMA_8B, use(gpu_layers=33)).weights == whole.weights, "33 of 32: the output as well"


def test_cards_get_layers_by_their_shares_and_a_compute_buffer_each() -> None:
    one, two = memory_of(LLAMA_8B, use()), memory_of(LLAMA_8B, use(split=(22, 11)))
    assert (two.weights, two.cache) == (one.weights, one.cache)
    assert two.cards[0] - two.cards[1] == 12 * (130_000_000 + one.cache // 32) - LLAMA_8B.output_bytes
    assert two.compute > 2 * one.compute, "several batches at once"
    assert two.device == sum(two.cards)


def test_a_tied_table_is_on_the_card_and_in_host_memory(tmp_path: Path) -> None:
    make_random_model("qwen3", tmp_path / "m.gguf")
    with (tmp_path / "m.gguf").open("rb") as file:
        model = facts_of(read_header(file.read))
    memory = memory_of(model, use())
    assert memory.weights >= model.input_bytes + sum(model.layer_bytes)
    assert memory.host_weights == model.input_bytes


def test_compressed_caches_and_recurrent_layers_take_what_their_metadata_says() -> None:
    """MLA keeps one compressed row for each token; a recurrent layer keeps a state, however long the text is."""
    latent = LLAMA_8B.model_copy(update={"latent": 512, "rope": 64, "kv_heads": (1,) * 32})
    assert memory_of(latent, use()).cache == 32 * 8192 * (512 + 64) * 2
    mixed = LLAMA_8B.model_copy(update={"recurrent": (1, 1, 1, 0) * 8, "state_bytes": 1 << 20})
    short, long = memory_of(mixed, use(slots=2)), memory_of(mixed, use(slots=2, context=16384))
    assert short.state == long.state == 2 * 24 * (1 << 20)
    assert short.cache == memory_of(LLAMA_8B, use(slots=2)).cache // 4


# --- in a plan -------------------------------------------------------------------------------------------------------

INVENTORY = """
schema_version: 1
name: farm
hosts:
  box: {address: 192.0.2.10, gpus: [{card: p104-100}, {card: p104-100}, {card: rtx-3060}]}
models:
  m: {source: m.gguf, kind: chat, context: CONTEXT}
pools:
  chat: {model: m, on: {host: box, gpus: 1}, engine: {slots: 2}}
gateway: {host: box}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lock = ModelLock(files={"m.gguf": LockedFile(file="m.gguf", size=4_900_000_000, gguf=LLAMA_8B)})
    lock.write(tmp_path / "models.lock.json")
    return tmp_path


def test_a_plan_needs_no_file_and_shows_no_guess(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "inventory.yaml").write_text(INVENTORY.replace("CONTEXT", "4096"))
    assert main(["plan"]) == 0
    said = capsys.readouterr().out
    assert "estimated from file names" not in said
    [replica] = load_site(load_inventory(folder / "inventory.yaml")).replicas
    assert replica.memory is not None
    assert replica.vram_mib == pytest.approx(replica.memory.device / MIB + 420, abs=1)


def test_a_draft_is_fetched_for_the_host_and_counted_on_the_card(folder: Path) -> None:
    text = INVENTORY.replace("kind: chat, context: CONTEXT}", "kind: chat, context: 4096}")
    (folder / "inventory.yaml").write_text(text)
    [alone] = load_site(load_inventory(folder / "inventory.yaml")).replicas
    drafted = text.replace(
        "context: 4096}", "context: 4096, draft: {model: s}}\n  s: {source: s-1b-q4_0.gguf, kind: chat}"
    )
    (folder / "inventory.yaml").write_text(drafted)
    site = load_site(load_inventory(folder / "inventory.yaml"))
    [guessed] = site.replicas
    assert guessed.memory is None, "nobody has read the draft's file"
    assert list(guessed.files) == ["m.gguf", "s-1b-q4_0.gguf"]
    wanted = Store(site, folder / "inventory.yaml", folder, Console(quiet=True)).wanted()
    assert {item.source: item.hosts for item in wanted} == {"m.gguf": ("box",), "s-1b-q4_0.gguf": ("box",)}
    small = LLAMA_8B.model_copy(update={"layer_bytes": (10_000_000,) * 8, "output_bytes": 50_000_000})
    files = dict(load_inventory(folder / "inventory.yaml").lock.files)
    files["s-1b-q4_0.gguf"] = LockedFile(file="s-1b-q4_0.gguf", size=200_000_000, gguf=small)
    ModelLock(files=files).write(folder / "models.lock.json")
    [known] = load_site(load_inventory(folder / "inventory.yaml")).replicas
    more = memory_of(small, use(slots=2, context=4096))
    assert known.vram_mib - alone.vram_mib == pytest.approx(more.device / MIB, abs=1)
    off_card = drafted.replace("{model: s}", "{model: s, gpu_layers: 0}")
    (folder / "inventory.yaml").write_text(off_card)
    [beside] = load_site(load_inventory(folder / "inventory.yaml")).replicas
    assert beside.vram_mib == pytest.approx(alone.vram_mib, abs=1)


def test_over_budget_says_by_how_much_and_what_fits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "inventory.yaml").write_text(INVENTORY.replace("CONTEXT", "16384"))
    assert main(["check"]) == 1
    [line, *_] = capsys.readouterr().err.splitlines()
    assert "GPU 1 of box lacks" in line
    advice = line.split("what would fit: ")[1].removesuffix(" [vram]").split("; ")
    assert "chat with slots: 1" in advice
    assert "chat on GPU 3 of box (rtx-3060)" in advice
    assert "chat split with gpus_per_replica: 2" in advice
    contexts = [int(words.split()[-1]) for words in advice if words.startswith("models.m.context")]
    text = (folder / "inventory.yaml").read_text()
    [context] = contexts
    for changed in (
        text.replace("slots: 2", "slots: 1"),
        text.replace("16384", str(context)),
        text.replace("gpus: 1}", "gpus: 3}"),
        text.replace("gpus: 1}", "gpus: 1-2, gpus_per_replica: 2}"),
    ):
        (folder / "inventory.yaml").write_text(changed)
        assert main(["check"]) == 0, capsys.readouterr().err
    (folder / "inventory.yaml").write_text(text.replace("16384", str(context + 1024)))
    assert main(["check"]) == 1, "the largest context that fits was named"


def test_parts_of_a_model_are_one_model(tmp_path: Path) -> None:
    """Later parts have tensors only; what is left in host memory is found in all of them."""
    write_header(tmp_path / "m.gguf", "qwen3-next-80b-a3b")
    with (tmp_path / "m.gguf").open("rb") as file:
        header = read_header(file.read)
    whole = facts_of(header)
    half = len(header.tensors) // 3
    first = facts_of(replace(header, tensors=header.tensors[:half]))
    part = facts_of(Header({"split.no": 1}, header.tensors[half:], 0))
    assert part.architecture == ""
    assert first.with_part(part) == whole

    size = LockedFile(file="m", size=1).size
    lock = ModelLock(
        files={
            "m-00001-of-00002.gguf": LockedFile(file="a", size=size, gguf=first),
            "m-00002-of-00002.gguf": LockedFile(file="b", size=size, gguf=part),
        }
    )
    model = Model(source="m-00001-of-00002.gguf", kind="chat")
    assert gguf_of(model, lock) == whole
