"""The image that a site builds itself (gpu-server/Dockerfile): really compiled, without AVX, served as the farm does.

llama.cpp's source is the one in xllamacpp's sdist, whose hash is in requirements.txt; it becomes a commit of a
repository that the build fetches, as it would from GitHub. Debian 13 from its own packages stands in for
`debian:13-slim`. The CUDA variant is not compiled: its compiler is in no registry of packages. All of this is left out
while tests/compose/own_image.json says that it has passed with the same inputs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from corral.components.llama import API_KEY
from tests.compose.images.build import ensure_debian
from tests.compose.own_image_proof import locked_source
from tests.compose.project import PREFIX, Project, docker, make_models, render_site
from tests.processes.helpers import REPOSITORY, Process, wait_until
from tests.tiny_models import KNOWN_ANSWER, make_chat_model

pytestmark = [
    pytest.mark.needs("docker-engine", "mmdebstrap"),
    pytest.mark.xdist_group("own-image"),
    pytest.mark.compiles,
]

IMAGE, COMPILER, EMULATED = f"{PREFIX}llama:cpu", f"{PREFIX}llama:compiler", f"{PREFIX}llama:emulated"
# QEMU's name of a processor that has SSE 4.2 and nothing later, as the Celeron 3865U.
WITHOUT_AVX = "Nehalem"
EMULATOR = ("--rm", "--init", "--network", "none", "--entrypoint", "qemu-x86_64")
# Where the source is served: the same each time, since the engine keeps what it has built from the same address.
PORT = 19418
BUILD_LIMIT_S = 3000
WHO = dict.fromkeys(("GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME"), "corral")
WHO |= dict.fromkeys(("GIT_AUTHOR_EMAIL", "GIT_COMMITTER_EMAIL"), "corral@example.com")
WHO |= dict.fromkeys(("GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE"), "2026-01-01T00:00:00Z")
WHO |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
# Compiled in less time than -O3 takes; which instructions the compiler may use is a matter of other flags.
QUICKLY = "-DCMAKE_C_FLAGS_RELEASE=-O1 -DCMAKE_CXX_FLAGS_RELEASE=-O1"
INSTRUCTION = re.compile(
    r"^ *[0-9a-f]+:\t(?:(?:rep|repz|repnz|lock|bnd|notrack|data16|cs|ds|es|\{vex\}|\{evex\}) )*(\w+)"
)
REGISTERS = re.compile(r"%[yz]mm\d|%k[0-7]\b")
# Of the instructions that begin with v: these and those of virtual machines (vm…, but for vector moves) are no AVX.
NOT_VECTORS = {"verr", "verw"}
# BMI1 and BMI2: encoded as AVX is, and missing from the same processors. tzcnt is not among them: it is `rep bsf`.
VEX_ON_NUMBERS = {
    "andn", "bextr", "blsi", "blsmsk", "blsr", "bzhi", "mulx", "pdep", "pext", "rorx", "sarx", "shlx", "shrx",
}  # fmt: skip
INVENTORY = """\
schema_version: 1
name: own-image
hosts:
  own: {{address: 127.0.0.1, cpu: {{avx: false}}}}
models:
  tiny: {{source: tiny.gguf, kind: chat, context: 2048, size_gib: 0.01}}
pools:
  chat:
    model: tiny
    on: {{host: own}}
    engine: {{image: "{image}", slots: 2, threads: 1, memory_mib: 512}}
