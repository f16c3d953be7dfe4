"""`grafana push` and `grafana check`: the site's pages in a Grafana that runs, through Grafana's own interface."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from grafana_client.api import GrafanaApi
from grafana_client.client import GrafanaException
from rich.console import Console
from rich.text import Text

from corral import __version__
from corral.components.grafana import COMPONENT, PASSWORD, page_assets
from corral.errors import CorralError, UsageError, did_you_mean, on_one_line
from corral.plan import Plan
from corral.render import ROOT
from corral.secrets import ENV_FILE, read_env
from corral.site import bracketed

TOKEN = "GRAFANA_TOKEN"  # noqa: S105 - a variable's name
ADMIN = "admin"
PROMETHEUS = "prometheus"
LIMIT_S = 30.0
UNAUTHORIZED, FORBIDDEN, NOT_FOUND, UNAVAILABLE = 401, 403, 404, 503
SHUT = {0, UNAUTHORIZED, FORBIDDEN}
"""Nobody answers, or nobody lets us in: there is no use in asking further."""
MOST_TOLD = 300
POINTS, INTERVAL_MS = 400, 15_000
EVERYTHING = ".*"
_VARIABLE = re.compile(r"\$\{(\w+)(?::\w+)?\}|\$(\w+)")

Page = dict[str, Any]
"""A dashboard as Grafana reads it."""


class GrafanaError(CorralError):
    """There is no Grafana, it does not let us in, or it lacks what is needed.

    `status` and `answer` are those of Grafana, where it gave any.
    """

    def __init__(self, message: str, status: int = 0, answer: Any = None) -> None:
        super().__init__(message)
        self.status = status
        self.answer = answer

    @property
    def words(self) -> str:
        """What Grafana itself says is wrong."""
        message = self.answer.get("message") if isinstance(self.answer, dict) else self.answer
        return on_one_line(str(message or self))[:MOST_TOLD]


# --- which Grafana, and what opens it --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Door:
    """Where a Grafana is, what opens it, and where that came from."""

    url: str
    key: str | tuple[str, str]
    key_from: str
    is_own: bool = False
    """The site's own, which has the pages from files."""


def find_door(plan: Plan, out: Path, url: str = "", token_file: Path | None = None) -> Door:
    """The Grafana at `url`, opened by a token; without one the site's own, opened by its admin's password."""
    if url:
        return Door(_checked(url), *_token(token_file))
    monitoring = plan.inventory.monitoring
    services = [item for item in plan.contributions.services if item.component == COMPONENT]
    if monitoring is None or not services:
        raise GrafanaError("this site has no Grafana of its own; name another one with --url")
    host = plan.site.host(monitoring.host)
    if host.ssh and ipaddress.ip_address(host.address).is_loopback:
        raise GrafanaError(
            f"Grafana listens on {monitoring.host}'s loopback address, which this machine does not reach; set "
            f"hosts.{monitoring.host}.address, or run this on {monitoring.host}"
        )
    own = f"http://{bracketed(host.address)}:{monitoring.grafana_port}"
    if token_file:
        return Door(own, *_token(token_file), is_own=True)
    secrets = out / monitoring.host / ENV_FILE
    password = read_env(secrets).get(PASSWORD, "")
    if not password:
        raise GrafanaError(f"{secrets} has no {PASSWORD}; run: ./generate.py secrets init")
    return Door(own, (ADMIN, password), f"{PASSWORD} of {secrets}", is_own=True)


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
            auth=door.key,
            protocol=parts.scheme,
            host=bracketed(parts.hostname or ""),
            port=parts.port,
            url_path_prefix=f"{parts.path.strip('/')}/".removeprefix("/"),
            timeout=LIMIT_S,
        )
        self.api.client.s.trust_env = not door.is_own  # no proxy on the way to the farm's own machines
        self.version = self._version()

    def ask(self, call: Callable[..., Any], *given: Any, **more: Any) -> Any:
        """What one of the client's calls answers."""
        try:
            return call(*given, **more)
        except GrafanaException as error:
            if not error.status_code:
                raise self._silence(error) from None
            if error.status_code == UNAUTHORIZED:
                words = f"Grafana at {self.door.url} refuses {self.door.key_from}; {self._other_key()}"
                raise GrafanaError(words, UNAUTHORIZED, error.response) from None
            told = GrafanaError(str(error), error.status_code, error.response)
            words = f"Grafana at {self.door.url} answers {error.status_code}: {told.words}"
            raise GrafanaError(words, error.status_code, error.response) from None
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

    def _version(self) -> str:
        try:
            health = self.ask(self.api.client.GET, "/health")
        except GrafanaError as error:
            if error.status in {0, UNAUTHORIZED, UNAVAILABLE}:
                raise
            health = None
        if not isinstance(health, dict) or "database" not in health:
            raise GrafanaError(f"what answers at {self.door.url} is not Grafana")
        return str(health.get("version", ""))

    def _silence(self, error: Exception) -> GrafanaError:
        words = on_one_line(str(error)).rsplit(": ", 1)[-1].rstrip(")'\" ")[:MOST_TOLD]
        remedy = (
            "start it with ./generate.py up, or see ./generate.py doctor" if self.door.is_own else "is --url right?"
        )
        return GrafanaError(f"Grafana does not answer at {self.door.url} ({words}); {remedy}")

    def _other_key(self) -> str:
        if isinstance(self.door.key, str):
            return "the token is wrong, has expired, or is of another Grafana"
        return (
            "the password was changed in Grafana, or it first started with another one; set it again there, or give "
            "a token with --token-file"
        )


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


# --- check -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finding:
    """A query that fails, or has nothing to show, and where a person sees that."""

    page: str
    panel: str
    query: str
    words: str

    def __str__(self) -> str:
        """As a line for people."""
        where = " ".join(part for part in (self.panel, self.query) if part)
        return ": ".join(part for part in (self.page, where, on_one_line(self.words)) if part)


