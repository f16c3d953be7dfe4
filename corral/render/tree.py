"""The plan as files, in memory: path to bytes. Pure; templates lay out, everything was decided before."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from corral.build import Plan
from corral.components.additions import summed
from corral.contributions import File, Service
from corral.declarations import shipped
from corral.errors import CorralError
from corral.render.compose import compose_host
from corral.render.swarm import stack
from corral.render.templates import RenderedHost, Tree, dump_yaml
from corral.units import grouped

# How a comment starts in the files that components ship as they are; those of other kinds get no header.
COMMENT_OF = {".sh": "#", ".py": "#", ".yml": "#", ".yaml": "#", ".cfg": "#", ".conf": "#", ".lua": "--"}
# Variable of a local program with the digest of its configuration.
LOCAL_DIGEST = "CORRAL_CONFIG"
_SITE = re.compile(r'from the inventory "([^"]*)"')
# What supervisord's list of environment variables has no spelling for.
_AWKWARD = re.compile(r"[\"';#]")


def render(plan: Plan) -> Tree:
    """Every file of every host, by its path below the output folder."""
    found = plan.contributions
    services = grouped((item.host, item) for item in found.services)
    tree: Tree = {}
    hosts: dict[str, RenderedHost] = {}
    for host, own_services in services.items():
        named = sorted(plan.secrets_of(host), key=lambda secret: secret.name)
        own = hosts[host] = RenderedHost(plan, host, own_services, plan.files_of(host), named)
        tree |= {f"{host}/{path}": data for path, data in _host_files(own).items()}
    if plan.site.is_swarm:
        tree |= stack(hosts[plan.inventory.gateway.host], tree)
    return dict(sorted(tree.items()))


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


def _host_files(host: RenderedHost) -> Tree:
    content = {f"{file.component}/{file.path}": _file(host, file) for file in host.files}
    runtime = _local_host if host.plan.site.is_local(host.name) else compose_host
    own = {} if host.plan.site.is_swarm else runtime(host, content)
    kept = [secret for secret in host.secrets if secret.is_stored]
    return {
        **content,
        **own,
        ".env.example": host.render("_runtime/env.example.j2", secrets=kept),
        ".gitignore": host.render("_runtime/gitignore.j2"),
    }


def _file(host: RenderedHost, file: File) -> bytes:
    if file.asset:
        return _asset(host, file.asset)
    if file.template:
        return host.render(file.template, COMMENT_OF.get(Path(file.path).suffix, "#"), **file.values)
    head = host.header(f"corral/components/{file.component}/__init__.py") + (f"\n# {file.note}" if file.note else "")
    return f"{head}\n\n{dump_yaml(summed(file).data)}".encode()


def _asset(host: RenderedHost, path: str) -> bytes:
    """A shipped file with the header below its `#!` line, if it is of a kind that has comments."""
    data = shipped(path).read_bytes()
    mark = COMMENT_OF.get(Path(path).suffix)
    if mark is None:
        return data
    first, newline, rest = data.partition(b"\n") if data.startswith(b"#!") else (b"", b"", data)
    return b"".join([first, newline, host.header(path, mark).encode(), b"\n\n", rest])


# --- local processes -------------------------------------------------------------------------------------------------


def _local_host(host: RenderedHost, content: Mapping[str, bytes]) -> Tree:
    programs = [(service, *_program(service, content)) for service in host.services]
    project = host.plan.inventory.name
    return {"supervisord.conf": host.render("_runtime/supervisord.conf.j2", ";", project=project, programs=programs)}


def _program(service: Service, content: Mapping[str, bytes]) -> tuple[list[str], dict[str, str]]:
    """The command line of a local service, and those of its variables that supervisord can set.

    One of these is the digest of all that it is started with: a program that runs with another one is out of date.
    """
    plain = {name: value for name, value in service.environment.items() if not _AWKWARD.search(value)}
    awkward = [f"{name}={value}" for name, value in sorted(service.environment.items()) if name not in plain]
    start = service.entrypoint or (service.program,)
    command = [*(["env", *awkward] if awkward else []), *start, *service.args]
    digest = hashlib.sha256(repr((command, sorted(plain.items()), service.stop_signal)).encode())
    for mount in () if service.reloads else service.configs:
        digest.update(content[f"{service.component}/{mount.file}"])
    return command, {**plain, LOCAL_DIGEST: digest.hexdigest()[:16]}
