"""What doctor asks a host besides its containers: sections of its snapshot that the checks read."""

from __future__ import annotations

import json
import shlex

from corral.components import litellm
from corral.render.output import MANIFEST, digest
from corral.render.secrets import ENV_FILE, FOLDER
from corral.runtime.hosts import ComposeHost
from corral.verbs.status.certificates import certificate_section

# Prints the free space of the nearest folder that exists.
ROOM = (
    'room() { place=$2; until [ -e "$place" ] || [ "$place" = / ] || [ "$place" = . ]; do '
    'place=$(dirname "$place"); done; echo "$1 $(df -P -k "$place" | tail -n 1)"; }'
)
# Both, since each of them may be closed to this user.
KERNEL_MESSAGES = "(journalctl -k -b -q --no-pager; dmesg) 2>/dev/null | grep -o 'NVRM: Xid .*' | sort -u | tail -n 50"
LITELLM_VERSION = "import importlib.metadata as m; print(m.version('litellm'))"


def sections(host: ComposeHost) -> dict[str, list[str]]:
    """Shell commands by the name of the section in which they answer; what cannot be found out is empty."""
    folder, models = shlex.quote(host.folder), shlex.quote(host.models_folder)
    private = shlex.join([ENV_FILE, FOLDER, *(f"{FOLDER}/{item.name}" for item in host.plan.secrets_of(host.name))])
    return {
        "info": ["docker info --format '{{json .}}' 2>/dev/null"],
        # The user, the groups of the session, and those from the next login on.
        "user": ["id -un", "id -nG", 'id -nG "$(id -un)"'],
        "cpu": ["uname -m", "getconf _NPROCESSORS_ONLN || echo 0", "grep -m 1 -i '^flags' /proc/cpuinfo"],
        "ram": ["cat /proc/meminfo"],
        "addresses": ["PATH=$PATH:/usr/sbin:/sbin ip -j address 2>/dev/null"],
        "listeners": ["ss -H -l -t -n -p 2>/dev/null"],
        "published": ["docker ps --format '{{.Names}} {{.Ports}}' 2>/dev/null"],
        "disks": [
            ROOM, f"room rendering {folder}; room models {models}",
            "root=$(docker info --format '{{.DockerRootDir}}' 2>/dev/null)", '[ -d "$root" ] && room engine "$root"',
        ],
        "time-service": [
            "timedatectl show --property NTPSynchronized --value 2>/dev/null || chronyc -n tracking 2>/dev/null"
        ],
        "modes": [f"(cd {folder} 2>/dev/null && stat -c '%a %n' {private} 2>/dev/null)"],
        "same": _check_lines(host, folder) if host.ssh else [],
        "models": [f"(cd {models} 2>/dev/null && {{ stat -L -c '%a %s - %n' .", *_model_lines(host), "})"],
        **certificate_section(host),
        "hook": ["PATH=$PATH:/usr/local/bin:/usr/bin command -v nvidia-container-runtime-hook"],
        # Through which AMD and Intel cards are reached, with the number of the group that owns each.
        "devices": ["stat -L -c '%n %g' /dev/kfd /dev/dri/render* 2>/dev/null"],
        "xids": [KERNEL_MESSAGES],
        "litellm": [
            f"{shlex.join(['docker', 'exec', item.container_name, 'python3', '-c', LITELLM_VERSION])} 2>/dev/null"
            for item in host.plan.services_of(host.name)
            if item.component == litellm.COMPONENT
        ],
        # The last one: it is compared with the time at which the answer is here.
        "clock": ["date +%s.%N"],
    }  # fmt: skip


def manifest(host: ComposeHost) -> dict[str, str]:
    """Digests of the host's rendered files on this machine, by path; nothing when nothing is rendered."""
    try:
        found: dict[str, str] = json.loads((host.rendered / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    return found


def _check_lines(host: ComposeHost, folder: str) -> list[str]:
    """Commands that name the files of a far host, secrets among them, that are as they are here."""
    paths = {f"{FOLDER}/{item.name}": host.rendered / FOLDER / item.name for item in host.plan.secrets_of(host.name)}
    secrets = {name: digest(path.read_bytes()) for name, path in paths.items() if path.is_file()}
    lines = [f"{value}  {path}" for path, value in {**manifest(host), **secrets}.items()]
    return [f"(cd {folder} 2>/dev/null && sha256sum -c 2>/dev/null <<'END'", *lines, "END", ")"]


def _model_lines(host: ComposeHost) -> list[str]:
    """Commands that print mode, size, first four bytes (in hexadecimal) and name of every model file."""
    files = shlex.join(sorted(host.model_sources))
    magic = "magic=$(head -c 4 \"$file\" | od -A n -t x1 | tr -d ' ')"
    line = 'echo "$(stat -L -c \'%a %s\' "$file") ${magic:--} $file"'
    return [f'for file in {files}; do if [ -e "$file" ]; then {magic}; {line}; fi; done' if files else ""]
