"""The page of all keys says what the inventory's models say."""

from pathlib import Path

from corral.config.inventory import Inventory
from tests.reference import inventory_reference

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "inventory.md"


def test_the_reference_of_keys_is_fresh(*, update_golden: bool) -> None:
    if update_golden:
        PAGE.write_text(inventory_reference(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == inventory_reference(), "write it again with: make golden"


def test_every_section_and_key_is_on_the_page() -> None:
    page = inventory_reference()
    for section in ("Inventory", "Host", "Pool", "ServerSettings", "Gateway", "Monitoring", "Node", "Model"):
        assert f"\n## {section}\n" in page
    for key in Inventory.model_fields:
        assert f"| `{key}` |" in page
