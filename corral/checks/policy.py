"""The security baseline, as rules over a Compose project the way `docker compose config --format json` prints it. Pure.

`policy.yaml` says what each rule demands; docs/reference/policy.md is made from it, tests/policy has a project that
keeps all rules and one that breaks each. A rule that does not hold for a service is excepted where the plan says why
(`Service.exceptions`); that each exception has a reason and is needed is tested with what the kit renders.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from corral.build import Plan
from corral.checks.references import SECRET_KEY, SECRET_VALUE
from corral.config.source import plain_yaml
from corral.contributions import SYSTEM_ROOTS, is_system_folder, plain_path
from corral.errors import CorralError, Finding, Level

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


@dataclass(frozen=True, slots=True)
class Rule:
    """One demand of the baseline."""

    demand: str
    remedy: str
    # Points of the CIS Docker Benchmark 1.6.
    cis: str = ""
    level: Level = "error"


RULES = {name: Rule(**row) for name, row in plain_yaml(Path(__file__).with_suffix(".yaml").read_bytes()).items()}


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
        Finding(message, remedy=RULES[rule].remedy, rule=rule, level=RULES[rule].level, where=name)
        for name, service in (project.get("services") or {}).items()
        for check in CHECKS
        for rule, message in check(Subject(long_form(service), project, address))
        if rule not in stated.get(name, {})
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

Broken = Iterator[tuple[str, str]]


def _image(subject: Subject) -> Broken:
    image = str(subject.get("image", ""))
    name, _, tag = image.rpartition("/")[2].partition(":")
    if "@sha256:" in image:
        return
    if not tag:
        yield "image-pinned", f"the image {name or '(none)'} has no tag, which means latest"
    elif _MOVING.search(tag) or not _VERSION.search(tag):
        yield "image-pinned", f"the tag {tag} of {name} means another image tomorrow"


def _privileges(subject: Subject) -> Broken:
    user, added = str(subject.get("user", "")), subject.get("cap_add", [])
    if user.partition(":")[0] in ("", "0", "root"):
        yield "non-root", "runs as root" if user else "runs as the image's user, which may be root"
    if not subject.get("read_only"):
        yield "read-only", "can write to its own root file system"
    if [str(name).upper() for name in subject.get("cap_drop", [])] != ["ALL"]:
        yield "capabilities", "keeps Linux capabilities"
    if added:
        yield "capabilities", f"adds Linux capabilities: {', '.join(added)}"
    if not {"no-new-privileges:true", "no-new-privileges"} & set(subject.security_options):
        yield "no-new-privileges", "may gain privileges"
    for given, option in zip(subject.get("security_opt", []), subject.security_options, strict=True):
        if option.endswith(UNCONFINED):
            yield "confined", f"is not confined: {given}"
    if subject.get("privileged"):
        yield "privileged", "is privileged: root in it is root on the host"


def _namespaces(subject: Subject) -> Broken:
    if subject.get("network_mode") == "host":
        yield "host-network", "shares the host's network"
    if subject.get("pid"):
        yield "host-pid", f"sees the processes of {_whose(subject.get('pid'))}"
    if subject.get("ipc") and subject.get("ipc") not in ("private", "none"):
        yield "host-ipc", f"shares memory with {_whose(subject.get('ipc'))}"
    for key in ("uts", "userns_mode", "cgroup"):
        if subject.get(key) == "host":
            yield "host-names", f"shares the host's namespace: {key}"


def _whose(mode: str) -> str:
    return "the host" if mode == "host" else "another container"


def _files_of_host(subject: Subject) -> Broken:
    for mount in (mount for mount in subject.get("volumes", []) if mount["type"] == "bind"):
        source, target = str(mount["source"]), str(mount["target"])
        if source.endswith(SOCKETS) or target.endswith(SOCKETS):
            yield "docker-socket", f"has the engine's socket {source}"
        if plain_path(source) in SYSTEM_ROOTS or is_system_folder(plain_path(source)):
            yield "host-mount", f"sees {plain_path(source)} of the host"
        if not mount.get("read_only"):
            yield "mount-read-only", f"can write to {source} of the host"
        if (mount.get("bind") or {}).get("propagation") in ("shared", "rshared"):
            yield "mount-propagation", f"passes mounts below {source} on to the host"
    for device in subject.get("devices", []):
        source = str(device["source"] if isinstance(device, Mapping) else device)
        if not source.startswith("nvidia.com/gpu="):
            yield "host-device", f"has the device {source}"


def _limits(subject: Subject) -> Broken:
    if not (subject.get("mem_limit") or subject.limit("memory")):
        yield "memory-limit", "may take all of the host's memory"
    if str(subject.get("memswap_limit", "")) == "-1":
        yield "memory-limit", "may take all of the host's swap"
    if not (subject.get("cpu_shares") or subject.get("cpus") or subject.limit("cpus")):
        yield "cpu-weight", "may crowd the others out from the processors"
    if int(subject.get("pids_limit") or subject.limit("pids") or 0) <= 0:
        yield "pids-limit", "may start processes without end"
    logging = subject.get("logging", {})
    driver, options = logging.get("driver", "json-file"), logging.get("options") or {}
    if driver not in ROTATING and not {"max-size", "max-file"} <= options.keys():
        yield "log-rotation", "keeps logs without end"


def _file_systems_in_memory(subject: Subject) -> Broken:
    tmpfs = subject.get("tmpfs", [])
    mounts = [str(mount).partition(":") for mount in ([tmpfs] if isinstance(tmpfs, str) else tmpfs)]
    unbounded = [target for target, _, options in mounts if "size=" not in options]
    unbounded += [
        mount["target"]
        for mount in subject.get("volumes", [])
        if mount["type"] == "tmpfs" and not (mount.get("tmpfs") or {}).get("size")
    ]
    yield from (("tmpfs-sized", f"may fill the host's memory through {target}") for target in unbounded)


def _life(subject: Subject) -> Broken:
    check = subject.get("healthcheck", {})
    if check.get("disable") or not check.get("test") or check["test"][0] == "NONE":
        yield "health-check", "has no health check"
    if str(subject.get("restart", "no")).partition(":")[0] not in ("unless-stopped", "always", "on-failure"):
        yield "restart-policy", "stays down after a crash"
    if not subject.get("init"):
        yield "init", "has no init: signals may be lost and dead processes stay"


def _networks(subject: Subject) -> Broken:
    mode, declared = subject.get("network_mode", ""), subject.declared("networks")
    if mode and mode not in ("host", "none"):
        yield "own-network", f"borrows a network: {mode}"
    if not mode and not subject.get("networks"):
        yield "own-network", "is on the default network"
    for name in subject.get("networks", {}):
        network = declared.get(name) or {}
        if network.get("external"):
            yield "joined-network", f"is on the network {network.get('name', name)}, which the project did not make"
            continue
        is_inner = network.get("internal")
        if name == "default" or name not in declared:
            yield "own-network", f"is on the network {name}, which the project does not declare"
        if not is_inner and _is_on(network, MASQUERADE):
            yield "way-out", f"can call beyond the host through the network {name}"
        if name in declared and not is_inner and _is_on(network, BETWEEN):
            yield "apart", f"reaches the other containers on the network {name}, and they reach it"


def _is_on(network: Mapping[str, Any], option: str) -> bool:
    """Whether a network has an option that the engine switches on by itself."""
    return str((network.get("driver_opts") or {}).get(option, "true")).lower() == "true"


def _ports(subject: Subject) -> Broken:
    for port in subject.get("ports", []):
        address = str(port.get("host_ip") or "")
        if not address or not port.get("published") or _ip(address).is_unspecified:
            words = f"opens port {port.get('published') or port['target']} on every address of the host"
            yield "published-address", words
        elif address != subject.address and not _ip(address).is_loopback:
            words = f"opens port {port['published']} on {address}; the host's address is {subject.address}"
            yield "published-address", words


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address; of one in IPv6's spelling of IPv4 addresses, the one that is meant."""
    found = ipaddress.ip_address(text.strip("[]"))
    return getattr(found, "ipv4_mapped", None) or found


def _secrets(subject: Subject) -> Broken:
    for place in ("environment", "labels"):
        for name, value in subject.get(place, {}).items():
            if _holds_secret(name, "" if value is None else str(value)):
                yield "secret-value", f"has a secret in its {place}: {name}"
    commands = {key: subject.get(key) for key in ("command", "entrypoint")}
    commands["health check"] = subject.get("healthcheck", {}).get("test")
    for place, words in commands.items():
        yield from (("secret-value", f"has a secret in its {place}: {it}") for it in _options_with_secret(words))
    for secret in subject.get("secrets", []):
        if not (subject.declared("secrets").get(secret["source"]) or {}).get("file"):
            yield "secret-file", f"has the secret {secret['source']}, which is no file"


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


CHECKS: tuple[Callable[[Subject], Broken], ...] = (
    _image, _privileges, _namespaces, _files_of_host, _limits, _file_systems_in_memory, _life, _networks, _ports,
    _secrets,
)  # fmt: skip
