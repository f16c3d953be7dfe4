import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from corral.build import Plan, build_plan
from corral.config.load import load_inventory
from corral.errors import Finding
from corral.render import certificates
from corral.render.output import write
from corral.render.secrets import initialise
from corral.render.tree import render
from corral.runtime.causes import causes, explained
from corral.runtime.docker import Container
from corral.runtime.haproxy import Server
from corral.runtime.hosts import ComposeHost, Done
from corral.runtime.observe import Snapshot, observe, parse_cards, parts, short_slot
from corral.runtime.observe import understood as observed
from corral.verbs.doctor import case as case_area
from corral.verbs.doctor import path as path_area
from corral.verbs.doctor.case import ROWS, Answers, Case, sections
from corral.verbs.doctor.report import AREAS, CHECKS, findings
from tests.trees import plan_of

REPOSITORY = Path(__file__).resolve().parents[2]
INVENTORY = """
schema_version: 1
name: site
hosts:
  pea:
    address: 192.0.2.144
    ram_gib: 32
    cpu: {cores: 2, avx: false}
    gpus:
    - {card: p104-100, uuid: GPU-11111111-aaaa}
    - {card: p104-100, pci: "02:00.0"}
    - {card: rtx-3060}
nodes:
  mac: {url: "http://192.0.2.9:8080", engine: mlx, model: m}
  laptop: {dials_in: 2101, engine: mlx, model: m}
models:
  small: {source: hf:example/small/small.gguf, kind: chat, context: 2048, size_gib: 1}
pools:
  chat:
    model: small
    short: gpu
    on: [{host: pea, gpus: 1-3}, {node: mac}, {node: laptop}]
    ports: 8080
    engine: {memory_mib: 2048, memory_swap_mib: 3072}
gateway: {host: pea, database: false, cache: false, tunnel: {}}
"""
NVIDIA = """\
0, GPU-11111111-aaaa-bbbb, 00000000:01:00.0, NVIDIA P104-100, 8192, 5120, 12, 61, 580.95.05, 6.1
1, GPU-22222222-aaaa-bbbb, 00000000:02:00.0, NVIDIA P104-100, 8192, 300, [N/A], 40, 580.95.05, 6.1
2, GPU-33333333-aaaa-bbbb, 00000000:03:00.0, NVIDIA GeForce RTX 3060, 12288, 300, 0, 35, 580.95.05, 8.6
code 0
"""
CARDS, _ = parse_cards(NVIDIA)
AGO = timedelta(hours=3)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    path = tmp_path_factory.mktemp("doctor") / "inventory.yaml"
    path.write_text(INVENTORY)
    return build_plan(load_inventory(path))


