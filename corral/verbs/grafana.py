"""`grafana push`: the site's dashboards in a Grafana that runs already, through Grafana's API."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from grafana_client.api import GrafanaApi
from grafana_client.client import GrafanaException

from corral import __version__
from corral.build import Plan
from corral.components.grafana import page_assets
from corral.declarations import shipped
from corral.errors import CorralError, UsageError, did_you_mean, on_one_line
from corral.plan.site import bracketed

TOKEN = "GRAFANA_TOKEN"  # noqa: S105 - a variable's name
PROMETHEUS = "prometheus"
LIMIT_S = 30.0
UNAUTHORIZED, FORBIDDEN, UNAVAILABLE = 401, 403, 503
MAX_SHOWN = 300

# A dashboard as Grafana reads it.
Page = dict[str, Any]


class GrafanaError(CorralError):
    """Grafana does not answer or refuses; `status` is the HTTP status of its answer, 0 without one."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class Grafana:
    """A Grafana that answers, opened with the token in `token_file`, else in GRAFANA_TOKEN."""

    def __init__(self, url: str, token_file: Path | None = None) -> None:
        parts = _checked(url)
        token, self.token_from = _token(token_file)
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")
        self.api = GrafanaApi(
            auth=token,
            protocol=parts.scheme,
            host=bracketed(parts.hostname or ""),
            port=parts.port,
            url_path_prefix=f"{parts.path.strip('/')}/".removeprefix("/"),
            timeout=LIMIT_S,
        )
        self._refuse_others()

    def ask(self, call: Callable[..., Any], *given: Any) -> Any:
        """The answer of one of the client's calls; raises GrafanaError."""
        try:
            return call(*given)
        except (GrafanaException, OSError) as error:
            raise self._error(error, getattr(error, "status_code", None) or 0) from None

    def sources(self) -> list[dict[str, Any]]:
        """Its data sources of type Prometheus; Grafana shows them to administrators only."""
        try:
            found = self.ask(self.api.datasource.list_datasources)
        except GrafanaError as error:
            if error.status != FORBIDDEN:
                raise
            raise GrafanaError(f"{error}; give the token's service account the role Admin", FORBIDDEN) from None
        return [source for source in found if source.get("type") == PROMETHEUS]

    def _refuse_others(self) -> None:
        """Raises GrafanaError when the server at this address is not Grafana."""
        try:
            health = self.ask(self.api.client.GET, "/health")
        except GrafanaError as error:
            if error.status in {0, UNAUTHORIZED, UNAVAILABLE}:
                raise
            health = None
        if not isinstance(health, dict) or "database" not in health:
            raise GrafanaError(f"the server at {self.url} is not Grafana")

    def _error(self, error: Exception, status: int) -> GrafanaError:
        if not status:
            words = on_one_line(str(error)).rsplit(": ", 1)[-1].rstrip(")'\" ")[:MAX_SHOWN]
            return GrafanaError(f"Grafana does not answer at {self.url} ({words}); is --url right?")
        if status == UNAUTHORIZED:
            words = "the token is wrong, has expired, or belongs to another Grafana"
            return GrafanaError(f"Grafana at {self.url} refuses {self.token_from}; {words}", status)
        answer = getattr(error, "response", None)
        said = answer.get("message") if isinstance(answer, dict) else answer
        words = on_one_line(str(said or error))[:MAX_SHOWN]
        return GrafanaError(f"Grafana at {self.url} answers {status}: {words}", status)


def _checked(url: str) -> SplitResult:
    """The parts of an address; UsageError if it is none, or holds a password."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise UsageError(f"--url {on_one_line(url)}: not an address such as https://grafana.example.com")
    if parts.username or parts.password:
        raise UsageError(f"--url holds a user or a password, which others can see; put a token into {TOKEN}")
    return parts


def _token(file: Path | None) -> tuple[str, str]:
    """A token, and the name of its file or variable."""
    try:
        token = (file.read_text(encoding="utf-8") if file else os.environ.get(TOKEN, "")).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--token-file {file}: {on_one_line(str(error))}") from None
    if not token:
        where = f"{file} is empty" if file else f"{TOKEN} is not set"
        raise GrafanaError(f"{where}; make a service account with a token in that Grafana, and put the token there")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise GrafanaError(f"{file or TOKEN} does not hold a token: it has more than one word or line")
    return token, str(file or TOKEN)


def pages(plan: Plan) -> list[Page]:
    """The site's dashboards, the same as in its own Grafana."""
    assets = page_assets(plan.contributions)
    if not assets:
        raise GrafanaError("this site has no `monitoring:` and so no dashboards")
    return [json.loads(shipped(asset).read_text(encoding="utf-8")) for asset in assets.values()]


def choose_source(grafana: Grafana, wanted: str) -> dict[str, Any]:
    """The Prometheus with this name or uid; without one the kit's, else Grafana's default, else its first."""
    found = grafana.sources()
    if not found:
        raise GrafanaError(
            f"Grafana at {grafana.url} has no data source of type Prometheus; add one for the site's Prometheus"
        )
    named = [source for source in found if wanted in {source["name"], source["uid"]}]
    if wanted and not named:
        known = did_you_mean(wanted, [source["name"] for source in found])
        raise GrafanaError(f'no Prometheus is called "{wanted}" there; {known}')
    return min(
        named or found, key=lambda source: (source["uid"] != PROMETHEUS, not source.get("isDefault"), source["name"])
    )


def push(plan: Plan, grafana: Grafana, folder: str = "", source: str = "") -> dict[str, str]:
    """Writes the site's dashboards into a folder, over those of an earlier push; returns their addresses by title."""
    shown = choose_source(grafana, source)
    made = pages(plan)
    place = _folder(grafana, folder or plan.inventory.name)
    for page in made:
        _save(grafana, _with_source(page, shown), place)
    return {page["title"]: f"{grafana.url}/d/{page['uid']}" for page in made}


def _save(grafana: Grafana, page: Page, folder: str) -> None:
    body = {
        "dashboard": {**page, "id": None}, "folderUid": folder, "message": f"corral {__version__}", "overwrite": True,
    }  # fmt: skip
    try:
        grafana.ask(grafana.api.dashboard.update_dashboard, body)
    except GrafanaError as error:
        if "provisioned" in str(error):
            raise GrafanaError(
                f"Grafana at {grafana.url} reads {page['title']} from files already, like the kit's own Grafana; "
                "push is for another Grafana: --url"
            ) from None
        raise GrafanaError(f"{page['title']}: {error}") from None


def _folder(grafana: Grafana, title: str) -> str:
    """The uid of the folder with this title, which is made if there is none."""
    for found in grafana.ask(grafana.api.folder.get_all_folders):
        if found["title"] == title:
            return str(found["uid"])
    return str(grafana.ask(grafana.api.folder.create_folder, title)["uid"])


def _with_source(page: Page, source: Mapping[str, Any]) -> Page:
    """The dashboard with this data source selected."""
    current = {"text": source["name"], "value": source["uid"]}
    variables = [
        {**variable, "current": current} if variable["type"] == "datasource" else variable
        for variable in page["templating"]["list"]
    ]
    return {**page, "templating": {"list": variables}}