gateway: {{host: own, port: 19419, database: false, cache: false}}
"""


def beyond_plain(lines: Iterable[str]) -> tuple[int, list[str]]:
    """How many instructions a disassembly has, and those that a processor without AVX does not know."""
    count, found = 0, []
    for line in lines:
        match = INSTRUCTION.match(line)
        if match:
            count += 1
            word = match[1]
            is_vector = word[0] == "v" and word not in NOT_VECTORS and not re.match(r"vm(?!ov|ul|in|ax|ask|psad)", word)
            if is_vector or word in VEX_ON_NUMBERS or ("%" in line and REGISTERS.search(line)):
                found.append(line.strip())
    return count, found


def in_compiler(script: str) -> Iterator[str]:
    """What a shell script prints in the image that the program was compiled in, line by line; it has to succeed."""
    words = ["docker", "run", "--rm", "--network", "none", COMPILER, "sh", "-euc", script]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    assert process.returncode == 0, script


@dataclass(slots=True)
class Source:
    """A repository with llama.cpp's source, served."""

    repository: str
    commit: str
    build: str
    base: str

    def docker_build(self, *words: str, **arguments: str) -> subprocess.CompletedProcess[str]:
        """Builds the repository's own Dockerfile from this source."""
        given = {
            "CPU_BASE": self.base,
            "CPU_BUILD_BASE": self.base,
            "CUDA_BASE": self.base,
            "CUDA_BUILD_BASE": self.base,
            "LLAMA_REPOSITORY": self.repository,
            "LLAMA_COMMIT": self.commit,
            "LLAMA_BUILD": self.build,
            **arguments,
        }
        options = [word for name, value in given.items() for word in ("--build-arg", f"{name}={value}")]
        command = ["docker", "build", "--progress", "plain", "--network", "host", *options, *words]
        return subprocess.run(
            [*command, str(REPOSITORY / "gpu-server")],
            capture_output=True, text=True, check=False, timeout=BUILD_LIMIT_S,
        )  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    folder = tmp_path_factory.mktemp("llama")
    base = ensure_debian("trixie")
    sdist = fetch_sdist(folder)
    commit = make_repository(sdist, folder / "llama.cpp")
    words = ["git", "daemon", "--reuseaddr", "--export-all", f"--base-path={folder}", "--listen=127.0.0.1"]
    with Process([*words, f"--port={PORT}", str(folder)], folder / "git.log") as daemon:
        address = f"git://127.0.0.1:{PORT}/llama.cpp"
        probe = ["git", "ls-remote", address, "HEAD"]
        wait_until(lambda: subprocess.run(probe, capture_output=True, check=False).returncode == 0, 30, str(daemon.log))
        build = re.search(r"(\d+)\.tar", sdist.name)
        assert build is not None
        yield Source(address, commit, build[1], base)


def fetch_sdist(folder: Path) -> Path:
    """xllamacpp's source in the locked version; pip refuses what has another hash."""
    wanted = folder / "wanted.txt"
    wanted.write_text(locked_source())
    words = ["--no-deps", "--no-binary", "xllamacpp", "--require-hashes", "-r", str(wanted), "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("xllamacpp-*.tar.gz"))


def make_repository(sdist: Path, folder: Path) -> str:
    """A repository with one commit, the same each time: llama.cpp as it is in the sdist."""
    with tarfile.open(sdist) as archive:
        for member in archive:
            place = member.name.partition("/thirdparty/llama.cpp/")[2]
            if place:
                member.name = place
                archive.extract(member, folder, filter="data")
    for words in (
        ["init", "--quiet"],
        ["add", "--all", "--force", "."],
        ["commit", "--quiet", "--message", sdist.name],
    ):
        subprocess.run(["git", *words], cwd=folder, env={**os.environ, **WHO}, check=True)
    return subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def image(source: Source) -> str:
    """The image, and beside it the stage that it was compiled in."""
    for words in (["--tag", IMAGE], ["--target", "build", "--tag", COMPILER]):
        done = source.docker_build(*words, CMAKE_ARGS=QUICKLY)
        assert done.returncode == 0, done.stderr[-4000:]
    return IMAGE


# --- what is refused before anything is compiled ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"LLAMA_COMMIT": "master"}, "has no commit master, written in full"),
        ({"LLAMA_COMMIT": "0" * 40}, f"has no commit {'0' * 40}"),
        ({"CPU_FLAGS": "SSE42 AVX9"}, "CPU_FLAGS: unknown:  AVX9"),
        ({"BACKEND": "cuda"}, "CUDA_ARCH is missing"),
        ({"BACKEND": "cuda", "CUDA_ARCH": "61"}, "CUDA Toolkit not found"),
    ],
    ids=["branch", "commit", "flag", "no-card", "no-cuda"],
)
def test_a_wrong_argument_is_refused(source: Source, arguments: dict[str, str], words: str) -> None:
    done = source.docker_build("--target", "build", **arguments)
    assert done.returncode != 0
    assert words in done.stderr