@pytest.fixture(scope="module")
def out(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rendered")
    write(render(plan), folder)
    initialise({"pea": plan.secrets_of("pea")}, folder)
    return folder


@pytest.fixture
def case(plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    """Everything is well; tests change one thing."""
    monkeypatch.setattr(ComposeHost, "run", lambda *_, **__: Done(0, "", ""))
    host = ComposeHost(plan, "pea", out)
    containers = tuple(well(plan, service.name) for service in plan.services_of("pea"))
    servers = {item.name: server("UP", 0, "L7OK", 200) for item in plan.contributions.backends}
    hashes = {item.service: item.config_hash for item in containers}
    answers = Answers(stranger=401, health=200, models=200, offered=frozenset(plan.inventory.pools))
    seen = Snapshot("pea", containers=containers, hashes=hashes, servers=servers, cards=CARDS, said=SAID)
    return Case(host, seen, servers, answers)


def server(status: str, busy: int, check: str, code: int) -> Server:
    return Server("chat", "gpu-1", status, busy, 0, "", 8080, is_out=False, check=check, code=code)


def well(plan: Plan, service: str) -> Container:
    planned = next(item for item in plan.services_of("pea") if item.name == service)
    return Container(
        id=service,
        name=planned.container_name,
        project="site-pea",
        service=service,
        image=planned.image,
        state="running",
        health="healthy",
        started=datetime.now(UTC) - AGO,
        config_hash="0" * 64,
        memory_mib=100,
        limit_mib=planned.memory_mib,
        wanted_mib=planned.memory_mib,
        published=tuple((port.publish, port.number) for port in planned.ports if port.publish),
        devices=tuple(claim.device for claim in planned.gpus),
    )


INFO = {
    "ServerVersion": "28.5.2+dfsg4",
    "ClientInfo": {"Plugins": [{"Name": "compose", "Version": "2.40.3-3"}]},
    "MemoryLimit": True,
    "SwapLimit": True,
    "PidsLimit": True,
    "Runtimes": {"runc": {}, "nvidia": {}},
}
CERTIFICATE = f"/etc/ssl/own.pem\tnotAfter={datetime.now(UTC) + timedelta(days=90):%b %d %H:%M:%S %Y} GMT"
# What a machine says that is well.
SAID = {
    "info": json.dumps(INFO),
    "user": "ann\ndocker\ndocker\n",
    "cpu": "x86_64\n2\nflags : sse4_2\n",
    "ram": "MemTotal:       32768000 kB\nSwapTotal:       8388608 kB\n",
    "addresses": '[{"addr_info": [{"local": "127.0.0.1"}, {"local": "192.0.2.144"}]}, {"addr_info": []}]',
    "disks": "engine /dev/sda1 200000000 100000000 92160000  53% /",
    "time-service": "yes\n",
    "modes": "600 .env\n700 secrets\n644 secrets/LLAMA_API_KEY\n",
    "models": "755 4096 - .\n644 1000 47475546 small.gguf\n",
    "certificates": CERTIFICATE,
    "litellm": "1.106.2\n",
}


def found(case: Case, check: str) -> list[Finding]:
    item = CHECKS[check]
    return list(item.findings(case)) if all(case.has(need) for need in item.needs) else []


def with_said(**changes: str) -> Callable[[Case], Case]:
    said = {name.replace("_", "-"): text for name, text in changes.items()}
    return lambda case: replace(case, seen=replace(case.seen, said={**case.seen.said, **said}))


def with_info(**changes: Any) -> Callable[[Case], Case]:
    return with_said(info=json.dumps({**INFO, **changes}))


def with_seen(**changes: Any) -> Callable[[Case], Case]:
    return lambda case: replace(case, seen=replace(case.seen, **changes))


def with_container(service: str, **changes: Any) -> Callable[[Case], Case]:
    def change(case: Case) -> Case:
        containers = tuple(
            replace(item, **changes) if item.service == service else item for item in case.seen.containers
        )
        return replace(case, seen=replace(case.seen, containers=containers))

    return change


def just_started_again(case: Case) -> Case:
    return with_container("gpu-2", restarts=7, started=datetime.now(UTC))(case)


def without_container(service: str) -> Callable[[Case], Case]:
    def change(case: Case) -> Case:
        containers = tuple(item for item in case.seen.containers if item.service != service)
        return replace(case, seen=replace(case.seen, containers=containers))

    return change


def with_server(name: str, server: Server) -> Callable[[Case], Case]:
    return lambda case: replace(case, servers={**case.servers, name: server})


def with_card(index: int, **changes: Any) -> Callable[[Case], Case]:
    cards = tuple(replace(card, **changes) if card.index == index else card for card in CARDS)
    return with_seen(cards=tuple(sorted(cards, key=lambda card: card.index)))


def with_driver(version: str) -> Callable[[Case], Case]:
    return with_seen(cards=tuple(replace(card, driver=version) for card in CARDS))


def with_model(mode: str = "644", size: int = 1000, magic: str = "GGUF") -> Callable[[Case], Case]:
    return with_said(models=f"755 4096 - .\n{mode} {size} {magic.encode().hex()} small.gguf")


def with_image(component: str, image: str) -> Callable[[Case], Case]:
    def change(case: Case) -> Case:
        old = case.plan.contributions
        services = [replace(item, image=image) if item.component == component else item for item in old.services]
        plan = replace(case.plan, contributions=replace(old, services=services))
        return with_said(litellm="")(replace(case, host=replace(case.host, plan=plan)))

    return change


SLOT = "/dev/dri/by-path/pci-0000:03:00.0-render"


def with_device_files(*wanted: str, **there: int) -> Callable[[Case], Case]:
    """GPU 2 is a card of AMD, group 44 is known; these files are on the host, each with the group that owns it."""

    def change(case: Case) -> Case:
        old = case.plan.contributions
        services = [
            replace(item, devices=wanted or ("/dev/kfd", "/dev/dri"), groups=(44,)) if item.name == "gpu-2" else item
            for item in old.services
        ]
        plan = replace(case.plan, contributions=replace(old, services=services))
        devices = "\n".join(f"/dev/{name.replace('_', '/')} {group}" for name, group in there.items())
        return with_said(devices=devices)(replace(case, host=replace(case.host, plan=plan)))

    return change


def both(*changes: Callable[[Case], Case]) -> Callable[[Case], Case]:
    def change(case: Case) -> Case:
        for one in changes:
            case = one(case)
        return case

    return change


OOM = {"state": "exited", "health": "", "exit_code": 137, "was_out_of_memory": True}
DOWN = server("DOWN", 0, "L4CON", 0)
# Keys of a check in its table that are no texts.
OF_CHECK = {"remedy", "needs", "level"}
FAULTS: list[tuple[str, Callable[[Case], Case], str]] = [
    ("host-reachable", with_seen(problem="ssh pea does not connect: Permission denied (publickey)", is_reached=False),
     "publickey"),
    ("engine-answers", with_seen(problem="sh: 1: docker: not found"), "not installed"),
    ("engine-version", with_info(ServerVersion="20.10.24+dfsg1"), "Docker Engine 20.10.24+dfsg1 is older than 25"),
    ("compose-version", with_info(ClientInfo={"Plugins": [{"Name": "compose", "Version": "2.20.0"}]}),
     "Compose 2.20.0 is older than 2.24"),
    ("compose-version", with_info(ClientInfo={"Plugins": [{"Name": "buildx"}]}),
     "no Compose plugin: Docker knows none"),
    ("compose-version", with_info(ClientInfo={"Plugins": [{"Name": "compose", "Err": "permission denied"}]}),
     "no Compose plugin: permission denied"),
    ("compose-version", both(with_device_files(SLOT, dri_renderD128=44),
                             with_info(ClientInfo={"Plugins": [{"Name": "compose", "Version": "2.26.1"}]})),
     "Compose 2.26.1 cannot hand in a card by its PCI slot; 2.30 can"),
    ("limits-supported", with_info(MemoryLimit=False), "does not limit the memory"),
    ("selinux", with_info(SecurityOptions=["name=seccomp", "name=selinux"]), "keeps containers from files"),
    ("limits-supported", with_info(SwapLimit=False), "does not limit the swap"),
    (
        "address",
        with_said(
            addresses='[{"addr_info": [{"local": "127.0.0.1"}, {"local": "192.0.2.7"}, {"local": "172.17.0.1"}]}]'
        ),
        "192.0.2.144 is not an address of this machine; it has 192.0.2.7",
    ),
    ("cpu", with_said(cpu="x86_64\n1\nflags : sse4_2"), "says 2 cores, the machine has 1"),
    ("ram", with_said(ram="MemTotal: 16384000 kB"), "the inventory says 32 GiB of RAM, the machine has 15.6"),
    ("ram", with_said(ram="MemTotal: 4096000 kB"), "the containers may take"),
    ("swap", with_said(ram="MemTotal: 32768000 kB\nSwapTotal: 0 kB"),
     "containers may use 1024 MiB of swap each, the machine has 0"),
    ("disk", with_said(disks="models /dev/a 9 9 512000 99% /\nengine /dev/a 9 9 512000 99% /"),
     "0.5 GiB are left on / (models and engine)"),
    ("clock", with_said(time_service="no"), "no time service"),
    ("clock", with_said(time_service="Leap status     : Not synchronised"), "no time service"),
    ("clock", lambda case: with_said(clock="1800000000.5")(with_seen(moment=1800000090.5)(far(case))), "90 s behind"),
    (
        "ports",
        both(
            without_container("gpu-1"),
            with_said(listeners="LISTEN 0 128 *:8080 *:*", published="a 1->1/tcp\nother 192.0.2.9:8080->80/tcp"),
        ),
        "port 8080 (gpu-1) is taken by the container other",
    ),
    ("gpu-driver", with_seen(cards=(), cards_problem="Failed to initialize NVML: Driver/library version mismatch"),
     "updated under the running kernel module"),
    ("gpu-driver", with_seen(cards=(), cards_problem=""), "nvidia-smi is not on this machine"),
    ("gpu-driver", with_seen(cards_problem="Unable to determine the device handle for GPU0000:03:00.0: GPU is lost."),
     "a card was lost"),
    ("card-errors", with_said(xids="NVRM: Xid (PCI:0000:01:00): 48, x"), "GPU 1 in slot 0000:01:00.0: memory error"),
    ("card-errors", with_said(xids="NVRM: Xid (PCI:0000:09:00): 79, x"),
     "a card in slot 0000:09:00.0: fell off the bus"),
    ("gpu-runtime", with_info(Runtimes={"runc": {}}), "no NVIDIA runtime"),
    ("device-files", with_device_files(SLOT, dri_renderD128=44), f"gpu-2 wants {SLOT}, which this machine lacks"),
    ("device-files", with_device_files(dri_renderD128=44), "gpu-2 wants /dev/kfd, which this machine lacks"),
    ("device-files", with_device_files(kfd=44, dri_renderD128=105), "the device files belong to group 105"),
    ("driver-version", with_driver("535.183.01"), "driver 535.183.01 is too old"),
    ("driver-version", with_driver("590.44.01"), "driver 590.44.01 no longer knows p104-100"),
    ("driver-version", both(with_driver("570.1"), with_image("llama", "x/llama.cpp:server-cuda13-b1")), "needs 580"),
    ("card-there", with_seen(cards=CARDS[1:]), "GPU 1 (UUID GPU-11111111-aaaa) is not in this machine"),
    ("card-there", with_seen(cards=CARDS[:2]), "2 of 3 cards answer"),
    ("card-there", with_card(1, pci="00000000:07:00.0"),
     "GPU 2 (PCI slot 0000:02:00.0) is not in this machine; at that place is GPU-22222222-aaaa-bbbb in slot 0000:07"),
    ("card-order", with_seen(cards=(replace(CARDS[2], index=0), CARDS[0], replace(CARDS[1], index=2))),
     "index 2 is not the card that the inventory means by GPU 3: it is a NVIDIA P104-100, not a rtx-3060"),
    ("card-kind", with_card(0, total_mib=4096), "GPU 1 (NVIDIA P104-100) has 4.0 GiB, the plan counts on 8.0"),
    ("card-kind", with_card(0, compute_capability=(8, 6)), "compute capability 8.6, the plan counts on 6.1"),
    ("running-as-rendered", with_container("gpu-2", config_hash="1" * 64),
     "running with an older configuration: gpu-2"),
    ("secrets-private", with_said(modes="644 .env\n755 secrets"), "others can read .env (mode 644)"),
    ("secrets-private", with_said(modes="600 secrets/LLAMA_API_KEY"), "containers cannot read secrets/LLAMA_API_KEY"),
    ("models", with_said(models=""), "there is no folder"),
    ("models", with_said(models="755 4096 - ."), "small.gguf is not there"),
    ("models", with_model(size=0), "is empty"),
    ("models", with_model(magic="<htm"), "is no GGUF file; it begins with '<htm'"),
    ("models", with_model(mode="600"), "containers cannot read"),
    ("models", with_said(models="700 4096 - .\n644 9 47475546 small.gguf"), "cannot look into"),
    ("certificates", with_said(certificates="/c.pem\tnotAfter=Jan  1 00:00:00 2020 GMT"), "/c.pem ended on"),
    (
        "certificates",
        with_said(
            certificates=f"/c.pem\tnotAfter={datetime.now(UTC) + timedelta(days=5, hours=1):%b %d %H:%M:%S %Y} GMT"
        ),
        "ends in 5 days",
    ),
    ("certificates", with_said(certificates="/c.pem\t"), "cannot be read"),
    ("started", lambda case: replace(case, seen=Snapshot("pea")), "nothing runs here yet"),
    ("running", with_container("gpu-2", **OOM), "gpu-2: container exited (137: out of memory)"),
    ("running", without_container("gpu-2"), "gpu-2: it has no container"),
    ("running", with_container("gpu-2", health="unhealthy", last_check="curl: (28) timed out"),
     "its health check fails: curl: (28) timed out"),
    ("restarts", just_started_again, "gpu-2: started again 7 times"),
    ("memory-limits", with_container("gpu-2", limit_mib=32000), "not in force for gpu-2"),
    ("memory-room", with_container("gpu-2", memory_mib=2040), "2040 of 2048 MiB are taken"),
    (
        "strangers",
        lambda case: replace(
            case,
            seen=replace(
                case.seen,
                containers=(*case.seen.containers, replace(case.seen.containers[0], name="pea-old-1", service="old-1")),
            ),
        ),
        "pea-old-1 is not in the plan",
    ),
    ("litellm-version", with_image("litellm", "ghcr.io/berriai/litellm:v1.83.6"), "CVE-2026-42208"),
    ("litellm-version", with_image("litellm", "ghcr.io/berriai/litellm:v1.82.8"), "malware"),
    ("litellm-version", with_said(litellm="1.82.7"), "the running LiteLLM 1.82.7 carries malware"),
    ("images-pinned", with_image("haproxy", "haproxy:latest"), "can become another one at any time"),
    ("balancer-answers", with_container("haproxy", state="exited", health="", exit_code=1),
     "clients → haproxy does not answer: container exited (1)"),
    ("balancer-answers", lambda case: replace(case, servers={}), "gives no figures"),
    ("replicas-up", both(with_container("gpu-2", **OOM), with_server("pea-gpu-2", DOWN)),
     "chat: HAProxy → pea-gpu-2 refuses the connection on gpu-2:8081: container exited (137: out of memory)"),
    ("replicas-up", with_server("pea-gpu-2", server("DOWN", 0, "L4TOUT", 0)),
     "does not answer on gpu-2:8081, although it is healthy on pea"),
    ("replicas-up", with_server("pea-gpu-2", server("MAINT", 0, "", 0)), "was taken out of the balancer"),
    ("pools-alive", lambda case: replace(case, servers=dict.fromkeys(case.servers, DOWN)), "chat: no replica is up"),
    ("nodes", with_server("mac", server("DOWN", 0, "L4TOUT", 0)),
     "HAProxy → node mac does not answer on 192.0.2.9:8080"),
    ("nodes", with_server("laptop", server("DOWN", 0, "L4CON", 0)),
     "HAProxy → worker laptop refuses the connection on tunnel:2101"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("check", "change", "words"), FAULTS, ids=[f"{check}-{at}" for at, (check, _, _) in enumerate(FAULTS)]
)
def test_a_fault_is_found_with_a_remedy(case: Case, check: str, change: Callable[[Case], Case], words: str) -> None:
    all_found = found(change(case), check)
    matching = [item for item in all_found if words in item.message]
    assert matching, all_found
    assert all(item.remedy for item in matching) or check in ("host-reachable", "limits-supported")


@pytest.mark.parametrize("check", list(CHECKS))
def test_a_host_that_is_well_has_no_finding_but_hints(case: Case, check: str) -> None:
    if check == "rendered":  # compares the rendering itself
        assert found(case, check) == []
    assert [item for item in found(case, check) if item.level != "hint"] == []


@pytest.mark.parametrize("check", ["card-order", "card-kind"])
def test_a_card_of_which_nvidia_smi_knows_no_memory_may_be_the_one(case: Case, check: str) -> None:
    """That of a GB10 is the host's: nvidia-smi prints [N/A]."""
    cards, _ = parse_cards(re.sub(r" \d{4,5}, \d+,", " [N/A], [N/A],", NVIDIA))
    known = found(with_seen(cards=cards)(case), check)

    assert {card.total_mib for card in cards} == {0}

    assert [item for item in known if item.level == "error"] == []


def test_every_check_has_a_fault_in_this_file() -> None:
    elsewhere = {"rendered", "copied", "secrets", "gateway-answers", "key-accepted", "pools-offered", "answers"}
    exposure = {name for name, item in CHECKS.items() if item.section == "exposure"}  # test_exposure.py
    local = {name for name, item in CHECKS.items() if "processes" in item.needs}  # test_local_hosts.py
    assert {check for check, _, _ in FAULTS} | elsewhere | exposure | local == set(CHECKS)


def test_checks_are_in_the_documentation() -> None:
    text = (REPOSITORY / "docs" / "doctor.md").read_text()
    lines = ["| area | id | what must hold | what helps |", "|---|---|---|---|"]
    lines += [f"| {item.section} | `{name}` | {item.demand} | {item.remedy} |" for name, item in CHECKS.items()]
    assert "\n".join(lines) + "\n" in text, "docs/doctor.md: put these lines there"
    assert {item.section for item in CHECKS.values()} == set(AREAS)


def test_every_text_is_used_and_known() -> None:
    sources = "\n".join(path.read_text() for path in Path(case_area.__file__).parent.glob("*.py"))
    texts = {(rule, key) for rows in ROWS.values() for rule, row in rows.items() for key in row.keys() - OF_CHECK}
    assert set(re.findall(r'say\("([^"]+)"', sources)) <= {"/".join(text) for text in texts}
    assert [text for text in texts if not re.search(rf"""["'/]{text[1]}["']""", sources)] == []


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_out(case: Case, plan: Plan, tmp_path: Path) -> Case:
    """A case with a rendered folder that the test may change."""
    write(render(plan), tmp_path)
    initialise({"pea": plan.secrets_of("pea")}, tmp_path)
    return replace(case, host=ComposeHost(plan, "pea", tmp_path))


def test_edited_and_old_files_are_told_apart(own_out: Case) -> None:
    (own_out.host.rendered / "haproxy" / "haproxy.cfg").write_text("mine\n")
    (own_out.host.rendered / "compose.yaml").unlink()
    what = [item.message for item in found(own_out, "rendered")]
    assert what == ["edited by hand: pea/haproxy/haproxy.cfg", "1 file is not as the inventory says"]


def test_nothing_rendered_is_said_so(case: Case, tmp_path: Path) -> None:
    bare = replace(case, host=replace(case.host, out=tmp_path))
    assert [item.message for item in found(bare, "rendered")] == ["nothing is rendered for this host yet"]


def test_secrets_without_value_or_with_another_one(own_out: Case) -> None:
    env = own_out.host.rendered / ".env"
    env.write_text(env.read_text().replace("LLAMA_API_KEY=", "LLAMA_API_KEY=x"))
    assert [item.message for item in found(own_out, "secrets")] == [".env and secrets/ disagree about LLAMA_API_KEY"]
    env.write_text("")
    assert found(own_out, "secrets")[0].message.startswith(
        "no value for LLAMA_API_KEY, TUNNEL_SEED, LITELLM_MASTER_KEY in "
    )
    assert "sk-" not in str(found(own_out, "secrets"))


def far(case: Case) -> Case:
    inventory = case.plan.inventory
    host = inventory.hosts["pea"].model_copy(update={"ssh": "ann@192.0.2.144"})
    site = replace(case.plan.site, inventory=inventory.model_copy(update={"hosts": {"pea": host}}))
    return replace(case, host=replace(case.host, plan=replace(case.plan, site=site)))


def test_a_far_host_with_other_files_or_secrets_is_found(own_out: Case) -> None:
    case = far(own_out)
    paths = [path.relative_to(case.host.rendered) for path in case.host.rendered.rglob("*") if path.is_file()]
    lines = [f"{path}: OK" for path in paths]
    case = with_said(same="\n".join(lines))(case)
    assert found(case, "copied") == found(case, "secrets") == []
    changed = set(lines) - {"compose.yaml: OK", "secrets/LLAMA_API_KEY: OK"}
    case = with_said(same="\n".join(changed))(case)
    assert [item.message for item in found(case, "copied")] == [
        "other files on the host than were rendered here: compose.yaml"
    ]
    assert [item.message for item in found(case, "secrets")] == [
        "the host has another value for LLAMA_API_KEY than this machine"
    ]
    assert [item.level for item in found(with_said(same="")(case), "copied")] == ["hint"]


# --- the way of a request --------------------------------------------------------------------------------------------


MODELS = '{"data": [{"id": "chat"}]}'


def answering(case: Case, *, must_ask: bool = False, body: str = MODELS, **statuses: int) -> Case:
    """The host with what its gateway answers: statuses by path, `stranger` to those without a key; 0 is no answer."""

    def answer(request: httpx.Request) -> httpx.Response:
        name = request.url.path.rpartition("/")[2] if "Authorization" in request.headers else "stranger"
        status = statuses.get(name, 401 if name == "stranger" else 200)
        if not status:
            raise httpx.ConnectError("[Errno 111] Connection refused")
        return httpx.Response(status, text=body)

    def client(place: str, key: str, _limit_s: float) -> httpx.Client:
        headers = {"Authorization": key} if key else {}
        return httpx.Client(base_url=place, headers=headers, transport=httpx.MockTransport(answer))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path_area, "client", client)
        return replace(case, answers=path_area.ask(case.host, must_ask=must_ask))


def test_a_gateway_that_is_well_is_asked_for_its_models_once(case: Case) -> None:
    assert answering(case).answers == case.answers


def test_a_dead_gateway_is_named_with_its_reason(case: Case) -> None:
    silent = answering(case, stranger=0, liveliness=0, models=0)
    (finding,) = found(with_container("litellm", **OOM)(silent), "gateway-answers")
    assert (
        finding.message
        == "clients → litellm does not answer: [Errno 111] Connection refused: container exited (137: out of memory)"
    )
    assert finding.remedy == "raise its memory_mib"
    (finding,) = found(silent, "gateway-answers")
    assert "at http://192.0.2.144:4000, although it is healthy" in finding.message
    assert found(silent, "key-accepted") == []
    (finding,) = found(answering(case, body="<html>"), "gateway-answers")
    assert "another program may have its port" in finding.message
    (finding,) = found(answering(case, liveliness=503), "gateway-answers")
    assert "clients → litellm does not answer at" in finding.message


@pytest.mark.parametrize(("status", "words"), [(401, "refuses LITELLM_MASTER_KEY"), (500, "answers 500 to /v1/models")])
def test_a_key_that_the_gateway_refuses(case: Case, status: int, words: str) -> None:
    assert words in found(answering(case, models=status), "key-accepted")[0].message


def test_a_gateway_open_to_everybody(case: Case) -> None:
    case = answering(case, stranger=200)
    assert [item.message for item in found(case, "key-accepted")] == [
        "the gateway answers 200 without a key: every client may use it"
    ]
    other = replace(case, answers=replace(case.answers or Answers(), offered=frozenset({"other"})))
    assert [item.message for item in found(other, "pools-offered")] == ["the gateway does not offer chat"]


def test_pools_are_asked_only_on_request(case: Case) -> None:
    assert found(answering(case, completions=503), "answers") == []
    (finding,) = found(answering(case, must_ask=True, completions=503), "answers")
    assert finding.message == f"chat: answered 503: {MODELS}"
    (finding,) = found(answering(case, must_ask=True), "answers")
    assert (finding.message[:19], finding.level) == ("chat answered after", "hint")


# --- reasons ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "gguf_init_from_file: failed to open GGUF file '/models/x.gguf' (No such file or directory)",
            "cannot be opened",
        ),
        ("gguf_init_from_reader: invalid magic characters: '<htm', expected 'GGUF'", "damaged"),
        (
            "llama_model_load: error loading model: tensor 'a' data is not within the file bounds, model is corrupted",
            "damaged",
        ),
        ("alloc_buffer: allocating 7000.00 MiB on device 0: cudaMalloc failed: out of memory", "card's memory is full"),
        ("NVRM: Xid (PCI:0000:01:00): 79, pid=1, GPU has fallen off the bus.", "fell off the bus"),
        ("0.01.002 E CUDA error: uncorrectable ECC error encountered", "memory is faulty"),
        ("CUDA error: an illegal memory access was encountered", "its card made an error"),
        ("warning: no usable GPU found, --gpu-layers option will be ignored", "sees no card"),
        ("corral: llama-server was ended (137): busy, but no batch was done for 120 s", "it hung"),
        ("CUDA error: no kernel image is available for execution on the device", "no code for this card"),
        ("CUDA error: the provided PTX was compiled with an unsupported toolchain.", "driver is too old"),
        ('could not select device driver "nvidia" with capabilities: [[gpu]]', "cannot hand out"),
        ("nvidia-container-cli: device error: 7: unknown device: unknown", "is not there"),
        ("nvidia-container-cli: requirement error: unsatisfied condition: cuda>=13.0", "driver is too old"),
        ("listen tcp4 192.0.2.1:4000: bind: cannot assign requested address", "no such address"),
        ("couldn't bind HTTP server socket, hostname: 0.0.0.0, port: 8080", "holds the port"),
        ('FATAL:  password authentication failed for user "corral"', "password differs"),
        ("write /data: no space left on device", "disk is full"),
    ],
)
def test_what_programs_say_is_understood(plan: Plan, line: str, words: str) -> None:
    container = replace(well(plan, "gpu-1"), state="exited", health="", exit_code=1)
    assert words in explained(container, None, f"starting\n{line}\nbye\n").what


