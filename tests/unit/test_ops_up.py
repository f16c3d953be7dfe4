"""`up`, rolling changes, upgrade and history: what they decide, without an engine."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from rich.console import Console

from corral.build import Plan, build_plan
from corral.components import haproxy
from corral.config.load import validate
from corral.config.source import parse
from corral.errors import CorralError, UsageError
from corral.render.tree import render
from corral.runtime.board import Board
from corral.runtime.causes import cause_of
from corral.runtime.docker import Container
from corral.runtime.haproxy import config_digest, keep_known, parse_servers
from corral.runtime.hosts import ComposeHost, Done
from corral.runtime.lock import alone
from corral.runtime.waiting import ABSENT, wait_well
from corral.verbs.archives.container import packed
from corral.verbs.up import history
from corral.verbs.up.order import in_order, phases
from corral.verbs.up.survey import check_engine, survey
from corral.verbs.up.upgrade import parse_choices, with_images
from tests.trees import ROOT

STAT = """\
# pxname,svname,qcur,qmax,scur,smax,status,check_status,check_code,lastsess
pools,FRONTEND,,,2,9,OPEN,,,
chat,box-chat-1,1,3,2,2,UP 1/3,* L7OK,200,12
chat,box-chat-2,0,0,0,2,MAINT,,,-1
chat,BACKEND,4,9,2,4,UP,,,12

1
# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_fqdn srv_port
5 chat 1 box-chat-1 172.19.0.3 2 0 chat-1 8100
5 chat 2 box-chat-2 - 0 1 chat-2 8101
6 far 1 pea-gpu-1 192.0.2.7 2 8 - 8080
3 Successor 1 successor 127.0.0.1 2 0 - 8081

"""


def plan_of(text: str) -> Plan:
    return build_plan(validate(parse(text, "inventory.yaml")))


def default_plan() -> Plan:
    return plan_of((ROOT / "inventory.yaml").read_text())


# --- the balancer's words --------------------------------------------------------------------------------------------


def test_servers_as_the_balancer_sees_them() -> None:
    servers = parse_servers(STAT)
    assert set(servers) == {"box-chat-1", "box-chat-2", "pea-gpu-1"}
    one, two = servers["box-chat-1"], servers["box-chat-2"]
    assert (one.group, one.status, one.in_flight, one.waiting) == ("chat", "UP 1/3", 2, 1)
    assert (one.state, one.check, one.code) == ("UP", "L7OK", 200)
    assert (one.address, one.port, one.is_usable) == ("172.19.0.3", 8100, True)
    assert (two.address, two.is_out, two.is_usable, two.state) == ("", True, False, "MAINT")
    assert servers["pea-gpu-1"].is_out  # drained by hand counts, too


def test_no_servers_in_no_answer() -> None:
    assert parse_servers("") == {}


def test_states_of_servers_that_moved_are_forgotten() -> None:
    state = STAT[STAT.index("1\n#") :]
    places = {"box-chat-1": "chat-1:8100", "box-chat-2": "chat-2:9999", "pea-gpu-1": "192.0.2.8:8080"}
    kept = keep_known(state, places)
    assert "box-chat-1" in kept
    assert "box-chat-2" not in kept
    assert "pea-gpu-1" not in kept
    assert kept.startswith("1\n# be_id")
    assert "pea-gpu-1" in keep_known(state, {"pea-gpu-1": "192.0.2.7:8080"})


def test_the_configuration_says_which_it_is(tmp_path: Path) -> None:
    plan = default_plan()
    first = tmp_path / "one.cfg"
    first.write_bytes(render(plan)["box/haproxy/haproxy.cfg"])
    second = tmp_path / "two.cfg"
    text = (ROOT / "inventory.yaml").read_text().replace("depth: 10", "depth: 9")
    second.write_bytes(render(plan_of(text))["box/haproxy/haproxy.cfg"])
    assert len(config_digest(first)) == 16
    assert config_digest(first) != config_digest(second)
    assert config_digest(tmp_path / "none.cfg") == ""


def test_a_changed_script_is_another_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`up` has HAProxy read its files anew when only a script beside the configuration has changed."""
    text, other = (ROOT / "inventory.yaml").read_text(), tmp_path / "other.lua"
    first, second = tmp_path / "one.cfg", tmp_path / "two.cfg"
    first.write_bytes(render(plan_of(text))["box/haproxy/haproxy.cfg"])
    other.write_text("-- another script")
    monkeypatch.setattr(haproxy, "shipped", lambda _path: other)
    second.write_bytes(render(plan_of(text))["box/haproxy/haproxy.cfg"])
    assert config_digest(first) != config_digest(second)


# --- stages and surveys ----------------------------------------------------------------------------------------------


def test_stages_come_up_from_the_back_to_the_front() -> None:
    found = {phase.title: [item.name for item in services] for phase, services in phases(default_plan()).items()}
    assert found == {
        "edges": [],
        "inference servers": ["chat-1", "chat-2", "embed-1"],
        "stores": ["postgres", "valkey"],
        "balancer": ["haproxy"],
        "gateway": ["litellm"],
        "monitoring": ["node-exporter", "postgres-exporter", "valkey-exporter", "prometheus", "grafana"],
    }


