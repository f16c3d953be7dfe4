"""Models larger than a card, and cards of unequal size: what the plan says and renders (field rows 1-6, 27-39)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from corral.build import Plan, build_plan
from corral.config.gguf_header import facts_of, read_header
from corral.config.load import load_inventory
from corral.config.model_lock import LockedFile, ModelLock
from corral.errors import SiteError
from tests.model_headers import models, write_header

Build = Callable[..., Plan]
CARDS = {"3090": {"card": "rtx-3090"}, "3060": {"card": "rtx-3060"}, "1650": {"card": "gtx-1650"}}
AUTO: dict[str, Any] = {"host": "box", "gpus": 1}


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Makes the plan of one pool with a published model; `is_known` says whether its file was looked into."""

    def made(
        model: str, *cards: str, on: object = AUTO, engine: Mapping[str, Any] | None = None, context: int = 8192,
        is_known: bool = True, kind: str = "chat", file: str = "", more: Mapping[str, Any] | None = None,
        keeps_lock: bool = False,
    ) -> Plan:  # fmt: skip
        source = file or f"{model}.gguf"
        if is_known and not keeps_lock:
            write_header(tmp_path / source, model)
            with (tmp_path / source).open("rb") as content:
                known = LockedFile(file=source, gguf=facts_of(read_header(content.read)))
            ModelLock(files={source: known}).write(tmp_path / "models.lock.json")
        host = {
            "address": "192.0.2.10",
            "gpus": [
                {**CARDS[card], "uuid": f"GPU-0000000{n}-0000-0000-0000-000000000000"} for n, card in enumerate(cards)
            ],
        }
        pools = {"chat": {"model": "m", "on": on, "engine": dict(engine or {})}, **(more or {})}
        text = {"schema_version": 1, "name": "farm", "hosts": {"box": host}, "pools": pools, "gateway": {"host": "box"}}
        text["models"] = {"m": {"source": source, "kind": kind, "context": context}}
        (tmp_path / "inventory.yaml").write_text(yaml.safe_dump(text), encoding="utf-8")
        return build_plan(load_inventory(tmp_path / "inventory.yaml"))

    return made


def told(plan: Plan) -> dict[str, str]:
    """The command line of its server, by flag."""
    words = next(service.args for service in plan.contributions.services if service.component == "llama")
    return {word: words[place + 1] for place, word in enumerate(words[:-1]) if word.startswith("--")}


def rules(plan: Plan) -> list[str]:
    return [warning.rule for warning in plan.warnings if warning.rule not in ("image-lock", "card-pinned")]


TWO = {"host": "box", "gpus": "1-2", "gpus_per_replica": 2}


def test_cards_of_unequal_size_get_layers_by_their_room(build: Build) -> None:
    """Row 1: 24 + 12 GB hold 28 GB together, where two halves of it would not fit."""
    plan = build("gemma-3-27b", "3090", "3060", on=TWO, context=32768, engine={"slots": 4})
    first, second = map(int, told(plan)["--tensor-split"].split(","))
    assert first + second == 63, "62 layers and the output"
    assert first > 1.8 * second
    [replica] = plan.site.replicas
    rooms = [24 * 1024 - 256, 12 * 1024 - 256]
    assert all(mib < room for mib, room in zip(replica.card_mib, rooms, strict=True))
    assert sum(replica.card_mib) / 2 > rooms[1]


def test_shares_are_said_always_and_respect_other_tenants(build: Build) -> None:
    """Row 2: by itself llama.cpp would look at what is free at the moment of the start."""
    assert told(build("llama-3.3-70b", "3090", "3090", on=TWO))["--tensor-split"] == "41,40"
    more = {"other": {"model": "m", "on": {"host": "box", "gpus": 1}, "engine": {"vram_mib": 6000}}}
    plan = build("gemma-3-27b", "3090", "3090", on=TWO, more=more)
    first, second = map(int, told(plan)["--tensor-split"].split(","))
    assert first < second
    plan = build("gemma-3-27b", "3090", "3090", on=TWO, engine={"tensor_split": [3, 1]})
    assert told(plan)["--tensor-split"] == "3,1"
    assert plan.site.replicas[0].card_mib[0] > 2 * plan.site.replicas[0].card_mib[1]


