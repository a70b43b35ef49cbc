"""Choosing patches by clicking: a picture with its grid in a window."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.patheffects import withStroke

from vistvis.errors import DisplayError
from vistvis.tokens import TokenLayout
from vistvis.views.figures import image_axes, outline_box

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backend_bases import Event
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from numpy.typing import NDArray

_ALTERNATIVES = (
    "give tokens by number instead: query_idx=500 or a list; TokenLayout.index finds the number of "
    "a patch by row and column"
)
# These draw into a notebook or a browser: their `show` returns at once, so nothing can be returned
# when a window is closed.
_NOT_WINDOWS = ("inline", "nbagg", "ipympl", "widget", "webagg", "notebook")
_LEFT_BUTTON = 1
_SHOWN = 12


class PatchPicker:
    """The patches that are chosen, and the figure they are clicked on.

    A left click adds a patch, or takes it away again. Chosen patches are outlined, numbered in the
    order they were chosen, and listed above the picture, uint8 `(H, W, 3)`, whose size may differ
    from the layout's. It needs no window: `figure`, empty at first, may be on any canvas.
    """

    def __init__(
        self, figure: Figure, image: NDArray[np.uint8], layout: TokenLayout, *, title: str = ""
    ) -> None:
        self.layout = layout.frame_layout()
        self.chosen: dict[int, tuple[Rectangle, Any]] = {}
        self._figure = figure
        height, width = image.shape[:2]
        self._cell = height / self.layout.grid[0], width / self.layout.grid[1]
        self.axes: Axes = figure.add_axes((0.02, 0.02, 0.96, 0.84))
        image_axes(self.axes, image)
        self._draw_grid(height, width)
        of = f" of {title}" if title else ""
        what = f"Click the query patches{of}; close the window when done"
        figure.text(0.02, 0.975, what, va="top", fontsize=11, fontweight="bold")
        listing = self._listing()
        self._list = figure.text(0.02, 0.925, listing, va="top", fontsize=10, color="#444444")
        figure.canvas.mpl_connect("button_press_event", self.on_click)

    @property
    def tokens(self) -> list[int]:
        """Chosen tokens within the frame, special tokens counted, in the order of choosing."""
        return list(self.chosen)

    def on_click(self, event: Event) -> None:
        """Take a mouse button event; clicks elsewhere, or while zooming or panning, do nothing."""
        toolbar = getattr(self._figure.canvas, "toolbar", None)
        busy = bool(getattr(toolbar, "mode", ""))
        button, axes = getattr(event, "button", None), getattr(event, "inaxes", None)
        if busy or axes is not self.axes or button != _LEFT_BUTTON:
            return
        # Pixel centres are whole numbers: the first pixel starts at -0.5.
        row = int((event.ydata + 0.5) // self._cell[0])  # type: ignore[attr-defined]
        col = int((event.xdata + 0.5) // self._cell[1])  # type: ignore[attr-defined]
        rows, cols = self.layout.grid
        if 0 <= row < rows and 0 <= col < cols:
            self.toggle(self.layout.index(row=row, col=col))

    def toggle(self, token: int) -> None:
        """Choose a patch token, or take it away."""
        if token in self.chosen:
            for artist in self.chosen.pop(token):
                artist.remove()
        else:
            self.chosen[token] = self._outline(token)
        for number, (_, label) in enumerate(self.chosen.values(), 1):
            label.set_text(str(number))
        self._list.set_text(self._listing())
        self._figure.canvas.draw_idle()

    def _outline(self, token: int) -> tuple[Rectangle, Any]:
        place = self.layout.locate(token)
        assert place.row is not None
        assert place.col is not None
        high, wide = self._cell
        left, top = place.col * wide, place.row * high
        box = (left, top, left + wide, top + high)
        strokes = (("black", 4.0), ("#ff2d78", 2.0))
        outline = outline_box(self.axes, box, strokes=strokes, zorder=3)
        label = self.axes.annotate(
            "",
            (left + wide - 0.5, top - 0.5),
            xytext=(2, 1),
            textcoords="offset points",
            color="white",
            fontsize=9,
            fontweight="bold",
            path_effects=[withStroke(linewidth=2.5, foreground="black")],
            zorder=4,
        )
        return outline, label

    def _draw_grid(self, height: int, width: int) -> None:
        rows, cols = self.layout.grid
        style: dict[str, Any] = {"colors": "white", "alpha": 0.35, "linewidths": 0.6}
        self.axes.hlines(np.linspace(0, height, rows + 1) - 0.5, -0.5, width - 0.5, **style)
        self.axes.vlines(np.linspace(0, width, cols + 1) - 0.5, -0.5, height - 0.5, **style)

    def _listing(self) -> str:
        if not self.chosen:
            return "none chosen yet · click again to take one away"
        tokens = self.tokens
        names = [f"{n}: token {token}" for n, token in enumerate(tokens, 1)]
        if len(names) <= 4:
            places = (self.layout.locate(token) for token in tokens)
            where = (f" (row {place.row}, col {place.col})" for place in places)
            return " · ".join(name + at for name, at in zip(names, where, strict=True))
        shown = ", ".join(str(token) for token in tokens[:_SHOWN])
        more = "" if len(tokens) <= _SHOWN else f" and {len(tokens) - _SHOWN} more"
        return f"{len(tokens)} chosen: tokens {shown}{more}"


def pick_patches(image: NDArray[np.uint8], layout: TokenLayout, *, title: str = "") -> list[int]:
    """Open a window with a picture, let patches be clicked, and return them when it is closed.

    They are tokens within the frame, as `PatchPicker.tokens`; empty if none.

    Raises
    ------
    DisplayError
        If no window can be opened: no display, no toolkit (Tk, Qt, …), or a backend of matplotlib
        that draws into a notebook.

    The window is matplotlib's, of the backend that is set or else the first that works.
    """
    import matplotlib.pyplot as plt

    _check_display()
    height, width = image.shape[:2]
    tall = 8.6
    size = (max(5.5, (tall * 0.84) * width / height / 0.96), tall)
    scale = min(1.0, 13.0 / size[0])
    try:
        figure = plt.figure(figsize=(size[0] * scale, size[1] * scale))
    except Exception as error:  # each toolkit has its own for a display that does not answer
        raise DisplayError(f"no window can be opened ({error}); {_ALTERNATIVES}") from error
    try:
        _check_backend(figure)
        if figure.canvas.manager is not None:
            figure.canvas.manager.set_window_title("vistvis: choose patches")
        picker = PatchPicker(figure, image, layout, title=title)
        plt.show(block=True)
    finally:
        plt.close(figure)
    return picker.tokens


def _check_display() -> None:
    shown = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform.startswith("linux") and not shown:
        raise DisplayError(
            f"no display: neither DISPLAY nor WAYLAND_DISPLAY is set, so no window can be opened; "
            f"{_ALTERNATIVES}"
        )


def _check_backend(figure: Figure) -> None:
    """Whether the backend that pyplot has settled on opens windows that can be waited for."""
    import matplotlib

    name = matplotlib.get_backend()
    framework = getattr(figure.canvas, "required_interactive_framework", None)
    if framework in (None, "headless") or any(word in name.lower() for word in _NOT_WINDOWS):
        raise DisplayError(
            f"matplotlib draws with {name!r}, which opens no window; choose one that does before "
            "(matplotlib.use('TkAgg') or 'QtAgg', or %matplotlib qt in a notebook; Tk comes with "
            f"most Pythons, Qt with pip install PySide6-Essentials), or {_ALTERNATIVES}"
        )
