"""What must hold for Prometheus; `rules.yaml` has the texts."""

from __future__ import annotations

from corral.checks.registry import Findings, Texts
from corral.components.prometheus import COMPONENT
from corral.contributions import Contributions
from corral.plan.site import Site

TEXTS = Texts.beside(__file__)


@TEXTS.check("plan", "rule-file")
def _rule_file(site: Site, _found: Contributions) -> Findings:
    monitoring = site.inventory.monitoring
    if monitoring is None or site.is_local(monitoring.host):
        return
    added = site.host(monitoring.host).services.get(COMPONENT)
    folders = tuple(added.mounts.values()) if added else ()
    files = monitoring.extra.get("rule_files")
    for index, file in enumerate(files if isinstance(files, list) else ()):
        if not any(str(file) == folder or str(file).startswith(f"{folder}/") for folder in folders):
            path = ("monitoring", "extra", "rule_files", index)
            yield TEXTS.finding("rule-file/elsewhere", path, file=file, host=monitoring.host)
