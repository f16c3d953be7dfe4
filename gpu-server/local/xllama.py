"""llama-server's command line in front of xllamacpp, the PyPI wheel of llama.cpp's server.

For machines without a llama-server on PATH: the local runtime starts `llama-server` beside this file with the arguments
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
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

Parameters = Any  # xllamacpp's CommonParams; the wheel ships no types
Converter = Callable[[str], object]

DEFAULT_PORT = 8080
# Begins the log line after which signals end the process with 0; `/health` is good a moment before.
READY = "llama-server ready"
LARGEST = 2**31 - 1
CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
REASONING = {"on": 1, "off": 0, "auto": -1}
GPU_LAYERS = {"auto": -1, "all": -2}


class UsageError(Exception):
    """A command line that llama-server does not start with; the message is for its user."""


@dataclass(frozen=True)
class Option:
    """One argument: the parameters that it sets (dotted where nested), and to what its value is converted."""

    attributes: tuple[str, ...]
    convert: Converter
    takes_value: bool = True


# --- from a word to a value


def _number(value: str, least: int = -LARGEST, most: int = LARGEST) -> int:
    """A number that llama.cpp takes; it aborts on some others, and uses port 70000 as 4464."""
    try:
        number = int(value)
    except ValueError:
        raise ValueError(f"{value!r} is not a whole number") from None
    if not least <= number <= most:
        raise ValueError(f"{number} is not between {least} and {most}")
    return number


def _slots(value: str) -> int:
    slots = _number(value)
    if slots == 0:
        raise ValueError("0 slots serve no request; -1 lets the server choose")
    return slots


def _threads(value: str) -> int:
    """As many threads as said, or as there are processors when fewer than one is said."""
    number = _number(value)
    return number if number > 0 else os.cpu_count() or 1


def _is_on(value: str) -> bool:
    if value not in ("on", "off"):
        raise ValueError(f"{value!r} is neither on nor off")
    return value == "on"


def _gpu_layers(value: str) -> int:
    return GPU_LAYERS[value] if value in GPU_LAYERS else _number(value)


def _member(enumeration: str, members: Sequence[str] | Mapping[str, str]) -> Converter:
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
        raise ValueError(f"no key in {file}: without one the server would answer every program")
    return keys


def _shares(value: str) -> list[float]:
    """Shares of cards, of all that llama.cpp can use."""
    import xllamacpp

    shares, usual = list(map(float, _words(value))), list(xllamacpp.CommonParams().tensor_split)
    return [*shares, *usual[len(shares) :]]


def _speculative_types(value: str) -> list[object]:
    return [_member("common_speculative_type", ("none", "draft-simple"))(word) for word in _words(value)]


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


def _reasoning(value: str) -> int:
    if value not in REASONING:
        raise ValueError(f"{value!r} is none of {', '.join(REASONING)}")
    return REASONING[value]


# --- what works here


def _value(attribute: str, convert: Converter = str, *more: str) -> Option:
    return Option((attribute, *more), convert)


def _switch(attribute: str, value: object = True) -> Option:  # noqa: FBT002 - what the switch sets
    return Option((attribute,), lambda _: value, takes_value=False)


_AT_LEAST_0 = partial(_number, least=0)
_AT_LEAST_1 = partial(_number, least=1)
_CACHE_TYPE = _member("ggml_type", CACHE_TYPES)
_FLASH_ATTENTION = _member("llama_flash_attn_type", {"on": "enabled", "off": "disabled", "auto": "auto"})
_LOAD_MODE = _member(
    "llama_load_mode",
    {"none": "none", "mmap": "mmap", "mlock": "mlock", "mmap+mlock": "mmap_mlock", "dio": "direct_io"},
)
_POOLING = _member("llama_pooling_type", ("none", "mean", "cls", "last", "rank"))
_REASONING_FORMAT = _member("common_reasoning_format", ("none", "auto", "deepseek", "deepseek-legacy"))
_SPLIT_MODE = _member("llama_split_mode", ("none", "layer", "row", "tensor"))

OPTIONS: Mapping[str, Option] = {
    # the model
    "--model": _value("model.path"),
    "--mmproj": _value("mmproj.path"),
    "--alias": _value("model_alias", lambda value: set(_words(value))),
    "--offline": _switch("offline"),
    "--load-mode": _value("load_mode", _LOAD_MODE),
    "--no-warmup": _switch("warmup", value=False),
    # slots, batches and caches
    "--ctx-size": _value("n_ctx", _AT_LEAST_0),
    "--parallel": _value("n_parallel", _slots),
    "--batch-size": _value("n_batch", _AT_LEAST_1),
    "--ubatch-size": _value("n_ubatch", _AT_LEAST_1),
    "--cache-type-k": _value("cache_type_k", _CACHE_TYPE),
    "--cache-type-v": _value("cache_type_v", _CACHE_TYPE),
    "--kv-unified": _switch("kv_unified"),
    "--ctx-checkpoints": _value("n_ctx_checkpoints", _AT_LEAST_0),
    "--cache-ram": _value("cache_ram_mib", _number),
    "--no-cache-prompt": _switch("cache_prompt", value=False),
    "--cache-reuse": _value("n_cache_reuse", _number),
    # a small model that drafts for a large one, and adapters
    "--spec-type": _value("speculative.types", _speculative_types),
    "--spec-draft-model": _value("speculative.draft.mparams.path"),
    "--spec-draft-n-max": _value("speculative.draft.n_max", _AT_LEAST_0),
    "--spec-draft-n-min": _value("speculative.draft.n_min", _AT_LEAST_0),
    "--spec-draft-p-min": _value("speculative.draft.p_min", float),
    "--spec-draft-ngl": _value("speculative.draft.n_gpu_layers", _gpu_layers),
    "--spec-draft-type-k": _value("speculative.draft.cache_type_k", _CACHE_TYPE),
    "--spec-draft-type-v": _value("speculative.draft.cache_type_v", _CACHE_TYPE),
    "--lora-scaled": _value("lora_adapters", _adapters),
    # where it computes
    "--threads": _value("cpuparams.n_threads", _threads, "cpuparams_batch.n_threads"),
    "--n-gpu-layers": _value("n_gpu_layers", _gpu_layers),
    "--split-mode": _value("split_mode", _SPLIT_MODE),
    "--tensor-split": _value("tensor_split", _shares),
    "--flash-attn": _value("flash_attn_type", _FLASH_ATTENTION),
    "--fit": _value("fit_params", _is_on),
    # what it serves
    "--embeddings": _switch("embedding"),
    "--pooling": _value("pooling_type", _POOLING),
    "--reranking": _switch("embedding"),  # and the pooling that goes with it, see parse
    "--jinja": _switch("use_jinja"),
    "--no-jinja": _switch("use_jinja", value=False),
    "--reasoning": _value("enable_reasoning", _reasoning),
    "--reasoning-format": _value("reasoning_format", _REASONING_FORMAT),
    "--chat-template-kwargs": _value("default_template_kwargs", _json_values),
    # HTTP
    "--host": _value("hostnames", _words),
    "--port": _value("port", partial(_number, least=0, most=65535)),
    "--threads-http": _value("n_threads_http", _number),
    "--sleep-idle-seconds": _value("sleep_idle_seconds", _number),
    "--api-key-file": _value("api_keys", _keys_in),
    "--metrics": _switch("endpoint_metrics"),
    "--no-webui": _switch("ui", value=False),
    "--webui": _switch("ui"),
}


# --- from words to parameters


def parse(arguments: Sequence[str]) -> Parameters:
    """The CommonParams that llama-server would serve with; UsageError when it would not start."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.port = DEFAULT_PORT
    parameters.n_parallel = -1  # llama-server's own default, by which it chooses
    words = iter(arguments)
    for word in words:
        option = OPTIONS.get(word)
        if option is None:
            raise UsageError(f"unknown argument: {word}")
        value = next(words, "") if option.takes_value else "on"
        if not value:
            raise UsageError(f'argument "{word}" lacks its value')
        _apply(parameters, word, option, value)
    _check_readable("--model", parameters.model.path)
    if parameters.mmproj.path:
        _check_readable("--mmproj", parameters.mmproj.path)
    return parameters


def _apply(parameters: Parameters, word: str, option: Option, value: str) -> None:
    try:
        converted = option.convert(value)
        for attribute in option.attributes:
            _set(parameters, attribute, converted)
        if word == "--reranking":
            parameters.pooling_type = _POOLING("rank")
        if word == "--reasoning" and value != "auto":  # its own parser knows then, the chat template has to be told
            told = {"enable_thinking": json.dumps(value == "on")}
            parameters.default_template_kwargs = {**parameters.default_template_kwargs, **told}
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise UsageError(f'argument "{word}": {error}') from error


def _set(parameters: Parameters, attribute: str, value: object) -> None:
    owner, _, name = attribute.rpartition(".")
    setattr(attrgetter(owner)(parameters) if owner else parameters, name, value)


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


# --- serving


def main(arguments: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT end the process with 0; returns 1 when it cannot serve.

    Until the model is loaded, these signals end the process at once too, but by the signal, as they end llama-server.
    """
    try:
        parameters = parse(arguments)
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
