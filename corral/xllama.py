"""llama-server's command line in front of xllamacpp, the PyPI wheel of llama.cpp's server.

For machines without a llama-server on PATH: the local runtime starts `gpu-server/local/llama-server` with the arguments
that the container would get. `OPTIONS` is what of llama-server's command line works here; everything else is refused as
llama-server refuses what it does not know. HTTP, loading and inference are llama.cpp's own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

Parameters = Any  # xllamacpp's CommonParams; the wheel ships no types
Setter = Callable[[Parameters, str], None]

DEFAULT_PORT = 8080
READY = "llama-server ready"
"""Begins the log line after which signals end the process with 0; `/health` is good a moment before."""

ON, OFF = ("on", "enabled", "true", "1"), ("off", "disabled", "false", "0")

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
SPECULATIVE = ("none", "draft-simple")
REASONING = {"on": 1, "off": 0, "auto": -1}
GPU_LAYERS = {"auto": -1, "all": -2}


class UsageError(Exception):
    """A command line that llama-server does not start with; the message is for its user."""


@dataclass(frozen=True)
class Option:
    """One argument: its spellings, what it does, and the environment variable that does the same."""

    names: tuple[str, ...]
    setter: Setter
    value: str = ""  # what the value is called in --help; empty for a switch, whose setter gets "on" or "off"
    opposites: tuple[str, ...] = ()  # a switch's spellings for "off"
    environment: str = ""


# --- what an argument does


def _sets(attribute: str, convert: Callable[[str], object] = str) -> Setter:
    """Sets an attribute (dotted for nested parameters) to the converted value."""
    owner, _, name = attribute.rpartition(".")

    def apply(parameters: Parameters, value: str) -> None:
        setattr(attrgetter(owner)(parameters) if owner else parameters, name, convert(value))

    return apply


def _adds(attribute: str, convert: Callable[[str], list[str]]) -> Setter:
    """Adds to a list or set that an argument before may have added to."""

    def apply(parameters: Parameters, value: str) -> None:
        present = getattr(parameters, attribute)
        setattr(parameters, attribute, type(present)([*present, *convert(value)]))

    return apply


def _all(*setters: Setter) -> Setter:
    def apply(parameters: Parameters, value: str) -> None:
        for setter in setters:
            setter(parameters, value)

    return apply


def _always(setter: Setter, value: str) -> Setter:
    """Sets one value, whatever the argument's is."""
    return lambda parameters, _value: setter(parameters, value)


def _is_on(value: str) -> bool:
    if value not in ON + OFF:
        raise ValueError(f"{value!r} is neither on nor off")
    return value in ON


