"""The command line: `./generate.py VERB`. Data on stdout, messages on stderr.

Exit codes: 0 fine, 1 wrong, 2 wrong usage, 3 something differs.
"""

from corral.cli.main import main

__all__ = ["main"]
