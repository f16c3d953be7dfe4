"""Networks of every rendered site: who calls whom is on one, and nothing that need not be reached is."""

from __future__ import annotations

import yaml

from corral.contributions import Service
from corral.plan.networks import networks, outer_network
from tests.trees import each_case, plan_of, tree_of

STORES = {"postgres", "valkey"}
SERVERS = {"llama", "vllm", "image", "speaches"}
# Docker's default address pools hold thirty, one of which is its own bridge.
MOST = 25


def _projects(case: str) -> list[list[Service]]:
    """The services of each Compose host."""
    plan = plan_of(case)
    hosts = {service.host for service in plan.contributions.services if not plan.site.is_local(service.host)}
    return [list(plan.services_of(host)) for host in sorted(hosts)]


@each_case
def test_everything_called_on_the_same_host_is_on_a_common_inner_network(case: str) -> None:
    for on_host in _projects(case):
        names = {service.name: set(networks(service, on_host)) - {outer_network(service)} for service in on_host}
        for service in on_host:
            called = {endpoint.service for endpoint in service.calls if endpoint.host == service.host} & names.keys()
            assert [name for name in called if not names[service.name] & names[name]] == [], service.name


@each_case
def test_servers_share_no_network_with_what_they_do_not_answer(case: str) -> None:
    gateway = plan_of(case).inventory.gateway
    is_direct = gateway.balancing == "direct"
    # HAProxy watches whether the cache answers in which LiteLLM's workers count together.
    counting = {"haproxy"} if gateway.workers > 1 else set()
    allowed = {"haproxy", "prometheus", "edge"} | ({"litellm"} if is_direct else set())
    for on_host in _projects(case):
        names = {service.name: set(networks(service, on_host)) for service in on_host}
        for service in (item for item in on_host if item.component in SERVERS):
            met = {item.component for item in on_host if names[item.name] & names[service.name]}
            assert met <= allowed | {service.component}, service.name
        for service in (item for item in on_host if item.component in STORES):
            met = {item.component for item in on_host if names[item.name] & names[service.name]}
            watching = {"valkey": counting, "postgres": {"chat"}}.get(service.component, set())
            assert met <= {"litellm", f"{service.component}_exporter", service.component} | watching, service.name


@each_case
def test_prometheus_listens_where_grafana_is_and_not_where_servers_are(case: str) -> None:
    for on_host in _projects(case):
        for service in (item for item in on_host if item.component == "prometheus"):
            listening = {word.partition("=")[2].rpartition(":")[0] for word in service.args if "listen-address" in word}
            inside = {"127.0.0.1", "prometheus.inside", "prometheus.outside"}
            assert listening == ({"0.0.0.0"} if case == "swarm" else inside)  # noqa: S104 - there names come with health only


@each_case
def test_a_project_declares_its_networks_and_few_enough(case: str) -> None:
    for path, data in tree_of(case).items():
        if path.count("/") == 1 and path.endswith("/compose.yaml"):
            declared = yaml.safe_load(data)["networks"]
            assert len(declared) <= MOST, path
            for name, settings in declared.items():
                options = settings.get("driver_opts", {})
                is_closed = options.get("com.docker.network.bridge.enable_icc") == "false"
                assert settings.get("internal") is True or settings.get("external") is True or is_closed, name
