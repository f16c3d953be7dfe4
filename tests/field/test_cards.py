"""Cards that people have: their names, builds, device files, memory and limits."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from corral.build import Plan, build_plan
from corral.config.card_names import card_name
from corral.config.load import load_inventory
from corral.contributions import Service
from corral.errors import SiteError
from corral.plan.cards import CATALOGUE
from corral.render.tree import render
from tests.consumers.test_systemd import run_power_unit
from tests.trees import put

Build = Callable[..., Plan]
CHAT = {"chat": {"model": "m", "on": {"host": "box", "gpus": 1}}}


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Makes the plan of a host with these cards; pools, and keys of host and inventory, as in the inventory."""

    def made(
        *gpus: Mapping[str, Any], pools: Mapping[str, Any] = CHAT, host: Mapping[str, Any] | None = None, **more: Any
    ) -> Plan:
        box = {"address": "192.0.2.10", "device_groups": [44], "gpus": list(gpus)} | dict(host or {})
        models = {"m": {"source": "m-1b-q4_0.gguf", "kind": "chat"}}
        text = {"schema_version": 1, "name": "farm", "hosts": {"box": box}, "models": models, "pools": dict(pools)}
        path = tmp_path / "inventory.yaml"
        path.write_text(yaml.safe_dump(text | {"gateway": {"host": "box"}} | more), encoding="utf-8")
        return build_plan(load_inventory(path))

    return made


def refused(build: Build, *gpus: Mapping[str, Any], **more: Any) -> list[str]:
    """What is told about an inventory that is refused, without its place in the file."""
    with pytest.raises(SiteError) as raised:
        build(*gpus, **more)
    return [str(problem).partition(": ")[2] for problem in raised.value.problems]


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("printed", "name"),
    [
        ("NVIDIA GeForce RTX 3090", "rtx-3090"),
        ("GeForce GTX 1060 6GB", "gtx-1060-6gb"),
        ("NVIDIA GeForce RTX 3070 Laptop GPU", "rtx-3070-laptop"),
        ("NVIDIA GeForce RTX 2070 with Max-Q Design", "rtx-2070"),
        ("NVIDIA TITAN X (Pascal)", "titan-x-pascal"),
        ("GeForce GTX TITAN X", "gtx-titan-x"),
        ("Tesla P40", "tesla-p40"),
        ("Tesla P100-PCIE-16GB", "tesla-p100"),
        ("Tesla V100-SXM2-32GB", "tesla-v100-32gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA A40", "a40"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "rtx-pro-6000-max-q"),
        ("NVIDIA GB10", "gb10"),
        ("NVIDIA Corporation GA102 [GeForce RTX 3090] (rev a1)", "rtx-3090"),
        ("AMD Radeon RX 7900 XTX", "rx-7900-xtx"),
        ("AMD Radeon PRO W7900", "radeon-pro-w7900"),
        ("AMD Radeon VII", "radeon-vii"),
        ("AMD Instinct MI210", "mi210"),
        ("Radeon 8060S Graphics", "radeon-8060s"),
        ("strix-halo", "radeon-8060s"),
        ("Intel(R) Arc(TM) B580 Graphics", "arc-b580"),
        ("Intel(R) Arc(TM) Pro A40 Graphics", "arc-pro-a40"),
        ("Intel(R) Data Center GPU Flex 170", "flex-170"),
        ("RTX3060Ti", "rtx-3060-ti"),
        ("rx7900xtx", "rx-7900-xtx"),
        ("voodoo2", "voodoo2"),
        ("my_card", "my_card"),
        ("a100-3g20gb", "a100-3g20gb"),
    ],
)
def test_a_name_as_tools_print_it_is_the_catalogue_s(printed: str, name: str) -> None:
    assert card_name(printed) == name


@pytest.mark.parametrize(
    "name",
    [
        "4060-ti-8gb", "4070-super", "3090-ti", "rtx-pro-6000", "7900-gre", "9060-xt-16gb", "b60", "w6800", "v620",
        "mi25", "titan-rtx", "p6000", "1660-ti", "5070", "p102-100", "cmp-170hx", "t1000", "a30", "b200", "mi300x",
        "mi355x", "h20", "rx-480-8gb", "vega-64", "a770", "max-1550", "jetson-orin-nano-8gb", "gb10", "r9700",
    ],
)  # fmt: skip
def test_the_catalogue_has_what_people_name(name: str) -> None:
    assert card_name(name) in CATALOGUE


