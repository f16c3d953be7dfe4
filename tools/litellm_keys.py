"""Keys that LiteLLM itself reads, by section, for `import`: `python -m tools.litellm_keys` writes the table again."""

from __future__ import annotations

from pathlib import Path

from tests.consumers import litellm_contract as contract

TABLE = Path(__file__).parents[1] / "corral" / "verbs" / "imports" / "tables" / "litellm_keys.yaml"
HEAD = """\
# Keys that LiteLLM reads, by section of its config.yaml, as its own code has them: written by tools/litellm_keys.py.
"""


def table() -> str:
    """The table for the installed LiteLLM."""
    sections = {
        "top": contract._top_level_keys(),  # noqa: SLF001 - the same question
        "general": contract._general_keys(),  # noqa: SLF001
        "litellm": contract._litellm_keys(),  # noqa: SLF001
        "router": contract._router_keys(),  # noqa: SLF001
    }
    lines = (f"{name}: >-\n" + _folded(sorted(keys)) for name, keys in sections.items())
    return HEAD + "".join(lines)


def _folded(words: list[str]) -> str:
    text, line = "", " "
    for word in words:
        if len(line) + len(word) > 110:  # noqa: PLR2004 - a readable line
            text, line = text + line + "\n", " "
        line += f" {word}"
    return text + line + "\n"


if __name__ == "__main__":
    TABLE.write_text(table())
