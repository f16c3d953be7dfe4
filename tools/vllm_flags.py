"""vLLM's flags from its own parser, as corral/components/vllm/flags.yaml; run it with the Python of a vLLM environment.

vLLM is too large to be among the kit's own packages (several gigabytes with PyTorch), but its parser needs no card. The
version is that of IMAGE in corral/components/vllm/__init__.py. With words of a command line, it says what the parser
makes of them instead.
"""

from __future__ import annotations

import argparse
import sys

import vllm
from vllm.entrypoints.cli import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

HEAD = """\
# vLLM's command line (`vllm serve`), as its own parser has it: written by tools/vllm_flags.py with the Python of vLLM
# {version}, read by corral/components/vllm/flags.py.
"""


def parser_of_serve() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """VLLM's whole parser, and that of `serve`."""
    whole = FlexibleArgumentParser(prog="vllm")
    return whole, serve.cmd_init()[0].subparser_init(whole.add_subparsers(dest="subparser"))


def main() -> None:
    """Writes the table to the standard output, or reads a command line."""
    whole, own = parser_of_serve()
    if sys.argv[1:]:
        found = vars(whole.parse_args(["serve", *sys.argv[1:]]))
        given = {name: value for name, value in found.items() if value != own.get_default(name)}
        print(given)
        return
    print(HEAD.format(version=vllm.__version__), end="")
    for title, holds in (
        ("switches", lambda action: action.nargs == 0),
        ("values", lambda action: action.nargs in (None, "?")),
        ("lists", lambda action: action.nargs not in (0, None, "?")),
    ):
        print(f"\n{title}:")
        for action in own._actions:  # noqa: SLF001 - argparse has no other way to say what it knows
            if action.option_strings and holds(action):
                print(f'  - "{" ".join(action.option_strings)}"')


if __name__ == "__main__":
    main()
