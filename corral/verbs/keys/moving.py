"""`keys import`: the database of a LiteLLM that ran elsewhere, with its keys, teams and spending.

Until all of it is loaded, what was there before waits in a schema of another name. A run that fails puts it back; after
one that was killed the next one does. The old gateway's database is not touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from corral.build import Plan
from corral.components import litellm, postgres
from corral.config.client_names import added_models, all_aliases
from corral.contributions import State
from corral.errors import CorralError, UsageError
from corral.runtime.board import Board
from corral.runtime.hosts import CommandError, ComposeHost, compose_hosts
from corral.runtime.interrupts import Interrupts
from corral.runtime.lock import alone
from corral.runtime.waiting import create, wait_well
from corral.verbs.archives.backup import states_of
from corral.verbs.up.up import LOCK, Run, fetch_images, look

# How pg_dump's own format begins.
MARK = b"PGDMP"
HOW = "make it with: pg_dump --format custom --file FILE DATABASE"
# The gateway's own data waits in the schema `before_import` meanwhile.
PUT_ASIDE = "ALTER SCHEMA public RENAME TO before_import; CREATE SCHEMA public"
PUT_BACK = "DROP SCHEMA IF EXISTS public CASCADE; ALTER SCHEMA before_import RENAME TO public"
DROP = "DROP SCHEMA before_import CASCADE"
IS_ASIDE = "SELECT count(*) FROM pg_namespace WHERE nspname = 'before_import'"
HAS_KEYS = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public' AND tablename = 'LiteLLM_VerificationToken'"
KEYS = 'SELECT count(*) FROM "LiteLLM_VerificationToken"'
FOUND = """SELECT json_build_object(
'keys', (SELECT count(*) FROM "LiteLLM_VerificationToken"), 'teams', (SELECT count(*) FROM "LiteLLM_TeamTable"),
'models', (SELECT coalesce(json_agg(DISTINCT name), '[]') FROM "LiteLLM_VerificationToken", unnest(models) name),
'stored', (SELECT count(*) FROM "LiteLLM_ProxyModelTable"))"""
# What LiteLLM understands in the place of a model's name.
GENERAL = frozenset({"all-proxy-models", "all-team-models", "no-default-models"})


@dataclass(frozen=True, slots=True)
class _Database:
    """The gateway's database in its container."""

    host: ComposeHost
    container: str
    state: State

    def ask(self, query: str) -> str:
        """What a query comes to."""
        login = self.state.load[self.state.load.index("--port") :]
        psql = ("psql", *login, "--no-align", "--tuples-only", "--quiet", "--set", "ON_ERROR_STOP=1", "--command")
        return self.host.run(["docker", "exec", self.container, *psql, query]).out.strip()

    def feed(self, command: Sequence[str], dump: IO[bytes]) -> None:
        """Hands a dump to a command there."""
        dump.seek(0)
        self.host.feed(["docker", "exec", "--interactive", self.container, *command], dump)

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Has an empty schema in the block, and what was there before afterwards if the block fails."""
        self.ask(PUT_ASIDE)
        try:
            yield
        except BaseException:
            self.ask(PUT_BACK)
            raise
        self.ask(DROP)


def bring(plan: Plan, out: Path, path: Path, talk: Console, *, replace: bool = False) -> None:
    """Load a dump of another LiteLLM's database; the gateway stands still until the next `up`.

    Args:
        plan: what the inventory says.
        out: the folder of renderings.
        path: what `pg_dump --format custom` made.
        talk: where progress goes.
        replace: whether keys that the gateway has may go.

    Raises:
        UsageError: the gateway has keys already, or no database.
        CorralError: the file is no such dump, or cannot be loaded; the database is as it was then.
    """
    gateway = plan.inventory.gateway
    if not gateway.database:
        raise UsageError("gateway.database is false: this gateway keeps no keys; remove that line, then run: up")
    with Interrupts(), alone(out / LOCK, "corral keys import"), _dump(path) as dump, Board(talk) as board:
        host = compose_hosts(plan, out, [gateway.host])[0]
        try:
            _load(Run(plan, out, [host], board), path, dump, replace=replace)
        except CommandError as error:
            raise CorralError(f"{path}: is not loaded; the database is as it was: {error.done.words}") from None
    talk.print(Text("the gateway stands still; next: ./generate.py up"))


@contextmanager
def _dump(path: Path) -> Iterator[IO[bytes]]:
    try:
        file = path.open("rb")
    except OSError as error:
        raise CorralError(f"{path}: cannot be read: {error.strerror}") from None
    with file:
        if file.read(len(MARK)) != MARK:
            raise CorralError(f"{path}: is no dump in PostgreSQL's own format; {HOW}")
        yield file


def _load(run: Run, path: Path, dump: IO[bytes], *, replace: bool) -> None:
    look(run)
    fetch_images(run)
    host = run.hosts[0]
    database = _started(host, run.board)
    try:
        database.feed(("sh", "-c", "pg_restore --list | grep -q LiteLLM_VerificationToken"), dump)
    except CommandError:
        raise CorralError(f"{path}: is damaged, or no dump of a database of LiteLLM's; {HOW}") from None
    if database.ask(IS_ASIDE) != "0":  # of a run that was killed
        database.ask(PUT_BACK)
    count = int(database.ask(KEYS)) if database.ask(HAS_KEYS) != "0" else 0
    if count and not replace:
        message = f"nothing was changed; the gateway has {count} keys, which would be lost"
        raise UsageError(f"{message}; save them with ./generate.py backup, then add --replace")
    _stop_gateway(host)
    with database.replaced():
        database.feed(database.state.load, dump)
    _report(run, path, json.loads(database.ask(FOUND)))


def _started(host: ComposeHost, board: Board) -> _Database:
    create(host, [postgres.COMPONENT])
    wait_well(host, [item for item in host.services if item.name == postgres.COMPONENT], board)
    container = host.container_of(postgres.COMPONENT)
    if container is None:
        raise CorralError(f"{host.name}: the container of {postgres.COMPONENT} is gone again")
    state = next(item for item in states_of(host) if item.name == "database")
    return _Database(host, container.id, state)


def _stop_gateway(host: ComposeHost) -> None:
    """LiteLLM would go on with what it remembers, and `up` starts what does not run."""
    names = {service.name for service in host.services if service.component == litellm.COMPONENT}
    running = [item.id for item in host.containers() if item.service in names and item.is_running]
    if running:
        host.run(["docker", "stop", *running])


def _report(run: Run, path: Path, found: dict[str, Any]) -> None:
    inventory = run.plan.inventory
    auto = [inventory.gateway.auto.name] if inventory.gateway.auto else []
    known = {*inventory.pools, *auto, *all_aliases(inventory), *(name for name, _ in added_models(inventory)), *GENERAL}
    run.board.say(f"{path}: {found['keys']} keys and {found['teams']} teams, with what they have spent")
    if lost := sorted(set(found["models"]) - known):
        run.board.say(f"  keys name models that this farm does not have: {', '.join(lost)}; add aliases to its pools")
    if found["stored"]:
        run.board.say(f"  {found['stored']} models in the database are not used: the inventory says which there are")
