"""A host as a Docker Compose project with its systemd units. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from corral.build import Plan
from corral.components import edge
from corral.contributions import Service, is_systems
from corral.plan.devices import DATA, gpu_access
from corral.plan.networks import WAY_OUT, aliases, joined_key, networks, outer_network
from corral.plan.site import bracketed
from corral.render.templates import RenderedHost, Tree, to_yaml
from corral.units import grouped

POWER_UNIT = "corral-gpu-power.service"
# Name of NVIDIA's cards among a container's devices, where the engine hands them out itself.
CDI = "nvidia.com/gpu"
# Number of the first card's file in /dev/dri.
FIRST_RENDER_NODE = 128


def compose_host(host: RenderedHost, content: Mapping[str, bytes]) -> Tree:
    """The Compose files and systemd units of a host; `content` are its other files."""
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


def _units(host: RenderedHost) -> Tree:
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


def _component(host: RenderedHost, services: list[Service], content: Mapping[str, bytes]) -> bytes:
    """The Compose file of one component."""
    return host.render(
        "_component.yaml.j2",
        source="_service.yaml.j2",
        services=[(service, _details(host, service, content)) for service in services],
        volumes=list(dict.fromkeys(name for service in services for name, _ in service.volumes)),
    )


def _details(host: RenderedHost, service: Service, content: Mapping[str, bytes]) -> dict[str, Any]:
    """What the template of a service is told besides the service."""
    cards = [claim.device for claim in service.gpus if claim.vendor == "nvidia"]
    way = gpu_access(host.plan.site, host.name)
    seen = "all" if any(card.is_jetson for card in host.plan.site.cards[host.name]) else ",".join(cards)
    handed = {"NVIDIA_VISIBLE_DEVICES": seen} if cards and way == "runtime" else {}
    is_labelled = host.plan.site.host(host.name).selinux
    return {
        "environment": {**service.environment, **handed},
        "command_lines": list(command_lines(service.args)),
        "networks": _attachments(service, host.services),
        "extra_hosts": [f"{name}={bracketed(address)}" for name, address in service.extra_hosts.items()],
        "ports": [f"{bracketed(port.publish)}:{port.number}:{port.number}" for port in service.ports if port.publish],
        "volumes": [
            *(f"{_host_folder(folder)}:{path}:{_mode(host, folder)}" for folder, path in service.mounts),
            *(f"./{mount.file}:{mount.target}:{_mode(host)}" for mount in service.configs if mount.target),
            *(f"../secrets/{name}:/run/secrets/{name}:{_mode(host)}" for name in service.secrets if is_labelled),
            *(f"{name}:{path}" for name, path in service.volumes),
        ],
        "labels": labels_of(host.plan, service, content),
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


def command_lines(args: Iterable[str]) -> Iterator[str]:
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


def _mode(host: RenderedHost, folder: str = "") -> str:
    """How a file or folder of the host is mounted: read-only, and where SELinux is on with a label for containers."""
    return "ro,z" if host.plan.site.host(host.name).selinux and not is_systems(folder) else "ro"


def labels_of(plan: Plan, service: Service, content: Mapping[str, bytes]) -> list[str]:
    """Labels by which the kit finds its containers; the hash makes `up -d` notice a changed configuration."""
    labels = {"corral.site": plan.inventory.name, "corral.role": service.role or service.component}
    if service.configs:
        digest = hashlib.sha256()
        for mount in service.configs:
            digest.update(content[f"{service.component}/{mount.file}"])
        labels["corral.config"] = digest.hexdigest()[:16]
    return [f"{name}={value}" for name, value in (labels | dict(service.labels)).items()]
