"""Every rendered file of every golden case, read by the program that it is for, and compared with the plan."""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from corral.components.edge import CERTIFICATES
from corral.components.llama import COMPONENT as LLAMA
from corral.components.llama import arguments
from corral.contributions import Service
from corral.plan.site import HERE, Replica
from corral.render.secrets import initialise, write_files
from corral.render.tree import LOCAL_DIGEST
from tests.consumers.litellm_contract import load_with_litellm, unknown_keys
from tests.needs import program
from tests.processes.test_entrance import make_certificate
from tests.trees import CASES, each_case, hosts_of, plan_of, put, services_of, tree_of
from xllama import OPTIONS

MIB = 1024 * 1024
DEADLINE_S = 120


def files_named(name: str) -> list[tuple[str, str]]:
    """Case and path of every rendered file of this name."""
    return [(case, path) for case in CASES for path in tree_of(case) if path.rpartition("/")[2] == name]


def each_file(name: str) -> pytest.MarkDecorator:
    """The test for every rendered file of this name."""
    return pytest.mark.parametrize(("case", "path"), files_named(name))


def services_on(case: str, host: str) -> list[Service]:
    return [service for service in services_of(case) if service.host == host]


@pytest.fixture
def folder(case: str, tmp_path: Path) -> Path:
    """The tree of a case on disk, with a value for every secret."""
    put(tree_of(case), tmp_path)
    for host in plan_of(case).inventory.hosts:
        wanted = plan_of(case).secrets_of(host)
        (tmp_path / host).mkdir(exist_ok=True)
        write_files(
            wanted, {secret.name: f"sk-{secret.name.lower()}" for secret in wanted}, tmp_path / host / "secrets"
        )
    return tmp_path


# --- Docker Compose ---------------------------------------------------------------------------------------------------


