"""What is wanted: the one YAML file that a person writes, as typed and described models.

The JSON Schema, the reference page and the editor's help are all made from the descriptions in this file.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    StringConstraints,
    create_model,
    field_validator,
    model_validator,
)

from corral.config.card_names import card_name
from corral.config.file_names import file_of, hub_source
from corral.config.source import plain_yaml
from corral.contributions import SYSTEM_ROOTS, is_system_folder, plain_path
from corral.declarations import USUAL, InferenceServer, server_of, servers
from corral.errors import shown

SCHEMA_VERSION = 1
MAX_GPUS = 1024
MAX_DIGITS = 4
GPU_EXAMPLE = 'write for instance 3, 1-3 or "1-3,5"'
MAX_LAYERS = 9999
NO_VARIABLES = "variables have no value here; write the value itself"
BROADCAST = ipaddress.IPv4Address("255.255.255.255")
MAX_PARTS = 1000
LAST_PORT = 65535
DAY_S = 86_400
PAIR = 2
TIB_MIB = 1024 * 1024
# Endings of picture models in one file.
PICTURE_FILES = (".safetensors", ".gguf")
# What the lock calls a host's `models_dir`.
OWN_FOLDER = "models"


# What ends the address of a route, not of a server.
_ROUTE = re.compile(
    r"/((chat/)?completions|embeddings|messages|responses|v1/models|api/(chat|generate|tags)|v1/traces)/?$"
)


class Pattern(NamedTuple):
    """A pattern for texts, and the words that say what it wants."""

    expression: str
    # What the text has to be, as `must be …`.
    words: str
    remedy: str
    # Whether a message may show the text.
    is_shown: bool = True


_ROWS: dict[str, dict[str, Any]] = plain_yaml(Path(__file__).with_name("patterns.yaml").read_bytes())
PATTERNS = {name: Pattern(**row) for name, row in _ROWS.items()}


def _text(pattern: str) -> StringConstraints:
    """A text that matches one of the patterns."""
    return StringConstraints(pattern=PATTERNS[pattern].expression)


# --- what values have to be ------------------------------------------------------------------------------------------


def _address(value: str) -> str:
    """An IP address that other hosts can use; Docker publishes ports on nothing else."""
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        raise ValueError(f"must be an IP address, such as 192.0.2.10; {_about_address(value)}") from None
    mapped = getattr(address, "ipv4_mapped", None)
    if mapped is not None:
        raise ValueError(f"is an IPv4 address in IPv6's spelling; write {mapped}")
    if address.is_unspecified or address.is_multicast or address.is_link_local or "%" in value or address == BROADCAST:
        raise ValueError(
            "must be one address of this host; the other hosts reach it there, and ports are open only there"
        )
    return str(address)


def _about_address(value: str) -> str:
    """What to write instead of a text that is no IP address."""
    if value == "localhost":
        return "write 127.0.0.1, where no other machine is part of the site"
    if found := re.search(r"\d+(\.\d+){3}", value):
        return f"write {found[0]} alone"
    return NO_VARIABLES if "$" in value else "a host's name goes into hostname"


def _name_or_address(value: str) -> str:
    """A name or an IP address under which others reach a host."""
    if re.fullmatch(PATTERNS["host_name"].expression, value):
        return value
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        raise ValueError("must be a name that DNS may know or an IP address, such as farm.example.com") from None


def _folder(value: str) -> str:
    """A folder for files of the farm: none of the system's, and none that another path only leads to."""
    if ".." in value.split("/"):
        raise ValueError("has `..` in it; write the folder that is meant")
    if plain_path(value) in SYSTEM_ROOTS or is_system_folder(value):
        raise ValueError("is the system's own folder; write one for the farm alone, such as /srv/models")
    return value


def _absolute(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError("is relative; write the whole path, from / on")
    return plain_path(value)


def _network(value: str) -> str:
    try:
        found = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise ValueError("must be an address or a network, such as 192.0.2.7 or 172.18.0.0/16") from None
    if not found.prefixlen:
        raise ValueError("is every address: any client could say what its own is; name the proxy's")
    return str(found)


def _own_label(value: str) -> str:
    if value.startswith(("corral.", "com.docker.")):
        raise ValueError("is a label of the kit's or of Docker's; choose another name")
    return value


def _url(value: str) -> str:
    port = re.search(r":(\d+)(/|$)", value.removeprefix("http").removeprefix("s").removeprefix("://"))
    if port and not 0 < int(port[1]) <= LAST_PORT:
        raise ValueError(f"there is no port {port[1]}; ports go from 1 to {LAST_PORT}")
    if route := _ROUTE.search(value):
        raise ValueError(f"is the address of one route; write the base address: {value[: route.start()]}")
    return value


def _moment(value: str) -> str:
    """A day or a moment, as ISO 8601 writes it; without a zone it is UTC."""
    try:
        datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("must be a day or a moment; write for instance 2027-01-31 or 2027-01-31T18:00:00Z") from None
    return value


def _without_password(value: Any) -> Any:
    """A url without a user; the message does not repeat what it refuses."""
    if isinstance(value, str) and "@" in value:
        raise ValueError("has a user or password in it; name the key in api_key and put its value into .env")
    return value


def _version(value: Any) -> Any:
    if type(value) is not int:
        raise ValueError(f"must be a number without quotes; write schema_version: {SCHEMA_VERSION}")
    return value


def _layers(value: Any) -> Any:
    """Layers as a number or `all`; both alternatives in one message."""
    if value is None or value == "all" or (type(value) is int and 0 <= value <= MAX_LAYERS):
        return value
    every = "; for every layer write all" if type(value) is int else ""
    raise ValueError(f"must be a whole number from 0 to {MAX_LAYERS}, or all{every}")


def _tensor_pattern(value: str) -> str:
    """A regular expression for names of tensors, as llama-server's list of pairs can have it."""
    if "=" in value or "," in value:
        raise ValueError("has a sign in it that parts the pairs of --override-tensor; write one pattern, without =CPU")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"must be a regular expression for names of tensors: {error}") from None
    return value


def _shares(value: tuple[float, ...]) -> tuple[float, ...]:
    if not any(value):
        raise ValueError("gives no card a share; write a number above 0 for at least one")
    return value


def parse_gpu_numbers(value: Any) -> Any:
    """GPU numbers from `3`, `1-3` or `1-3,5`, as a list; lists are left as they are."""
    if isinstance(value, list | tuple):
        return value
    if not isinstance(value, int | str) or isinstance(value, bool):
        raise ValueError(f"must be a GPU number or range; {GPU_EXAMPLE}")  # noqa: TRY004 - for pydantic
    return [number for part in str(value).split(",") for number in _gpu_range(part.strip())]


def _gpu_range(text: str) -> range:
    first, dash, last = text.partition("-")
    if not (text.isascii() and first.isdecimal() and (last.isdecimal() or not dash)):
        raise ValueError(f"{shown(text)} is no GPU number or range; {GPU_EXAMPLE}")
    if len(first) > MAX_DIGITS or len(last) > MAX_DIGITS or max(int(first), int(last or first)) > MAX_GPUS:
        raise ValueError(f"GPU numbers go up to {MAX_GPUS}")
    if int(first) == 0:
        raise ValueError("there is no GPU 0; GPUs count from 1")
    if dash and int(last) < int(first):
        raise ValueError(f'"{text}" runs backwards; write {last}-{first}')
    return range(int(first), int(last or first) + 1)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, Mapping) else value


