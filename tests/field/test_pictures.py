"""Picture models as people have them: SDXL, SD 3.5, FLUX, gated ones, and a checkpoint of one's own (rows 34, 35)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from corral.build import Plan, build_plan
from corral.config.load import load_inventory
from corral.config.model_lock import LockedFile, ModelLock
from corral.errors import SiteError
from corral.render.tree import render
from corral.verbs.models.fetch import origin_of

COMMIT = "1" * 40
FLUX = (
    "source: 'hf:city96/FLUX.1-dev-gguf/flux1-dev-Q4_K_S.gguf', components: {vae: 'hf:o/ae/ae.safetensors', "
    "clip_l: clip_l.safetensors, t5xxl: t5xxl_fp16.safetensors}"
)


def plan_of(folder: Path, model: str, card: str = "rtx-5090", place: str = "") -> Plan:
    (folder / "inventory.yaml").write_text(f"""schema_version: 1
name: field
hosts: {{rig: {{address: 192.0.2.10, models_dir: /srv/models, gpus: {{card: {card}, count: 1}}{place}}}}}
models: {{m: {{{model}, kind: image}}}}
pools: {{p: {{model: m, on: {{host: rig, gpus: 1}}}}}}
gateway: {{host: rig}}
""")
    return build_plan(load_inventory(folder / "inventory.yaml"))


def drawn(plan: Plan) -> dict[str, Any]:
    """LocalAI's model file."""
    found: dict[str, Any] = yaml.safe_load(render(plan)["rig/image/p-1.yaml"])
    return found


def service(plan: Plan) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(render(plan)["rig/image/compose.yaml"])["services"]["p-1"]
    return found


@pytest.mark.parametrize(
    ("repository", "size", "limit", "expected"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", 6.5, 8704,
         {"f16": True, "step": 20,
          "diffusers": {"pipeline_type": "StableDiffusionXLPipeline", "scheduler_type": "k_dpmpp_2m"}}),
        ("stabilityai/stable-diffusion-3.5-medium", 16, 18432,
         {"f16": False, "step": 25, "cfg_scale": 4.5, "options": ["torch_dtype:bf16"],
          "diffusers": {"pipeline_type": "StableDiffusion3Pipeline"}}),
        ("black-forest-labs/FLUX.1-dev", 22, 24576,
         {"f16": False, "step": 25, "cfg_scale": 1, "options": ["torch_dtype:bf16"],
          "diffusers": {"pipeline_type": "FluxPipeline"}}),
        ("black-forest-labs/FLUX.1-schnell", 22, 24576,
         {"f16": False, "step": 4, "cfg_scale": 1, "options": ["torch_dtype:bf16"],
          "diffusers": {"pipeline_type": "FluxPipeline"}}),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 2, 4096,
         {"f16": True, "step": 20,
          "diffusers": {"pipeline_type": "StableDiffusionPipeline", "scheduler_type": "k_dpmpp_2m"}}),
        ("Qwen/Qwen-Image", 10, 12288,
         {"f16": True, "step": 20, "diffusers": {"pipeline_type": "AutoPipelineForText2Image"}}),
    ],
)  # fmt: skip
def test_every_family_has_its_pipeline_and_a_limit_that_fits(
    tmp_path: Path, repository: str, size: float, limit: int, expected: dict[str, Any]
) -> None:
    plan = plan_of(tmp_path, f"source: 'hf:{repository}', revision: '{COMMIT}', size_gib: {size}")
    found = drawn(plan)
    assert found.pop("name") == "p"
    assert found.pop("backend") == "diffusers"
    assert found.pop("parameters") == {"model": repository}
    assert found["diffusers"].pop("cuda") is True
    assert found == expected
    assert service(plan)["mem_limit"] == f"{limit}m"


def test_a_checkpoint_of_ones_own_is_mounted_and_read_by_what_reads_files(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "source: myCheckpoint_xl.safetensors, size_gib: 7")
    assert drawn(plan) == {
        "name": "p", "backend": "stablediffusion-ggml", "parameters": {"model": "model.safetensors"}, "step": 20,
        "cfg_scale": 7, "options": ["sampler:euler"],
    }  # fmt: skip
    made = service(plan)
    assert "/srv/models:/weights:ro" in made["volumes"]
    assert made["environment"]["CORRAL_FILES"] == "model.safetensors=/weights/myCheckpoint_xl.safetensors"
    assert made["environment"]["CORRAL_BACKEND"] == "cuda13-stablediffusion-ggml"
    assert made["mem_limit"] == f"{9 * 1024}m"


