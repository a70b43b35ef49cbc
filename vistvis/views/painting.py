"""Arrays to pictures: resize, colour, blend, mark. No files, no figures, no models.

Pictures are uint8 `(H, W, 3)`; maps are float, one value per patch or per pixel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from einops import pack, unpack

from vistvis.errors import InputError
from vistvis.names import suggestion

if TYPE_CHECKING:
    from matplotlib.colors import Colormap, Normalize
    from numpy.typing import NDArray

    from vistvis.images import Values

# Map, row and column of a query's own patch, as `normalizer` takes it.
Own: TypeAlias = tuple[int | slice, int, int]

NORMS = ("auto", "linear", "log", "percentile")

# The one house style: colours that colour-blind people can read, dark where there is little, so
# that a grey picture can shine through, and white for what lies above the scale.
CMAP, OVER = "inferno", "#ffffff"
ALPHA = 0.55

GREEN = (0, 215, 70)
WHITE = (255, 255, 255)
# Pixels of white around the outline of a query.
_RING = 2
# A map is dark where it stays within this part of its scale.
_DARK = 0.15
# Weights below a millionth of the largest are one colour on a log scale: they differ in rounding.
_LOG_DECADES = 6
_LEVELS = 256
LUMA = (0.299, 0.587, 0.114)


def resize(maps: Values, size: tuple[int, int]) -> NDArray[np.float32]:
    """Resize maps bilinearly: `(..., rows, cols)` of any real dtype → float32 `(..., H, W)`.

    The value of a patch is reached at the patch's centre (`align_corners=False`), beyond the
    outermost centres it stays as it is. Nothing is rounded to 8 bits on the way.
    """
    values = torch.as_tensor(maps).detach().to("cpu", torch.float32)
    if values.ndim < 2 or values.numel() == 0:
        raise InputError(f"maps are (..., rows, cols) and not empty, got {tuple(values.shape)}")
    height, width = (int(n) for n in size)
    if height < 1 or width < 1:
        raise InputError(f"a size in pixels is positive, got {height}×{width}")
    stack, leading = pack([values], "* rows cols")
    resized = torch.nn.functional.interpolate(
        stack[:, None], size=(height, width), mode="bilinear", align_corners=False
    )
    (large,) = unpack(resized[:, 0], leading, "* height width")
    return as_array(large)


def stretch(maps: Values, *, eps: float = 1e-8) -> NDArray[np.float32]:
    """Every map from its minimum to its maximum: `(m − min) / (max − min + eps)`.

    Maps are `(..., rows, cols)`; `eps` keeps a constant map at zero, and rounding noise from being
    blown up to full contrast.
    """
    values = as_array(maps)
    low = values.min(axis=(-2, -1), keepdims=True)
    span = values.max(axis=(-2, -1), keepdims=True) - low
    stretched: NDArray[np.float32] = (values - low) / (span + np.float32(eps))
    return stretched


def normalizer(
    values: Values,
    *,
    norm: str = "auto",
    percentile: float = 99.0,
    own: Own | None = None,
) -> Normalize:
    """One colour scale for all values given, with fixed limits, so that pictures can be compared.

    Parameters
    ----------
    values
        Of any shape; NaN and infinite values do not count.
    norm
        "linear" from 0 (or the smallest value, where that is negative) to the largest; "auto": the
        same, but the query's own patch does not count (nor do the eight beside it where there are
        other frames), because a query that looks at itself first would leave all else dark; "log"
        over at most six decades below the largest; "percentile": linear, but only up to that
        percentile, so that one strong sink does not turn everything else dark.
    own
        Which of the maps `(…, rows, cols)`, counted through, and which of its rows and columns is
        the query's own patch; `slice(None)` where all maps have it, None where none has.

    Raises
    ------
    InputError
        If `norm` is none of these, or log is asked for where nothing is positive.
    """
    from matplotlib.colors import LogNorm, Normalize

    array = as_array(values)
    finite = array[np.isfinite(array)]
    if finite.size == 0:
        raise InputError("a colour scale needs at least one finite value; all are NaN or infinite")
    if norm == "auto":
        others = _others(array, own) if own is not None else finite
        # A map of nothing but the query's surroundings has no other values to scale by.
        finite = others if others.size and others.max() > 0 else finite
    low, high = min(0.0, float(finite.min())), float(finite.max())
    if norm == "log":
        positive = finite[finite > 0]
        if positive.size == 0:
            raise InputError('norm="log" needs a positive value; use norm="linear"')
        low = max(float(positive.min()), high * 10.0**-_LOG_DECADES)
        return LogNorm(vmin=low if low < high else high / 10, vmax=high)
    if norm == "percentile":
        cut = float(np.percentile(finite, percentile))
        high = cut if cut > low else high
    elif norm not in ("auto", "linear"):
        raise InputError(f"norm is one of {', '.join(map(repr, NORMS))}, got {norm!r}")
    if not high > low:  # one colour for a constant map, in place of a division by zero
        high = low + 1.0
    return Normalize(vmin=low, vmax=high)


def _others(maps: NDArray[np.float32], own: Own) -> NDArray[np.float32]:
    """The finite values but those of the query's patch and, beside other frames, its neighbours."""
    number, row, col = own
    counted = np.isfinite(maps).reshape(-1, *maps.shape[-2:])
    reach = int(_has_other_frames(maps, own))
    rows, cols = (slice(max(at - reach, 0), at + reach + 1) for at in (row, col))
    counted[number, rows, cols] = False
    others: NDArray[np.float32] = maps.reshape(counted.shape)[counted]
    return others