def _models(value: Any) -> Any:
    """Models by name; a list of names is short for models that differ in nothing else."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        return value
    if len(set(value)) < len(value):
        raise ValueError("names a model twice")
    return {name: {} for name in value}


def _places(value: Any) -> Any:
    """Places as a list; `auto` is one that the plan chooses."""
    return [{"auto": True}] if value == "auto" else _as_list(value)


# --- types of values -------------------------------------------------------------------------------------------------

Name = Annotated[str, _text("name")]
CardName = Annotated[str, BeforeValidator(card_name, json_schema_input_type=str), _text("name")]
ModelName = Annotated[str, _text("model_name")]
ConsumerName = Annotated[str, _text("consumer_name")]
SecretName = Annotated[str, _text("secret_name")]
Variable = Annotated[str, _text("variable")]
Header = Annotated[str, _text("header")]
Line = Annotated[str, _text("line")]
Word = Annotated[str, _text("word")]
Period = Annotated[str, _text("period")]
Revision = Annotated[str, _text("revision")]
Sha256 = Annotated[str, _text("sha256")]
Folder = Annotated[str, _text("folder"), AfterValidator(_folder)]
Server = Annotated[str, BeforeValidator(_without_password), _text("url"), AfterValidator(_url)]
_AS_TEXT = BeforeValidator(lambda it: str(it) if isinstance(it, float) else it, json_schema_input_type=str | float)
Capability = Annotated[str, _AS_TEXT, _text("capability")]
Address = Annotated[str, AfterValidator(_address)]
Mhz = Annotated[int, Field(ge=1, le=10_000)]
HostName = Annotated[str, _text("host_name")]
Network = Annotated[str, AfterValidator(_network)]
PortNumber = Annotated[int, Field(ge=1, le=LAST_PORT)]
Mib = Annotated[int, Field(ge=16, le=64 * TIB_MIB)]
Gib = Annotated[float, Field(gt=0, le=65536)]
Kind = Literal["chat", "embedding", "rerank", "image", "transcription", "speech"]
if TYPE_CHECKING:
    ServerName = str
else:
    ServerName = Literal[tuple(item.name for item in servers() if item.name)]
# Further files of a picture model, by LocalAI's names (`clip_l_path` and so on).
Component = Literal["clip_l", "clip_g", "t5xxl", "vae", "llm"]
CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "iq4_nl", "q4_1", "q4_0"]
Thinking = Literal["off", "hidden", "shown"]
# Lists are read as tuples; everything else has to be of its own type.
ANY_LIST = Field(strict=False)
GpuNumbers = Annotated[
    tuple[Annotated[int, Field(ge=1, le=MAX_GPUS)], ...],
    BeforeValidator(parse_gpu_numbers, json_schema_input_type=int | str | list[int]),
    Field(min_length=1, strict=False),
]


class Section(BaseModel):
    """Base of everything in the inventory: frozen, and unknown keys are refused."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ServerSettings(Section):
    """Settings of an inference server; each level (kind, card, model, pool) overrides the one before."""

    slots: int | None = Field(None, ge=1, le=256)
    """Requests that one replica works on at the same time."""
    gpu_layers: Annotated[int | Literal["all"] | None, BeforeValidator(_layers)] = None
    """Layers kept on the GPU (`--n-gpu-layers`)."""
    split_mode: Literal["layer", "row", "tensor"] | None = None
    """How one replica is split over several cards (`--split-mode`); by layers when absent."""
    tensor_split: (
        Annotated[tuple[Annotated[float, Field(ge=0, le=100_000)], ...], ANY_LIST, AfterValidator(_shares)] | None
    ) = None
    """Shares of the cards of one replica, in their order (`--tensor-split`); by what each has left when absent."""
    cpu_moe: Annotated[int | Literal["all"] | None, BeforeValidator(_layers)] = None
    """Layers, the first ones, whose experts stay in host memory (`--n-cpu-moe`, `--cpu-moe`): the way to run a mixture
    of experts that is larger than the card."""
    host_tensors: Annotated[tuple[Annotated[Word, AfterValidator(_tensor_pattern)], ...], ANY_LIST] | None = None
    """Patterns of tensors that stay in host memory, such as `ffn_(up|down)_exps` (`--override-tensor PATTERN=CPU`)."""
    kv_unified: bool | None = None
    """All slots share one context of the model's `context` tokens, instead of one for each (`--kv-unified`)."""
    batch: int | None = Field(None, ge=1, le=1_048_576)
    """Logical batch in tokens (`--batch-size`)."""
    ubatch: int | None = Field(None, ge=1, le=1_048_576)
    """Physical batch in tokens (`--ubatch-size`); on weak CPUs smaller is faster."""
    threads: int | None = Field(None, ge=1, le=1024)
    """CPU threads of one server (`--threads`)."""
    cache_type: CacheType | None = None
    """Number format of the K and V cache, the same for both: CUDA builds have fused kernels only for equal types."""
    flash_attention: Literal["on", "off", "auto"] | None = None
    """Flash attention (`--flash-attn`); a quantized cache needs it."""
    cache_reuse: int | None = Field(None, ge=0, le=1_048_576)
    """Smallest chunk in tokens that is reused from the prompt cache by shifting (`--cache-reuse`)."""
    cache_ram_mib: int | None = Field(None, ge=0, le=64 * TIB_MIB)
    """Host memory for prompts of earlier requests (`--cache-ram`); the program's own 8192 MiB burst containers."""
    checkpoints: int | None = Field(None, ge=0, le=1024)
    """States of a conversation that each slot keeps in host memory (`--ctx-checkpoints`), for models with a sliding
    window or a recurrent state; as many as 1 GiB holds when absent, 32 at most."""
    load_mode: Literal["mmap", "none", "dio"] | None = None
    """How weights are read (`--load-mode`): mapped when absent; `none` copies them, which is faster from a network
    share and takes host memory for all that is not on a card; `dio` reads past the system's cache."""
    mlock: bool | None = None
    """Keep the weights in RAM (`--load-mode mmap+mlock`)."""
    jinja: bool | None = None
    """Use the model's own chat template (`--jinja`)."""
    pooling: Literal["none", "mean", "cls", "last", "rank"] | None = None
    """How token vectors become one embedding (`--pooling`); normally the model file says it."""
    memory_mib: Mib | None = None
    """Memory limit of one server's container, in MiB."""
    memory_swap_mib: Mib | None = None
    """Limit of memory and swap together, in MiB; the memory limit itself when absent, that is, no swap."""
    vram_mib: int | None = Field(None, ge=0, le=64 * TIB_MIB)
    """GPU memory that one replica takes, in MiB, when you know better than the estimate."""
    start_timeout_s: int | None = Field(None, ge=1, le=DAY_S)
    """How long a server may load before it counts as broken, in seconds."""
    sleep_idle_s: int | None = Field(None, ge=1, le=DAY_S)
    """Give the memory back after so many idle seconds (`--sleep-idle-seconds`); the next request loads it again."""
    backend: Literal["cuda12", "cuda13", "rocm", "vulkan", "intel"] | None = None
    """Build of llama.cpp that runs the cards, instead of the one chosen for them; `vulkan` for cards of every maker."""
    image: Word | None = None
    """Container image, instead of the one chosen for the card."""
    gpu_memory_fraction: float | None = Field(None, gt=0, le=1)
    """vLLM: the share of each card that it takes for itself (`--gpu-memory-utilization`), 0.9 when absent."""
    adapters_at_once: int | None = Field(None, ge=1, le=256)
    """vLLM: different adapters among the requests that it works on at the same time (`--max-loras`), 1 when absent."""
    adapter_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] | None = None
    """vLLM: highest rank of an adapter (`--max-lora-rank`), 64 when absent."""
    extra_args: Annotated[tuple[Line, ...], ANY_LIST] | None = None
    """Further flags for the server and their values, one word each; those of the pinned build that no key covers."""
    environment: dict[Variable, Line | Literal[""]] | None = None
    """Further environment variables of the server; never a secret."""


def _range_mhz(value: Any) -> Any:
    """One clock, or the lowest and the highest."""
    clocks = value if isinstance(value, list | tuple) else (value, value)
    if value is not None and ({*map(type, clocks)} != {int} or len(clocks) != PAIR or sorted(clocks) != [*clocks]):
        raise ValueError("must be a clock in MHz, or the lowest and the highest; write 1400, or [210, 1400]")
    return value if value is None else tuple(clocks)


class Gpu(Section):
    """One graphics card of a host."""

    card: CardName
    """Kind of card, for instance `p104-100`, or as `nvidia-smi` prints it: `NVIDIA GeForce RTX 3090`; see `cards`."""
    uuid: Annotated[str, _text("uuid")] | None = None
    """UUID as `nvidia-smi -L` prints it: the card stays the same when the order changes after a reboot."""
    pci: Annotated[str, _text("slot")] | None = None
    """PCI slot, for instance `0000:01:00.0`."""
    power_limit_w: int | None = Field(None, ge=1, le=2000)
    """Power limit in watts; of cards of AMD and Intel only with their `pci`."""
    clock_lock_mhz: Annotated[
        tuple[Mhz, Mhz] | None, BeforeValidator(_range_mhz, json_schema_input_type=int | list[int])
    ] = None
    """Lowest and highest clock of an NVIDIA card in MHz, or one for both (`nvidia-smi -lgc`)."""
    vram_gib: float | None = Field(None, gt=0, le=1024)
    """Memory in GiB, when it differs from the catalogue's."""


