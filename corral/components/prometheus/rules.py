"""What must hold for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from corral.checks.registry import check
from corral.components.prometheus import COMPONENT
from corral.contributions import Contributions
from corral.errors import Finding
from corral.plan.site import Site


@check("plan", "rule-file")
def _rule_file(site: Site, _found: Contributions) -> Iterator[Finding]:
    """Files of rules that `monitoring.extra` adds are mounted into Prometheus's container."""
    monitoring = site.inventory.monitoring
    if monitoring is None or site.is_local(monitoring.host):
        return
    added = site.host(monitoring.host).services.get(COMPONENT)
    folders = tuple(added.mounts.values()) if added else ()
    files = monitoring.extra.get("rule_files")
    for index, file in enumerate(files if isinstance(files, list) else ()):
        if not any(str(file) == folder or str(file).startswith(f"{folder}/") for folder in folders):
            hint = f"add hosts.{monitoring.host}.services.{COMPONENT}.mounts: {{/srv/rules: /etc/prometheus/own}}"
            path = ("monitoring", "extra", "rule_files", index)
            yield Finding(f"{file} is not in Prometheus's container, which leaves it out", path, hint)