def test_every_sign_has_a_remedy() -> None:
    signs = [reason for place in ("container", "process", "docker") for _, reason in causes(place)]
    assert all(sign.what and sign.remedy for sign in signs)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"state": "exited", "health": "", "exit_code": 132}, "container exited (132: illegal instruction)"),
        (
            {"state": "exited", "health": "", "exit_code": 137},
            "container exited (137: killed from outside); it said: bye",
        ),
        ({"state": "exited", "health": "", "exit_code": 0}, "the container was stopped"),
        ({"state": "restarting", "health": "", "exit_code": 1}, "container keeps restarting (1); it said: bye"),
        ({"health": "starting"}, "it is still starting"),
        (
            {"health": "parked", "last_check": "parked: ended 6 times in 60 min, last: no answer for 120 s"},
            "its watchdog does not start it any more (parked: ended 6 times in 60 min, last: no answer for 120 s)",
        ),
        ({"health": "starting", "restarts": 5}, "container keeps ending while it starts (5 times): bye"),
        ({"state": "paused"}, "the container is paused"),
        ({"state": "created", "health": ""}, "the container was made but not started: it was never started"),
    ],
)
def test_states_in_words(plan: Plan, changes: dict[str, Any], words: str) -> None:
    assert explained(replace(well(plan, "gpu-1"), **changes), None, "hello\nbye\n").what.startswith(words)


