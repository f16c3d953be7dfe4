"""The model a person names: a GGUF file on this machine, or one on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.text import Text

from corral.errors import CorralError, did_you_mean

MAGIC = b"GGUF"
HUB = "hf:"
# Before the second attempt; a person is waiting.
FIRST_PAUSE_S = 0.2
GIB = 1024**3
FORMS = "give a file (MODEL=path/to/model.gguf) or a file on the Hugging Face Hub (MODEL=hf:owner/repo/file.gguf)"
_HUB_FILE = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>(?:[\w.+ -]+/)*[\w.+ -]+\.gguf)")
_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")


def canonical(spec: str) -> str:
    """The same text for the same model: a Hub name as it is, a file by its absolute path."""
    return spec if spec.startswith(HUB) else str(Path(spec).expanduser().absolute())


def find_weights(spec: str, talk: Console) -> Path:
    """The readable GGUF file of a model, downloaded first if need be; raises CorralError with the remedy."""
    if "://" in spec:
        raise CorralError(f"{spec}: is an address; {FORMS}")
    if _PART.search(spec):
        raise CorralError(f"{spec}: is one part of several; the demo takes a model in one file")
    path = _from_hub(spec, talk) if spec.startswith(HUB) else Path(canonical(spec))
    if path.is_dir():
        raise CorralError(f"{path}: is a folder; name the .gguf file in it{_near(path, '')}")
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
    except FileNotFoundError:
        hint = _near(path.parent, path.name) or f"; {FORMS}"
        raise CorralError(f"{path}: there is no such file{hint}") from None
    except OSError as error:
        raise CorralError(f"{path}: cannot be read: {error.strerror}") from None
    if start != MAGIC:
        raise CorralError(f"{path}: is not a GGUF file; llama.cpp reads no other format")
    return path


def _near(folder: Path, name: str) -> str:
    """What lies in the folder that may be meant; empty when nothing does."""
    names = [path.name for path in folder.glob("*.gguf")]
    return f"; {did_you_mean(name, names)}" if names else ""


def _from_hub(spec: str, talk: Console) -> Path:
    """The file in the user's own Hugging Face cache or in our store, else fetched there as `models pull` does it."""
    match = _HUB_FILE.fullmatch(spec)
    if match is None or {".", ".."} & set(spec.removeprefix(HUB).split("/")):
        raise CorralError(f"{spec}: is no Hub file; write hf:owner/repo/file.gguf")
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):  # the Hub's own rules for names
        cached = try_to_load_from_cache(match["repo"], match["file"])
        if isinstance(cached, str):
            return Path(cached)
    return _fetched(spec, match["repo"], talk)


def _fetched(spec: str, repository: str, talk: Console) -> Path:
    """The file in a folder of our own; what is there under its name was whole when it got it."""
    from corral.verbs.models import fetch
    from corral.verbs.models.models import default_store

    folder = default_store(os.environ) / repository.replace("/", "--")
    target = folder / spec.rpartition("/")[2]
    if target.is_file():
        return target
    origin = fetch.origin_of(spec, "", os.environ)
    assert origin is not None  # noqa: S101 - a Hub file has an address
    net = fetch.Net(fetch.open_client(), pause_s=FIRST_PAUSE_S)
    try:
        said = fetch.look(origin, net)
        talk.print(Text(f"fetching {spec} ({said.size / GIB:.1f} GiB) into {folder}"))
        with Progress(*fetch.COLUMNS, console=talk) as bars:
            task = bars.add_task(target.name)
            fetch.fetch(origin, target, said, net, lambda there, size: bars.update(task, completed=there, total=size))
    except fetch.MissingError as error:
        raise CorralError(f"{error}, or it is private (then: hf auth login, or set HF_TOKEN)") from None
    except fetch.FetchError as error:
        raise CorralError(f"{error}; or give a file: make demo MODEL=path/to/model.gguf") from None
    fetch.settle(target)
    return target
