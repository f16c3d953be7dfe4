"""Stand-ins for the images that plans name, made of Debian and PyPI packages where no registry can be reached.

    python -m tests.compose.images.build INVENTORY...

Every program comes from one root file system (Debian sid) plus LiteLLM's wheels; each image is that and a few links
(see the Dockerfile). The names are those of the plans, so a rendered tree runs unchanged. An image that is there
already and was not made here is upstream's own: it stays, and the tests run with it. What has the right label is kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from corral.build import Plan, build_plan
from corral.components import chat, litellm
from corral.config.load import load_inventory
from tools import make_open_webui

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[2]
LABEL = "corral.stand-in"
BASE_NAME = "corral-stand-in-base"
SUITE = "sid"
# The suite's Python: wheels for it are fetched while the root file system is made, and again if it has another one.
PYTHON_GUESS = "3.14"
PACKAGES = (
    "busybox-static", "ca-certificates", "curl", "haproxy", "llama.cpp", "nodejs", "openssh-client", "openssh-server",
    "postgresql", "prometheus", "prometheus-alertmanager", "prometheus-node-exporter", "prometheus-postgres-exporter",
    "prometheus-redis-exporter", "python3", "valkey-server",
)  # fmt: skip
# What upstream's image has besides the package's own `proxy` extra.
LITELLM_EXTRAS = ("prisma", "prometheus-client")
WITHOUT = ("/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/i18n/*")
# Of Open WebUI's environment: what browsers load, and packages that it imports only for what no test does here.
NOT_IN_CHAT = (
    "open_webui/frontend/_app", "open_webui/frontend/assets", "open_webui/frontend/pyodide", "open_webui/frontend/wasm",
    "kubernetes", "onnxruntime", "pandas", "pyarrow", "rapidocr",
)  # fmt: skip
NOT_IN_PYTHON = ("site-packages", "dist-packages", "test", "idlelib", "config-*")
ENGINE_VARIABLE = "PRISMA_QUERY_ENGINE_BINARY"
BUILD_ARGUMENTS = ("PRISMA_VERSION", "PRISMA_EXPECTED_ENGINE_VERSION")
BUILD_LIMIT_S = 600
# Components that run another one's image.
# By the name of a component or a service.
TARGET_OF = {"edge": "haproxy", "toy": "vllm", "jobs-store": "valkey", "jobs": "litellm", "jobs-worker": "litellm"}
LOCK = Path(tempfile.gettempdir()) / f"corral-stand-ins-{os.getuid()}.lock"


class BuildProblem(Exception):
    """A stand-in could not be made; the message holds the last lines of the program that failed."""


@dataclass(slots=True)
class Report:
    """What was done: seconds by step, and images that were made, kept, or are upstream's own."""

    seconds: dict[str, float] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    genuine: list[str] = field(default_factory=list)


def targets(plans: Iterable[Plan]) -> dict[str, str]:
    """The Dockerfile's target for every image that a plan names."""
    services = [
        service for plan in plans for service in plan.contributions.services if not plan.site.is_local(service.host)
    ]
    return {
        service.image: TARGET_OF.get(service.name, TARGET_OF.get(service.component, service.component))
        for service in services
    }


def query_engine() -> Path | None:
    """The folder with a query engine and a schema engine for LiteLLM's key store; None where there is none."""
    engine = os.environ.get(ENGINE_VARIABLE, "")
    folder = Path(engine).parent
    return folder if engine and (folder / "query-engine").is_file() and (folder / "schema-engine").is_file() else None


def ensure_images(plans: Iterable[Plan]) -> Report:
    """Makes every image that the plans name and that is not there; raises BuildProblem with the reason if it cannot.

    One at a time: several test runs on a machine make the images once.
    """
    with LOCK.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _ensure(targets(plans))


def _ensure(wanted: Mapping[str, str]) -> Report:
    report = Report()
    missing = {image: target for image, target in wanted.items() if not _is_there(image, target, report)}
    if missing:
        base = f"{BASE_NAME}:{_base_mark()}"
        if _label_of(base) is None:
            _make_base(base, report)
        with tempfile.TemporaryDirectory(prefix="corral-stand-in-") as context:
            _fill_context(Path(context))
            if chat.COMPONENT in missing.values():
                _timed(report, "Open WebUI", partial(_pack_open_webui, Path(context, "open-webui.tar")))
            for image, target in missing.items():
                _timed(report, f"image {image}", partial(_build, image, target, base, Path(context)))
                report.made.append(image)
    return report