# --- what programs print ---------------------------------------------------------------------------------------------


def test_nvidia_smi_is_read() -> None:
    assert [(card.index, card.uuid[:12], short_slot(card.pci), card.used_mib, card.use_percent) for card in CARDS] == [
        (0, "GPU-11111111", "0000:01:00.0", 5120, 12),
        (1, "GPU-22222222", "0000:02:00.0", 300, None),
        (2, "GPU-33333333", "0000:03:00.0", 300, 0),
    ]
    assert CARDS[0].compute_capability == (6, 1)


@pytest.mark.parametrize(
    "complaint",
    [
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.",
        "Failed to initialize NVML: Driver/library version mismatch",
        "No devices were found",
    ],
)
def test_nvidia_smi_that_fails_is_quoted(complaint: str) -> None:
    cards, problem = parse_cards(f"{complaint}\ncode 9\n")
    assert (cards, problem) == ((), complaint)


def test_memory_of_both_versions_of_control_groups_is_read() -> None:
    container = {
        "Id": "abc",
        "Name": "/c",
        "State": {"Status": "running", "ExitCode": 0, "OOMKilled": False},
        "Config": {"Image": "i", "Labels": {}},
        "HostConfig": {"Memory": 1048576},
        "NetworkSettings": {},
    }
    for most, limit in (("2097152", 2.0), ("max", None), ("9223372036854771712", None)):
        seen = observed("pea", {"containers": json.dumps([container]), "memory": f"abc 3145728 1048576 {most}"})
        assert (seen.containers[0].memory_mib, seen.containers[0].limit_mib) == (2.0, limit)


