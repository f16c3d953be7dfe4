"""Secrets of a host: made up once, kept in `.env` (mode 0600), and laid out one per file for programs to read.

`.env` is the only store. `secrets/` is derived from it: a folder that only its owner may enter (0700) with readable
files, because containers run under other user ids than the owner's.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from corral.contributions import Secret
from corral.errors import CorralError, Finding, SiteError
from corral.files import draft_of, write_atomically
from corral.render.output import locked

if TYPE_CHECKING:
    from corral.render.certificates import Authority

ENV_FILE = ".env"
# Line of `.env` that changes with the host's certificates: a label has it, so that `up` makes containers anew.
CERTIFICATES_MARK = "CORRAL_CERTIFICATES"
FOLDER = "secrets"
_LINE = re.compile(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*?)\s*")
_VALUE = re.compile(r"""'(?P<plain>[^']*)'(\s+\#.*)?|"(?P<escaped>(?:[^"\\]|\\.)*)"(\s+\#.*)?|(?P<bare>[^'"].*)?""")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
# Names that the kit gives to files in `secrets/`; other files were not made by the kit.
_OWN_FILE = re.compile(r"\.?[A-Z][A-Z0-9_]*(\.new)?")


@dataclass(frozen=True, slots=True)
class Report:
    """What `initialise` did for one host."""

    host: str
    made: tuple[str, ...]
    kept: tuple[str, ...]
    # Names whose values only the user knows.
    missing: tuple[str, ...]


# --- .env ------------------------------------------------------------------------------------------------------------


