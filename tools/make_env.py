#!/usr/bin/env python3
"""Makes `.venv` in the checkout from the hash-locked requirements, or finds that it is there already.

Only the standard library, and no syntax newer than Python 3.8, so that an old Python ends in a clear message. One
environment serves the kit and its tests: the tests' share is about a second of the installation.

`uv` does the work because it needs seconds where pip needs a minute; pip fetches it, locked by hash like the rest. A
machine whose package settings only pip understands is served by pip.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ("requirements.txt", "requirements-dev.txt")
INSTALLER_LOCK = "requirements-uv.txt"
OLDEST = (3, 11)
# Newest first among the versions the lock was installed and tested with, then whatever the machine calls python3.
CANDIDATES = ("python3.13", "python3.12", "python3.11", "python3", "python3.14")
OURS = "corral-made"  # written first: this .venv may be deleted and made again
COMPLETE = "corral-complete"  # written last: holds the fingerprint; generate.py looks for it
ASK_VERSION = "import sys; print('%d.%d.%d' % sys.version_info[:3])"
UV_NAMES = {"index-url": "UV_DEFAULT_INDEX", "cert": "SSL_CERT_FILE", "proxy": "ALL_PROXY"}  # pip's setting: uv's
INTERRUPTED = 130


class EnvironmentProblem(Exception):
    """What stands in the way of an environment, with its remedy; printed without a traceback."""


class Pip(NamedTuple):
    """How to run pip for the new environment."""

    command: list[str]
    variables: dict[str, str]


def say(text: str) -> None:
    """Prints one line of talk on stderr."""
    print(f"corral: {text}", file=sys.stderr, flush=True)


# --- which Python ---


def find_python() -> tuple[str, str]:
    """Path and version of the Python to build on; raises EnvironmentProblem naming what was found instead."""
    too_old = []
    for name in CANDIDATES:
        program = shutil.which(name)
        version = version_of(program) if program else None
        if program is None or version is None:
            continue
        if version[:2] >= OLDEST:
            return program, ".".join(map(str, version))
        too_old.append(f"{program} is {'.'.join(map(str, version))}")
    found = "; ".join(too_old) or "none on PATH"
    raise EnvironmentProblem(
        f"needs Python {OLDEST[0]}.{OLDEST[1]} or newer; found: {found}.\n"
        "  Debian 12, Ubuntu 24.04 or newer:  sudo apt install python3 python3-venv\n"
        "  macOS with Homebrew:               brew install python@3.13\n"
        "  Elsewhere any python3.11, python3.12 or python3.13 on PATH will do, also one made by uv or pyenv."
    )


def version_of(program: str) -> tuple[int, ...] | None:
    """The version of a Python program as (major, minor, patch); None if it does not run (as idle pyenv shims do)."""
    try:
        answer = subprocess.run(
            [program, "-c", ASK_VERSION], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True
        )
        return tuple(int(part) for part in answer.stdout.split(b".", 2))
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


# --- is it there already ---


def fingerprint(root: Path, version: str) -> str:
    """What decides whether an environment is still the right one: locks, Python, this program, and where it lies."""
    digest = hashlib.sha256()
    for path in (*(root / name for name in (*LOCKS, INSTALLER_LOCK)), Path(__file__)):
        digest.update(path.read_bytes())
    digest.update(json.dumps([version, str(root)]).encode())  # scripts carry absolute paths: a moved checkout is stale
    return digest.hexdigest()


def is_complete(root: Path) -> bool:
    """Whether `.venv` runs and was made from the locks as they are now."""
    venv = root / ".venv"
    try:
        noted = json.loads((venv / COMPLETE).read_text(encoding="utf-8"))
        fresh = noted["fingerprint"] == fingerprint(root, noted["python"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return fresh and os.access(venv / "bin" / "python", os.X_OK)


def make_room(venv: Path) -> None:
    """Removes an outdated or incomplete environment of the kit; refuses to remove any other."""
    if venv.is_symlink() or (venv.exists() and not (venv / OURS).exists() and any(venv.iterdir())):
        raise EnvironmentProblem(f"{venv} was not made by this kit; move it away, then run again: make env")
    if venv.exists():
        (venv / COMPLETE).unlink(missing_ok=True)  # first: a removal that is cut short must not look complete
        for entry in sorted(venv.iterdir(), key=lambda path: path.name == OURS):  # and the claim to it last
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    venv.mkdir(exist_ok=True)
    (venv / OURS).touch()


# --- running the installers ---


def run_logged(title: str, command: Sequence[str], log: Path, variables: Mapping[str, str] | None = None) -> bool:
    """Runs a command into the log, counting the seconds on a terminal; True if it succeeded."""
    started, live = time.monotonic(), sys.stderr.isatty()
    environment = {**os.environ, **(variables or {})}
    with log.open("ab") as sink:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment)
        try:
            while live and process.poll() is None:
                print(f"\rcorral: {title} … {time.monotonic() - started:.0f} s", end="", file=sys.stderr, flush=True)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
            succeeded = process.wait() == 0
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
    print("\r" if live else "", end="", file=sys.stderr)
    say(f"{title} … {time.monotonic() - started:.1f} s" if succeeded else f"{title} … failed")
    return succeeded


def works(*command: str) -> bool:
    """Whether a command succeeds; what it prints is of no interest."""
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0


def last_lines(log: Path, count: int = 6) -> str:
    """The end of the log, indented, for a message."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    telling = [line for line in lines if "WARNING: Retrying" not in line]
    return "\n".join(f"  | {line[:160]}" for line in telling[-count:])


