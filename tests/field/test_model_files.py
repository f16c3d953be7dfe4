"""Model files as people have them: two of one name, quantizations and browsers' addresses, caches and stores.

Rows 20 to 26 and 33 of the field log.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from corral.build import Plan, build_plan
from corral.cli import main
from corral.config.file_names import ollama_manifest
from corral.config.load import load_inventory
from corral.config.model_lock import LockedFile, ModelLock
from corral.errors import CorralError, SiteError
from corral.render.tree import render
from corral.runtime.hosts import ComposeHost
from corral.runtime.observe import observe
from corral.verbs.doctor import files as doctor_files
from corral.verbs.doctor.case import Case, sections
from tests.model_stores import COMMIT, put_in_hub, put_in_ollama
from tests.tiny_models import make_chat_model
from tests.weight_server import Shop, weight_server

OTHER = "2" * 40
TWO_THAT_SEE = """
  a: {source: "hf:o/A-GGUF/A-8B-Q4_K_M.gguf", projector: "hf:o/A-GGUF/mmproj-F16.gguf", kind: chat}
  b: {source: "hf:o/B-GGUF/B-7B-Q4_K_M.gguf", projector: "hf:o/B-GGUF/mmproj-F16.gguf", kind: chat}
"""
SEEING = ("A-8B-Q4_K_M", "o--A-GGUF/mmproj-F16", "B-7B-Q4_K_M", "o--B-GGUF/mmproj-F16")
TWO_REVISIONS = f"""
  a: {{source: "hf:o/A-GGUF/A-8B-Q4_K_M.gguf", revision: "{COMMIT}", kind: chat}}
  b: {{source: "hf:o/A-GGUF/A-8B-Q4_K_M.gguf", revision: "{OTHER}", kind: chat}}
"""
IN_PARTS = """
  a: {source: "hf:o/A-GGUF/Q2_K/A-8B-Q2_K-00001-of-00002.gguf", kind: chat}
  b: {source: "hf:o/B-GGUF/Q2_K/A-8B-Q2_K-00001-of-00002.gguf", kind: chat}
"""
OTHER_PLACES = """
  a: {source: "https://example.com/m.gguf", kind: chat}
  b: {source: m.gguf, kind: chat}
"""
ALONE = """
  a: {source: "hf:o/A-GGUF/Q2_K/A-8B-Q2_K-00001-of-00002.gguf", kind: chat}
  b: {source: "Qwen3 8B (Deutsch).Q4_K_M.gguf", kind: chat}
"""


def write(folder: Path, models: str, host: str = "") -> Path:
    """An inventory with these models, each in a pool on a card of its own."""
    names = [line.split(":")[0].strip() for line in models.splitlines() if line.startswith("  ") and line[2] != " "]
    pools = "\n".join(f"  {name}: {{model: {name}, on: {{host: rig, gpus: {n}}}}}" for n, name in enumerate(names, 1))
    text = f"""schema_version: 1
name: field
hosts:
  rig: {{address: 192.0.2.10, gpus: {{card: rtx-3090, count: {len(names)}}}{host}}}
