"""Cards of AMD and Intel in a real engine: every server gets its device files and the groups that own them.

The device files are stand-ins (character devices that read as /dev/zero) where the machine has none, and the images are
the CPU build under the other builds' tags: what is shown is what the container is handed, not that a card computes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compose.images.build import ensure_images
from tests.compose.project import PREFIX, Project, make_models, render_site
from tests.trees import inventory_of

pytestmark = pytest.mark.needs("docker-engine", "mmdebstrap", "prisma-engine")

DEVICES = {"/dev/kfd": 44, "/dev/dri/renderD128": 105, "/dev/dri/renderD129": 105}
# The last card by its slot, which is a link to its file.
SLOT, ITS_FILE = Path("/dev/dri/by-path/pci-0000:04:00.0-render"), "/dev/dri/renderD129"
ZERO = os.makedev(1, 5)
# Device files by service; chat-1 has a card of NVIDIA, which this engine cannot hand out.
SERVERS = {"chat-2": ["/dev/dri", "/dev/kfd"], "chat-3": ["/dev/dri"], "chat-4": [str(SLOT)]}


@pytest.fixture(scope="module")
def device_files() -> Iterator[None]:
    made = [Path(path) for path in DEVICES if not Path(path).exists()]
    folder = Path("/dev/dri")
    is_new = not folder.exists()
    folder.mkdir(exist_ok=True)
    for path in made:
        os.mknod(path, stat.S_IFCHR | 0o660, ZERO)
        os.chown(path, 0, DEVICES[str(path)])
    has_slots = SLOT.parent.exists()
    SLOT.parent.mkdir(exist_ok=True)
    target = f"../{Path(ITS_FILE).name}"
    if not (SLOT.is_symlink() and str(SLOT.readlink()) == target):  # a run that was killed has left it
        SLOT.symlink_to(target)
    yield
    SLOT.unlink()
    if not has_slots:
        SLOT.parent.rmdir()
    for path in made:
        path.unlink()
    if is_new:
        folder.rmdir()


@pytest.fixture(scope="module")
def box(device_files: None, engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    tree = tmp_path_factory.mktemp("other-cards")
    plan = render_site(inventory_of("other-cards"), tree)
    ensure_images([plan])
    make_models(plan, "box", tree / "box" / "models")
    with Project(plan, "box", tree, f"{PREFIX}other-cards") as project:
        project.up(*SERVERS)
        yield project


def test_every_server_is_well_and_has_the_device_files_of_its_card(box: Project) -> None:
    settings = {name: box.inspect(f"box-{name}")["HostConfig"] for name in SERVERS}

    assert set(box.states().values()) == {"healthy"}
    assert {
        name: sorted(device["PathOnHost"] for device in found["Devices"]) for name, found in settings.items()
    } == SERVERS
    assert all(sorted(found["GroupAdd"]) == ["105", "44"] for found in settings.values())


def test_a_card_known_by_its_slot_is_the_only_one_in_its_container(box: Project) -> None:
    script = "ls /dev/dri; stat -c %t:%T /dev/dri/renderD128; head -c 3 /dev/dri/renderD128 | wc -c"

    assert box.docker("exec", "box-chat-4", "sh", "-c", script).split() == ["renderD128", "1:5", "3"]


@pytest.mark.parametrize("name", ["chat-2", "chat-3"])
def test_the_unprivileged_user_can_open_them(box: Project, name: str) -> None:
    files = [path for path in DEVICES if any(path.startswith(folder) for folder in SERVERS[name])]
    for path in files:
        words = ["exec", f"box-{name}", "sh", "-c", f"id -u; head -c 3 {path} | wc -c"]
        assert box.docker(*words).split() == ["65534", "3"], path


def test_the_cpu_variant_takes_them_away(box: Project) -> None:
    both = ("--file", str(box.folder / "compose.yaml"), "--file", str(box.folder / "compose.cpu.yaml"))
    words = ("compose", "--project-name", box.name, *both, "up", "--detach", "--wait", "chat-3")
    box.docker(*words)
    found = box.inspect("box-chat-3")["HostConfig"]
    assert not found["Devices"]
    assert not found["GroupAdd"]