# --- the code --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "sample"),
    [
        ("-mavx", "void f(float *a) { for (int i = 0; i < 64; i++) a[i] *= 2; }"),
        ("-mavx512f", "void f(float *a) { for (int i = 0; i < 64; i++) a[i] *= 2; }"),
        ("-mavx512bw", "void f(char *a, char *b) { for (int i = 0; i < 64; i++) if (a[i]) b[i] = 1; }"),
        ("-mf16c", "#include <immintrin.h>\nfloat f(unsigned short a) { return _cvtsh_ss(a); }"),
        ("-mfma", "float f(float a, float b, float c) { return a * b + c; }"),
        ("-mbmi2", "unsigned long f(unsigned long a, int b) { return a << b; }"),
    ],
    ids=lambda value: value.removeprefix("-m") if value.startswith("-m") else "",
)
def test_the_check_sees_what_a_processor_without_avx_does_not_know(image: str, flag: str, sample: str) -> None:
    def disassembled(*flags: str) -> tuple[int, list[str]]:
        code = "printf '%s\\n' '" + sample.replace("\n", "' '") + "' >/tmp/f.c"
        build = f"gcc -O3 {' '.join(flags)} -c /tmp/f.c -o /tmp/f.o"
        return beyond_plain(in_compiler(f"{code}; {build}; objdump --disassemble --no-show-raw-insn /tmp/f.o"))

    count, found = disassembled(flag)
    assert count > 0
    assert found, flag
    if "immintrin" not in sample:
        assert disassembled()[1] == []


def test_neither_the_server_nor_a_library_of_it_has_an_instruction_of_avx(image: str) -> None:
    files = sorted(line.strip() for line in in_compiler("find /app -type f"))
    names = {Path(file).name.partition(".so")[0] for file in files}
    assert {"llama-server", "libllama", "libggml", "libggml-base", "libggml-cpu"} <= names, files
    counts = {}
    for file in files:
        counts[file], found = beyond_plain(in_compiler(f"objdump --disassemble --no-show-raw-insn {file}"))
        assert found == [], (file, len(found), found[:10])
    print(f"{sum(counts.values())} instructions in {len(files)} files: {counts}")  # noqa: T201 - shown with -rP
    assert sum(counts.values()) > 1_000_000, counts
    assert all(counts.values()), counts


# --- the server ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def farm(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The chat server of a rendered farm on this image, which nobody shares containers or ports with."""
    folder = tmp_path_factory.mktemp("own-image")
    inventory = folder / "inventory.yaml"
    inventory.write_text(INVENTORY.format(image=image))
    plan = render_site(inventory, folder)
    make_models(plan, "own", folder / "own" / "models")
    with Project(plan, "own", folder, f"{PREFIX}own-image") as project:
        project.up("chat-1")
        yield project


def test_it_is_well_under_the_settings_of_the_farm(farm: Project) -> None:
    assert farm.states() == {"own-chat-1": "healthy"}
    settings = farm.inspect("own-chat-1")
    assert settings["Config"]["Image"] == IMAGE
    assert settings["Config"]["User"] == "65534:65534"
    assert settings["HostConfig"]["ReadonlyRootfs"] is True
    assert settings["HostConfig"]["CapDrop"] == ["ALL"]


