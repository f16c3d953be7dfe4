"""What doctor asks a host besides its containers: sections of its snapshot that the checks read."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from corral.components import litellm
from corral.render.output import MANIFEST, digest
from corral.render.secrets import ENV_FILE, FOLDER
from corral.runtime.hosts import ComposeHost
from corral.runtime.observe import assigned
from corral.verbs.status.certificates import certificate_script

SCRIPT = Path(__file__).with_suffix(".sh")


def sections(host: ComposeHost) -> str:
    """The shell script that asks for them."""
    secrets = [f"{FOLDER}/{item.name}" for item in host.plan.secrets_of(host.name)]
    gateways = [item.container_name for item in host.services if item.component == litellm.COMPONENT]
    given = {
        "folder": host.folder,
        "models": host.models_folder,
        "files": shlex.join(sorted(host.model_sources)),
        "private": shlex.join([ENV_FILE, FOLDER, *secrets]),
        "sums": "\n".join(f"{value}  {path}" for path, value in _digests(host, secrets).items()) if host.ssh else "",
        "litellm": "".join(gateways[:1]),
    }
    return "\n".join([assigned(given), certificate_script(host), SCRIPT.read_text(encoding="utf-8")])


def manifest(host: ComposeHost) -> dict[str, str]:
    """Digests of the host's rendered files on this machine, by path; nothing when nothing is rendered."""
    try:
        found: dict[str, str] = json.loads((host.rendered / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    return found


def _digests(host: ComposeHost, secrets: list[str]) -> dict[str, str]:
    """Of the host's files on this machine, secrets among them."""
    there = [path for path in secrets if (host.rendered / path).is_file()]
    return {**manifest(host), **{path: digest((host.rendered / path).read_bytes()) for path in there}}
