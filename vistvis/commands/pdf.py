"""`vistvis pdf`: pages of overlays, for each query and key frame."""

from __future__ import annotations

import argparse

HELP = "gather overlays into PDF pages, layers × heads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("folder", help="where 'vistvis overlay' wrote")
    parser.add_argument(
        "--dpi", type=int, default=300, help="make larger pictures smaller (default 300)"
    )
    parser.add_argument(
        "--page",
        choices=("A4", "letter", "single"),
        default="A4",
        help="paper, as many pages as needed; or a single page as large as the table (default A4)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the pages, and print where."""
    from vistvis.views.pdf import plot_attention_for_reconstruction

    made = plot_attention_for_reconstruction(arguments.folder, arguments.dpi, page=arguments.page)
    print(*made, sep="\n")
    return 0
