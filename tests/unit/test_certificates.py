"""The site's certificate authority and what it issues, judged by the `cryptography` library and a TLS handshake."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from corral.contributions import Secret
from corral.errors import CorralError
from corral.render import certificates
from corral.render.certificates import FOLDER, authority_in, end_of
from corral.render.secrets import CERTIFICATES_MARK, initialise, read_env

SERVER = Secret("EDGE_CERTIFICATE", "big", "server", "server", names=("big", "*.big", "192.0.2.11"))
CLIENT = Secret("GATEWAY_CERTIFICATE", "gate", "client", "client", names=("gateway",))
NEEDED = {
    "big": [SERVER, Secret("EDGE_AUTHORITY", "big", "authority", "authority")],
    "gate": [CLIENT, Secret("EDGE_AUTHORITY", "gate", "authority", "authority")],
}


def files(out: Path) -> dict[str, str]:
    return {f"{path.parent.parent.name}/{path.name}": path.read_text() for path in out.glob("*/secrets/*")}


def test_every_host_gets_what_it_needs_and_the_key_of_the_authority_stays(tmp_path: Path) -> None:
    initialise(NEEDED, tmp_path)
    found = files(tmp_path)
    assert set(found) == {
        "big/EDGE_CERTIFICATE", "big/EDGE_AUTHORITY", "gate/GATEWAY_CERTIFICATE", "gate/EDGE_AUTHORITY",
    }  # fmt: skip
    assert found["big/EDGE_AUTHORITY"] == found["gate/EDGE_AUTHORITY"]
    key = (tmp_path / FOLDER / "key.pem").read_text()
    assert not any(key in text for text in found.values())
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / FOLDER).iterdir()}
    assert set(modes.values()) == {0o600}
    assert (tmp_path / FOLDER).stat().st_mode & 0o777 == 0o700
    assert (tmp_path / FOLDER / ".gitignore").read_text() == "*\n"
    assert "PRIVATE" not in (tmp_path / "big" / ".env").read_text()


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    initialise(NEEDED, tmp_path)
    before, marks = files(tmp_path), [read_env(tmp_path / host / ".env") for host in NEEDED]
    reports = initialise(NEEDED, tmp_path)
    assert files(tmp_path) == before
    assert [read_env(tmp_path / host / ".env") for host in NEEDED] == marks
    assert [report.made for report in reports] == [(), ()]


def test_a_server_is_no_client_and_the_names_are_those_of_the_host(tmp_path: Path) -> None:
    issuer = authority_in(tmp_path)
    found = x509.load_pem_x509_certificate(issuer.issue(SERVER).encode())
    use = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(use) == [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]
    assert certificates.names_of(found) == {"big", "*.big", "192.0.2.11"}
    assert isinstance(found.public_key(), ec.EllipticCurvePublicKey)
    assert found.not_valid_after_utc - found.not_valid_before_utc <= timedelta(days=825)


@pytest.mark.parametrize("change", ["expires", "moves", "loses its key", "is another authority's", "is cut off"])
def test_a_certificate_is_issued_anew_when_it(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    issuer, wanted = authority_in(tmp_path), SERVER
    pem = issuer.issue(SERVER)
    assert issuer.value_of(SERVER, pem) == pem
    if change == "expires":
        monkeypatch.setattr(certificates, "VALID", timedelta(days=89))
        pem = issuer.issue(SERVER)
        monkeypatch.undo()
    elif change == "moves":
        wanted = Secret("EDGE_CERTIFICATE", "big", "server", "server", names=("big", "*.big", "192.0.2.12"))
    elif change == "loses its key":
        pem = pem.partition("-----BEGIN PRIVATE")[0]
    elif change == "is another authority's":
        pem = authority_in(tmp_path / "other").issue(SERVER)
    else:
        pem = pem[:300]
    renewed = issuer.value_of(wanted, pem)
    assert renewed != pem
    assert issuer.is_good(wanted, renewed)


def test_the_mark_of_a_host_changes_with_its_certificates_alone(tmp_path: Path) -> None:
    initialise(NEEDED, tmp_path)
    before = {host: read_env(tmp_path / host / ".env")[CERTIFICATES_MARK] for host in NEEDED}
    (tmp_path / "big" / "secrets" / "EDGE_CERTIFICATE").unlink()
    reports = initialise(NEEDED, tmp_path)
    after = {host: read_env(tmp_path / host / ".env")[CERTIFICATES_MARK] for host in NEEDED}
    assert reports[0].made == ("EDGE_CERTIFICATE",)
    assert after["big"] != before["big"]
    assert after["gate"] == before["gate"]


def test_a_lost_authority_is_replaced_everywhere(tmp_path: Path) -> None:
    initialise(NEEDED, tmp_path)
    before = files(tmp_path)
    (tmp_path / FOLDER / "key.pem").unlink()
    initialise(NEEDED, tmp_path)
    assert not set(before.items()) & set(files(tmp_path).items())


def test_what_cannot_be_read_is_said_with_the_remedy(tmp_path: Path) -> None:
    authority_in(tmp_path)
    (tmp_path / FOLDER / "key.pem").write_text("nonsense")
    with pytest.raises(CorralError, match="remove the folder, then secrets init"):
        authority_in(tmp_path)


def test_python_accepts_server_and_client(tmp_path: Path) -> None:
    """A handshake in memory: each side has what its host has."""
    initialise(NEEDED, tmp_path)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(tmp_path / "big/secrets/EDGE_AUTHORITY"))
    server.load_cert_chain(tmp_path / "big/secrets/EDGE_CERTIFICATE")
    server.verify_mode = ssl.CERT_REQUIRED
    client = ssl.create_default_context(cafile=str(tmp_path / "gate/secrets/EDGE_AUTHORITY"))
    client.load_cert_chain(tmp_path / "gate/secrets/GATEWAY_CERTIFICATE")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        server.wrap_bio(to_server, to_client, server_side=True),
        client.wrap_bio(to_client, to_server, server_hostname="192.0.2.11"),
    ]
    for _ in range(3):
        for end in reversed(ends):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    assert ends[0].getpeercert()
    assert ends[1].getpeercert()


def test_keys_of_hosts_are_their_own_and_what_is_there_stays(tmp_path: Path) -> None:
    needed = {host: [Secret("LLAMA_API_KEY", host, "key", is_per_host=True)] for host in ("a", "b", "c")}
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / ".env").write_text("LLAMA_API_KEY=kept\n")
    initialise(needed, tmp_path)
    values = [read_env(tmp_path / host / ".env")["LLAMA_API_KEY"] for host in needed]
    assert len(set(values)) == 3
    assert values[2] == "kept"


def test_the_end_of_a_certificate_can_be_told(tmp_path: Path) -> None:
    end = end_of(authority_in(tmp_path).issue(CLIENT))
    assert end is not None
    assert end - datetime.now(UTC) > timedelta(days=800)
    assert end_of("nothing") is None
