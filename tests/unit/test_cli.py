"""The command line: exit codes, what goes where, and whether its advice holds."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from corral.cli import main
from corral.cli.context import FOREIGN, PROGRAM
from corral.verbs.up import history
from tests.trees import ROOT, inventory_of

COLOR = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
RUN_MAIN = "import sys; from corral.cli import main; sys.exit(main())"
DEADLINE_S = 60


class Said(NamedTuple):
    """What a run printed and how it ended."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line of its talk."""
        return self.err.rstrip().splitlines()[-1]


Run = Callable[..., Said]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs the command line in an empty folder that has the default inventory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inventory.yaml").write_bytes((ROOT / "inventory.yaml").read_bytes())
    mask = os.umask(0o022)

    def call(*arguments: str) -> Said:
        capsys.readouterr()
        code = main(list(arguments))
        said = capsys.readouterr()
        assert "Traceback" not in said.out + said.err
        return Said(code, said.out, said.err)

    yield call
    os.umask(mask)


# --- exit codes, and which stream -------------------------------------------------------------------------------------


def test_check_is_quiet_on_stdout(run: Run) -> None:
    said = run("check")
    assert (said.code, said.out) == (0, "")
    assert "inventory.yaml: fine" in said.err


def test_plan_is_data(run: Run) -> None:
    said = run("plan")
    assert said.code == 0
    assert "chat-1" in said.out
    assert said.err == ""


def test_schema_is_data(run: Run) -> None:
    said = run("schema")
    assert (said.code, said.err) == (0, "")
    assert json.loads(said.out)["title"] == "corral inventory"


def test_version_is_data(run: Run) -> None:
    assert run("--version").out.startswith("corral ")


def test_render_talks_on_stderr(run: Run) -> None:
    said = run("render")
    assert (said.code, said.out) == (0, "")
    assert re.search(r"^ +create +compose/box/compose\.yaml$", said.err, re.MULTILINE)


def test_quiet_render_says_nothing(run: Run) -> None:
    assert run("render", "--quiet") == Said(0, "", "")


def test_a_wrong_inventory_is_1_with_every_problem(run: Run, tmp_path: Path) -> None:
    text = (
        (tmp_path / "inventory.yaml")
        .read_text()
        .replace("host: box", "host: bx")
        .replace("schema_version: 1", "schema_version: 1\nnmae: x")
    )
    (tmp_path / "inventory.yaml").write_text(text)
    for verb in (["check"], ["plan"], ["plan", "--json"], ["diff"], ["render"], ["secrets", "init"]):
        said = run(*verb)
        assert (said.code, said.out) == (1, ""), verb
        assert re.search(r'^inventory\.yaml:\d+:\d+: .*unknown key "nmae"; did you mean "name"', said.err, re.MULTILINE)
    assert not (tmp_path / "compose").exists()


def test_a_missing_inventory_is_2_and_says_how_to_name_one(run: Run) -> None:
    for verb in ("check", "plan", "diff", "render"):
        said = run(verb, "--inventory", "not-there.yaml")
        assert said.code == 2
        assert "not-there.yaml: no such file; name the inventory with --inventory PATH" in said.err


def test_an_unknown_host_is_2_with_its_near_miss(run: Run) -> None:
    for verb in (["plan"], ["diff"], ["render"], ["secrets", "init"]):
        said = run(*verb, "--host", "boxx")
        assert said.code == 2, verb
        assert 'no host named "boxx"; did you mean "box"?' in said.err