def _gpu_list(value: Any) -> Any:
    """The short form `{card: X, count: N, …}` as the list of N equal cards that it stands for."""
    if not isinstance(value, Mapping) or "count" not in value:
        return _as_list(value)
    count = value["count"]
    if type(count) is not int or not 0 <= count <= MAX_GPUS:
        raise ValueError(f"count must be a whole number of equal cards, 0 to {MAX_GPUS}")
    if "uuid" in value or "pci" in value:
        raise ValueError("uuid and pci name one card; list the cards one by one instead of giving a count")
    return [{key: item for key, item in value.items() if key != "count"}] * count


class _GpuGroup(Gpu):
    """The short form of several equal cards (only for the JSON Schema)."""

    count: int = Field(1, ge=0, le=MAX_GPUS)
    """Number of equal cards; one when absent."""


class Cpu(Section):
    """The processor of a host."""

    cores: int | None = Field(None, ge=1, le=4096)
    """Number of cores."""
    avx: bool = True
    """False for processors without AVX, such as the Celeron 3865U: llama.cpp's images run there, LocalAI's do not."""


class Shared(Section):
    """One llama-server for several pools: it holds as many of their models as fit, and swaps them as requests come."""

    loaded: int = Field(1, ge=1, le=64)
    """Models in memory at the same time (`--models-max`); one more takes the place of the least recently used."""
    idle_s: int | None = Field(None, ge=1, le=DAY_S)
    """Give a model's memory back after so many idle seconds, where its pool does not say `sleep_idle_s` itself."""
    turn_s: int = Field(60, ge=1, le=DAY_S)
    """Seconds that a pool waits for a place before one that always has a request gives way."""
    port: PortNumber | None = None
    """Its port; derived from the number of its first card when absent. A port that is named is open on the host's
    loopback address, for `/models/load` and `/models/unload` with the host's own key `LLAMA_API_KEY`."""
    memory_mib: Mib | None = None
    """Memory limit of its container, in MiB; what the largest of its models need together when absent."""


class Sleep(Section):
    """A machine that may be asleep: requests that wait for it wake it (Wake-on-LAN), and no alert says that it is off.

    The gateway's host sends the packets, in the network of its own address.
    """

    mac: Annotated[str, _text("mac")]
    """Address of its network card."""
    wake_s: int = Field(120, ge=1, le=3600)
    """Longest time in seconds from the first packet until it answers requests; the pool's queue has to wait so long."""


class ServiceAdditions(Section):
    """What one service of a host has besides what is rendered: it joins networks that exist, or is known to a proxy."""

    networks: Annotated[tuple[Annotated[str, _text("network")], ...], ANY_LIST] = ()
    """Docker networks that exist already and that the service joins, such as that of a reverse proxy."""
    labels: dict[Annotated[str, _text("label"), AfterValidator(_own_label)], Line | Literal[""]] = Field(
        default_factory=dict
    )
    """Labels of its container, which a reverse proxy may read; never a secret."""
    environment: dict[Variable, Line | Literal[""]] = Field(default_factory=dict)
    """Environment variables that the kit does not set; never a secret."""
    extra_hosts: dict[HostName, Address | Literal["host-gateway"]] = Field(default_factory=dict)
    """Addresses by name for the container's hosts file; `host-gateway` is this machine. HAProxy asks DNS instead."""
    mounts: dict[Folder, Annotated[str, _text("pem")]] = Field(default_factory=dict)
    """Files and folders of the host, and where the container has them, read-only, such as rules for Prometheus."""
    cpuset: Annotated[str, _text("cpuset")] | None = None
    """Processors on which it may run, such as `"0-15"`, as `lscpu` counts them."""


class Host(Section):
    """A machine on which the kit starts programs."""

    runtime: Literal["compose", "local"] = "compose"
    """`compose`: containers, as the site's `runtime` says; `local`: processes under supervisord, without Docker."""
    address: Address = "127.0.0.1"
    """IP address under which the other hosts reach it, and the only one on which ports are published."""
    hostname: HostName | None = None
    """Name in DNS under which the other hosts reach it, instead of the address, such as `gpu-box.lan`."""
    ram_gib: Gib | None = None
    """Memory in GiB; the plan then checks that all container limits fit."""
    os_reserve_gib: float = Field(2.0, ge=0, le=65536)
    """Memory in GiB that stays free for the operating system."""
    cpu: Cpu = Cpu()
    """Its processor."""
    gpus: Annotated[
        tuple[Gpu, ...],
        BeforeValidator(_gpu_list, json_schema_input_type=_GpuGroup | list[Gpu]),
        Field(max_length=MAX_GPUS, strict=False),
    ] = ()
    """The cards in the order of their index; the first is GPU 1. Either a list, or `{card: …, count: N}`."""
    shared: dict[Name, Shared] = Field(default_factory=dict)
    """Servers that several pools share, by the names of their services; pools say `on: {host: …, shared: NAME}`."""
    device_groups: Annotated[tuple[int, ...], ANY_LIST] = ()
    """AMD and Intel cards: numbers of the groups that own `/dev/kfd` and `/dev/dri/render*` (`stat -c %g`)."""
    gpu_access: Literal["reservation", "runtime", "cdi"] | None = None
    """How containers get NVIDIA cards: by a device reservation of Docker's, by `runtime: nvidia` (usual on a Jetson),
    or as CDI devices, `nvidia.com/gpu=…` (rootless Docker, Podman)."""
    models_dir: Folder = "./models"
    """Folder with the model files; relative to the host's rendered folder unless it starts with `/`."""
    model_stores: dict[Name, Annotated[Folder, AfterValidator(_absolute)]] = Field(default_factory=dict)
    """Folders with model files that other programs keep, by any name: a Hugging Face cache, Ollama's or LM Studio's
    folder, a network share. Servers read files there in place and read-only; `models pull` finds them."""
    ssh: Annotated[str, _text("ssh")] | None = None
    """How this machine reaches the host: `user@192.0.2.10` or a name from `~/.ssh/config`; absent: it is this one."""
    gpu_exporter: Literal["nvidia", "dcgm", "none"] | None = None
    """Exporter for this host's cards, when it differs from the monitoring's `gpu_exporter`."""
    sleep: Sleep | None = None
    """For a machine that may be asleep: how to wake it."""
    selinux: bool = False
    """Whether Docker confines containers by SELinux there (Fedora, RHEL): files and folders are mounted with `z`."""
    services: dict[Name, ServiceAdditions] = Field(default_factory=dict)
    """What services of this host have besides what is rendered, by their names in `plan`."""
    folder: Folder | None = None
    """Folder on a host reached by ssh, for its rendered files; absent: `corral/<site>/<host>` in the user's home."""

    @property
    def model_folders(self) -> dict[str, str]:
        """Every folder with model files by the name that the lock has for it."""
        return {OWN_FOLDER: self.models_dir, **self.model_stores}

    @field_validator("model_stores")
    @classmethod
    def _has_other_names(cls, stores: dict[str, str]) -> dict[str, str]:
        if OWN_FOLDER in stores:
            raise ValueError(f'a store named "{OWN_FOLDER}" would be taken for models_dir; give it another name')
        return stores


def _from_browser(data: Any) -> Any:
    """What is said of a model, with addresses of the Hugging Face Hub's pages as `hf:` sources."""
    if not isinstance(data, Mapping):
        return data
    told = dict(data)
    for key in ("source", "projector"):
        if not isinstance(source := told.get(key), str):
            continue
        told[key], named = hub_source(source)
        if key == "projector" and source.startswith("ollama:") and "#" not in source:
            told[key] = f"{source}#projector"
        if named and key == "source" and told.get("revision") is None:
            told["revision"] = named
        if named and named != told.get("revision"):
            raise ValueError(f"{key} is an address at revision {named}, and revision is another one; keep one of them")
    return told


def folder_of(source: str, revision: str) -> str:
    """Name in a models folder of the folder with a repository (`hf:owner/repo`) as one commit has it."""
    return f"{source.removeprefix('hf:').replace('/', '--')}--{revision[:12]}"