def read_env(path: Path) -> dict[str, str]:
    """Names and values of a `.env` file, read as Docker Compose does; an absent file has none."""
    found: dict[str, str] = {}
    for number, line in enumerate(_text_of(path).splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        value = _VALUE.fullmatch(match[2]) if match else None
        if match is None or value is None:
            raise SiteError([Finding("not a NAME=value line", remedy="fix or remove it", file=str(path), line=number)])
        found[match[1]] = _plain_value(value)
    return found


def _text_of(path: Path) -> str:
    try:
        if path.is_symlink():
            raise CorralError(f"{path}: a symbolic link stands where secrets are kept; put the file itself there")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except UnicodeDecodeError:
        raise CorralError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise CorralError(f"{path}: cannot be read: {error.strerror}") from None


def _plain_value(match: re.Match[str]) -> str:
    if match["plain"] is not None:
        return match["plain"]
    if match["escaped"] is not None:
        return re.sub(r"\\(.)", lambda found: _ESCAPES.get(found[1], found[1]), match["escaped"])
    return re.split(r"\s+#", match["bare"] or "", maxsplit=1)[0]


def _with_line(text: str, name: str, value: str, comment: str, *, instead_of: str) -> str:
    """The text of a `.env` with a value: in the first line of that name with such a value, else at the end."""
    line = re.compile(rf"^[ \t]*(?:export[ \t]+)?{name}[ \t]*=[ \t]*(?:{instead_of})[ \t]*$", re.MULTILINE)
    if line.search(text):
        return line.sub(lambda _: f"{name}={value}", text, count=1)
    ending = "" if not text or text.endswith("\n") else "\n"
    return f"{text}{ending}# {comment}\n{name}={value}\n"


# --- making what is missing ------------------------------------------------------------------------------------------


def initialise(needed: Mapping[str, Iterable[Secret]], out: Path, hosts: set[str] | None = None) -> list[Report]:
    """Adds what is missing to the hosts' secrets and never changes what is there; hosts share values of the same name.

    Args:
        needed: the secrets of every host of the site.
        out: the folder with one folder for each host.
        hosts: hosts to write for; the others' values are only read. All of them when absent.

    Raises:
        CorralError: two hosts disagree about a value, or a file cannot be read or written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out):
            wanted = {host: list(secrets) for host, secrets in needed.items()}
            known = {host: read_env(out / host / ENV_FILE) for host in wanted}
            own = {secret.name for found in wanted.values() for secret in found if secret.is_per_host}
            shared = _shared_values(known, {CERTIFICATES_MARK, *own}, out)
            issuer = _issuer_for(wanted.values(), out)
            return [
                _initialise_host(host, secrets, known[host], shared, out / host, issuer)
                for host, secrets in wanted.items()
                if hosts is None or host in hosts
            ]
    except OSError as error:
        raise CorralError(f"{error.filename or out}: cannot be written: {error.strerror}") from None


def _issuer_for(wanted: Iterable[list[Secret]], out: Path) -> Authority | None:
    """The site's certificate authority; None where no host needs a certificate."""
    if not any(secret.is_certificate for secrets in wanted for secret in secrets):
        return None
    from corral.render.certificates import authority_in  # cryptography takes its time to load

    return authority_in(out)


def _shared_values(known: Mapping[str, Mapping[str, str]], own: set[str], out: Path) -> dict[str, str]:
    """The value of each name, over all hosts, without those that every host has of its own.

    Raises:
        CorralError: two hosts disagree.
    """
    shared: dict[str, tuple[str, str]] = {}
    for host, values in known.items():
        for name, value in values.items():
            if not value or name in own:
                continue
            other, present = shared.setdefault(name, (host, value))
            if present != value:
                where = f"{out / other / ENV_FILE} and {out / host / ENV_FILE}"
                raise CorralError(f"{where} have different values for {name}; make them equal")
    return {name: value for name, (_, value) in shared.items()}


def _initialise_host(
    host: str,
    wanted: list[Secret],
    known: Mapping[str, str],
    shared: dict[str, str],
    folder: Path,
    issuer: Authority | None,
) -> Report:
    values, made = dict(known), []
    stored = [secret for secret in wanted if secret.is_stored]
    for secret in stored:
        if not values.get(secret.name) and (value := _value_for(secret, shared)):
            values[secret.name] = value
            made.append(secret)
    present = {secret.name: _text_of(folder / FOLDER / secret.name) for secret in wanted if secret.is_certificate}
    certificates: dict[str, str] = {}
    if issuer is not None:
        certificates = {item.name: issuer.value_of(item, present[item.name]) for item in wanted if item.is_certificate}
    folder.mkdir(parents=True, exist_ok=True)
    _write_env(folder / ENV_FILE, made, values, _mark_of(certificates))
    write_files(wanted, values | certificates, folder / FOLDER)
    new = [*(secret.name for secret in made), *(name for name, text in certificates.items() if text != present[name])]
    missing = tuple(secret.name for secret in stored if not values.get(secret.name))
    had = [*(secret.name for secret in stored), *certificates]
    return Report(host, tuple(new), tuple(name for name in had if name not in {*new, *missing}), missing)


def _value_for(secret: Secret, shared: dict[str, str]) -> str:
    """A value for a secret that a host lacks: the site's, made up here if it may be; empty where the user has it."""
    if secret.is_per_host:
        return _new_value(secret)
    if secret.name not in shared and secret.generate != "given":
        shared[secret.name] = _new_value(secret)
    return shared.get(secret.name, "")


def _mark_of(certificates: Mapping[str, str]) -> str:
    """Short digest of a host's certificates; empty without any."""
    text = "".join(certificates[name] for name in sorted(certificates))
    return hashlib.sha256(text.encode()).hexdigest()[:16] if text else ""


def _new_value(secret: Secret) -> str:
    if secret.generate == "sk":
        return f"sk-{secrets.token_urlsafe(32)}"
    return secrets.token_hex(32 if secret.generate == "hex64" else 24)


def _write_env(path: Path, made: list[Secret], values: Mapping[str, str], mark: str) -> None:
    """Adds new values to a `.env`, and the mark of the certificates; whatever else is in it stays as it is."""
    draft_of(path).unlink(missing_ok=True)  # a killed run's
    old = text = _text_of(path)
    for secret in made:
        text = _with_line(text, secret.name, values[secret.name], secret.purpose, instead_of="''|\"\"|")
    if mark or CERTIFICATES_MARK in text:
        comment = "changes when certificates of this host do; not secret"
        text = _with_line(text, CERTIFICATES_MARK, mark, comment, instead_of=".*")
    if text != old or not path.exists():
        write_atomically(path, text.encode(), 0o600)
    elif path.stat().st_mode & 0o077:
        path.chmod(0o600)


# --- one file for each ------------------------------------------------------------------------------------------------


def write_files(wanted: Iterable[Secret], values: Mapping[str, str], folder: Path) -> None:
    """One file for each secret whose value is known; files of secrets that are no longer needed go.

    Raises:
        CorralError: the folder is a symbolic link.
    """
    if folder.is_symlink():
        raise CorralError(f"{folder}: a symbolic link stands where secrets are laid out; move it away")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    texts = {secret.name: _text_for(secret, values) for secret in wanted}
    known = {name: text.encode() for name, text in texts.items() if text}
    for name, data in known.items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or path.read_bytes() != data:
            write_atomically(path, data, 0o644)
    for path in sorted(folder.iterdir()):
        if path.name not in known and _OWN_FILE.fullmatch(path.name) and not path.is_dir():
            path.unlink()


def _text_for(secret: Secret, values: Mapping[str, str]) -> str:
    """A secret's value; empty when it, or one that its template needs, is not known."""
    if not secret.template:
        return values.get(secret.name, "")
    needed = [name for _, name, _, _ in string.Formatter().parse(secret.template) if name is not None]
    if not all(values.get(name) for name in needed):
        return ""
    return _TemplateFormatter().vformat(secret.template, (), values)


def _ssh_key(value: str) -> str:
    from corral.render.ssh_keys import private_key  # cryptography takes its time to load

    return private_key(value)


class _TemplateFormatter(string.Formatter):
    """Fills `{NAME}`, `{NAME:url}` (quoted for a URL) and `{NAME:sha256}` (hashed, in hexadecimal).

    `{NAME:basic USER}` is the user and the value as HTTP's basic authentication has them, `{NAME:openssh}` the private
    key of ssh that belongs to the value.
    """

    FORMATS: Mapping[str, Callable[[str], str]] = {
        "": str,
        "url": lambda value: quote(value, safe=""),
        "basic": lambda value: base64.b64encode(value.encode()).decode(),
        "openssh": _ssh_key,
        "sha256": lambda value: hashlib.sha256(value.encode()).hexdigest(),
    }

    def format_field(self, value: object, format_spec: str) -> str:
        name, _, user = format_spec.partition(" ")
        return self.FORMATS[name](f"{user}:{value}" if user else str(value))
