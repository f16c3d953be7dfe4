"""The plan as files, in memory: path to bytes. Pure; templates lay out, everything was decided before."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PrefixLoader, StrictUndefined

from corral.build import Plan
from corral.components import edge
from corral.components.additions import summed
from corral.contributions import File, Secret, Service, is_systems
from corral.declarations import packages, shipped
from corral.errors import CorralError
from corral.plan.devices import DATA, gpu_access
from corral.plan.networks import WAY_OUT, aliases, joined_key, networks, outer_network
from corral.plan.site import HERE, bracketed
from corral.units import grouped

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ROOT / "templates"
Tree = dict[str, bytes]
POWER_UNIT = "corral-gpu-power.service"
# Name of NVIDIA's cards among a container's devices, where the engine hands them out itself.
CDI = "nvidia.com/gpu"
# Number of the first card's file in /dev/dri.
FIRST_RENDER_NODE = 128
# How a comment starts in the files that components ship as they are; those of other kinds get no header.
COMMENT_OF = {".sh": "#", ".py": "#", ".yml": "#", ".yaml": "#", ".cfg": "#", ".conf": "#", ".lua": "--"}
# Characters that JSON leaves as they are and YAML does not allow, or takes for line ends.
_UNPRINTABLE = re.compile(r"[\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")
_as_json = json.JSONEncoder(ensure_ascii=False).encode
_SITE = re.compile(r'from the inventory "([^"]*)"')
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_COMMENT_START = re.compile(r"(?<=\s)[;#]")
# What supervisord's list of environment variables has no spelling for.
_AWKWARD = re.compile(r"[\"';#]")


def render(plan: Plan) -> Tree:
    """Every file of every host, by its path below the output folder."""
    found = plan.contributions
    services = grouped((item.host, item) for item in found.services)
    tree: Tree = {}
    for host, own_services in services.items():
        named = sorted(plan.secrets_of(host), key=lambda secret: secret.name)
        own = _Host(plan, host, own_services, plan.files_of(host), named)
        tree |= {f"{host}/{path}": data for path, data in _host_files(own).items()}
    return dict(sorted(tree.items()))


@dataclass(frozen=True, slots=True)
class _Host:
    """What is rendered for one host."""

    plan: Plan
    name: str
    services: list[Service]
    files: list[File]
    secrets: list[Secret]

    def header(self, source: str, mark: str = "#") -> str:
        """The first lines of every rendered file: where it comes from and what to edit instead."""
        site = self.plan.inventory.name
        return (
            f'{mark} Rendered by corral from the inventory "{site}", host {self.name}; do not edit.\n'
            f"{mark} Change the inventory or {source}, then run: ./generate.py render"
        )

    def render(self, template: str, mark: str = "#", source: str = "", **values: object) -> bytes:
        """A template's text; `source` names the file to edit when it is not the template itself."""
        named = source or template
        places = (f"{folder}/{named}" for folder in ("templates", "corral/components"))
        header = self.header(next((path for path in places if (ROOT / path).exists()), named), mark)
        return environment().get_template(template).render(header=header, **values).encode()


def site_of(text: str) -> str:
    """The site for which a file was rendered, by its header; empty when it was not."""
    found = _SITE.search(text)
    return found[1] if found else ""


def refuse_other_site(plan: Plan, out: Path) -> None:
    """Raises CorralError when `out` holds another site: rendering this one there would remove it."""
    for folder in sorted(path.parent for path in out.glob("*/.env.example")):
        first_line = (folder / ".env.example").read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        found = site_of(first_line)
        if found and found != plan.inventory.name:
            words = f'{folder} belongs to the site "{found}", not "{plan.inventory.name}"'
            raise CorralError(f"{words}; name another folder with --out, or remove that one")


def _host_files(host: _Host) -> Tree:
    content = {f"{file.component}/{file.path}": _file(host, file) for file in host.files}
    runtime = _local_host if host.plan.site.is_local(host.name) else _compose_host
    kept = [secret for secret in host.secrets if secret.is_stored]
    return {
        **content,
        **runtime(host, content),
        ".env.example": host.render("_runtime/env.example.j2", secrets=kept),
        ".gitignore": host.render("_runtime/gitignore.j2"),
    }