def test_it_answers_what_its_model_knows(farm: Project) -> None:
    port = next(service for service in farm.plan.contributions.services if service.name == "chat-1").health.port
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}]})
    asked = ("exec", "own-chat-1", "curl", "-sS", "-H", f"Authorization: Bearer {farm.secrets[API_KEY]}")
    answer = json.loads(farm.docker(*asked, f"http://localhost:{port}/v1/chat/completions", "-d", body))
    assert answer["choices"][0]["message"]["content"] == KNOWN_ANSWER


def test_it_says_which_build_and_commit_it_is(farm: Project, source: Source) -> None:
    said = farm.docker("exec", "own-chat-1", "sh", "-c", "/app/llama-server --version 2>&1")
    assert source.build in said
    assert source.commit[:7] in said


def test_by_itself_it_runs_as_nobody_and_as_upstreams_images_do(image: str) -> None:
    found = json.loads(subprocess.run(["docker", "inspect", image], capture_output=True, text=True, check=True).stdout)
    settings = found[0]["Config"]
    assert settings["User"] == "65534:65534"
    assert settings["Entrypoint"] == ["/app/llama-server"]
    assert settings["WorkingDir"] == "/app"
    assert "LLAMA_ARG_HOST=0.0.0.0" in settings["Env"]


# --- a processor without AVX -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emulated(image: str) -> str:
    """The image with an emulator of processors in it."""
    install = "apt-get update && apt-get install -y --no-install-recommends qemu-user"
    text = f"FROM {image}\nUSER root\nRUN {install}\nUSER 65534:65534\n"
    command = ["docker", "build", "--quiet", "--network", "host", "--tag", EMULATED, "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=BUILD_LIMIT_S)
    assert done.returncode == 0, done.stderr
    return EMULATED


def test_a_program_with_avx_dies_there(emulated: str, tmp_path: Path) -> None:
    code = "#include <stdio.h>\nint main(int n, char **v) { float f[8]; for (int i = 0; i < 8; i++) f[i] = n + i; "
    (tmp_path / "f.c").write_text(code + 'for (int i = 0; i < 8; i++) printf("%g\\n", f[i] * 2); }\n')
    tmp_path.chmod(0o755)
    ends = {}
    for flag in ("-msse2", "-mavx"):
        docker("run", "--rm", "--volume", f"{tmp_path}:/w", COMPILER, "gcc", "-O3", flag, "/w/f.c", "-o", f"/w/f{flag}")
        words = [*EMULATOR, "--volume", f"{tmp_path}:/w:ro", emulated, "-cpu", WITHOUT_AVX, f"/w/f{flag}"]
        ends[flag] = subprocess.run(["docker", "run", *words], capture_output=True, check=False).returncode
    assert ends == {"-msse2": 0, "-mavx": 132}


def test_the_server_answers_there(emulated: str, tmp_path: Path) -> None:
    make_chat_model(tmp_path / "tiny.gguf", context=1024)
    tmp_path.chmod(0o755)
    name = f"{PREFIX}emulated"
    locked_up = ("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
    server = ("/app/llama-server", "--model", "/w/tiny.gguf", "--port", "8080", "--threads", "1", "--parallel", "1")
    words = (*EMULATOR, "--detach", "--name", name, "--volume", f"{tmp_path}:/w:ro", *locked_up, emulated)
    docker("rm", "--force", name, check=False)
    try:
        docker("run", *words, "-cpu", WITHOUT_AVX, *server)
        asking = ("exec", name, "curl", "-sS", "--fail", "http://localhost:8080")
        wait_until(lambda: bool(docker(*asking[:-1], f"{asking[-1]}/health", check=False)), 300, "an answer to /health")
        body = json.dumps({"messages": [{"role": "user", "content": "hello"}]})
        answer = json.loads(docker(*asking[:-1], f"{asking[-1]}/v1/chat/completions", "-d", body))
        assert answer["choices"][0]["message"]["content"] == KNOWN_ANSWER
    finally:
        docker("rm", "--force", name, check=False)
