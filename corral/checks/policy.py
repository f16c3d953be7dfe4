"""The security baseline, as rules over a Compose project the way `docker compose config --format json` prints it. Pure.

Each rule's docstring says what it demands; docs/reference/policy.md is made from them, tests/policy has a project that
keeps them all and one that breaks each. A rule that does not hold for a service is excepted where the plan says why
(`Service.exceptions`); that each exception has a reason and is needed is tested with what the kit renders.

CIS numbers are those of the CIS Docker Benchmark 1.6.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from corral.build import Plan
from corral.checks.references import SECRET_KEY, SECRET_VALUE
from corral.contributions import SYSTEM_ROOTS, is_system_folder, plain_path
from corral.errors import CorralError

Level = Literal["error", "warning"]
MASQUERADE = "com.docker.network.bridge.enable_ip_masquerade"
BETWEEN = "com.docker.network.bridge.enable_icc"
SOCKETS = ("docker.sock", "containerd.sock", "podman.sock")
# Log drivers that bound their own size.
ROTATING = ("local", "journald", "syslog", "none")
_MOVING = re.compile(
    r"(?:^|[-_.])(?:latest|stable|main|master|nightly|edge|dev|rolling|preview|current)(?:$|[-_.])", re.IGNORECASE
)
_VERSION = re.compile(r"\d+\.\d+|\d{3,}|[0-9a-f]{7,}")
_ANY_KEY = re.compile(r"(?:^|[_-])(?:key|pass|requirepass|masterauth)$", re.IGNORECASE)
# How the kit's own passwords look.
_GENERATED = re.compile(r"\b[0-9a-f]{32,}\b")
# Values of secret-like names that hold no secret: nothing, a switch, a path.
_PLAIN_VALUE = re.compile(r"|none|true|false|0|1|/\S*")


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that a service breaks."""

    service: str
    rule: str
    message: str
    remedy: str
    level: Level = "error"

    def __str__(self) -> str:
        """`service: message; remedy [rule]`, as the rules of the plan are told."""
        return f"{self.service}: {self.message}; {self.remedy} [{self.rule}]"


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

    @property
    def binds(self) -> list[Mapping[str, Any]]:
        """Files and folders of the host in the container."""
        return [mount for mount in self.get("volumes", []) if mount["type"] == "bind"]


