"""What must hold for the chat page."""

from __future__ import annotations

from collections.abc import Iterator

from corral.checks.registry import check, known
from corral.components.chat import models_of
from corral.config.client_names import added_models, all_aliases
from corral.config.inventory import Inventory
from corral.errors import Finding, KeyPath


@check("inventory", "chat-gateway")
def _chat_gateway(inventory: Inventory) -> Iterator[Finding]:
    """The chat page has HAProxy, which publishes it, and the gateway's database, which keeps conversations."""
    gateway = inventory.gateway
    if inventory.chat is None:
        return
    if gateway.balancing == "direct" and gateway.entrance is None:
        yield Finding("without HAProxy nothing publishes the chat page", ("chat",), "use balancing: slots")
    if not gateway.database:
        yield Finding("the chat page keeps conversations in the database", ("gateway", "database"), "remove it")


@check("inventory", "chat-names")
def _chat_names(inventory: Inventory) -> Iterator[Finding]:
    """Pools and the model for titles of the chat page are names that the gateway knows, and it has a chat model."""
    chat, auto = inventory.chat, inventory.gateway.auto
    if chat is None:
        return
    names = (*inventory.pools, *([auto.name] if auto else []))
    for index, pool in enumerate(chat.pools or ()):
        yield from known("chat-names", "pool", pool, ("chat", "pools", index), names)
    called = (*names, *all_aliases(inventory), *(name for name, _ in added_models(inventory)))
    yield from known("chat-names", "pool or alias", chat.titles, ("chat", "titles"), called)
    if not models_of(inventory, chat):
        path: KeyPath = ("chat", "pools") if chat.pools else ("chat",)
        yield Finding("the chat page has no model to chat with", path, "name a chat pool in pools, or remove chat")