@pytest.mark.parametrize(
    "arguments", [["rendr"], ["render", "--forse"], ["render", "--host"], ["check", "extra"], ["secrets", "x"]]
)
def test_wrong_usage_is_2_and_points_to_the_help(run: Run, arguments: list[str]) -> None:
    said = run(*arguments)
    assert (said.code, said.out) == (2, "")
    assert "see ./generate.py --help" in said.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("start", 'there is no verb "start"; you may mean: ./generate.py up'),
        ("deploy", "./generate.py up"),
        ("stop", "./generate.py down"),
        ("ps", "./generate.py status"),
        ("build", "./generate.py render"),
        ("validate", "./generate.py check"),
        ("pull", "./generate.py models pull"),
        ("what-if", "./generate.py plan --what-if"),
        ("help", "./generate.py --help"),
        ("keys add bob", "./generate.py keys create"),
        ("secrets create", "./generate.py secrets init"),
        ("check inventory.yaml", "write the inventory behind the verb: ./generate.py check --inventory FILE"),
        ("-i inventory.yaml check", "write the inventory behind the verb"),
        ("check -f inventory.yaml", "write the inventory behind the verb"),
        ("up -d", "leave it out"),
        ("check --verbose", "./generate.py doctor and logs tell more"),
        ("chek", "Did you mean 'check'"),
    ],
)
def test_words_of_other_programs_lead_to_the_verb(run: Run, words: str, said: str) -> None:
    found = run(*words.split())
    assert (found.code, found.out) == (2, "")
    assert said in found.err


def test_words_of_other_programs_lead_to_verbs_that_exist(run: Run) -> None:
    for group, verbs in FOREIGN["verbs"].items():
        for verb in verbs:
            words = [word for word in (group, *verb.split()) if word != PROGRAM and not word.startswith("--")]
            assert "Usage:" in run(*words, "--help").out, verb


def test_without_a_verb_there_is_the_help(run: Run) -> None:
    said = run()
    assert (said.code, said.out) == (2, "")
    assert said.err.startswith("Usage:")


def test_an_engine_that_does_not_run_is_told_with_its_remedy(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docker = tmp_path / "docker"
    docker.write_text("#!/bin/sh\necho 'Cannot connect to the Docker daemon at unix:///x.' >&2\nexit 1\n")
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run("render")
    assert "sudo systemctl enable --now docker" in run("restart", "chat-1").err
    assert "./generate.py doctor looks for the cause" in run("logs").err
    assert "./generate.py doctor looks for the cause" in " ".join(run("status").out.split())


@pytest.mark.parametrize("verb", [[], ["render"], ["secrets"], ["secrets", "init"]])
def test_every_verb_explains_itself(run: Run, verb: list[str]) -> None:
    said = run(*verb, "--help")
    assert said.code == 0
    assert "Usage:" in said.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--help"], 0, "Usage: generate.py bench [OPTIONS] COMMAND"),
        (["run", "strees"], 2, 'no scenario named "strees"; did you mean "stress"?'),
    ],
)
def test_bench_is_a_program_of_its_own(tmp_path: Path, words: list[str], code: int, said: str) -> None:
    (tmp_path / "inventory.yaml").write_bytes((ROOT / "inventory.yaml").read_bytes())
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", RUN_MAIN, "bench", *words],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=DEADLINE_S,
    )  # fmt: skip
    assert done.returncode == code
    assert said in done.stdout + done.stderr


# --- diff -------------------------------------------------------------------------------------------------------------


def test_diff_is_3_until_rendered_and_0_after(run: Run) -> None:
    said = run("diff")
    assert said.code == 3
    assert "--- /dev/null\n+++ b/box/compose.yaml\n@@ " in said.out
    assert "files differ from the inventory; ./generate.py render writes them" in said.err
    run("render")
    said = run("diff")
    assert (said.code, said.out) == (0, "")
    assert "compose agrees with inventory.yaml" in said.err


def test_diff_shows_what_render_would_change(run: Run, tmp_path: Path) -> None:
    run("render")
    inventory = tmp_path / "inventory.yaml"
    inventory.write_text(inventory.read_text().replace("port: 4000", "port: 4100"))
    said = run("diff")
    assert said.code == 3
    assert "--- a/box/haproxy/compose.yaml\n+++ b/box/haproxy/compose.yaml\n@@ " in said.out
    assert re.search(r'^-\s+- "127\.0\.0\.1:4000:4000"\n\+\s+- "127\.0\.0\.1:4100:4100"$', said.out, re.MULTILINE)


def test_the_diff_can_be_applied(run: Run, tmp_path: Path) -> None:
    run("render")
    inventory = tmp_path / "inventory.yaml"
    inventory.write_text(inventory.read_text().replace("port: 4000", "port: 4100"))
    patch = run("diff").out
    subprocess.run(["git", "apply", "--directory=compose", "-"], input=patch, text=True, cwd=tmp_path, check=True)
    assert run("diff").code == 0


