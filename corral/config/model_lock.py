"""What is known of every model file, in `models.lock.json` beside the inventory: checksum, revision, and its metadata.

`models pull` and `models inspect` write it, people commit it. The plan reads it, so that it needs neither network nor
model files; without an entry it estimates from the file's name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, field_validator

from corral.config.file_names import PathBelow, file_of, hub_source, is_below, is_file_name
from corral.config.inventory import Section
from corral.errors import CorralError
from corral.files import write_atomically

_SHORT_LIST = re.compile(r"\[\s*(-?\d+(?:,\s*-?\d+)*)\s*\]")
# Problems of a file up to which they are looked at one by one; a million of them take a minute.
MOST_TOLD = 1000
Count = Annotated[int, Field(ge=0, le=2**53)]
Counts = Annotated[tuple[Count, ...], Field(strict=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Lock(Section):
    """A file beside the inventory that people commit."""

    file_name: ClassVar[str]
    remedy: ClassVar[str]

    version: Literal[1] = 1

    @classmethod
    def beside(cls, inventory: Path) -> Path:
        """Where the lock of an inventory lies."""
        return inventory.parent / cls.file_name

    @classmethod
    def read(cls, path: Path) -> Self:
        """The lock of a file, empty when there is none; raises CorralError with the remedy when it cannot be read."""
        try:
            return cls.parsed(path.read_bytes(), path)
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise CorralError(f"{path}: cannot be read: {error.strerror}") from None

    @classmethod
    def parsed(cls, text: bytes, path: Path) -> Self:
        """The lock of a file with this text; raises CorralError with the remedy when it is none."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise CorralError(f"{path}: {first_words(error)}; {cls.remedy}") from None

    def text(self) -> bytes:
        """The lock as its file has it: sorted, short lists on one line; equal locks give equal bytes."""
        parts = self.model_dump(mode="json", exclude_defaults=True)
        data = {"version": 1} | {name: dict(sorted(part.items())) for name, part in parts.items() if part}
        text = json.dumps(data, indent=2, ensure_ascii=False)
        return _SHORT_LIST.sub(lambda found: "[" + re.sub(r"\s+", " ", found[1]) + "]", text).encode() + b"\n"

    def write(self, path: Path) -> None:
        """Write the lock, whole or not at all."""
        write_atomically(path, self.text(), 0o644)


def first_words(error: ValidationError) -> str:
    """Place and reason of the first problem, for files that people do not write themselves."""
    if error.error_count() > MOST_TOLD:
        return f"{error.error_count()} things in it are not as they should be"
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg']}"


class Gguf(Section):
    """What a GGUF file says of itself, as far as memory depends on it. Lists have one number for each layer."""

    architecture: str
    """`general.architecture`, such as `llama`."""
    quantization: str = ""
    """Such as `Q5_K_M`."""
    parameters: Count = 0
    """Number of weights."""
    context: Count = 0
    """Tokens that it was trained for."""
    vocabulary: Count = 0
    """Number of tokens that it knows."""
    tokens: Sha256 | Literal[""] = ""
    """Checksum of the tokens themselves from the sixth on, which is where llama.cpp compares a draft's vocabulary."""
    embedding: Count = 0
    """Length of the vector between layers."""
    feed_forward: Counts = ()
    """Length of the vector inside each layer's feed-forward part."""
    heads: Counts = ()
    """Query heads of each layer."""
    kv_heads: Counts = ()
    """Heads of each layer's K and V cache; 0 where a layer has none."""
    key_length: Count = 0
    """Values of one K head; of the compressed K where the model compresses it (MLA)."""
    value_length: Count = 0
    """Values of one V head."""
    key_length_sliding: Count = 0
    """The same in layers with a sliding window, where it differs."""
    value_length_sliding: Count = 0
    """The same in layers with a sliding window, where it differs."""
    sliding_window: Count = 0
    """Tokens that a sliding-window layer looks back; 0: the model has no such layers."""
    sliding: Counts = ()
    """1 for every layer that has a sliding window."""
    latent: Count = 0
    """Rank of the compressed cache (MLA); 0: the cache is not compressed."""
    rope: Count = 0
    """Values that rotary positions turn."""
    recurrent: Counts = ()
    """1 for every layer with a recurrent state instead of a cache."""
    state_bytes: Count = 0
    """Bytes of the recurrent state of one such layer, for one request."""
    experts: Count = 0
    """Experts of each layer."""
    experts_used: Count = 0
    """Experts that one token goes through."""
    expert_feed_forward: Count = 0
    """Length of the vector inside one expert."""
    is_causal: bool = True
    """False for models that only embed."""
    input_bytes: Count = 0
    """Bytes of what turns tokens into vectors; llama.cpp keeps it in host memory."""
    output_bytes: Count = 0
    """Bytes of what turns vectors into tokens; on the card with the last layer."""
    layer_bytes: Counts = ()
    """Bytes of each layer's weights."""
    tensors: dict[str, Counts] = Field(default_factory=dict)
    """Bytes of each layer's tensors, by their names without the layer, such as `ffn_down_exps.weight`."""
    table_bytes: Count = 0
    """Bytes of the table of tokens alone, where other tensors turn them into vectors, too."""
    shared_caches: Count = 0
    """Last layers that use the cache of an earlier one."""
    pooling: Count = 0
    """How token vectors become one: 1 mean, 2 first, 3 last, 4 rank; 0: the file does not say."""
    unused_layers: Count = 0
    """Layers after all others that only predict further tokens; llama.cpp does not load them by itself."""
    unused_bytes: Count = 0
    """Bytes of these layers."""
    other_bytes: Count = 0
    """Bytes of all other tensors."""

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.layer_bytes)

    @property
    def bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum((*self.layer_bytes, self.unused_bytes, self.input_bytes, self.output_bytes, self.other_bytes))

    def with_part(self, part: Gguf) -> Gguf:
        """The model with the tensors of a further part of it."""

        def added(own: Counts, more: Counts) -> Counts:
            return tuple(map(sum, zip_longest(own, more[: self.layers], fillvalue=0)))

        nothing = (0,) * self.layers
        names = sorted({*self.tensors, *part.tensors})
        totals = ("parameters", "input_bytes", "output_bytes", "other_bytes", "table_bytes")
        recurrent = added(self.recurrent or nothing, part.recurrent)
        return self.model_copy(
            update={
                **{name: getattr(self, name) + getattr(part, name) for name in totals},
                "layer_bytes": added(self.layer_bytes, part.layer_bytes),
                "tensors": {it: added(self.tensors.get(it, nothing), part.tensors.get(it, ())) for it in names},
                "unused_bytes": self.unused_bytes + part.unused_bytes + sum(part.layer_bytes[self.layers :]),
                "recurrent": recurrent if any(recurrent) else (),
            }
        )