def test_a_compose_file_that_cannot_be_read_is_quoted() -> None:
    seen = observed("pea", {"containers": "", "hashes": "open /x/compose.yaml: no such file or directory\n"})
    assert (seen.hashes, seen.hashes_problem) == ({}, "open /x/compose.yaml: no such file or directory")


# --- real programs, and fakes of those that are not here -------------------------------------------------------------


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a shell script before everything else on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    def make(name: str, script: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)

    return make


def asked(plan: Plan, out: Path) -> Case:
    host = ComposeHost(plan, "pea", out)
    return Case(host, observe(host, sections))


@pytest.mark.parametrize(
    ("script", "what", "remedy"),
    [
        ("echo 'sh: 1: docker: not found' >&2; exit 127", "Docker is not installed", "setup"),
        (
            "echo 'Cannot connect to the Docker daemon at unix:///s. Is the docker daemon running?' >&2; exit 1",
            "Docker is installed but does not run",
            "systemctl",
        ),
        (
            "echo 'permission denied while trying to connect to the Docker daemon socket' >&2; exit 1",
            "may not use Docker",
            "usermod -aG docker",
        ),
    ],
)
def test_an_engine_that_does_not_answer(
    plan: Plan, out: Path, fakes: Callable[[str, str], None], script: str, what: str, remedy: str
) -> None:
    fakes("docker", script)
    (finding,) = found(asked(plan, out), "engine-answers")
    assert what in finding.message
    assert remedy in finding.remedy