@dataclass(frozen=True, slots=True)
class Checked:
    """What a Grafana showed."""

    url: str
    version: str
    source: str
    queries: int
    failing: tuple[Finding, ...]
    empty: tuple[Finding, ...]

    def as_data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def check(plan: Plan, grafana: Grafana, source: str = "") -> Checked:
    """Whether data sources answer, and every query of the site's pages, as Grafana has them, shows something."""
    chosen = choose_source(grafana, source)
    failing = list(_unwell(plan, grafana, chosen))
    empty: list[Finding] = []
    queries = 0
    for ours in pages(plan):
        page = _page_there(grafana, ours)
        if page is None:
            failing.append(
                Finding(ours["title"], "", "", "not in this Grafana; ./generate.py grafana push puts it there")
            )
            continue
        for panel in _panels(page["panels"]):
            asked = _queries(page, panel, str(chosen["uid"]))
            answers = _answers(grafana, page, asked) if asked else {}
            queries += len(asked)
            for query in asked:
                name = query["refId"]
                answer = answers.get(name, {"error": "no answer"})
                where = (page["title"], panel.get("title", ""), name)
                if "error" in answer:
                    failing.append(Finding(*where, str(answer["error"])[:MOST_TOLD]))
                elif not _has_number(answer):
                    empty.append(Finding(*where, "no data"))
    return Checked(grafana.door.url, grafana.version, chosen["name"], queries, tuple(failing), tuple(empty))


def _unwell(plan: Plan, grafana: Grafana, chosen: Mapping[str, Any]) -> Iterator[Finding]:
    """Data sources that do not answer, and those of the site that its own Grafana lacks."""
    names = {str(chosen["uid"])}
    if grafana.door.is_own:
        there = {source["uid"] for source in grafana.sources()}
        wanted = {source.name for source in plan.contributions.sources}
        yield from (Finding("data source", name, "", "not there") for name in sorted(wanted - there))
        names |= wanted & there
    for name in sorted(names):
        try:
            health = grafana.ask(grafana.api.datasource.health, name)
        except GrafanaError as error:
            if error.status in SHUT:
                raise
            yield Finding("data source", name, "", error.words)
        else:
            if health.get("status") != "OK":
                yield Finding("data source", name, "", str(health.get("message", health)))


def _page_there(grafana: Grafana, ours: Page) -> Page | None:
    """The page as Grafana has it; None if it has none."""
    try:
        found: Page = grafana.ask(grafana.api.dashboard.get_dashboard, ours["uid"])["dashboard"]
    except GrafanaError as error:
        if error.status == NOT_FOUND:
            return None
        raise
    return found


def _panels(found: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Every panel, those of rows that are shut, too."""
    for panel in found:
        if panel.get("type") != "row":
            yield panel
        yield from _panels(panel.get("panels", ()))


def _queries(page: Page, panel: Mapping[str, Any], source: str) -> list[dict[str, Any]]:
    """The queries of a panel as Grafana's own page sends them when a person has chosen everything."""
    variables = {item["name"]: item.get("allValue") or EVERYTHING for item in page["templating"]["list"]}
    return [
        {
            **{key: value for key, value in target.items() if key != "editorMode"},
            "datasource": _source_of(target.get("datasource") or panel.get("datasource"), source),
            "expr": filled(target["expr"], variables),
            "intervalMs": INTERVAL_MS,
            "maxDataPoints": POINTS,
        }
        for target in panel.get("targets", ())
        if "expr" in target and not target.get("hide")
    ]


def filled(expression: str, variables: Mapping[str, str]) -> str:
    """An expression with values for the page's variables; Grafana's server knows its own, such as $__range, itself."""

    def value(match: re.Match[str]) -> str:
        return variables.get(match[1] or match[2], match[0])

    return _VARIABLE.sub(value, expression)


def _source_of(given: Any, chosen: str) -> dict[str, str]:
    """The data source of a query: the one that it names, or the chosen one where it leaves that to the page."""
    name = given.get("uid", "") if isinstance(given, dict) else str(given or "")
    return {"type": PROMETHEUS, "uid": chosen if not name or name.startswith("$") else name}


def _answers(grafana: Grafana, page: Page, queries: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Grafana's answer to each query of one panel by its letter. A query that fails makes the whole answer a 400."""
    body = {"queries": queries, "from": page["time"]["from"], "to": page["time"]["to"]}

    try:
        answer = grafana.ask(grafana.api.client.POST, "/ds/query", json=body)
    except GrafanaError as error:
        if error.status in SHUT:
            raise
        answer = error.answer
        if not isinstance(answer, dict) or "results" not in answer:
            return {query["refId"]: {"error": error.words} for query in queries}
    results: dict[str, dict[str, Any]] = answer["results"]
    return results


def _has_number(answer: Mapping[str, Any]) -> bool:
    """Whether a person sees anything of it; what is not a number (NaN) comes as null."""
    for frame in answer.get("frames", ()):
        for field, values in zip(frame["schema"]["fields"], frame["data"]["values"], strict=True):
            if field.get("type") == "number" and any(value is not None for value in values):
                return True
    return False


def show(found: Checked, console: Console, talk: Console) -> None:
    """Prints what fails and what is empty, then a line about all."""
    for finding in found.failing:
        console.print(Text(f"fails  {finding}", style="red"))
    for finding in found.empty:
        console.print(Text(f"empty  {finding}", style="yellow"))
    talk.print(
        Text(
            f"Grafana {found.version} at {found.url}, data source {found.source}: {found.queries} queries, "
            f"{len(found.failing)} fail, {len(found.empty)} empty"
        )
    )