def _source(value: str) -> str:
    """A source whose file may stand in a models folder; empty when there is none."""
    if value and not is_file_name(file_of(value)):
        raise ValueError("names no file")
    return value


class LockedFile(Section):
    """What is known of one file of a model."""

    file: PathBelow
    """Its place in a models folder: a name, or a path below the folder of a repository."""
    size: Count = 0
    """Bytes; 0: not known yet."""
    sha256: Sha256 | Literal[""] = ""
    """Checksum of the content; empty until the file was read, unless the source publishes it."""
    commit: str = ""
    """Revision of the repository that it was taken from."""
    taken: Annotated[str, AfterValidator(_source)] = ""
    """The source that stood in for this one (`models pull --fallback`)."""
    places: dict[str, PathBelow] = Field(default_factory=dict)
    """Where it lies on hosts that have it already: `models` or the name of the host's store, and the path there."""
    gguf: Gguf | None = None
    """What the file says of itself."""


class ModelLock(Lock):
    """Every known file by its source."""

    file_name = "models.lock.json"
    remedy = "take the committed version of it, or remove it and write it again: ./generate.py models inspect"

    tags: dict[str, str] = Field(default_factory=dict)
    """The files (the first part of split ones) that `hf:owner/repo:QUANTIZATION` stands for."""
    files: dict[str, LockedFile] = Field(default_factory=dict)

    @field_validator("tags")
    @classmethod
    def _names_files(cls, tags: dict[str, str]) -> dict[str, str]:
        """Files of the repositories that the quantizations are of, and of nothing else."""
        for tag, source in tags.items():
            start = f"{tag.removeprefix('hf:').partition(':')[0]}/"
            if not (source.startswith(f"hf:{start}") and is_below(source.removeprefix("hf:"))):
                raise ValueError(f"{tag} is no file of its repository")
        return tags

    @field_validator("files")
    @classmethod
    def _has_hub_names(cls, files: dict[str, LockedFile]) -> dict[str, LockedFile]:
        """Files by the names that the inventory has for them, as long as locks have addresses of the Hub's pages."""
        return {"@".join(filter(None, hub_source(key))): known for key, known in files.items()}

    def get(self, source: str) -> LockedFile | None:
        """What is known of a source."""
        return self.files.get(source)

    def members(self, source: str, revision: str) -> dict[str, LockedFile]:
        """The files of a repository at a commit, by what the lock calls them; empty before it was pulled."""
        return {
            key: known
            for key, known in self.files.items()
            if key.startswith(f"{source}/") and key.endswith(f"@{revision}")
        }

    def without_places(self) -> ModelLock:
        """The same for machines whose hosts have none of these files yet."""
        return self.with_files({key: known.model_copy(update={"places": {}}) for key, known in self.files.items()})

    def with_files(self, files: Mapping[str, LockedFile]) -> ModelLock:
        """The same with some entries more, or other ones."""
        return self.model_copy(update={"files": {**self.files, **files}})
