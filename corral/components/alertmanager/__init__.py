"""Alertmanager: tells people about alerts, once for what belongs together, by Slack, e-mail, webhook or ntfy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from corral.components import Stage
from corral.components.declared import filled, service
from corral.config.inventory import Monitoring, Receiver
from corral.contributions import AlertSink, Contribution, Contributions, Endpoint, File, ScrapeTarget, Secret
from corral.declarations import declaration
from corral.plan.site import Site

STAGE = Stage.GATEWAY
COMPONENT = "alertmanager"
WATCHDOG_REPEAT = "5m"
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
    receivers = tuple(sorted({item.secret for item in monitoring.receivers if item.secret}))
    yield service(site, host, COMPONENT, port=monitoring.alertmanager_port, receivers=receivers)


def configuration(site: Site, monitoring: Monitoring) -> dict[str, Any]:
    """Alertmanager's configuration: every receiver gets its severities."""
    common, receivers = declaration(COMPONENT), monitoring.receivers
    nobody = {"name": common["route"]["receiver"]}
    return {
        "route": {**common["route"], "routes": [route for receiver in receivers for route in _routes(receiver)]},
        "inhibit_rules": common["inhibit_rules"],
        "receivers": [nobody, *(_receiver(site, monitoring.host, item) for item in receivers)],
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
    kind = "webhook" if receiver.kind == "ntfy" else receiver.kind
    secret = receiver.secret and site.secret_path(host, receiver.secret)
    # A relative path counts from the host's folder, where supervisord starts programs.
    given = f"secrets/{receiver.secret}" if secret and site.is_local(host) else secret
    settings = filled(declaration(COMPONENT)["receivers"][kind], {**receiver.model_dump(), "secret": given})
    return {"name": receiver.name, f"{kind}_configs": [settings]}
