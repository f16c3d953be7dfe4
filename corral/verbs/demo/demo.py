"""`demo`: the whole request path on this machine, in plain processes and one folder, gone after `demo --down`."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from corral.build import Plan, build_plan
from corral.config.inventory import Inventory
from corral.config.load import Loaded, load_inventory
from corral.contributions import Service
from corral.declarations import ASSETS, IS_CHECKOUT, shipped
from corral.errors import CorralError
from corral.files import write_atomically
from corral.render.output import compare, write
from corral.render.secrets import ENV_FILE, initialise, read_env
from corral.render.tree import render
from corral.runtime import supervisor
from corral.runtime.board import Board, wait_all
from corral.runtime.interrupts import Interrupts
from corral.runtime.lock import alone
from corral.runtime.supervisor import LocalHost, Status, taken_ports
from corral.tables import new_table
from corral.units import duration
from corral.verbs.demo.probe import client, embed, import_client, stream_chat
from corral.verbs.init.init import this_machine
from corral.verbs.models.weights import canonical, find_weights

INVENTORY = shipped("inventories/demo.yaml")
# What it writes is below this folder's `.corral`: in the checkout, or in the person's own folder.
PLACE = ASSETS if IS_CHECKOUT else Path.home()
FOLDER = PLACE / ".corral" / "demo"
LOCK = PLACE / ".corral" / "demo.lock"
RECORD = FOLDER / "run.json"
DATA = shipped("templates/demo")
# Answers every request with one sentence, and embeds; `tests/tiny_models.py` made it.
TINY_MODEL = DATA / "model.gguf"
KEY = "LITELLM_MASTER_KEY"

QUESTION = "Who are you, in one sentence?"
TEXT = "a cat sleeps on the warm graphics card"
MIB = 1024**2


@dataclass(frozen=True, slots=True)
class Demo:
    """The farm of the demo as it is planned for this machine, and where its progress and its result are printed."""

    plan: Plan
    # PATH of its programs.
    path: str
    # The chat model that was asked for, empty for the tiny one.
    model: str
    interrupts: Interrupts
    talk: Console
    out: Console

    @property
    def host(self) -> str:
        """Name of the host that is this machine."""
        return self.plan.inventory.gateway.host

    @property
    def folder(self) -> Path:
        """The rendered host."""
        return FOLDER / self.host

    @property
    def services(self) -> list[Service]:
        """What runs."""
        return self.plan.services_of(self.host)

    @property
    def base_url(self) -> str:
        """What an OpenAI client is given."""
        return f"http://127.0.0.1:{self.plan.inventory.gateway.port}/v1"

    @property
    def key(self) -> str:
        """What opens the gateway."""
        return read_env(self.folder / ENV_FILE)[KEY]

    def pools(self, kind: str) -> list[str]:
        """Names of the pools of a kind."""
        models, pools = self.plan.inventory.models, self.plan.inventory.pools
        return [name for name, pool in pools.items() if pool.model and models[pool.model].kind == kind]

    @property
    def runtime(self) -> LocalHost:
        """What runs its programs."""
        return LocalHost(self.folder, self.path)

    def statuses(self) -> dict[str, Status]:
        """How its services are now."""
        return self.runtime.look(self.services)


def up(model: str | None, talk: Console, out: Console) -> None:
    """Starts the demo, or says that it runs; when a part does not, all of it is started again, with the same key.

    The result goes to `out`, progress to `talk`.

    Raises CorralError when it cannot be started and KeyboardInterrupt when it was interrupted; nothing is left then.
    """
    with Interrupts() as interrupts, alone(LOCK, "make demo"):
        demo = _planned(canonical(model) if model else "", interrupts, talk, out)
        is_running = supervisor.programs(demo.folder) is not None
        recorded = _recorded_model()
        if is_running and recorded and not model:
            demo = _planned(recorded, interrupts, talk, out)
        why = _why_again(demo, recorded) if is_running else ""
        if is_running and not why:
            starts = [
                status.program.started for status in demo.statuses().values() if status.program and status.program.pid
            ]
            talk.print(f"the demo is running, for {duration(time.time() - min(starts, default=time.time()))}")
            _report(demo)
        else:
            _start(demo, why)


def down(talk: Console) -> None:
    """Stops everything that the demo started and removes all that it wrote."""
    with alone(LOCK, "make demo"):
        had_folder = FOLDER.exists()
        count = _remove()
        if not count and not had_folder:
            talk.print("the demo does not run, and nothing of it is here")
            return
        stopped = f"stopped {count} programs, " if count else ""
        talk.print(Text(f"{stopped}removed {_short(FOLDER)}; nothing is left of the demo"))


# --- the plan


def _planned(model: str, interrupts: Interrupts, talk: Console, out: Console) -> Demo:
    path = supervisor.search_path()
    loaded = load_inventory(INVENTORY)
    has_balancer = shutil.which("haproxy", path=path) is not None
    fitted = fit_inventory(loaded.inventory, has_balancer=has_balancer, has_own_model=bool(model))
    return Demo(build_plan(Loaded(fitted, loaded.source)), path, model, interrupts, talk, out)


def fit_inventory(inventory: Inventory, *, has_balancer: bool, has_own_model: bool) -> Inventory:
    """The demo's inventory for this machine: without HAProxy where there is none, with all cores for a real model."""
    gateway = inventory.gateway if has_balancer else inventory.gateway.model_copy(update={"balancing": "direct"})
    pools = dict(inventory.pools)
    for name, pool in pools.items():
        if has_own_model and pool.model and inventory.models[pool.model].kind == "chat":
            threads = max(1, (psutil.cpu_count(logical=False) or 1))
            pools[name] = pool.model_copy(update={"engine": pool.engine.model_copy(update={"threads": threads})})
    return inventory.model_copy(update={"gateway": gateway, "pools": pools})