# --- edited by hand ---------------------------------------------------------------------------------------------------


def test_edited_files_are_reported_kept_and_overwritten_when_forced(run: Run, tmp_path: Path) -> None:
    run("render")
    file = tmp_path / "compose" / "box" / "compose.yaml"
    file.write_text("mine\n")
    said = run("render")
    assert said.code == 1
    assert re.search(r"^ +edited +compose/box/compose\.yaml$", said.err, re.MULTILINE)
    assert "write over them with --force" in said.err
    assert file.read_text() == "mine\n"
    assert "edited by hand: box/compose.yaml" in run("diff").out
    assert run("render", "--force").code == 0
    assert "name:" in file.read_text()


def test_another_site_is_not_rendered_over_this_one(run: Run, tmp_path: Path) -> None:
    run("render")
    other = (tmp_path / "inventory.yaml").read_text().replace("name: farm", "name: other").replace("box", "else")
    (tmp_path / "other.yaml").write_text(other)
    for verb in ("render", "diff"):
        said = run(verb, "--inventory", "other.yaml")
        assert said.code == 1
        assert 'compose/box belongs to the site "farm", not "other"; name another folder with --out' in said.err
    assert sorted(path.name for path in (tmp_path / "compose").iterdir()) == ["box"]


def test_a_failure_of_the_disk_is_1_and_in_words(run: Run, tmp_path: Path) -> None:
    (tmp_path / "compose").write_text("a file")
    said = run("render")
    assert said.code == 1
    assert "compose: cannot be written" in said.err


# --- json and colours -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["heartcode", "neural-farm", "local-everything", "everything-on"])
def test_the_plan_as_json(run: Run, case: str) -> None:
    said = run("plan", "--json", "--inventory", str(inventory_of(case)))
    data = json.loads(said.out)
    assert said.code == 0
    assert set(data) >= {"name", "hosts", "pools"}


def test_the_plan_of_one_host(run: Run) -> None:
    said = run("plan", "--json", "--inventory", str(inventory_of("heartcode")), "--host", "pea")
    assert list(json.loads(said.out)["hosts"]) == ["pea"]


def test_the_plan_names_no_queue_that_only_a_provider_could_have(run: Run) -> None:
    said = run("plan", "--inventory", str(inventory_of("jarvis")))
    cells = re.sub(r"\s+", " ", said.out.partition("may wait")[2].partition(" cloud ")[2].partition("embeddings")[0])
    assert "for 30 s" not in cells
    assert re.search(r"anthropic/\S+ 1 at the", cells)


@pytest.mark.parametrize(("variable", "is_coloured"), [("NO_COLOR", False), ("UNRELATED", True)])
def test_colours_on_a_terminal_unless_told_otherwise(tmp_path: Path, variable: str, *, is_coloured: bool) -> None:
    (tmp_path / "inventory.yaml").write_bytes((ROOT / "inventory.yaml").read_bytes())
    ours, theirs = pty.openpty()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", variable: "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN_MAIN, "render"],
        cwd=tmp_path,
        env=environment,
        stderr=theirs,
        check=True,
        timeout=DEADLINE_S,
    )
    os.close(theirs)
    text = os.read(ours, 65536).decode()
    os.close(ours)
    assert done.returncode == 0
    assert bool(COLOR.search(text)) == is_coloured


def test_no_escape_codes_where_there_is_no_terminal(run: Run) -> None:
    assert "\x1b" not in run("render").err + run("plan").out + run("diff").out


# --- the next command -------------------------------------------------------------------------------------------------


def next_command(said: Said) -> str:
    assert said.last.startswith("next: ")
    return said.last.removeprefix("next: ")