def test_experts_stay_in_host_memory_and_the_container_holds_them(build: Build) -> None:
    """Rows 4 and 5: a mixture of experts that is larger than the card."""
    with pytest.raises(SiteError) as refused:
        build("gpt-oss-120b", "3090")
    assert "chat with cpu_moe: 23" in str(refused.value)
    plan = build("gpt-oss-120b", "3090", engine={"cpu_moe": 24})
    assert told(plan)["--n-cpu-moe"] == "24"
    [replica] = plan.site.replicas
    assert 15_000 < replica.vram_mib < 24 * 1024 - 256
    assert replica.memory_mib > 36_000, "what is not on the card"
    whole = build("gpt-oss-120b", "3090", engine={"cpu_moe": "all"}).site.replicas[0]
    assert whole.vram_mib < 4000
    assert whole.memory_mib > 60_000
    some = build("gpt-oss-120b", "3090", engine={"host_tensors": [r"blk\.(\d|1\d|2[0-3])\.ffn_.*_exps"]}).site.replicas[
        0
    ]
    assert some.vram_mib == replica.vram_mib
    assert told(build("gpt-oss-120b", "3090", engine={"host_tensors": ["_exps"]}))["--override-tensor"] == "_exps=CPU"


def test_a_lock_of_before_is_not_believed_about_tensors(build: Build, tmp_path: Path) -> None:
    build("qwen3-30b-a3b", "3090")
    path = tmp_path / "models.lock.json"
    data = json.loads(path.read_text())
    del data["files"]["qwen3-30b-a3b.gguf"]["gguf"]["tensors"]
    path.write_text(json.dumps(data))
    [warning] = [
        str(item)
        for item in build("qwen3-30b-a3b", "3090", engine={"cpu_moe": 8}, keeps_lock=True).warnings
        if item.rule == "offload"
    ]
    assert "models inspect" in warning


def test_copied_weights_have_to_fit_into_the_container(build: Build) -> None:
    """Row 5: without mapping, all that is not on a card is taken for good."""
    engine = {"cpu_moe": "all", "load_mode": "none", "memory_mib": 8192}
    with pytest.raises(SiteError, match="server-ram"):
        build("gpt-oss-120b", "3090", engine=engine)
    assert told(build("gpt-oss-120b", "3090", engine=engine | {"load_mode": "mmap"})).get("--load-mode") is None


@pytest.mark.parametrize("is_known", [True, False])
def test_layers_stay_in_host_memory(build: Build, *, is_known: bool) -> None:
    """Row 6: also while the size is guessed."""
    whole = build("llama-3.3-70b", "3090", "3090", on=TWO, is_known=is_known).site.replicas[0]
    plan = build("llama-3.3-70b", "3090", engine={"gpu_layers": 36}, is_known=is_known, file="llama-70b-Q4_K_M.gguf")
    part = plan.site.replicas[0]
    assert part.vram_mib < 24 * 1024 - 256 < whole.vram_mib
    assert part.memory_mib > 20_000
    assert rules(plan) == []


def test_advice_names_the_layers_that_fit(build: Build) -> None:
    with pytest.raises(SiteError) as refused:
        build("llama-3.3-70b", "3090", context=4096)
    found = str(refused.value)
    layers = int(found.partition("chat with gpu_layers: ")[2].partition(" ")[0])
    build("llama-3.3-70b", "3090", context=4096, engine={"gpu_layers": layers})
    with pytest.raises(SiteError):
        build("llama-3.3-70b", "3090", context=4096, engine={"gpu_layers": layers + 1})


def test_no_layer_on_two_cards_is_possible(build: Build) -> None:
    plan = build("gemma-3n-e4b", "3090", "3060", on=TWO, engine={"gpu_layers": 0})
    assert plan.site.replicas[0].card_mib == (0, 0)


def test_a_split_sees_what_another_one_took(build: Build) -> None:
    """Two of 15 GB on 24 + 12 GB: the second gets what the first, which is mostly on the large card, left."""
    plan = build("gemma-3-27b", "3090", "3060", on=TWO, context=2048, more={"other": {"model": "m", "on": TWO}})
    taken = [sum(sizes) for sizes in zip(*(replica.card_mib for replica in plan.site.replicas), strict=True)]
    full = [mib / (gib * 1024 - 256) for mib, gib in zip(taken, (24, 12), strict=True)]
    assert full[0] == pytest.approx(full[1], abs=0.1)


def test_auto_splits_what_no_card_holds(build: Build) -> None:
    """Row 39."""
    plan = build("llama-3.3-70b", "3090", "3090", on="auto")
    assert [card.number for card in plan.site.replicas[0].cards] == [1, 2]
    assert "split over GPU 1, 2" in plan.site.reasons[0]


