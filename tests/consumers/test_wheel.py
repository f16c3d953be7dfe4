"""The wheel, installed where there is no checkout: hatchling builds it, uv installs it, its `corral` renders a site."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CASE = ROOT / "tests" / "golden" / "everything-on"


def run(*command: str | Path, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=120
    )


def files_below(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mode)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel, which finds what it depends on in the environment of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, folder=ROOT)
    assert built.returncode == 0, built.stderr
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    uv = Path(sys.executable).with_name("uv")
    command = (uv, "--no-config", "pip", "install", "--offline", "--no-deps", "--python", python)
    installed = run(*command, *folder.glob("*.whl"), folder=folder)
    assert installed.returncode == 0, installed.stderr
    packages = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python.parent


def test_it_renders_what_the_checkout_renders(programs: Path, tmp_path: Path) -> None:
    shutil.copytree(CASE, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("expected*"))
    checked = run(programs / "corral", "check", folder=tmp_path)
    assert checked.returncode == 0, checked.stderr
    rendered = run(programs / "corral", "render", "--out", "theirs", folder=tmp_path)
    assert rendered.returncode == 0, rendered.stderr
    ours = run(sys.executable, "-m", "corral", "render", "--out", "ours", folder=tmp_path, PYTHONPATH=str(ROOT))
    assert ours.returncode == 0, ours.stderr
    assert files_below(tmp_path / "theirs") == files_below(tmp_path / "ours")


def test_its_messages_name_its_own_command(programs: Path, tmp_path: Path) -> None:
    wrong = run(programs / "corral", "no-such-verb", folder=tmp_path)
    assert (wrong.returncode, wrong.stderr.count("see corral --help")) == (2, 1)
    (tmp_path / "inventory.yaml").write_bytes((ROOT / "inventory.yaml").read_bytes())
    bundle = run(programs / "corral", "bundle", "--to", "bundle.tar", folder=tmp_path)
    assert bundle.returncode == 2
    assert "a bundle that contains the kit needs a checkout of corral" in bundle.stderr


def test_its_folders_hide_no_package(programs: Path, tmp_path: Path) -> None:
    where = "from importlib.util import find_spec; print(find_spec('litellm').origin)"
    found = run(programs / "python", "-c", where, folder=tmp_path)
    assert found.stdout.strip() == str(Path(sysconfig.get_path("purelib")) / "litellm" / "__init__.py")
    bench = run(programs / "corral", "bench", "--help", folder=tmp_path)
    assert "sweep" in bench.stdout, bench.stderr


def test_a_shell_completes_its_verbs(programs: Path, tmp_path: Path) -> None:
    asked = {"_CORRAL_COMPLETE": "complete_bash", "COMP_WORDS": "corral sta", "COMP_CWORD": "1"}
    assert run(programs / "corral", folder=tmp_path, **asked).stdout.split() == ["status"]
