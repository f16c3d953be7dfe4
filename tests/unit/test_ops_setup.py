"""`setup` against machines of straw: fake commands on PATH say what is there and write down what is done to them."""

from __future__ import annotations

import io
import os
import pwd
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from corral.build import Plan, build_plan
from corral.cli import main
from corral.config.load import load_inventory
from corral.declarations import ASSETS
from corral.errors import CorralError
from corral.render.secrets import read_env
from corral.render.templates import Tree
from corral.render.tree import render
from corral.runtime.hosts import compose_hosts
from corral.verbs.setup import setup as ops_setup
from corral.verbs.setup.setup import Setup

UUIDS = [f"GPU-0000000{number}-abcd-0000-0000-000000000000" for number in range(3)]
SITE = """\
schema_version: 1
name: straw
hosts:
  box: {gpus: [{card: p104-100, power_limit_w: 90}, {card: p104-100}]}
models:
  tiny: {source: "hf:example/tiny/tiny.gguf", kind: chat, context: 512, size_gib: 0.01}
pools:
  chat: {model: tiny, on: {host: box, gpus: 1-2}}
gateway: {host: box, database: false, cache: false}
"""


def card(number: int) -> str:
    """What nvidia-smi prints of a card."""
    return f"{number}, {UUIDS[number]}, 00000000:0{number + 1}:00.0, P104-100, 8192, 0, 0, 30, 580.95.05, 6.1\n"


NODE = """\
nodes:
  far: {url: "http://192.0.2.7:8080", model: far, api_key: FAR_KEY}
"""
DOCKER = r"""#!/bin/sh
echo "docker $*" >>"$STATE/calls"
case "$1 $2" in
"version --format") [ -e "$STATE/engine" ] || { echo "$ENGINE_SAYS" >&2; exit 1; }; cat "$STATE/engine" ;;
"compose version") [ -e "$STATE/compose" ] || { echo "no such command" >&2; exit 1; }; cat "$STATE/compose" ;;
"info --format") cat "$STATE/runtimes" ;;
"image inspect") grep -qxF "$3" "$STATE/images" ;;
"pull --quiet") case "$3" in *"$NO_IMAGE"*) echo "manifest unknown" >&2; exit 1 ;; esac; echo "$3" >>"$STATE/images" ;;
*) exit 99 ;;
esac
"""
SMI = r"""#!/bin/sh
echo "nvidia-smi $*" >>"$STATE/calls"
[ -e "$STATE/cards" ] || { echo "NVIDIA-SMI has failed: no driver" >&2; exit 9; }
cat "$STATE/cards"
"""
SYSTEMCTL = r"""#!/bin/sh
echo "systemctl $*" >>"$STATE/calls"
case "$1" in
is-enabled) grep -qxF "$3" "$STATE/enabled" ;;
enable) echo "$2" >>"$STATE/enabled" ;;
esac
"""
TEST = r"""#!/bin/sh
[ "$2" = /run/systemd/system ] && exec /usr/bin/test -e "$STATE/systemd"
exec /usr/bin/test "$@"
"""


@dataclass
class Straw:
    """A machine of straw and the site that is to be set up on it."""

    folder: Path
    plan: Plan
    said: str = ""

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def tree(self) -> Tree:
        return render(self.plan)

    @property
    def calls(self) -> list[str]:
        """Everything that was done to the machine since the last time somebody asked."""
        path = self.state / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def set(self, name: str, text: str | None) -> None:
        path = self.state / name
        path.unlink(missing_ok=True) if text is None else path.write_text(text)

    def setup(self, **options: Any) -> bool:
        """Runs `setup`; whether it went through. What it said is in `said`."""
        spoken = io.StringIO()
        talk = Console(file=spoken, width=300)
        options.setdefault("units_folder", str(self.folder / "units"))
        try:
            Setup(render(self.plan), talk, **options).run(compose_hosts(self.plan, self.out))
        except CorralError as error:
            talk.print(str(error))
            return False
        finally:
            self.said = spoken.getvalue()
        return True

    def put_models(self) -> None:
        (self.out / "box" / "models" / "tiny.gguf").write_text("weights")