class Draft(Section):
    """A small model that proposes the next tokens; the large one checks them all at once, and answers stay the same."""

    model: Name
    """One of `models`, of the same vocabulary; it needs no pool of its own."""
    tokens_max: int | None = Field(None, ge=1, le=1024)
    """Most tokens that it proposes at a time (`--spec-draft-n-max`); llama-server's own 3 when absent."""
    tokens_min: int | None = Field(None, ge=0, le=1024)
    """Fewer proposed tokens than this are not worth checking (`--spec-draft-n-min`)."""
    probability_min: float | None = Field(None, ge=0, le=1)
    """It stops proposing at a token that is less likely than this (`--spec-draft-p-min`)."""
    gpu_layers: Annotated[int | Literal["all"], BeforeValidator(_layers)] = "all"
    """Its layers kept on the GPU (`--spec-draft-ngl`)."""

    @model_validator(mode="after")
    def _is_in_order(self) -> Self:
        if self.tokens_max is not None and (self.tokens_min or 0) > self.tokens_max:
            raise ValueError("tokens_min is more than tokens_max")
        return self


class Adapter(Section):
    """A LoRA adapter: loaded with its model, and in force for the requests that ask for it."""

    name: Name
    """Its name; clients call `<pool>:<name>` as a model."""
    source: Line
    """Its GGUF file, written like `source` of a model."""
    revision: Revision | None = None
    """Branch, tag or commit of an `hf:` repository; for vLLM the commit."""
    sha256: Sha256 | None = None
    """Checksum of the file; `models pull` takes no other. Needed for `http://`."""
    scale: float = Field(1.0, gt=0, le=100)
    """How strongly it works on requests for that name."""

    _reads_addresses = model_validator(mode="before")(_from_browser)


class Model(Section):
    """A model: which file, of what kind, and how it is served."""

    source: Line
    """`hf:owner/repo/file.gguf`, `hf:owner/repo:Q4_K_M`, `https://…`, `file:/path` on this machine, `ollama:name:tag`,
    or a path in the models folder or one of the host's `model_stores`."""
    revision: Revision | None = None
    """Branch, tag or commit of an `hf:` repository; `models pull` pins the commit it finds. Where a whole repository
    is served, by vLLM or LocalAI, it has to be the commit."""
    sha256: Sha256 | None = None
    """Checksum of the file that `source` names; `models pull` takes no other. Needed for `http://`."""
    kind: Kind
    """What it does: chat, embedding, rerank, image, transcription (recordings to text) or speech (text to sound)."""
    server: ServerName = USUAL
    """What serves it: llama.cpp from a GGUF file, or vLLM, on NVIDIA cards, from a repository such as
    `hf:owner/repo` or a folder in the models folder; LocalAI serves images, speaches speech. Installed packages may add
    others."""
    context: int = Field(4096, ge=32, le=16_777_216)
    """Tokens that one request may use, prompt and answer together; every slot gets that much."""
    size_gib: Gib | None = None
    """Size of the file in GiB, with the projector's and adapters'; estimated from its name when absent."""
    projector: Line | None = None
    """Vision models: the file with which llama-server reads images (`--mmproj`), written like `source`."""
    adapters: Annotated[tuple[Adapter, ...], ANY_LIST] = ()
    """Chat models: LoRA adapters that all its servers load, each in force for requests to `<pool>:<name>` only."""
    draft: Draft | None = None
    """Chat models: a small model that makes this one faster (speculative decoding)."""
    components: dict[Component, Line] = Field(default_factory=dict)
    """Image models from a single file that lacks them: the files with its other parts, written like `source`."""
    backend: Word | None = None
    """Image models: the LocalAI backend; absent: `stablediffusion-ggml` for files, `diffusers` for repositories."""
    pipeline: Word | None = None
    """Image models: the diffusers pipeline class; chosen by the repository's name when absent."""
    scheduler: Word | None = None
    """Image models: the sampler; one that suits the model when absent."""
    steps: int | None = Field(None, ge=1, le=1000)
    """Image models: sampling steps."""
    engine: ServerSettings = ServerSettings()
    """Settings of servers with this model."""

    _reads_addresses = model_validator(mode="before")(_from_browser)

    @property
    def served_by(self) -> InferenceServer:
        """What serves it: the server that it names, or the usual one for its kind."""
        return server_of(self.kind, self.server)

    @property
    def reads_files(self) -> bool:
        """Whether its sources are files, each by itself, and not repositories or folders."""
        is_picture_file = self.kind == "image" and (file_of(self.source).lower().endswith(PICTURE_FILES))
        return self.served_by.reads_files or is_picture_file

    @property
    def repositories(self) -> tuple[str, ...]:
        """The sources that are whole repositories, of which `models pull` makes folders."""
        if self.reads_files:
            return ()
        return tuple(source for source in self.sources if source.startswith("hf:"))

    def folder(self, source: str) -> str:
        """Name in a models folder of one of those sources: a folder of its own, or the one of a repository."""
        return folder_of(source, self.revision_of(source)) if source in self.repositories else source

    @property
    def file(self) -> str:
        """Name of the model's file in the models folder; the first of several parts."""
        return file_of(self.source)

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources of all its files: several when the model is split, or has a projector or adapters."""
        adapters = (adapter.source for adapter in self.adapters)
        more = (*([self.projector] if self.projector else []), *adapters, *self.components.values())
        return (*self._parts, *more)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Its sources, those together whose files have to lie in one folder: the parts of a split model."""
        own = len(self._parts)
        return self._parts, *((source,) for source in self.sources[own:])

    @property
    def _parts(self) -> tuple[str, ...]:
        found = re.search(r"-(\d{5})-of-(\d{5})(?=\.gguf)", self.source)
        count = int(found[2]) if found else 1
        if not found or not 0 < count <= MAX_PARTS:
            return (self.source,)
        start, end = self.source[: found.start()], self.source[found.end() :]
        return tuple(f"{start}-{number:05}-of-{count:05}{end}" for number in range(1, count + 1))

    def key(self, source: str) -> str:
        """What the lock calls one of its sources."""
        revision = self.revision_of(source)
        return f"{source}@{revision}" if revision else source

    def sha256_of(self, source: str) -> str:
        """The checksum that one of its sources must have; empty when none is said."""
        own = {adapter.source: adapter.sha256 for adapter in self.adapters}
        return own.get(source, self.sha256 if source == self.source else None) or ""

    def revision_of(self, source: str) -> str:
        """The revision at which one of its sources is taken; empty when none is said."""
        own = {adapter.source: adapter.revision for adapter in self.adapters}
        repository = self.source.split("/")[:2]
        own |= {item: None for item in self.components.values() if item.split("/")[:2] != repository}
        return own.get(source, self.revision) or ""


class GpuKind(Section):
    """Facts and settings of a kind of graphics card."""

    vram_gib: float | None = Field(None, gt=0, le=1024)
    """Memory in GiB."""
    compute_capability: Capability | None = None
    """CUDA compute capability, for instance `6.1`; only NVIDIA's cards have one."""
    vendor: Literal["nvidia", "amd", "intel"] | None = None
    """Manufacturer; needed for a card that is not in the catalogue, unless its compute capability is said."""
    unified_memory: bool | None = None
    """Whether it has the host's memory and none of its own (processor graphics, Jetson, GB10), which counts once."""
    warm_c: int | None = Field(None, ge=20, le=120)
    """Temperature in °C above which an alert warns; the monitoring's when absent."""
    hot_c: int | None = Field(None, ge=20, le=120)
    """Temperature in °C above which an alert is critical; the monitoring's when absent."""
    engine: ServerSettings = ServerSettings()
    """Settings that suit this kind of card."""


class Price(Section):
    """What tokens count against budgets: your own figure for your own machines, the provider's for cloud models."""

    input_usd_per_million: float = Field(ge=0, le=1_000_000)
    """US dollars for a million tokens of the prompt."""
    output_usd_per_million: float = Field(ge=0, le=1_000_000)
    """US dollars for a million tokens of the answer."""


class Budget(Section):
    """What a key may spend, or a node may cost; once it is reached, requests are refused until the period ends."""

    max_usd: float = Field(gt=0, le=1_000_000_000)
    """US dollars; `price` of a pool or node says what its tokens count."""
    period: Period | None = None
    """After which spending counts from zero again, such as `30d`; absent: never for a key, `30d` for a node."""