def test_a_printed_name_counts_for_its_overrides_too(build: Build) -> None:
    plan = build({"card": "NVIDIA GeForce RTX 3090"}, cards={"NVIDIA GeForce RTX 3090": {"engine": {"slots": 3}}})

    assert [(item.cards[0].card, item.slots) for item in plan.site.replicas] == [("rtx-3090", 3)]


@pytest.mark.parametrize(
    ("gpu", "cards", "words"),
    [
        (
            {"card": "rx-9999"}, {},
            'the card "rx-9999" is not in the catalogue; did you mean',
        ),
        (
            {"card": "arc-b99"}, {"arc-b99": {"vram_gib": 24}},
            "not all of it is said here; add vendor: intel; xpu-smi discovery tells what it has",
        ),
        (
            {"card": "AMD Radeon RX 9999", "vram_gib": 16}, {},
            "Otherwise add cards.rx-9999: {vendor: amd}; rocm-smi",
        ),
        (
            {"card": "mine"}, {"mine": {"vram_gib": 16, "vendor": "amd", "compute_capability": "8.6"}},
            "compute capabilities are NVIDIA's",
        ),
        ({"card": "NVIDIA H100 PCIe"}, {}, "write card: h100-80gb (80 GiB) or h100-94gb (94 GiB) or"),
        ({"card": "rtx-6000"}, {}, "write card: quadro-rtx-6000 (24 GiB) or rtx-pro-6000 (96 GiB)"),
    ],
)  # fmt: skip
def test_what_is_not_known_of_a_card_is_asked_for_at_once(
    build: Build, gpu: dict[str, Any], cards: dict[str, Any], words: str
) -> None:
    told = refused(build, gpu, cards=cards)

    assert len(told) == 1
    assert words in told[0]


def test_a_compute_capability_says_whose_card_it_is(build: Build) -> None:
    plan = build({"card": "a100-3g20gb"}, cards={"a100-3g20gb": {"vram_gib": 19.5, "compute_capability": "8.0"}})

    assert [card.vendor for card in plan.site.cards["box"]] == ["nvidia"]


def test_memory_that_is_said_makes_a_name_clear(build: Build) -> None:
    card = build({"card": "NVIDIA GeForce RTX 4060 Ti", "vram_gib": 16}).site.cards["box"][0]

    assert (card.vram_mib, card.vendor, card.compute_capability) == (16384, "nvidia", (8, 9))


# --- builds and devices ----------------------------------------------------------------------------------------------


def split(gpus: str, **engine: Any) -> dict[str, Any]:
    """One replica over all these cards."""
    count = len(gpus.split(","))
    return {"chat": {"model": "m", "on": {"host": "box", "gpus": gpus, "gpus_per_replica": count}, "engine": engine}}


def server(plan: Plan) -> Service:
    """The only inference server."""
    return next(item for item in plan.services_of("box") if item.component == "llama")


@pytest.mark.parametrize(
    ("cards", "image"),
    [
        (("rtx-3090", "tesla-p40"), "server-cuda-"),
        (("tesla-p40", "rtx-3090"), "server-cuda-"),
        (("rtx-3090", "rtx-5090"), "server-cuda13-"),
        (("rx-6800", "mi50"), "server-vulkan-"),
        (("mi50", "rx-6800"), "server-vulkan-"),
        (("rx-6800", "rx-7900-xtx"), "server-rocm-"),
        (("rx-7900-xtx", "rtx-3090"), "server-vulkan-"),
        (("rtx-3090", "arc-b580", "rx-7900-xtx"), "server-vulkan-"),
    ],
)
def test_the_build_runs_on_all_cards_of_a_replica(build: Build, cards: tuple[str, ...], image: str) -> None:
    gpus = [{"card": card, "pci": f"0{number}:00.0"} for number, card in enumerate(cards, start=1)]

    assert image in server(build(*gpus, pools=split(",".join("123"[: len(cards)])))).image


