"""The security baseline, as rules over a Compose project the way `docker compose config --format json` prints it. Pure.

`policy.yaml` says what each rule demands and tells; docs/reference/policy.md is made from it, tests/policy has a
project that keeps all rules and one that breaks each. A rule that does not hold for a service is excepted where the
plan says why (`Service.exceptions`); that each exception has a reason and is needed is tested with what is rendered.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import yaml

from corral.build import Plan
from corral.checks.references import SECRET_KEY, SECRET_VALUE
from corral.checks.registry import Findings, Texts
from corral.config.source import plain_yaml
from corral.contributions import SYSTEM_ROOTS, is_system_folder, plain_path
from corral.errors import CorralError, Finding

MASQUERADE = "com.docker.network.bridge.enable_ip_masquerade"
BETWEEN = "com.docker.network.bridge.enable_icc"
SOCKETS = ("docker.sock", "containerd.sock", "podman.sock")
UNCONFINED = (":unconfined", "label:disable", "systempaths:unconfined")
# Log drivers that bound their own size.
ROTATING = ("local", "journald", "syslog", "none")
_MOVING = re.compile(
    r"(?:^|[-_.])(?:latest|stable|main|master|nightly|edge|dev|rolling|preview|current)(?:$|[-_.])", re.IGNORECASE
)
_VERSION = re.compile(r"\d+\.\d+|\d{3,}|[0-9a-f]{7,}")
_ANY_KEY = re.compile(r"(?:^|[_-])(?:key|pass|requirepass|masterauth)$", re.IGNORECASE)
# How the kit's own passwords look; caches of model files name contents and commits like that.
_GENERATED = re.compile(r"(?<!/blobs/)(?<!/blobs/sha256-)(?<!/snapshots/)\b[0-9a-f]{32,}\b")
# Values of secret-like names that hold no secret: nothing, a switch, a path.
_PLAIN_VALUE = re.compile(r"|none|true|false|0|1|/\S*")
TEXTS = Texts.beside(__file__)


@dataclass(frozen=True, slots=True)
class Subject:
    """A service of a project, in Compose's long spelling, and what it is judged by."""

    service: Mapping[str, Any]
    project: Mapping[str, Any]
    # The host's declared address.
    address: str

    def get(self, key: str, default: Any = None) -> Any:
        """A key of the service; the default when it is absent or empty."""
        return self.service.get(key) or default

    def limit(self, name: str) -> Any:
        """A limit in the spelling of Compose's `deploy`."""
        return ((self.get("deploy", {}).get("resources") or {}).get("limits") or {}).get(name)

    def declared(self, section: str) -> Mapping[str, Any]:
        """A section of the project: its networks or secrets."""
        return self.project.get(section) or {}

    @property
    def security_options(self) -> list[str]:
        """The options, in the newer of their two spellings."""
        return [str(option).replace("=", ":") for option in self.get("security_opt", [])]


def check_project(
    project: Mapping[str, Any], address: str, exceptions: Mapping[str, Mapping[str, str]] | None = None
) -> list[Finding]:
    """Every rule that a project breaks without a reason.

    Args:
        project: Compose's model of a host's project, as JSON or as YAML in its short spelling.
        address: the only address, besides loopback, on which the host's ports may be published.
        exceptions: for each service the rules that do not hold for it, with the reasons.
    """
    stated = exceptions or {}
    return [
        replace(finding, where=name)
        for name, service in (project.get("services") or {}).items()
        for check in CHECKS
        for finding in check(Subject(long_form(service), project, address))
        if finding.rule not in stated.get(name, {})
    ]


def check_tree(plan: Plan, tree: Mapping[str, bytes]) -> dict[str, list[Finding]]:
    """What the baseline finds in the rendered Compose projects of a plan, by host; needs no Docker."""
    hosts = sorted({path.partition("/")[0] for path in tree if path.endswith("/compose.yaml")})
    return {
        host: check_project(project_of(tree, host), plan.site.host(host).address, exceptions_of(plan, host))
        for host in hosts
    }


