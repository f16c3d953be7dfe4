"""llama.cpp's own accounting of a server's memory, on cards that do not exist: no weights are read, no memory is taken.

`python -m tests.llama_accounting CARDS < cases.json` prints for every case what `llama-fit-params --fit-print` would:
MiB of weights, context and compute buffers on each card and in host memory. llama.cpp is the wheel's. A card is a
copy of its CPU device that says that it is a GPU with memory of its own; like CUDA it takes long batches of what lies
in host memory. Everything else, from the split over cards to the graph's buffers, is llama.cpp's.
A process of its own, because llama.cpp ends it when a file cannot be loaded, and devices are never unregistered.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Where a device keeps its functions, as ggml-backend-impl.h lists them.
NAME, DESCRIPTION, MEMORY, TYPE, PROPERTIES, INIT, BUFFERS, HOST_BUFFERS, FROM_HOST, COMPUTES, READS, TAKES = range(12)
# The same of a type of buffers, and where it keeps its device.
BUFFER_NAME, IS_HOST, DEVICE = 0, 7, 8
GPU = 1
BACKEND_WORDS, DEVICE_WORDS, BUFFER_WORDS = 24, 17, 10
LEAST_BATCH = 32
PARAMETERS_OFFSET = 16
MODEL_PARAMETERS, CONTEXT_PARAMETERS = ctypes.c_uint8 * 80, ctypes.c_uint8 * 192
OVERRIDES_AT = 8
Pointer = ctypes.c_void_p
Case = Mapping[str, Any]
_kept: list[Any] = []


def accounts(cases: Sequence[Case], cards: int = 1) -> list[dict[str, list[int]]]:
    """MiB of weights, context and compute buffers by device (`GPU0` …, `Host`), for every case.

    A case has `words`, a command line of llama-server; `parameters`, more of its parameters by xllamacpp's names; and
    `on_host`, patterns of tensors that stay in host memory.
    """
    command = [sys.executable, "-m", "tests.llama_accounting", str(cards)]
    done = subprocess.run(command, cwd=ROOT, input=json.dumps(cases), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"llama.cpp counts nothing: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


class _Wheel:
    """llama.cpp's functions in the wheel of xllamacpp."""

    def __init__(self) -> None:
        import xllamacpp

        self.library = ctypes.CDLL(str(Path(xllamacpp.__file__).with_name("xllamacpp.abi3.so")))

    def function(self, name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
        found = getattr(self.library, name)
        found.restype, found.argtypes = result, list(arguments)
        return found  # type: ignore[no-any-return]


def _copy(address: int, words: int) -> Any:
    copied = (ctypes.c_uint64 * words)(*(ctypes.c_uint64 * words).from_address(address))
    _kept.append(copied)
    return copied


def _text(value: str) -> int:
    text = ctypes.create_string_buffer(value.encode())
    _kept.append(text)
    return ctypes.addressof(text)


def _callback(result: Any, count: int, function: Callable[..., Any]) -> int:
    made = ctypes.CFUNCTYPE(result, *[Pointer] * count)(function)
    _kept.append(made)
    return ctypes.cast(made, Pointer).value or 0


def add_card(wheel: _Wheel, name: str, memory: int) -> None:
    """Registers a card with so many bytes of memory."""
    cpu = wheel.function("ggml_backend_dev_get", Pointer, ctypes.c_size_t)(0)
    memory_of_cpu = wheel.function("ggml_backend_cpu_buffer_type", Pointer)()
    device, own, pinned = (
        _copy(cpu, DEVICE_WORDS),
        _copy(memory_of_cpu, BUFFER_WORDS),
        _copy(memory_of_cpu, BUFFER_WORDS),
    )
    address, label = ctypes.addressof(device), _text(name)
    for buffers, title in ((own, name), (pinned, f"{name}_Host")):
        text = _text(title)
        buffers[BUFFER_NAME] = _callback(Pointer, 1, lambda _, text=text: text)
        buffers[DEVICE] = address
    own[IS_HOST] = _callback(ctypes.c_bool, 1, lambda _: False)

    def tell_memory(_device: int, free: int, total: int) -> None:
        for where in (free, total):
            ctypes.c_size_t.from_address(where).value = memory

    def tell_properties(_device: int, where: int) -> None:
        (ctypes.c_uint64 * 6).from_address(where)[:] = [label, label, memory, memory, GPU, 0]
        # asynchronous, pinned memory, no buffers from pointers, events, no mapping
        (ctypes.c_uint8 * 5).from_address(where + 48)[:] = [1, 1, 0, 1, 0]

    def start(_device: int, _parameters: int) -> int:
        backend: int = wheel.function("ggml_backend_cpu_init", Pointer)()
        words = (ctypes.c_uint64 * BACKEND_WORDS).from_address(backend)
        words[list(words).index(cpu)] = address
        return backend

    device[NAME] = device[DESCRIPTION] = _callback(Pointer, 1, lambda _: label)
    device[MEMORY] = _callback(None, 3, tell_memory)
    device[TYPE] = _callback(ctypes.c_int, 1, lambda _: GPU)
    device[PROPERTIES] = _callback(None, 2, tell_properties)
    device[INIT] = _callback(Pointer, 2, start)
    device[BUFFERS] = _callback(Pointer, 1, lambda _: ctypes.addressof(own))
    device[HOST_BUFFERS] = _callback(Pointer, 1, lambda _: ctypes.addressof(pinned))
    device[FROM_HOST] = 0
    device[COMPUTES] = _callback(ctypes.c_bool, 2, lambda _device, _operation: True)
    device[READS] = _callback(ctypes.c_bool, 2, lambda _device, buffers: buffers == ctypes.addressof(own))
    device[TAKES] = _callback(ctypes.c_bool, 2, _is_long_batch(wheel))
    wheel.function("ggml_backend_device_register", None, Pointer)(address)


def _is_long_batch(wheel: _Wheel) -> Callable[[int, int], bool]:
    """Whether an operation has enough columns that copying its weights to the card pays off, as CUDA decides it."""
    name = wheel.function("ggml_op_name", ctypes.c_char_p, ctypes.c_int)
    kinds = {name(number): number for number in range(80)}

    def decide(_device: int, operation: int) -> bool:
        kind = ctypes.c_int.from_address(operation + 80).value
        _, columns, third, fourth = (ctypes.c_int64 * 4).from_address(operation + 16)
        if kind == kinds[b"GET_ROWS"]:
            return False
        if kind == kinds[b"MUL_MAT"]:
            return columns >= LEAST_BATCH
        if kind in (kinds[b"MUL_MAT_ID"], kinds[b"ROPE"]):
            return third >= LEAST_BATCH
        return columns * third * fourth >= LEAST_BATCH

    return decide


def _account(wheel: _Wheel, case: Case) -> dict[str, list[int]]:
    sys.path.insert(0, str(ROOT / "gpu-server" / "local"))
    from xllama import parse

    parameters = parse(case["words"])
    for name, value in case.get("parameters", {}).items():
        setattr(
            parameters, name, [*value, *getattr(parameters, name)[len(value) :]] if isinstance(value, list) else value
        )
    # The C++ structure lies behind the Python object's head.
    address = id(parameters) + PARAMETERS_OFFSET
    model = wheel.function("_Z28common_model_params_to_llamaR13common_params", _by_value(MODEL_PARAMETERS), Pointer)(
        address
    )
    context = wheel.function(
        "_Z30common_context_params_to_llamaRK13common_params", _by_value(CONTEXT_PARAMETERS), Pointer
    )(address)
    _add_overrides(wheel, model, case.get("on_host", ()))
    show = wheel.function(
        "_Z16common_fit_printPKcP18llama_model_paramsP20llama_context_params", None, ctypes.c_char_p, Pointer, Pointer
    )
    path = case["words"][case["words"].index("--model") + 1]
    lines = _printed(lambda: show(path.encode(), ctypes.byref(model), ctypes.byref(context))).splitlines()
    return {words[0]: [int(word) for word in words[1:]] for words in map(str.split, lines) if words}


def _by_value(content: Any) -> Any:
    return type("Value", (ctypes.Structure,), {"_fields_": [("bytes", content)]})


def _add_overrides(wheel: _Wheel, model: Any, patterns: Sequence[str]) -> None:
    """Patterns with the CPU's buffers, a pair of zeros at the end."""
    if patterns:
        buffers = wheel.function("ggml_backend_cpu_buffer_type", Pointer)()
        pairs = [word for pattern in patterns for word in (_text(pattern), buffers)]
        table = (ctypes.c_uint64 * (len(pairs) + 2))(*pairs, 0, 0)
        _kept.append(table)
        ctypes.c_uint64.from_address(ctypes.addressof(model) + OVERRIDES_AT).value = ctypes.addressof(table)


def _printed(function: Callable[[], object]) -> str:
    """What a C function prints to the standard output."""
    before = os.dup(1)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            function()
            ctypes.CDLL(None).fflush(None)
        finally:
            os.dup2(before, 1)
            os.close(before)
        file.seek(0)
        return file.read().decode()


def main() -> None:
    """Counts the cases of the standard input."""
    wheel = _Wheel()
    for number in range(int(sys.argv[1])):
        add_card(wheel, f"GPU{number}", 1 << 40)
    for case in json.load(sys.stdin):
        sys.stdout.write(json.dumps(_account(wheel, case)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