models:{models}pools:
{pools}
gateway: {{host: rig}}
"""
    (folder / "inventory.yaml").write_text(text)
    return folder / "inventory.yaml"


def plan_of(path: Path) -> Plan:
    return build_plan(load_inventory(path))


def files(path: Path) -> list[str]:
    """Paths of all files of all servers, in order."""
    return [file for replica in plan_of(path).site.replicas for file in replica.files]


# --- paths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "paths"),
    [
        (TWO_THAT_SEE, [f"{part}.gguf" for part in SEEING]),
        (TWO_REVISIONS, [f"o--A-GGUF--{COMMIT[:12]}/A-8B-Q4_K_M.gguf", f"o--A-GGUF--{OTHER[:12]}/A-8B-Q4_K_M.gguf"]),
        (IN_PARTS, [f"o--{r}-GGUF/A-8B-Q2_K-0000{n}-of-00002.gguf" for r in "AB" for n in (1, 2)]),
        (OTHER_PLACES, [f"https--{hashlib.sha256(b'https://example.com/m.gguf').hexdigest()[:12]}/m.gguf", "m.gguf"]),
        (ALONE, ["A-8B-Q2_K-00001-of-00002.gguf", "A-8B-Q2_K-00002-of-00002.gguf", "Qwen3 8B (Deutsch).Q4_K_M.gguf"]),
    ],
)  # fmt: skip
def test_every_file_has_a_path_of_its_own(tmp_path: Path, models: str, paths: list[str]) -> None:
    inventory = write(tmp_path, models)
    assert files(inventory) == paths
    told = render(plan_of(inventory))["rig/llama/compose.yaml"].decode()
    assert all(f"/models/{path}" in told for path in paths if "00002-of" not in path and "mmproj" not in path)


def test_a_file_that_is_known_keeps_its_path_and_a_new_one_gets_another(tmp_path: Path) -> None:
    inventory = write(tmp_path, TWO_THAT_SEE)
    known = {f"hf:o/A-GGUF/{name}": LockedFile(file=name, sha256="a" * 64) for name in ("mmproj-F16.gguf",)}
    ModelLock(files=known).write(ModelLock.beside(inventory))
    assert files(inventory)[1::2] == ["mmproj-F16.gguf", "o--B-GGUF/mmproj-F16.gguf"]


def test_a_bundle_has_files_of_stores_by_the_names_that_they_have_without(
    shop: Shop, chat: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inventory = write(tmp_path, IN_STORES, make_stores(tmp_path, chat))
    assert run(capsys, "pull")[0] == 0
    host = ComposeHost(plan_of(inventory), "rig", tmp_path / "compose")
    names = ["A-8B-Q4_K_M.gguf", "B-Q4_K_M.gguf", "publisher/A-8B-GGUF/A-8B-Q4_K_M.gguf", "tiny-1b.gguf"]
    assert sorted(host.files_without_stores) == names
    assert all(Path(path).is_file() for path, _ in host.files_without_stores.values())
    assert sorted(host.used_stores) == [str(tmp_path / name) for name in ("hub", "ollama", "studio")]


def test_doctor_looks_into_stores(shop: Shop, chat: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inventory = write(tmp_path, IN_STORES, make_stores(tmp_path, chat))
    assert run(capsys, "pull")[0] == 0
    host = ComposeHost(plan_of(inventory), "rig", tmp_path / "compose")

    def said() -> list[str]:
        return [item.message for item in doctor_files.models(Case(host, observe(host, sections)))]

    assert said() == []
    blob = next((tmp_path / "hub").glob("models--*/blobs/*"))
    blob.rename(tmp_path / "moved.gguf")
    blob.symlink_to(tmp_path / "moved.gguf")
    assert [words for words in said() if words.endswith("is a link that leads out of its folder")]
    (tmp_path / "studio").chmod(0o700)
    assert f"containers cannot look into {tmp_path}/studio (mode 700)" in said()
    shutil.rmtree(tmp_path / "studio")
    assert f"there is no folder {tmp_path}/studio" in said()


def test_a_path_that_a_person_says_is_left_to_that_file(tmp_path: Path) -> None:
    inventory = write(tmp_path, OTHER_PLACES)
    known = {"https://example.com/m.gguf": LockedFile(file="m.gguf", sha256="a" * 64)}
    ModelLock(files=known).write(ModelLock.beside(inventory))
    assert [Path(file).parent.name[:7] for file in files(inventory)] == ["https--", ""]


@pytest.mark.parametrize(("second", "is_shared"), [("a", True), ("b", False)])
def test_locks_of_before_with_one_path_for_two_contents_are_not_believed(
    tmp_path: Path, second: str, *, is_shared: bool
) -> None:
    inventory = write(tmp_path, TWO_REVISIONS)
    entries = {
        f"hf:o/A-GGUF/A-8B-Q4_K_M.gguf@{commit}": LockedFile(file="A-8B-Q4_K_M.gguf", sha256=sign * 64)
        for commit, sign in ((COMMIT, "a"), (OTHER, second))
    }
    ModelLock(files=entries).write(ModelLock.beside(inventory))
    assert (len(set(files(inventory))) == 1) == is_shared


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "key"),
    [
        ("https://huggingface.co/o/B-GGUF/blob/main/B.gguf", "hf:o/B-GGUF/B.gguf"),
        ("https://huggingface.co/o/B-GGUF/resolve/main/sub/B%20b.gguf?download=true", "hf:o/B-GGUF/sub/B b.gguf"),
        (f"https://hf.co/o/B-GGUF/blob/{COMMIT}/B.gguf", f"hf:o/B-GGUF/B.gguf@{COMMIT}"),
        ("http://www.huggingface.co/o/B-GGUF/blob/refs%2Fpr%2F2/B.gguf", "hf:o/B-GGUF/B.gguf@refs/pr/2"),
        ("https://example.com/o/B-GGUF/blob/main/B.gguf", "https://example.com/o/B-GGUF/blob/main/B.gguf"),
    ],
)
def test_addresses_of_browsers_are_files_of_the_hub(tmp_path: Path, address: str, key: str) -> None:
    inventory = write(tmp_path, f'\n  a: {{source: "{address}", kind: chat}}\n')
    assert list(plan_of(inventory).site.paths) == [key]


def test_a_pin_under_the_address_of_before_is_still_one(tmp_path: Path) -> None:
    address = "https://huggingface.co/o/B-GGUF/resolve/main/B.gguf"
    inventory = write(tmp_path, f'\n  a: {{source: "{address}", kind: chat}}\n')
    text = json.dumps({"version": 1, "files": {address: {"file": "B.gguf", "sha256": "a" * 64}}})
    ModelLock.beside(inventory).write_text(text)
    assert plan_of(inventory).site.lock.files["hf:o/B-GGUF/B.gguf"].sha256 == "a" * 64


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("hf:o/Tess-GGUF/Tess.Q8_0.gguf.part1of2", "one piece of a file that was cut up; join the pieces"),
        ("hf:o/Tess-GGUF/Tess.Q8_0.gguf-split-a", "one piece of a file that was cut up; join the pieces"),
        ("owner/D-8B-GGUF", "write hf:owner/D-8B-GGUF:Q4_K_M"),
        ("https://huggingface.co/o/B-GGUF", "write hf:owner/repo/file.gguf or hf:owner/repo:Q4_K_M"),
        ("/srv/x/m.gguf", "name its folder in the host's model_stores"),
        ("llama3.2:3b", "write ollama:llama3.2:3b"),
        ("ollama:..:3b", "this names no model of Ollama"),
    ],
)
def test_what_is_no_file_is_refused_with_what_to_write(tmp_path: Path, source: str, words: str) -> None:
    inventory = write(tmp_path, f'\n  a: {{source: "{source}", kind: chat}}\n')
    with pytest.raises(SiteError, match=r"a\.source") as caught:
        plan_of(inventory)
    assert words in str(caught.value)


def test_a_projector_has_a_file(tmp_path: Path) -> None:
    inventory = write(tmp_path, '\n  a: {source: a.gguf, projector: "hf:o/A:F16", kind: chat}\n')
    with pytest.raises(SiteError, match=r"name its file, such as hf:owner/repo/mmproj-F16\.gguf"):
        plan_of(inventory)


@pytest.mark.parametrize("file", ["file:/etc/passwd", "hf:o/B/m.gguf", "hf:o/A/../m.gguf", "../m.gguf"])
def test_a_lock_cannot_lead_a_quantization_elsewhere(tmp_path: Path, file: str) -> None:
    inventory = write(tmp_path, '\n  a: {source: "hf:o/A:Q4_0", kind: chat}\n')
    ModelLock.beside(inventory).write_text(json.dumps({"version": 1, "tags": {"hf:o/A:Q4_0": file}, "files": {}}))
    with pytest.raises(CorralError, match="is no file of its repository"):
        load_inventory(inventory)


@pytest.mark.parametrize(
    ("source", "manifest"),
    [
        ("ollama:llama3.2", "registry.ollama.ai/library/llama3.2/latest"),
        ("ollama:llama3.2:3b-instruct-q4_K_M", "registry.ollama.ai/library/llama3.2/3b-instruct-q4_K_M"),
        ("ollama:ann/mine:1b", "registry.ollama.ai/ann/mine/1b"),
        ("ollama:hf.co/o/A-8B-GGUF:Q4_K_M", "hf.co/o/A-8B-GGUF/Q4_K_M"),
        ("ollama:localhost:5000/ann/mine:1b#projector", "localhost:5000/ann/mine/1b"),
    ],
)
def test_names_of_ollama_lead_to_its_lists_of_parts(source: str, manifest: str) -> None:
    assert ollama_manifest(source) == f"manifests/{manifest}"


# --- what `models` finds ---------------------------------------------------------------------------------------------


@pytest.fixture
def chat(tmp_path: Path) -> bytes:
    make_chat_model(tmp_path / "made.gguf")
    return (tmp_path / "made.gguf").read_bytes()


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shop]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with weight_server() as opened:
        monkeypatch.setenv("HF_ENDPOINT", opened.address)
        yield opened


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["models", *words])
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, " ".join((said.out + said.err).split())


def test_a_quantization_is_looked_up_once_and_then_pinned(
    shop: Shop, chat: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["A-8B-Q4_K_M.gguf", "A-8B-UD-Q4_K_M.gguf", "A-8B-Q8_0.gguf", "mmproj-F16.gguf", "A-8B-Q4_K_S.gguf"]
    parts = ["UD/A-8B-IQ2_M-00001-of-00002.gguf", "UD/A-8B-IQ2_M-00002-of-00002.gguf"]
    shop.put_branch("o/A-8B-GGUF", dict.fromkeys([*names, *parts], chat), COMMIT)
    models = '\n  a: {source: "hf:o/A-8B-GGUF:q4_k_m", kind: chat}\n  b: {source: "hf:o/A-8B-GGUF:IQ2_M", kind: chat}\n'
    inventory = write(tmp_path, models, f", models_dir: {tmp_path}/models")
    before = plan_of(inventory)
    unknown = [item for item in before.warnings if item.rule == "model-unknown"]
    assert [item.level for item in unknown] == ["warning", "warning"]
    assert "./generate.py models inspect" in unknown[0].remedy
    assert run(capsys, "pull")[0] == 0
    assert files(inventory) == [names[0], *(Path(part).name for part in parts)]
    assert not [item for item in plan_of(inventory).warnings if item.rule == "model-unknown"]
    shop.put_branch("o/A-8B-GGUF", {"A-8B-Q4_K_M-new.gguf": chat}, OTHER)
    assert run(capsys, "pull")[0] == 0, "what is pinned is not looked up again"


def test_two_revisions_of_one_file_are_two_files(
    shop: Shop, chat: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_chat_model(tmp_path / "newer.gguf", answer="newer")
    newer = (tmp_path / "newer.gguf").read_bytes()
    for commit, content in ((COMMIT, chat), (OTHER, newer)):
        shop.put_hub("o/A-GGUF", "A-8B-Q4_K_M.gguf", content, commit)
    inventory = write(tmp_path, TWO_REVISIONS, f", models_dir: {tmp_path}/models")
    assert run(capsys, "pull")[1].endswith("2 were fetched")
    assert [(tmp_path / "models" / path).read_bytes() for path in files(inventory)] == [chat, newer]
    assert run(capsys, "verify")[0] == 0


def test_a_quantization_is_found_in_a_folder_that_a_person_has_brought(
    shop: Shop, chat: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "stick").mkdir()
    (tmp_path / "stick" / "A-8B-Q4_0.gguf").write_bytes(chat)
    models = '\n  a: {source: "hf:o/A-8B-GGUF:Q4_0", kind: chat}\n'
    inventory = write(tmp_path, models, f", models_dir: {tmp_path}/models")
    assert run(capsys, "pull", "--from", str(tmp_path / "stick"))[0] == 0
    assert (tmp_path / "models" / files(inventory)[0]).read_bytes() == chat
    assert not shop.seen


def test_a_quantization_that_does_not_say_which_file_is_answered_with_those_there_are(
    shop: Shop, chat: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shop.put_branch("o/A", dict.fromkeys(["A-2B-Q4_0.gguf", "A-9B-Q4_0.gguf", "A-9B-F16.gguf"], chat), COMMIT)
    write(tmp_path, '\n  a: {source: "hf:o/A:Q4_0", kind: chat}\n')
    assert (
        "Q4_0 fits 2 files; name one as hf:o/A/…: the repository has A-2B-Q4_0.gguf, A-9B-Q4_0.gguf"
        in run(capsys, "inspect")[1]
    )
    write(tmp_path, '\n  a: {source: "hf:o/A:Q5_0", kind: chat}\n')
    assert "Q5_0 fits no file" in run(capsys, "inspect")[1]


def make_stores(folder: Path, chat: bytes) -> str:
    """A Hugging Face cache, Ollama's folder and LM Studio's, as those programs write them; as keys of a host."""
    put_in_hub(folder / "hub", "o/B-GGUF", {"sub/B-Q4_K_M.gguf": chat})
    put_in_ollama(folder / "ollama", "tiny", "1b", chat)
    studio = folder / "studio" / "publisher" / "A-8B-GGUF"
    studio.mkdir(parents=True)
    (studio / "A-8B-Q4_K_M.gguf").write_bytes(chat)
    stores = ", ".join(f"{name}: {folder / name}" for name in ("hub", "ollama", "studio"))
    return f", models_dir: {folder}/models, model_stores: {{{stores}}}"


IN_STORES = """
  a: {source: publisher/A-8B-GGUF/A-8B-Q4_K_M.gguf, kind: chat}
  b: {source: "hf:o/B-GGUF/sub/B-Q4_K_M.gguf", kind: chat}
  c: {source: "ollama:tiny:1b", kind: chat}
  d: {source: "hf:publisher/A-8B-GGUF/A-8B-Q4_K_M.gguf", kind: chat}
