"""The farm's surroundings: configuration of one's own, existing networks and proxies, a second farm on the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from corral.build import Plan, build_plan
from corral.checks.policy import check_tree
from corral.config.load import validate
from corral.config.source import parse
from corral.errors import CorralError, SiteError
from corral.render.tree import render
from corral.runtime.hosts import ComposeHost, Done
from corral.verbs.up.survey import check_files, check_names

BASE: dict[str, Any] = {
    "schema_version": 1,
    "name": "site",
    "hosts": {"rig": {"address": "192.0.2.10"}},
    "models": {"a": {"source": "A-1B-Q4_K_M.gguf", "kind": "chat"}},
    "pools": {"chat": {"model": "a", "on": {"host": "rig"}, "aliases": ["default"]}},
    "gateway": {"host": "rig"},
    "monitoring": {"host": "rig"},
}


def laid(own: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """One mapping over another, with the mappings in them merged."""
    both = {key: laid(own[key], over[key]) for key in own.keys() & over.keys() if isinstance(over[key], dict)}
    return own | over | both


def plan_with(**more: Any) -> Plan:
    """The plan of the small site with these sections over it."""
    return build_plan(validate(parse(yaml.safe_dump(laid(BASE, more)), "inventory.yaml")))


def project(**more: Any) -> dict[str, Any]:
    """A rendered file of `rig` as data, by its path."""
    tree = render(plan_with(**more))
    return {path.removeprefix("rig/"): data for path, data in tree.items()}


def data_of(path: str, **more: Any) -> dict[str, Any]:
    """A rendered YAML file of `rig`."""
    found: dict[str, Any] = yaml.safe_load(project(**more)[path])
    return found


def words_of(**more: Any) -> str:
    """What is said of a site that is refused."""
    with pytest.raises(SiteError) as refused:
        plan_with(**more)
    return str(refused.value)


# --- rows 68, 45: `extra` adds ---------------------------------------------------------------------------------------

WHISPER: dict[str, Any] = {
    "model_name": "whisper-1",
    "litellm_params": {"model": "openai/whisper", "api_base": "http://192.0.2.20/v1", "api_key": "os.environ/EAR_KEY"},
}


def test_a_deployment_is_added_to_the_pools() -> None:
    found = data_of("litellm/config.yaml", gateway={"extra": {"model_list": [WHISPER]}})["model_list"]
    assert [item["model_name"] for item in found] == ["chat", "whisper-1"]
    assert found[1]["litellm_params"]["api_key"] == "os.environ/CORRAL_KEY_EAR_KEY"


def test_callbacks_and_other_lists_keep_what_is_there() -> None:
    own = data_of("litellm/config.yaml")["litellm_settings"]
    extra = {"callbacks": ["langfuse", "prometheus"], "success_callback": ["langfuse"], "drop_params": True}
    found = data_of("litellm/config.yaml", gateway={"extra": {"litellm_settings": extra}})["litellm_settings"]
    assert found == own | {
        "callbacks": [*own["callbacks"], "langfuse"], "success_callback": ["langfuse"], "drop_params": True,
    }  # fmt: skip


def test_a_scrape_job_is_added_to_the_kits() -> None:
    job = {"job_name": "router", "static_configs": [{"targets": ["192.0.2.1:9100"]}]}
    own = data_of("prometheus/prometheus.yml")["scrape_configs"]
    assert data_of("prometheus/prometheus.yml", monitoring={"extra": {"scrape_configs": [job]}})["scrape_configs"] == [
        *own,
        job,
    ]


def test_secrets_that_extra_names_are_asked_for_and_handed_over() -> None:
    login = {"username": "reader", "password_file": "/run/secrets/ROUTER_PASSWORD"}
    job = {"job_name": "router", "basic_auth": login, "static_configs": [{"targets": ["192.0.2.1:9100"]}]}
    plan = plan_with(
        gateway={
            "extra": {"model_list": [WHISPER], "environment_variables": {"LANGFUSE_KEY": "os.environ/TRACES_KEY"}}
        },
        monitoring={"extra": {"scrape_configs": [job]}},
    )
    given = {secret.name for secret in plan.secrets_of("rig") if secret.generate == "given"}
    assert given == {"EAR_KEY", "TRACES_KEY", "ROUTER_PASSWORD"}
    services = {service.name: service for service in plan.services_of("rig")}
    assert {"EAR_KEY", "TRACES_KEY"} <= set(services["litellm"].secrets)
    assert services["litellm"].environment["CORRAL_SERVER_KEYS"] == "EAR_KEY LLAMA_API_KEY"
    assert "TRACES_KEY" in services["litellm"].environment["CORRAL_SECRETS"].split()
    assert "ROUTER_PASSWORD" in services["prometheus"].secrets


def test_a_secret_of_the_kits_own_stays_the_kits() -> None:
    own = WHISPER | {"litellm_params": WHISPER["litellm_params"] | {"api_key": "os.environ/LLAMA_API_KEY"}}
    plan = plan_with(gateway={"extra": {"model_list": [own]}})
    assert [item.generate for item in plan.secrets_of("rig") if item.name == "LLAMA_API_KEY"] == ["hex"]


@pytest.mark.parametrize(
    ("section", "extra", "words"),
    [
        ("gateway", {"model_list": [WHISPER | {"model_info": {"id": "chat"}}]}, "with the model_info.id chat; give"),
        ("gateway", {"model_list": [{"model_name": "x"}]}, "an entry here needs litellm_params.model; add it"),
        ("gateway", {"model_list": [WHISPER | {"model_name": "default"}]}, 'the alias "default" belongs to chat'),
        ("gateway", {"model_list": None}, "gateway.extra.model_list: the kit sets this to a list; write a list"),
        ("gateway", {"litellm_settings": {"callbacks": "langfuse"}}, "the kit sets this to a list; write a list"),
        ("gateway", {"litellm_settings": None}, "the kit sets this to a mapping; leave it out"),
        ("gateway", {"general_settings": {"master_key": "os.environ/MY_KEY"}}, "LITELLM_MASTER_KEY in .env is the key"),
        ("gateway", {"router_settings": {"routing_strategy": "simple-shuffle"}}, "set gateway.balancing"),
        ("gateway", {"router_settings": {"model_group_alias": {"default": "other"}}}, 'the kit sets this to "chat"'),
        ("monitoring", {"scrape_configs": [{"job_name": "litellm"}]}, "with the job_name litellm; give yours"),
        (
            "monitoring",
            {"scrape_configs": [{"job_name": "x"}, {"job_name": "x", "scheme": "https"}]},
            "with the job_name x; give yours",
        ),
        ("monitoring", {"global": {"scrape_interval": "5s"}}, "set monitoring.scrape_interval_s"),
        ("monitoring", {"rule_files": "own.yml"}, "the kit sets this to a list; write a list"),
    ],
)
def test_what_would_change_the_kits_own_is_refused_with_its_place(section: str, extra: Any, words: str) -> None:
    said = words_of(**{section: {"extra": extra}})
    assert words in said
    assert f"{section}.extra." in said
    assert said.startswith("inventory.yaml:")
    assert len(said.splitlines()) == 1


def test_a_consumer_may_be_given_a_model_that_extra_adds() -> None:
    plan_with(gateway={"extra": {"model_list": [WHISPER]}}, consumers={"anna": {"pools": ["whisper-1"]}})
    assert 'no pool named "whisper-2"' in words_of(
        gateway={"extra": {"model_list": [WHISPER]}}, consumers={"anna": {"pools": ["whisper-2"]}}
    )


# --- rows 54, 40: what a service has besides -------------------------------------------------------------------------

TRAEFIK = {
    "haproxy": {
        "networks": ["proxy"],
        "labels": {"traefik.enable": "true", "traefik.http.routers.llm.rule": "Host(`llm.example.com`)"},
    },
    "chat-1": {"environment": {"GGML_NOTE": "a"}, "extra_hosts": {"nas": "192.0.2.9"}, "cpuset": "0-15"},
}


def services_of(path: str, **more: Any) -> dict[str, Any]:
    """The services in a rendered Compose file of `rig`."""
    found: dict[str, Any] = data_of(path, **more)["services"]
    return found


def test_a_service_joins_a_network_and_has_labels_for_the_proxy() -> None:
    more = {"hosts": {"rig": {"services": TRAEFIK}}, "gateway": {"address": "127.0.0.1"}}
    networks = data_of("compose.yaml", **more)["networks"]
    assert networks["joined-proxy"] == {"name": "proxy", "external": True}
    service = services_of("haproxy/compose.yaml", **more)["haproxy"]
    assert service["networks"]["joined-proxy"] == {}
    assert "traefik.enable=true" in service["labels"]
    assert {port.rpartition(":")[0].rpartition(":")[0] for port in service["ports"]} == {"127.0.0.1"}
    server = services_of("llama/compose.yaml", **more)["chat-1"]
    assert (server["cpuset"], server["extra_hosts"]) == ("0-15", ["nas=192.0.2.9"])
    assert server["environment"]["GGML_NOTE"] == "a"
    configuration = project(**more)["haproxy/haproxy.cfg"].decode()
    assert "bind haproxy.outside:8404,haproxy.inside:8404,127.0.0.1:8404\n" in configuration
    assert check_tree(plan_with(**more), render(plan_with(**more))) == {"rig": []}


def test_files_of_the_host_are_added_read_only() -> None:
    more = {"hosts": {"rig": {"services": {"prometheus": {"mounts": {"/srv/rules": "/etc/prometheus/own"}}}}}}
    own = {"extra": {"rule_files": ["/etc/prometheus/own/*.yml"]}}
    service = services_of("prometheus/compose.yaml", monitoring=own, **more)["prometheus"]
    assert "/srv/rules:/etc/prometheus/own:ro" in service["volumes"]
    files = data_of("prometheus/prometheus.yml", monitoring=own, **more)["rule_files"]
    assert files[-1] == "/etc/prometheus/own/*.yml"
    assert files[:-1] == data_of("prometheus/prometheus.yml")["rule_files"]
    assert "is not in Prometheus's container" in words_of(monitoring=own)


def test_the_policy_knows_a_network_that_the_inventory_does_not_name() -> None:
    plan = plan_with(hosts={"rig": {"services": TRAEFIK}})
    found = check_tree(plan_with(), render(plan))["rig"]
    assert [finding.rule for finding in found] == ["joined-network"]


@pytest.mark.parametrize(
    ("services", "words"),
    [
        ({"haproxi": {"cpuset": "0"}}, 'no service of rig is called "haproxi"; did you mean "haproxy"?'),
        ({"litellm": {"environment": {"LITELLM_MODE": "DEV"}}}, "the kit sets LITELLM_MODE itself; remove it"),
        ({"chat-1": {"mounts": {"/srv/x": "/etc/corral/start.sh"}}}, "/etc/corral/start.sh is there already; choose"),
        ({"chat-1": {"mounts": {"/etc": "/data/etc"}}}, "is the system's own folder"),
        ({"valkey": {"networks": ["proxy"]}}, ""),
        ({"prometheus": {"networks": ["proxy"]}}, ""),
        ({"haproxy": {"labels": {"com.docker.compose.project": "x"}}}, "is a label of the kit's or of Docker's"),
        ({"haproxy": {"networks": ["-x"]}}, "must be the name of a Docker network"),
        ({"haproxy": {"extra_hosts": {"nas": "nowhere"}}}, "must be an IP address"),
        ({"chat-1": {"cpuset": "all"}}, "must be numbers of processors"),
    ],
)
def test_additions_to_services_are_checked(services: dict[str, Any], words: str) -> None:
    more = {"hosts": {"rig": {"services": services}}}
    assert words in words_of(**more) if words else plan_with(**more)


def test_additions_at_the_wrong_place_are_led_to_the_right_one() -> None:
    said = words_of(gateway={"labels": {"traefik.enable": "true"}, "networks": ["proxy"]})
    assert said.count("it belongs to a service: hosts.….services.haproxy, for instance") == 2


def test_what_has_no_password_joins_no_network() -> None:
    receiver = {"name": "ops", "kind": "slack", "secret": "SLACK_URL"}
    more = {"hosts": {"rig": {"services": {"alertmanager": {"networks": ["proxy"]}}}}}
    said = words_of(monitoring={"receivers": [receiver]}, **more)
    assert "alertmanager has nothing in front of its port, and proxy would reach it" in said


def test_a_local_host_has_no_networks() -> None:
    said = words_of(
        hosts={"rig": {"runtime": "local", "address": "127.0.0.1", "services": {"haproxy": {"networks": ["proxy"]}}}}
    )
    assert "processes of a local host have no networks; remove it" in said


# --- row 66: a second farm on the machine ----------------------------------------------------------------------------


def test_two_sites_on_one_machine_have_no_name_in_common() -> None:
    one = {"hosts": {"rig": {"gpus": {"card": "rtx-3090", "count": 2}}}, "pools": {"chat": {"on": {"gpus": 2}}}}
    two = one | {"name": "sandbox", "container_prefix": "kids"}
    names = [{service.container_name for service in plan_with(**more).contributions.services} for more in (one, two)]
    assert names[0].isdisjoint(names[1])
    assert names[1] == {f"kids-{name}" for name in names[0]}
    units = [{path for path in project(**more) if path.startswith("systemd/")} for more in (one, two)]
    assert units[0].isdisjoint(units[1])
    assert "systemd/corral-sandbox-gpu-power.service" in units[1]
    assert plan_with(**two).contributions.backends[0].name == "kids-rig-chat-2"


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (
            "/rig-litellm project=other-rig other-rig_gateway/",
            "rig-litellm of the Compose project other-rig has a name",
        ),
        ("/rig-haproxy project= bridge/", "rig-haproxy of no Compose project has a name"),
        ("/rig-litellm project=site-rig site-rig_gateway/", ""),
        ("/sql project=web proxy/ proxy/postgres", "sql of the Compose project web has a name of this site's"),
        ("/litellm project= proxy/", "litellm of no Compose project has a name of this site's"),
        ("/sql project=web backend/ backend/postgres", ""),
    ],
)
def test_names_that_are_taken_are_told_before_anything_is_changed(
    seen: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = ComposeHost(plan_with(hosts={"rig": {"services": TRAEFIK}}), "rig", Path())
    monkeypatch.setattr(ComposeHost, "run", lambda *_, **__: Done(0, seen, ""))
    if not words:
        check_names(host)
        return
    with pytest.raises(CorralError, match=words) as refused:
        check_names(host)
    assert "nothing was changed\n  set container_prefix" in str(refused.value)


# --- rows 60, 61: names and IPv6 -------------------------------------------------------------------------------------

SIX: dict[str, Any] = {
    "hosts": {
        "rig": {"address": "fd00:db8::10"},
        "far": {"address": "fd00:db8::20", "hostname": "far.lan", "gpus": {"card": "rtx-3090", "count": 1}},
    },
    "nodes": {"mac": {"url": "http://[fd00:db8::30]:8080", "engine": "mlx", "model": "q"}},
    "pools": {"chat": {"on": [{"host": "far", "gpus": 1}]}, "mac": {"on": {"node": "mac"}}},
}


def test_networks_with_a_way_out_have_ipv6_where_the_site_has() -> None:
    networks = data_of("compose.yaml", **SIX)["networks"]
    routed = {name for name, network in networks.items() if network.get("enable_ipv6")}
    assert routed == {"way-out-haproxy-ipv6", "way-out-prometheus-ipv6"}
    assert not any("enable_ipv6" in network for network in data_of("compose.yaml")["networks"].values())
    configuration = project(**SIX)["haproxy/haproxy.cfg"].decode()
    assert "bind *:4000,[::]:4000 v6only\n" in configuration
    assert "bind ipv4@haproxy.outside:4002,127.0.0.1:4002\n" in configuration


def test_a_host_is_reached_by_its_name_and_opens_ports_on_its_address() -> None:
    plan = plan_with(**SIX)
    assert "server far-chat-1 far.lan:4443 " in project(**SIX)["haproxy/haproxy.cfg"].decode()
    assert "far.lan" in next(item.names for item in plan.secrets_of("far") if item.name == "EDGE_CERTIFICATE")
    edge = yaml.safe_load(render(plan)["far/edge/compose.yaml"])["services"]["edge"]
    assert edge["ports"] == ["[fd00:db8::20]:4443:4443"]
    jobs = data_of("prometheus/prometheus.yml", **SIX)["scrape_configs"]
    assert {target for job in jobs for group in job["static_configs"] for target in group["targets"]} >= {
        "far.lan:4443"
    }


def test_a_name_where_an_address_is_bound_is_refused_with_the_key_for_it() -> None:
    assert "a host's name goes into hostname" in words_of(hosts={"rig": {"address": "gateway.lan"}})


# --- row 57: a house authority ---------------------------------------------------------------------------------------

HOUSE = "/etc/ssl/house/ca.pem"


def test_a_nodes_authority_is_mounted_and_checked() -> None:
    node = {"url": "https://gpu.lan:8443/v1", "engine": "vllm", "model": "q", "ca_file": HOUSE}
    more = {"nodes": {"lab": node}, "pools": {"lab": {"on": {"node": "lab"}}}}
    service = services_of("haproxy/compose.yaml", **more)["haproxy"]
    assert f"{HOUSE}:/etc/corral/authorities/lab.pem:ro" in service["volumes"]
    line = next(it for it in project(**more)["haproxy/haproxy.cfg"].decode().splitlines() if "server lab " in it)
    assert "ssl verify required ca-file /etc/corral/authorities/lab.pem sni str(gpu.lan)" in line
    prometheus = services_of("prometheus/compose.yaml", **more)["prometheus"]
    assert f"{HOUSE}:/etc/corral/authorities/1.pem:ro" in prometheus["volumes"]
    assert prometheus["environment"] == {"SSL_CERT_DIR": "/etc/corral/authorities"}
    assert check_tree(plan_with(**more), render(plan_with(**more))) == {"rig": []}


def test_a_mounted_authority_that_is_not_there_is_told_before_docker_makes_a_folder_of_it(tmp_path: Path) -> None:
    node = {"url": "https://gpu.lan", "model": "q", "ca_file": str(tmp_path / "ca.pem")}
    host = ComposeHost(plan_with(nodes={"lab": node}, pools={"lab": {"on": {"node": "lab"}}}), "rig", tmp_path)
    with pytest.raises(CorralError, match=r"ca[.]pem is not there; nothing was changed"):
        check_files(host)
    (tmp_path / "ca.pem").touch()
    check_files(host)


@pytest.mark.parametrize(
    ("node", "gateway", "words"),
    [
        ({"url": "http://gpu.lan"}, {}, "only a node with an https url has a certificate"),
        ({"url": "https://gpu.lan"}, {"balancing": "direct"}, "balancing: direct has no HAProxy"),
        ({"url": "https://gpu.lan", "ca_file": "ca.pem"}, {}, "must be an absolute path"),
    ],
)
def test_an_authority_without_effect_is_refused(node: dict[str, Any], gateway: dict[str, Any], words: str) -> None:
    own = {"model": "q", "ca_file": HOUSE} | node
    assert words in words_of(nodes={"lab": own}, pools={"lab": {"on": {"node": "lab"}}}, gateway=gateway)


# --- row 59: SELinux ------------------------------------------------------------------------------------

CARD = {"card": "rtx-3090", "uuid": "GPU-12345678"}
FEDORA = {"hosts": {"rig": {"selinux": True, "gpus": [CARD]}}, "pools": {"chat": {"on": {"gpus": 1}}}}


def test_selinux_labels_what_is_mounted_and_leaves_the_systems_files_alone() -> None:
    tree = {path: yaml.safe_load(data) for path, data in project(**FEDORA).items() if path.endswith("compose.yaml")}
    mounts = [
        (name, volume)
        for data in tree.values()
        for name, service in data.get("services", {}).items()
        for volume in service.get("volumes", ())
        if volume.startswith((".", "/"))
    ]
    assert "./models" not in {volume for _, volume in mounts}
    assert ("chat-1", "../models:/models:ro,z") in mounts
    assert ("chat-1", "../secrets/LLAMA_API_KEY:/run/secrets/LLAMA_API_KEY:ro,z") in mounts
    assert {name for name, volume in mounts if not volume.endswith(":ro,z")} == {"node-exporter"}
    services = {name: service for data in tree.values() for name, service in data.get("services", {}).items()}
    assert not any("secrets" in item for item in (*services.values(), tree["compose.yaml"]))
    disabled = {name for name, service in services.items() if "label:disable" in service["security_opt"]}
    assert disabled == {"node-exporter"}
    assert check_tree(plan_with(**FEDORA), render(plan_with(**FEDORA))) == {"rig": []}


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ({"runtime": "local", "address": "127.0.0.1", "selinux": True}, "a local host has no containers"),
    ],
)
def test_settings_of_hosts_without_effect_are_refused(host: dict[str, Any], words: str) -> None:
    assert words in words_of(hosts={"rig": host})


# --- rows 18, 19, 36, 40: threads and flags --------------------------------------------------------------------------


def server_with(**engine: Any) -> dict[str, Any]:
    """The Compose service of a server with these settings, on a host with so many cores."""
    cores = engine.pop("cores", None)
    more = {"hosts": {"rig": {"cpu": {"cores": cores}}}, "pools": {"chat": {"engine": engine}}}
    found: dict[str, Any] = services_of("llama/compose.yaml", **more)["chat-1"]
    return found


@pytest.mark.parametrize(
    ("engine", "http", "pids"),
    [
        ({}, 9, 256),
        ({"threads": 16, "slots": 4}, 12, 256),
        ({"threads": 128}, 9, 329),
        ({"cores": 128, "threads": 8}, 9, 384),
        ({"cores": 256}, 9, 640),
        ({"threads": 128, "extra_args": ["--threads-http", "255"]}, 255, 575),
        ({"threads": 16, "extra_args": ["--threads-batch", "128"]}, 9, 329),
    ],
)
def test_the_limit_of_processes_follows_threads_and_cores(engine: dict[str, Any], http: int, pids: int) -> None:
    service = server_with(**engine)
    words = service["command"]
    assert words.count("--threads-http") == 1
    assert words[words.index("--threads-http") + 1] == str(http)
    assert service["pids_limit"] == pids


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--api-prefix", "/llm"],
            "--api-prefix cuts the server off from the rest of the farm; leave it out; gateway.path",
        ),
        (
            ["--rpc", "192.0.2.11:50052"],
            "--rpc cuts the server off from the rest of the farm; leave it out: the server's",
        ),
        (["--ssl-key-file", "/x"], "--ssl-key-file cuts the server off"),
        (["-fmoe"], 'llama-server has no flag "-fmoe"; leave it out; a flag of a fork, such as ik_llama.cpp'),
        (["-rtr"], 'llama-server has no flag "-rtr"; leave it out; a flag of a fork'),
        (["--thredas-batch", "4"], 'did you mean "--threads-batch"'),
    ],
)
def test_flags_that_break_the_farm_or_are_a_forks(words: list[str], said: str) -> None:
    assert said in words_of(pools={"chat": {"engine": {"extra_args": words}}})


# --- row 65: machines that sleep -------------------------------------------------------------------------------------

SLEEP = {"mac": "02:00:00:00:00:02", "wake_s": 60}
PC = {"url": "http://192.0.2.30:11434", "engine": "ollama", "model": "qwen3:8b", "sleep": SLEEP}


def test_a_sleeping_machine_is_woken_by_the_gateways_host_and_is_no_alarm() -> None:
    more = {"nodes": {"pc": PC}, "pools": {"pc": {"on": {"node": "pc"}}}}
    waker = services_of("waker/compose.yaml", **more)["waker"]
    assert waker["command"][1:] == ["http://127.0.0.1:8404/wanted", "192.0.2.10", "pc=02:00:00:00:00:02"]
    assert waker["network_mode"] == "host"
    assert "127.0.0.1:8404:8404" in services_of("haproxy/compose.yaml", **more)["haproxy"]["ports"]
    assert '["pc"] = { "pc", },' in project(**more)["haproxy/farm.lua"].decode()
    rules = data_of("prometheus/rules/inventory.yml", **more)["groups"][0]["rules"]
    asleep = [rule["labels"] for rule in rules if rule["record"].endswith("may_sleep")]
    assert asleep == [{"host": "pc", "pool": "pc", "replica": "pc"}]
    assert check_tree(plan_with(**more), render(plan_with(**more))) == {"rig": []}
    assert not any(path.startswith("waker/") for path in project())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"hosts": {"rig": {"sleep": SLEEP}}}, "rig has work while it is not asked for"),
        ({"nodes": {"pc": PC}, "gateway": {"balancing": "direct"}}, "only HAProxy in Docker holds requests"),
        (
            {"nodes": {"pc": PC | {"sleep": SLEEP | {"wake_s": 90}}}},
            "wait for 60 s, and pc needs 90 to wake; write queue",
        ),
        ({"nodes": {"pc": PC | {"sleep": {"mac": "02-00"}}}}, "must be the address of a network card"),
    ],
)
def test_sleep_that_cannot_work_is_refused(more: dict[str, Any], words: str) -> None:
    pools = {"pools": {"pc": {"on": {"node": "pc"}}}} if "nodes" in more else {}
    assert words in words_of(**more, **pools)


@pytest.mark.parametrize("said", ["--ui", "--no-ui", "--webui"])
def test_the_servers_own_page_is_off_unless_it_is_asked_for(said: str) -> None:
    assert "--no-webui" in server_with()["command"]
    words = server_with(extra_args=[said])["command"]
    assert (words[-1], "--no-webui" in words) == (said, False)