def make_venv(python: str, venv: Path, scratch: Path, log: Path) -> Pip:
    """Makes the bare environment and returns the pip that will fill it, whichever way this Python offers one."""
    inside = str(venv / "bin" / "python")
    if works(python, "-c", "import ensurepip"):
        if run_logged("making .venv", [python, "-m", "venv", str(venv)], log):
            return Pip([inside, "-m", "pip"], {})
    elif run_logged("making .venv", [python, "-m", "venv", "--without-pip", str(venv)], log):
        if works(python, "-m", "pip", "--python", inside, "--version"):
            return Pip([python, "-m", "pip", "--python", inside], {})
        wheel = debian_pip_wheel(scratch, log)
        if wheel:
            return Pip([inside, "-m", "pip"], {"PYTHONPATH": wheel})
    raise EnvironmentProblem(
        f"{python} cannot make a virtual environment:\n{last_lines(log)}\n"
        "  Debian and Ubuntu keep that part of Python in a package of its own:  sudo apt install python3-venv"
    )


def debian_pip_wheel(scratch: Path, log: Path) -> str | None:
    """The wheel of pip in Debian's own package, fetched without root and without installing it; None elsewhere."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return None
    for folder in ("lists/partial", "cache/archives/partial"):
        (scratch / folder).mkdir(parents=True)
    settings = {
        "Dir::State::lists": f"{scratch}/lists",
        "Dir::Cache": f"{scratch}/cache",
        "APT::Sandbox::User": "",  # root would hand the download to a user who cannot write here
        "Debug::NoLocking": "1",
    }
    options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
    apt = " ".join(map(shlex.quote, ["apt-get", "-q", *options]))
    steps = (
        f"cd {shlex.quote(str(scratch))}",
        f"{apt} update",
        f"{apt} download python3-pip-whl",
        "dpkg-deb -x python3-pip-whl_*.deb unpacked",
    )
    title = "python3-venv is not installed; fetching pip from Debian for this checkout alone"
    if not run_logged(title, ["sh", "-c", " && ".join(steps)], log):
        return None
    return next((str(wheel) for wheel in sorted((scratch / "unpacked").rglob("pip-*.whl"))), None)


def settings_of_pip(pip: Pip) -> dict[str, str]:
    """The machine's package index, certificates and proxy as set up for pip, in the words of uv."""
    environment = {**os.environ, **pip.variables}
    listing = subprocess.run(
        [*pip.command, "config", "list"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        check=False,
    )
    found = {}
    for line in listing.stdout.decode(errors="replace").splitlines():
        name, _, value = line.partition("=")
        for_uv = UV_NAMES.get(name.rpartition(".")[2])
        if for_uv and for_uv not in os.environ:
            found[for_uv] = value.strip("'\"")
    return found


def install(pip: Pip, root: Path, log: Path) -> None:
    """Installs both locks with uv, or with pip where uv cannot; raises EnvironmentProblem if neither can."""
    binaries = root / ".venv" / "bin"
    options = ["--require-hashes", "--no-deps", "--only-binary", ":all:"]
    locked = [part for name in LOCKS for part in ("-r", str(root / name))]
    pip_install = [*pip.command, "install", "--disable-pip-version-check", "--no-input", *options]
    uv_install = [str(binaries / "uv"), "--no-config", "pip", "install", "--compile-bytecode", *options]
    uv_install += ["--python", str(binaries / "python")]
    count = count_packages(root)
    if run_logged("fetching uv, the installer", [*pip_install, "-r", str(root / INSTALLER_LOCK)], log, pip.variables):
        title = f"installing {count} packages with uv"
        if run_logged(title, [*uv_install, *locked], log, settings_of_pip(pip)):
            return
    title = f"installing {count} packages with pip, about a minute"
    if not run_logged(title, [*pip_install, *locked], log, pip.variables):
        raise EnvironmentProblem(
            f"the packages could not be installed:\n{last_lines(log)}\n  The whole log: {log}\n"
            "  They come from the index that pip is set up for (pip config list); is the network there, and its proxy\n"
            "  or mirror set? Then run again: make env"
        )


def count_packages(root: Path) -> int:
    """How many packages the locks name."""
    lines = [line for name in LOCKS for line in (root / name).read_text(encoding="utf-8").splitlines()]
    return len({line.partition("==")[0] for line in lines if line[:1].isalnum()})


def write_command(venv: Path, root: Path) -> None:
    """Puts `corral` beside the environment's other programs."""
    command = venv / "bin" / "corral"
    line = " ".join(shlex.quote(str(path)) for path in (venv / "bin" / "python", root / "generate.py"))
    command.write_text(f'#!/bin/sh\nexec {line} "$@"\n', encoding="utf-8")
    command.chmod(0o755)


def build(root: Path) -> None:
    """Makes `.venv` from nothing; its completion mark is the last thing written."""
    started = time.monotonic()
    python, version = find_python()
    venv = root / ".venv"
    log = venv / "install.log"
    say(f"making the environment with Python {version} ({python})")
    make_room(venv)
    with tempfile.TemporaryDirectory(prefix="corral-env-") as scratch:
        install(make_venv(python, venv, Path(scratch), log), root, log)
    write_command(venv, root)
    part = venv / f"{COMPLETE}.part"
    part.write_text(json.dumps({"fingerprint": fingerprint(root, version), "python": version}), encoding="utf-8")
    part.replace(venv / COMPLETE)
    say(f"environment ready in {time.monotonic() - started:.0f} s")


def main() -> int:
    """Makes the environment if need be; returns the exit code."""
    try:
        with Path(__file__).open("rb") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)  # a second make in the same checkout waits, then finds the work done
            if not is_complete(ROOT):
                build(ROOT)
    except EnvironmentProblem as problem:
        say(str(problem))
        return 1
    except KeyboardInterrupt:
        say("interrupted; nothing to clean up, the next make env begins afresh")
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
