"""When the certificates of a host's services end, as openssl on that host reads them; keys stay where they are."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime

from corral.runtime.hosts import ComposeHost

ENDINGS = (".pem", ".crt", ".cer")
READ = 'openssl x509 -noout -enddate -in "$file" 2>/dev/null'
DATE = "notAfter=%b %d %H:%M:%S %Y %Z"


def certificate_files(host: ComposeHost) -> list[str]:
    """Files on the host that services mount and that look like certificates, and the one of its entrance."""
    paths = {path for service in host.services for path, _ in service.mounts if path.endswith(ENDINGS)}
    gateway = host.plan.inventory.gateway
    if gateway.host == host.name and gateway.entrance and gateway.entrance.certificate:
        paths.add(gateway.entrance.certificate)
    return sorted(paths)


def certificate_section(host: ComposeHost) -> dict[str, list[str]]:
    """Shell commands that say when each of them ends, for the host's snapshot; nothing on a host without openssl."""
    files = shlex.join(certificate_files(host))
    each = f"""for file in {files}; do printf '%s\\t%s\\n' "$file" "$({READ})"; done"""
    line = f"(command -v openssl >/dev/null && cd {shlex.quote(host.folder)} && {each})"
    return {"certificates": [line]} if files else {}


def understood_ends(said: str) -> dict[str, datetime | None]:
    """What those commands print, by file; None where there is no certificate to be read."""
    found = (line.partition("\t") for line in said.splitlines())
    return {file: datetime.strptime(end, DATE).replace(tzinfo=UTC) if end else None for file, _, end in found}
