"""Secrets: made once, kept for ever, readable by nobody else."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from corral.contributions import Secret
from corral.errors import CorralError, SiteError
from corral.render.output import locked
from corral.render.secrets import CERTIFICATES_MARK, Report, initialise, read_env
from tests.needs import program

KEY = Secret("API_KEY", "one", "opens it")
MASTER = Secret("MASTER_KEY", "one", "opens everything", "sk")
GIVEN = Secret("PROVIDER_KEY", "one", "key of a provider", "given")
URL = Secret("DATABASE_URL", "one", "where it is", template="postgresql://user:{API_KEY:url}@db:5432/name")
USERS = Secret("USERS", "one", "who may", template="user default on #{API_KEY:sha256} ~*\n")
BOTH = {"one": [KEY, MASTER], "two": [KEY]}
AWKWARD = "p@ss/w%rd:#? =ü"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((folder / "secrets").iterdir())}


def env(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".env").write_text(text)
    return folder / ".env"


# --- making -----------------------------------------------------------------------------------------------------------


def test_what_is_missing_is_made(tmp_path: Path) -> None:
    reports = initialise(BOTH, tmp_path)
    assert reports == [Report("one", ("API_KEY", "MASTER_KEY"), (), ()), Report("two", ("API_KEY",), (), ())]
    values = read_env(tmp_path / "one" / ".env")
    assert len(values["API_KEY"]) == 48
    assert values["MASTER_KEY"].startswith("sk-")
    assert files(tmp_path / "one") == values


def test_modes_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        initialise(BOTH, tmp_path)
    finally:
        os.umask(before)
    assert mode(tmp_path / "one" / ".env") == 0o600
    assert mode(tmp_path / "one" / "secrets") == 0o700
    assert mode(tmp_path / "one" / "secrets" / "API_KEY") == 0o644


def test_loose_modes_are_tightened(tmp_path: Path) -> None:
    initialise(BOTH, tmp_path)
    (tmp_path / "one" / ".env").chmod(0o644)
    (tmp_path / "one" / "secrets").chmod(0o755)
    initialise(BOTH, tmp_path)
    assert mode(tmp_path / "one" / ".env") == 0o600
    assert mode(tmp_path / "one" / "secrets") == 0o700


def test_values_differ_between_sites(tmp_path: Path) -> None:
    initialise(BOTH, tmp_path / "a")
    initialise(BOTH, tmp_path / "b")
    assert read_env(tmp_path / "a" / "one" / ".env")["API_KEY"] != read_env(tmp_path / "b" / "one" / ".env")["API_KEY"]


# --- keeping ----------------------------------------------------------------------------------------------------------


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    initialise(BOTH, tmp_path)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.rglob("*")}
    assert initialise(BOTH, tmp_path) == [
        Report("one", (), ("API_KEY", "MASTER_KEY"), ()),
        Report("two", (), ("API_KEY",), ()),
    ]
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.rglob("*")} == before


def test_what_is_there_is_kept_with_comments_order_and_spacing(tmp_path: Path) -> None:
    text = "# mine\n\nexport  OTHER = 'x y'   # why\nAPI_KEY=chosen\n\n# last words"
    path = env(tmp_path / "one", text)
    initialise(BOTH, tmp_path)
    values = read_env(path)
    assert path.read_text() == f"{text}\n# opens everything\nMASTER_KEY={values['MASTER_KEY']}\n"
    assert values | {"MASTER_KEY": ""} == {"OTHER": "x y", "API_KEY": "chosen", "MASTER_KEY": ""}
    assert files(tmp_path / "two") == {"API_KEY": "chosen"}


@pytest.mark.parametrize("line", ["API_KEY=", "API_KEY=''", 'API_KEY=""', "  export API_KEY = "])
def test_an_empty_line_that_waits_for_a_value_gets_it(tmp_path: Path, line: str) -> None:
    path = env(tmp_path / "one", f"# opens it\n{line}\nOTHER=1\n")
    initialise({"one": [KEY]}, tmp_path)
    assert path.read_text() == f"# opens it\nAPI_KEY={read_env(path)['API_KEY']}\nOTHER=1\n"
    assert len(read_env(path)["API_KEY"]) == 48


def test_a_copied_example_is_filled_in(tmp_path: Path) -> None:
    from tests.trees import plan_of, tree_of

    plan = plan_of("heartcode")
    path = env(tmp_path / "prod", tree_of("heartcode")["prod/.env.example"].decode())
    initialise({"prod": plan.secrets_of("prod")}, tmp_path)
    assert all(read_env(path).values())
    lines = [
        line
        for line in path.read_text().splitlines()
        if CERTIFICATES_MARK not in line and "certificates of" not in line
    ]
    assert len(lines) == len(tree_of("heartcode")["prod/.env.example"].decode().splitlines())


def test_what_is_in_files_follows_what_is_in_env(tmp_path: Path) -> None:
    initialise(BOTH, tmp_path)
    for host in ("one", "two"):
        path = tmp_path / host / ".env"
        path.write_text(path.read_text().replace(read_env(path)["API_KEY"], "changed"))
    initialise(BOTH, tmp_path)
    assert files(tmp_path / "one")["API_KEY"] == "changed"


def test_files_of_secrets_that_are_no_longer_needed_go_and_those_of_others_stay(tmp_path: Path) -> None:
    initialise({"one": [KEY, MASTER]}, tmp_path)
    (tmp_path / "one" / "secrets" / "tls.pem").write_text("mine")
    (tmp_path / "one" / "secrets" / ".MASTER_KEY.new").write_text("a killed run's draft")
    initialise({"one": [KEY]}, tmp_path)
    assert sorted(files(tmp_path / "one")) == ["API_KEY", "tls.pem"]
    assert "MASTER_KEY" in read_env(tmp_path / "one" / ".env")


# --- several hosts ----------------------------------------------------------------------------------------------------


def test_hosts_share_values_of_the_same_name(tmp_path: Path) -> None:
    initialise(BOTH, tmp_path)
    assert read_env(tmp_path / "one" / ".env")["API_KEY"] == read_env(tmp_path / "two" / ".env")["API_KEY"]
    assert "MASTER_KEY" not in read_env(tmp_path / "two" / ".env")


def test_hosts_that_are_done_one_by_one_share_values_too(tmp_path: Path) -> None:
    initialise(BOTH, tmp_path, {"two"})
    assert not (tmp_path / "one").exists()
    initialise(BOTH, tmp_path, {"one"})
    assert read_env(tmp_path / "one" / ".env")["API_KEY"] == read_env(tmp_path / "two" / ".env")["API_KEY"]


def test_hosts_that_disagree_are_named(tmp_path: Path) -> None:
    env(tmp_path / "one", "API_KEY=a\n")
    env(tmp_path / "two", "API_KEY=b\n")
    with pytest.raises(CorralError, match=r"one/\.env and .*two/\.env have different values for API_KEY; make them eq"):
        initialise(BOTH, tmp_path)
    assert (tmp_path / "one" / ".env").read_text() == "API_KEY=a\n"
    assert not (tmp_path / "one" / "secrets").exists()


def test_an_empty_value_is_no_disagreement(tmp_path: Path) -> None:
    env(tmp_path / "one", "API_KEY=\n")
    env(tmp_path / "two", "API_KEY=b\n")
    initialise(BOTH, tmp_path)
    assert read_env(tmp_path / "one" / ".env")["API_KEY"] == "b"


# --- values that only the user knows ----------------------------------------------------------------------------------


def test_given_secrets_are_reported_missing_until_they_are_there(tmp_path: Path) -> None:
    needed = {"one": [KEY, GIVEN], "two": [GIVEN]}
    assert [report.missing for report in initialise(needed, tmp_path)] == [("PROVIDER_KEY",), ("PROVIDER_KEY",)]
    assert "PROVIDER_KEY" not in files(tmp_path / "one")
    path = tmp_path / "one" / ".env"
    path.write_text(path.read_text() + "PROVIDER_KEY=theirs\n")
    reports = initialise(needed, tmp_path)
    assert [report.missing for report in reports] == [(), ()]
    assert reports[1].made == ("PROVIDER_KEY",)  # what one host was given, the other takes over
    assert files(tmp_path / "two") == {"PROVIDER_KEY": "theirs"}


# --- derived values ---------------------------------------------------------------------------------------------------


def test_derived_values_are_laid_out_but_not_stored(tmp_path: Path) -> None:
    report = initialise({"one": [KEY, URL, USERS]}, tmp_path)[0]
    value = read_env(tmp_path / "one" / ".env")["API_KEY"]
    assert report.made == ("API_KEY",)
    assert files(tmp_path / "one") == {
        "API_KEY": value,
        "DATABASE_URL": f"postgresql://user:{value}@db:5432/name",
        "USERS": f"user default on #{hashlib.sha256(value.encode()).hexdigest()} ~*\n",
    }


def test_a_password_with_awkward_characters_survives_in_a_url(tmp_path: Path) -> None:
    env(tmp_path / "one", f"API_KEY='{AWKWARD}'\n")
    initialise({"one": [KEY, URL]}, tmp_path)
    found = urlsplit(files(tmp_path / "one")["DATABASE_URL"])
    assert (found.hostname, found.port, unquote(found.password or "")) == ("db", 5432, AWKWARD)


def test_a_derived_value_waits_for_what_it_is_made_from(tmp_path: Path) -> None:
    template = Secret("PROVIDER_URL", "one", "with its key", template="https://x:{PROVIDER_KEY:url}@api.example.com")
    initialise({"one": [GIVEN, template]}, tmp_path)
    assert files(tmp_path / "one") == {}


@pytest.mark.needs("redis")
def test_the_rendered_users_file_lets_redis_in_with_the_password_alone(tmp_path: Path) -> None:
    from tests.trees import plan_of

    plan = plan_of("heartcode")
    env(tmp_path / "prod", f"VALKEY_PASSWORD='{AWKWARD}'\n")
    initialise({"prod": plan.secrets_of("prod")}, tmp_path)
    users = tmp_path / "prod" / "secrets" / "VALKEY_USERS"
    assert AWKWARD not in users.read_text()
    socket = tmp_path / "s"
    options = f"--port 0 --unixsocket {socket} --aclfile {users} --save".split()
    command = [str(program("valkey-server", "redis-server")), *options, ""]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        assert any("eady to accept connections" in line for line in server.stdout)
        client = [str(program("valkey-cli", "redis-cli")), "-s", str(socket)]
        refused = subprocess.run([*client, "ping"], capture_output=True, text=True, check=False)
        assert "NOAUTH" in refused.stdout
        welcome = subprocess.run(
            [*client, "--no-auth-warning", "--user", "litellm", "-a", AWKWARD, "ping"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert welcome.stdout == "PONG\n"
    finally:
        server.terminate()
        server.wait(10)
        server.stdout.close()


# --- reading .env -----------------------------------------------------------------------------------------------------

LINES = {
    "A=plain": "plain",
    "A = spaced ": "spaced",
    "export A=exported": "exported",
    "A='single # $x \"y\"'": 'single # $x "y"',
    'A="double # \\"q\\" \\$ \\\\ \\n"': 'double # "q" $ \\ \n',
    "A=value # a comment": "value",
    "A='value' # a comment": "value",
    "A=with#inside": "with#inside",
    "A=": "",
    "A=''": "",
    "A=# nothing": "# nothing",
    "A=a=b": "a=b",
    "A=ümlaut": "ümlaut",
}


@pytest.mark.parametrize("line", LINES)
def test_lines_mean_what_they_mean_to_compose(line: str, tmp_path: Path) -> None:
    assert read_env(env(tmp_path, f"{line}\n")) == {"A": LINES[line]}


@pytest.mark.needs("docker-compose")
def test_compose_reads_the_same_lines_the_same_way(tmp_path: Path) -> None:
    for number, (line, value) in enumerate(LINES.items()):
        folder = tmp_path / str(number)
        env(folder, f"{line}\n")
        (folder / "compose.yaml").write_text('services: {a: {image: x, labels: ["v=${A}"]}}\n')
        command = [
            "docker",
            "compose",
            "--project-directory",
            str(folder),
            "-f",
            str(folder / "compose.yaml"),
            "config",
            "--format",
            "json",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        import json

        found = json.loads(done.stdout)["services"]["a"]["labels"]["v"].replace("$$", "$")
        assert found == value, line


@pytest.mark.parametrize("line", ["no equals sign", "1A=x", "A='open", 'A="open', "A='a' b", "=x"])
def test_a_line_that_is_no_assignment_is_located(line: str, tmp_path: Path) -> None:
    path = env(tmp_path / "one", f"# fine\n{line}\n")
    with pytest.raises(SiteError, match=r"one/\.env:2: not a NAME=value line; fix or remove it"):
        initialise(BOTH, tmp_path)
    assert path.read_text() == f"# fine\n{line}\n"


def test_no_error_shows_a_value(tmp_path: Path) -> None:
    env(tmp_path / "one", "API_KEY='s3cret\n")
    with pytest.raises(SiteError) as caught:
        initialise(BOTH, tmp_path)
    assert "s3cret" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / ".env").write_bytes(b"A=\xff\n")
    with pytest.raises(CorralError, match=r"one/\.env: not UTF-8 text"):
        initialise(BOTH, tmp_path)


# --- what can go wrong ------------------------------------------------------------------------------------------------


def test_links_are_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("API_KEY=x\n")
    folder = tmp_path / "out" / "one"
    folder.mkdir(parents=True)
    (folder / ".env").symlink_to(outside)
    with pytest.raises(CorralError, match="a symbolic link stands where secrets are kept"):
        initialise(BOTH, tmp_path / "out")
    (folder / ".env").unlink()
    (tmp_path / "elsewhere").mkdir()
    (folder / "secrets").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorralError, match="a symbolic link stands where secrets are laid out"):
        initialise(BOTH, tmp_path / "out")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_only_one_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(CorralError, match="another corral is writing here"):
        initialise(BOTH, tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("in the way")
    with pytest.raises(CorralError, match="one"):
        initialise(BOTH, tmp_path)


@pytest.mark.parametrize("call", ["replace", "fsync", "mkdir", "open", "chmod"])
def test_after_a_kill_at_any_step_every_host_still_agrees(tmp_path: Path, call: str) -> None:
    for step in range(1, 60):
        out = tmp_path / f"{call}-{step}"
        env(out / "one", "# mine\nOTHER=1\n")
        child = os.fork()
        if child == 0:
            os._exit(killed_at(call, step, out))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        kept = read_env(out / "one" / ".env")
        assert kept["OTHER"] == "1"
        initialise(BOTH, out)
        values = read_env(out / "one" / ".env")
        assert kept.items() <= values.items(), f"killed at {call} {step}"
        assert values["API_KEY"] == read_env(out / "two" / ".env")["API_KEY"]
        assert files(out / "one") == {name: values[name] for name in ("API_KEY", "MASTER_KEY")}
        assert sorted(path.name for path in (out / "one").iterdir()) == [".env", "secrets"]
        assert mode(out / "one" / ".env") == 0o600
        if code == 0:
            return
    pytest.fail(f"more than 60 times {call}")


def killed_at(call: str, step: int, out: Path) -> int:
    """Initialises and is gone at the n-th call of one of os's functions; 0 when it got through."""
    real = getattr(os, call)
    count = 0

    def fused(*arguments: object, **options: object) -> object:
        nonlocal count
        count += 1
        if count == step:
            os._exit(77)
        return real(*arguments, **options)

    setattr(os, call, fused)
    initialise(BOTH, out)
    return 0