def refuse_weak(plan: Plan, tree: Mapping[str, bytes], *, is_of_plan: bool = True) -> None:
    """Raises CorralError with every error that the baseline finds in a rendering.

    Args:
        plan: the site.
        tree: rendered files by path.
        is_of_plan: False for a rendering from another source, which may hold anything.
    """
    try:
        judged = check_tree(plan, tree)
    except (yaml.YAMLError, AttributeError, LookupError, TypeError, ValueError) as error:
        if is_of_plan:
            raise
        hosts = ", ".join(sorted({path.partition("/")[0] for path in tree}))
        raise CorralError(f"{hosts}: the rendering cannot be judged: {type(error).__name__}: {error}") from None
    errors = [f"{host}: {finding}" for host, found in judged.items() for finding in found if finding.level == "error"]
    if errors:
        raise CorralError("\n".join([*errors, weak_words(len(errors))]))


def weak_words(count: int) -> str:
    """What so many errors of the baseline mean, and where to read on."""
    return f"{count} of these would weaken a host; docs/reference/policy.md explains the rules"


def exceptions_of(plan: Plan, host: str) -> dict[str, Mapping[str, str]]:
    """The exceptions that the plan states, with their reasons, for each service of a host."""
    return {service.name: service.exceptions for service in plan.services_of(host)}


def project_of(tree: Mapping[str, bytes], host: str) -> dict[str, Any]:
    """A host's rendered project in one piece, as Compose puts it together from the included files."""
    project: dict[str, Any] = plain_yaml(tree[f"{host}/compose.yaml"])
    for path in project.pop("include", []):
        part = plain_yaml(tree[f"{host}/{path}"])
        for section in ("services", "volumes"):
            project.setdefault(section, {}).update(part.get(section) or {})
    return project


# --- Compose's short spelling ----------------------------------------------------------------------------------------


def long_form(service: Mapping[str, Any]) -> dict[str, Any]:
    """A service with ports, mounts, networks, secrets and environment as Compose's own output has them."""
    lists: dict[str, Callable[[Any], Any]] = {"ports": _port, "volumes": _mount, "secrets": lambda it: {"source": it}}
    return {
        **service,
        **{key: [_mapping(item, make) for item in service.get(key) or []] for key, make in lists.items()},
        **{key: _mapping(service.get(key), _pairs) for key in ("networks", "environment", "labels")},
    }