def _file(host: _Host, file: File) -> bytes:
    if file.asset:
        return _asset(host, file.asset)
    if file.template:
        return host.render(file.template, COMMENT_OF.get(Path(file.path).suffix, "#"), **file.values)
    head = host.header(f"corral/components/{file.component}/__init__.py") + (f"\n# {file.note}" if file.note else "")
    return f"{head}\n\n{dump_yaml(summed(file).data)}".encode()


def _asset(host: _Host, path: str) -> bytes:
    """A shipped file with the header below its `#!` line, if it is of a kind that has comments."""
    data = shipped(path).read_bytes()
    mark = COMMENT_OF.get(Path(path).suffix)
    if mark is None:
        return data
    first, newline, rest = data.partition(b"\n") if data.startswith(b"#!") else (b"", b"", data)
    return b"".join([first, newline, host.header(path, mark).encode(), b"\n\n", rest])


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Block style without anchors."""

    def ignore_aliases(self, _data: object) -> bool:
        return True


def dump_yaml(data: Mapping[str, Any]) -> str:
    """Data as YAML in the order in which it was made."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


# --- Compose ---------------------------------------------------------------------------------------------------------


def _compose_host(host: _Host, content: Mapping[str, bytes]) -> Tree:
    by_component = grouped((service.component, service) for service in host.services)
    tree = {f"{name}/compose.yaml": _component(host, members, content) for name, members in by_component.items()}
    facts = host.plan.site.host(host.name)
    tree["compose.yaml"] = host.render(
        "_runtime/compose.yaml.j2",
        project=project_name(host.plan, host.name),
        components=sorted(by_component),
        networks=sorted({name for service in host.services for name in networks(service, host.services)}),
        outer={outer_network(service) for service in host.services},
        way_out=WAY_OUT,
        ipv6={outer_network(service) for service in host.services if service.has_ipv6},
        joined={joined_key(name): name for service in host.services for name in service.joins},
        secrets=[] if facts.selinux else sorted({name for service in host.services for name in service.secrets}),
    )
    on_cards = [service for service in host.services if service.gpus]
    if on_cards:
        told = [(service, _details(host, service, content)) for service in on_cards]
        tree["compose.cpu.yaml"] = host.render("_runtime/compose.cpu.yaml.j2", services=told, mode=_mode(host))
    return tree | _units(host)


def project_name(plan: Plan, host: str) -> str:
    """Name of a host's Compose project."""
    return f"{plan.inventory.name}-{host}".replace(".", "-")


def unit_names(plan: Plan, host: str) -> list[str]:
    """The systemd units that are rendered for a host, in the order in which they start."""
    has_power = any(card.has_nvidia_smi or card.power_limit_w for card in plan.site.cards[host])
    power = (
        POWER_UNIT.replace("corral-", f"corral-{plan.inventory.name}-")
        if plan.inventory.container_prefix
        else POWER_UNIT
    )
    return [*([power] if has_power else []), f"corral-{plan.inventory.name}.service"]


def figure_units(plan: Plan, host: str) -> list[str]:
    """The service and the timer that write figures every minute; only where the kit itself is: not behind ssh."""
    monitoring = plan.inventory.monitoring
    is_here = not plan.site.is_local(host) and plan.site.host(host).ssh is None
    if monitoring is None or not monitoring.node_exporter or not is_here:
        return []
    return [f"corral-{plan.inventory.name}-figures.{kind}" for kind in ("service", "timer")]


def metrics_hosts(plan: Plan, host: str) -> list[str]:
    """The hosts whose metrics the timer of a host writes: its own, and on the first host those behind ssh."""
    busy = {service.host for service in plan.contributions.services}
    compose = [name for name in plan.inventory.hosts if name in busy and not plan.site.is_local(name)]
    near = [name for name in compose if plan.site.host(name).ssh is None]
    far = [name for name in compose if plan.site.host(name).ssh is not None]
    return [host, *(far if near[:1] == [host] else [])]