@functools.cache
def compose_model(folder: Path) -> dict[str, Any]:
    """What Compose makes of a project, `$` as programs get it."""
    command = ["docker", "compose", "-f", f"{folder}/compose.yaml", "config", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    model: dict[str, Any] = json.loads(done.stdout.replace("$$", "$"))
    return model


@pytest.mark.needs("docker-compose")
@each_case
def test_compose_takes_every_project(case: str, folder: Path) -> None:
    for host in hosts_of(case, "compose"):
        command = ["docker", "compose", "-f", f"{folder}/{host}/compose.yaml", "config", "-q", "--no-interpolate"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.needs("docker-compose")
def test_the_stack_is_read_as_planned(tmp_path: Path) -> None:
    """The engine's own command reads the whole stack, warns of nothing that it would ignore, and changes nothing."""
    file = put(tree_of("swarm"), tmp_path) / "gate" / "stack.yml"
    command = ["docker", "stack", "config", "--skip-interpolation", "--compose-file", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert (done.returncode, done.stderr) == (0, "")
    services = yaml.safe_load(done.stdout)["services"]
    planned = {f"{service.host}-{service.name}": service for service in services_of("swarm")}
    assert sorted(services) == sorted(planned)
    for name, service in planned.items():
        told = services[name]
        assert [word.replace("$$", "$") for word in told.get("command", [])] == list(service.args), name
        assert (told["image"], told["cap_drop"], told["read_only"]) == (service.image, ["ALL"], True)
        assert told["user"].partition(":")[0] not in ("", "0", "root")
        assert told["deploy"]["placement"]["constraints"] == [f"node.labels.corral.host == {service.host}"]
        assert [item["source"] for item in told.get("secrets", ())] == list(service.secrets)
        assert len(told.get("configs", ())) == len(service.configs)
    published = {name: told["ports"] for name, told in services.items() if "ports" in told}
    assert [(name, port["published"], port["mode"]) for name, ports in published.items() for port in ports] == [
        ("gate-grafana", 3000, "host"),
        ("gate-haproxy", 4000, "host"),
    ]
    for name in ("one-chat-1", "one-chat-2"):
        assert services[name]["environment"]["NVIDIA_VISIBLE_DEVICES"].endswith(f"e0{name[-1]}")


@pytest.mark.needs("docker-compose")
@each_case
def test_compose_sees_every_service_as_planned(case: str, folder: Path) -> None:
    for host in hosts_of(case, "compose"):
        model = compose_model(folder / host)
        assert re.fullmatch(r"[a-z0-9][a-z0-9_-]*", model["name"])
        planned = {service.name: service for service in services_on(case, host)}
        assert sorted(model["services"]) == sorted(planned)
        for name, service in planned.items():
            assert seen(model["services"][name]) == expected(service), name


def seen(service: dict[str, Any]) -> dict[str, Any]:
    """What of a service in Compose's model has to be as planned."""
    return {
        "image": service["image"],
        "container": service["container_name"],
        "entrypoint": tuple(service["entrypoint"] or ()),
        "command": tuple(service["command"] or ()),
        "environment": service.get("environment", {}),
        "secrets": sorted(secret["source"] for secret in service.get("secrets", [])),
        "secret targets": sorted(secret.get("target", "") for secret in service.get("secrets", [])),
        "ports": sorted((port["host_ip"], int(port["published"]), port["target"]) for port in service.get("ports", [])),
        "mounts": sorted(
            (mount["type"], mount["target"], mount.get("read_only", False)) for mount in service.get("volumes", [])
        ),
        "memory": int(service["mem_limit"]) // MIB,
        "memory and swap": int(service["memswap_limit"]) // MIB,
        "pids": service["pids_limit"],
        "user": service.get("user", ""),
        "read only": service.get("read_only", False),
        "capabilities": (service["cap_drop"], tuple(service.get("cap_add", ()))),
        "security": service["security_opt"],
        "init": service["init"],
        "restart": service["restart"],
        "logging": service["logging"],
        "health": service["healthcheck"]["test"],
        "after": {name: after["condition"] for name, after in service.get("depends_on", {}).items()},
        "gpus": [device["device_ids"] for device in devices_of(service)],
        "devices": [
            (device["source"], device["target"], device["permissions"]) for device in service.get("devices", ())
        ],
        "groups": service.get("group_add", []),
        "memlock": service.get("ulimits", {}).get("memlock"),
        "pid": service.get("pid", ""),
    }


def devices_of(service: dict[str, Any]) -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = (
        service.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    )
    assert all(device["driver"] == "nvidia" and device["capabilities"] == ["gpu"] for device in devices)
    return devices


def expected(service: Service) -> dict[str, Any]:
    """The same of a planned service."""
    mounts = [("bind", path, True) for _, path in service.mounts]
    mounts += [("bind", mount.target, True) for mount in service.configs if mount.target]
    mounts += [("volume", path, False) for _, path in service.volumes]
    return {
        "image": service.image,
        "container": service.container or f"{service.host}-{service.name}",
        "entrypoint": service.entrypoint,
        "command": service.args,
        "environment": dict(service.environment),
        "secrets": sorted(service.secrets),
        "secret targets": sorted(f"/run/secrets/{name}" for name in service.secrets),
        "ports": sorted((port.publish, port.number, port.number) for port in service.ports if port.publish),
        "mounts": sorted(mounts),
        "memory": service.memory_mib,
        "memory and swap": service.memory_swap_mib or service.memory_mib,
        "pids": service.pids,
        "user": service.user,
        "read only": service.read_only,
        "capabilities": (["ALL"], ()),
        "security": ["no-new-privileges:true"],
        "init": True,
        "restart": "unless-stopped",
        "logging": {"driver": "json-file", "options": {"max-file": "3", "max-size": "100m"}},
        "health": ["CMD", *service.health.command],
        "after": dict(service.after),
        "gpus": [[claim.device for claim in service.gpus]] if service.gpus and not service.devices else [],
        # The file of one card is where drivers look for the first.
        "devices": [(device, "/dev/dri/renderD128" if ":" in device else device, "rwm") for device in service.devices],
        "groups": list(map(str, service.groups)),
        "memlock": {"soft": -1, "hard": -1} if service.mlock else None,
        "pid": "",
    }


# --- seed 004, number by number ---------------------------------------------------------------------------------------

# The seed's node-exporter on 9100 is published no more: the monitoring reads it through the edge.
PEA_PORTS = {
    **{f"gpu-{number}": 8079 + number for number in range(1, 8)},  # 8080-8082 SFW, 8083-8086 NSFW
    **{f"embed-{number}": 8089 + number for number in range(1, 8)},  # 8090-8096
    "image-8": 5100,
    "prometheus": 9099,
}
CHAT_ARGV = {
    "--n-gpu-layers": "33",
    "--ctx-size": "16384",
    "--batch-size": "128",
    "--ubatch-size": "64",
    "--threads": "2",
    "--cache-type-k": "q8_0",
    "--cache-type-v": "q8_0",
    "--cache-reuse": "256",
    "--parallel": "1",
}


@pytest.fixture(scope="module")
def pea(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Compose's model of seed 004's GPU host."""
    folder = put(tree_of("heartcode"), tmp_path_factory.mktemp("heartcode"))
    services: dict[str, Any] = compose_model(folder / "pea")["services"]
    exporter = services.pop("gpu-exporter")  # the seed had none
    assert exporter["container_name"] == "pea-gpu-exporter"
    [door] = services.pop("edge")["ports"]  # other hosts come in there, and nowhere else
    assert (door["host_ip"], door["published"]) == ("192.168.0.144", "4443")
    return services


@pytest.mark.needs("docker-compose")
def test_004_02_and_03_seventeen_services_and_their_ports(pea: dict[str, Any]) -> None:
    assert len(pea) == 17
    ports = {name: port for name, service in pea.items() for port in service.get("ports", ())}
    assert {name: int(port["published"]) for name, port in ports.items()} == PEA_PORTS
    assert {port["host_ip"] for port in ports.values()} == {"127.0.0.1"}


@pytest.mark.needs("docker-compose")
def test_004_05_and_06_cards_and_container_names(pea: dict[str, Any]) -> None:
    for name, service in pea.items():
        assert service["container_name"] == f"pea-{name}"
        number = re.fullmatch(r"(?:gpu|embed|image)-(\d)", name)
        wanted = [[str(int(number[1]) - 1)]] if number else []
        assert [device["device_ids"] for device in devices_of(service)] == wanted


@pytest.mark.needs("docker-compose")
def test_004_08_to_10_models(pea: dict[str, Any]) -> None:
    models = {
        name: Path(options(service["command"])["--model"]).name
        for name, service in pea.items()
        if "gpu-" in name or "embed-" in name
    }
    assert {models[f"gpu-{number}"] for number in (1, 2, 3)} == {"Llama-3.1-8B-Stheno-v3.4-Q5_K_M.gguf"}
    assert {models[f"gpu-{number}"] for number in (4, 5, 6, 7)} == {"Lumimaid-v0.2-8B-Q5_K_M-imat.gguf"}
    assert {models[f"embed-{number}"] for number in range(1, 8)} == {"nomic-embed-text-v1.5.Q8_0.gguf"}
    image = yaml.safe_load(tree_of("heartcode")["pea/image/image-8.yaml"])
    assert image["parameters"] == {"model": "segmind/SSD-1B"}
    assert image["f16"] is True


@pytest.mark.needs("docker-compose")
def test_004_13_to_17_chat_servers_argv(pea: dict[str, Any]) -> None:
    for number in range(1, 8):
        found = options(pea[f"gpu-{number}"]["command"])
        assert {name: found[name] for name in CHAT_ARGV} == CHAT_ARGV
        assert "--jinja" in found
        assert found["--port"] == str(8079 + number)
        assert int(found["--cache-ram"]) <= 1024


@pytest.mark.needs("docker-compose")
def test_004_09_embedding_servers_argv(pea: dict[str, Any]) -> None:
    for number in range(1, 8):
        found = options(pea[f"embed-{number}"]["command"])
        wanted = {"--ctx-size": "2048", "--batch-size": "512", "--n-gpu-layers": "all", "--threads": "2"}
        assert {name: found[name] for name in wanted} == wanted
        assert "--embeddings" in found


@pytest.mark.needs("docker-compose")
def test_004_19_memory_limits(pea: dict[str, Any]) -> None:
    wanted = {"gpu": (2048, 3072), "embed": (512, 1024), "image": (4096, 6144)}
    for name, service in pea.items():
        kind = name.partition("-")[0]
        if kind in wanted:
            assert (int(service["mem_limit"]) // MIB, int(service["memswap_limit"]) // MIB) == wanted[kind]


def test_004_11_and_32_aliases_and_limits() -> None:
    config = yaml.safe_load(tree_of("heartcode")["prod/litellm/config.yaml"])
    assert config["router_settings"]["model_group_alias"] == {
        "heartcode-default": "heartcode-chat-sfw",
        "heartcode-sfw": "heartcode-chat-sfw",
        "heartcode-chat": "heartcode-chat-sfw",
        "heartcode-nsfw": "heartcode-chat-nsfw",
    }
    limits = {
        entry["model_name"]: (entry["model_info"].get("rpm"), entry["model_info"].get("tpm"))
        for entry in config["model_list"]
    }
    assert limits == {
        "heartcode-chat-sfw": (35, 50000),
        "heartcode-chat-nsfw": (45, 50000),
        "heartcode-embed": (None, None),
        "heartcode-image": (None, None),
    }


def test_004_04_the_gateway_listens_on_port_4000_of_the_proxy_host() -> None:
    found = {service.name: service for service in services_on("heartcode", "prod")}
    published = [(port.number, port.publish) for port in found["haproxy"].ports if port.publish]
    assert published[0] == (4000, "192.168.0.152")
    assert [port.publish for port in found["litellm"].ports] == [""], "behind the door"


def test_000_the_balancer_listens_on_8899() -> None:
    door = next(service for service in services_of("neural-farm") if service.role == "balancer")
    assert [port.number for port in door.ports if port.publish] == [8899, 4002]
    config = tree_of("neural-farm")["gateway/haproxy/haproxy.cfg"].decode()
    assert sum(map(int, re.findall(r"^    server (?!litellm)(?!.* track ).* maxconn (\d+)", config, re.MULTILINE))) == 6


def options(command: list[str]) -> dict[str, str]:
    """Options of an argument list with their values; a switch has none."""
    found: dict[str, str] = {}
    for word, after in zip(command, [*command[1:], "--"], strict=True):
        if word.startswith("--"):
            found[word] = "" if after.startswith("--") else after
    return found


# --- HAProxy ----------------------------------------------------------------------------------------------------------


BENIGN = (
    "could not resolve address",  # containers and example.com: they resolve where the farm runs, and `init-addr … none`
    "Can't open global server state file",  # there is none before the first reload
)


@pytest.mark.needs("haproxy")
@each_file("haproxy.cfg")
def test_haproxy_takes_its_configuration(case: str, path: str, folder: Path) -> None:
    secrets = folder / path.partition("/")[0] / "secrets"
    initialise({secrets.parent.name: plan_of(case).secrets_of(secrets.parent.name)}, folder)
    text = (folder / path).read_text().replace("/run/secrets/", f"{secrets}/")
    text = re.sub(r"(bind |,)(?:ipv4@)?haproxy\.\w+:", r"\g<1>127.0.0.1:", text)  # names of its own addresses
    for certificate in {name for name in re.findall(r" crt (\S+)", text) if not name.startswith(f"{secrets}/")}:
        make_certificate(folder / "farm.pem", "farm.example.com")
        text = text.replace(certificate, str(folder / "farm.pem"))
    make_certificate(folder / "house.pem", "studio.example.com")
    text = re.sub(r"/etc/corral/authorities/\S+", str(folder / "house.pem"), text)
    (folder / path).write_text(text)
    done = subprocess.run(
        [program("haproxy"), "-c", "-f", folder / path], capture_output=True, text=True, check=False, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "[WARNING]" in line or "[ALERT]" in line]
    assert [line for line in warnings if not any(words in line for words in BENIGN)] == []


@pytest.mark.parametrize(("case", "path"), [item for item in files_named("haproxy.cfg") if "/haproxy/" in item[1]])
def test_haproxy_has_every_backend_once_with_its_slots(case: str, path: str) -> None:
    text = tree_of(case)[path].decode()
    names = re.findall(r"^backend (\S+)", text, re.MULTILINE)
    assert len(names) == len(set(names))
    planned = {
        backend.name: backend.slots for backend in plan_of(case).contributions.backends if backend.protocol != "cloud"
    }
    line = re.compile(r"^    server (\S+) \S+ id \d+ maxconn (\d+) weight (\d+)( no-check track)?", re.MULTILINE)
    servers = line.findall(text)
    assert {name: int(slots) for name, slots, _, lease in servers if not lease} == planned
    assert sum(not lease for *_, lease in servers) == len(planned)
    assert all((name, int(slots)) in planned.items() for name, slots, _, lease in servers if lease)


# --- Prometheus -------------------------------------------------------------------------------------------------------


@pytest.mark.needs("promtool")
@each_file("prometheus.yml")
def test_promtool_takes_the_configuration(case: str, path: str, folder: Path) -> None:
    """Files with credentials must exist; those of containers lie elsewhere here."""
    config = folder / path
    host = folder / path.partition("/")[0]
    text = config.read_text().replace("/run/secrets/", f"{host}/secrets/")
    config.write_text(text.replace("/etc/prometheus/rules/", f"{host}/prometheus/rules/"))
    done = subprocess.run(
        [program("promtool"), "check", "config", config],
        capture_output=True,
        text=True,
        check=False,
        timeout=DEADLINE_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


@pytest.mark.needs("promtool")
@pytest.mark.parametrize("case", CASES)
def test_promtool_finds_nothing_to_say_about_the_rules(case: str, folder: Path) -> None:
    files = sorted(folder.glob("*/prometheus/rules/*.yml"))
    if files:
        command = [str(program("promtool")), "check", "rules", "--lint=all", "--lint-fatal", *map(str, files)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
        assert done.returncode == 0, done.stdout + done.stderr


@each_file("prometheus.yml")
def test_every_target_says_where_it_is_and_what_it_does(case: str, path: str) -> None:
    """Labels by which alerts and dashboards find it; those of a replica say all that is known of it."""
    replicas = {replica.container: replica for replica in plan_of(case).site.replicas}
    config = yaml.safe_load(tree_of(case)[path])
    for entry in (entry for job in config["scrape_configs"] for entry in job["static_configs"]):
        labels = entry["labels"]
        assert {"host", "role"} <= labels.keys()
        if "replica" in labels:
            assert {"host", "pool", "model", "replica", "role"} <= labels.keys()
            replica = replicas.get(labels["replica"])
            assert not replica or bool(replica.cards) == ({"gpu", "card"} <= labels.keys())


@each_case
def test_figures_and_alerts_are_open_on_loopback_only(case: str) -> None:
    """Neither Prometheus nor Alertmanager has a password of its own."""
    for service in services_of(case):
        if service.component in {"prometheus", "alertmanager"}:
            place = "" if plan_of(case).site.is_swarm else "127.0.0.1"  # Swarm publishes nothing on loopback
            assert {port.publish for port in service.ports} == {place}
            assert service.args


@each_file("prometheus.yml")
def test_every_target_has_a_home_and_its_secret(case: str, path: str) -> None:
    host = path.partition("/")[0]
    config = yaml.safe_load(tree_of(case)[path])
    prometheus = next(service for service in services_on(case, host) if service.name == "prometheus")
    for job in config["scrape_configs"]:
        named = job.get("authorization", {}).get("credentials_file") or job.get("basic_auth", {}).get(
            "password_file", ""
        )
        secret = named.rpartition("/")[2]
        assert not secret or secret in prometheus.secrets
        assert all(len(entry["targets"]) == 1 for entry in job["static_configs"])
    targets = [
        (target, job.get("metrics_path", ""), entry["labels"].get("__param_model", ""), *_paths(entry))
        for job in config["scrape_configs"]
        for entry in job["static_configs"]
        for target in entry["targets"]
    ]
    assert len(targets) == len(set(targets))


def _paths(entry: dict[str, Any]) -> tuple[str, ...]:
    """The path of a target behind an edge, which names the service."""
    return tuple(value for name, value in entry["labels"].items() if name == "__metrics_path__")


# --- Grafana ----------------------------------------------------------------------------------------------------------

# Grafana 13's pkg/services/provisioning/datasources/types.go: upsertDataSourceFromConfigV1.
GRAFANA_SOURCE = {
    *("orgId", "orgName", "version", "name", "type", "access", "url", "user", "database", "basicAuth", "basicAuthUser"),
    *("withCredentials", "isDefault", "correlations", "jsonData", "secureJsonData", "editable", "uid"),
}
# What its Prometheus data source reads of jsonData: packages/grafana-prometheus/src/types.ts, PromOptions.
GRAFANA_PROMETHEUS = {
    *(
        "httpMethod",
        "timeInterval",
        "manageAlerts",
        "prometheusType",
        "prometheusVersion",
        "cacheLevel",
        "queryTimeout",
    ),
    *("customQueryParameters", "disableRecordingRules", "incrementalQuerying", "exemplarTraceIdDestinations"),
}
# pkg/services/provisioning/dashboards/types.go: configs.
GRAFANA_PROVIDER = {
    *("name", "type", "orgId", "folder", "folderUid", "editable", "options", "disableDeletion"),
    *("updateIntervalSeconds", "allowUiUpdates"),
}
# Of conf/defaults.ini. Grafana ignores an unknown variable without a message.
GRAFANA_SETTINGS = {
    "analytics": {"check_for_plugin_updates", "check_for_updates", "feedback_links_enabled", "reporting_enabled"},
    "auth_anonymous": {"enabled"},
    "dashboards": {"default_home_dashboard_path"},
    "metrics": {"basic_auth_password", "basic_auth_username"},
    "news": {"news_feed_enabled"},
    "plugins": {"plugin_admin_enabled", "preinstall_disabled", "public_key_retrieval_disabled"},
    "security": {"admin_password", "disable_gravatar", "secret_key"},
    "server": {"http_port", "root_url"},
    "snapshots": {"external_enabled"},
    "unified_alerting": {"enabled"},
    "users": {"allow_org_create", "allow_sign_up"},
}
GRAFANA_CASES = [case for case in CASES if any("/grafana/datasources/" in path for path in tree_of(case))]


def grafana_of(case: str) -> tuple[Service, dict[str, Any], dict[str, Any]]:
    """The service, its data sources and where its pages lie."""
    service = next(service for service in services_of(case) if service.component == "grafana")
    kinds = ("datasources", "dashboards")
    files = (yaml.safe_load(tree_of(case)[f"{service.host}/grafana/{kind}/corral.yaml"]) for kind in kinds)
    return (service, *files)


each_grafana = pytest.mark.parametrize("case", GRAFANA_CASES)


def test_grafana_is_where_the_monitoring_is_and_nowhere_else() -> None:
    assert {case for case in CASES if plan_of(case).inventory.monitoring} - set(GRAFANA_CASES) == {"local-everything"}


@each_grafana
def test_grafana_knows_every_key_of_its_data_source(case: str) -> None:
    _, found, _ = grafana_of(case)
    assert found.keys() == {"apiVersion", "datasources"}
    (source,) = found["datasources"]
    assert source.keys() <= GRAFANA_SOURCE
    assert source["jsonData"].keys() <= GRAFANA_PROMETHEUS
    assert (source["type"], source["access"], source["isDefault"]) == ("prometheus", "proxy", True)


@each_grafana
def test_the_data_source_is_the_sites_prometheus_under_the_name_that_pages_use(case: str) -> None:
    service, found, _ = grafana_of(case)
    (source,) = found["datasources"]
    prometheus = next(item for item in services_on(case, service.host) if item.name == "prometheus")
    is_swarm = plan_of(case).inventory.runtime == "swarm"  # one network of names for all hosts
    name = f"{service.host}-prometheus" if is_swarm else "prometheus"
    assert source["url"] == f"http://{name}:{prometheus.ports[0].number}"
    config = yaml.safe_load(tree_of(case)[f"{service.host}/prometheus/prometheus.yml"])
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
    for page in pages_of(case).values():
        chosen = page["templating"]["list"][0]
        assert chosen["type"] == "datasource"
        assert (chosen["query"], chosen["current"]["value"]) == (source["type"], source["uid"])


@each_grafana
def test_grafana_finds_pages_where_they_are_mounted(case: str) -> None:
    service, _, found = grafana_of(case)
    assert found.keys() == {"apiVersion", "providers"}
    (provider,) = found["providers"]
    assert provider.keys() <= GRAFANA_PROVIDER
    assert ("./grafana/pages", provider["options"]["path"]) in service.mounts
    home = service.environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home.removeprefix(f"{provider['options']['path']}/") in pages_of(case)


@each_grafana
def test_a_site_has_the_pages_of_what_is_in_it(case: str) -> None:
    components = {service.component for service in services_of(case)}
    wanted = {"farm.json", "gateway.json"}
    wanted |= {"gpu.json"} if components & {"gpu_exporter", "dcgm_exporter"} else set()
    wanted |= {"host.json"} if "node_exporter" in components else set()
    wanted |= {"keys.json"} if "postgres" in components else set()
    wanted |= {"pool.json"} if "haproxy" in components else set()
    assert pages_of(case).keys() == wanted


def pages_of(case: str) -> dict[str, dict[str, Any]]:
    """Every rendered page by its file's name."""
    files = {path: data for path, data in tree_of(case).items() if "/grafana/pages/" in path}
    return {path.rpartition("/")[2]: json.loads(data) for path, data in files.items()}


@each_grafana
def test_grafana_knows_every_setting(case: str) -> None:
    service, _, _ = grafana_of(case)
    known = {f"GF_{section}_{key}".upper() for section, keys in GRAFANA_SETTINGS.items() for key in keys}
    assert {name.removesuffix("__FILE") for name in service.environment} <= known


@each_grafana
def test_grafana_has_no_password_of_upstreams_and_lets_nobody_in_without_one(case: str) -> None:
    service, _, _ = grafana_of(case)
    given = {name: value for name, value in service.environment.items() if name.endswith("__FILE")}
    assert {Path(value).name for value in given.values()} == set(service.secrets)
    for name in ("SECURITY_ADMIN_PASSWORD", "SECURITY_SECRET_KEY", "METRICS_BASIC_AUTH_PASSWORD"):
        assert f"GF_{name}__FILE" in given
    assert service.environment["GF_METRICS_BASIC_AUTH_USERNAME"]
    off = (
        "AUTH_ANONYMOUS_ENABLED",
        "USERS_ALLOW_SIGN_UP",
        "ANALYTICS_REPORTING_ENABLED",
        "ANALYTICS_CHECK_FOR_UPDATES",
    )
    assert {service.environment[f"GF_{name}"] for name in off} == {"false"}
    assert "way-out" not in service.exceptions


# --- Alertmanager -----------------------------------------------------------------------------------------------------


@pytest.mark.needs("amtool")
@each_file("alertmanager.yml")
def test_amtool_takes_the_configuration(case: str, path: str, folder: Path) -> None:
    config = folder / path
    host = folder / path.partition("/")[0]
    config.write_text(config.read_text().replace("/run/secrets/", f"{host}/secrets/"))
    done = subprocess.run(
        [program("amtool"), "check-config", config], capture_output=True, text=True, check=False, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr


ROUTES = {
    "severity=critical": "ops,mail,phone",
    "severity=warning": "ops",
    "severity=watchdog": "dead-man",
    "severity=none": "nobody",
}


@pytest.mark.needs("amtool")
@pytest.mark.parametrize("labels", ROUTES)
@pytest.mark.parametrize("case", ["everything-on"])
def test_every_severity_reaches_its_receivers_and_nobody_else(case: str, labels: str, folder: Path) -> None:
    config = folder / "gate" / "alertmanager" / "alertmanager.yml"
    command = [str(program("amtool")), "config", "routes", "test", f"--config.file={config}", labels, "alertname=Any"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert done.stdout.strip() == ROUTES[labels]


@pytest.mark.parametrize("case", ["everything-on"])
def test_no_receiver_has_its_secret_in_the_configuration(case: str) -> None:
    config = yaml.safe_load(tree_of(case)["gate/alertmanager/alertmanager.yml"])
    receivers = {receiver["name"]: receiver for receiver in config["receivers"]}
    assert receivers["ops"]["slack_configs"][0]["api_url_file"] == "/run/secrets/SLACK_URL"
    assert receivers["mail"]["email_configs"][0]["auth_password_file"] == "/run/secrets/MAIL_PASSWORD"
    assert receivers["phone"]["webhook_configs"][0]["url_file"] == "/run/secrets/NTFY_URL"
    assert receivers["dead-man"]["webhook_configs"][0]["url_file"] == "/run/secrets/DEADMAN_URL"


# --- LiteLLM ----------------------------------------------------------------------------------------------------------


@each_file("config.yaml")
def test_litellm_ignores_no_key(case: str, path: str) -> None:
    assert unknown_keys(yaml.safe_load(tree_of(case)[path])) == []


STORE = re.compile(r"redis|database_url")


@pytest.mark.parametrize("case", ["least-busy", "direct", "everything-on", "traced"])
def test_litellm_loads_the_configuration(case: str, folder: Path) -> None:
    """One of each way of balancing. Database and cache are left out: it would connect to them at once."""
    path = next(path for _, path in files_named("config.yaml") if path in tree_of(case))
    secrets = folder / path.partition("/")[0] / "secrets"
    config = yaml.safe_load((folder / path).read_text())
    for section in ("general_settings", "router_settings"):
        config[section] = {key: value for key, value in config[section].items() if not STORE.search(key)}
    (folder / path).write_text(yaml.safe_dump(config))
    assert load_with_litellm(folder / path, {file.name: file.read_text() for file in secrets.iterdir()}) == ""


@each_file("config.yaml")
def test_litellm_is_given_every_secret_that_its_configuration_names(case: str, path: str) -> None:
    named = set(re.findall(r"os\.environ/(\w+)", tree_of(case)[path].decode()))
    litellm = next(service for service in services_of(case) if service.role == "gateway")
    own = set(litellm.environment["CORRAL_SECRETS"].split())
    servers = set(litellm.environment["CORRAL_SERVER_KEYS"].split())
    assert named <= own | {f"CORRAL_KEY_{name}" for name in servers}
    assert own | servers <= set(litellm.secrets)
    assert set(litellm.secrets) - own - servers <= CERTIFICATES


@each_file("config.yaml")
def test_every_deployment_has_an_id_of_its_own(case: str, path: str) -> None:
    ids = [entry["model_info"]["id"] for entry in yaml.safe_load(tree_of(case)[path])["model_list"]]
    assert len(ids) == len(set(ids))


# --- llama-server -----------------------------------------------------------------------------------------------------


@each_case
def test_llama_server_knows_every_flag(case: str) -> None:
    """The wheel's server knows them, and the shim in front of it refuses what llama-server does not have."""
    for service, replica in llama_servers(case):
        extra = replica.engine.extra_args or ()
        words = list(service.args[: len(service.args) - len(extra)])
        while words:
            flag = words.pop(0)
            assert flag in OPTIONS, f"{service.name}: {flag}"
            if OPTIONS[flag].takes_value:
                assert words, flag
                words.pop(0)


@each_case
def test_what_llama_server_would_choose_by_itself_is_said(case: str) -> None:
    for service, replica in llama_servers(case):
        found = options(list(service.args))
        for flag in ("--port", "--parallel", "--ctx-size", "--cache-ram", "--fit", "--flash-attn", "--n-gpu-layers"):
            assert flag in found, f"{service.name}: {flag}"
        assert found["--fit"] == "off"
        assert found["--cache-type-k"] == found["--cache-type-v"]
        assert int(found["--cache-ram"]) < service.memory_mib
        assert int(found["--ctx-size"]) == replica.weights.context * replica.slots
        assert {"--metrics", "--no-webui"} <= set(found)


def llama_servers(case: str) -> Iterator[tuple[Service, Replica]]:
    """Every llama-server with its model; a shared one once for each, with the words that this model is started with."""
    site = plan_of(case).site
    for service in services_of(case):
        for replica in site.members(service.host, service.name) if service.component == LLAMA else ():
            yield replace(service, args=arguments(site, replica)) if replica.shared else service, replica


# --- LocalAI ----------------------------------------------------------------------------------------------------------

# Fields of LocalAI 4.9's ModelConfig (core/config/model_config.go: ModelConfig, PredictionOptions, Diffusers).
LOCALAI_FIELDS = {
    "": {"name", "backend", "parameters", "f16", "step", "cuda", "threads", "diffusers", "description"},
    "parameters": {"model"},
    "diffusers": {"cuda", "pipeline_type", "scheduler_type", "enable_parameters", "clip_skip"},
}
# Variables that LocalAI 4.9's `run` reads (core/cli/run.go).
LOCALAI_ENVIRONMENT = {
    "LOCALAI_ADDRESS",
    "LOCALAI_API_KEY",
    "LOCALAI_BACKENDS_PATH",
    "LOCALAI_BACKENDS_SYSTEM_PATH",
    "LOCALAI_CONFIG_DIR",
    "LOCALAI_DATA_PATH",
    "LOCALAI_GENERATED_CONTENT_PATH",
    "LOCALAI_MAX_ACTIVE_BACKENDS",
    "LOCALAI_MODELS_PATH",
    "LOCALAI_THREADS",
}
# backend/python/diffusers/backend.py: DiffusionScheduler.
LOCALAI_SCHEDULERS = {
    *("ddim", "pndm", "heun", "unipc", "euler", "euler_a", "lms", "k_lms", "dpm_2", "k_dpm_2", "dpm_2_a", "k_dpm_2_a"),
    *("dpmpp_2m", "k_dpmpp_2m", "dpmpp_sde", "k_dpmpp_sde", "dpmpp_2m_sde", "k_dpmpp_2m_sde"),
}
# backend/index.yaml; all of them answer to the model file's `backend: diffusers`.
LOCALAI_GALLERY = {"cpu-diffusers", "cuda12-diffusers", "cuda13-diffusers", "rocm-diffusers", "intel-diffusers"}


@each_case
def test_localai_knows_every_field_and_variable(case: str) -> None:
    for service in services_of(case):
        if service.component != "image":
            continue
        model = yaml.safe_load(tree_of(case)[f"{service.host}/image/{service.environment['CORRAL_MODEL_FILE']}"])
        assert model.keys() <= LOCALAI_FIELDS[""]
        assert model["parameters"].keys() <= LOCALAI_FIELDS["parameters"]
        assert model["diffusers"].keys() <= LOCALAI_FIELDS["diffusers"]
        assert model["backend"] == "diffusers"
        assert model["diffusers"]["scheduler_type"] in LOCALAI_SCHEDULERS
        assert {name for name in service.environment if name.startswith("LOCALAI_")} <= LOCALAI_ENVIRONMENT
        assert service.environment["CORRAL_BACKEND"] in LOCALAI_GALLERY


StartLocalAI = Callable[..., tuple[int, list[str]]]
LOCAL_AI = """#!/bin/sh
echo "local-ai $* key=${LOCALAI_API_KEY:-none}" >>"$CALLS"
[ "$1" != backends ] || mkdir -p "$LOCALAI_BACKENDS_PATH/$3"
if [ "$1" = backends ] && [ -e "$FAIL" ]; then exit 1; fi
if [ "$1" = run ] && [ -n "${CORRAL_FIRST_PICTURE:-}" ]; then
    until [ -e "$DRAWN" ]; do sleep 0.05; done
fi
"""
CURL = """#!/bin/sh
case "$*" in
*/readyz) [ -e "$READY" ] || { touch "$READY"; exit 22; } ;;
*) echo "curl $* header=$(cat)" >>"$CALLS"; touch "$DRAWN"; [ ! -e "$FAIL" ] ;;
esac
"""


@pytest.fixture
def start_localai(tmp_path: Path) -> StartLocalAI:
    """Runs LocalAI's start script with a stub program; returns the exit code and the stub's calls."""
    (tmp_path / "bin").mkdir()
    for name, text in (("local-ai", LOCAL_AI), ("curl", CURL)):
        stub = tmp_path / "bin" / name
        stub.write_text(text)
        stub.chmod(0o755)
    (tmp_path / "key").write_text("k3y")
    (tmp_path / "models").mkdir()
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "image-8.yaml").write_text("name: image\n")
    script = tree_of("heartcode")["pea/image/start.sh"].decode().replace("/etc/corral/", f"{tmp_path}/config/")
    environment = {
        "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
        "CALLS": str(tmp_path / "calls"),
        "READY": str(tmp_path / "ready"),
        "DRAWN": str(tmp_path / "drawn"),
        "FAIL": str(tmp_path / "fail"),
        "CORRAL_BACKEND": "cuda12-diffusers",
        "CORRAL_MODEL_FILE": "image-8.yaml",
        "CORRAL_API_KEY_FILE": str(tmp_path / "key"),
        "LOCALAI_MODELS_PATH": str(tmp_path / "models"),
        "LOCALAI_BACKENDS_PATH": str(tmp_path / "backends"),
    }

    def start(**more: str) -> tuple[int, list[str]]:
        (tmp_path / "calls").unlink(missing_ok=True)
        done = subprocess.run(
            ["sh", "-c", script], env=environment | more, capture_output=True, check=False, timeout=DEADLINE_S
        )
        calls = tmp_path / "calls"
        return done.returncode, calls.read_text().splitlines() if calls.exists() else []

    return start


INSTALL = "local-ai backends install cuda12-diffusers key=none"
RUN = "local-ai run key=k3y"


def test_004_48_the_backend_is_installed_once(start_localai: StartLocalAI, tmp_path: Path) -> None:
    assert start_localai() == (0, [INSTALL, RUN])
    assert start_localai() == (0, [RUN])
    assert (tmp_path / "models" / "image-8.yaml").read_text() == "name: image\n"


def test_004_48_an_installation_that_failed_is_done_again(start_localai: StartLocalAI, tmp_path: Path) -> None:
    (tmp_path / "fail").touch()
    assert start_localai() == (1, [INSTALL])
    (tmp_path / "fail").unlink()
    assert start_localai() == (0, [INSTALL, RUN])


def test_another_backend_is_installed_beside_the_first(start_localai: StartLocalAI) -> None:
    start_localai()
    other = "local-ai backends install cpu-diffusers key=none"
    assert start_localai(CORRAL_BACKEND="cpu-diffusers") == (0, [other, RUN])


def test_with_a_backend_in_the_image_nothing_is_installed(start_localai: StartLocalAI) -> None:
    assert start_localai(CORRAL_BACKEND="") == (0, [RUN])


def test_files_of_a_picture_model_have_the_names_that_its_model_file_has(
    start_localai: StartLocalAI, tmp_path: Path
) -> None:
    (tmp_path / "flux 1.gguf").write_text("weights")
    told = f"model.gguf={tmp_path}/flux 1.gguf\nvae.safetensors={tmp_path}/a=e.safetensors"
    assert start_localai(CORRAL_FILES=told) == (78, []), "one is not there"
    (tmp_path / "a=e.safetensors").write_text("colours")
    for _ in range(2):
        assert start_localai(CORRAL_FILES=told)[0] == 0
        assert (tmp_path / "models" / "model.gguf").read_text() == "weights"
        assert (tmp_path / "models" / "vae.safetensors").read_text() == "colours"


READ_CACHE = """
import huggingface_hub
print(huggingface_hub.snapshot_download("segmind/SSD-1B"))
print(open(huggingface_hub.hf_hub_download("segmind/SSD-1B", "unet/config.json")).read())
"""


def test_the_hub_finds_the_pulled_folder_without_a_network(start_localai: StartLocalAI, tmp_path: Path) -> None:
    """By the Hub's own client, which diffusers uses; twice, as after a restart of the container."""
    service = next(service for service in services_of("heartcode") if service.component == "image")
    told = {name: service.environment[name] for name in ("CORRAL_REPOSITORY", "HF_HUB_OFFLINE")}
    folder = tmp_path / "weights" / Path(service.environment["CORRAL_WEIGHTS"]).name
    cache = {"HF_HUB_CACHE": str(tmp_path / "models" / ".hub"), "CORRAL_WEIGHTS": str(folder)}
    assert start_localai(**told, **cache) == (78, [])  # not pulled yet
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text("{}")
    assert start_localai(**told, **cache)[0] == 0
    assert start_localai(**told, **cache)[0] == 0
    done = subprocess.run(
        [sys.executable, "-c", READ_CACHE], env={**os.environ, **told, **cache}, capture_output=True, text=True,
        check=True, timeout=DEADLINE_S,
    )  # fmt: skip
    place, text = done.stdout.splitlines()
    assert (Path(place).resolve(), text) == (folder, "{}")


def test_004_50_a_first_picture_is_asked_for_once_the_server_is_ready(start_localai: StartLocalAI) -> None:
    start_localai()
    service = next(service for service in services_of("heartcode") if service.component == "image")
    wanted = service.environment["CORRAL_FIRST_PICTURE"]
    code, calls = start_localai(CORRAL_FIRST_PICTURE=wanted, LOCALAI_ADDRESS=":5100")
    assert (code, calls[0]) == (0, RUN)
    assert len(calls) == 2
    assert f"-d {wanted} http://localhost:5100/v1/images/generations" in calls[1]
    assert calls[1].endswith("header=Authorization: Bearer k3y")
    assert "k3y" not in calls[1].partition("header=")[0]  # no secret in the list of processes
    assert json.loads(wanted) == {"model": "heartcode-image", "prompt": "a lighthouse", "size": "512x512", "step": 1}


# --- supervisord ------------------------------------------------------------------------------------------------------

READ_PROGRAMS = """
import json, shlex, sys
from supervisor.options import ServerOptions
options = ServerOptions()
options.realize(["-c", sys.argv[1]])
programs = [config for group in options.process_group_configs for config in group.process_configs]
found = {each.name: [shlex.split(each.command), dict(each.environment), str(each.stdout_logfile)] for each in programs}
print(json.dumps(found))
"""


@each_file("supervisord.conf")
def test_supervisord_reads_every_program_as_planned(case: str, path: str, folder: Path) -> None:
    host = path.partition("/")[0]
    here = folder / host
    (here / "logs").mkdir()
    command = [sys.executable, "-c", READ_PROGRAMS, str(folder / path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    planned = {service.name: service for service in services_on(case, host)}
    assert sorted(found) == sorted(planned)
    for name, service in planned.items():
        words, environment, log = found[name]
        assert re.fullmatch("[0-9a-f]{16}", environment.pop(LOCAL_DIGEST))
        assert (words, environment) == as_process(service, str(here)), name
        assert log == f"{here}/logs/{name}.log"


def as_process(service: Service, here: str) -> tuple[list[str], dict[str, str]]:
    """The command line and environment that a planned process must get; awkward variables go through `env`."""
    values = {name: value.replace(HERE, here) for name, value in sorted(service.environment.items())}
    awkward = {name: value for name, value in values.items() if re.search(r"[\"';#]", value)}
    command = [*(service.entrypoint or (service.program,)), *service.args]
    env = ["env", *(f"{name}={value}" for name, value in awkward.items())] if awkward else []
    words = [*env, *(word.replace(HERE, here) for word in command)]
    return words, {name: value for name, value in values.items() if name not in awkward}


def test_supervisord_gets_awkward_words_through(tmp_path: Path) -> None:
    from corral.render.templates import supervisor_command

    words = [
        "a b",
        "100% %(x)s",
        "not ours: %(here)s",
        "; start",
        "mid ; dle",
        "a # b",
        "#x",
        "it's",
        '"q"',
        "$HOME `id` \\ ",
        "",
        "*",
        "ü模🦙",
        "-1",
    ]
    conf = tmp_path / "supervisord.conf"
    conf.write_text(f"[supervisord]\n[program:x]\ncommand = echo {supervisor_command(words)}\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", READ_PROGRAMS, str(conf)], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["x"][0] == ["echo", *words]


# --- sshd -------------------------------------------------------------------------------------------------------------


# Newer than the sshd of Debian 12, and there only for the container's.
NEW_SETTINGS = ("PerSourcePenalties",)


@pytest.mark.needs("sshd")
@pytest.mark.parametrize("path", ["everything-on/gate", "local-everything/here"])
def test_sshd_takes_its_configuration_and_shuts_every_door(path: str, tmp_path: Path) -> None:
    case, _, host = path.partition("/")
    text = tree_of(case)[f"{host}/tunnel/sshd_config"].decode()
    config, key = tmp_path / "sshd_config", tmp_path / "key"
    config.write_text("".join(line for line in text.splitlines(keepends=True) if not line.startswith(NEW_SETTINGS)))
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    command: list[str | Path] = [program("sshd"), "-T", "-f", config, "-h", key]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=DEADLINE_S)
    assert (done.returncode, done.stderr) == (0, "")
    said = dict(line.partition(" ")[::2] for line in done.stdout.splitlines())
    wanted = {
        "allowtcpforwarding": "remote", "permitopen": "none", "permitlisten": "*:2101", "maxsessions": "0",
        "passwordauthentication": "no", "kbdinteractiveauthentication": "no", "permitrootlogin": "no",
        "allowstreamlocalforwarding": "no", "permittunnel": "no", "allowagentforwarding": "no", "x11forwarding": "no",
        "gatewayports": "yes" if case == "everything-on" else "no",
    }  # fmt: skip
    assert {name: said[name] for name in wanted} == wanted


# --- shell scripts ----------------------------------------------------------------------------------------------------


@pytest.mark.needs("shellcheck")
@each_case
def test_shellcheck_finds_nothing_in_rendered_scripts(case: str, folder: Path) -> None:
    scripts = [folder / path for path in tree_of(case) if path.endswith(".sh")]
    assert scripts
    for script in scripts:
        assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
    done = subprocess.run([program("shellcheck"), *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@each_case
def test_shell_words_of_health_checks_parse(case: str) -> None:
    for service in services_of(case):
        command = service.health.command
        if len(command) == 3 and command[0] in {"sh", "bash"}:
            assert subprocess.run([command[0], "-n", "-c", command[2]], check=False).returncode == 0, shlex.join(
                command
            )