def test_one_model_over_makers_sees_its_own_cards_only(build: Build) -> None:
    uuid = "GPU-00000000-0000-0000-0000-000000000001"
    plan = build({"card": "rx-7900-xtx", "pci": "03:00.0"}, {"card": "rtx-3090", "uuid": uuid}, pools=split("1,2"))
    found = yaml.safe_load(render(plan)["box/llama/compose.yaml"])["services"]["chat-1"]

    node = "/dev/dri/by-path/pci-0000:03:00.0-render"
    assert found["devices"] == [{"source": node, "target": "/dev/dri/renderD128", "permissions": "rwm"}]
    assert found["group_add"] == ["44"]
    assert found["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] == [uuid]
    assert found["environment"]["GGML_VK_VISIBLE_DEVICES"] == "0,1"
    assert found["environment"]["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility,graphics"
    assert "./corral_nvidia.json:/etc/vulkan/icd.d/corral_nvidia.json:ro" in found["volumes"]
    assert "libEGL_nvidia" in render(plan)["box/llama/corral_nvidia.json"].decode()
    assert {"devices", "deploy", "group_add"} <= yaml_keys(render(plan)["box/compose.cpu.yaml"], "chat-1")


def yaml_keys(text: bytes, service: str) -> set[str]:
    """The keys of a service in an overlay with Compose's own tags."""
    plain = yaml.safe_load(text.replace(b"!reset ", b""))
    return set(plain["services"][service])


def test_vulkan_on_a_card_of_nvidia_needs_no_device_file(build: Build) -> None:
    found = server(build({"card": "rtx-3090"}, {"card": "rtx-3090"}, pools=split("2", backend="vulkan")))

    assert "server-vulkan-" in found.image
    assert (found.devices, found.environment["GGML_VK_VISIBLE_DEVICES"]) == ((), "0")


@pytest.mark.parametrize(
    ("gpu", "backend", "devices", "shown"),
    [
        ({"card": "rx-6600", "pci": "0000:03:00.0"}, "", ("/dev/dri/by-path/pci-0000:03:00.0-render",), "0"),
        ({"card": "arc-b580", "pci": "0A:00.0"}, "", ("/dev/dri/by-path/pci-0000:0a:00.0-render",), "level_zero:0"),
        ({"card": "rx-6600", "pci": "00000003:0A:00.0"}, "", ("/dev/dri/by-path/pci-0003:0a:00.0-render",), "0"),
        ({"card": "rx-6800", "uuid": "GPU-0a1b2c3d00000000"}, "", ("/dev/kfd", "/dev/dri"), "GPU-0a1b2c3d00000000"),
        ({"card": "rx-6800", "pci": "03:00.0"}, "vulkan", ("/dev/dri/by-path/pci-0000:03:00.0-render",), "0"),
    ],
)
def test_a_card_of_every_maker_stays_the_same_when_the_order_changes(
    build: Build, gpu: dict[str, Any], backend: str, devices: tuple[str, ...], shown: str
) -> None:
    plan = build({"card": "rx-6800"}, gpu, pools=split("2", **({"backend": backend} if backend else {})))
    found = server(plan)

    assert found.devices == devices
    assert shown in [value for key, value in found.environment.items() if "DEVICE" in key]
    assert plan.warnings == ()


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        ({"card": "rx-6600"}, "known to vulkan by a number; give each its pci, as `lspci -D` prints it"),
        ({"card": "rx-6600", "uuid": "GPU-0a1b2c3d00000000"}, "known to vulkan by a number; give each its pci"),
        ({"card": "rx-6800", "pci": "03:00.0"}, "known to rocm by a number; give each its uuid, as `rocminfo`"),
        ({"card": "arc-b580"}, "known to intel by a number; give each its pci"),
    ],
)
def test_a_card_that_is_only_a_number_is_told(build: Build, gpu: dict[str, Any], words: str) -> None:
    assert [words in str(warning) for warning in build(gpu).warnings] == [True]


@pytest.mark.parametrize(
    ("gpus", "cards", "variable", "order"),
    [
        ("1,2", [{"uuid": "GPU-11111111"}, {"uuid": "GPU-22222222"}],
         "CUDA_VISIBLE_DEVICES", "GPU-11111111,GPU-22222222"),
        ("2,1", [{}, {}], "CUDA_VISIBLE_DEVICES", "1,0"),
        ("1,2", [{}, {}], "CUDA_VISIBLE_DEVICES", None),
        ("1,2", [{"card": "rx-6600", "pci": "41:00.0"}, {"card": "rx-6600", "pci": "03:00.0"}],
         "GGML_VK_VISIBLE_DEVICES", "1,0"),
        ("1,2", [{"card": "arc-b580", "pci": "03:00.0"}, {"card": "arc-b580", "pci": "41:00.0"}],
         "ONEAPI_DEVICE_SELECTOR", "level_zero:0,1"),
    ],
)  # fmt: skip
def test_the_cards_of_a_replica_are_in_the_inventory_s_order(
    build: Build, gpus: str, cards: list[dict[str, Any]], variable: str, order: str | None
) -> None:
    """Shares of cards that are not alike are said by position."""
    plan = build(*({"card": "rtx-3090"} | card for card in cards), pools=split(gpus))

    assert server(plan).environment.get(variable) == order


