"""`demo`: the whole request path on this machine, in plain processes and one folder, gone after `demo --down`."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from corral.contributions import Service
from corral.errors import CorralError
from corral.files import write_atomically
from corral.render.output import compare, write
from corral.render.secrets import ENV_FILE, initialise
from corral.render.tree import ROOT, render
from corral.runtime import supervisor
from corral.runtime.board import Board, wait_all
from corral.runtime.interrupts import Interrupts
from corral.runtime.lock import alone
from corral.runtime.supervisor import Status, memory_bytes, taken_ports
from corral.verbs.demo.farm import FOLDER, INVENTORY, KEY, Farm, plan_farm
from corral.verbs.demo.probe import client, embed, import_client, stream_chat
from corral.verbs.models.weights import canonical, find_weights

LOCK = ROOT / ".corral" / "demo.lock"
RECORD = "run.json"

QUESTION = "Who are you, in one sentence?"
ANSWER = (
    "I am a tiny model, made on the spot a moment ago; whatever you ask, this is all I say, "
    "but I say it through the same gateway as a real model would."
)
TEXT = "a cat sleeps on the warm graphics card"
# A program that was started this recently is given time before it counts as stuck.
STARTING_S = 30
MINUTE_S = 60
HOUR_S = 3600
MIB = 1024**2


# --- the verb


def up(model: str | None, talk: Console, out: Console) -> None:
    """Starts the demo, or says that it runs and mends what does not; the result goes to `out`, progress to `talk`.

    Raises CorralError when it cannot be started and KeyboardInterrupt when it was interrupted; nothing is left then.
    """
    with Interrupts() as interrupts, alone(LOCK, "make demo"):
        farm = plan_farm(canonical(model) if model else "")
        is_running = supervisor.programs(farm.folder) is not None
        recorded = _recorded_model()
        if is_running and recorded and not model:
            farm = plan_farm(recorded)
        if is_running and recorded == farm.model and not _is_outdated(farm):
            _look_after(farm, interrupts, talk, out)
        else:
            _start_anew(farm, interrupts, talk, out, is_running=is_running)


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


# --- starting


def _start_anew(farm: Farm, interrupts: Interrupts, talk: Console, out: Console, *, is_running: bool) -> None:
    """Starts, in the place of what a killed run left, or of a demo with another model or inventory; the key stays."""
    if not is_running:
        if FOLDER.exists() or supervisor.folders_below(FOLDER):
            talk.print("clearing away what an earlier run left")
            _remove()
        _check_ports(farm)
    weights = find_weights(farm.model, talk) if farm.model else None
    with _all_or_nothing(interrupts, talk):
        if is_running:
            talk.print(Text("the demo runs with another model or inventory; starting it again"))
            supervisor.stop(farm.folder)
            _check_ports(farm)
        _start(farm, weights, interrupts, talk, out)


def _start(farm: Farm, weights: Path | None, interrupts: Interrupts, talk: Console, out: Console) -> None:
    began = time.monotonic()
    _announce(farm, talk)
    write(render(farm.plan), FOLDER, force=True)
    initialise({farm.host: farm.secrets}, FOLDER)
    _lay_out_models(farm, weights)
    write_atomically(FOLDER / RECORD, json.dumps({"model": farm.model}).encode(), 0o644)
    with interrupts.held():
        supervisor.start(farm.folder, farm.path)
    threading.Thread(target=import_client).start()
    with Board(talk) as board:
        wait_all(farm.runtime.look, farm.runtime.explain, farm.services, board)
    talk.print(Text(f"all {len(farm.services)} services are well after {time.monotonic() - began:.0f} s\n"))
    _prove(farm, out)
    _report(farm, farm.runtime.look(farm.services), out)


def _announce(farm: Farm, talk: Console) -> None:
    model = Path(farm.model).name if farm.model else "a tiny model made here"
    balancer = "HAProxy" if farm.is_balanced else "LiteLLM itself"
    talk.print(
        Text(f"starting {len(farm.services)} services: chat with {model}, LiteLLM in front, balanced by {balancer}")
    )
    if not farm.is_balanced:
        talk.print(
            Text(
                "no HAProxy here: no bounded queue, no slot guarantee; to have both: apt install haproxy",
                "yellow",
            )
        )


def _check_ports(farm: Farm) -> None:
    taken = taken_ports(farm.services)
    if taken:
        words = "\n  ".join(taken)
        raise CorralError(
            f"nothing was started:\n  {words}\nend that process, or change the port in {_short(INVENTORY)}"
        )


def _lay_out_models(farm: Farm, weights: Path | None) -> None:
    """Every model of the plan in the host's models folder: a link to the person's own, else a tiny one made now."""
    from corral.tiny_models import make_chat_model, make_embedding_model

    folder = farm.folder / "models"
    folder.mkdir(exist_ok=True)
    for model in farm.plan.inventory.models.values():
        path = folder / model.file
        path.unlink(missing_ok=True)
        if model.kind == "embedding":
            make_embedding_model(path)
        elif weights is not None:
            path.symlink_to(weights.resolve())
        else:
            make_chat_model(path, answer=ANSWER)


def _prove(farm: Farm, out: Console) -> None:
    """One chat and one embedding through the gateway, shown as they come."""
    with client(farm.base_url, farm.key) as gateway:
        for pool in farm.pools("chat"):
            out.print(Text.assemble((f"you to {pool}: ", "dim"), QUESTION))
            out.print(Text(f"{pool}: ", "dim"), end="")
            for piece in stream_chat(gateway, pool, QUESTION):
                out.print(Text(piece), end="")
                out.file.flush()
            out.print()
        for pool in farm.pools("embedding"):
            numbers = embed(gateway, pool, TEXT)
            shown = ", ".join(f"{number:.3f}" for number in numbers[:3])
            out.print(Text.assemble((f"{pool}: ", "dim"), f'"{TEXT}" is [{shown}, … {len(numbers)} numbers]'))
    out.print()


# --- running already


def _look_after(farm: Farm, interrupts: Interrupts, talk: Console, out: Console) -> None:
    """Says that the demo runs; restarts what is not well first."""
    found = farm.runtime.look(farm.services)
    if not all(status.is_well for status in found.values()):
        with _all_or_nothing(interrupts, talk):
            _mend(farm, found, talk)
            _prove(farm, out)
        found = farm.runtime.look(farm.services)
    talk.print(Text(f"the demo is running, for {_running_since(found)}"))
    _report(farm, found, out)


def _mend(farm: Farm, found: Mapping[str, Status], talk: Console) -> None:
    broken = [service for service in farm.services if not found[service.name].is_well]
    for service in broken:
        if _is_just_starting(found[service.name]):
            talk.print(Text(f"{service.name} is starting"))
        else:
            talk.print(Text(f"{service.name} is not well; restarting it", "yellow"))
            supervisor.restart(farm.folder, service.name)
    with Board(talk) as board:
        wait_all(farm.runtime.look, farm.runtime.explain, broken, board)


def _is_just_starting(status: Status) -> bool:
    program = status.program
    if program is None or not program.pid or time.time() - program.started > STARTING_S:
        return False
    try:
        return psutil.Process(program.pid).status() != psutil.STATUS_STOPPED
    except psutil.Error:
        return False


def _recorded_model() -> str | None:
    """The chat model of the demo that is there; None if none is recorded."""
    try:
        return str(json.loads((FOLDER / RECORD).read_text())["model"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_outdated(farm: Farm) -> bool:
    """Whether what runs was rendered from something else; files edited by hand count as wanted."""
    return any(change.action in ("create", "update", "remove") for change in compare(render(farm.plan), FOLDER))


# --- what a person reads at the end


def _report(farm: Farm, found: Mapping[str, Status], out: Console) -> None:
    out.print(_service_table(farm.services, found))
    out.print()
    names = ", ".join(farm.plan.inventory.pools)
    chat = farm.pools("chat")[0]
    for title, words in (
        ("address", f"{farm.base_url}, models: {names}"),
        ("key", f"{KEY} in {_short(farm.folder / ENV_FILE)}"),
        ("python", "from openai import OpenAI  # it finds address and key in the two exports below"),
        ("", "chat = OpenAI().chat.completions.create"),
        ("", f'answer = chat(model="{chat}", messages=[{{"role": "user", "content": "Hi"}}])'),
        ("", "print(answer.choices[0].message.content)"),
        ("real model", "make demo MODEL=path/to/model.gguf, or MODEL=hf:owner/repo/file.gguf"),
        ("stop", "make demo-down"),
    ):
        out.print(Text.assemble((f"{title:<12}", "bold"), words))
    out.print(f"\nexport OPENAI_BASE_URL={farm.base_url}\nexport OPENAI_API_KEY={farm.key}", markup=False, style=None)


def _service_table(services: Sequence[Service], found: Mapping[str, Status]) -> Table:
    """Services with what they do, state, ports and memory with all their children."""
    columns = "service", Column("what it does", style="dim"), "state", Column("port", justify="right")
    table = Table(*columns, Column("memory", justify="right"), box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for service in services:
        status = found[service.name]
        memory = memory_bytes(status.program.pid) if status.program and status.program.pid else 0
        table.add_row(
            service.name,
            service.role or service.component,
            Text(status.state, "green" if status.is_well else "yellow"),
            ", ".join(str(port.number) for port in service.ports),
            f"{memory / MIB:.0f} MiB" if memory else "",
        )
    return table


def _running_since(found: Mapping[str, Status]) -> str:
    """How long the oldest program has run, in words."""
    starts = [status.program.started for status in found.values() if status.program and status.program.pid]
    seconds = time.time() - min(starts) if starts else 0
    if seconds < MINUTE_S:
        return f"{seconds:.0f} s"
    return f"{seconds / MINUTE_S:.0f} min" if seconds < HOUR_S else f"{seconds / HOUR_S:.1f} h"


def _short(path: Path) -> Path:
    """The path below the checkout, where it is."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


# --- leaving nothing


@contextmanager
def _all_or_nothing(interrupts: Interrupts, talk: Console) -> Iterator[None]:
    """Whatever ends the block before its end, nothing runs and nothing lies there afterwards."""
    try:
        yield
    except BaseException as error:
        interrupts.ignore()
        talk.print("stopping everything and removing what was written")
        _remove()
        talk.print("nothing is left of the demo")
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
