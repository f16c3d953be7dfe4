"""The image that a site builds itself: what the plan says to type, and that the Dockerfile knows these words."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from pathlib import Path

import pytest

from corral.build import build_plan
from corral.components.llama import IMAGES
from corral.config.load import load_inventory
from corral.plan.own_image import BUILD, COMMIT, build_command, is_own, tag
from corral.runtime.causes import explained
from corral.runtime.docker import Container
from tests.compose import cuda_proof
from tests.compose.own_image_proof import REMEDY, inputs, is_fresh
from tests.rules.test_rules import problems_in

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "gpu-server" / "Dockerfile").read_text()
ARGUMENTS = dict(re.findall(r"^ARG (\w+)=(.*)$", DOCKERFILE, re.MULTILINE))
CUDA13 = IMAGES["llama-cuda13"]
PASCAL = "docker build -t corral-llama:cuda-61-b11347 --build-arg BACKEND=cuda --build-arg CUDA_ARCH=61 gpu-server"
KEPLER = (
    "docker build -t corral-llama:cuda-37-b11347 --build-arg BACKEND=cuda --build-arg CUDA_ARCH=37 "
    "--build-arg CUDA_VERSION=11.8.0 --build-arg CUDA_UBUNTU=22.04 gpu-server"
)
PROCESSOR = "docker build -t corral-llama:cpu-b11347 gpu-server"
CARDS = """\
schema_version: 1
name: farm
hosts:
  box: {{address: 192.0.2.10, gpus: {{card: {card}, count: 1}}}}
cards:
  tesla-k80: {{vram_gib: 12, compute_capability: "3.7"}}
  gtx-680: {{vram_gib: 4, compute_capability: "3.0"}}
models:
  m: {{source: {source}, kind: {kind}, size_gib: 1}}
pools:
  p: {{model: m, on: {{host: box, gpus: 1}}{more}}}
gateway: {{host: box}}
"""
PICTURES = """\
schema_version: 1
name: farm
hosts:
  box: {{address: 192.0.2.10, cpu: {{avx: false}}}}
{images}models:
  m: {{source: hf:owner/repo, revision: "1111111111111111111111111111111111111111", kind: image}}
pools:
  pictures: {{model: m, on: {{host: box}}{more}}}
gateway: {{host: box}}
"""


def test_it_was_compiled_and_tested_as_it_is_now() -> None:
    assert is_fresh(), REMEDY


def test_it_was_compiled_for_cuda_as_it_is_now() -> None:
    """Code for each architecture, and none with AVX, in what the Dockerfile's commands have made of these inputs."""
    proof = json.loads(cuda_proof.PROOF.read_text())
    assert proof["inputs"] == inputs(), "run: python -m tests.compose.cuda_proof"
    assert set(proof["kernels"]) == {f"sm_{architecture}" for architecture in cuda_proof.ARCHITECTURES}
    assert len(set(proof["kernels"].values())) == 1
    assert {"libggml-cuda.so", "libggml-cpu.so", "libllama.so", "llama-server"} <= set(proof["avx"])
    assert set(proof["avx"].values()) == {0}


def problems(folder: Path, text: str) -> list[str]:
    """What the rules say, but for warnings that a catalogue has cards which the inventory does not use."""
    path = folder / "inventory.yaml"
    path.write_text(text)
    return [str(problem) for problem in problems_in(path) if problem.rule != "card-used"]


def with_card(folder: Path, card: str, more: str = "", kind: str = "chat") -> list[str]:
    source = (
        'hf:owner/repo, revision: "1111111111111111111111111111111111111111"' if kind == "image" else "m-1b-q4_0.gguf"
    )
    return problems(folder, CARDS.format(card=card, more=more, kind=kind, source=source))


@pytest.mark.parametrize(
    ("capability", "command"), [((6, 1), PASCAL), ((3, 7), KEPLER), (None, PROCESSOR)], ids=["pascal", "kepler", "cpu"]
)
def test_the_command_has_arguments_that_the_dockerfile_knows(capability: tuple[int, int] | None, command: str) -> None:
    assert build_command(capability) == command
    words = shlex.split(command)
    given = [word.partition("=")[0] for before, word in itertools.pairwise(words) if before == "--build-arg"]
    assert set(given) <= ARGUMENTS.keys()
    assert (ROOT / words[-1] / "Dockerfile").is_file()
    assert words[3] == tag(capability)


def test_the_dockerfile_fetches_the_commit_of_the_pinned_build() -> None:
    assert ARGUMENTS["LLAMA_COMMIT"] == COMMIT
    assert re.fullmatch(r"[0-9a-f]{40}", COMMIT)
    assert f"b{ARGUMENTS['LLAMA_BUILD']}" == BUILD