def test_a_build_that_does_not_know_one_of_the_cards_is_named_where_it_is_said(build: Build) -> None:
    told = refused(build, {"card": "rtx-3090"}, {"card": "tesla-p40"}, pools=split("1,2", backend="cuda13"))

    assert [words.startswith("pools.chat.engine.backend: tesla-p40 has compute capability 6.1") for words in told]


def test_no_replica_is_split_over_slices(build: Build) -> None:
    gpus = [{"card": "a100-40gb", "uuid": f"MIG-0000000{number}"} for number in (1, 2)]

    told = refused(build, *gpus, pools=split("1,2"))
    assert ["CUDA gives a program one only" in words for words in told] == [True]


def test_a_split_over_makers_wants_slots_and_llama_cpp(build: Build) -> None:
    told = refused(build, {"card": "rtx-3090"}, {"card": "rx-7900-xtx"}, pools=split("1,2"))
    assert ["write its pci" in words for words in told] == [True]

    gpus = ({"card": "rtx-3090"}, {"card": "rx-7900-xtx", "pci": "03:00.0"})
    told = refused(build, *gpus, pools=split("1,2", backend="rocm"))
    assert ["not with rocm; remove it, or use vulkan" in words for words in told] == [True]


# --- memory that is the host's ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "more"),
    [
        ({"card": "strix-halo", "vram_gib": 96}, {}),
        ({"card": "NVIDIA GB10", "vram_gib": 110}, {}),
        ({"card": "mine"}, {"cards": {"mine": {"vram_gib": 96, "vendor": "amd", "unified_memory": True}}}),
    ],
)
def test_memory_of_processor_and_card_counts_once(build: Build, gpu: dict[str, Any], more: dict[str, Any]) -> None:
    pools = {"chat": {"model": "m", "on": {"host": "box", "gpus": 1}, "engine": {"vram_mib": 90_000}}}

    assert build(gpu, pools=pools, host={"ram_gib": 128}, **more).warnings == ()
    told = refused(build, gpu, pools=pools, host={"ram_gib": 64}, **more)
    assert ["containers and cards may take" in words and "chat-1 92048" in words for words in told] == [True]
    told = refused(build, gpu, pools=pools, **more)
    assert ["write ram_gib" in words for words in told] == [True]


def test_a_card_with_memory_of_its_own_takes_none_of_the_host(build: Build) -> None:
    pools = {"chat": {"model": "m", "on": {"host": "box", "gpus": 1}, "engine": {"vram_mib": 20_000}}}

    assert build({"card": "rtx-3090"}, pools=pools, host={"ram_gib": 16}).warnings == ()


# --- Jetson, CDI, limits ---------------------------------------------------------------------------------------------


def test_a_jetson_has_nvidia_s_runtime_and_nothing_that_wants_nvidia_smi(build: Build) -> None:
    pools = {"chat": {"model": "m", "on": {"host": "box", "gpus": 1}, "engine": {"image": "dustynv/llama_cpp:r36.4.0"}}}
    plan = build({"card": "jetson-agx-orin-64gb"}, pools=pools, host={"ram_gib": 64}, monitoring={"host": "box"})
    tree = render(plan)
    found = yaml.safe_load(tree["box/llama/compose.yaml"])["services"]["chat-1"]

    assert (found["runtime"], found["environment"]["NVIDIA_VISIBLE_DEVICES"]) == ("nvidia", "all")
    assert "deploy" not in found
    assert [name for name in tree if "gpu-power" in name or "gpu_exporter" in name] == []
    assert yaml_keys(tree["box/compose.cpu.yaml"], "chat-1") >= {"runtime", "image"}


def test_no_stock_image_is_for_a_jetson(build: Build) -> None:
    told = refused(build, {"card": "jetson-agx-orin-64gb"}, host={"ram_gib": 64})

    assert ["a Jetson, for which no stock image has code" in words for words in told] == [True]


