import time
from pathlib import Path

import pytest
from rich.console import Console

from corral.contributions import Health, Service
from corral.errors import CorralError
from corral.runtime import supervisor
from corral.runtime.board import Board, wait_all
from corral.runtime.causes import cause_of
from corral.runtime.supervisor import LocalHost, Program, last_lines

HERE = Path("/nowhere")


def service(timeout_s: int = 60) -> Service:
    return Service("box", "part", "thing", "image", "program", health=Health(1, "/health", (), timeout_s))


def program(**changes: object) -> Program:
    facts = {"name": "thing", "state": "running", "pid": 7, "started": 1, "ended": 0, "exit_code": 0, "problem": ""}
    return Program(**{**facts, **changes})  # type: ignore[arg-type]


class Script:
    """Rounds of what supervisord and the service say, the last one again and again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *rounds: tuple[Program, bool]) -> None:
        self.rounds = list(rounds)
        monkeypatch.setattr(supervisor, "programs", lambda _folder: {"thing": self.rounds[0][0]})
        monkeypatch.setattr(supervisor, "is_well", lambda *_: self.rounds[0][1])
        monkeypatch.setattr(time, "sleep", self._next)

    def _next(self, _seconds: float) -> None:
        if len(self.rounds) > 1:
            self.rounds.pop(0)


def watch(capsys: pytest.CaptureFixture[str], folder: Path = HERE) -> list[str]:
    """The states that a person is told of."""
    host = LocalHost(folder, "")
    wait_all(host.look, host.explain, [service()], Board(Console(force_terminal=False, width=200)))
    return [line.removeprefix("  box/thing: ").partition(" ")[0] for line in capsys.readouterr().out.splitlines()]


def test_the_wait_ends_when_all_are_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Script(monkeypatch, (program(state="starting", pid=0), False), (program(), False), (program(), True))
    assert watch(capsys) == ["starting", "ready"]


def test_one_end_is_forgiven(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    gone = program(pid=0, state="exited", ended=5)
    Script(monkeypatch, (program(), False), (gone, False), (program(pid=8, ended=5), True))
    assert watch(capsys) == ["starting", "ended", "ready"]


def test_second_end_is_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "thing.log").write_text("one\n\nerror: couldn't bind\n")
    (tmp_path / "logs" / "supervisord.log").write_text("exited: thing (exit status 3; not expected)\n")
    gone = {"pid": 0, "state": "backoff", "problem": "Exited too quickly (process log may have details)"}
    Script(monkeypatch, (program(), False), (program(ended=5, **gone), False), (program(ended=7, **gone), False))
    with pytest.raises(CorralError) as caught:
        watch(capsys, tmp_path)
    assert str(caught.value) == (
        "thing does not stay up: exit status 3\n    one\n    error: couldn't bind\n"
        "  likely cause: another program took its port meanwhile; run it again"
    )


def test_program_that_cannot_be_started_is_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Script(monkeypatch, (program(pid=0, state="fatal", problem="can't find command 'thing'"), False))
    with pytest.raises(CorralError, match=r"thing does not stay up: can't find command 'thing'\n.*it wrote nothing"):
        watch(capsys)


def test_service_that_never_becomes_well_is_given_up_in_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Script(monkeypatch, (program(), False))
    clock = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(CorralError, match="thing runs but is not well within 90 s"):
        watch(capsys)


def test_health_command_is_asked_where_there_is_no_path(tmp_path: Path) -> None:
    for word, is_well in (("true", True), ("false", False), ("no-such-program", False)):
        asked = Service("box", "part", "thing", "image", "program", health=Health(command=(word,)))
        assert supervisor.is_well(asked, tmp_path, "/usr/bin:/bin") is is_well


@pytest.mark.parametrize(
    ("line", "start"),
    [
        ("srv  start: couldn't bind HTTP server socket, hostname: 127.0.0.1", "another program took its port"),
        ("[Errno 98] error while attempting to bind on address", "another program took its port"),
        ("terminated by SIGKILL", "this machine has too little free memory"),
        ("terminated by SIGILL", "the program was built for another processor"),
        ("can't find command 'haproxy'", "the program is not installed"),
        ("error: invalid argument: --fit", "this program is too old or too new"),
        ("ModuleNotFoundError: No module named 'prisma'", "the environment is incomplete"),
        ("llama_model_load: error loading model: bad magic", "llama.cpp cannot load this model file"),
        ("all is well", ""),
    ],
)
def test_likely_causes(line: str, start: str) -> None:
    cause = cause_of(f"before\n{line}\nafter", "process")
    assert (cause.what if cause else "").startswith(start)
    assert bool(cause) is bool(start)


def test_last_lines_of_a_large_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"\xff\n" + b"".join(b"line %d\n\n" % number for number in range(100_000)))
    assert last_lines(log, 2) == ["line 99998", "line 99999"]
    assert last_lines(tmp_path / "none") == []
