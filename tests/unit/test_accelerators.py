"""Which build runs a card, and what its container is handed."""

from pathlib import Path

import pytest

from corral.build import Plan, build_plan
from corral.config.load import load_inventory
from corral.contributions import Service
from tests.trees import plan_of

FILES = ("/dev/kfd", "/dev/dri")
SLOT = "/dev/dri/by-path/pci-0000:04:00.0-render"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_of("other-cards")


def service(plan: Plan, name: str) -> Service:
    return next(item for item in plan.services_of("box") if item.name == name)


@pytest.mark.parametrize(
    ("name", "image", "devices", "variables"),
    [
        ("chat-1", "server-cuda13", (), {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}),
        ("chat-2", "server-rocm", FILES, {"ROCR_VISIBLE_DEVICES": "0"}),
        ("chat-3", "server-vulkan", ("/dev/dri",), {"GGML_VK_VISIBLE_DEVICES": "1"}),
        ("chat-4", "server-intel", (SLOT,), {"ONEAPI_DEVICE_SELECTOR": "level_zero:0"}),
    ],
)
def test_every_maker_s_card_has_its_build_its_files_and_its_number(
    plan: Plan, name: str, image: str, devices: tuple[str, ...], variables: dict[str, str]
) -> None:
    found = service(plan, name)

    assert image in found.image
    assert found.devices == devices
    assert found.groups == ((44, 105) if devices else ())
    assert variables.items() <= dict(found.environment).items()
    assert ("host-device" in found.exceptions) == bool(devices)


def test_pictures_on_a_card_of_amd(plan: Plan) -> None:
    found = service(plan, "pictures-2")

    assert found.image.endswith("-gpu-hipblas")
    assert (found.devices, found.groups) == (FILES, (44, 105))
    assert found.environment["CORRAL_BACKEND"] == "rocm-diffusers"


def test_a_uuid_names_a_card_of_amd_and_the_inventory_may_choose_the_build(tmp_path: Path) -> None:
    path = tmp_path / "inventory.yaml"
    path.write_text("""
schema_version: 1
name: farm
hosts:
  box:
    device_groups: [44]
    gpus: [{card: rx-6800, uuid: GPU-0a1b2c3d00000000}, {card: rx-6800, uuid: GPU-0a1b2c3d00000001}]
models: {m: {source: m-1b-q4_0.gguf, kind: chat}}
pools:
  one: {model: m, on: {host: box, gpus: 1-2, gpus_per_replica: 2}}
  two: {model: m, on: {host: box, gpus: 2}, engine: {backend: vulkan}}
gateway: {host: box}
""")
    services = {item.name: item for item in build_plan(load_inventory(path)).services_of("box") if item.gpus}
    names = ("ROCR_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES")
    shown = {
        name: {key: value for key, value in item.environment.items() if key in names} for name, item in services.items()
    }
    assert {"ROCR_VISIBLE_DEVICES": "GPU-0a1b2c3d00000000,GPU-0a1b2c3d00000001"} in shown.values()
    assert {"GGML_VK_VISIBLE_DEVICES": "1"} in shown.values()