def test_cards_as_cdi_devices(build: Build) -> None:
    uuid = "GPU-00000000-0000-0000-0000-000000000001"
    plan = build({"card": "rtx-3090", "uuid": uuid}, host={"gpu_access": "cdi"}, monitoring={"host": "box"})
    tree = render(plan)

    for component in ("llama", "gpu_exporter"):
        for found in yaml.safe_load(tree[f"box/{component}/compose.yaml"])["services"].values():
            assert found["devices"] == [f"nvidia.com/gpu={uuid}"]
            assert not {"deploy", "group_add"} & set(found)


@pytest.mark.needs("docker-compose")
@pytest.mark.parametrize("overlay", [(), ("-f", "compose.cpu.yaml")])
@pytest.mark.parametrize(
    ("gpus", "host", "pools"),
    [
        ([{"card": "rx-7900-xtx", "pci": "03:00.0"}, {"card": "rtx-3090"}], {}, split("1,2")),
        ([{"card": "gtx-1080"}], {"gpu_access": "runtime"}, CHAT),
        ([{"card": "gtx-1080"}], {"gpu_access": "cdi"}, CHAT),
    ],
)
def test_compose_takes_every_way_to_a_card(
    build: Build, gpus: list[Any], host: dict[str, Any], pools: dict[str, Any], overlay: list[str], tmp_path: Path
) -> None:
    put(render(build(*gpus, host=host, pools=pools, monitoring={"host": "box"})), tmp_path)
    command = ["docker", "compose", "-f", "compose.yaml", *overlay, "config", "--no-interpolate"]
    done = subprocess.run(command, cwd=tmp_path / "box", capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")

    found = yaml.safe_load(done.stdout)["services"]["chat-1"]
    ways = {key for key in ("devices", "runtime", "deploy") if found.get(key)}
    wanted = {"runtime": {"runtime"}, "cdi": {"devices"}, None: {"devices", "deploy"}}[host.get("gpu_access")]
    assert ways == (set() if overlay else wanted)


@pytest.mark.parametrize("gpus", [[{"card": "rx-6800"}], []])
def test_gpu_access_is_for_nvidia(build: Build, gpus: list[dict[str, Any]]) -> None:
    pools = CHAT if gpus else {"chat": {"model": "m", "on": {"host": "box"}}}

    told = refused(build, *gpus, pools=pools, host={"gpu_access": "cdi"})
    assert ["no containers with NVIDIA cards; remove gpu_access" in words for words in told] == [True]


def test_the_unit_sets_the_limits_of_every_maker(build: Build, tmp_path: Path) -> None:
    plan = build(
        {"card": "rx-6800", "pci": "03:00.0", "power_limit_w": 150},
        {"card": "arc-b580", "pci": "04:00.0", "power_limit_w": 120},
        {"card": "rtx-3090", "power_limit_w": 250, "clock_lock_mhz": [210, 1400]},
        pools={"chat": {"model": "m", "on": {"host": "box"}}},
    )
    unit = render(plan)["box/systemd/corral-gpu-power.service"].decode()

    files = [tmp_path / "bus/pci/devices/0000:03:00.0/hwmon/hwmon4/power1_cap"]
    files += [tmp_path / "bus/pci/devices/0000:04:00.0/hwmon/hwmon5/power1_max"]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text("1\n")
    code, calls = run_power_unit(unit.replace("/sys/", f"{tmp_path}/"), tmp_path)
    assert (code, calls) == (0, ["-pm 1", "-i 0 -pl 250", "-i 0 -lgc 210,1400"])
    assert [file.read_text() for file in files] == ["150000000\n", "120000000\n"]
    files[0].unlink()
    files[0].parent.rmdir()
    assert run_power_unit(unit.replace("/sys/", f"{tmp_path}/"), tmp_path) == (1, calls)


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        ({"card": "a100-40gb", "uuid": "MIG-00000000-0000", "power_limit_w": 100}, "is a slice"),
        ({"card": "rx-6800", "power_limit_w": 100}, "write its pci"),
        ({"card": "rx-6800", "pci": "03:00.0", "clock_lock_mhz": 1000}, "takes no clocks"),
        ({"card": "tesla-p40", "clock_lock_mhz": 1000}, "takes no clocks"),
        ({"card": "jetson-agx-orin-64gb", "power_limit_w": 30}, "nvpmodel"),
    ],
)
def test_a_limit_without_effect_is_refused(build: Build, gpu: dict[str, Any], words: str) -> None:
    pools = {"chat": {"model": "m", "on": {"host": "box"}}}

    told = refused(build, gpu, pools=pools, host={"ram_gib": 64})
    assert [words in line for line in told] == [True]
