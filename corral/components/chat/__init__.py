"""The chat page: Open WebUI with its environment alone, which makes the gateway all that it knows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from corral.checks.references import OWN_PREFIX
from corral.components import Stage, litellm, postgres
from corral.components.declared import filled, secrets, service
from corral.config.client_names import kind_of
from corral.config.inventory import Chat, Consumer, Inventory
from corral.contributions import (
    Contribution,
    Contributions,
    Database,
    Endpoint,
    File,
    OwnKey,
    Secret,
    State,
    WebPage,
)
from corral.declarations import declaration
from corral.gateway.frontends import people_address
from corral.gateway.keys import wanted_of
from corral.plan.site import Site, bracketed

STAGE = Stage.GATEWAY
COMPONENT = "chat"
KEY, PASSWORD = "CHAT_KEY", "CHAT_DATABASE_PASSWORD"
KEY_NAME = f"{OWN_PREFIX}chat"
DATABASE = Database("open_webui", "open_webui", PASSWORD, "accounts and conversations of the chat page")
START = "langfuse/start.sh"
ACCOUNTS = "the page's own accounts; sign-up is off"
# In which the program says whose request it passes on.
ACCOUNT_HEADER = "x-openwebui-user-id"
SIGN_ON = "it asks the provider of single sign-on"


def announce(site: Site) -> Iterator[Contribution]:
    """Its database, its key, and the port at which HAProxy publishes it."""
    chat, host = site.inventory.chat, site.inventory.gateway.host
    if chat is None:
        return
    yield DATABASE
    yield OwnKey(KEY_NAME, KEY, wanted_of(site.inventory, KEY_NAME, _consumer(chat)).settings)
    program = Endpoint(chat.program_port, host, COMPONENT)
    each = chat.per_account
    yield WebPage(
        COMPONENT,
        "Chat",
        url_of(site, chat),
        chat.port,
        program,
        ACCOUNTS,
        rpm=each.rpm,
        parallel=each.parallel,
        secret=KEY,
        account_header=ACCOUNT_HEADER,
    )


def contribute(site: Site, published: Contributions) -> Iterator[Contribution]:
    """The program, its secrets and what it keeps."""
    chat, host = site.inventory.chat, site.inventory.gateway.host
    if chat is None or not published.doors:
        return
    yield from secrets(COMPONENT, host, database_url=postgres.url_of(site, DATABASE))
    if chat.sign_on:
        yield Secret(chat.sign_on.secret, host, "what the provider of single sign-on gave for the chat page", "given")
    yield File(host, COMPONENT, "start.sh", asset=START)
    door = published.doors[0].endpoint
    stores = tuple(store.endpoint for store in published.stores if store.kind == "database")
    worker = litellm.workers_behind(site)[0]
    values = {
        "url": url_of(site, chat),
        "gateway": f"http://{site.address(door, host)}/v1",
        "litellm": f"http://{site.address(worker, host)}/v1",
    }
    variables, given = _settings(site, chat, values)
    is_local, data = site.is_local(host), site.data_path(host, COMPONENT, "/tmp")  # noqa: S108 - in the container
    yield service(
        site,
        host,
        COMPONENT,
        port=chat.program_port,
        start=_start(chat, is_local=is_local),
        static=f"{data}/static",
        home=data,
        admin=chat.admin,
        is_secure=str(values["url"].startswith("https:")).lower(),
        new_role="pending" if chat.sign_on is None or chat.sign_on.approve else "user",
        models=json.dumps({"0": {"model_ids": models_of(site.inventory, chat)}}),
        titles=chat.titles,
        patience_s=str(litellm.patience_s(site)),
        memory_mib=chat.memory_mib,
        variables=" ".join(f"{variable}={secret}" for variable, secret in sorted(variables.items())),
        keys=tuple(sorted(set(variables.values()))),
        given=given,
        calls=(door, worker, *stores),
        exceptions={"way-out": SIGN_ON} if chat.sign_on else {},
        **values,
    )
    yield State(host, COMPONENT, "chat-files", "files and pictures of the chat page", "chat-files", "/var/tmp")  # noqa: S108


def url_of(site: Site, chat: Chat) -> str:
    """Where browsers find the page."""
    entrance = site.inventory.gateway.entrance
    scheme = "https" if entrance and entrance.certificate else "http"
    return chat.url or f"{scheme}://{bracketed(people_address(site))}:{chat.port}"


def _start(chat: Chat, *, is_local: bool) -> tuple[str, ...]:
    """The command: the image has no program of that name, and the package no folder to start uvicorn in."""
    if is_local:
        return ("open-webui", "serve", "--host", "127.0.0.1", "--port", str(chat.program_port))
    own = ("--host", "0.0.0.0", "--port", str(chat.program_port), "--forwarded-allow-ips", "*")  # noqa: S104
    return ("uvicorn", "open_webui.main:app", *own)


def _consumer(chat: Chat) -> Consumer:
    """What its key may ask for."""
    return Consumer(pools=chat.pools, limits=chat.limits, weight=chat.weight)


def _settings(site: Site, chat: Chat, values: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Variables that are secrets, with the name of each, and those that depend on what the farm has."""
    data: Any = declaration(COMPONENT)
    variables = dict(data["variables"])
    given: dict[str, str] = {}
    first = _first_of_kinds(site.inventory, chat)
    for kind, told in data["kinds"].items():
        if kind in first:
            variables |= told["variables"]
            given |= filled(told["environment"], values | {"pool": first[kind]})
        else:
            given |= data["without"].get(kind, {})
    if chat.sign_on:
        own = {"client": chat.sign_on.client, "title": chat.sign_on.title, "provider": chat.sign_on.url}
        told = filled(data["sign_on"], values | own | {"secret": chat.sign_on.secret})
        variables, given = variables | told["variables"], given | told["environment"]
    return variables, given


def models_of(inventory: Inventory, chat: Chat) -> tuple[str, ...]:
    """The models that people choose from; `auto` first."""
    pools = inventory.pools
    names = [name for name in _opened(inventory, chat) if name not in pools or kind_of(inventory, name) == "chat"]
    return tuple(sorted(names, key=lambda name: name in pools))


def _opened(inventory: Inventory, chat: Chat) -> tuple[str, ...]:
    auto = inventory.gateway.auto
    return chat.pools or (*([auto.name] if auto else []), *inventory.pools)


def _first_of_kinds(inventory: Inventory, chat: Chat) -> dict[str, str]:
    """The first pool of each kind that the page may use."""
    pools = [name for name in _opened(inventory, chat) if name in inventory.pools]
    return {kind_of(inventory, name) or "": name for name in reversed(pools)}
