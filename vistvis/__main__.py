"""`python -m vistvis`: the command line, also from a checkout that is not installed."""

from __future__ import annotations

import sys

from vistvis.cli import main

if __name__ == "__main__":
    sys.exit(main())
