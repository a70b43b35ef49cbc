"""`vistvis pdf`: one page of overlays for each query."""

from __future__ import annotations

import argparse

HELP = "gather overlays into PDF pages, layers × heads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", help="where 'vistvis overlay' wrote")
    parser.add_argument(
        "--dpi", type=int, default=300, help="make larger pictures smaller (default 300)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the pages, and print where."""
    from vistvis.views.pdf import plot_attention_for_reconstruction

    print(*plot_attention_for_reconstruction(arguments.folder, arguments.dpi), sep="\n")
    return 0
