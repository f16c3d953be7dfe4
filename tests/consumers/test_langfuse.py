"""Langfuse as it is rendered, as far as it can be checked without its images: names, secrets, who sees whom."""

from __future__ import annotations

import base64
import json
import subprocess
from pathlib import Path

import pytest
import yaml

from corral.contributions import Service
from corral.plan.networks import networks
from corral.render.secrets import initialise
from tests.trees import plan_of, services_of, tree_of

ROOT = Path(__file__).resolve().parents[2]
CASE = "traced"
START = "/etc/corral/start.sh"
HOST = "box"
NAMES = Path(__file__).with_name("langfuse_variables.txt")
# Variables that start.sh and Node read.
OF_OTHERS = {"CORRAL_SECRETS", "CORRAL_SECRETS_DIR", "NODE_OPTIONS"}


def services() -> dict[str, Service]:
    return {service.name: service for service in services_of(CASE) if service.component == "langfuse"}


def given(service: Service) -> dict[str, str]:
    """Variables that start.sh sets, and the secret that each gets."""
    return dict(pair.split("=") for pair in service.environment.get("CORRAL_SECRETS", "").split())


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of secrets as `secrets init` makes it."""
    out = tmp_path_factory.mktemp("out")
    [report] = initialise({HOST: plan_of(CASE).secrets_of(HOST)}, out)
    assert report.missing == ()
    return out / HOST / "secrets"


@pytest.mark.parametrize("name", ["langfuse", "langfuse-worker"])
def test_langfuse_knows_every_variable_by_name(name: str) -> None:
    lines = NAMES.read_text().splitlines()
    known = {word for line in lines if not line.startswith("#") for word in line.split()}
    service = services()[name]
    assert {*service.environment, *given(service)} - OF_OTHERS <= known


def test_every_secret_that_a_program_is_told_of_is_mounted_and_made_up(secrets: Path) -> None:
    for service in services().values():
        assert set(given(service).values()) <= set(service.secrets)
        assert all((secrets / name).read_text() for name in service.secrets)


def test_keys_are_as_langfuse_wants_them(secrets: Path) -> None:
    key = (secrets / "LANGFUSE_ENCRYPTION_KEY").read_text()
    assert (len(key), len(bytes.fromhex(key))) == (64, 32)
    config = json.loads((secrets / "LANGFUSE_S3_CONFIG").read_text())
    [identity] = config["identities"]
    [credentials] = identity["credentials"]
    web = services()["langfuse"].environment
    assert credentials["accessKey"] == web["LANGFUSE_S3_EVENT_UPLOAD_ACCESS_KEY_ID"]
    assert credentials["secretKey"] == (secrets / "LANGFUSE_S3_KEY").read_text()


def test_the_gateway_comes_with_the_key_of_the_first_project(secrets: Path) -> None:
    litellm = next(service for service in services_of(CASE) if service.role == "gateway")
    headers = (secrets / "OTEL_EXPORTER_OTLP_HEADERS").read_text()
    sent = dict(part.split("=", 1) for part in headers.split(","))
    user, _, password = base64.b64decode(sent["Authorization"].removeprefix("Basic ")).decode().partition(":")
    variables = given(services()["langfuse"])
    assert user == (secrets / variables["LANGFUSE_INIT_PROJECT_PUBLIC_KEY"]).read_text()
    assert password == (secrets / variables["LANGFUSE_INIT_PROJECT_SECRET_KEY"]).read_text()
    assert "OTEL_EXPORTER_OTLP_HEADERS" in litellm.environment["CORRAL_SECRETS"].split()
    assert litellm.environment["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://langfuse:3100/api/public/otel"
    assert litellm.environment["OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"] == "NO_CONTENT"


def test_start_hands_every_secret_to_the_program(secrets: Path) -> None:
    script = tree_of(CASE)[f"{HOST}/langfuse/start.sh"].decode()
    pairs = {"DATABASE_URL": "LANGFUSE_DATABASE_URL", "SALT": "LANGFUSE_SALT"}
    words = " ".join(f"{variable}={secret}" for variable, secret in pairs.items())
    environment = {"PATH": "/usr/bin:/bin", "CORRAL_SECRETS": words, "CORRAL_SECRETS_DIR": str(secrets)}
    done = subprocess.run(
        ["sh", "-c", script, START, "env"], env=environment, capture_output=True, text=True, check=True
    )
    told = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert {variable: told[variable] for variable in pairs} == {
        variable: (secrets / secret).read_text() for variable, secret in pairs.items()
    }
    gone = {**environment, "CORRAL_SECRETS": "SALT=NOT_THERE"}
    failed = subprocess.run(["sh", "-c", script, START, "env"], env=gone, capture_output=True, text=True, check=False)
    assert failed.returncode == 78
    assert "NOT_THERE" in failed.stderr


def test_nobody_but_langfuse_sees_its_stores_and_they_see_nobody() -> None:
    on_host = services_of(CASE)
    seen = {service.name: set(networks(service, on_host)) for service in on_host}
    assert [name for name, names in seen.items() if {"langfuse", "traces"} <= names] == ["langfuse"]
    assert {name for name, names in seen.items() if names == {"traces"}} == set(services()) - {"langfuse"}
    assert {name for name, names in seen.items() if "langfuse" in names} == {"langfuse", "litellm"}
    declared = yaml.safe_load(tree_of(CASE)[f"{HOST}/compose.yaml"])["networks"]
    assert declared["traces"] == {"internal": True}
    assert not any("way-out" in service.exceptions for service in services().values())


def test_nothing_is_told_to_anybody_and_nobody_signs_up() -> None:
    web, worker = (services()[name].environment for name in ("langfuse", "langfuse-worker"))
    assert web["TELEMETRY_ENABLED"] == worker["TELEMETRY_ENABLED"] == "false"
    assert web["AUTH_DISABLE_SIGNUP"] == "true"
    assert "-master.telemetry=false" in services()["langfuse-seaweedfs"].args


def test_only_its_pages_are_published_where_nobody_else_is() -> None:
    published = [(service.name, port.number) for service in services_of(CASE) for port in service.ports if port.publish]
    assert ("langfuse", 3100) in published
    assert len({number for _, number in published}) == len(published)
    assert [name for name, _ in published if name.startswith("langfuse")] == ["langfuse"]


def test_clickhouse_keeps_no_logs_of_itself_but_the_one_that_langfuse_reads() -> None:
    settings = yaml.safe_load(tree_of(CASE)[f"{HOST}/langfuse/clickhouse.yaml"])
    removed = {name for name, value in settings.items() if value == {"@remove": "1"}}
    assert "trace_log" in removed
    assert "ttl" in settings["query_log"]