def _has_other_frames(maps: NDArray[np.float32], own: Own) -> bool:
    """Whether there are maps without the query's patch; where not, what is beside it is the point.

    Values that are no maps, because these are of several grids, are of several frames.
    """
    if maps.ndim < 2:
        return True
    return not isinstance(own[0], slice) and maps.size > maps.shape[-2] * maps.shape[-1]


def scale_text(values: Values, normalizer: Normalize, *, norm: str, own: Own | None = None) -> str:
    """For captions: what the scale `normalizer(values, norm=norm, own=own)` runs to."""
    array = as_array(values)
    largest, outside = float(np.nanmax(array)), ""
    if own is not None:
        beside = " and its neighbours" * _has_other_frames(array, own)
        outside = f" outside the query's patch{beside}"
    text = {
        "auto": f"to the largest weight{outside}",
        "linear": "to the largest weight",
        "log": "logarithmic, to the largest weight",
        "percentile": "to the 99th percentile",
    }[norm]
    above = f" (white: above it, up to {largest:.3g})" if is_clipped(values, normalizer) else ""
    return f"scale: {text}{above}"


def is_clipped(values: Values, normalizer: Normalize) -> bool:
    """Whether a value lies above the scale: it is drawn white, and the colour bar has an arrow."""
    assert normalizer.vmax is not None
    return bool(np.nanmax(as_array(values)) > np.float32(normalizer.vmax))


def dark_maps(maps: Values, normalizer: Normalize) -> tuple[int, ...]:
    """Which of the maps `(F, rows, cols)` are dark: all of it in the lowest 15 % of the scale.

    There is something in such a map that cannot be seen; a map of zeros is as dark as it should be.
    """
    peaks = np.nanmax(as_array(maps), axis=(-2, -1))
    heights = np.ma.filled(normalizer(peaks), 0.0)
    return tuple(np.flatnonzero((heights < _DARK) & (peaks > 0)).tolist())


def colour_map(cmap: str | Colormap = CMAP) -> Colormap:
    """A colour map that shows what lies above its scale; InputError where there is none such."""
    import matplotlib

    try:
        found = matplotlib.colormaps[cmap] if isinstance(cmap, str) else cmap
    except KeyError as error:
        hint = suggestion(str(cmap), matplotlib.colormaps, otherwise="inferno, viridis, cividis, …")
        raise InputError(f"matplotlib has no colour map {cmap!r}: {hint}") from error
    return found.with_extremes(over=OVER, bad=found(0.0))  # bad: NaN, and 0 on a log scale


def lay_over(
    picture: NDArray[np.floating[Any]],
    heat: NDArray[np.float32],
    *,
    normalizer: Normalize,
    cmap: str | Colormap = CMAP,
    alpha: float = ALPHA,
) -> NDArray[np.uint8]:
    """A map `(H, W)` in colour over a picture `(H, W, 3)` in [0, 1], uint8 `(H, W, 3)`.

    The picture is grey, times `1 − alpha`, and shines through where the map is dark ("screen"):
    bright colours, which carry the message, stay as the colour bar has them.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha is an opacity from 0 to 1, got {alpha}")
    colours = colour_map(cmap)(normalizer(heat))[..., :3].astype(np.float32)
    grey = (picture @ np.array(LUMA, np.float32) * np.float32(1 - alpha))[..., None]
    laid: NDArray[np.uint8] = np.rint(255 * (colours + (1 - colours) * grey)).astype(np.uint8)
    return laid


def colour_indices(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Where in a colour table values from 0 to 1 lie: 256 equal steps."""
    steps = values * np.float32(_LEVELS)
    # fmax and fmin also turn NaN into 0, which a conversion to int would not.
    np.fmax(steps, 0, out=steps)
    np.fmin(steps, _LEVELS - 1, out=steps)
    return steps.astype(np.uint8)


def colour_table(cmap: str | Colormap) -> NDArray[np.uint8]:
    """A colour map as 256 colours, uint8 `(256, 3)`; InputError where matplotlib has none such."""
    colours = np.asarray(colour_map(cmap)(np.linspace(0, 1, _LEVELS)))[:, :3]
    table: NDArray[np.uint8] = np.rint(colours * 255).astype(np.uint8)
    return table


def outline(
    image: NDArray[np.uint8],
    box: tuple[int, int, int, int],
    *,
    colour: tuple[int, int, int] = GREEN,
    width: int = 3,
) -> NDArray[np.uint8]:
    """A copy of a picture `(H, W, 3)` with a frame drawn along the inside of a box.

    The box is `(x0, y0, x1, y1)` in pixels, `x1` and `y1` exclusive; what lies outside is cut off.
    The line, `width` pixels, takes at most a third of the box, so that its middle can be seen.
    """
    marked = np.array(image, dtype=np.uint8)
    rows, cols = marked.shape[:2]
    x0, y0, x1, y1 = box
    x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, cols), min(y1, rows)
    if x0 >= x1 or y0 >= y1:
        raise InputError(f"the box {box} does not touch the picture of {cols}×{rows} pixels")
    line = max(1, min(int(width), (x1 - x0) // 3, (y1 - y0) // 3))
    inside = marked[y0:y1, x0:x1]
    inside[:line] = inside[-line:] = colour
    inside[:, :line] = inside[:, -line:] = colour
    return marked


def outline_query(picture: NDArray[np.uint8], box: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """A copy with the box outlined in green within white: one of the two stands out anywhere."""
    x0, y0, x1, y1 = box
    ring = x0 - _RING, y0 - _RING, x1 + _RING, y1 + _RING
    return outline(outline(picture, ring, colour=WHITE, width=_RING), box)


def as_array(values: Values) -> NDArray[np.float32]:
    """A tensor or array as float32 in host memory."""
    if isinstance(values, torch.Tensor):
        return values.detach().to("cpu", torch.float32).numpy()
    return np.asarray(values, dtype=np.float32)
