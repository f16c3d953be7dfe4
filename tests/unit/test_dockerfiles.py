"""Every Dockerfile of the repository, read by hadolint."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HADOLINT = Path(sys.executable).with_name("hadolint")


def dockerfiles() -> list[Path]:
    """What git would commit that is a Dockerfile by its name."""
    words = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*Dockerfile*"]
    listing = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(path for name in listing.split("\0") if name and (path := ROOT / name).is_file())


def complaints(path: Path) -> str:
    """What hadolint says of a file; nothing when all is well."""
    done = subprocess.run([HADOLINT, "--no-color", path], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_the_dockerfiles_are_found() -> None:
    names = [str(path.relative_to(ROOT)) for path in dockerfiles()]
    assert names == ["gpu-server/Dockerfile", "gpu-server/image/Dockerfile", "tests/compose/images/Dockerfile"]


@pytest.mark.parametrize("path", dockerfiles(), ids=lambda path: path.parent.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    assert complaints(path) == ""


def test_hadolint_finds_what_is_wrong(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian\nRUN cd /tmp && echo $1\n")
    found = complaints(bad)
    assert "DL3006" in found
    assert "SC2086" in found