class KeyBudget(Budget):
    """What a key, or the keys of a team, may spend."""

    fallback: Name | None = None
    """Chat pool without a price that answers chats in place of pools with a price once it is spent; absent: 429."""


class NodeModel(Section):
    """One of several models of a node, where it differs from what the node says."""

    kind: Kind | None = None
    """What it does."""
    context: int | None = Field(None, ge=32, le=16_777_216)
    """Tokens that one request may use, prompt and answer together; needed for `context_fallback` and sessions only."""
    thinking: Thinking | None = None
    """What becomes of its thoughts."""


class Node(Section):
    """An inference server that the kit does not start: a Mac, a phone, another farm, a cloud account."""

    url: Server | None = None
    """Base address, for instance `http://192.0.2.7:8080`; for `engine: cloud` only where the provider has given you an
    address of your own, such as Azure's: LiteLLM's `api_base`."""
    dials_in: Annotated[int, Field(ge=1024, le=LAST_PORT)] | None = None
    """Instead of `url`, for a machine behind NAT that connects to `gateway.tunnel` by itself (`workers issue`): a port
    of the tunnel for it alone, such as 2101; used inside the farm only."""
    engine: Literal["openai", "llama.cpp", "mlx", "ollama", "inferrlm", "vllm", "lmstudio", "cloud"] = "openai"
    """What answers there; it decides protocol and health check. `cloud` is a provider known to LiteLLM."""
    model: Line | None = None
    """Name of the model at that server, or for `cloud` LiteLLM's name such as `openai/gpt-4o-mini`."""
    models: Annotated[
        dict[Line, NodeModel],
        BeforeValidator(_models, json_schema_input_type=dict[Line, NodeModel] | list[Line]),
    ] = Field(default_factory=dict)
    """Instead of `model`, where one server has several: their names there; pools say `on: {node: …, model: …}`."""
    kind: Kind = "chat"
    """What it does."""
    slots: int = Field(1, ge=1, le=4096)
    """Requests that it works on at the same time, for all its models together."""
    tier: Name | None = None
    """Class of the node for complexity routing, for instance `primary` or `smart`."""
    health: Annotated[str, _text("path")] | None = None
    """Path that answers 200 when the node is well; known for each engine."""
    context: int | None = Field(None, ge=32, le=16_777_216)
    """Tokens that one request may use there, prompt and answer together; for `context_fallback` and sessions only."""
    price: Price | None = None
    """What it charges; needed for a budget."""
    budget: Budget | None = None
    """The most that it may cost in a period."""
    api_key: SecretName | None = None
    """Name of the secret with the node's key; the value goes into `.env`."""
    sleep: Sleep | None = None
    """For a machine that may be asleep: how to wake it."""
    ca_file: Annotated[str, _text("pem")] | None = None
    """File with the certificate authority of an https node, on the gateway's host (and the monitoring's, for metrics of
    vLLM), readable for every user; absent: the public authorities that the image knows."""
    key_header: Header | None = None
    """Header in which the node wants its key, such as `X-Api-Key`; absent: `Authorization: Bearer …`."""
    thinking: Thinking | None = None
    """What becomes of the model's thoughts, when it differs from the pool's."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all its models."""
        return (self.model,) if self.model else tuple(self.models)

    def serving(self, model: str | None) -> Node:
        """The node as a pool on one of its `models` has it; itself when it has one model."""
        own = self.models.get(model or "")
        return self if own is None else self.model_copy(update={"model": model, **own.model_dump(exclude_none=True)})


class Placement(Section):
    """Where replicas of a pool live: on GPUs or the CPU of a host, or on a node."""

    host: Name | None = None
    """Host that runs the replicas."""
    gpus: GpuNumbers | None = None
    """GPU numbers from 1, as `2`, `1-3` or `"1-3,5"`: one replica for each."""
    gpus_per_replica: int = Field(1, ge=1, le=64)
    """Cards over which one replica is split."""
    replicas: int | None = Field(None, ge=1, le=1024)
    """Number of replicas on the CPU, or on every card named in `gpus`."""
    shared: Name | None = None
    """One of the host's `shared` servers, which serves this pool beside others, on `gpus` or on the CPU."""
    node: Name | None = None
    """A node instead of a host."""
    model: Line | None = None
    """Which of the node's `models`."""
    auto: bool = False
    """The plan chooses a card for every replica: on `host`, or on any host; `on: auto` is short for it."""


class MeasuredBy(Section):
    """The run of `bench sweep` from which limits come; `bench apply` writes it."""

    run: Line
    """Name of the run."""
    basis: Literal["knee", "safe", "n-1"] = "safe"
    """Which of its rates the limit is."""
    mark: Line
    """Stands for hardware, model and settings that were measured; `plan` tells when they are others now."""


class Limits(Section):
    """Limits for the whole pool, whatever the number of replicas."""

    rpm: int | None = Field(None, ge=1, le=1_000_000_000)
    """Requests per minute."""
    tpm: int | None = Field(None, ge=1, le=1_000_000_000)
    """Tokens per minute."""
    measured: MeasuredBy | None = None
    """Where they come from; without it they count as never measured."""


class Queue(Section):
    """How requests wait when every slot is taken."""

    depth: int = Field(10, ge=0, le=100_000)
    """Requests that may wait; further ones get 429 with Retry-After."""
    timeout_s: int = Field(60, ge=1, le=3600)
    """Longest wait in seconds; then 429 with Retry-After."""


class Objective(Section):
    """What clients of a pool may expect; alerts tell when too many requests fall short of it."""

    availability_percent: float = Field(99.0, ge=50, lt=100)
    """Requests in a hundred that are answered, and not refused for want of a slot."""
    first_token_s: float = Field(10.0, gt=0, le=3600)
    """Seconds to the first token of a streamed answer."""
    answer_s: float = Field(60.0, gt=0, le=3600)
    """Seconds to the whole answer, the wait for a slot included."""
    in_time_percent: float = Field(95.0, ge=50, lt=100)
    """Requests in a hundred that keep each of both times."""


class TokenLimits(Section):
    """How long answers may be, in tokens."""

    default: int | None = Field(None, ge=1, le=10_000_000)
    """What a request gets that does not say it; `most` when absent."""
    most: int | None = Field(None, ge=1, le=10_000_000)
    """Requests for more get this many."""

    @model_validator(mode="after")
    def _is_in_order(self) -> Self:
        if self.default is not None and self.most is not None and self.default > self.most:
            raise ValueError("default is more than most")
        return self


class RequestLimits(Section):
    """What one request may ask for, on every route and in every spelling."""

    max_tokens: TokenLimits | None = None
    """Tokens of one answer."""
    max_messages: int | None = Field(None, ge=1, le=1_000_000)
    """Most messages, texts or documents in one request; more get 413."""
    max_message_kib: int | None = Field(None, ge=1, le=1024 * 1024)
    """Longest text of one message in KiB; pictures and files do not count as text. Longer ones get 413."""
    max_text_kib: int | None = Field(None, ge=1, le=1024 * 1024)
    """All text of one request together in KiB; more gets 413."""
    max_choices: int | None = Field(None, ge=1, le=1024)
    """Most answers to one request (`n`); more get 400. For servers of the farm 1 when absent: each takes a slot."""


