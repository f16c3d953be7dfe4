"""What `import` makes of a LiteLLM configuration, read by LiteLLM; and what it knows of LiteLLM's keys."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from corral.build import build_plan
from corral.config.load import load_text
from corral.render.tree import render
from corral.verbs.imports.reader import read
from corral.verbs.imports.sources import read_text
from corral.verbs.imports.writing import text_of
from tests.consumers.litellm_contract import load_with_litellm, unknown_keys
from tools.litellm_keys import TABLE, table

SOURCE = Path(__file__).parents[1] / "imports" / "litellm" / "whole.yaml"
STORE = re.compile(r"redis|database_url")


def test_the_table_is_what_litellm_reads() -> None:
    assert TABLE.read_text() == table(), "write it again with: .venv/bin/python -m tools.litellm_keys"


def test_litellm_reads_what_is_rendered_from_an_imported_configuration(tmp_path: Path) -> None:
    """Everything that can be carried over, at once; database and cache are left out: it would connect to them."""
    found = read([read_text(SOURCE.read_text(), SOURCE.name)])
    plan = build_plan(load_text(text_of(found), tmp_path / "inventory.yaml"))
    tree = render(plan)
    config = yaml.safe_load(tree["box/litellm/config.yaml"])
    assert unknown_keys(config) == []
    for section in ("general_settings", "router_settings"):
        config[section] = {key: value for key, value in config[section].items() if not STORE.search(key)}
    for path, data in tree.items():
        if path.startswith("box/litellm/"):
            (tmp_path / Path(path).name).write_bytes(data)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    secrets = {secret.name: "sk-contract-7d1fe0c29ab4" for secret in plan.secrets["box"]}
    assert load_with_litellm(tmp_path / "config.yaml", secrets) == ""
    names = {entry["model_name"] for entry in config["model_list"]}
    assert {"gpt-4o", "chat", "embed", "claude"} <= names
