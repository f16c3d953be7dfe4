"""`grafana push`: the site's pages in a Grafana that runs, through Grafana's own interface."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from grafana_client.api import GrafanaApi
from grafana_client.client import GrafanaException

from corral import __version__
from corral.build import Plan
from corral.components.grafana import page_assets
from corral.errors import CorralError, UsageError, did_you_mean, on_one_line
from corral.plan.site import bracketed
from corral.render.tree import ROOT

TOKEN = "GRAFANA_TOKEN"  # noqa: S105 - a variable's name
PROMETHEUS = "prometheus"
LIMIT_S = 30.0
UNAUTHORIZED, FORBIDDEN, UNAVAILABLE = 401, 403, 503
MOST_TOLD = 300

# A dashboard as Grafana reads it.
Page = dict[str, Any]


class GrafanaError(CorralError):
    """There is no Grafana, it does not let us in, or it lacks what is needed; `status` is its answer's, 0 without."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


# --- which Grafana, and what opens it --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Door:
    """Where a Grafana is, the token that opens it, and where that came from."""

    url: str
    token: str
    token_from: str


def find_door(url: str, token_file: Path | None = None) -> Door:
    """The Grafana at `url`, opened by the token in a file or else in GRAFANA_TOKEN."""
    return Door(_checked(url), *_token(token_file))


def _checked(url: str) -> str:
    """The address without what may follow it; UsageError if it is none, or holds a password."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address:
        raise UsageError(f"--url {on_one_line(url)}: not an address such as https://grafana.example.com")
    if parts.username or parts.password:
        raise UsageError(f"--url holds a user or a password, which others can see; put a token into {TOKEN}")
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/")


def _token(file: Path | None) -> tuple[str, str]:
    """A token, and where it is from."""
    if file:
        try:
            token, source = file.read_text(encoding="utf-8").strip(), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--token-file {file}: {on_one_line(str(error))}") from None
    else:
        token, source = os.environ.get(TOKEN, "").strip(), TOKEN
    if not token:
        where = f"{file} is empty" if file else f"{TOKEN} is not set"
        raise GrafanaError(f"{where}; make a service account with a token in that Grafana, and put the token there")
    if not token.isascii() or not token.isprintable() or " " in token:
        raise GrafanaError(f"what {source} holds is no token: it has more than one word or line")
    return token, source


class Grafana:
    """A Grafana that answers. Every method raises GrafanaError with words that say what to do."""

    def __init__(self, door: Door) -> None:
        self.door = door
        parts = urlsplit(door.url)
        self.api = GrafanaApi(
            auth=door.token,
            protocol=parts.scheme,
            host=bracketed(parts.hostname or ""),
            port=parts.port,
            url_path_prefix=f"{parts.path.strip('/')}/".removeprefix("/"),
            timeout=LIMIT_S,
        )
        self._refuse_others()

    def ask(self, call: Callable[..., Any], *given: Any, **more: Any) -> Any:
        """What one of the client's calls answers."""
        try:
            return call(*given, **more)
        except GrafanaException as error:
            if not error.status_code:
                raise self._silence(error) from None
            if error.status_code == UNAUTHORIZED:
                words = "the token is wrong, has expired, or is of another Grafana"
                raise GrafanaError(
                    f"Grafana at {self.door.url} refuses {self.door.token_from}; {words}", UNAUTHORIZED
                ) from None
            said = error.response.get("message") if isinstance(error.response, dict) else error.response
            words = on_one_line(str(said or error))[:MOST_TOLD]
            words = f"Grafana at {self.door.url} answers {error.status_code}: {words}"
            raise GrafanaError(words, error.status_code) from None
        except OSError as error:
            raise self._silence(error) from None

    def sources(self) -> list[dict[str, Any]]:
        """Its data sources of type Prometheus; only an administrator may see them."""
        try:
            found = self.ask(self.api.datasource.list_datasources)
        except GrafanaError as error:
            if error.status != FORBIDDEN:
                raise
            raise GrafanaError(f"{error}; give the token's service account the role Admin", FORBIDDEN) from None
        return [source for source in found if source.get("type") == PROMETHEUS]

    def _refuse_others(self) -> None:
        """Raises GrafanaError when what answers is no Grafana."""
        try:
            health = self.ask(self.api.client.GET, "/health")
        except GrafanaError as error:
            if error.status in {0, UNAUTHORIZED, UNAVAILABLE}:
                raise
            health = None
        if not isinstance(health, dict) or "database" not in health:
            raise GrafanaError(f"what answers at {self.door.url} is not Grafana")

    def _silence(self, error: Exception) -> GrafanaError:
        words = on_one_line(str(error)).rsplit(": ", 1)[-1].rstrip(")'\" ")[:MOST_TOLD]
        return GrafanaError(f"Grafana does not answer at {self.door.url} ({words}); is --url right?")


# --- pages -----------------------------------------------------------------------------------------------------------


def pages(plan: Plan) -> list[Page]:
    """The site's dashboards, the same that its own Grafana has."""
    assets = page_assets(plan.contributions)
    if not assets:
        raise GrafanaError("this site has no `monitoring:` and so no pages")
    return [json.loads((ROOT / asset).read_text(encoding="utf-8")) for asset in assets.values()]


def choose_source(grafana: Grafana, wanted: str, usual: str = PROMETHEUS) -> dict[str, Any]:
    """The Prometheus with this name or uid; without one the kit's, else Grafana's default, else its first."""
    found = grafana.sources()
    if not found:
        raise GrafanaError(
            f"Grafana at {grafana.door.url} has no data source of type Prometheus; add one that asks the site's "
            "Prometheus"
        )
    if wanted:
        for source in found:
            if wanted in {source["name"], source["uid"]}:
                return source
        names = [source["name"] for source in found]
        raise GrafanaError(f'no Prometheus is called "{wanted}" there; {did_you_mean(wanted, names)}')
    return min(found, key=lambda source: (source["uid"] != usual, not source.get("isDefault"), source["name"]))


def push(plan: Plan, grafana: Grafana, folder: str = "", source: str = "") -> dict[str, str]:
    """Puts the site's pages into a folder, over those that are there; gives the address of each by its title."""
    shown = choose_source(grafana, source)
    made = pages(plan)
    place = _folder(grafana, folder or plan.inventory.name)
    found = {}
    for page in made:
        body = {
            "dashboard": {**_with_source(page, shown), "id": None},
            "folderUid": place,
            "message": f"corral {__version__}",
            "overwrite": True,
        }
        try:
            grafana.ask(grafana.api.dashboard.update_dashboard, body)
        except GrafanaError as error:
            if "provisioned" in str(error):
                raise GrafanaError(
                    f"Grafana at {grafana.door.url} has the page {page['title']} from files already, as the kit's own "
                    "has; push is for another Grafana: --url"
                ) from None
            raise GrafanaError(f"{page['title']}: {error}") from None
        found[page["title"]] = f"{grafana.door.url}/d/{page['uid']}"
    return found


def _folder(grafana: Grafana, title: str) -> str:
    """The uid of the folder with this title, which is made if there is none."""
    for found in grafana.ask(grafana.api.folder.get_all_folders):
        if found["title"] == title:
            return str(found["uid"])
    return str(grafana.ask(grafana.api.folder.create_folder, title)["uid"])


def _with_source(page: Page, source: Mapping[str, Any]) -> Page:
    """The page with this data source chosen at its top."""
    current = {"text": source["name"], "value": source["uid"]}
    variables = [
        {**variable, "current": current} if variable["type"] == "datasource" else variable
        for variable in page["templating"]["list"]
    ]
    return {**page, "templating": {"list": variables}}