class Pool(Section):
    """What clients call: one name with one or more replicas behind it."""

    model: Name | None = None
    """The model that the replicas serve; not needed when all of them are nodes."""
    on: Annotated[
        tuple[Placement, ...],
        BeforeValidator(
            _places,
            json_schema_input_type=Literal["auto"] | Placement | Annotated[list[Placement], Field(min_length=1)],
        ),
        Field(min_length=1, strict=False),
    ]
    """Where the replicas live: one place, a list, or `auto`."""
    short: Name | None = None
    """Short name for services and containers: `short: gpu` gives service `gpu-1`, container `<host>-gpu-1`."""
    ports: PortNumber | None = None
    """Port of the first replica; the others follow by one. Derived from kind and GPU number when absent."""
    aliases: Annotated[tuple[ModelName, ...], ANY_LIST] = ()
    """Further names under which clients may call the pool, in any case."""
    background: Annotated[tuple[ModelName, ...], ANY_LIST] = ()
    """Low-priority aliases, queued behind all other requests."""
    editor_names: bool = False
    """Answer to names that editors and SDKs have built in, too, such as `gpt-4o`; docs/keys.md lists them."""
    price: Price | None = None
    """What this pool's tokens count against budgets; absent: nothing, or the provider's price of a cloud model."""
    fallback: Annotated[tuple[Name, ...], ANY_LIST] = ()
    """Pools that are asked instead, in this order, when this one fails or refuses."""
    context_fallback: Annotated[tuple[Name, ...], ANY_LIST] = ()
    """Pools with a longer context, asked in this order with requests that are too long for this one."""
    limits: Limits = Limits()
    """What the pool may be asked for."""
    request: RequestLimits = RequestLimits()
    """What one request may ask for, where it differs from the gateway's."""
    queue: Queue | None = None
    """Waiting room of this pool, when it differs from the gateway's."""
    timeout_s: int | None = Field(None, ge=1, le=DAY_S)
    """Longest time in seconds that an answer may take; for a stream, the longest silence."""
    objective: Objective | None = None
    """What clients of this pool may expect, when it differs from the monitoring's."""
    cache: Literal["private", "shared"] | None = None
    """Chat pools: whether a prompt may be continued from what the server computed for another key. `private`: never,
    so that no key can find out beginnings of another's prompts; llama.cpp then keeps nothing between requests. Absent:
    `private` with an entrance or with two consumers that open the pool, else `shared`."""
    thinking: Thinking | None = None
    """`hidden` (default): no `<think>` in answers; `off`: the model does not think, where its server can turn that off,
    and what leaks is taken out; `shown`: answers stay as the server writes them."""
    engine: ServerSettings = ServerSettings()
    """Settings of this pool's servers."""


class Tier(Section):
    """A level of difficulty: which requests are of it, and which pool answers them.

    What is absent is taken from the tier of that name in the seed of this kit: `simple`, `medium` and `complex` are
    known.
    """

    name: Name
    """Name of the tier; `simple`, `medium` and `complex` come with words and lengths of their own."""
    pool: Name
    """Pool that answers."""
    spill: Annotated[tuple[Name, ...], ANY_LIST] = ()
    """Pools that answer instead while every slot of `pool` is taken; the first with a free slot."""
    words: Annotated[tuple[Line, ...], ANY_LIST] | None = None
    """Words and phrases in the user's last message that make a request one of this tier."""
    words_beyond: int | None = Field(None, ge=0, le=1_000_000)
    """Those words count only in a message of more words than this."""
    characters_beyond: int | None = Field(None, ge=0, le=1_000_000_000)
    """So does a conversation of more characters than this."""
    messages_beyond: int | None = Field(None, ge=0, le=1_000_000)
    """And one of more messages than this."""


class Auto(Section):
    """A name that clients call when the kit is to choose the pool by how difficult the request is."""

    name: Name = "auto"
    """The name."""
    aliases: Annotated[tuple[Name, ...], ANY_LIST] = ()
    """Further names for the same."""
    tiers: Annotated[tuple[Tier, ...], ANY_LIST] = Field(min_length=1, max_length=16)
    """From the easiest to the hardest; the hardest that fits is taken, the first one when none does."""


class Entrance(Section):
    """A restricted endpoint, with TLS and narrower limits, for clients outside the farm, beside the gateway's port."""

    port: PortNumber = 443
    """Port on the gateway's host."""
    address: Address | None = None
    """Address of the gateway's host on which `port` is open; the host's own when absent. Write 127.0.0.1 where a proxy
    on a network that haproxy joins (`hosts.….services`) takes the calls."""
    certificate: Annotated[str, _text("pem")] | None = None
    """File on the gateway's host with certificate, chain and key, readable for user 99; without it there is no TLS.
    A renewed file is in use within seconds, without a restart."""
    origins: Annotated[tuple[Annotated[str, _text("origin")], ...], ANY_LIST] = ()
    """Origins of web pages and apps that may call the gateway (CORS), such as `https://chat.example.com` or
    `app://obsidian.md`."""
    max_body_kib: int = Field(16 * 1024, ge=1, le=900 * 1024)
    """Longest request in KiB, pictures included; longer ones get 413."""
    max_messages: int = Field(2048, ge=1, le=1_000_000)
    """Most messages in one request; more get 413."""
    max_message_kib: int = Field(1024, ge=1, le=1024 * 1024)
    """Longest text of one message in KiB; longer ones get 413."""
    max_tokens: int | None = Field(None, ge=1, le=10_000_000)
    """Most tokens of one answer; requests for more get this many."""


class Page(Section):
    """A page for people at `/` of the gateway's address: pools, load, what a key may use, how to call the farm."""

    shown: Literal["inside", "everywhere", "nowhere"] = "inside"
    """`inside`: on the gateway's port. `everywhere`: at the entrance as well, where it shows strangers the farm's name,
    the links and one word of state, but no pools. There is no page in `direct`."""
    links: dict[Line, Annotated[str, _text("url")]] = Field(default_factory=dict)
    """Where the page links to, by title, such as `Grafana: http://192.0.2.7:3000`; all who see the page see them."""


class Conversations(Section):
    """Answers of `/v1/responses`, and sessions, are kept in the gateway's database: requests may go on from them."""

    keep: Period = "24h"
    """How long a conversation is kept after its last turn; a month has 30 days."""


class Tunnel(Section):
    """An sshd at which nodes with `dials_in` connect, without a shell or any way into the farm."""

    port: PortNumber = 2222
    """Port for workers, on the gateway's host."""
    name: Annotated[str, AfterValidator(_name_or_address)] | None = None
    """Name or address under which workers reach that port; the gateway's host's own when absent."""
    address: Address | None = None
    """Address of the gateway's host on which `port` is open; the host's own when absent."""


class Gateway(Section):
    """The one address that clients call: LiteLLM, with HAProxy behind it."""

    host: Name
    """Host that runs it."""
    port: PortNumber = 4000
    """Port for clients."""
    address: Address | None = None
    """Address of its host on which `port` is open; the host's own when absent, or loopback beside an `entrance`."""
    admin_port: PortNumber = 4002
    """Port of everything that LiteLLM has, its admin pages included, on the host's loopback address only."""
    unknown_model: Name | None = None
    """Pool that answers requests for models that do not exist; without it they get 404."""
    balancing: Literal["slots", "least-busy", "direct"] = "slots"
    """What chooses the replica: HAProxy by free slots, LiteLLM by load, or LiteLLM at random without HAProxy."""
    queue: Queue = Queue()
    """How requests wait when every slot of their pool is taken."""
    fast_lane: bool = False
    """Whether HAProxy passes plain chat and embedding requests of known keys to their pool without LiteLLM."""
    timeout_s: int = Field(300, ge=1, le=DAY_S)
    """Longest time in seconds that an answer may take, after waiting for a slot; for a stream, the longest silence."""
    auto: Auto | None = None
    """The name under which requests are routed by how difficult they are."""
    database: bool = True
    """PostgreSQL for virtual keys, budgets and spend; without it there is only the master key."""
    cache: bool = True
    """Valkey for counters that several processes share."""
    litellm_port: PortNumber = 4001
    """Port of LiteLLM behind HAProxy's door; unused in `direct`. Published only on a `local` host, on loopback."""
    balancer_port: PortNumber = 8081
    """Port of HAProxy inside the farm; published only on a `local` host, on loopback."""
    stats_port: PortNumber = 8404
    """Port of HAProxy's metrics for Prometheus; used inside the farm only."""
    edge_port: PortNumber = 4443
    """Port at which every host takes calls from the site's other hosts, over TLS with client certificates."""
    database_port: PortNumber = 5432
    """Port of PostgreSQL; used inside the farm only."""
    cache_port: PortNumber = 6379
    """Port of Valkey; used inside the farm only."""
    memory_mib: int = Field(2048, ge=256, le=64 * TIB_MIB)
    """Memory limit of each of LiteLLM's containers, in MiB."""
    workers: int = Field(1, ge=1, le=32)
    """Processes of LiteLLM that share its work, each in a container of its own, which may use about one core."""
    path: Annotated[str, _text("prefix")] | None = None
    """Path below which a reverse proxy passes requests on without removing it, such as `/llm` for `/llm/v1/…`; for the
    entrance, too. Requests without it are taken as well."""
    proxies: Annotated[tuple[Network, ...], ANY_LIST] = ()
    """Reverse proxies, by address or network such as `172.18.0.0/16`: HAProxy takes the client's address from their
    header `X-Forwarded-For`, so that limits for each address count clients and not the proxy."""
    max_body_kib: int = Field(16 * 1024, ge=1, le=900 * 1024)
    """Longest request in KiB, pictures included; longer ones get 413."""
    request: RequestLimits = RequestLimits()
    """What one request may ask for, for pools that do not say otherwise."""
    conversations: Conversations | None = None
    """Keep answers of `/v1/responses` and sessions (`/v1/sessions`); absent: the gateway stores no prompts."""
    page: Page = Page()
    """A page for people at `/` of the gateway's address."""
    tunnel: Tunnel | None = None
    """Where nodes behind NAT dial in (`dials_in`); absent: no port for workers is open."""
    entrance: Entrance | None = None
    """A restricted endpoint for clients outside the farm, with TLS and CORS."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Added to LiteLLM's rendered `config.yaml`: settings and entries of lists that this file does not know yet."""


