"""The explorer in a notebook: a widget that asks its kernel, or the page in a frame."""

from __future__ import annotations

import html
import importlib.util
from functools import cache
from typing import Any

from vistvis.images import extra
from vistvis.views.explorer.contents import Contents
from vistvis.views.explorer.page import asset, page_parts, picture_url, script

_HEIGHT = 760


def shown(contents: Contents, *, static: bool | None) -> Any:
    """What a cell shows; as `explore` has it."""
    if static is None:
        static = importlib.util.find_spec("anywidget") is None
    if static:
        with contents.spool:
            return FramedPage("".join(page_parts(contents)))
    pictures = {f"{b}-{f}": picture_url(jpeg) for (b, f), jpeg in contents.pictures.items()}
    return _widget_class()(contents, manifest=contents.manifest, pictures=pictures)


class FramedPage:
    """A page that a cell shows in a frame of its own, and that stays in the saved notebook."""

    def __init__(self, page: str) -> None:
        self.page = page

    def _repr_html_(self) -> str:
        # Its script can reach neither the notebook nor the network.
        return (
            f'<iframe sandbox="allow-scripts allow-downloads" srcdoc="{html.escape(self.page)}" '
            f'style="width: 100%; height: {_HEIGHT}px; border: 0"></iframe>'
        )

    def __repr__(self) -> str:
        return f"FramedPage({len(self.page)} bytes)"


@cache
def _widget_class() -> Any:
    """The widget's class, made where the extra is installed."""
    anywidget = extra("anywidget", "widget", "the live widget")
    traitlets = extra("traitlets", "widget", "the live widget")

    class ExplorerWidget(anywidget.AnyWidget):  # type: ignore[misc, name-defined]
        """The explorer in a cell; it gets a site when that is chosen."""

        _esm = script("widget.js")
        _css = asset("explorer.css").decode()
        manifest = traitlets.Dict().tag(sync=True)
        pictures = traitlets.Dict().tag(sync=True)

        def __init__(self, contents: Contents, **traits: Any) -> None:
            super().__init__(**traits)
            self._contents = contents
            self.on_msg(self._answer)

        def _answer(self, _: Any, asked: Any, buffers: Any) -> None:
            number = asked.get("site") if isinstance(asked, dict) else None
            if isinstance(number, int) and 0 <= number < len(self._contents.places):
                self.send({"site": number}, [self._contents.site(number)])
            else:
                self.send({"site": number, "error": f"there is no site {number}"})

    return ExplorerWidget