def _mapping(value: Any, make: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else make(value)


def _pairs(items: Any) -> dict[str, Any]:
    """The mapping that a list of names or of `name=value` stands for."""
    pairs = (str(item).partition("=") for item in items or [])
    return {name: text if is_given else None for name, is_given, text in pairs}


def _port(port: Any) -> dict[str, Any]:
    rest, _, target = str(port).rpartition(":")
    address, _, published = rest.rpartition(":")
    return {"host_ip": address.strip("[]"), "published": published, "target": target}


def _mount(mount: Any) -> dict[str, Any]:
    source, target, *options = str(mount).split(":")
    words = ",".join(options).split(",")
    kind = "bind" if source.startswith(("/", ".", "~")) else "volume"
    bind = {"propagation": words[-1]}
    return {"type": kind, "source": source, "target": target, "read_only": "ro" in words, "bind": bind}


# --- checks: each yields the rules that a service breaks, and how ----------------------------------------------------


def _broken(rows: Mapping[str, object], **values: object) -> Findings:
    """The texts whose rules are broken."""
    yield from TEXTS.broken((), *((is_broken, text, "") for text, is_broken in rows.items()), **values)


def _image(subject: Subject) -> Findings:
    image = str(subject.get("image", ""))
    name, _, tag = image.rpartition("/")[2].partition(":")
    is_moving = tag and (_MOVING.search(tag) or not _VERSION.search(tag))
    if "@sha256:" not in image:
        rows = {"image-pinned/none": not tag, "image-pinned/moving": is_moving}
        yield from _broken(rows, name=name or "(none)", tag=tag)


def _privileges(subject: Subject) -> Findings:
    user, options = str(subject.get("user", "")), subject.security_options
    rows = {
        "non-root/root": user and user.partition(":")[0] in ("", "0", "root"),
        "non-root/unsaid": not user,
        "read-only/writes": not subject.get("read_only"),
        "capabilities/kept": [str(name).upper() for name in subject.get("cap_drop", [])] != ["ALL"],
        "capabilities/added": subject.get("cap_add"),
        "no-new-privileges/may": not {"no-new-privileges:true", "no-new-privileges"} & set(options),
        "privileged/is": subject.get("privileged"),
    }
    yield from _broken(rows, added=", ".join(subject.get("cap_add", [])))
    for given, option in zip(subject.get("security_opt", []), options, strict=True):
        yield from _broken({"confined/other": option.endswith(UNCONFINED)}, given=given)


def _namespaces(subject: Subject) -> Findings:
    shared = {
        "host-network/shared": subject.get("network_mode") == "host" and "host",
        "host-pid/shared": subject.get("pid"),
        "host-ipc/shared": subject.get("ipc") not in (None, "private", "none") and subject.get("ipc"),
    }
    for text, mode in shared.items():
        yield from _broken({text: mode}, whose="the host" if mode == "host" else "another container")
    for key in ("uts", "userns_mode", "cgroup"):
        yield from _broken({"host-names/shared": subject.get(key) == "host"}, key=key)


def _files_of_host(subject: Subject) -> Findings:
    for mount in (mount for mount in subject.get("volumes", []) if mount["type"] == "bind"):
        source, folder = str(mount["source"]), plain_path(str(mount["source"]))
        rows = {
            "docker-socket/there": source.endswith(SOCKETS) or str(mount["target"]).endswith(SOCKETS),
            "host-mount/system": folder in SYSTEM_ROOTS or is_system_folder(folder),
            "mount-read-only/writes": not mount.get("read_only"),
            "mount-propagation/shared": (mount.get("bind") or {}).get("propagation") in ("shared", "rshared"),
        }
        yield from _broken(rows, source=source, folder=folder)
    for device in subject.get("devices", []):
        source = str(device["source"] if isinstance(device, Mapping) else device)
        yield from _broken({"host-device/there": not source.startswith("nvidia.com/gpu=")}, source=source)


def _limits(subject: Subject) -> Findings:
    logging = subject.get("logging", {})
    driver, options = logging.get("driver", "json-file"), logging.get("options") or {}
    check = subject.get("healthcheck", {})
    restart = str(subject.get("restart", "no")).partition(":")[0]
    yield from _broken({
        "memory-limit/none": not (subject.get("mem_limit") or subject.limit("memory")),
        "memory-limit/swap": str(subject.get("memswap_limit", "")) == "-1",
        "cpu-weight/none": not (subject.get("cpu_shares") or subject.get("cpus") or subject.limit("cpus")),
        "pids-limit/none": int(subject.get("pids_limit") or subject.limit("pids") or 0) <= 0,
        "log-rotation/none": driver not in ROTATING and not {"max-size", "max-file"} <= options.keys(),
        "health-check/none": check.get("disable") or not check.get("test") or check["test"][0] == "NONE",
        "restart-policy/none": restart not in ("unless-stopped", "always", "on-failure"),
        "init/none": not subject.get("init"),
    })  # fmt: skip


def _file_systems_in_memory(subject: Subject) -> Findings:
    tmpfs = subject.get("tmpfs", [])
    mounts = [str(mount).partition(":") for mount in ([tmpfs] if isinstance(tmpfs, str) else tmpfs)]
    unbounded = [target for target, _, options in mounts if "size=" not in options]
    unbounded += [
        mount["target"]
        for mount in subject.get("volumes", [])
        if mount["type"] == "tmpfs" and not (mount.get("tmpfs") or {}).get("size")
    ]
    yield from (TEXTS.finding("tmpfs-sized/none", target=target) for target in unbounded)


def _networks(subject: Subject) -> Findings:
    mode, declared = subject.get("network_mode", ""), subject.declared("networks")
    borrowed = {
        "own-network/borrowed": mode and mode not in ("host", "none"),
        "own-network/default": not mode and not subject.get("networks"),
    }
    yield from _broken(borrowed, mode=mode)
    for name in subject.get("networks", {}):
        network = declared.get(name) or {}
        is_joined, is_known = network.get("external"), name in declared
        is_outer = not is_joined and not network.get("internal")
        rows = {
            "joined-network/joined": is_joined,
            "own-network/unknown": not is_joined and (name == "default" or not is_known),
            "way-out/open": is_outer and _is_on(network, MASQUERADE),
            "apart/open": is_outer and is_known and _is_on(network, BETWEEN),
        }
        yield from _broken(rows, name=name, real=network.get("name", name))


def _is_on(network: Mapping[str, Any], option: str) -> bool:
    """Whether a network has an option that the engine switches on by itself."""
    return str((network.get("driver_opts") or {}).get(option, "true")).lower() == "true"


def _ports(subject: Subject) -> Findings:
    for port in subject.get("ports", []):
        address, number = str(port.get("host_ip") or ""), port.get("published") or port["target"]
        is_everywhere = not address or not port.get("published") or _ip(address).is_unspecified
        is_other = not is_everywhere and address != subject.address and not _ip(address).is_loopback
        rows = {"published-address/all": is_everywhere, "published-address/other": is_other}
        yield from _broken(rows, port=number, address=address, own=subject.address)


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address; of one in IPv6's spelling of IPv4 addresses, the one that is meant."""
    found = ipaddress.ip_address(text.strip("[]"))
    return getattr(found, "ipv4_mapped", None) or found


def _secrets(subject: Subject) -> Findings:
    for place in ("environment", "labels"):
        for name, value in subject.get(place, {}).items():
            is_secret = _holds_secret(name, "" if value is None else str(value))
            yield from _broken({"secret-value/there": is_secret}, place=place, name=name)
    commands = {key: subject.get(key) for key in ("command", "entrypoint")}
    commands["health check"] = subject.get("healthcheck", {}).get("test")
    for place, words in commands.items():
        for name in _options_with_secret(words):
            yield TEXTS.finding("secret-value/there", place=place, name=name)
    for secret in subject.get("secrets", []):
        has_file = (subject.declared("secrets").get(secret["source"]) or {}).get("file")
        yield from _broken({"secret-file/none": not has_file}, name=secret["source"])


def _holds_secret(name: str, value: str) -> bool:
    is_meant = SECRET_KEY.search(name) or _ANY_KEY.search(name)
    return _looks_secret(value) or bool(is_meant and not _PLAIN_VALUE.fullmatch(value))


def _looks_secret(value: str) -> bool:
    return bool(SECRET_VALUE.search(value) or _GENERATED.search(value))


def _options_with_secret(words: Any) -> Iterator[str]:
    """Options of a command line whose value is a secret; for a word by itself its place."""
    split = words.split() if isinstance(words, str) else [str(word) for word in words or []]
    before = ""
    for place, word in enumerate(split, start=1):
        option, _, value = word.partition("=")
        if before.startswith("-") and _holds_secret(before.lstrip("-"), "" if word.startswith("-") else word):
            yield before
        elif word.startswith("-") and _holds_secret(option.lstrip("-"), value):
            yield option
        elif _looks_secret(word):
            yield f"word {place}"
        before = "" if "=" in word else word


CHECKS: tuple[Callable[[Subject], Findings], ...] = (
    _image, _privileges, _namespaces, _files_of_host, _limits, _file_systems_in_memory, _networks, _ports, _secrets,
)  # fmt: skip
