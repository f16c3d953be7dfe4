"""From what machines have to the text of an inventory, with the reasons in it. Nothing else is written anywhere."""

from __future__ import annotations

import io
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from corral.build import Plan, load_site
from corral.config.load import load_inventory, validate
from corral.config.model_lock import ModelLock
from corral.config.source import parse
from corral.contributions import Contributions
from corral.errors import CorralError
from corral.plan.settings import gguf_of
from corral.render.templates import environment, to_yaml
from corral.runtime.hosts import ComposeHost
from corral.verbs.init.choose import BESIDE, PROPOSED, Candidate, Chooser, Serving, name_of
from corral.verbs.init.look import FoundFile, Machine, look
from corral.verbs.init.servers import FoundServer
from corral.verbs.models.models import Store, inspect

TEMPLATE, DEFAULT = "init/inventory.yaml.j2", "init/default.yaml"
# Where a container finds the machine that Docker's virtual machine runs on.
FROM_DOCKER = "host.docker.internal"
OF_A_MAC = "no container can use a Mac's graphics: serve it with Ollama, LM Studio or llama-server, and run init again"
# Of what `models inspect` says.
NOT_TOLD = re.compile(r"^the others were|are described in")
ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,126}")


@dataclass(frozen=True, slots=True)
class NodePool:
    """A pool on servers that run already: its places, and the name of the model there."""

    name: str
    kind: str
    places: tuple[str, ...]
    alias: str


@dataclass(slots=True)
class Proposal:
    """The text of an inventory, and what a person is told of it."""

    text: str
    machines: Sequence[Machine]
    servings: Sequence[Serving] = ()
    pools: Sequence[NodePool] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def default_text() -> str:
    """The site that the kit comes with."""
    return environment().get_template(DEFAULT).render()


def propose(destinations: Sequence[str], folders: Sequence[str]) -> Proposal:
    """Looks at this machine and at those behind ssh, and proposes an inventory; raises CorralError as `look` does."""
    machines = _looked_at(destinations, folders)
    return proposal_for(machines, *_inspected(machines))


def this_machine() -> Machine:
    """What this machine has; raises CorralError as `look` does."""
    return _looked_at((), ())[0]


def proposal_for(
    machines: Sequence[Machine], lock: ModelLock, candidates: Sequence[Candidate], notes: list[str]
) -> Proposal:
    """The largest sensible site of these machines and models; without monitoring where there is no memory for it."""
    site = _Site(machines, lock, candidates, notes)
    for site.has_monitoring in (True, False):
        if found := site.proposal():
            return found
    return Proposal(_default_with(machines, notes, site.refused), machines, refused=site.refused, notes=notes)


# --- looking ---------------------------------------------------------------------------------------------------------


def _passing(hosts: Mapping[str, Any], models: Mapping[str, Any], pools: Mapping[str, Any]) -> str:
    """An inventory that only serves to reach hosts and their files."""
    data = {"schema_version": 1, "name": "farm", "hosts": hosts, "models": models, "pools": pools}
    return json.dumps(data | {"gateway": {"host": next(iter(hosts))}})


def _looked_at(destinations: Sequence[str], folders: Sequence[str]) -> list[Machine]:
    """This machine, and the others, with names of their own."""
    hosts: dict[str, Any] = {"here": {}} | {f"far-{number}": {"ssh": name} for number, name in enumerate(destinations)}
    anything = {"model": "m", "on": {"host": "here"}}
    text = _passing(hosts, {"m": {"source": "m.gguf", "kind": "chat"}}, {"m": anything})
    site = load_site(validate(parse(text, "--host")))
    far = [ComposeHost(Plan(site, Contributions()), name, Path("compose")) for name in hosts]
    with ThreadPoolExecutor(len(far)) as pool:
        found = list(pool.map(partial(look, folders=folders), far))
    names: dict[str, Machine] = {}
    for machine in found:
        alike = sum(name.rstrip("-0123456789") == machine.name.rstrip("-0123456789") for name in names)
        name = f"{machine.name}-{alike + 1}" if machine.name in names else machine.name
        names[name] = replace(machine, name=name)
    return list(names.values())


