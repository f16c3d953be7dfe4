"""The JSON Schema of the inventory, for editors; committed as inventory.schema.json."""

from __future__ import annotations

from typing import Any

from corral.config.inventory import Inventory
from corral.json_layout import laid_out


def inventory_schema() -> dict[str, Any]:
    """The schema, with `x-` keys allowed at the top."""
    schema = Inventory.model_json_schema()
    _tidy(schema)
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "corral inventory"}
    return {**head, **schema, "patternProperties": {"^x-": True}}


def _tidy(node: object) -> None:
    """Removes the titles that pydantic makes from names, and closes mappings whose keys have to match a pattern."""
    if isinstance(node, dict):
        if isinstance(node.get("title"), str):
            del node["title"]
        if "patternProperties" in node:
            node.setdefault("additionalProperties", False)
        for value in node.values():
            _tidy(value)
    elif isinstance(node, list):
        for value in node:
            _tidy(value)


def schema_text() -> str:
    """The schema as it is committed."""
    return laid_out(inventory_schema())
