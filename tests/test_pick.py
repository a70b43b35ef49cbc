"""Choosing patches: events on a canvas without a window, and a real window under Xvfb."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backend_bases import MouseEvent
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vistvis.errors import DisplayError, InputError
from vistvis.tokens import TokenLayout
from vistvis.views import pick
from vistvis.views.pick import PatchPicker, pick_patches

LAYOUT = TokenLayout(3, (4, 6), ("camera", "register"), 8)
IMAGE = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)


def picker(layout: TokenLayout = LAYOUT, image: np.ndarray = IMAGE) -> PatchPicker:
    figure = Figure(figsize=(6, 5))
    FigureCanvasAgg(figure)
    found = PatchPicker(figure, image, layout, title="frame 1")
    figure.canvas.draw()
    return found


def click(on: PatchPicker, x: float, y: float, button: int = 1) -> None:
    """A press at a position of the picture, through the canvas as from a window."""
    canvas = on.axes.figure.canvas
    at = on.axes.transData.transform((x, y))
    event = MouseEvent("button_press_event", canvas, *at, button=button)
    canvas.callbacks.process(event.name, event)


def shown(on: PatchPicker) -> str:
    return " | ".join(text.get_text() for text in on.axes.figure.texts)


def test_a_click_adds_and_another_takes_away() -> None:
    one = picker()
    assert "none chosen yet" in shown(one)
    click(one, 20, 12)  # row 1, col 2
    click(one, 0, 0)
    click(one, 47, 31)
    assert one.tokens == [2 + 1 * 6 + 2, 2, 2 + 23]
    assert "1: token 10 (row 1, col 2) · 2: token 2 (row 0, col 0)" in shown(one)
    boxes = [(p.get_x(), p.get_y(), p.get_width(), p.get_height()) for p in one.axes.patches]
    assert boxes[0] == (15.5, 7.5, 8, 8)
    click(one, 23.4, 15.4)
    assert one.tokens == [2, 25]
    assert len(one.axes.patches) == 2
    assert [text.get_text() for text in one.axes.texts] == ["1", "2"]


@pytest.mark.parametrize(
    ("x", "y", "patch"),
    [(-0.5, -0.5, 0), (7.4, 7.4, 0), (7.6, 7.4, 1), (7.4, 7.6, 6), (47.4, 31.4, 23)],
)
def test_edges_of_patches(x: float, y: float, patch: int) -> None:
    one = picker()
    click(one, x + (0.01 if x < 0 else 0), y + (0.01 if y < 0 else 0))
    assert one.tokens == [2 + patch]


def test_clicks_that_choose_nothing() -> None:
    one = picker()
    click(one, 20, 12, button=3)
    click(one, -5, 12)
    click(one, 60, 12)
    assert one.tokens == []

    class Toolbar:
        mode = "zoom rect"

    one.axes.figure.canvas.toolbar = Toolbar()  # type: ignore[attr-defined]
    click(one, 20, 12)
    assert one.tokens == []


def test_a_picture_of_another_size_than_its_grid_says() -> None:
    one = picker(image=np.zeros((100, 90, 3), np.uint8))
    click(one, 89, 99)
    click(one, 16, 26)
    assert one.tokens == [25, 2 + 6 + 1]


def test_many_patches_are_listed_in_short(monkeypatch: pytest.MonkeyPatch) -> None:
    one = picker()
    # Without a window every change would be drawn at once.
    monkeypatch.setattr(one.axes.figure.canvas, "draw_idle", lambda: None)
    for col in range(6):
        for row in range(3):
            click(one, col * 8 + 4, row * 8 + 4)
    assert "18 chosen: tokens 2, 8, 14, 3" in shown(one)
    assert "and 6 more" in shown(one)


# -- no window -----------------------------------------------------------------------------------


def test_without_a_display_the_alternatives_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DisplayError, match="query_idx=500") as caught:
        pick_patches(IMAGE, LAYOUT)
    assert "TokenLayout.index" in str(caught.value)
    assert "DISPLAY" in str(caught.value)


def test_a_backend_without_windows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.pyplot as plt

    monkeypatch.setenv("DISPLAY", ":0")
    plt.switch_backend("agg")
    with pytest.raises(DisplayError, match=r"agg.*TkAgg"):
        pick_patches(IMAGE, LAYOUT)
    assert not plt.get_fignums()


def test_the_overlay_runner_asks_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.test_reconstruction import draw, stored

    asked = []

    def picked(image: np.ndarray, layout: TokenLayout, *, title: str) -> list[int]:
        asked.append((image.shape, layout.grid, title))
        return [5, 9]

    monkeypatch.setattr(pick, "pick_patches", picked)
    found = draw(stored(tmp_path), tmp_path / "o", query_idx="interactive")
    assert asked == [((24, 32, 3), (3, 4), "frame 1")]
    assert [Path(f).name for f in found[0, "mean"]] == [
        "overlay_5_frame_2.png",
        "overlay_9_frame_2.png",
    ]
    monkeypatch.setattr(pick, "pick_patches", lambda *_, **__: [])
    with pytest.raises(InputError, match="no patch was chosen"):
        draw(stored(tmp_path), tmp_path / "o", query_idx="interactive")


# -- a window ------------------------------------------------------------------------------------

PROGRAM = """
import json, sys
import matplotlib
matplotlib.use(sys.argv[1])
import numpy as np
from matplotlib.figure import Figure
from vistvis.tokens import TokenLayout
from vistvis.views import pick