def test_cards_of_a_fake_nvidia_smi(plan: Plan, out: Path, fakes: Callable[[str, str], None]) -> None:
    fakes("docker", "exit 1")
    lines = NVIDIA.replace("code 0\n", "")
    fakes("nvidia-smi", f"cat <<'END'\n{lines}END")
    case = asked(plan, out)
    assert case.seen.cards == CARDS
    assert [item for item in found(case, "card-order") if item.level != "hint"] == []


def test_errors_of_a_card_in_the_kernels_log(plan: Plan, out: Path, fakes: Callable[[str, str], None]) -> None:
    fakes("docker", "exit 1")
    fakes("dmesg", "exit 1")
    fakes("nvidia-smi", f"cat <<'END'\n{NVIDIA.replace('code 0', '')}END")
    lost = "NVRM: Xid (PCI:0000:02:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
    harmless = "NVRM: Xid (PCI:0000:03:00): 31, pid=1, name=x, Ch 00000010"
    fakes("journalctl", f"cat <<'END'\nNov 27 01:00:00 pea kernel: {lost}\nNov 27 01:00:00 pea kernel: {harmless}\nEND")
    case = asked(plan, out)
    assert case.seen.said["xids"].count("NVRM") == 2
    (finding,) = found(case, "card-errors")
    assert finding.message == "GPU 2 in slot 0000:02:00.0: fell off the bus (Xid 79) since the host was started"
    assert finding.remedy.startswith("reboot the host; if it comes back, reseat")