class Poller(Section):
    """A program without an address, such as a page in a browser, that fetches jobs and brings the answers."""

    models: Annotated[tuple[ModelName, ...], Field(min_length=1, strict=False)]
    """Whose jobs it may take: pools, aliases, or names of a pool's `background`, as jobs spell them in `model`."""


class Jobs(Section):
    """Requests that may wait: a queue at `/v1/jobs` that outlives restarts, beside the gateway, and its workers."""

    workers: int = Field(4, ge=1, le=256)
    """Jobs that run at the same time."""
    model: ModelName | None = None
    """Model of requests that name none: a pool, an alias, or a name of a pool's `background`; without it the
    first of these."""
    depth: int = Field(1000, ge=1, le=100_000)
    """Jobs that may wait; more get 429 with Retry-After."""
    key_depth: int = Field(500, ge=1, le=100_000)
    """Unfinished jobs that one key may have."""
    ttl_s: int = Field(DAY_S, ge=1, le=30 * DAY_S)
    """Seconds within which a job must start, where it does not say so itself; later it is not run."""
    retries: int = Field(3, ge=0, le=20)
    """Further attempts after a failure that may pass, such as a lost worker or a 5xx; a full pool does not count."""
    keep_s: int = Field(DAY_S, ge=60, le=90 * DAY_S)
    """Seconds for which a finished job and its result are kept."""
    grace_s: int = Field(30, ge=2, le=3600)
    """Seconds without a sign of life after which a worker is lost, and another one takes its job."""
    callbacks: Annotated[tuple[Annotated[str, _text("origin")], ...], ANY_LIST] = ()
    """Origins to which results may be sent, such as `https://app.example.com`; without them there are no callbacks."""
    pollers: dict[Name, Poller] = Field(default_factory=dict)
    """Programs that fetch jobs themselves (`/v1/work`), each with a key of its own, beside the workers of the farm."""
    jarvis_path: bool = False
    """Whether jobs are also taken at `/internal/queue/enqueue`, as jarvis-llm-proxy does."""
    port: PortNumber = 4020
    """Port of the API; used inside the farm only."""
    store_port: PortNumber = 6380
    """Port of its store, a Valkey; used inside the farm only."""
    memory_mib: int = Field(256, ge=16, le=TIB_MIB)
    """Memory in MiB for jobs and results; when it is full, jobs get 503."""


class ConsumerLimits(Section):
    """What one key may ask for, over all its pools."""

    rpm: int | None = Field(None, ge=1, le=1_000_000_000)
    """Requests per minute."""
    tpm: int | None = Field(None, ge=1, le=1_000_000_000)
    """Tokens per minute, prompts and answers together."""
    parallel: int | None = Field(None, ge=1, le=100_000)
    """Requests at the same time."""


class Team(Section):
    """Consumers that share one budget."""

    budget: KeyBudget
    """What all its keys may spend together; a consumer's own budget applies as well."""


class Consumer(Section):
    """A person or program with a key of its own; `keys sync` makes LiteLLM agree."""

    pools: Annotated[tuple[Name, ...], Field(min_length=1, strict=False)] | None = None
    """Pools that the key opens, with their aliases; all of them when absent."""
    local_only: bool = False
    """Whether requests with the key stay in the house: without `pools` it opens those that have no `cloud` node."""
    limits: ConsumerLimits = ConsumerLimits()
    """What the key may ask for."""
    weight: int = Field(1, ge=1, le=100)
    """Share of slots and queue places while several keys wait, in relation to the weights of the others."""
    budget: KeyBudget | None = None
    """What the key may spend."""
    team: ConsumerName | None = None
    """Team whose budget it shares."""
    expires: Annotated[Line, AfterValidator(_moment)] | None = None
    """Day (its first moment, UTC) or moment from which the key is refused, such as `2027-01-31`."""
    metadata: dict[Name, Line | int | float | bool] = Field(default_factory=dict)
    """Notes that LiteLLM keeps with the key, such as `team: vision`; never a secret."""


class SignOn(Section):
    """Single sign-on with OpenID Connect, beside accounts with a password."""

    url: Server
    """Where the provider describes itself, such as `https://login.example.com/.well-known/openid-configuration`."""
    client: Word
    """Name under which the provider knows the page; it must allow the page's address with `/oauth/oidc/callback`."""
    secret: SecretName
    """Name of the secret that the provider gave for it; the value goes into `.env`."""
    title: Line = "single sign-on"
    """What the button says after `Continue with`."""
    approve: bool = True
    """Whether an administrator lets every new account in; false: each person whom the provider knows has an account."""


class AccountLimits(Section):
    """What one account of the chat page may ask for, its documents, pictures and speech included."""

    rpm: int | None = Field(None, ge=1, le=10_000)
    """Requests per minute. A question is one; the name of a new conversation is another."""
    parallel: int | None = Field(None, ge=1, le=1_000)
    """Requests at the same time."""


class Chat(Section):
    """A page to chat with the farm's models, for people with accounts: Open WebUI, beside the gateway."""

    port: PortNumber = 3080
    """Port for browsers, on the entrance's address and with its certificate, or else on that of the gateway."""
    url: Annotated[str, _text("web_origin")] | None = None
    """Where browsers find it, such as `https://chat.example.com`, if that is not the address and `port`."""
    admin: Annotated[str, _text("email")] = "admin@example.com"
    """E-mail address of the first account, which makes the others; its password is `CHAT_ADMIN_PASSWORD`."""
    pools: Annotated[tuple[Name, ...], Field(min_length=1, strict=False)] | None = None
    """Pools that the page may use: models to chat with, and for documents, pictures and speech the first of each kind.
    All of them when absent."""
    limits: ConsumerLimits = ConsumerLimits()
    """What all its users together may ask for."""
    per_account: AccountLimits = AccountLimits()
    """What each of its users may ask for. Dictation is not counted."""
    weight: int = Field(1, ge=1, le=100)
    """Share of slots and queue places of all its users together, as a consumer's."""
    titles: ModelName | None = None
    """Model that names conversations: a pool, an alias, or a name of a pool's `background`; each conversation's own
    when absent."""
    sign_on: SignOn | None = None
    """Single sign-on; without it an administrator makes every account."""
    program_port: PortNumber = 3081
    """Port of Open WebUI behind HAProxy; used inside the farm only."""
    memory_mib: Mib = 2048
    """Memory limit of its container, in MiB."""


Severity = Literal["critical", "warning", "watchdog"]


class Receiver(Section):
    """A receiver of alerts. What must stay secret is named here, and its value goes into `.env`."""

    name: Name
    """Name of the receiver."""
    kind: Literal["slack", "email", "webhook", "ntfy"]
    """How: Slack, e-mail, any program that takes Alertmanager's webhook, or ntfy on a phone."""
    severities: Annotated[tuple[Severity, ...], ANY_LIST] = ("critical", "warning")
    """Alerts that it gets: `critical` needs action now, `warning` can wait for hours, `watchdog` always fires, so
    that an outside service notices when it stops."""
    secret: SecretName | None = None
    """Name of the secret: the address for Slack, webhook and ntfy (with topic), the password for e-mail."""
    channel: Line | None = None
    """Slack: the channel, for instance `#farm`; the address's own when absent."""
    to: Word | None = None
    """E-mail: address of the recipient."""
    sender: Word | None = None
    """E-mail: address of the sender."""
    server: Word | None = None
    """E-mail: the mail server as `host:port`, for instance `mail.example.com:587`."""
    user: Word | None = None
    """E-mail: name of the account; its password is the secret."""
    repeat_h: float = Field(12.0, gt=0, le=720)
    """Hours after which an alert that still holds is sent again."""

    @model_validator(mode="after")
    def _is_complete(self) -> Self:
        needed = ("to", "sender", "server") if self.kind == "email" else ("secret",)
        missing = [name for name in needed if getattr(self, name) is None]
        if missing:
            raise ValueError(f"a receiver of kind {self.kind} needs {' and '.join(missing)}")
        if self.kind == "email" and (self.user is None) != (self.secret is None):
            raise ValueError("user and secret (its password) belong together")
        return self


