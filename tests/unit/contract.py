"""What users' scripts rely on, in one mapping: commands and options, rule ids, exit codes, the shape of `plan --json`.

    python tests/unit/contract.py > tests/unit/contract_9bd54e3.json

The file was written so with the code of 9bd54e3. Nothing in it may go away; more may come.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from corral.cli.main import app  # noqa: E402 - the checkout is not installed
from tests.compose import command  # noqa: E402

# Sections of `plan --json` whose keys are names from the inventory.
NAMED = {"hosts", "pools", "models", "exceptions", "aliases", "consumers"}
# Words of a command line and what they show: a good inventory, a wrong one, none, a wrong option.
CALLS = (
    ("check", "-i", "GOOD"), ("check", "-i", "BAD"), ("check", "-i", "NONE"), ("plan", "-i", "BAD"),
    ("render", "-i", "BAD", "-o", "OUT"), ("diff", "-i", "GOOD", "-o", "OUT"), ("up", "-i", "GOOD", "-o", "OUT"),
    ("status", "-i", "NONE"), ("check", "--no-such-option"), ("no-such-command",),
)  # fmt: skip


def commands(found: Any, name: str = "") -> Iterator[tuple[str, list[str]]]:
    """Every command with its options."""
    for word, below in getattr(found, "commands", {}).items():
        yield from commands(below, f"{name} {word}".strip())
    if not hasattr(found, "commands"):
        yield name, sorted(word for item in found.params for word in item.opts if word.startswith("-"))


def shape(value: Any, at: str = "") -> Iterator[str]:
    """The paths of all values; names from the inventory are `*`, elements of lists `[]`."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from shape(below, f"{at}.{'*' if at.rpartition('.')[2] in NAMED else key}")
    elif isinstance(value, list):
        for below in value:
            yield from shape(below, f"{at}[]")
    else:
        yield at


def exit_codes(folder: Path) -> dict[str, int]:
    """Exit codes of CALLS."""
    (folder / "bad.yaml").write_text("schema_version: 1\nname: x\nhosts: {a: {adress: 127.0.0.1}}\n")
    names = {"GOOD": "inventories/demo.yaml", "BAD": str(folder / "bad.yaml"), "NONE": str(folder / "none.yaml")}
    names["OUT"] = str(folder / "out")
    return {" ".join(words): command.run([names.get(word, word) for word in words]).returncode for words in CALLS}


def rule_ids() -> list[str]:
    """Every rule that docs/reference/rules.md lists."""
    lines = (ROOT / "docs/reference/rules.md").read_text().splitlines()
    return sorted(line.split("`")[1] for line in lines if line.startswith("| `"))


def contract(folder: Path) -> dict[str, Any]:
    """The mapping for this version; `folder` is for its files."""
    verbs = dict(commands(typer.main.get_command(app)))
    if verbs.pop("bench", None) is not None:  # its own program, beside Locust
        sys.path.insert(0, str(ROOT / "load-tests"))
        import bench

        verbs |= commands(typer.main.get_command(bench.app), "bench")
    inventories = sorted(ROOT.glob("inventories/*.yaml"))
    plans = [json.loads(command.run(["plan", "--json", "-i", str(path)]).stdout) for path in inventories]
    return {
        "commands": dict(sorted(verbs.items())),
        "rules": rule_ids(),
        "exit_codes": exit_codes(folder),
        "plan": sorted({path for plan in plans for path in shape(plan)}),
    }


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as made:
        sys.stdout.write(json.dumps(contract(Path(made)), indent=1) + "\n")
