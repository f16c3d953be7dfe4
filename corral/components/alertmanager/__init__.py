"""Alertmanager: tells people about alerts, once for what belongs together, by Slack, e-mail, webhook or ntfy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from corral.components import Stage
from corral.config.inventory import Monitoring, Receiver
from corral.contributions import (
    AlertSink,
    ConfigMount,
    Contribution,
    Contributions,
    Endpoint,
    File,
    Health,
    Port,
    ScrapeTarget,
    Secret,
    Service,
)
from corral.plan.site import Site

STAGE = Stage.GATEWAY
COMPONENT = "alertmanager"
IMAGE = "prom/alertmanager:v0.33.0"
CONFIG = "/etc/alertmanager/alertmanager.yml"
DATA = "/alertmanager"
NOBODY = "nobody"
TELLS = "it tells people outside"
NO_PASSWORD = "loopback: Alertmanager has no password of its own"  # noqa: S105 - a reason
WATCHDOG_REPEAT = "5m"
SUBJECT = "[{{ .Status | toUpper }}] {{ .CommonLabels.alertname }}"
TEXT = (
    "{{ range .Alerts }}{{ .Annotations.summary }}\n{{ .Annotations.description }}\n"
    "What to do: {{ .Annotations.runbook_url }}\n{{ end }}"
)
SECRET_OF = {"email": "password of the mail account", "slack": "address of Slack's webhook"}


def contribute(site: Site, _published: Contributions) -> Iterator[Contribution]:
    """Alertmanager with its routes, where the inventory has receivers."""
    monitoring = site.inventory.monitoring
    if monitoring is None or not monitoring.receivers:
        return
    host = monitoring.host
    endpoint = Endpoint(monitoring.alertmanager_port, host, COMPONENT)
    for receiver in monitoring.receivers:
        if receiver.secret:
            purpose = SECRET_OF.get(receiver.kind, f"address that the receiver {receiver.name} is told at")
            yield Secret(receiver.secret, host, purpose, "given")
    yield File(
        host, COMPONENT, "alertmanager.yml", data=configuration(site, monitoring),
        note="routes and receivers come from `monitoring.receivers`",
    )  # fmt: skip
    yield AlertSink(endpoint)
    yield ScrapeTarget(COMPONENT, endpoint, {"host": host, "role": "monitoring"})
    yield _service(site, monitoring)


def configuration(site: Site, monitoring: Monitoring) -> dict[str, Any]:
    """Alertmanager's configuration: every receiver gets its severities; the greater trouble silences the smaller."""
    return {
        "route": {
            "receiver": NOBODY,
            "group_by": ["alertname", "host", "pool"],
            "group_wait": "30s",
            "group_interval": "5m",
            "repeat_interval": "12h",
            "routes": [route for receiver in monitoring.receivers for route in _routes(receiver)],
        },
        "inhibit_rules": [
            {
                "source_matchers": ['severity="critical"'],
                "target_matchers": ['severity="warning"'],
                "equal": ["about", "host", "gpu", "pool", "replica", "mountpoint", "objective"],
            },
            {"source_matchers": ['alertname="PoolDown"'], "target_matchers": ['about="replica"'], "equal": ["pool"]},
            {
                "source_matchers": ['alertname="HostDown"'],
                "target_matchers": ['alertname!="HostDown"', 'severity=~"critical|warning"'],
                "equal": ["host"],
            },
        ],
        "receivers": [{"name": NOBODY}, *(_receiver(site, monitoring.host, item) for item in monitoring.receivers)],
    }


def _routes(receiver: Receiver) -> Iterator[dict[str, Any]]:
    told = [severity for severity in receiver.severities if severity != "watchdog"]
    route: dict[str, Any] = {"receiver": receiver.name, "continue": True}
    if told:
        repeat = f"{round(receiver.repeat_h * 60)}m"
        yield route | {"matchers": [f'severity=~"{"|".join(sorted(told))}"'], "repeat_interval": repeat}
    if "watchdog" in receiver.severities:
        timing = {"group_wait": "0s", "group_interval": WATCHDOG_REPEAT, "repeat_interval": WATCHDOG_REPEAT}
        yield route | {"matchers": ['severity="watchdog"']} | timing


def _receiver(site: Site, host: str, receiver: Receiver) -> dict[str, Any]:
    secret = _secret_file(site, host, receiver.secret) if receiver.secret else ""
    settings: dict[str, Any]
    if receiver.kind == "slack":
        settings = {"api_url_file": secret, "title": SUBJECT, "text": TEXT, "send_resolved": True}
        settings |= {"channel": receiver.channel} if receiver.channel else {}
    elif receiver.kind == "email":
        settings = {
            "to": receiver.to, "from": receiver.sender, "smarthost": receiver.server, "send_resolved": True,
            "headers": {"Subject": SUBJECT}, "text": TEXT, "html": "",
        }  # fmt: skip
        if receiver.user:
            settings |= {"auth_username": receiver.user, "auth_password_file": secret}
    else:
        settings = {"url_file": secret, "send_resolved": True}
    kind = "webhook" if receiver.kind == "ntfy" else receiver.kind
    return {"name": receiver.name, f"{kind}_configs": [settings]}


def _secret_file(site: Site, host: str, name: str) -> str:
    """The path of a secret's file; a relative one counts from the host's folder, where supervisord starts programs."""
    return f"secrets/{name}" if site.is_local(host) else site.secret_path(host, name)


def _service(site: Site, monitoring: Monitoring) -> Service:
    host, port = monitoring.host, monitoring.alertmanager_port
    is_local = site.is_local(host)
    return Service(
        host=host,
        component=COMPONENT,
        name=COMPONENT,
        role="monitoring",
        image=site.image(COMPONENT, IMAGE),
        program="prometheus-alertmanager",
        args=(
            f"--config.file={site.config_path(host, COMPONENT, 'alertmanager.yml', CONFIG)}",
            f"--storage.path={site.data_path(host, COMPONENT, DATA)}",
            f"--web.listen-address={'127.0.0.1' if is_local else ''}:{port}",
            "--cluster.listen-address=",
        ),
        health=Health.by_wget(port, "/-/ready"),
        memory_mib=128,
        secrets=tuple(sorted({item.secret for item in monitoring.receivers if item.secret})),
        ports=(Port(port, "127.0.0.1", NO_PASSWORD),),
        volumes=(("alerts", DATA),),
        configs=(ConfigMount("alertmanager.yml", CONFIG),),
        network="alerts",
        user="65534:65534",
        cpu_weight=256,
        exceptions={"way-out": TELLS},
    )
