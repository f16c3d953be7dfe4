"""How files are laid out: the template environment, YAML with its quoting, and the header of every file. Pure."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import yaml
from jinja2 import ChoiceLoader, Environment, FileSystemLoader, PrefixLoader, StrictUndefined

from corral.build import Plan
from corral.contributions import File, Secret, Service
from corral.declarations import ASSETS, packages, shipped
from corral.errors import CorralError
from corral.plan.site import HERE

TEMPLATES = ASSETS / "templates"
Tree = dict[str, bytes]
# Characters that JSON leaves as they are and YAML does not allow, or takes for line ends.
_UNPRINTABLE = re.compile(r"[\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")
_as_json = json.JSONEncoder(ensure_ascii=False).encode
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_COMMENT_START = re.compile(r"(?<=\s)[;#]")


@dataclass(frozen=True, slots=True)
class RenderedHost:
    """What is rendered for one host."""

    plan: Plan
    name: str
    services: list[Service]
    files: list[File]
    secrets: list[Secret]

    def header(self, source: str, mark: str = "#") -> str:
        """The first lines of every rendered file: where it comes from and what to edit instead."""
        site = self.plan.inventory.name
        return (
            f'{mark} Rendered by corral from the inventory "{site}", host {self.name}; do not edit.\n'
            f"{mark} Change the inventory or {source}, then run: ./generate.py render"
        )

    def render(self, template: str, mark: str = "#", source: str = "", **values: object) -> bytes:
        """A template's text; `source` names the file to edit when it is not the template itself."""
        named = source or template
        places = (f"{folder}/{named}" for folder in ("templates", "corral/components"))
        header = self.header(next((path for path in places if shipped(path).exists()), named), mark)
        return environment().get_template(template).render(header=header, **values).encode()


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Block style without anchors."""

    def ignore_aliases(self, _data: object) -> bool:
        return True


def dump_yaml(data: Mapping[str, Any]) -> str:
    """Data as YAML in the order in which it was made."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120))


def _supervisor_text(text: str) -> str:
    """Text for an INI file in which supervisord expands `%(…)s`; only our own mark of the folder is meant."""
    if _CONTROL.search(text.replace(HERE, "")):
        words = "has a line break or another control character, which supervisord cannot be told"
        raise CorralError(f"{text!r} {words}; remove it from extra_args or environment")
    return text.replace("%", "%%").replace(HERE, "%(here)s")


def supervisor_command(words: Iterable[str]) -> str:
    """A command line as supervisord splits it, and nothing in it that its INI reader takes for a comment."""
    return " ".join(_COMMENT_START.sub(r"'\\\g<0>'", _supervisor_text(shlex.quote(word))) for word in words)


def supervisor_environment(values: Mapping[str, str]) -> str:
    """Environment variables as supervisord reads them."""
    return ",".join(f'{name}="{_supervisor_text(value)}"' for name, value in sorted(values.items()))


@cache
def environment() -> Environment:
    """The template environment: strict, and with quoting done in one place."""
    own = {name: FileSystemLoader(package.folder) for name, package in packages().items()}
    made = Environment(  # noqa: S701 - configuration files, not HTML
        loader=ChoiceLoader([FileSystemLoader(TEMPLATES), PrefixLoader(own)]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        auto_reload=False,
    )
    made.filters |= {
        "digest": short_digest,
        "yaml": to_yaml,
        "supervisor": supervisor_command,
        "supervisor_environment": supervisor_environment,
    }
    return made


def short_digest(text: str) -> str:
    """The first 16 hexadecimal digits of a text's SHA-256: by it a program says which configuration it has read."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_yaml(value: object) -> str:
    """Scalars, and lists and mappings of them, as YAML that Compose takes literally: quoted as needed, `$` doubled."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_yaml, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {to_yaml(item)}" for key, item in value.items()) + "}"
    return _quoted(str(value))


@lru_cache(maxsize=10_000)
def _quoted(text: str) -> str:
    quoted = _as_json(text).replace("$", "$$")
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", quoted)
