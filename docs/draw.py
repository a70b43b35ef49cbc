"""Draw the README's pictures and the page to try: what `vistvis demo`, `explore` and `stats` show.

Run it from anywhere. The explorer's picture needs Chromium with its driver and selenium, and is
left as it was without.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from PIL import Image

from vggt_adapter.inputs import Query
from vggt_adapter.steps import ask, choose_token, load_model, load_pictures, sample_views, suggested
from vistvis import cli

FOLDER = Path(__file__).parent / "images"
# The head of the small VGGT that was trained to point, and a patch on the poster's edge.
VIEW = "site=global_block_3&head=0&token=109&size=330"


def main() -> None:
    model = load_model("tiny", device="cpu")
    loaded = load_pictures(None, model)
    place, requested = choose_token(model, loaded)
    block, head = suggested(model, "block", -1), suggested(model, "head", 0)
    answer = ask(model, loaded, place, Query(requested, head), block_idx=block)
    for kind, figure in answer.draw(pictures=loaded.sharp()).items():
        figure.save(FOLDER / f"demo_{kind}.jpg", dpi=110)
    numbers()
    page = ("--out", str(FOLDER.parent / "demo.html"), "--no-open")
    cli.main(["explore", *map(str, sample_views()), *page])
    if chromium := shutil.which("chromium"):
        explorer(chromium)


def numbers() -> None:
    """Three of the pictures of `vistvis stats` on one sheet."""
    with tempfile.TemporaryDirectory() as folder:
        views = map(str, sample_views())
        cli.main(["stats", *views, "--sites", "*_block_*", "--out", folder])
        names = ("entropy", "frames_global_block_3", "matches_global_block_3")
        heads, frames, lines = (Image.open(Path(folder, f"{n}.png")).convert("RGB") for n in names)
    line = max(heads.height, frames.height)
    size = max(heads.width + frames.width, lines.width), line + lines.height
    sheet = Image.new("RGB", size, "white")
    for one, place in ((heads, (0, 0)), (frames, (heads.width, 0)), (lines, (0, line))):
        sheet.paste(one, place)
    sheet.thumbnail((1200, 1200))
    sheet.quantize(256).save(FOLDER / "numbers.png", optimize=True)


def explorer(chromium: str) -> None:
    """The page of the sample views, as a browser shows it."""
    from selenium import webdriver

    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder, "explorer.html"), Path(folder, "shot.png")
        views = map(str, sample_views())
        cli.main(["explore", *views, "--sites", "*_block_*", "--out", str(page), "--no-open"])
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for word in ("headless=new", "no-sandbox", "hide-scrollbars", "window-size=1360,1200"):
            options.add_argument(f"--{word}")
        driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        driver.get(f"{page.as_uri()}#{VIEW}")
        driver.execute_async_script("vistvis.ready.then(() => setTimeout(arguments[0], 500))")
        driver.save_screenshot(str(shot))
        driver.quit()
        with Image.open(shot) as picture:
            picture.convert("RGB").save(FOLDER / "explorer.png", optimize=True)


if __name__ == "__main__":
    main()
