"""Signatures of files, made and checked by OpenSSH's `ssh-keygen -Y`: the keys are those that people have for ssh."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from corral.errors import CorralError, UsageError

# Purpose of a signature; one that was made for another purpose is refused.
NAMESPACE = "corral-bundle"


def sign(text: bytes, key: Path) -> bytes:
    """The signature of a text by a private ssh key (or by the agent's, if the file is its public half).

    Raises:
        UsageError: there is no such key file.
        CorralError: ssh-keygen does not sign with it; the message has its words.
    """
    if not key.is_file():
        raise UsageError(f"{key}: no such file; name an ssh key: --sign ~/.ssh/id_ed25519")
    return _keygen(["sign", "-q", "-f", str(key), "-n", NAMESPACE], text, f"{key}: cannot sign with it")


def signer_of(text: bytes, signature: bytes, allowed: Path) -> str:
    """Who signed a text, by the name in a file of allowed signers (see `man ssh-keygen`).

    Raises:
        UsageError: there is no such file.
        CorralError: no key in that file signed this text; the message has ssh-keygen's words.
    """
    if not allowed.is_file():
        raise UsageError(f"{allowed}: no such file; its lines are: NAME ssh-ed25519 AAAA…")
    failure = f"no key in {allowed} made the signature, or it is of another text"
    with TemporaryDirectory() as folder:
        file = Path(folder) / "signature"
        file.write_bytes(signature)
        found = _keygen(["find-principals", "-s", str(file), "-f", str(allowed)], b"", failure)
        name = (found.decode(errors="replace").splitlines() or [""])[0]
        _keygen(["verify", "-f", str(allowed), "-I", name, "-n", NAMESPACE, "-s", str(file)], text, failure)
    return name


def _keygen(arguments: Sequence[str], text: bytes, failure: str) -> bytes:
    try:
        done = subprocess.run(["ssh-keygen", "-Y", *arguments], input=text, capture_output=True, check=False)
    except FileNotFoundError:
        raise CorralError("ssh-keygen is not installed on this machine; it belongs to the OpenSSH client") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines() or ["no answer"]
        raise CorralError(f"{failure}: {said[-1]}")
    return done.stdout
