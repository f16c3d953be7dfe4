"""A host's folder behind a real sshd: to whom the files belong that `up` copies there, and who may read them."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from corral.errors import CorralError
from corral.runtime.hosts import ComposeHost
from tests.compose.far import Sshd, client_config
from tests.compose.project import render_site

pytestmark = pytest.mark.needs("sshd", "root")

# User number of the operator on this machine; the far host has another number for the operator.
OPERATOR = 1234
SITE = """\
schema_version: 1
name: corral-test-far-folder
hosts:
  box: {{address: 192.0.2.1, ssh: corral-test, folder: {folder}}}
models:
  tiny: {{source: tiny.gguf, kind: chat, context: 512, size_gib: 0.01}}
pools:
  chat: {{model: tiny, on: {{host: box}}}}
gateway: {{host: box}}
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that all users may enter, as /srv is; pytest's own are closed to others."""
    with TemporaryDirectory(prefix="corral-test-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def far(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ComposeHost]:
    """A host behind ssh, with a rendering on this machine that belongs to the operator."""
    inventory = tmp_path / "site.yaml"
    inventory.write_text(SITE.format(folder=place / "box"))
    plan = render_site(inventory, tmp_path / "out")
    for path in (tmp_path / "out" / "box").rglob("*"):
        os.chown(path, OPERATOR, OPERATOR)
    (tmp_path / "out" / "box" / "haproxy" / "haproxy.cfg").chmod(0o664)
    with Sshd("corral-test", tmp_path / "sshd") as sshd:
        for name, value in client_config([sshd], tmp_path / "ssh_config").items():
            monkeypatch.setenv(name, value)
        yield ComposeHost(plan, "box", tmp_path / "out")


def _as_operator(*words: str | Path) -> bool:
    """Whether a command succeeds for the user of the far host who has the operator's number."""
    command = ["setpriv", f"--reuid={OPERATOR}", f"--regid={OPERATOR}", "--clear-groups", *map(str, words)]
    return subprocess.run(command, capture_output=True, check=False, timeout=20).returncode == 0


def _strangers(folder: Path) -> list[Path]:
    """Files and folders that do not belong to the ssh user, or that others may write."""
    found = [folder, *sorted(folder.rglob("*"))]
    return [path for path in found if path.lstat().st_uid != 0 or stat.S_IMODE(path.lstat().st_mode) & 0o022]


def test_files_belong_to_the_ssh_user_and_are_closed_to_others(far: ComposeHost) -> None:
    far.copy()
    folder = Path(far.folder)
    assert _strangers(folder) == []
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / ".env").read_bytes() == (far.rendered / ".env").read_bytes()
    assert not _as_operator("ls", folder)
    assert not _as_operator("cat", folder / "compose.yaml")
    assert not _as_operator("cat", folder / ".env")
    for name in ("haproxy", "haproxy/haproxy.cfg"):  # a container's user reads what is mounted by itself
        assert stat.S_IMODE((folder / name).stat().st_mode) & 0o044 == 0o044, name


def test_a_folder_that_was_open_and_had_another_owners_files_is_repaired(far: ComposeHost) -> None:
    folder = Path(far.folder)
    (folder / "secrets").mkdir(parents=True)
    for name in (".env", "compose.yaml", "secrets/LITELLM_MASTER_KEY"):
        (folder / name).write_text("of an earlier version")
        os.chown(folder / name, OPERATOR, OPERATOR)
    assert _as_operator("cat", folder / ".env")
    far.copy()
    assert _strangers(folder) == []
    assert not _as_operator("ls", folder)


def test_a_folder_of_another_user_is_refused_before_anything_is_written(far: ComposeHost) -> None:
    folder = Path(far.folder)
    folder.mkdir()
    os.chown(folder, OPERATOR, OPERATOR)
    with pytest.raises(CorralError, match=r"belongs to another user of this host.*chown it to root"):
        far.copy()
    assert list(folder.iterdir()) == []
