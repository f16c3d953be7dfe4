"""When certificates end, as a real openssl on the host reads them (facts-operations 2, 002-19)."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from corral.build import build_plan
from corral.config.load import load_inventory
from corral.render.output import write
from corral.render.tree import render
from corral.runtime.hosts import ComposeHost
from corral.runtime.observe import observe
from corral.verbs.status.certificates import certificate_files, certificate_script, understood_ends
from corral.verbs.status.figures import figures_of, sections

SITE = """\
schema_version: 1
name: shown
hosts: {{box: {{address: 192.0.2.1}}, other: {{address: 192.0.2.2}}}}
models: {{tiny: {{source: tiny.gguf, kind: chat, context: 512, size_gib: 0.01}}}}
pools: {{chat: {{model: tiny, on: {{host: box}}}}}}
gateway: {{host: box, database: false, cache: false, entrance: {{port: 8443, certificate: {pem}}}}}
monitoring: {{host: other, grafana: false}}
"""
DAYS = 9


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    """Certificate and key in one file, as the entrance wants it."""
    path = tmp_path / "farm.pem"
    words = f"req -x509 -newkey rsa:2048 -nodes -days {DAYS} -subj /CN=farm -keyout".split()
    subprocess.run(["openssl", *words, str(path), "-out", f"{path}.crt"], check=True, capture_output=True)
    path.write_text(Path(f"{path}.crt").read_text() + path.read_text())
    return path


@pytest.fixture
def box(pem: Path, tmp_path: Path) -> ComposeHost:
    source = tmp_path / "inventory.yaml"
    source.write_text(SITE.format(pem=f'"{pem}"'))
    plan = build_plan(load_inventory(source))
    write(render(plan), tmp_path / "out")
    return ComposeHost(plan, "box", tmp_path / "out")


def asked(host: ComposeHost, path: str | None = None) -> dict[str, datetime | None]:
    where = f"PATH={path}\n" if path is not None else ""
    script = f"section() {{ :; }}\n{where}{certificate_script(host)}"
    return understood_ends(host.run(["sh", "-c", script], check=False).out)


def test_the_entrance_has_a_certificate_and_the_other_host_none(box: ComposeHost, pem: Path) -> None:
    assert certificate_files(box) == [str(pem)]
    other = ComposeHost(box.plan, "other", box.out)
    assert (certificate_script(other), certificate_files(other)) == ("", [])


def test_its_end_is_read(box: ComposeHost, pem: Path) -> None:
    end = asked(box)[str(pem)]
    assert end is not None
    assert abs(end - datetime.now(UTC) - timedelta(days=DAYS)) < timedelta(minutes=5)


@pytest.mark.parametrize("text", [None, "", "this is no certificate\n"])
def test_a_file_that_is_none_is_told_from_one_that_nobody_can_read(
    box: ComposeHost, pem: Path, tmp_path: Path, text: str | None
) -> None:
    pem.unlink() if text is None else pem.write_text(text)
    assert asked(box) == {str(pem): None}
    assert asked(box, path=str(tmp_path)) == {}, "without openssl nobody says that it is broken"


def test_prometheus_is_told(box: ComposeHost, pem: Path) -> None:
    def told() -> dict[str, float]:
        seen = replace(observe(box, sections), problem="")  # with or without Docker
        found = figures_of(box, seen, render(box.plan))["corral_certificate_expires_timestamp_seconds"]
        return {file: end for (file,), end in found.items()}

    end = asked(box)[str(pem)]
    assert end is not None
    assert told() == {str(pem): end.timestamp()}
    pem.unlink()
    assert told() == {str(pem): 0}