def test_what_others_wait_for_is_restarted_first() -> None:
    plan = default_plan()
    names = [item.name for item in in_order(plan, reversed(plan.services_of("box")))]
    assert names.index("chat-1") < names.index("postgres") < names.index("haproxy") < names.index("litellm")
    assert names.index("litellm") < names.index("postgres-exporter")


@dataclass(frozen=True, slots=True)
class FakeHost(ComposeHost):
    """A host whose commands answer from a table: the first entry whose words are all in the command."""

    answers: Mapping[tuple[str, ...], Done] = field(default_factory=dict)

    def run(self, command: Sequence[str], **_options: object) -> Done:
        line = " ".join(command)
        return next(
            (done for sign, done in self.answers.items() if all(word in line for word in sign)), Done(0, "", "")
        )


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("permission denied while trying to connect to the Docker daemon socket at unix:///x", "group docker"),
        ("Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?", "does not run; sudo"),
        ("docker: 'compose' is not a docker command.", "Compose is not installed"),
        ("sh: 1: docker: command not found", "Docker is not installed"),
    ],
)
def test_an_engine_that_cannot_be_used_is_named_with_the_remedy(tmp_path: Path, words: str, remedy: str) -> None:
    host = FakeHost(default_plan(), "box", tmp_path, answers={("docker version",): Done(1, "", words)})
    with pytest.raises(CorralError, match=remedy) as caught:
        check_engine(host)
    assert str(caught.value).startswith("box: ")


NEW = "a" * 64


def container(service: str, *, digest: str = NEW, image: str = "sha256:1", status: str = "running") -> Container:
    return Container(
        id=f"{service}-{digest}-{status}",
        name=f"box-{service}",
        project="default-box",
        service=service,
        image="x",
        state=status,
        health="healthy",
        image_id=image,
        config_hash=digest,
    )


def test_what_is_missing_changed_and_left_over(tmp_path: Path) -> None:
    plan = default_plan()
    names = [service.name for service in plan.services_of("box")]
    found = [container(name) for name in names if name not in {"valkey", "chat-1", "chat-2", "embed-1"}]
    found += [container("chat-1", digest="0" * 64), container("chat-2", image="sha256:0"), container("chat-9")]
    found += [container("embed-1", status="exited")]
    images = len({service.image for service in plan.services_of("box")})
    answers = {
        ("config", "--hash"): Done(0, "\n".join(f"{name} {NEW}" for name in names), ""),
        ("image inspect",): Done(0, "sha256:1\n" * (images - 1) + "-\n", ""),
    }
    seen = survey(FakeHost(plan, "box", tmp_path, answers=answers), found)
    assert (seen.found["valkey"].container, seen.found["valkey"].is_current) == (ABSENT, False)
    assert (seen.found["embed-1"].container.is_well, seen.found["embed-1"].container.is_up) == (False, False)
    assert seen.found["haproxy"].container.is_well
    changed = {name for name, item in seen.found.items() if item.container.is_up and not item.is_current}
    assert changed == {"chat-1", "chat-2"}
    assert [item.name for item in seen.left_over] == ["box-chat-9"]
    assert len({item.service.image for item in seen.found.values() if not item.image_id}) == 1


def test_two_containers_of_one_service_are_not_as_rendered(tmp_path: Path) -> None:
    """A change that was killed half-way leaves both; Compose sorts it out when it is asked again."""
    found = [container("haproxy", status="exited"), container("haproxy")]
    answers: dict[tuple[str, ...], Done] = {
        ("image inspect",): Done(0, "-\n" * len({s.image for s in default_plan().services_of("box")}), "")
    }
    seen = survey(FakeHost(default_plan(), "box", tmp_path, answers=answers), found)
    assert (seen.found["haproxy"].container.is_up, seen.found["haproxy"].is_current) == (True, False)


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        ("Bind for 127.0.0.1:4000 failed: port is already allocated", "another program holds the port"),
        ('could not select device driver "nvidia" with capabilities: [[gpu]]', "nvidia-container-toolkit"),
        ("Error response from daemon: No such image: a:b", "the image is not there"),
        ("write /var/lib/docker/x: no space left on device", "the disk is full"),
        ("something else", ""),
    ],
)
def test_likely_causes(words: str, cause: str) -> None:
    found = cause_of(words)
    assert cause in (found.words if found else "")
    assert bool(found) == bool(cause)


def test_a_host_without_cards_uses_both_files(tmp_path: Path) -> None:
    host = ComposeHost(default_plan(), "box", tmp_path, is_on_cpu=True)
    assert host.compose_words("up")[-5:] == [
        "--file", f"{tmp_path}/box/compose.yaml", "--file", f"{tmp_path}/box/compose.cpu.yaml", "up",
    ]  # fmt: skip


