"""GGUF files of published models that have everything but weights: the header, and a hole as long as the tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from corral.config.source import plain_yaml

EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")


@cache
def models() -> dict[str, dict[str, Any]]:
    """Every model by its name, as models.yaml describes it."""
    found: dict[str, dict[str, Any]] = plain_yaml(Path(__file__).with_name("models.yaml").read_bytes())
    return found


def write_header(path: Path, name: str) -> None:
    """Writes the file of a model: as long as the published one, almost empty on the disk."""
    model = models()[name]
    writer = gguf.GGUFWriter(path, model["architecture"])
    writer.add_tokenizer_model("no_vocab")
    for key in EPSILONS:
        writer.add_float32(f"{model['architecture']}.{key}", 1e-6)
    for key, value in model["meta"].items():
        prefix = "tokenizer.ggml" if key == "token_type_count" else model["architecture"]
        _add(writer, f"{prefix}.{key}", _spelled_out(value, model["meta"]["block_count"]))
    end = 0
    for tensor, (kind, *dimensions) in _tensors(model):
        size = _bytes(kind, dimensions)
        writer.add_tensor_info(
            tensor, dimensions[::-1], np.dtype(np.float32), size, gguf.GGMLQuantizationType[kind]
        )  # fmt: skip
        end += -(-size // gguf.GGUF_DEFAULT_ALIGNMENT) * gguf.GGUF_DEFAULT_ALIGNMENT
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        start = file.seek(0, 2)
        file.truncate(-(-start // gguf.GGUF_DEFAULT_ALIGNMENT) * gguf.GGUF_DEFAULT_ALIGNMENT + end)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A value by its own type; whole numbers as GGUF files have them."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _spelled_out(value: Any, layers: int) -> Any:
    """`{8: [5, 15]}` as a list with 8 for these layers and 0 for the others."""
    if not isinstance(value, Mapping):
        return value
    ((wanted, chosen),) = value.items()
    return [wanted if layer in chosen else type(wanted)(0) for layer in range(layers)]


def _tensors(model: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[Any]]]:
    for name, shape in model["tensors"].items():
        yield _full(name), shape
    for layer in range(model["meta"]["block_count"]):
        for group in model["layers"]:
            if _is_of(group, layer):
                yield from ((f"blk.{layer}.{_full(name)}", shape) for name, shape in group["tensors"].items())


def _is_of(group: Mapping[str, Any], layer: int) -> bool:
    first, *last = group.get("of", [0, 2**20])
    modulus, *rests = group.get("every", [1, 0])
    is_inside = layer < last[0] if last else layer == first
    return first <= layer and is_inside and layer % modulus in rests and layer in group.get("only", [layer])


def _full(name: str) -> str:
    """`attn_q` is a weight; a name that ends with a dot is used without it."""
    return name[:-1] if name.endswith(".") else name if name.endswith(".bias") else f"{name}.weight"


def _bytes(kind: str, dimensions: Sequence[int]) -> int:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return int(np.prod(dimensions, dtype=np.int64)) // block * size