Check = Callable[[Subject], Iterator[str]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One demand of the baseline."""

    check: Check
    cis: str
    remedy: str
    level: Level

    @property
    def demand(self) -> str:
        """What the rule demands, in a sentence."""
        return " ".join((self.check.__doc__ or "").split())


RULES: dict[str, Rule] = {}


def _rule(name: str, cis: str, remedy: str, level: Level = "error") -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        RULES[name] = Rule(check, cis, remedy, level)
        return check

    return register


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
        finding
        for name, service in (project.get("services") or {}).items()
        for finding in _judge(name, Subject(long_form(service), project, address), stated.get(name, {}))
    ]


def _judge(name: str, subject: Subject, exceptions: Mapping[str, str]) -> Iterator[Finding]:
    for rule_name, rule in RULES.items():
        if rule_name not in exceptions:
            yield from (Finding(name, rule_name, message, rule.remedy, rule.level) for message in rule.check(subject))


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
    project: dict[str, Any] = _yaml(tree[f"{host}/compose.yaml"])
    for path in project.pop("include", []):
        part = _yaml(tree[f"{host}/{path}"])
        for section in ("services", "volumes"):
            project.setdefault(section, {}).update(part.get(section) or {})
    return project


def _yaml(text: bytes) -> Any:
    """Plain YAML, by libyaml where PyYAML has it: seven times as fast, and `up` reads every project."""
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506 - both are safe


# --- Compose's short spelling ----------------------------------------------------------------------------------------


def long_form(service: Mapping[str, Any]) -> dict[str, Any]:
    """A service with ports, mounts, networks, secrets and environment as Compose's own output has them."""
    lists: dict[str, Callable[[Any], Any]] = {"ports": _port, "volumes": _mount, "secrets": _secret}
    longer = {key: [make(item) for item in service.get(key) or []] for key, make in lists.items()}
    return {
        **service,
        **longer,
        "networks": _mapping(service.get("networks")),
        "environment": _mapping(service.get("environment")),
        "labels": _mapping(service.get("labels")),
    }


def _mapping(value: Any) -> dict[str, Any]:
    """A mapping, also of a list of names or of `name=value`."""
    if isinstance(value, Mapping):
        return dict(value)
    pairs = (str(item).partition("=") for item in value or [])
    return {name: text if is_given else None for name, is_given, text in pairs}


def _port(port: Any) -> dict[str, Any]:
    if isinstance(port, Mapping):
        return dict(port)
    rest, _, target = str(port).rpartition(":")
    address, _, published = rest.rpartition(":")
    return {"host_ip": address.strip("[]"), "published": published, "target": target}


def _mount(mount: Any) -> dict[str, Any]:
    if isinstance(mount, Mapping):
        return dict(mount)
    source, target, *options = str(mount).split(":")
    words = ",".join(options).split(",")
    kind = "bind" if source.startswith(("/", ".", "~")) else "volume"
    return {
        "type": kind,
        "source": source,
        "target": target,
        "read_only": "ro" in words,
        "bind": {"propagation": words[-1]},
    }


def _secret(secret: Any) -> dict[str, Any]:
    return dict(secret) if isinstance(secret, Mapping) else {"source": secret}


# --- image and user --------------------------------------------------------------------------------------------------


@_rule("image-pinned", "5.28", "name a tag with a version, or a digest", "warning")
def _image_pinned(subject: Subject) -> Iterator[str]:
    """The image has a digest, or a tag that says a version and does not move."""
    image = str(subject.get("image", ""))
    name, _, tag = image.rpartition("/")[2].partition(":")
    if "@sha256:" in image:
        return
    if not tag:
        yield f"the image {name or '(none)'} has no tag, which means latest"
    elif _MOVING.search(tag) or not _VERSION.search(tag):
        yield f"the tag {tag} of {name} means another image tomorrow"


@_rule("non-root", "4.1", "set user to a number other than 0")
def _non_root(subject: Subject) -> Iterator[str]:
    """The container's user is said, and is not root."""
    user = str(subject.get("user", ""))
    if user.partition(":")[0] in ("", "0", "root"):
        yield "runs as root" if user else "runs as the image's user, which may be root"


@_rule("read-only", "5.13", "set read_only: true, with a sized tmpfs where the program writes")
def _read_only(subject: Subject) -> Iterator[str]:
    """The container's root file system is read-only."""
    if not subject.get("read_only"):
        yield "can write to its own root file system"


@_rule("capabilities", "5.4", "set cap_drop: [ALL] and add none")
def _capabilities(subject: Subject) -> Iterator[str]:
    """Every Linux capability is dropped and none is added."""
    if [str(name).upper() for name in subject.get("cap_drop", [])] != ["ALL"]:
        yield "keeps Linux capabilities"
    if subject.get("cap_add"):
        yield f"adds Linux capabilities: {', '.join(subject.get('cap_add'))}"


@_rule("no-new-privileges", "5.26", 'set security_opt: ["no-new-privileges:true"]')
def _no_new_privileges(subject: Subject) -> Iterator[str]:
    """No program in the container can gain privileges, by a setuid file for instance."""
    options = [str(option).replace("=", ":") for option in subject.get("security_opt", [])]
    if not {"no-new-privileges:true", "no-new-privileges"} & set(options):
        yield "may gain privileges"


@_rule("confined", "5.2, 5.3, 5.22", "remove the option: Docker's own profiles are right")
def _confined(subject: Subject) -> Iterator[str]:
    """Docker's own seccomp, AppArmor and SELinux profiles are not switched off."""
    for option in subject.get("security_opt", []):
        if str(option).replace("=", ":").endswith((":unconfined", "label:disable", "systempaths:unconfined")):
            yield f"is not confined: {option}"


@_rule("privileged", "5.5", "remove privileged")
def _privileged(subject: Subject) -> Iterator[str]:
    """The container is not privileged."""
    if subject.get("privileged"):
        yield "is privileged: root in it is root on the host"


# --- the host's own --------------------------------------------------------------------------------------------------


@_rule("host-network", "5.10", "put it on the project's networks and publish its port")
def _host_network(subject: Subject) -> Iterator[str]:
    """The container has a network of its own."""
    if subject.get("network_mode") == "host":
        yield "shares the host's network"


@_rule("host-pid", "5.16", "remove pid; mount the host's /proc where only figures are wanted")
def _host_pid(subject: Subject) -> Iterator[str]:
    """The container sees its own processes only."""
    if subject.get("pid"):
        yield f"sees the processes of {_whose(subject.get('pid'))}"


@_rule("host-ipc", "5.17", "remove ipc; shm_size gives it more shared memory of its own")
def _host_ipc(subject: Subject) -> Iterator[str]:
    """The container has shared memory of its own."""
    if subject.get("ipc") and subject.get("ipc") not in ("private", "none"):
        yield f"shares memory with {_whose(subject.get('ipc'))}"


@_rule("host-names", "5.21, 5.31", "remove uts, userns_mode and cgroup")
def _host_names(subject: Subject) -> Iterator[str]:
    """The container has host name, user numbers and control groups of its own."""
    for key in ("uts", "userns_mode", "cgroup"):
        if subject.get(key) == "host":
            yield f"shares the host's namespace: {key}"


def _whose(mode: str) -> str:
    return "the host" if mode == "host" else "another container"


@_rule("docker-socket", "5.32", "remove the mount: whoever has the socket is root on the host")
def _docker_socket(subject: Subject) -> Iterator[str]:
    """The container has no access to the engine's socket."""
    for mount in subject.binds:
        if str(mount["source"]).endswith(SOCKETS) or str(mount["target"]).endswith(SOCKETS):
            yield f"has the engine's socket {mount['source']}"


@_rule("host-mount", "5.6", "mount a folder made for the purpose")
def _host_mount(subject: Subject) -> Iterator[str]:
    """No system folder of the host is mounted, nor its whole root."""
    for mount in subject.binds:
        source = plain_path(str(mount["source"]))
        if source in SYSTEM_ROOTS or is_system_folder(source):
            yield f"sees {source} of the host"


@_rule("mount-read-only", "", "mount it with :ro; data that a program writes belongs in a named volume")
def _mount_read_only(subject: Subject) -> Iterator[str]:
    """Files and folders of the host are mounted read-only."""
    for mount in subject.binds:
        if not mount.get("read_only"):
            yield f"can write to {mount['source']} of the host"


@_rule("mount-propagation", "5.20", "remove shared or rshared")
def _mount_propagation(subject: Subject) -> Iterator[str]:
    """What is mounted inside a container does not appear outside."""
    for mount in subject.binds:
        if (mount.get("bind") or {}).get("propagation") in ("shared", "rshared"):
            yield f"passes mounts below {mount['source']} on to the host"


@_rule("host-device", "5.18", "reserve a card by deploy.resources.reservations.devices")
def _host_device(subject: Subject) -> Iterator[str]:
    """No device file of the host is handed in; a graphics card is reserved instead."""
    for device in subject.get("devices", []):
        yield f"has the device {device['source'] if isinstance(device, Mapping) else device}"


# --- limits ----------------------------------------------------------------------------------------------------------


def _limit(subject: Subject, name: str) -> Any:
    return ((subject.get("deploy", {}).get("resources") or {}).get("limits") or {}).get(name)


@_rule("memory-limit", "5.11", "set mem_limit")
def _memory_limit(subject: Subject) -> Iterator[str]:
    """Memory has a limit, and swap is bounded with it."""
    if not (subject.get("mem_limit") or _limit(subject, "memory")):
        yield "may take all of the host's memory"
    if str(subject.get("memswap_limit", "")) == "-1":
        yield "may take all of the host's swap"


@_rule("cpu-weight", "5.12", "set cpu_shares or cpus")
def _cpu_weight(subject: Subject) -> Iterator[str]:
    """The processors are shared out by weight (`cpu_shares`), or capped (`cpus`)."""
    if not (subject.get("cpu_shares") or subject.get("cpus") or _limit(subject, "cpus")):
        yield "may crowd the others out from the processors"


@_rule("pids-limit", "5.29", "set pids_limit")
def _pids_limit(subject: Subject) -> Iterator[str]:
    """The number of processes and threads has a limit."""
    limit = subject.get("pids_limit") or _limit(subject, "pids") or 0
    if int(limit) <= 0:
        yield "may start processes without end"


@_rule("tmpfs-sized", "", "give it a size, such as /tmp:size=64m")
def _tmpfs_sized(subject: Subject) -> Iterator[str]:
    """Every file system in memory has a size."""
    tmpfs = subject.get("tmpfs", [])
    for mount in [tmpfs] if isinstance(tmpfs, str) else tmpfs:
        if "size=" not in str(mount).partition(":")[2]:
            yield f"may fill the host's memory through {str(mount).partition(':')[0]}"
    for mount in subject.get("volumes", []):
        if mount["type"] == "tmpfs" and not (mount.get("tmpfs") or {}).get("size"):
            yield f"may fill the host's memory through {mount['target']}"


@_rule("log-rotation", "", "set logging with max-size and max-file")
def _log_rotation(subject: Subject) -> Iterator[str]:
    """Logs are rotated before they fill the disk."""
    logging = subject.get("logging", {})
    driver, options = logging.get("driver", "json-file"), logging.get("options") or {}
    if driver not in ROTATING and not {"max-size", "max-file"} <= options.keys():
        yield "keeps logs without end"


# --- life ------------------------------------------------------------------------------------------------------------


@_rule("health-check", "4.6, 5.27", "set healthcheck")
def _health_check(subject: Subject) -> Iterator[str]:
    """A health check of our own says when the service is ready."""
    check = subject.get("healthcheck", {})
    if check.get("disable") or not check.get("test") or check["test"][0] == "NONE":
        yield "has no health check"


@_rule("restart-policy", "5.15", "set restart: unless-stopped")
def _restart_policy(subject: Subject) -> Iterator[str]:
    """The service comes back after a crash (CIS would stop after five times; a farm has to heal over night)."""
    if str(subject.get("restart", "no")).partition(":")[0] not in ("unless-stopped", "always", "on-failure"):
        yield "stays down after a crash"


@_rule("init", "", "set init: true")
def _init(subject: Subject) -> Iterator[str]:
    """Process 1 passes signals on and collects dead children."""
    if not subject.get("init"):
        yield "has no init: signals may be lost and dead processes stay"


# --- network ---------------------------------------------------------------------------------------------------------


@_rule("own-network", "5.30", "name the project's own networks")
def _own_network(subject: Subject) -> Iterator[str]:
    """The service is on networks that the project declares, not on a default one or another container's."""
    mode = subject.get("network_mode", "")
    declared = subject.project.get("networks") or {}
    if mode and mode not in ("host", "none"):
        yield f"borrows a network: {mode}"
    for name in subject.get("networks", {}):
        if name == "default" or name not in declared:
            yield f"is on the network {name}, which the project does not declare"
    if not mode and not subject.get("networks"):
        yield "is on the default network"


@_rule("way-out", "", "put it on an internal network, or on one without masquerading if it publishes a port")
def _way_out(subject: Subject) -> Iterator[str]:
    """The service's networks lead nowhere outside the host: internal, or without masquerading for published ports."""
    declared = subject.project.get("networks") or {}
    for name in subject.get("networks", {}):
        network = declared.get(name) or {}
        if not network.get("internal") and _is_on(network, MASQUERADE):
            yield f"can call beyond the host through the network {name}"


def _is_on(network: Mapping[str, Any], option: str) -> bool:
    """Whether a network has an option that the engine switches on by itself."""
    return str((network.get("driver_opts") or {}).get(option, "true")).lower() == "true"


@_rule("apart", "2.2", f'set {BETWEEN}: "false" on the network')
def _apart(subject: Subject) -> Iterator[str]:
    """On a network through which people come in or calls go out, containers do not reach each other."""
    declared = subject.project.get("networks") or {}
    for name in subject.get("networks", {}):
        network = declared.get(name)
        if network is not None and not network.get("internal") and _is_on(network, BETWEEN):
            yield f"reaches the other containers on the network {name}, and they reach it"


@_rule("published-address", "5.14", "publish it on the host's declared address, as `192.0.2.10:4000:4000`")
def _published_address(subject: Subject) -> Iterator[str]:
    """Ports are published on the host's declared address or on loopback, never on every address."""
    for port in subject.get("ports", []):
        address = str(port.get("host_ip") or "")
        if not address or not port.get("published") or _ip(address).is_unspecified:
            yield f"opens port {port.get('published') or port['target']} on every address of the host"
        elif address != subject.address and not _ip(address).is_loopback:
            yield f"opens port {port['published']} on {address}; the host's address is {subject.address}"


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An address; of one in IPv6's spelling of IPv4 addresses, the one that is meant."""
    found = ipaddress.ip_address(text.strip("[]"))
    return getattr(found, "ipv4_mapped", None) or found


# --- secrets ---------------------------------------------------------------------------------------------------------


@_rule("secret-value", "4.10", "mount it as a file under secrets: and name the file")
def _secret_value(subject: Subject) -> Iterator[str]:
    """No secret, nor a variable that becomes one, stands in environment, command, health check or labels."""
    for place in ("environment", "labels"):
        for name, value in subject.get(place, {}).items():
            if _holds_secret(name, "" if value is None else str(value)):
                yield f"has a secret in its {place}: {name}"
    for place, words in (
        ("command", subject.get("command")),
        ("entrypoint", subject.get("entrypoint")),
        ("health check", _test(subject)),
    ):
        yield from (f"has a secret in its {place}: {option}" for option in _options_with_secret(words))


def _test(subject: Subject) -> Any:
    return subject.get("healthcheck", {}).get("test")


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


@_rule("secret-file", "", "give it as `file: ./secrets/NAME`")
def _secret_file(subject: Subject) -> Iterator[str]:
    """Every secret comes from a file; one from the environment could be read in the shell that starts the project."""
    declared = subject.project.get("secrets") or {}
    for secret in subject.get("secrets", []):
        if not (declared.get(secret["source"]) or {}).get("file"):
            yield f"has the secret {secret['source']}, which is no file"
