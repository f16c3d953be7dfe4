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


def certificate_script(host: ComposeHost) -> str:
    """A section of the host's snapshot that says when each of them ends; nothing on a host without openssl."""
    files = shlex.join(certificate_files(host))
    each = f"""for file in {files}; do printf '%s\\t%s\\n' "$file" "$({READ})"; done"""
    line = f"(command -v openssl >/dev/null && cd {shlex.quote(host.folder)} && {each})"
    return f"section certificates\n{line}" if files else ""


def understood_ends(said: str) -> dict[str, datetime | None]:
    """What the section says, by file; None where there is no certificate to be read."""
    found = (line.partition("\t") for line in said.splitlines())
    return {file: datetime.strptime(end, DATE).replace(tzinfo=UTC) if end else None for file, _, end in found}