def _units(host: _Host) -> Tree:
    """Units that start the project, set up the cards and write figures; they hold no secret and no path."""
    cards = host.plan.site.cards[host.name]
    units, told, site = unit_names(host.plan, host.name), metrics_hosts(host.plan, host.name), host.plan.inventory.name
    templates = dict.fromkeys(units[:-1], f"_runtime/{POWER_UNIT}.j2") | {units[-1]: "_runtime/corral.service.j2"}
    for name in figure_units(host.plan, host.name):
        templates[name] = f"_runtime/corral-figures.{name.rpartition('.')[2]}.j2"
    values: dict[str, Any] = {
        "site": site,
        "host": host.name,
        "units": units,
        "told": told,
        "cards": cards,
        "power_files": DATA["power_files"],
    }
    return {f"systemd/{name}": host.render(template, **values) for name, template in templates.items()}


def _component(host: _Host, services: list[Service], content: Mapping[str, bytes]) -> bytes:
    """The Compose file of one component."""
    return host.render(
        "_component.yaml.j2",
        source="_service.yaml.j2",
        services=[(service, _details(host, service, content)) for service in services],
        volumes=list(dict.fromkeys(name for service in services for name, _ in service.volumes)),
    )


def _details(host: _Host, service: Service, content: Mapping[str, bytes]) -> dict[str, Any]:
    """What the template of a service is told besides the service."""
    cards = [claim.device for claim in service.gpus if claim.vendor == "nvidia"]
    way = gpu_access(host.plan.site, host.name)
    seen = "all" if any(card.is_jetson for card in host.plan.site.cards[host.name]) else ",".join(cards)
    handed = {"NVIDIA_VISIBLE_DEVICES": seen} if cards and way == "runtime" else {}
    is_labelled = host.plan.site.host(host.name).selinux
    return {
        "environment": {**service.environment, **handed},
        "command_lines": list(_command_lines(service.args)),
        "networks": _attachments(service, host.services),
        "extra_hosts": [f"{name}={bracketed(address)}" for name, address in service.extra_hosts.items()],
        "ports": [f"{bracketed(port.publish)}:{port.number}:{port.number}" for port in service.ports if port.publish],
        "volumes": [
            *(f"{_host_folder(folder)}:{path}:{_mode(host, folder)}" for folder, path in service.mounts),
            *(f"./{mount.file}:{mount.target}:{_mode(host)}" for mount in service.configs if mount.target),
            *(f"../secrets/{name}:/run/secrets/{name}:{_mode(host)}" for name in service.secrets if is_labelled),
            *(f"{name}:{path}" for name, path in service.volumes),
        ],
        "labels": _labels(host.plan, service, content),
        "has_certificates": not edge.CERTIFICATES.isdisjoint(service.secrets),
        "devices": [*_devices(service.devices), *(f"{CDI}={card}" for card in cards if way == "cdi")],
        "groups": [str(group) for group in service.groups],
        "gpu_devices": cards if way == "reservation" else [],
        "has_runtime": bool(handed),
        # Compose cannot label the file of a secret; as a mount it can.
        "secrets": () if is_labelled else service.secrets,
    }


def _devices(paths: Iterable[str]) -> Iterator[str | dict[str, str]]:
    """Device files as Compose has them: under the same path, or that of one card (with colons) where drivers look."""
    for number, path in enumerate(paths, start=FIRST_RENDER_NODE):
        node = {"source": path, "target": f"/dev/dri/renderD{number}", "permissions": "rwm"}
        yield node if ":" in path else f"{path}:{path}"


def _attachments(service: Service, on_host: list[Service]) -> str:
    """A service's networks as Compose has them, in one line."""
    names = (*networks(service, on_host), *(joined_key(name) for name in service.joins))
    known = aliases(service)
    if not known:
        return to_yaml(names)
    parts = (f"{name}: {{aliases: {to_yaml([known[name]])}}}" if name in known else f"{name}: {{}}" for name in names)
    return f"{{{', '.join(parts)}}}"


def _command_lines(args: Iterable[str]) -> Iterator[str]:
    """The arguments as YAML list items, an option and its value on one line."""
    groups: list[list[str]] = []
    for word in args:
        last = groups[-1] if groups else ["--="]
        if len(last) == 1 and last[0].startswith("--") and "=" not in last[0] and not word.startswith("--"):
            last.append(word)
        else:
            groups.append([word])
    yield "["
    for group in groups:
        yield "  " + ", ".join(map(to_yaml, group)) + ","
    yield "]"


