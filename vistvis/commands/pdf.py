"""`vistvis pdf`: pages of overlays, for each query and key frame."""

from __future__ import annotations

import argparse

from vistvis.commands import _options

HELP = "gather overlays into PDF pages, layers × heads"

_EXAMPLES = """\
examples:
  vistvis pdf overlays
      a PDF of A4 pages for each query and key frame of what 'vistvis overlay' wrote there
  vistvis pdf overlays --page single --dpi 150
      each on one page as large as its table, with smaller pictures
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = _EXAMPLES
    parser.add_argument("folder", metavar="FOLDER", help="where 'vistvis overlay' wrote")
    parser.add_argument(
        "--page",
        choices=("A4", "letter", "single"),
        default="A4",
        help="paper, as many pages as needed; or a single page as large as the table (default A4)",
    )
    parser.add_argument(
        "--dpi", type=_options.size, default=300, help="make larger pictures smaller (default 300)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the pages, and print where."""
    from vistvis.views.pdf import plot_attention_for_reconstruction

    made = plot_attention_for_reconstruction(arguments.folder, arguments.dpi, page=arguments.page)
    print(*made, sep="\n")
    return 0