image = np.random.default_rng(0).integers(0, 256, (112, 154, 3), dtype=np.uint8)
layout = TokenLayout(1, (8, 11), ("camera",), 14)
made = pick.PatchPicker.__init__

def tell(self, figure, *rest, **more):
    made(self, figure, *rest, **more)
    def report():
        if "tk" in sys.argv[1].lower():
            widget = figure.canvas.get_tk_widget()
            left, top = widget.winfo_rootx(), widget.winfo_rooty()
            height = widget.winfo_height()
        else:
            from matplotlib.backends.qt_compat import QtCore
            corner = figure.canvas.mapToGlobal(QtCore.QPoint(0, 0))
            left, top, height = corner.x(), corner.y(), figure.canvas.height()
        # Screen pixels for pixels of the picture.
        points = {}
        for name, at in json.loads(sys.argv[2]).items():
            x, y = self.axes.transData.transform(at)
            points[name] = (left + round(x), top + height - round(y))
        points["chosen"] = self.tokens
        print(json.dumps(points), flush=True)
    self.timer = figure.canvas.new_timer(interval=200)
    self.timer.add_callback(report)
    # Only a window that was drawn has its final place.
    figure.canvas.mpl_connect("draw_event", lambda event: self.timer.start())

pick.PatchPicker.__init__ = tell
print("RESULT", json.dumps(pick.pick_patches(image, layout, title="frame 0")), flush=True)
"""
POINTS = {"a": (20, 5), "b": (80, 60), "c": (150, 108)}  # patches 1, 4·11+5, 7·11+10

needs_xvfb = pytest.mark.skipif(
    not (shutil.which("Xvfb") and shutil.which("xdotool")),
    reason="Xvfb and xdotool are not installed: no window was clicked",
)


@pytest.fixture(scope="module")
def display() -> Iterator[str]:
    read, write = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-screen", "0", "1280x1024x24", "-nolisten", "tcp"],
        pass_fds=[write],
        stderr=subprocess.DEVNULL,
    )
    os.close(write)
    with os.fdopen(read) as numbers:
        number = numbers.readline().strip()
    assert number, "Xvfb did not start"
    yield f":{number}"
    server.terminate()
    server.wait(10)


def tool(display: str, *command: str) -> str:
    done = subprocess.run(
        ["xdotool", *command],
        env={**os.environ, "DISPLAY": display},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    return done.stdout.strip()


def reported(process: subprocess.Popen[str], until: Any) -> dict[str, Any]:
    """The program's reports, up to one that is as wanted."""
    assert process.stdout is not None
    end = time.monotonic() + 60
    while time.monotonic() < end:
        line = process.stdout.readline()
        if not line:
            break
        report = json.loads(line)
        if until(report):
            return report  # type: ignore[no-any-return]
    raise AssertionError("the window did not get there")


def screenshot(display: str, folder: str) -> None:
    from PIL import ImageGrab

    ImageGrab.grab(xdisplay=display).save(os.path.join(folder, "pick_window.png"))


@needs_xvfb
@pytest.mark.parametrize(("backend", "module"), [("TkAgg", "tkinter"), ("QtAgg", "PySide6")])
def test_clicking_in_a_real_window(display: str, backend: str, module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    environment = {
        k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "WAYLAND_DISPLAY")
    }
    root = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, backend, json.dumps(POINTS)],
        env={**environment, "DISPLAY": display, "PYTHONPATH": root, "QT_QPA_PLATFORM": "xcb"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
    )
    try:
        seen: dict[str, Any] = {}

        def settled(report: dict[str, Any]) -> bool:
            still = report == seen
            seen.clear()
            seen.update(report)
            return still

        try:
            points = reported(process, settled)
        except AssertionError:
            process.kill()
            errors = process.communicate()[1]
            if "platform plugin" in errors or "No module named" in errors:
                pytest.skip(f"{module} lacks libraries of the system")
            pytest.fail(f"ended with {process.returncode}: {errors[-2000:]}")
        tokens = {"a": 1 + 1, "b": 1 + 4 * 11 + 5, "c": 1 + 7 * 11 + 10}
        chosen: list[int] = []
        for name in ("a", "b", "c", "a"):
            tool(display, "mousemove", *(str(n) for n in points[name]))
            tool(display, "click", "1")
            if tokens[name] in chosen:
                chosen.remove(tokens[name])
            else:
                chosen.append(tokens[name])
            reported(process, lambda report: report["chosen"] == chosen)
        if folder := os.environ.get("VISTVIS_TEST_PICTURES"):
            screenshot(display, folder)
        window = tool(display, "search", "--name", "vistvis: choose patches").split()[-1]
        # No window manager runs here that would draw a close button; matplotlib closes on "q".
        tool(display, "windowfocus", window)
        tool(display, "key", "q")
        output, errors = process.communicate(timeout=60)
        result = [line for line in output.splitlines() if line.startswith("RESULT")]
        assert result, errors
        assert json.loads(result[0][6:]) == [tokens["b"], tokens["c"]]
    finally:
        process.kill()
        process.wait()
