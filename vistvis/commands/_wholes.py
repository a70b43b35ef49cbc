"""Photographs for figures that show what a model did not see of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vistvis.photos.photo import Photo, SeenPhoto
    from vistvis.views.wholes import WholePhoto

# As sharp as figures print them.
_WIDEST = 1200


def whole_photos(photos: Sequence[Photo], seen: Sequence[SeenPhoto]) -> list[WholePhoto]:
    """Photos as figures take them; none where it is not known how one was cut.

    Only those that were cut are read again.
    """
    import numpy as np

    from vistvis.photos.reading import read_photos
    from vistvis.views.wholes import WholePhoto

    wholes = []
    for photo, geometry in zip(photos, (one.geometry for one in seen), strict=True):
        if geometry is None:
            return []
        pixels = None
        if geometry.crop_text():
            (picture,) = read_photos([photo])
            picture.thumbnail((_WIDEST, _WIDEST))
            pixels = np.asarray(picture)
        (top, left), (rows, cols) = geometry.offset, geometry.resized_size
        wholes.append(WholePhoto((left, top, left + cols, top + rows), pixels))
    return wholes