"""


def test_files_of_other_programs_are_used_where_they_lie(
    shop: Shop, chat: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inventory = write(tmp_path, IN_STORES, make_stores(tmp_path, chat))
    stores = sorted(path for name in ("hub", "ollama", "studio") for path in (tmp_path / name).rglob("*"))
    assert run(capsys, "pull")[0] == 0
    assert shop.sent == 0, "nothing is fetched"
    assert stores == sorted(path for name in ("hub", "ollama", "studio") for path in (tmp_path / name).rglob("*"))
    assert not list((tmp_path / "models").rglob("*.gguf")), "nothing is copied"
    lock = ModelLock.read(ModelLock.beside(inventory))
    sha256 = hashlib.sha256(chat).hexdigest()
    assert {item.sha256 for item in lock.files.values()} == {sha256}
    assert all(item.gguf and item.gguf.architecture == "llama" for item in lock.files.values())
    told = render(plan_of(inventory))["rig/llama/compose.yaml"].decode()
    for mount in ("hub", "ollama", "studio"):
        assert f"{tmp_path}/{mount}:/stores/{mount}:ro" in told
    assert f"/stores/hub/models--o--B-GGUF/snapshots/{COMMIT}/sub/B-Q4_K_M.gguf" in told
    assert f"/stores/ollama/blobs/sha256-{sha256}" in told
    assert told.count("/stores/studio/publisher/A-8B-GGUF/A-8B-Q4_K_M.gguf") == 2
    assert run(capsys, "verify")[0] == 0
    assert run(capsys, "pull")[0] == 0


def test_a_file_that_a_store_has_lost_is_fetched_and_a_changed_one_is_refused(
    shop: Shop, chat: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inventory = write(tmp_path, IN_STORES, make_stores(tmp_path, chat))
    assert run(capsys, "pull")[0] == 0
    shop.put_hub("o/B-GGUF", "sub/B-Q4_K_M.gguf", chat)
    (tmp_path / "hub" / "models--o--B-GGUF" / "refs" / "main").unlink()
    (tmp_path / "hub" / "models--o--B-GGUF" / "snapshots" / COMMIT / "sub" / "B-Q4_K_M.gguf").unlink()
    assert run(capsys, "pull", "b")[0] == 0
    assert (tmp_path / "models" / "B-Q4_K_M.gguf").read_bytes() == chat
    assert files(inventory)[1] == "B-Q4_K_M.gguf"
    (tmp_path / "studio/publisher/A-8B-GGUF/A-8B-Q4_K_M.gguf").write_bytes(chat[:-1] + b"x")
    code, said = run(capsys, "pull", "a")
    assert code == 1
    assert "is not the file that models.lock.json has; look into it, then take it with: models pull --update" in said
    assert run(capsys, "pull", "--update", "a")[0] == 0
    assert run(capsys, "verify", "a")[0] == 0


def test_a_repository_of_a_cache_is_served_from_there(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = {"config.json": b"{}", "model.safetensors": b"weights", "unet/x.safetensors": b"more weights"}
    shop.put_repository("o/words", contents, COMMIT)
    cache = put_in_hub(tmp_path / "home" / "hub", "o/words", contents)
    models = f'\n  a: {{source: "hf:o/words", revision: "{COMMIT}", kind: chat, server: vllm}}\n'
    host = f", models_dir: {tmp_path}/models, model_stores: {{cache: {tmp_path}/home}}"
    inventory = write(tmp_path, models, host)
    assert run(capsys, "pull")[1].endswith("3 files are there and as models.lock.json says; 0 were fetched")
    told = render(plan_of(inventory))["rig/vllm/compose.yaml"].decode()
    assert f"/stores/cache/hub/models--o--words/snapshots/{COMMIT}" in told
    assert f"{tmp_path}/home:/stores/cache:ro" in told
    assert not list((tmp_path / "models").rglob("*.safetensors"))
    (cache / "snapshots" / COMMIT / "config.json").unlink()
    assert "3 were fetched" in run(capsys, "pull")[1], "a part of a repository is none"
    assert "/models/o--words--" in render(plan_of(inventory))["rig/vllm/compose.yaml"].decode()


def test_processes_without_containers_read_stores_by_their_own_paths(
    shop: Shop, chat: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_in_hub(tmp_path / "hub", "o/B-GGUF", {"B-Q4_K_M.gguf": chat})
    (tmp_path / "inventory.yaml").write_text(f"""schema_version: 1