def _host_folder(folder: str) -> str:
    """A folder as a component's compose.yaml names it, one level below the host's folder."""
    return folder if folder.startswith("/") else f"../{folder.removeprefix('./')}"


def _mode(host: _Host, folder: str = "") -> str:
    """How a file or folder of the host is mounted: read-only, and where SELinux is on with a label for containers."""
    return "ro,z" if host.plan.site.host(host.name).selinux and not is_systems(folder) else "ro"


def _labels(plan: Plan, service: Service, content: Mapping[str, bytes]) -> list[str]:
    """Labels by which the kit finds its containers; the hash makes `up -d` notice a changed configuration."""
    labels = {"corral.site": plan.inventory.name, "corral.role": service.role or service.component}
    if service.configs:
        digest = hashlib.sha256()
        for mount in service.configs:
            digest.update(content[f"{service.component}/{mount.file}"])
        labels["corral.config"] = digest.hexdigest()[:16]
    return [f"{name}={value}" for name, value in (labels | dict(service.labels)).items()]


# --- local processes -------------------------------------------------------------------------------------------------


def _local_host(host: _Host, _content: Mapping[str, bytes]) -> Tree:
    programs = [(service, *_program(service)) for service in host.services]
    project = host.plan.inventory.name
    return {"supervisord.conf": host.render("_runtime/supervisord.conf.j2", ";", project=project, programs=programs)}


def _program(service: Service) -> tuple[list[str], dict[str, str]]:
    """The command line of a local service, and those of its variables that supervisord can set."""
    plain = {name: value for name, value in service.environment.items() if not _AWKWARD.search(value)}
    awkward = [f"{name}={value}" for name, value in sorted(service.environment.items()) if name not in plain]
    start = service.entrypoint or (service.program,)
    return [*(["env", *awkward] if awkward else []), *start, *service.args], plain


def _supervisor_text(text: str) -> str:
    """Text for an INI file in which supervisord expands `%(…)s`; only our own mark of the folder is meant."""
    if _CONTROL.search(text.replace(HERE, "")):
        words = "has a line break or another control character, which supervisord cannot be told"
        raise CorralError(f"{text!r} {words}; remove it from extra_args or environment")
    return text.replace("%", "%%").replace(HERE, "%(here)s")


def supervisor_command(words: Iterable[str]) -> str:
    """A command line as supervisord splits it, and nothing in it that its INI reader takes for a comment."""
    return " ".join(_COMMENT_START.sub(r"'\\\g<0>'", _supervisor_text(shlex.quote(word))) for word in words)


def supervisor_environment(values: Mapping[str, str]) -> str:
    """Environment variables as supervisord reads them."""
    return ",".join(f'{name}="{_supervisor_text(value)}"' for name, value in sorted(values.items()))


# --- templates -------------------------------------------------------------------------------------------------------


@cache
def environment() -> Environment:
    """The template environment: strict, and with quoting done in one place."""
    own = {name: FileSystemLoader(package.folder) for name, package in packages().items()}
    made = Environment(  # noqa: S701 - configuration files, not HTML
        loader=ChoiceLoader([FileSystemLoader(TEMPLATES), PrefixLoader(own)]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        auto_reload=False,
    )
    made.filters |= {
        "digest": short_digest,
        "yaml": to_yaml,
        "supervisor": supervisor_command,
        "supervisor_environment": supervisor_environment,
    }
    return made


def short_digest(text: str) -> str:
    """The first 16 hexadecimal digits of a text's SHA-256: by it a program says which configuration it has read."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_yaml(value: object) -> str:
    """Scalars, and lists and mappings of them, as YAML that Compose takes literally: quoted as needed, `$` doubled."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_yaml, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {to_yaml(item)}" for key, item in value.items()) + "}"
    return _quoted(str(value))


@lru_cache(maxsize=10_000)
def _quoted(text: str) -> str:
    quoted = _as_json(text).replace("$", "$$")
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)