def _recorded_model() -> str | None:
    """The chat model of the demo that is there; None if none is recorded."""
    try:
        return str(json.loads(RECORD.read_text())["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _why_again(demo: Demo, recorded: str | None) -> str:
    """Why a demo that runs is started again; files edited by hand count as wanted."""
    is_changed = any(item.action in ("create", "update", "remove") for item in compare(render(demo.plan), FOLDER))
    if recorded != demo.model or is_changed:
        return "the demo runs with another model or inventory"
    unwell = ", ".join(name for name, status in demo.statuses().items() if not status.is_well)
    return f"{unwell}: not well" if unwell else ""


# --- starting


def _start(demo: Demo, why_again: str) -> None:
    """Starts it; what runs is stopped first where there is a reason, and the key stays the same."""
    if not why_again:
        if FOLDER.exists() or supervisor.folders_below(FOLDER):
            demo.talk.print("clearing away what an earlier run left")
            _remove()
        _check_ports(demo)
    weights = find_weights(demo.model, demo.talk) if demo.model else None
    with _all_or_nothing(demo):
        if why_again:
            demo.talk.print(Text(f"{why_again}; starting it again", "yellow"))
            supervisor.stop(demo.folder)
            _check_ports(demo)
        began = time.monotonic()
        _announce(demo)
        _lay_out(demo, weights)
        with demo.interrupts.held():
            supervisor.start(demo.folder, demo.path)
        threading.Thread(target=import_client).start()
        with Board(demo.talk) as board:
            wait_all(demo.runtime.look, demo.runtime.explain, demo.services, board)
        demo.talk.print(f"all {len(demo.services)} services are well after {time.monotonic() - began:.0f} s\n")
        _prove(demo)
        _report(demo)


def _check_ports(demo: Demo) -> None:
    if taken := taken_ports(demo.services):
        words = "\n  ".join(taken)
        raise CorralError(
            f"nothing was started:\n  {words}\nend that process, or change the port in {_short(INVENTORY)}"
        )


def _announce(demo: Demo) -> None:
    model = Path(demo.model).name if demo.model else "a tiny model"
    is_balanced = demo.plan.inventory.gateway.balancing != "direct"
    balancer = "HAProxy" if is_balanced else "LiteLLM itself"
    words = f"starting {len(demo.services)} services: chat with {model}, LiteLLM in front, balanced by {balancer}"
    demo.talk.print(Text(words))
    if not is_balanced:
        words = "no HAProxy here: no bounded queue, no slot guarantee; to have both: brew install haproxy"
        demo.talk.print(Text(words, "yellow"))


def _lay_out(demo: Demo, weights: Path | None) -> None:
    """The rendered folder with its secrets, and every model: a link to the person's own, else to the tiny one."""
    write(render(demo.plan), FOLDER, force=True)
    initialise(demo.plan.secrets, FOLDER)
    folder = demo.folder / "models"
    folder.mkdir(exist_ok=True)
    for model in demo.plan.inventory.models.values():
        path = folder / model.file
        path.unlink(missing_ok=True)
        path.symlink_to(((model.kind == "chat" and weights) or TINY_MODEL).resolve())
    write_atomically(RECORD, json.dumps({"model": demo.model}).encode(), 0o644)


def _prove(demo: Demo) -> None:
    """One chat and one embedding through the gateway, shown as they come."""
    with client(demo.base_url, demo.key) as gateway:
        for pool in demo.pools("chat"):
            demo.out.print(Text.assemble((f"you to {pool}: ", "dim"), QUESTION))
            demo.out.print(Text(f"{pool}: ", "dim"), end="")
            for piece in stream_chat(gateway, pool, QUESTION):
                demo.out.print(Text(piece), end="")
                demo.out.file.flush()
            demo.out.print()
        for pool in demo.pools("embedding"):
            numbers = embed(gateway, pool, TEXT)
            shown = ", ".join(f"{number:.3f}" for number in numbers[:3])
            demo.out.print(Text.assemble((f"{pool}: ", "dim"), f'"{TEXT}" is [{shown}, … {len(numbers)} numbers]'))
    demo.out.print()


# --- what a person reads at the end


def _report(demo: Demo) -> None:
    demo.out.print(_table(demo.services, demo.statuses()))
    demo.out.print()
    words = (DATA / "use.txt").read_text(encoding="utf-8").format(
        address=demo.base_url, models=", ".join(demo.plan.inventory.pools), key=KEY,
        env=_short(demo.folder / ENV_FILE), chat=demo.pools("chat")[0],
    )  # fmt: skip
    text = Text(words)
    text.highlight_regex(r"(?m)^\w+( model)?(?=  )", "bold")
    demo.out.print(text)
    demo.talk.print(Text(_next_step()))
    exports = f"export OPENAI_BASE_URL={demo.base_url}\nexport OPENAI_API_KEY={demo.key}"
    demo.out.print(exports, markup=False, style=None)


def _next_step() -> str:
    """What a person with this machine does after the demo."""
    with suppress(CorralError):
        if found := this_machine().in_short:
            return f"next: ./generate.py init --output farm.yaml proposes a farm of your own, with {found}"
    return "next: docs/tutorial.md; on a machine with cards or models, ./generate.py init proposes a farm with them"


def _table(services: Sequence[Service], found: Mapping[str, Status]) -> Table:
    """Services with what they do, state, ports and memory with all their children."""
    table = new_table("service", "what it does", "state", ">port", ">memory", is_compact=True)
    for service in services:
        status = found[service.name]
        memory = supervisor.memory_bytes(status.program.pid) if status.program and status.program.pid else 0
        table.add_row(
            service.name,
            Text(service.role or service.component, "dim"),
            Text(status.state, "green" if status.is_well else "yellow"),
            ", ".join(str(port.number) for port in service.ports),
            f"{memory / MIB:.0f} MiB" if memory else "",
        )
    return table


def _short(path: Path) -> Path:
    """The path below the checkout, where it is."""
    return path.relative_to(PLACE) if IS_CHECKOUT and path.is_relative_to(PLACE) else path


# --- leaving nothing


@contextmanager
def _all_or_nothing(demo: Demo) -> Iterator[None]:
    """Whatever ends the block before its end, nothing runs and nothing lies there afterwards."""
    try:
        yield
    except BaseException as error:
        demo.interrupts.ignore()
        demo.talk.print("stopping everything and removing what was written")
        _remove()
        demo.talk.print("nothing is left of the demo")
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise CorralError(f"{error.filename or _short(FOLDER)}: {error.strerror or error}") from None
        raise


def _remove() -> int:
    """Stops what runs and removes what lies there; returns how many programs ran."""
    written = {config.parent for config in FOLDER.glob(f"*/{supervisor.CONFIG}")}
    count = sum(supervisor.stop(folder) for folder in sorted(supervisor.folders_below(FOLDER) | written))
    if FOLDER.exists():
        shutil.rmtree(FOLDER)
    return count
