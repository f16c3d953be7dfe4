"""The chat page's environment against Open WebUI's own source: no variable that the program does not read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from corral.declarations import declaration
from tools.make_open_webui import FOLDER

DATA: dict[str, Any] = dict(declaration("chat"))
# Read by the start script, by Python's libraries, or by those that the image's own Dockerfile sets them for.
OTHERS = {
    "ANONYMIZED_TELEMETRY", "CORRAL_SECRETS", "CORRAL_SECRETS_DIR", "DO_NOT_TRACK", "HF_HUB_OFFLINE", "HOME",
    "SCARF_NO_ANALYTICS",
}  # fmt: skip


def variables() -> set[str]:
    """Every variable that the component gives to the program on some site."""
    kinds = [told[part] for told in (*DATA["kinds"].values(), DATA["sign_on"]) for part in ("variables", "environment")]
    given = [DATA["services"]["chat"]["environment"], DATA["variables"], *kinds, *DATA["without"].values()]
    return {name for names in given for name in names if not name.startswith("$")} - OTHERS


@pytest.mark.needs("open-webui")
def test_open_webui_reads_every_variable() -> None:
    (package,) = Path(FOLDER).glob("lib/python3.*/site-packages/open_webui")
    source = "".join(path.read_text(encoding="utf-8") for path in package.glob("*.py"))
    read = set(re.findall(r"(?:getenv|environ\.get)\(\s*'(\w+)'", source))
    assert variables() - read == set()


@pytest.mark.needs("open-webui")
def test_the_image_is_of_the_version_that_the_tests_start() -> None:
    (about,) = Path(FOLDER).glob("lib/python3.*/site-packages/open_webui-*.dist-info")
    version = about.name.removeprefix("open_webui-").removesuffix(".dist-info")
    assert DATA["services"]["chat"]["image"] == f"ghcr.io/open-webui/open-webui:v{version}-slim"