def ensure_debian(suite: str) -> str:
    """A bare Debian of that suite, as `debian:SUITE-slim` is one; what is there already is taken."""
    image = f"corral-stand-in-debian:{suite}"
    with LOCK.open("w") as lock, tempfile.TemporaryDirectory(prefix="corral-stand-in-") as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _label_of(image) is None:
            tar = Path(folder, "debian.tar")
            _make_root(tar, suite, ())
            _run("docker", "import", "--change", f"LABEL {LABEL}={suite}", str(tar), image)
    return image


# --- what is there ---------------------------------------------------------------------------------------------------


def _is_there(image: str, target: str, report: Report) -> bool:
    label = _label_of(image)
    if label == "":
        report.genuine.append(image)
    elif label == _mark(target):
        report.kept.append(image)
    return label in ("", _mark(target))


def _label_of(image: str) -> str | None:
    """The image's mark, empty for one that was not made here; None when there is no such image."""
    form = f'{{{{with .Config.Labels}}}}{{{{index . "{LABEL}"}}}}{{{{end}}}}'
    done = _docker("image", "inspect", "--format", form, image, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _base_mark() -> str:
    """Changes with everything that goes into the root file system."""
    return _hash(
        SUITE, *PACKAGES, *WITHOUT, _litellm_version(), *LITELLM_EXTRAS, (REPOSITORY / "requirements.txt").read_text()
    )


def _mark(target: str) -> str:
    """Changes with everything that goes into an image."""
    parts = [path.read_text() for path in sorted(HERE.iterdir()) if path.is_file() and path.suffix != ".py"]
    if target == litellm.COMPONENT:
        parts.append(_engine_mark())
    if target == chat.COMPONENT:
        parts.append(make_open_webui.LOCK.read_text())
    return _hash(_base_mark(), target, *parts)


def _engine_mark() -> str:
    folder = query_engine()
    if folder is None:
        return ""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and "node_modules" not in path.parts]
    return _hash(*(path.read_text() for path in files), *(os.environ.get(name, "") for name in BUILD_ARGUMENTS))


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _litellm_version() -> str:
    return litellm.IMAGE.rpartition(":")[2].removeprefix("v")


# --- making ----------------------------------------------------------------------------------------------------------


def _make_base(base: str, report: Report) -> None:
    """The root file system with all programs, as an image without a name that a registry has."""
    with tempfile.TemporaryDirectory(prefix="corral-stand-in-") as folder, ThreadPoolExecutor(1) as pool:
        tar, wheels = Path(folder, "base.tar"), Path(folder, "wheels")
        early = pool.submit(_timed, report, "wheels", lambda: _fetch_wheels(wheels, PYTHON_GUESS))
        _timed(report, "root file system", lambda: _make_root(tar))
        early.result()
        python = _python_in(tar)
        if python != PYTHON_GUESS:
            shutil.rmtree(wheels)
            _timed(report, f"wheels for Python {python}", lambda: _fetch_wheels(wheels, python))
        _timed(report, "root file system to image", lambda: _import(tar, wheels, python, base))


def _make_root(tar: Path, suite: str = SUITE, packages: Sequence[str] = PACKAGES) -> None:
    options = [f"--dpkgopt=path-exclude={pattern}" for pattern in WITHOUT]
    options += [f"--include={','.join(packages)}"] if packages else []
    _run(
        "mmdebstrap", "--quiet", "--variant=minbase", '--aptopt=Acquire::Check-Valid-Until "false"', *options,
        suite, str(tar), _debian_mirror(),
    )  # fmt: skip