Make = Callable[..., Straw]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Hosts of every `up` that setup asked for."""
    calls: list[list[str]] = []
    monkeypatch.setattr(ops_setup, "up", lambda _plan, _out, _talk, hosts: calls.append(list(hosts)))
    return calls


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: list[list[str]]) -> Make:
    def build(site: str = SITE, *, without: tuple[str, ...] = ()) -> Straw:
        (tmp_path / "site.yaml").write_text(site)
        straw = Straw(tmp_path, build_plan(load_inventory(tmp_path / "site.yaml")))
        programs = {"docker": DOCKER, "nvidia-smi": SMI, "systemctl": SYSTEMCTL, "test": TEST}
        programs["nvidia-container-runtime-hook"] = "#!/bin/sh\n"
        (tmp_path / "bin").mkdir()
        straw.state.mkdir()
        for name in ("sh", "cat", "mkdir", "mv", "id", "uname", "grep", "find", "rm", "sort"):
            (tmp_path / "bin" / name).symlink_to(
                f"/bin/{name}" if Path(f"/bin/{name}").exists() else f"/usr/bin/{name}"
            )
        for name, text in programs.items():
            if name not in without:
                (tmp_path / "bin" / name).write_text(text)
                (tmp_path / "bin" / name).chmod(0o755)
        for name, text in {
            "engine": "28.5.2\n",
            "compose": "2.40.3\n",
            "runtimes": '{"runc":{}} []\n',
            "images": "",
            "enabled": "",
            "cards": card(0) + card(1),
        }.items():
            straw.set(name, text)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        monkeypatch.setenv("STATE", str(straw.state))
        monkeypatch.setenv("NO_IMAGE", "//")
        monkeypatch.setenv("ENGINE_SAYS", "Cannot connect to the Docker daemon. Is the docker daemon running?")
        return straw

    return build


def mutating(calls: list[str]) -> list[str]:
    """Calls that change something."""
    looks = (
        "docker version",
        "docker compose version",
        "docker info",
        "docker image inspect",
        "nvidia-smi --query",
        "systemctl is-enabled",
    )
    return [call for call in calls if not call.startswith(looks)]


# --- from nothing to running -----------------------------------------------------------------------------------------


def test_a_dry_run_tells_all_and_does_nothing(make: Make, started: list[list[str]]) -> None:
    straw = make()
    straw.set("systemd", "")
    assert straw.setup(dry_run=True, units=True)
    for words in (
        "✓ Docker engine: 28.5.2",
        "✓ graphics cards: 2 (P104-100)",
        "→ rendering: write",
        "→ secrets: make 2 values",
    ):
        assert words in straw.said
    for words in (
        "→ models folder: make",
        "→ images: pull 3 of 3",
        "→ systemd units: install",
        "✗ model files: 1 of 1",
    ):
        assert words in straw.said
    assert mutating(straw.calls) == []
    assert not straw.out.exists()
    assert not (straw.folder / "units").exists()
    assert started == []


def test_step_by_step_until_a_person_has_to_act_and_then_to_the_end(make: Make, started: list[list[str]]) -> None:
    straw = make()
    assert not straw.setup()
    assert "stopped before: model files" in straw.said
    assert "tiny.gguf  from hf:example/tiny/tiny.gguf" in straw.said
    assert "see ✗ above; when it is done, run the same command again" in straw.said
    images = sorted({service.image for service in straw.plan.services_of("box")})
    assert mutating(straw.calls) == [f"docker pull --quiet {image}" for image in images]
    assert (straw.out / "box" / "compose.yaml").exists()
    assert (straw.out / "box" / ".env").stat().st_mode & 0o777 == 0o600
    assert started == []

    secrets = read_env(straw.out / "box" / ".env")
    straw.put_models()
    assert straw.setup()
    assert mutating(straw.calls) == []
    assert started == [["box"]]
    assert read_env(straw.out / "box" / ".env") == secrets

    assert straw.setup()
    assert "→" not in straw.said.replace("→ start", "")
    assert mutating(straw.calls) == []


def test_nothing_is_ever_pruned_or_removed() -> None:
    texts = [path.read_text() for path in Path(ops_setup.__file__).parent.glob("*.py")]
    assert not [
        word
        for word in ("prune", "image rm", "volume", "--volumes", "unlink", "rm -")
        for text in texts
        if word in text
    ]


def test_interrupted_pulls_go_on_where_they_stopped(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    straw = make()
    first, second, third = sorted({service.image for service in straw.plan.services_of("box")})
    monkeypatch.setenv("NO_IMAGE", second)
    assert not straw.setup()
    assert f"box: no image {second}; is its name right" in straw.said
    assert "manifest unknown" in straw.said
    straw.calls.clear()
    monkeypatch.setenv("NO_IMAGE", "//")
    straw.setup()
    pulls = [call for call in straw.calls if call.startswith("docker pull")]
    assert pulls == [f"docker pull --quiet {image}" for image in (second, third)]
    assert first in (straw.state / "images").read_text()


# --- what is missing -------------------------------------------------------------------------------------------------


def test_without_an_engine_the_commands_are_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    straw = make(without=("docker",))
    assert not straw.setup()
    assert "✗ Docker engine: not installed" in straw.said
    assert "apt-get install" in straw.said or "docs.docker.com/engine/install" in straw.said
    assert "| sh" not in straw.said
    assert "the steps after this one cannot look yet" in straw.said
    assert not straw.out.exists()


@pytest.mark.parametrize(
    ("name", "text", "says", "words"),
    [
        (
            "engine",
            None,
            "permission denied while trying to connect to the docker API",
            ("this user may not use it", "usermod -aG docker"),
        ),
        (
            "engine",
            None,
            "Cannot connect to the Docker daemon",
            ("does not answer: Cannot connect", "systemctl enable --now docker"),
        ),
        ("engine", "24.0.7", "", ("24.0.7 is too old; 25 is the oldest that works", "install")),
        ("compose", "2.21.0", "", ("2.21.0 is too old; 2.24 is the oldest that works", "install")),
        ("compose", None, "", ("✗ Docker Compose: not installed", "install")),
        (
            "cards",
            None,
            "",
            ("nvidia-smi fails: NVIDIA-SMI has failed: no driver", "580 is the last driver branch that knows p104-100"),
        ),
        (
            "cards",
            card(0),
            "",
            ("the driver sees 1 of 2", "nvidia-smi -L"),
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_remedy(
    make: Make, monkeypatch: pytest.MonkeyPatch, name: str, text: str | None, says: str, words: tuple[str, ...]
) -> None:
    straw = make()
    straw.set(name, text)
    monkeypatch.setenv("ENGINE_SAYS", says)
    assert not straw.setup()
    for part in words:
        assert part in straw.said
    assert mutating(straw.calls) == []


def test_without_the_container_toolkit_its_commands_are_told(make: Make) -> None:
    straw = make(without=("nvidia-container-runtime-hook",))
    assert not straw.setup()
    assert "✗ NVIDIA container toolkit: the engine cannot hand cards to containers" in straw.said
    assert "sudo nvidia-ctk runtime configure --runtime=docker" in straw.said
    straw.set("runtimes", '{"nvidia":{"path":"nvidia-container-runtime"},"runc":{}} []\n')
    straw.setup()
    assert "✓ NVIDIA container toolkit" in straw.said


def test_secrets_that_only_a_person_knows_are_asked_for(make: Make) -> None:
    straw = make(
        SITE.replace("models:\n", f"{NODE}models:\n").replace("gpus: 1-2}", "gpus: 1-2}}\n  far: {on: {node: far}")
    )
    assert not straw.setup()
    assert "stopped before: secrets" in straw.said
    assert "only you know FAR_KEY" in straw.said
    (straw.out / "box" / ".env").write_text("FAR_KEY=given\n")
    straw.setup()
    assert (straw.out / "box" / "secrets" / "FAR_KEY").read_text() == "given"


def test_files_edited_by_hand_are_not_written_over(make: Make) -> None:
    straw = make()
    straw.setup()
    compose = straw.out / "box" / "compose.yaml"
    compose.write_text(compose.read_text() + "# mine\n")
    assert not straw.setup()
    assert "stopped before: rendering" in straw.said
    assert "./generate.py render --force --host box" in straw.said
    assert compose.read_text().endswith("# mine\n")


# --- cards by name ---------------------------------------------------------------------------------------------------


def with_card(what: str) -> str:
    return SITE.replace("{card: p104-100, power_limit_w: 90}", f"{{card: p104-100, {what}}}")


def test_uuids_are_offered_for_cards_known_by_index(make: Make) -> None:
    straw = make()
    straw.setup(dry_run=True)
    assert f"GPU 1: uuid: {UUIDS[0]}" in straw.said
    assert f"GPU 2: uuid: {UUIDS[1]}" in straw.said


@pytest.mark.parametrize(
    "what",
    [f"uuid: {UUIDS[0]}", f"uuid: {UUIDS[0].upper()}", 'pci: "01:00.0"', 'pci: "0000:01:00.0"'],
)
def test_a_named_card_that_is_there_is_fine(make: Make, what: str) -> None:
    straw = make(with_card(what))
    straw.setup(dry_run=True)
    assert "✓ graphics cards" in straw.said
    assert "GPU 1: uuid" not in straw.said


@pytest.mark.parametrize("what", [f"uuid: {UUIDS[2]}", 'pci: "09:00.0"'])
def test_a_named_card_that_is_gone_is_found(make: Make, what: str) -> None:
    straw = make(with_card(what))
    assert not straw.setup()
    assert "is not there; write into the inventory what is" in straw.said
    assert f"0: {UUIDS[0]} at 00000000:01:00.0, P104-100" in straw.said


def test_a_card_known_by_slot_needs_the_hook(make: Make) -> None:
    straw = make(with_card('pci: "01:00.0"'), without=("nvidia-container-runtime-hook",))
    straw.set("runtimes", '{"runc":{}} [{"Source":"cdi","ID":"nvidia.com/gpu=0"}]\n')
    assert not straw.setup()
    assert "the engine hands out cards by CDI, which knows no PCI slots" in straw.said
    assert "give GPU 1 a uuid in the inventory" in straw.said


# --- systemd ---------------------------------------------------------------------------------------------------------


def test_units_are_installed_enabled_and_then_left_alone(make: Make) -> None:
    straw = make()
    straw.set("systemd", "")
    straw.setup(units=True)
    units = straw.folder / "units"
    assert (units / "corral-straw.service").read_bytes() == render(straw.plan)["box/systemd/corral-straw.service"]
    drop_in = (units / "corral-straw.service.d" / "folder.conf").read_text()
    assert drop_in == f"[Service]\nWorkingDirectory={(straw.out / 'box').resolve()}\n"
    done = [call for call in mutating(straw.calls) if call.startswith("systemctl")]
    assert done == [
        "systemctl daemon-reload",
        "systemctl enable corral-gpu-power.service",
        "systemctl enable corral-straw.service",
        "systemctl restart corral-gpu-power.service",
    ]
    straw.setup(units=True)
    assert "✓ systemd units: corral-gpu-power.service and corral-straw.service are installed and enabled" in straw.said
    assert not [call for call in mutating(straw.calls) if call.startswith("systemctl")]


def test_a_unit_of_another_site_is_left_alone(make: Make) -> None:
    straw = make()
    straw.set("systemd", "")
    straw.setup(units=True)
    power = straw.folder / "units" / "corral-gpu-power.service"
    theirs = power.read_text().replace('from the inventory "straw"', 'from the inventory "other"')
    power.write_text(theirs)
    assert not straw.setup(units=True)
    assert "belongs to the site other; set container_prefix" in straw.said
    assert power.read_text() == theirs


def test_the_timer_of_figures_is_installed_for_this_kit_and_inventory(make: Make) -> None:
    straw = make(SITE + "monitoring: {host: box}\n")
    straw.set("systemd", "")
    straw.setup(units=True)
    units = straw.folder / "units"
    for kind in ("service", "timer"):
        name = f"corral-straw-figures.{kind}"
        assert (units / name).read_bytes() == straw.tree[f"box/systemd/{name}"]
    drop_in = (units / "corral-straw-figures.service.d" / "folder.conf").read_text()
    *_, user, reset, command = drop_in.splitlines()
    words = shlex.split(command.removeprefix("ExecStart="))
    assert user == f"User={pwd.getpwuid(os.getuid()).pw_name}"
    assert reset == "ExecStart="
    assert words[1:4] == [str(ASSETS / "generate.py"), "figures", "--scheduled"]
    paths = ["--inventory", str((straw.folder / "site.yaml").resolve()), "--out", str(straw.out.resolve())]
    assert words[4:] == [*paths, "--host", "box"]
    done = [call for call in mutating(straw.calls) if call.startswith("systemctl")]
    assert done[-3:] == [
        "systemctl enable corral-straw-figures.timer",
        "systemctl restart corral-gpu-power.service",
        "systemctl restart corral-straw-figures.timer",
    ]
    straw.setup(units=True)
    assert not [call for call in mutating(straw.calls) if call.startswith("systemctl")]


def test_without_units_systemd_is_left_alone(make: Make) -> None:
    straw = make()
    straw.set("systemd", "")
    straw.setup()
    assert "systemd units" not in straw.said
    assert not [call for call in straw.calls if call.startswith("systemctl")]


def test_a_machine_without_systemd_is_told_so(make: Make) -> None:
    straw = make()
    straw.setup(units=True)
    assert "this machine does not run systemd; the containers come back by their restart policy" in straw.said


def test_units_need_root(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    straw = make()
    straw.set("systemd", "")
    for name, text in {"id": "echo 1000", "sudo": 'echo "sudo: a password is required" >&2; exit 1'}.items():
        (straw.folder / "bin" / name).unlink(missing_ok=True)
        (straw.folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (straw.folder / "bin" / name).chmod(0o755)
    assert not straw.setup(units=True)
    assert "let this user use sudo without a password, or run setup as root" in straw.said
    assert "a password is required" in straw.said


# --- far hosts, and the command line ---------------------------------------------------------------------------------


def test_a_far_host_is_set_up_over_ssh(make: Make, started: list[list[str]]) -> None:
    straw = make(
        SITE.replace("box: {", "box: {address: 192.0.2.10, ssh: someone@192.0.2.10, folder: FOLDER, ").replace(
            "FOLDER", "corral-far"
        )
    )
    ssh = straw.folder / "bin" / "ssh"
    ssh.write_text(f'#!/bin/sh\nfor last; do :; done\ncd {shlex.quote(str(straw.folder))} && exec /bin/sh -c "$last"\n')
    ssh.chmod(0o755)
    for name in ("tar", "chmod"):
        (straw.folder / "bin" / name).symlink_to(f"/bin/{name}")
    assert not straw.setup()
    far = straw.folder / "corral-far"
    assert (far / "compose.yaml").read_bytes() == (straw.out / "box" / "compose.yaml").read_bytes()
    assert (far / "secrets" / "LLAMA_API_KEY").exists()
    assert (far / "models").is_dir()
    assert "1 of 1 missing in corral-far/models" in straw.said
    (far / "models" / "tiny.gguf").write_text("weights")
    assert straw.setup()
    assert started == [["box"]]


def test_a_far_host_that_does_not_answer_is_told(make: Make) -> None:
    straw = make(SITE.replace("box: {", "box: {address: 192.0.2.10, ssh: someone@192.0.2.10, "))
    ssh = straw.folder / "bin" / "ssh"
    ssh.write_text('#!/bin/sh\necho "Connection timed out" >&2\nexit 255\n')
    ssh.chmod(0o755)
    assert not straw.setup()
    assert "✗ machine: box: ssh someone@192.0.2.10 does not connect" in straw.said
    assert "try: ssh someone@192.0.2.10 true" in straw.said


def test_an_unknown_option_is_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["setup", "--skip-clean"]) == 2
    assert "No such option: --skip-clean" in capsys.readouterr().err


def test_an_unknown_host_is_usage(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    straw = make()
    assert main(["setup", "--inventory", str(straw.folder / "site.yaml"), "--host", "bix"]) == 2
    assert 'no host named "bix"; did you mean "box"?' in capsys.readouterr().err


def test_the_verb_takes_its_options(
    make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    straw = make()
    monkeypatch.chdir(straw.folder)
    mask = os.umask(0o022)
    try:
        assert main(["setup", "--dry-run", "--inventory", "site.yaml", "--out", str(straw.out), "--host", "box"]) == 0
    finally:
        os.umask(mask)
    said = capsys.readouterr()
    assert said.out == ""
    assert "✓ Docker engine: 28.5.2" in said.err