def test_a_file_without_its_parts_gets_them_from_components_and_its_size_from_the_lock(tmp_path: Path) -> None:
    known = ["hf:city96/FLUX.1-dev-gguf/flux1-dev-Q4_K_S.gguf", "hf:o/ae/ae.safetensors", "clip_l.safetensors"]
    files = {key: LockedFile(file=key.rpartition("/")[2], size=4 << 30) for key in [*known, "t5xxl_fp16.safetensors"]}
    ModelLock(files=files).write(ModelLock.beside(tmp_path / "inventory.yaml"))
    plan = plan_of(tmp_path, FLUX)
    found = drawn(plan)
    assert found["options"] == [
        "diffusion_model", "vae_path:vae.safetensors", "clip_l_path:clip_l.safetensors",
        "t5xxl_path:t5xxl.safetensors", "sampler:euler",
    ]  # fmt: skip
    assert (found["step"], found["cfg_scale"]) == (25, 1)
    assert service(plan)["environment"]["CORRAL_FILES"].split("\n") == [
        "model.gguf=/weights/flux1-dev-Q4_K_S.gguf", "vae.safetensors=/weights/ae.safetensors",
        "clip_l.safetensors=/weights/clip_l.safetensors", "t5xxl.safetensors=/weights/t5xxl_fp16.safetensors",
    ]  # fmt: skip
    assert service(plan)["mem_limit"] == f"{18 * 1024}m"


def test_amd_cards_draw_from_files_with_vulkan(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "source: own.safetensors, size_gib: 4", "rx-7900-xtx", ", device_groups: [44]")
    assert service(plan)["image"] == "localai/localai:v4.9.0-gpu-vulkan"


def test_a_folder_with_a_pipeline_is_read_where_it_lies(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "source: my-sdxl, size_gib: 6")
    assert drawn(plan)["parameters"] == {"model": "model"}
    assert service(plan)["environment"]["CORRAL_FILES"] == "model=/weights/my-sdxl"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("source: flux1-dev-Q4_0.gguf", "add components: {vae: …, clip_l: …, t5xxl: …}"),
        ("source: own.safetensors, backend: diffusers", "only with a configuration from the Hub"),
        ("source: own.safetensors, pipeline: FluxPipeline", "stablediffusion-ggml has no pipelines"),
        ("source: own.ckpt", "a repository, a folder, or a .safetensors or .gguf file"),
        ("source: 'hf:o/r/own.ckpt'", "a repository, a folder, or a .safetensors or .gguf file"),
        (f"source: 'hf:o/r', revision: '{COMMIT}', backend: stablediffusion-ggml", "reads files"),
        (f"source: 'hf:o/r', revision: '{COMMIT}', components: {{vae: v.safetensors}}", "has its other parts in files"),
    ],
)
def test_what_would_not_work_or_have_no_effect_is_refused(tmp_path: Path, model: str, words: str) -> None:
    with pytest.raises(SiteError) as caught:
        plan_of(tmp_path, model)
    assert words in str(caught.value)


def test_a_login_is_not_for_servers_which_fetch_nothing(tmp_path: Path) -> None:
    source = f"source: 'hf:black-forest-labs/FLUX.1-dev', revision: '{COMMIT}', size_gib: 22"
    with pytest.raises(SiteError, match="`models pull` uses your own login"):
        plan_of(tmp_path, f"{source}, engine: {{environment: {{HF_TOKEN: HF_TOKEN}}}}")
    assert service(plan_of(tmp_path, source))["environment"]["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize("environment", [{"HF_TOKEN": "hf_mine"}, {}])
def test_a_saved_login_opens_gated_repositories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    if not environment:
        (tmp_path / "token").write_text("hf_mine\n")
    origin = origin_of("hf:o/gated/m.gguf", "", environment)
    assert origin is not None
    assert origin.headers == {"Authorization": "Bearer hf_mine"}
    open_mirror = origin_of("hf:o/gated/m.gguf", "", {**environment, "HF_ENDPOINT": "http://mirror.example.com"})
    assert open_mirror is not None
    assert not open_mirror.headers