def _inspected(machines: Sequence[Machine]) -> tuple[ModelLock, list[Candidate], list[str]]:
    """What every model file says of itself, read as `models inspect` reads it, with its notes in a passing folder."""
    hosts = {it.name: {"ssh": it.ssh or None, "model_stores": dict(it.stores)} for it in machines}
    files = {f"m{n}": (it, file) for n, (it, file) in enumerate((it, file) for it in machines for file in it.files)}
    models = {
        key: {
            "source": file.source,
            "revision": file.revision or None,
            "kind": "chat",
            "projector": file.projector or None,
        }
        for key, (_, file) in files.items()
    }
    if not models:
        return ModelLock(), [], []
    pools = {key: {"model": key, "on": {"host": it.name}} for key, (it, _) in files.items()}
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inventory.yaml"
        path.write_text(_passing(hosts, models, pools), encoding="utf-8")
        site = load_site(load_inventory(path))
        store = Store(site, path, path.parent, Console(file=said, width=1000))
        try:
            inspect(store)
        except CorralError as error:
            said.write(str(error))
        lock = ModelLock.read(store.lock_path)
    candidates = []
    for key, (machine, file) in files.items():
        model = site.inventory.models[key]
        known = [lock.get(model.key(source)) for source in model.sources]
        if gguf := gguf_of(model, lock):
            size = sum(it.size for it in known if it)
            candidates.append(Candidate(name_of(file.name), machine.name, file, size, gguf))
    lines = [line for line in said.getvalue().splitlines() if line and not NOT_TOLD.search(line)]
    return lock, candidates, lines


# --- choosing --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Site:
    """What is to become an inventory."""

    machines: Sequence[Machine]
    lock: ModelLock
    candidates: Sequence[Candidate]
    notes: list[str]
    refused: dict[str, str] = field(default_factory=dict)
    has_monitoring: bool = True

    @property
    def hosts(self) -> list[Machine]:
        """Machines on which the kit starts something; the first has the gateway. This one is left out if it is bare."""
        own = [it for it in self.machines if not it.nodes and not it.is_mac and (it.cards or it.files)]
        here = self.machines[0]
        return own if own and here not in own and not here.nodes else [here, *(it for it in own if it is not here)]

    def proposal(self) -> Proposal | None:
        """An inventory that holds; None when nothing of what is there can be served."""
        pools = self._node_pools()
        chooser = Chooser(partial(self._text, pools, {}), self.lock, self.machines)
        self.refused = chooser.refused
        chooser.choose(self._own(chooser, {pool.name for pool in pools}))
        for host in self.hosts:
            if host.cards and not host.nodes and not any(it.candidate.host == host.name for it in chooser.chosen):
                self._propose_downloads(chooser, host)
        if not chooser.chosen and not pools:
            return None
        chooser.grow()
        chooser.settle()
        text = self._text(pools, chooser.refused, chooser.chosen)
        final = replace(chooser, render=lambda _: text)
        if not (final.plan(()) and final.plan((), ModelLock())):
            raise CorralError(f"the proposal breaks a rule, which is a fault of the kit: {final.reason}")
        return Proposal(text, self.machines, chooser.chosen, pools, chooser.refused, self.notes)

    def _own(self, chooser: Chooser, taken: set[str]) -> list[Candidate]:
        """The candidates that servers of the kit may serve."""
        by_name = {it.name: it for it in self.machines}
        wanted = [item for item in self.candidates if item.name not in taken]
        for item in wanted:
            machine = by_name[item.host]
            if machine.nodes:
                engines = " and ".join(server.engine for server in machine.nodes)
                chooser.refused[chooser.label(item)] = f"{engines} runs on {item.host}, and keeps its memory and cards"
            elif machine.is_mac:
                chooser.refused[chooser.label(item)] = OF_A_MAC
        return [item for item in wanted if chooser.label(item) not in chooser.refused]

    @staticmethod
    def _propose_downloads(chooser: Chooser, host: Machine) -> None:
        """The largest of some well-known models that fits onto the cards of a host without any files."""
        refused, before = dict(chooser.refused), len(chooser.chosen)
        for name, (source, size) in PROPOSED.items():
            if len(chooser.chosen) == before:
                chooser.choose([Candidate(name, host.name, FoundFile(source, "", name), round(size * (1 << 30)))])
        chooser.refused = refused

    def _node_pools(self) -> list[NodePool]:
        """A pool for each model of the servers that run; the same model on several of them is one pool."""
        found: dict[str, NodePool] = {}
        running = ((it, server) for it in self.machines for server in it.nodes)
        for machine, server, model, kind in ((it, at, *pair) for it, at in running for pair in at.models.items()):
            names = (name_of(model), name_of(model, keeps_all=True), f"{name_of(model, keeps_all=True)}-{kind}")
            alike = (model, kind)
            name = next(it for it in (*names, model) if it not in found or (found[it].alias, found[it].kind) == alike)
            own = f", model: {to_yaml(model)}" if len(server.models) > 1 else ""
            old = found.get(name, NodePool(name, kind, (), model))
            found[name] = replace(old, places=(*old.places, f"{{node: {node_name(machine, server)}{own}}}"))
        return list(found.values())

    # --- writing -----------------------------------------------------------------------------------------------------

    def _text(self, pools: Sequence[NodePool], refused: Mapping[str, str], servings: Sequence[Serving]) -> str:
        used = {(it.candidate.host, it.candidate.file.store) for it in servings}
        names = [it.name for it in pools if it.kind == "chat"]
        names += [it.candidate.name for it in servings if it.candidate.kind == "chat"]
        busy = {it.candidate.host for it in servings}
        hosts = [it for it in self.hosts if it is self.hosts[0] or it.name in busy]
        values = {
            "machines": self.machines, "hosts": hosts, "notes": self.notes, "beside": BESIDE, "quoted": _quoted,
            "settings": {it.name: self._settings(it) for it in self.hosts},
            "stores": {it.name: [own for own in it.stores.items() if (it.name, own[0]) in used] for it in self.hosts},
            "cards": {card.kind: card.facts for it in self.hosts for card in it.cards if card.facts},
            "nodes": [(at, node_name(it, at), _url(it, at)) for it in self.machines for at in it.nodes],
            "aliases": [it.alias for it in pools if ALIAS.fullmatch(it.alias) and it.alias != it.name],
            "pools": pools, "servings": servings, "refused": refused, "default": next(iter(names), ""),
            "has_monitoring": self.has_monitoring,
        }  # fmt: skip
        return environment().get_template(TEMPLATE).render(values)

    def _settings(self, machine: Machine) -> dict[str, str]:
        """Keys of a host, as text."""
        is_alone = len(self.hosts) == 1 and not machine.ssh
        is_local = machine.is_mac and not machine.docker
        kinds = {card.vendor for card in machine.cards}
        flags = {"cores": machine.cores} | ({} if machine.has_avx else {"avx": False})
        return {
            "runtime": "local" if is_local else "",
            "address": "127.0.0.1" if is_alone or not machine.address else machine.address,
            "ssh": machine.ssh and to_yaml(machine.ssh),
            "ram_gib": str(machine.ram_gib or ""),
            "cpu": to_yaml(flags) if machine.cores else "",
            "gpu_access": "cdi" if "nvidia" in kinds and machine.docker.get("gpus") == "cdi" else "",
            "device_groups": to_yaml(machine.groups or (44, 105)) if kinds - {"nvidia"} else "",
            "selinux": "true" if machine.docker.get("selinux") else "",
        }