def _debian_mirror() -> str:
    """The mirror that this machine's own sources name."""
    texts = [
        path.read_text()
        for path in (Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d/debian.sources"))
        if path.exists()
    ]
    for words in (line.split() for text in texts for line in text.splitlines()):
        if words and words[0] in ("URIs:", "deb"):
            return next(word for word in words if word.startswith("http"))
    raise BuildProblem("no Debian mirror in /etc/apt/sources.list or /etc/apt/sources.list.d/debian.sources")


def _fetch_wheels(folder: Path, python: str) -> None:
    """LiteLLM and its dependencies in the versions of our lock, for the root file system's Python."""
    beside = Path(sys.executable).with_name("uv")
    _run(
        str(beside if beside.exists() else "uv"), "--no-config", "pip", "install", "--quiet", "--target", str(folder),
        "--python-version", python, "--python-platform", "x86_64-manylinux_2_39", "--only-binary", ":all:",
        "--constraint", str(REPOSITORY / "requirements.txt"), f"litellm[proxy]=={_litellm_version()}", *LITELLM_EXTRAS,
    )  # fmt: skip


def _python_in(tar: Path) -> str:
    with tarfile.open(tar) as archive:
        names = [
            name.rpartition("/")[2]
            for name in archive.getnames()
            if "/usr/bin/python3." in f"/{name.removeprefix('./')}"
        ]
    return min(names, key=len).removeprefix("python")


def _import(tar: Path, wheels: Path, python: str, base: str) -> None:
    # Not the folder itself, which is in the archive already; not its commands, which name this machine's Python.
    names = sorted(path.name for path in wheels.iterdir() if path.name != "bin")
    place = f"s,^,./usr/local/lib/python{python}/dist-packages/,"
    _run("tar", "-rf", str(tar), "--owner=0", "--group=0", "-C", str(wheels), "--transform", place, *names)
    # Not through a pipe: a broken one would leave an empty image under the name.
    _run("docker", "import", "--change", f"LABEL {LABEL}={base.rpartition(':')[2]}", str(tar), base)


def _fill_context(context: Path) -> None:
    for path in HERE.iterdir():
        if path.is_file() and path.suffix != ".py":
            shutil.copy(path, context)
    engine = context / "query-engine"
    folder = query_engine()
    if folder is None:
        engine.mkdir()
    else:
        shutil.copytree(folder, engine, symlinks=True)


def _pack_open_webui(tar: Path) -> None:
    """Open WebUI's environment and the Python that it was made with, without what no test here needs."""
    if not make_open_webui.is_made():
        raise BuildProblem("Open WebUI is not installed, or older; run: make open-webui")
    settings = (make_open_webui.FOLDER / "pyvenv.cfg").read_text()
    root = Path(re.findall(r"^home = (.+)$", settings, re.MULTILINE)[0]).parent
    name = f"python{make_open_webui.PYTHON}"
    library = sorted(path.name for path in (root / "lib").glob(f"lib{name}.so*"))
    own = [f"bin/{name}", f"lib/{name}", *(f"lib/{file}" for file in library)]
    _run(
        "tar", "-cf", str(tar), "--owner=0", "--group=0",
        *(f"--exclude=./{path}" for path in NOT_IN_CHAT), *(f"--exclude=lib/{name}/{path}" for path in NOT_IN_PYTHON),
        "--transform=s,^[.]/,opt/open-webui/,", "--transform=s,^\\(bin\\|lib\\)/,opt/python/\\1/,S",
        "-C", str(root), *own, "-C", str(make_open_webui.FOLDER.resolve() / "lib" / name / "site-packages"), "./",
    )  # fmt: skip


def _build(image: str, target: str, base: str, context: Path) -> None:
    if f" AS {target}\n" not in (context / "Dockerfile").read_text():
        raise BuildProblem(f"{image}: {HERE.relative_to(REPOSITORY)}/Dockerfile has no target {target}; add one")
    before = _docker("image", "inspect", "--format", "{{.Id}}", image, check=False).stdout.strip()
    arguments = [word for name in BUILD_ARGUMENTS for word in ("--build-arg", f"{name}={os.environ.get(name, '')}")]
    _run(
        "docker", "build", "--quiet", "--network", "none", "--target", target, "--tag", image,
        "--build-arg", f"BASE={base}",
        *(arguments if target == litellm.COMPONENT else ()), "--label", f"{LABEL}={_mark(target)}", str(context),
    )  # fmt: skip
    if before:  # an older stand-in, which has just lost its name; still in use, it stays
        _docker("image", "rm", before, check=False)


def _timed(report: Report, step: str, work: Callable[[], None]) -> None:
    began = time.monotonic()
    work()
    report.seconds[step] = round(time.monotonic() - began, 1)


def _docker(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return _run("docker", *words, check=check)


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildProblem(f"{command[0]}: {error}") from None
    if check and done.returncode != 0:
        last = "\n".join((done.stderr or done.stdout).splitlines()[-20:])
        raise BuildProblem(f"{' '.join(command[:3])} … ended with {done.returncode}:\n{last}")
    return done


def main(inventories: list[str]) -> int:
    """Makes the images of these inventories and says what it did."""
    report = ensure_images([build_plan(load_inventory(Path(name))) for name in inventories])
    for step, seconds in report.seconds.items():
        sys.stdout.write(f"{seconds:6.1f} s  {step}\n")
    sys.stdout.write(f"made {len(report.made)}, kept {len(report.kept)}, upstream's own {len(report.genuine)}\n")
    if query_engine() is None:
        sys.stdout.write(
            f"without the key store: {ENGINE_VARIABLE} names no folder with query-engine and schema-engine\n"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
