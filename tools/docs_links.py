"""A hook of MkDocs: links to files of the checkout that are not on the site become their names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"\[([^]]*)\]\(([^)#:\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: object) -> str:
    """The page's text; links that lead to no file of the checkout stay, for MkDocs to find fault with."""
    pages, here = Path(config["docs_dir"]), Path(page.file.abs_src_path).parent

    def named(link: re.Match[str]) -> str:
        target = (here / link[2]).resolve()
        if target.is_relative_to(pages) or not target.exists():
            return link[0]
        return f"{link[1]} (`{target.relative_to(pages.parent)}` in the checkout)"

    return LINK.sub(named, markdown)