name: field
hosts: {{here: {{runtime: local, model_stores: {{hub: {tmp_path}/hub}}}}}}
models: {{b: {{source: "hf:o/B-GGUF:q4_k_m", kind: chat}}}}
pools: {{b: {{model: b, on: {{host: here}}}}}}
gateway: {{host: here}}
""")
    shop.put_branch("o/B-GGUF", {"B-Q4_K_M.gguf": b"never sent"}, COMMIT)
    assert run(capsys, "pull")[0] == 0
    told = render(plan_of(tmp_path / "inventory.yaml"))["here/supervisord.conf"].decode()
    assert f"--model {tmp_path}/hub/models--o--B-GGUF/snapshots/{COMMIT}/B-Q4_K_M.gguf" in told


def test_links_out_of_what_servers_see_are_not_used(
    shop: Shop, chat: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "m.gguf").symlink_to(tmp_path / "made.gguf")
    write(tmp_path, "\n  a: {source: m.gguf, kind: chat}\n", f", model_stores: {{nas: {tmp_path}/share}}")
    code, said = run(capsys, "pull")
    assert code == 1
    assert "m.gguf: is a link to" in said
    assert "outside of the folder that servers see; it is not used" in said
    assert shop.sent == 0


def test_a_models_folder_that_is_a_cache_itself_needs_no_store(
    shop: Shop, chat: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_stores(tmp_path, chat)
    there = f"models--o--B-GGUF/snapshots/{COMMIT}/sub/B-Q4_K_M.gguf"
    models = f'\n  a: {{source: "file:{tmp_path}/hub/{there}", kind: chat}}\n'
    models += '  b: {source: "hf:o/B-GGUF/sub/B-Q4_K_M.gguf", kind: chat}\n'
    inventory = write(tmp_path, models, f", models_dir: {tmp_path}/hub")
    assert run(capsys, "pull")[0] == 0
    assert files(inventory) == [there, there]
    assert f"/models/{there}" in render(plan_of(inventory))["rig/llama/compose.yaml"].decode()
    assert shop.sent == 0


def test_a_store_that_this_user_may_not_see_is_an_error_with_a_remedy(
    shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "\n  a: {source: m.gguf, kind: chat}\n", f", model_stores: {{nas: {tmp_path}/nas}}")
    seen = Path.is_file

    def is_file(path: Path) -> bool:
        """As for a user who is not root."""
        if path.name == "m.gguf" and path.parent.name == "nas":
            raise PermissionError
        return seen(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    code, said = run(capsys, "pull")
    assert code == 1
    assert f"{tmp_path}/nas/m.gguf: this user may not look there, nor would servers; chmod -R o+rX its folder" in said


def test_a_folder_that_cannot_be_written_is_read(
    shop: Shop, chat: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nas").mkdir()
    (tmp_path / "nas" / "m.gguf").write_bytes(chat)
    (tmp_path / "nas" / ".corral-verified.json").mkdir()  # what root cannot write, either
    write(tmp_path, "\n  a: {source: m.gguf, kind: chat}\n", f", models_dir: {tmp_path}/nas")
    assert run(capsys, "pull")[0] == 0
