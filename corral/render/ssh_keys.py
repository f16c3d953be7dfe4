"""Ed25519 keys of ssh from a secret that is kept: the same secret always gives the same file."""

from __future__ import annotations

import base64
import hashlib

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

BLOCK, LINE = 8, 70


def public_key(secret: str) -> str:
    """The public key that belongs to a secret, as it stands in `known_hosts` and `authorized_keys`."""
    return _key(secret).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def private_key(secret: str) -> str:
    """The private key of a secret, as OpenSSH's file without a passphrase (PROTOCOL.key in its source).

    The library's own file differs each time, by two random numbers that tell whether a passphrase was right; here they
    are zeros.
    """
    public, zero = base64.b64decode(public_key(secret).split()[1]), bytes(4)
    inner = zero + zero + public + _string(_seed(secret) + public[-32:]) + _string(b"")
    inner += bytes(range(1, 1 + -len(inner) % BLOCK))
    parts = (_string(b"none"), _string(b"none"), _string(b""), b"\0\0\0\1", _string(public), _string(inner))
    text = base64.b64encode(b"openssh-key-v1\0" + b"".join(parts)).decode()
    lines = (text[start : start + LINE] for start in range(0, len(text), LINE))
    return "\n".join(("-----BEGIN OPENSSH PRIVATE KEY-----", *lines, "-----END OPENSSH PRIVATE KEY-----", ""))


def fingerprint(public: str) -> str:
    """The fingerprint of a public key, as ssh shows it."""
    digest = hashlib.sha256(base64.b64decode(public.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def _seed(secret: str) -> bytes:
    """The 32 bytes that make a key, of any text: people may have written one of their own."""
    return hashlib.sha256(secret.encode()).digest()


def _key(secret: str) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(_seed(secret))


def _string(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data