def test_a_parked_server_is_told_by_its_last_check(plan: Plan) -> None:
    check = {"Start": "2026-11-27T01:00:00.123456789Z", "ExitCode": 1, "Output": "parked: ended 6 times\n"}
    state = {"Status": "running", "ExitCode": 0, "OOMKilled": False, "StartedAt": "2026-11-27T01:00:00.1234561Z"}
    item = {
        "Id": "1", "Name": "/pea-gpu-1", "Config": {"Image": "i"}, "HostConfig": {}, "NetworkSettings": {},
        "State": state | {"Health": {"Status": "starting", "Log": [check]}},
    }  # fmt: skip
    conditions = []
    for started in ("2026-11-27T01:00:00.1Z", "2026-11-27T01:00:00.2Z"):
        state["StartedAt"] = started
        item["State"] = state | {"Health": {"Status": "starting", "Log": [check]}}
        (container,) = observed("pea", {"containers": json.dumps([item])}).containers
        conditions.append(container.condition)
    assert conditions == ["parked", "starting"]
    reason = explained(replace(container, health="parked", last_check="parked: last: CUDA error: x"))
    assert "reset the card" in reason.remedy
    assert reason.remedy.endswith("then ./generate.py restart ")


def test_this_machine_is_understood(plan: Plan, out: Path) -> None:
    case = asked(plan, out)
    assert case.seen.is_reached
    assert case.mib("MemTotal") > 100
    assert re.fullmatch(
        rf"{os.cpu_count()} cores(, AVX|, no AVX)?, \S+ GiB RAM, \S+ GiB free on disk", AREAS["machine"](case)
    )
    assert '"127.0.0.1"' in case.said("addresses")
    assert {line.split()[0] for line in case.said("disks").splitlines()} >= {"rendering", "models"}
    assert {"600 .env", "700 secrets"} <= set(case.said("modes").splitlines())
    assert case.said("models") == case.said("same") == ""


