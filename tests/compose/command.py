"""corral's commands, each in a process of its own: forked from one that has imported corral, which saves a second."""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import corral
from corral.cli import main
from tests.processes.helpers import REPOSITORY

LIMIT_S = 900.0
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload([__name__, *(item.name for item in pkgutil.walk_packages(corral.__path__, "corral."))])


def run(
    words: Sequence[str], environment: Mapping[str, str] | None = None, *, is_joined: bool = False
) -> subprocess.CompletedProcess[str]:
    """How a command ended and what it printed: on both streams, or all in `stdout` if joined.

    `environment` adds to this process's own. TimeoutError, with what was printed, after a quarter of an hour.
    """
    variables = {**os.environ, **(environment or {})}
    with tempfile.TemporaryDirectory(prefix="corral-command-") as folder:
        files = [Path(folder, name) for name in ("out", "out" if is_joined else "err")]
        process = _forks.Process(target=_command, args=(list(words), variables, files))
        process.start()
        process.join(LIMIT_S)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        out, err = (path.read_text() for path in files)
    if code is None:
        raise TimeoutError(f"{words} not within {LIMIT_S} s:\n{out}{err}")
    return subprocess.CompletedProcess(words, code, out, "" if is_joined else err)


def _command(words: list[str], variables: Mapping[str, str], files: list[Path]) -> None:
    os.setsid()
    os.chdir(REPOSITORY)
    os.environ.clear()
    os.environ.update(variables)
    for number, path in enumerate(files, start=1):
        with path.open("ab") as file:
            os.dup2(file.fileno(), number)
    sys.argv = ["generate.py", *words]
    sys.exit(main())