def node_name(machine: Machine, server: FoundServer) -> str:
    """A node's name: of the machine and what runs there."""
    others = [it for it in machine.nodes if it.engine == server.engine]
    return f"{machine.name}-{server.engine.replace('.', '')}" + (f"-{server.port}" if len(others) > 1 else "")


def _url(machine: Machine, server: FoundServer) -> str:
    """Where the gateway reaches a server."""
    if machine.ssh or not machine.is_mac:
        return f"http://{machine.address}:{server.port}"
    return f"http://{FROM_DOCKER if machine.docker else '127.0.0.1'}:{server.port}"


def _quoted(value: object) -> str:
    """A value as YAML; `$` means nothing in an inventory."""
    return to_yaml(value).replace("$$", "$")


def _default_with(machines: Sequence[Machine], notes: Iterable[str], refused: Mapping[str, str]) -> str:
    """The default site, with what was seen in front."""
    seen = [line for it in machines for line in (f"{it.name}: {it.words}", *(f"  {line}" for line in it.remarks))]
    seen += [*notes, *(f"not served: {name}: {reason}" for name, reason in refused.items())]
    head, _, rest = default_text().partition("\n#\n")
    lines = [
        "`./generate.py init` saw no card and no model that it could serve, so this is the default site.",
        *seen,
        "",
    ]
    return "\n".join([head, "#", *(f"# {line}".rstrip() for line in lines), rest])


def told(proposal: Proposal) -> list[str]:
    """What a person is told on the terminal: what was seen, what is served, and why the rest is not."""
    lines = []
    for machine in proposal.machines:
        lines += [f"{machine.name}: {machine.words}", *(f"  {line}" for line in machine.remarks)]
    lines += proposal.notes
    lines += [f"serves: {it.candidate.name} {' '.join(it.on)}: {it.why}" for it in proposal.servings]
    lines += [f"passes on: {pool.name} {' '.join(pool.places)}" for pool in proposal.pools]
    return [*lines, *(f"leaves out: {name}: {reason}" for name, reason in proposal.refused.items())]