if TYPE_CHECKING:

    class Thresholds(Section):
        """Thresholds of the alerts; those that code names."""

        gpu_warm_c: int = 0
        gpu_hot_c: int = 0
        certificate_days: float = 0
else:
    _THRESHOLDS = plain_yaml(Path(__file__).with_name("thresholds.yaml").read_bytes())
    Thresholds = create_model(
        "Thresholds", __base__=Section, __doc__="Thresholds of the alerts.",
        **{name: (type(row["default"]), Field(**row)) for name, row in _THRESHOLDS.items()},
    )  # fmt: skip


class Monitoring(Section):
    """Prometheus with rules and alerts, the exporters, Grafana, and the receivers of alerts."""

    host: Name
    """Host that runs the farm's Prometheus, Alertmanager and Grafana."""
    port: PortNumber = 9090
    """Port of Prometheus, bound to loopback: it has no password of its own."""
    receivers: Annotated[tuple[Receiver, ...], ANY_LIST] = ()
    """Receivers of alerts; with at least one there is an Alertmanager."""
    alertmanager_port: PortNumber = 9093
    """Port of Alertmanager, bound to loopback: it has no password of its own."""
    objective: Objective = Objective()
    """What clients may expect of every pool that does not say otherwise."""
    thresholds: Thresholds = Thresholds()
    """Thresholds of the alerts."""
    runbooks: Annotated[str, _text("url")] | None = None
    """Where people find the pages of docs/runbooks, as the start of an address; alerts link there."""
    gpu_exporter: Literal["nvidia", "dcgm", "none"] = "nvidia"
    """Exporter for the NVIDIA cards: nvidia_gpu_exporter (every card), dcgm-exporter (datacentre cards), or none."""
    gpu_exporter_port: PortNumber = 9835
    """Port of the cards' metrics on every host that has cards."""
    store_exporters: bool = True
    """Metrics of the gateway's PostgreSQL and Valkey."""
    database_exporter_port: PortNumber = 9187
    """Port of PostgreSQL's metrics; used inside the farm only, as long as the monitoring is on the gateway's host."""
    cache_exporter_port: PortNumber = 9121
    """Port of Valkey's metrics; used inside the farm only, as long as the monitoring is on the gateway's host."""
    node_exporter_port: PortNumber = 9100
    """Port of the machine metrics on every host."""
    node_exporter: bool = True
    """Machine metrics (CPU, memory, disk) of every host."""
    grafana: bool = True
    """Grafana with the pages of monitoring/dashboards, beside Prometheus; not on a `local` host."""
    grafana_port: PortNumber = 3000
    """Port of Grafana, on the host's address: it has a password of its own (`GRAFANA_ADMIN_PASSWORD`)."""
    local: dict[Name, PortNumber] = Field(default_factory=dict)
    """Hosts that keep a Prometheus of their own for what runs there, and its port."""
    scrape_interval_s: int = Field(15, ge=1, le=300)
    """Seconds between two readings."""
    retention_days: int = Field(30, ge=1, le=36_500)
    """Days that metrics are kept."""
    retention_gib: float = Field(10.0, ge=0.1, le=65536)
    """Disk space in GiB that metrics may take; the oldest go first."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Added to Prometheus' rendered configuration: settings and entries of lists, such as `scrape_configs`."""


class Tracing(Section):
    """Receiver of a trace of every request: pool, model, key, times, tokens, cost. Prompts only if asked for."""

    host: Name | None = None
    """Host that runs a Langfuse of the site's own; not a `local` one."""
    port: PortNumber = 3100
    """Port of that Langfuse, on the host's address: it has users and keys of its own (`LANGFUSE_ADMIN_PASSWORD`)."""
    clickhouse_mib: int = Field(4096, ge=1024, le=TIB_MIB)
    """Memory limit of its ClickHouse, in MiB; its other programs may take 5.5 GiB together."""
    url: Server | None = None
    """Instead of `host`: a receiver of OTLP over HTTP that you have, such as `http://192.0.2.5:4318`; traces go to
    `/v1/traces` below it."""
    secret: SecretName | None = None
    """Name of the secret that the receiver wants: the whole value of the header, such as `Bearer …`."""
    header: Header = "Authorization"
    """Header in which it wants the secret."""
    prompts: bool = False
    """Whether prompts and answers are part of a trace; nothing of them leaves the gateway otherwise."""

    @model_validator(mode="after")
    def _has_receiver(self) -> Self:
        if (self.host is None) == (self.url is None):
            raise ValueError("needs either the host for a Langfuse of its own or the url of a receiver")
        if self.url is None and self.secret is not None:
            raise ValueError("secret belongs to url; the key of the site's own Langfuse is made up")
        return self


class Inventory(Section):
    """A whole site in one file. Keys that start with `x-` are yours, for anchors and notes."""

    schema_version: Annotated[Literal[1], BeforeValidator(_version)]
    """Version of this format; write `schema_version: 1`."""
    name: Name
    """Name of the site; the Compose projects are called after it."""
    container_prefix: Annotated[str, _text("container_prefix")] | None = None
    """Begins the names of all containers, as `kids` in `kids-rig-litellm`, where a machine has two sites. Its unit with
    power limits then has the site's name, too."""
    runtime: Literal["compose", "swarm"] = "compose"
    """What runs the containers: Docker Compose on every host by itself, or one Docker Swarm of all hosts."""
    encrypted_networks: bool | None = None
    """`runtime: swarm`: whether the engines encrypt what goes from host to host (IPsec); yes when absent."""
    hosts: dict[Name, Host] = Field(min_length=1)
    """Machines on which the kit starts programs."""
    nodes: dict[Name, Node] = Field(default_factory=dict)
    """Inference servers that the kit only uses."""
    cards: dict[CardName, GpuKind] = Field(default_factory=dict)
    """Kinds of graphics cards: facts that the catalogue lacks, settings that suit the card."""
    models: dict[Name, Model] = Field(default_factory=dict)
    """Models by name."""
    defaults: dict[Kind, ServerSettings] = Field(default_factory=dict)
    """Engine settings for every pool of a kind."""
    pools: dict[Name, Pool] = Field(min_length=1)
    """What clients call."""
    gateway: Gateway
    """The one address that clients call."""
    consumers: dict[ConsumerName, Consumer] = Field(default_factory=dict)
    """Keys of people and programs, by name (LiteLLM's `key_alias`)."""
    teams: dict[ConsumerName, Team] = Field(default_factory=dict)
    """Budgets that several consumers share, by name (LiteLLM's `team_alias`)."""
    jobs: Jobs | None = None
    """Requests that may wait; without this section there is no queue."""
    chat: Chat | None = None
    """A page to chat on; without this section there is none."""
    monitoring: Monitoring | None = None
    """Prometheus and the exporters; without this section there is no monitoring."""
    tracing: Tracing | None = None
    """Receiver of a trace of every request; without this section there are no traces."""
    images: dict[Name, Word] = Field(default_factory=dict)
    """Container images, instead of the pinned ones."""

    _notes: dict[str, Any] = PrivateAttr(default_factory=dict)

    def node_of(self, place: Placement) -> Node | None:
        """The node of a place, with the model that the place names; None where it is none."""
        node = self.nodes.get(place.node or "")
        return node and node.serving(place.model)

    @property
    def notes(self) -> dict[str, Any]:
        """What stands under keys that start with `x-`."""
        return self._notes

    @model_validator(mode="wrap")
    @classmethod
    def _set_notes_apart(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, Mapping):
            return handler(data)
        notes = {key: value for key, value in data.items() if str(key).startswith("x-")}
        made = handler({key: value for key, value in data.items() if key not in notes})
        made._notes = notes  # noqa: SLF001 - its own
        return made