@pytest.mark.parametrize(
    ("file", "card", "rule"),
    [
        ("Qwen3-30B-A3B-Q4_K_M.gguf", "3060", "vram"),
        ("GLM-4.5-Air-Q4_K_M.gguf", "3090", "memory-guess"),
        ("Llama-3.1-8B-Q4_K_M.gguf", "3090", None),
    ],
)
def test_a_guess_is_a_warning_in_both_directions(build: Build, file: str, card: str, rule: str | None) -> None:
    """Row 32."""
    plan = build("qwen3-30b-a3b", card, file=file, is_known=False)
    assert rules(plan) == ([rule] if rule else [])
    assert all("models inspect" in str(warning) for warning in plan.warnings if warning.rule == rule)


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("brandnew9", 'does not know the architecture "brandnew9"'),
        ("clip", "a projector"),
        ("imatrix", "an importance matrix"),
        ("qwen_image", "a picture model (qwen_image)"),
    ],
)
def test_files_that_are_no_language_model(build: Build, tmp_path: Path, architecture: str, words: str) -> None:
    """Rows 27 and 28."""
    header = facts_of_header(tmp_path, architecture)
    ModelLock(files={"m-1b.gguf": header}).write(tmp_path / "models.lock.json")
    with pytest.raises(SiteError) as refused:
        build("m", "3090", file="m-1b.gguf", is_known=False)
    assert words in str(refused.value)


def facts_of_header(folder: Path, architecture: str) -> LockedFile:
    """A file of four small layers that says that it is of this architecture."""
    write_header(folder / "made.gguf", "qwen3-embedding-0.6b")
    with (folder / "made.gguf").open("rb") as content:
        facts = facts_of(read_header(content.read))
    return LockedFile(file="m-1b.gguf", gguf=facts.model_copy(update={"architecture": architecture}))


def test_small_models_are_not_priced_too_high(build: Build) -> None:
    """Rows 29 and 30: tables of single layers stay in host memory; the last token's vector needs no long batch."""
    [gemma] = build("gemma-3n-e4b", "1650").site.replicas
    assert gemma.vram_mib < 4 * 1024 - 256
    plan = build("qwen3-embedding-0.6b", "1650", kind="embedding", context=8192, engine={"slots": 1})
    assert told(plan)["--ubatch-size"] == "512"
    assert rules(plan) == []
    assert plan.site.replicas[0].vram_mib < 4 * 1024
    assert told(build("nomic-embed-text-v1.5", "1650", kind="embedding", context=2048))["--ubatch-size"] == "2048"


def test_slots_share_one_context(build: Build) -> None:
    """Row 37."""
    plan = build("qwen3-30b-a3b", "3090", context=40960, engine={"slots": 4, "kv_unified": True})
    assert (told(plan)["--ctx-size"], "--kv-unified" in told(plan)) == ("40960", True)
    [one] = plan.site.replicas
    [apart] = build("qwen3-30b-a3b", "3090", context=10240, engine={"slots": 4}).site.replicas
    assert one.vram_mib == pytest.approx(apart.vram_mib, abs=200)


def test_checkpoints_are_bounded_and_counted(build: Build) -> None:
    """A slot's states of a sliding window would take 20 GiB of host memory by themselves."""
    plan = build("gemma-3-27b", "3090", context=16384)
    count, memory = int(told(plan)["--ctx-checkpoints"]), plan.site.replicas[0].memory
    assert memory is not None
    assert 1 <= count * memory.checkpoint // (1 << 20) <= 1024
    assert "--ctx-checkpoints" not in told(build("llama-3.3-70b", "3090", "3090", on=TWO))
    assert told(build("gemma-3-27b", "3090", engine={"checkpoints": 0}))["--ctx-checkpoints"] == "0"


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"cpu_moe": 4}, "has no experts"),
        ({"tensor_split": [1, 2]}, "has 1 card, not 2"),
        ({"tensor_split": [0]}, "gives no card a share"),
        ({"host_tensors": ["ffn_(up"]}, "must be a regular expression"),
        ({"host_tensors": ["ffn_up=CPU"]}, "has a sign in it that parts the pairs"),
        ({"host_tensors": ["_exps"]}, "no tensor is called like"),
        ({"extra_args": ["--rpc", "192.0.2.7:50052"]}, "leads to no other machine"),
        ({"extra_args": ["-ot", "exps=CPU"]}, "write host_tensors: in engine"),
        ({"extra_args": ["--main-gpu", "1"]}, "write gpus: in on: of the pool"),
    ],
)
def test_what_has_no_effect_is_refused(build: Build, engine: dict[str, Any], words: str) -> None:
    with pytest.raises(SiteError) as refused:
        build("gemma-3n-e4b", "3090", engine=engine)
    assert words in str(refused.value)


def test_every_header_is_read(tmp_path: Path) -> None:
    """Row 31: what a header says of layers, experts and states is found for every model."""
    for name in models():
        write_header(tmp_path / "m.gguf", name)
        with (tmp_path / "m.gguf").open("rb") as content:
            facts = facts_of(read_header(content.read))
        assert (
            (tmp_path / "m.gguf").stat().st_size - 256_000 < facts_total(facts) < (tmp_path / "m.gguf").stat().st_size
        )


def facts_total(facts: Any) -> int:
    return int(sum(facts.layer_bytes) + facts.unused_bytes + facts.input_bytes + facts.output_bytes + facts.other_bytes)