def test_a_far_hosts_files_are_compared_there(plan: Plan, out: Path, tmp_path: Path) -> None:
    case = far(Case(ComposeHost(plan, "pea", out), Snapshot("pea")))
    shutil.copytree(out / "pea", tmp_path / "far")
    (tmp_path / "far" / "compose.yaml").write_text("another one\n")
    (tmp_path / "far" / "secrets" / "LLAMA_API_KEY").write_text("another one")
    script = f"section() {{ printf '\\n\\036%s\\n' $1; }}\n{sections(case.host)}"
    there = script.replace(f"folder={case.host.folder}\n", f"folder={tmp_path}/far\n")
    said = subprocess.run(["sh"], input=there, capture_output=True, text=True, check=False).stdout
    case = with_said(**parts(said))(case)
    assert [item.message for item in found(case, "copied")] == [
        "other files on the host than were rendered here: compose.yaml"
    ]
    assert "LLAMA_API_KEY" in found(case, "secrets")[0].message


def test_certificates_between_hosts_are_told_before_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of("heartcode")
    monkeypatch.setattr(certificates, "VALID", timedelta(days=10))
    initialise({"pea": plan.secrets_of("pea")}, tmp_path)
    (finding,) = found(Case(ComposeHost(plan, "pea", tmp_path), Snapshot("pea")), "certificates")
    assert "EDGE_CERTIFICATE ends in 9 days" in finding.message
    assert (finding.level, finding.remedy) == ("warning", "./generate.py secrets init, then ./generate.py up")


def test_models_and_certificates_on_this_machine(plan: Plan, out: Path, tmp_path: Path) -> None:
    folder = out / "pea" / "models"
    folder.mkdir()
    (folder / "small.gguf").write_bytes(b"GGUF\x03\x00")
    pem = tmp_path / "own.pem"
    words = f"req -x509 -newkey rsa:2048 -nodes -keyout /dev/null -out {pem} -days 9 -subj /CN=x".split()
    subprocess.run(["openssl", *words], check=True, capture_output=True)
    services = [replace(item, mounts=(*item.mounts, (str(pem), "/c.pem"))) for item in plan.contributions.services]
    with_pem = replace(plan, contributions=replace(plan.contributions, services=services))
    case = asked(with_pem, out)
    assert found(case, "models") == []
    assert [item.message for item in found(case, "certificates")] == [f"{pem} ends in 8 days"]


@pytest.mark.parametrize(
    ("line", "holder"),
    [
        ('LISTEN 0      128          192.0.2.144:8080      0.0.0.0:*    users:(("python3",pid=12,fd=3))', ""),
        ('LISTEN 0 128 127.0.0.1:8080 0.0.0.0:* users:(("python3",pid=12,fd=3))', "python3 (pid 12)"),
        ("LISTEN 0 128 127.0.0.1:18080 0.0.0.0:*\nLISTEN 0 128 [::1]:8080 [::]:*", ""),
        ("LISTEN 0 128 127.0.0.53%lo:53 0.0.0.0:*\nLISTEN 0 128 [::]:8080 [::]:*", "a program that only root can see"),
        ("LISTEN 0 128 [::ffff:127.0.0.1]:8080 *:*", "a program that only root can see"),
    ],
)
def test_listeners_of_the_kernel_are_read(case: Case, line: str, holder: str) -> None:
    case = with_said(listeners=line, published="pea-x 192.0.2.144:8081->8080/tcp")(without_container("gpu-1")(case))
    words = [f"port 8080 (gpu-1) is taken by {holder}"] if holder else []
    assert [item.message for item in found(case, "ports")] == words


def test_a_far_host_that_does_not_answer_is_one_finding(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = replace(
        case, seen=Snapshot("pea", "ssh pea does not connect: timed out", is_reached=False), servers={}, answers=None
    )
    assert [item.rule for item in findings(silent)] == ["host-reachable"]


def test_the_cuda_of_an_own_image_is_its_builders_business(case: Case) -> None:
    own = both(with_driver("535.183.01"), with_image("llama", "corral-llama:cuda-61-b11347"))
    assert found(own(case), "driver-version") == []


def test_a_driver_too_old_to_compile_for_the_card_may_stay_under_an_own_image(case: Case) -> None:
    remedies = [
        item.remedy for item in found(with_driver("535.183.01")(case), "driver-version") if "p104" in item.message
    ]
    assert [remedy.partition(", ")[2] for remedy in remedies] == [
        "or build an image with code for the card (docs/own-image.md)"
    ]
