#!/usr/bin/env python3
"""The command line of corral: `./generate.py VERB`.

Runs in the checkout's `.venv`, whichever Python starts it; the verbs themselves are in `corral/cli`.
"""

import os
import sys

ROOT = os.path.dirname(os.path.realpath(__file__))
ENVIRONMENT = os.path.join(ROOT, ".venv")


def enter_environment() -> None:
    """Returns in the interpreter of `.venv`: at once, or by starting this program again with it."""
    if not os.path.exists(os.path.join(ENVIRONMENT, "corral-complete")):  # written last by tools/make_env.py
        folder = "" if os.getcwd() == ROOT else "-C " + ROOT + " "
        sys.exit("corral: no environment yet; run: make " + folder + "env")
    if os.path.realpath(sys.prefix) != os.path.realpath(ENVIRONMENT):
        python = os.path.join(ENVIRONMENT, "bin", "python")
        os.execv(python, [python, os.path.join(ROOT, "generate.py"), *sys.argv[1:]])


if __name__ == "__main__":
    try:
        enter_environment()
        sys.path[:0] = [] if ROOT in sys.path else [ROOT]
        from corral.cli import main

        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