def test_a_container_without_its_program_is_given_up_at_once(tmp_path: Path) -> None:
    """It restarts again and again; no time limit has to pass."""

    class Host(FakeHost):
        def containers(self) -> list[Container]:
            return [replace(container("chat-1", status="restarting"), restarts=1, exit_code=127)]

    plan = default_plan()
    service = next(item for item in plan.services_of("box") if item.name == "chat-1")
    with pytest.raises(CorralError, match=r"(?s)its program is not in the image.*exit code 127, 1 restarts"):
        wait_well(Host(plan, "box", tmp_path), [service], Board(Console(quiet=True)))


# --- the board -------------------------------------------------------------------------------------------------------


def test_without_a_terminal_every_change_is_a_line_and_details_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    with Board(Console(force_terminal=False, width=200)) as board:
        board.show("box", "chat-1", "draining", "waits for 2 requests")
        board.show("box", "chat-1", "draining", "waits for 1 requests")
        board.show("box", "chat-1", "healthy after 2 s", is_done=True)
        board.say("done")
    assert capsys.readouterr().out.splitlines() == [
        "  box/chat-1: draining (waits for 2 requests)",
        "  box/chat-1: healthy after 2 s",
        "done",
    ]


# --- history ---------------------------------------------------------------------------------------------------------


def test_the_last_renderings_are_kept_once_each(tmp_path: Path) -> None:
    trees = [{"compose.yaml": f"{number}\n".encode()} for number in range(7)]
    for files in trees:
        history.record(tmp_path, "box", files, "name: x\n")
    history.record(tmp_path, "box", trees[6], "name: x\n")
    kept = history.entries(tmp_path, "box")
    assert [entry.number for entry in kept] == [3, 4, 5, 6, 7]
    assert history.load(kept[0]) == {**trees[2], history.INVENTORY: b"name: x\n"}
    history.record(tmp_path, "box", trees[3], "name: x\n")  # gone back to: the newest again, not there twice
    assert [entry.hash for entry in history.entries(tmp_path, "box")] == [
        history.rendering_hash(trees[number]) for number in (2, 4, 5, 6, 3)
    ]
    assert (tmp_path / ".history" / ".gitignore").read_text() == "*\n"


def test_the_one_before_is_the_newest_other_one(tmp_path: Path) -> None:
    assert history.before(tmp_path, "box", {}) is None
    history.record(tmp_path, "box", {"a": b"1"}, "")
    assert history.before(tmp_path, "box", {"a": b"1"}) is None
    history.record(tmp_path, "box", {"a": b"2"}, "")
    entry = history.before(tmp_path, "box", {"a": b"2"})
    assert entry is not None
    assert history.load(entry)["a"] == b"1"
    other = history.before(tmp_path, "box", {"a": b"never came up"})
    assert other is not None
    assert history.load(other)["a"] == b"2"


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    entry = history.record(tmp_path, "box", {"a": b"1"}, "")
    entry.path.write_bytes(packed({"a": b"2"}))
    with pytest.raises(CorralError, match="damaged"):
        history.load(entry)
    entry.path.write_bytes(b"nothing")
    with pytest.raises(CorralError, match="cannot be read"):
        history.load(entry)


def test_a_full_disk_is_named_and_what_was_kept_stays(small_disk: Path) -> None:
    history.record(small_disk, "box", {"a": b"one"}, "inventory")
    _fill(small_disk / "filler")
    with pytest.raises(CorralError, match="cannot be written: No space left on device"):
        history.record(small_disk, "box", {"a": os.urandom(9000)}, "inventory")
    (entry,) = history.entries(small_disk, "box")
    assert history.load(entry)["a"] == b"one"


def test_a_full_disk_keeps_nobody_from_the_lock(small_disk: Path) -> None:
    """`down` has to work when the disk is full."""
    _fill(small_disk / "filler")
    refused = pytest.raises(CorralError, match="another corral is at work here already")
    with alone(small_disk / "lock", "corral up"), refused, alone(small_disk / "lock", "corral up"):
        pass
    assert not (small_disk / "lock").exists()


def _fill(path: Path) -> None:
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))


def test_the_same_files_give_the_same_archive() -> None:
    assert packed({"b": b"1", "a": b"2"}) == packed({"a": b"2", "b": b"1"})


# --- choosing images -------------------------------------------------------------------------------------------------


def test_images_are_written_into_the_inventory_and_comments_stay() -> None:
    text = (ROOT / "inventory.yaml").read_text()
    changed = with_images(text, {"llama-cpu": "example.com/llama:2"})
    assert plan_of(changed).inventory.images == {"llama-cpu": "example.com/llama:2"}
    assert [line for line in text.splitlines() if "#" in line] == [line for line in changed.splitlines() if "#" in line]
    again = with_images(changed, {"llama-cpu": "example.com/llama:3"})
    assert again == changed.replace("llama:2", "llama:3")


@pytest.mark.parametrize("choice", ["llama-cpu", "llama-cpu=", "lama-cpu=x:1"])
def test_a_choice_that_means_nothing_is_refused(choice: str) -> None:
    with pytest.raises(UsageError):
        parse_choices([choice])