@pytest.mark.parametrize("case", ["default", "heartcode", "one host", "with a space"])
def test_the_next_commands_lead_to_running_containers(run: Run, case: str, tmp_path: Path) -> None:
    arguments = {
        "default": ["render"],
        "heartcode": ["render", "--inventory", str(inventory_of("heartcode")), "--out", "elsewhere"],
        "one host": ["render", "--inventory", str(inventory_of("heartcode")), "--host", "prod"],
        "with a space": ["render", "--out", "a folder"],
    }[case]
    program, *words = shlex.split(next_command(run(*arguments)))
    assert program == "./generate.py"
    assert run(*words).code == 0
    command = shlex.split(next_command(run(*arguments)))
    assert command[:3] == ["docker", "compose", "-f"]
    assert command[-3:] == ["up", "-d", "--wait"]
    assert (tmp_path / command[3]).is_file()
    assert ("prod" in command[3]) == (case == "one host")


@pytest.mark.needs("docker-compose")
def test_compose_takes_the_project_of_the_next_command(run: Run) -> None:
    run("render")
    run("secrets", "init")
    *command, _up, _detached, _wait = shlex.split(next_command(run("render")))
    done = subprocess.run([*command, "config", "-q"], capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_next_command_of_a_local_host_brings_it_up(run: Run, tmp_path: Path) -> None:
    arguments = ["render", "--inventory", str(inventory_of("local-everything"))]
    words = shlex.split(next_command(run(*arguments)))
    assert run(*words[1:]).code == 1, "one value only the user knows"
    secrets = tmp_path / "compose" / "here" / ".env"
    secrets.write_text(f"{secrets.read_text()}HOOK_URL=https://hook.example.com/farm\n")
    assert run(*words[1:]).code == 0
    assert next_command(run(*arguments)) == f"./generate.py up --inventory {inventory_of('local-everything')}"


def test_secrets_init_says_what_it_made_and_what_only_the_user_knows(run: Run, tmp_path: Path) -> None:
    said = run("secrets", "init")
    assert (said.code, said.out) == (0, "")
    assert "compose/box/.env: " in said.err
    values = [line.partition("=")[2] for line in (tmp_path / "compose" / "box" / ".env").read_text().splitlines()]
    assert not any(value and value in said.err for value in values)
    assert "nothing new; kept 11" in run("secrets", "init").err
    said = run("secrets", "init", "--inventory", str(inventory_of("everything-on")), "--out", "all")
    assert said.code == 1
    assert "these values only you know" in said.err
    assert "OPENAI_API_KEY in all/gate/.env" in said.err


# --- what weakens a host ---------------------------------------------------------------------------------------------

# The folder of its certificate is the home of all users.
WEAK = """\
schema_version: 1
name: site
hosts: {sa: {address: 192.0.2.1}}
models: {m: {source: m.gguf, kind: chat, size_gib: 1}}
pools: {chat: {model: m, on: {host: sa}}}
gateway: {host: sa, database: false, cache: false, entrance: {certificate: /home/farm.pem}}
"""


def refuses(said: Said) -> bool:
    words = "sa: haproxy: sees /home of the host; mount a folder made for the purpose [host-mount]"
    return (
        said.code == 1
        and words in said.err
        and said.last.endswith("1 of these would weaken a host; docs/reference/policy.md explains the rules")
    )


def test_what_check_refuses_is_not_rendered_and_not_started(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inventory.yaml").write_text(WEAK)
    assert refuses(run("check"))
    assert refuses(run("render"))
    assert not (tmp_path / "compose").exists()
    assert run("render", "--force").code == 0
    assert run("secrets", "init").code == 0
    monkeypatch.setenv("PATH", str(tmp_path))  # no docker: nothing of it is asked
    assert refuses(run("up"))
    assert refuses(run("up", "--render"))
    assert refuses(run("setup", "--dry-run"))
    assert refuses(run("upgrade"))
    assert refuses(run("bundle", "--to", "parcel"))
    assert not (tmp_path / "parcel").exists()


def test_rollback_does_not_bring_back_what_weakens_a_host(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inventory.yaml").write_text(WEAK)
    assert run("render", "--force").code == 0
    history.record(tmp_path / "compose", "sa", history.files_on_disk(tmp_path / "compose", "sa"), WEAK)
    (tmp_path / "inventory.yaml").write_text(WEAK.replace("/home/farm.pem", "/home/farm/farm.pem"))
    assert run("render").code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "compose" / "sa").rglob("*") if path.is_file()}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refuses(run("rollback"))
    assert {path: path.read_bytes() for path in before} == before