def test_every_base_is_pinned_and_no_processor_flag_is_on_by_itself() -> None:
    bases = {name: value for name, value in ARGUMENTS.items() if name.endswith("_BASE")}
    assert len(bases) == 4
    assert all(re.search(r":(\d|\$\{CUDA_VERSION\})", value) for value in bases.values()), bases
    assert re.fullmatch(r"\d+\.\d+\.\d+", ARGUMENTS["CUDA_VERSION"])
    assert ARGUMENTS["CPU_FLAGS"] == ""
    assert ARGUMENTS["BACKEND"] == "cpu"


def test_cuda_13_on_pascal_names_the_image_and_the_command(tmp_path: Path) -> None:
    found = with_card(tmp_path, "p104-100", f', engine: {{image: "{CUDA13}"}}')
    assert len(found) == 1
    assert (
        "compute capability 6.1, which CUDA 13 does not know; use a CUDA 12 image, or make your own engine.image"
        in found[0]
    )
    assert f"{PASCAL} [cuda-image]" in found[0]


def test_a_card_before_maxwell_names_the_image_and_the_command(tmp_path: Path) -> None:
    found = with_card(tmp_path, "tesla-k80")
    assert len(found) == 1
    assert (
        "tesla-k80 has compute capability 3.7, for which no stock image has code; make your own engine.image"
        in found[0]
    )
    assert f"{KEPLER} [cuda-image]" in found[0]


def test_a_card_that_no_cuda_in_question_knows_gets_no_command(tmp_path: Path) -> None:
    found = with_card(tmp_path, "gtx-680")
    assert len(found) == 1
    assert "docker build" not in found[0]


def test_a_picture_server_is_not_told_to_run_llama(tmp_path: Path) -> None:
    image = "localai/localai:v4.9.0-gpu-nvidia-cuda-13"
    found = with_card(tmp_path, "p104-100", f', engine: {{image: "{image}"}}', kind="image")
    assert len(found) == 1
    assert found[0].endswith("use a CUDA 12 image [cuda-image]")


@pytest.mark.parametrize(("card", "capability"), [("p104-100", (6, 1)), ("tesla-k80", (3, 7))])
@pytest.mark.parametrize("registry", ["", "registry.example.com:5000/farm/"])
def test_with_the_own_image_named_the_error_is_gone(
    tmp_path: Path, card: str, capability: tuple[int, int], registry: str
) -> None:
    assert with_card(tmp_path, card, f', engine: {{image: "{registry}{tag(capability)}"}}') == []


def test_with_the_own_image_for_all_the_error_is_gone_and_its_flags_are_known(tmp_path: Path) -> None:
    text = CARDS.format(card="tesla-k80", more=", engine: {extra_args: [--no-such-flag]}", kind="chat", source="m.gguf")
    own = f'images: {{llama-cuda12: "{tag((3, 7))}"}}\n'
    found = problems(tmp_path, text.replace("models:\n", f"{own}models:\n"))
    assert [problem[-13:] for problem in found] == ["[server-flag]"], found


def test_no_avx_names_the_image_and_the_command(tmp_path: Path) -> None:
    found = problems(tmp_path, PICTURES.format(images="", more=""))
    assert len(found) == 1
    assert "box has no AVX, which LocalAI needs" in found[0]
    assert PROCESSOR in found[0]
    assert "draws no pictures" in found[0]


@pytest.mark.parametrize(
    ("images", "more"),
    [("", ', engine: {image: "localai:no-avx-1"}'), ("images: {localai-cpu: localai:no-avx-1}\n", "")],
    ids=["engine.image", "images"],
)
def test_with_another_localai_named_no_avx_is_gone(tmp_path: Path, images: str, more: str) -> None:
    assert problems(tmp_path, PICTURES.format(images=images, more=more)) == []


def test_without_avx_chat_takes_the_stock_image_or_the_own_one(tmp_path: Path) -> None:
    text = PICTURES.replace(
        'hf:owner/repo, revision: "1111111111111111111111111111111111111111", kind: image', "m-1b-q4_0.gguf, kind: chat"
    )
    path = tmp_path / "inventory.yaml"
    images = {}
    for more in ("", f', engine: {{image: "{tag()}"}}'):
        assert problems(tmp_path, text.format(images="", more=more)) == []
        plan = build_plan(load_inventory(path))
        images[more] = next(item.image for item in plan.contributions.services if item.component == "llama")
    assert list(images.values()) == [IMAGES["llama-cpu"], tag()]


def test_a_server_that_died_of_an_illegal_instruction_is_answered_with_the_command() -> None:
    died = Container(id="1", name="c", project="", service="s", image="", state="exited", exit_code=132)
    assert PROCESSOR in explained(died).remedy


def test_only_the_own_image_is_taken_for_it() -> None:
    assert is_own(tag())
    assert is_own("registry.example.com:5000/corral-llama:cuda-61-b11347")
    assert not is_own(CUDA13)
    assert not is_own("ghcr.io/example/not-corral-llama:1")
