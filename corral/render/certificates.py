"""The site's own certificate authority, and the certificates by which its hosts know each other.

The authority's key stays on the operator's machine, in `.authority/` beside the hosts' folders. Everything that it
issues can be issued again: a lost authority is replaced by a new one, and all hosts get new certificates.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from corral.contributions import Secret
from corral.errors import CorralError
from corral.files import write_atomically

FOLDER = ".authority"
KEY_FILE, CERTIFICATE_FILE = "key.pem", "certificate.pem"
VALID = timedelta(days=820)
AUTHORITY_VALID = timedelta(days=3650)
# What has less time left is issued anew.
RENEWED_BEFORE = timedelta(days=90)
# Hosts' clocks may be behind this machine's by so much.
SKEW = timedelta(hours=1)
USES = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority: its certificate and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> str:
        """The certificate, as hosts get it."""
        return self.certificate.public_bytes(Encoding.PEM).decode()

    def value_of(self, secret: Secret, current: str) -> str:
        """The PEM text of a certificate secret: the current one while it is good for long enough, else a new one."""
        if secret.generate == "authority":
            return self.pem
        return current if self.is_good(secret, current) else self.issue(secret)

    def is_good(self, secret: Secret, pem: str) -> bool:
        """Whether a certificate is this authority's, has the right names, its key, and 90 days left."""
        try:
            found = x509.load_pem_x509_certificate(pem.encode())
            key = load_pem_private_key(pem.encode(), None)
            found.verify_directly_issued_by(self.certificate)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return (
            key.public_key() == found.public_key()
            and names_of(found) == set(secret.names)
            and found.not_valid_after_utc - datetime.now(UTC) > RENEWED_BEFORE
        )

    def issue(self, secret: Secret) -> str:
        """A new key with its certificate, one after the other as PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        extensions = {
            x509.BasicConstraints(ca=False, path_length=None): True,
            x509.ExtendedKeyUsage([USES[secret.generate]]): True,
            x509.SubjectAlternativeName(list(map(_general_name, secret.names))): False,
        }
        certificate = _signed(_named(secret.names[0]), key, VALID, extensions, self.certificate.subject, self.key)
        return certificate.public_bytes(Encoding.PEM).decode() + _pem_of(key)


def authority_in(out: Path) -> Authority:
    """The authority kept below `out`; a new one where there is none, or where it has less than 90 days left.

    Raises:
        CorralError: what is kept there cannot be read.
    """
    folder = out / FOLDER
    if folder.is_symlink():
        raise CorralError(f"{folder}: a symbolic link stands where the site's authority is kept; move it away")
    known = _kept(folder)
    if known is not None and known.certificate.not_valid_after_utc - datetime.now(UTC) > RENEWED_BEFORE:
        return known
    made = _new_authority()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    write_atomically(folder / ".gitignore", b"*\n", 0o600)
    write_atomically(folder / KEY_FILE, _pem_of(made.key).encode(), 0o600)
    write_atomically(folder / CERTIFICATE_FILE, made.pem.encode(), 0o600)
    return made


def _kept(folder: Path) -> Authority | None:
    """The authority of an earlier run; None where there is none, or the run was killed between its two files."""
    try:
        key = load_pem_private_key((folder / KEY_FILE).read_bytes(), None)
        certificate = x509.load_pem_x509_certificate((folder / CERTIFICATE_FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CorralError(
            f"{folder}: the site's authority cannot be read ({error}); remove the folder, then secrets init and up: "
            "all hosts get new certificates"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        return None
    return Authority(certificate, key)


def names_of(certificate: x509.Certificate) -> set[str]:
    """The names and addresses that a certificate is good for."""
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(item.value) for item in found}


def end_of(pem: str) -> datetime | None:
    """When a certificate ends; None where there is none."""
    try:
        return x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc
    except ValueError:
        return None


def _new_authority() -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _named("corral site authority")
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    extensions = {x509.BasicConstraints(ca=True, path_length=0): True, usage: True}
    return Authority(_signed(name, key, AUTHORITY_VALID, extensions, name, key), key)


def _signed(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    valid: timedelta,
    extensions: Mapping[x509.ExtensionType, bool],
    issuer: x509.Name,
    signer: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    """A certificate for a key; `extensions` says which of them are critical."""
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - SKEW).not_valid_after(now + valid)
    for extension, is_critical in extensions.items():
        builder = builder.add_extension(extension, critical=is_critical)
    return builder.sign(signer, hashes.SHA256())


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem_of(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
