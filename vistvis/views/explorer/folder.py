"""A page and one binary a site, for a host of static files."""

from __future__ import annotations

import re
from pathlib import Path

from vistvis.files import atomic_file
from vistvis.views.explorer.contents import Contents
from vistvis.views.explorer.page import check_page, page_parts

_SITE = re.compile(r"site-\d+-[0-9a-f]{8}\.bin")


def write_folder(contents: Contents, folder: Path) -> Path:
    """`index.html` and its sites; the page comes last, and then what an earlier one had goes."""
    index = folder / "index.html"
    check_page(index)
    folder.mkdir(parents=True, exist_ok=True)
    names = set()
    for number, data in enumerate(contents.sites()):
        name = contents.site_file(number)
        with atomic_file(folder / name) as stream:
            stream.write(data)
        names.add(name)
    with atomic_file(index) as stream:
        for part in page_parts(contents, with_sites=False):
            stream.write(part.encode())
    for file in folder.iterdir():
        if _SITE.fullmatch(file.name) and file.name not in names:
            file.unlink()
    return index
