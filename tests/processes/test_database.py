"""The database's start script with a real PostgreSQL: rights of the roles, and data of an earlier version."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.needs import postgres_folder
from tests.processes.helpers import REPOSITORY, Process, free_port, wait_until

pytestmark = pytest.mark.needs("postgres")

SCRIPT = REPOSITORY / "litellm" / "postgres.sh"
PASSWORDS = {"litellm": 'it\'s "quoted" \\ & $more', "exporter": "of-the-exporter", "corral": "of-an-earlier-version"}
START_LIMIT_S = 60
EARLIER = """\
CREATE TABLE "Some Keys" (id serial PRIMARY KEY, number int GENERATED ALWAYS AS IDENTITY, name text);

INSERT INTO "Some Keys" (name) VALUES ('kept');

CREATE VIEW shown AS SELECT name FROM "Some Keys";

CREATE TYPE mood AS ENUM ('good', 'bad');

CREATE FUNCTION same(int) RETURNS int LANGUAGE sql AS 'SELECT $1';

CREATE SCHEMA more;

CREATE TABLE more.moods (mood mood);

"""


@dataclass(slots=True)
class Database:
    """A data folder, and PostgreSQL on it while `running`."""

    folder: Path
    port: int = field(default_factory=free_port)

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def file(self, role: str) -> Path:
        path = self.folder / role
        path.write_text(f"{PASSWORDS[role]}\n")
        return path

    def server(self) -> Process:
        words = [self.port, "127.0.0.1", "corral", "litellm", self.file("litellm"), "exporter", self.file("exporter")]
        environment = {"PGDATA": str(self.data)}
        return Process(["sh", SCRIPT, *map(str, words)], self.folder / "log", environment=environment)

    def ask(self, role: str, statement: str) -> str:
        """What a statement prints, or the error's text."""
        words = ["-h", "127.0.0.1", "-p", str(self.port), "-U", role, "-d", "corral", "-Atc", statement]
        environment = {**os.environ, "PGPASSWORD": PASSWORDS[role]}
        command = [str(_program("psql")), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=20)
        return f"{done.stdout}{done.stderr}".strip()

    def wait(self) -> None:
        wait_until(lambda: self.ask("litellm", "SELECT 1") == "1", START_LIMIT_S, "PostgreSQL answers")

    def make_as_before(self) -> None:
        """The data as an earlier version has left it: one role, which is a superuser and owns everything."""
        self.data.mkdir()
        words: list[str | Path] = ["initdb", "--pgdata", self.data, "--username", "corral", "--auth", "scram-sha-256"]
        self._as_owner([*words, "--no-sync", "--pwfile", self.file("corral")], "")
        single: list[str | Path] = ["postgres", "--single", "-j", "-D", self.data, "-c", "exit_on_error=on"]
        self._as_owner([*single, "postgres"], "CREATE DATABASE corral;\n\n")
        self._as_owner([*single, "corral"], EARLIER)

    def _as_owner(self, words: list[str | Path], given: str) -> None:
        lent: list[str | Path] = []
        if os.geteuid() == 0:
            shutil.chown(self.data, "postgres")
            lent = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "--"]
        command = [*lent, _program(str(words[0])), *words[1:]]
        subprocess.run(command, input=given, text=True, check=True, capture_output=True, timeout=START_LIMIT_S)


def _program(name: str) -> Path:
    folder = postgres_folder()
    assert folder is not None
    return folder / name


@pytest.fixture
def database() -> Iterator[Database]:
    with TemporaryDirectory(prefix="corral-test-") as folder:
        Path(folder).chmod(0o755)  # for the account that root lends to PostgreSQL
        yield Database(Path(folder))


def _check_rights(database: Database) -> None:
    assert database.ask("litellm", "SELECT rolsuper FROM pg_roles WHERE rolname = 'litellm'") == "f"
    assert "CREATE TABLE" in database.ask("litellm", "CREATE TABLE made (number int)")
    for statement in (
        "COPY (SELECT 1) TO PROGRAM 'true'", "SELECT pg_read_file('/etc/passwd')", "CREATE ROLE more",
        "CREATE DATABASE more", "ALTER ROLE litellm SUPERUSER", "SET ROLE exporter", "ALTER SYSTEM SET port = 1",
    ):  # fmt: skip
        assert "ERROR:" in database.ask("litellm", statement), statement
    assert int(database.ask("exporter", "SELECT count(*) FROM pg_stat_activity WHERE query <> ''")) > 0
    assert "ERROR:" in database.ask("exporter", "SELECT * FROM made")
    assert "ERROR:" in database.ask("exporter", "CREATE TABLE own (number int)")


def test_no_role_is_more_than_it_needs_to_be(database: Database) -> None:
    with database.server():
        database.wait()
        _check_rights(database)
        assert "no pg_hba.conf entry" in database.ask("corral", "SELECT 1")
    with database.server():  # again, on what is there
        database.wait()
        assert database.ask("litellm", "SELECT count(*) FROM made") == "0"


def test_data_of_an_earlier_version_is_taken_over(database: Database) -> None:
    database.make_as_before()
    with database.server():
        database.wait()
        _check_rights(database)
        assert "no pg_hba.conf entry" in database.ask("corral", "SELECT 1")  # still a superuser, but of no use
        assert database.ask("litellm", "SELECT name FROM shown") == "kept"
        for statement in (
            'ALTER TABLE "Some Keys" ADD COLUMN more text', "INSERT INTO \"Some Keys\" (name) VALUES ('new')",
            "DROP VIEW shown", "ALTER TYPE mood ADD VALUE 'so-so'", "INSERT INTO more.moods VALUES ('good')",
            "DROP FUNCTION same(int)", "CREATE TABLE more.other (number int)", "DROP SCHEMA more CASCADE",
        ):  # fmt: skip
            assert "ERROR" not in database.ask("litellm", statement), statement
        assert database.ask("litellm", 'SELECT max(id), max(number) FROM "Some Keys"') == "2|2"