def _number(value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{value!r} is not a whole number") from None


def _number_in(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """Numbers that llama.cpp takes; it aborts on some others, and uses port 70000 as 4464."""

    def convert(value: str) -> int:
        number = _number(value)
        if not least <= number <= most:
            raise ValueError(f"{number} is not between {least} and {most}")
        return number

    return convert


def _slots(value: str) -> int:
    slots = _number(value)
    if slots == 0:
        raise ValueError("0 slots serve nobody; -1 lets the server choose")
    return slots


def _threads(value: str) -> int:
    """As many threads as said, or as there are processors when fewer than one is said."""
    number = _number(value)
    return number if number > 0 else os.cpu_count() or 1


def _member(enumeration: str, members: Sequence[str] | Mapping[str, str]) -> Callable[[str], object]:
    """Turns one of the words into a member of an xllamacpp enum, by its name there if it differs."""

    def convert(word: str) -> object:
        import xllamacpp

        if word not in members:
            raise ValueError(f"{word!r} is none of {', '.join(members)}")
        name = members[word] if isinstance(members, Mapping) else word
        return getattr(getattr(xllamacpp, enumeration), f"{enumeration}_{name.replace('-', '_')}".upper())

    return convert


def _words(value: str) -> list[str]:
    return [word for word in map(str.strip, value.split(",")) if word]


def _keys_in(file: str) -> list[str]:
    """API keys, one per line; lines that begin with a hash are comments."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"no key in {file}: without one the server would be open to everybody")
    return keys


def _gpu_layers(value: str) -> int:
    return GPU_LAYERS[value] if value in GPU_LAYERS else _number(value)


def _speculative_types(value: str) -> list[object]:
    convert = _member("common_speculative_type", SPECULATIVE)
    return [convert(word) for word in _words(value)]


def _adapters(value: str) -> list[object]:
    """LoRA adapters and how strongly each works on requests that do not say it."""
    import xllamacpp

    found = []
    for word in _words(value):
        file, colon, scale = word.partition(":")
        if not colon or ":" in scale:
            raise ValueError(f"{word!r} is not FILE:SCALE")
        found.append(xllamacpp.CommonAdapterLoraInfo(file, float(scale)))
    return found


def _json_values(value: str) -> dict[str, str]:
    """The members of a JSON object, each as JSON again, which is how llama.cpp keeps them."""
    members = json.loads(value)
    if not isinstance(members, dict):
        raise TypeError("not a JSON object")
    return {name: json.dumps(member, ensure_ascii=False) for name, member in members.items()}


def _reason(parameters: Parameters, value: str) -> None:
    """Thinking as llama-server turns it on and off: for its own parser, and in the chat template."""
    if value not in REASONING:
        raise ValueError(f"{value!r} is none of {', '.join(REASONING)}")
    parameters.enable_reasoning = REASONING[value]
    if value != "auto":
        told = {"enable_thinking": json.dumps(value == "on")}
        parameters.default_template_kwargs = {**parameters.default_template_kwargs, **told}


_FLASH_ATTENTION = _member("llama_flash_attn_type", {"on": "enabled", "off": "disabled", "auto": "auto"})
_LOAD_MODE = _member(
    "llama_load_mode",
    {"none": "none", "mmap": "mmap", "mlock": "mlock", "mmap+mlock": "mmap_mlock", "dio": "direct_io"},
)
_POOLING = _member("llama_pooling_type", ("none", "mean", "cls", "last", "rank"))
_REASONING_FORMAT = _member("common_reasoning_format", ("none", "auto", "deepseek", "deepseek-legacy"))
_SPLIT_MODE = _member("llama_split_mode", ("none", "layer", "row", "tensor"))


def _value(names: str, value: str, setter: Setter, environment: str = "") -> Option:
    return Option(tuple(names.split()), setter, value, (), f"LLAMA_ARG_{environment}" if environment else "")


def _switch(names: str, setter: Setter, environment: str = "", *, off: str = "") -> Option:
    variable = f"LLAMA_ARG_{environment}" if environment else ""
    return Option(tuple(names.split()), setter, "", tuple(off.split()), variable)


OPTIONS = (
    # the model
    _value("--model -m", "FILE", _sets("model.path"), "MODEL"),
    _value("--mmproj -mm", "FILE", _sets("mmproj.path"), "MMPROJ"),
    _value("--alias -a", "NAME,...", _adds("model_alias", _words), "ALIAS"),
    _switch("--offline", _sets("offline", _is_on), "OFFLINE"),
    _value("--load-mode -lm", "MODE", _sets("load_mode", _LOAD_MODE), "LOAD_MODE"),
    _switch("--warmup", _sets("warmup", _is_on), off="--no-warmup"),
    # slots, batches and caches
    _value("--ctx-size -c", "TOKENS", _sets("n_ctx", _number_in(0)), "CTX_SIZE"),
    _value("--parallel -np", "SLOTS", _sets("n_parallel", _slots), "N_PARALLEL"),
    _switch("--kv-unified -kvu", _sets("kv_unified", _is_on), "KV_UNIFIED", off="--no-kv-unified -no-kvu"),
    _value("--batch-size -b", "TOKENS", _sets("n_batch", _number_in(1)), "BATCH"),
    _value("--ubatch-size -ub", "TOKENS", _sets("n_ubatch", _number_in(1)), "UBATCH"),
    _switch("--cont-batching -cb", _sets("cont_batching", _is_on), "CONT_BATCHING", off="--no-cont-batching -nocb"),
    _value("--cache-type-k -ctk", "TYPE", _sets("cache_type_k", _member("ggml_type", CACHE_TYPES)), "CACHE_TYPE_K"),
    _value("--cache-type-v -ctv", "TYPE", _sets("cache_type_v", _member("ggml_type", CACHE_TYPES)), "CACHE_TYPE_V"),
    _value("--cache-ram -cram", "MIB", _sets("cache_ram_mib", _number), "CACHE_RAM"),
    _switch("--cache-prompt", _sets("cache_prompt", _is_on), "CACHE_PROMPT", off="--no-cache-prompt"),
    _value("--cache-reuse", "TOKENS", _sets("n_cache_reuse", _number), "CACHE_REUSE"),
    _value("--ctx-checkpoints -ctxcp --swa-checkpoints", "N", _sets("n_ctx_checkpoints", _number), "CTX_CHECKPOINTS"),
    # a small model that drafts for a large one, and adapters
    _value("--spec-type", "TYPE,...", _sets("speculative.types", _speculative_types), "SPEC_TYPE"),
    _value("--spec-draft-model -md --model-draft", "FILE", _sets("speculative.draft.mparams.path"), "SPEC_DRAFT_MODEL"),
    _value("--spec-draft-n-max", "TOKENS", _sets("speculative.draft.n_max", _number_in(0)), "SPEC_DRAFT_N_MAX"),
    _value("--spec-draft-n-min", "TOKENS", _sets("speculative.draft.n_min", _number_in(0)), "SPEC_DRAFT_N_MIN"),
    _value("--spec-draft-p-min --draft-p-min", "P", _sets("speculative.draft.p_min", float), "SPEC_DRAFT_P_MIN"),
    _value(
        "--spec-draft-ngl -ngld --gpu-layers-draft --n-gpu-layers-draft",
        "N|all|auto",
        _sets("speculative.draft.n_gpu_layers", _gpu_layers),
        "N_GPU_LAYERS_DRAFT",
    ),
    _value(
        "--spec-draft-type-k -ctkd --cache-type-k-draft",
        "TYPE",
        _sets("speculative.draft.cache_type_k", _member("ggml_type", CACHE_TYPES)),
        "SPEC_DRAFT_CACHE_TYPE_K",
    ),
    _value(
        "--spec-draft-type-v -ctvd --cache-type-v-draft",
        "TYPE",
        _sets("speculative.draft.cache_type_v", _member("ggml_type", CACHE_TYPES)),
        "SPEC_DRAFT_CACHE_TYPE_V",
    ),
    _value("--lora-scaled", "FILE:SCALE,...", _sets("lora_adapters", _adapters)),
    # where it computes
    _value("--threads -t", "N", _sets("cpuparams.n_threads", _threads), "THREADS"),
    _value("--threads-batch -tb", "N", _sets("cpuparams_batch.n_threads", _threads)),
    _value("--n-gpu-layers --gpu-layers -ngl", "N|all|auto", _sets("n_gpu_layers", _gpu_layers), "N_GPU_LAYERS"),
    _value("--split-mode -sm", "MODE", _sets("split_mode", _SPLIT_MODE), "SPLIT_MODE"),
    _value("--flash-attn -fa", "on|off|auto", _sets("flash_attn_type", _FLASH_ATTENTION), "FLASH_ATTN"),
    _value("--fit -fit", "on|off", _sets("fit_params", _is_on), "FIT"),
    # what it serves
    _switch("--embeddings --embedding", _sets("embedding", _is_on), "EMBEDDINGS"),
    _value("--pooling", "TYPE", _sets("pooling_type", _POOLING), "POOLING"),
    _switch(
        "--reranking --rerank",
        _all(_sets("embedding", _is_on), _always(_sets("pooling_type", _POOLING), "rank")),
        "RERANKING",
    ),
    _switch("--jinja", _sets("use_jinja", _is_on), "JINJA", off="--no-jinja"),
    _value("--reasoning -rea", "on|off|auto", _reason, "REASONING"),
    _value("--reasoning-format", "FORMAT", _sets("reasoning_format", _REASONING_FORMAT), "THINK"),
    _value("--chat-template-kwargs", "JSON", _sets("default_template_kwargs", _json_values), "CHAT_TEMPLATE_KWARGS"),
    # HTTP
    _value("--host", "ADDRESS,...", _sets("hostnames", _words), "HOST"),
    _value("--port", "PORT", _sets("port", _number_in(0, 65535)), "PORT"),
    _value("--threads-http", "N", _sets("n_threads_http", _number), "THREADS_HTTP"),
    _value(
        "--timeout -to", "SECONDS", _all(_sets("timeout_read", _number), _sets("timeout_write", _number)), "TIMEOUT"
    ),
    _value("--sleep-idle-seconds", "SECONDS", _sets("sleep_idle_seconds", _number)),
    _value("--api-key-file", "FILE", _adds("api_keys", _keys_in), "API_KEY_FILE"),
    Option(("--api-key",), _adds("api_keys", _words), "KEY,...", environment="LLAMA_API_KEY"),
    _switch("--metrics", _sets("endpoint_metrics", _is_on), "ENDPOINT_METRICS"),
    _switch("--slots", _sets("endpoint_slots", _is_on), "ENDPOINT_SLOTS", off="--no-slots"),
    _switch("--props", _sets("endpoint_props", _is_on), "ENDPOINT_PROPS"),
    _switch("--ui --webui", _sets("ui", _is_on), "UI", off="--no-ui --no-webui"),
)


# --- from words to parameters


def apply_environment(parameters: Parameters, environment: Mapping[str, str]) -> None:
    """Set what environment variables say (an empty one says nothing); UsageError when one of them is wrong."""
    for option in OPTIONS:
        value = environment.get(option.environment, "")
        is_idle = value in OFF and not option.value and not option.opposites
        if value and not is_idle:
            _apply(option, parameters, value, f'environment variable "{option.environment}"')


def apply_arguments(parameters: Parameters, arguments: Sequence[str]) -> None:
    """Set what the command line says; UsageError for the first argument that is unknown, wrong or lacks its value."""
    known = {name: (option, "on") for option in OPTIONS for name in option.names}
    known |= {name: (option, "off") for option in OPTIONS for name in option.opposites}
    words = iter(arguments)
    for word in words:
        name = word.replace("_", "-") if word.startswith("--") else word
        if name not in known:
            raise UsageError(f"unknown argument: {word}")
        option, value = known[name]
        if option.value:
            value = next(words, "")
        if not value:
            raise UsageError(f'argument "{word}" lacks its value')
        _apply(option, parameters, value, f'argument "{word}"')


def _apply(option: Option, parameters: Parameters, value: str, source: str) -> None:
    try:
        option.setter(parameters, value)
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise UsageError(f"{source}: {error}") from error


def parse(arguments: Sequence[str], environment: Mapping[str, str]) -> Parameters:
    """The CommonParams that llama-server would serve with; UsageError when it would not start."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.port = DEFAULT_PORT
    parameters.n_parallel = -1  # llama-server's own default, by which it chooses
    apply_environment(parameters, environment)
    apply_arguments(parameters, arguments)
    if parameters.cpuparams_batch.n_threads < 0:
        parameters.cpuparams_batch.n_threads = parameters.cpuparams.n_threads
    _check_readable("--model", parameters.model.path)
    if parameters.mmproj.path:
        _check_readable("--mmproj", parameters.mmproj.path)
    return parameters


def _check_readable(argument: str, file: str) -> None:
    if not file:
        raise UsageError(f"{argument} is missing: there is nothing to serve")
    try:
        with Path(file).open("rb") as content:
            magic = content.read(4)
    except OSError as error:
        raise UsageError(f"cannot read {argument} {file}: {error.strerror}") from error
    if magic != b"GGUF":
        raise UsageError(f"{argument} {file} is no GGUF file")


def help_text() -> str:
    """What `--help` prints: every argument that works here."""
    lines = ["usage: llama-server --model FILE [argument ...]", "", "llama.cpp's server, from the wheel xllamacpp.", ""]
    for option in OPTIONS:
        names = ", ".join((*option.names, *option.opposites))
        lines.append(
            f"  {names} {option.value}".rstrip() + (f"  (env: {option.environment})" * bool(option.environment))
        )
    return "\n".join(lines) + "\n"


# --- serving


def main(arguments: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT end the process with 0; returns 1 when it cannot serve, and 0 after help.

    Until the model is loaded, these signals end the process at once too, but by the signal, as they end llama-server.
    """
    if {"--help", "-h"} & set(arguments):
        sys.stdout.write(help_text())
        return 0
    try:
        parameters = parse(arguments, os.environ)
    except UsageError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return _serve(parameters)


def _serve(parameters: Parameters) -> int:
    import xllamacpp

    # Loading holds Python's lock, so Python's own handler for SIGINT would wait for a model of many gigabytes.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        server = xllamacpp.Server(parameters)  # answers 503 from the start; returns once the model is loaded
    except RuntimeError:
        where = f"{','.join(parameters.hostnames)}:{parameters.port}"
        # llama.cpp logs from a thread of its own: its lines may come before or after this one.
        sys.stderr.write(f"error: cannot serve {parameters.model.path} on {where}; llama.cpp's log lines say why\n")
        return 1
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    sys.stderr.write(f"{READY} on {server.listening_address}, from xllamacpp {xllamacpp.__version__}\n")
    while server:  # its name keeps it alive
        signal.pause()
    return 1


def _end(_signal: int, _frame: FrameType | None) -> NoReturn:
    """End the process at once, answers in flight included; there is nothing to save.

    Server has no method to stop it, and its destructor waits for the main loop: as long as a request takes, and forever
    when the loop has not begun.
    """
    os._exit(0)
