"""How fast the explorer computes rows and decodes sites in headless Chromium, and how large it is.

Minima and medians in milliseconds of one hover (a row of every head), and the median of each
round's ratio to a plain loop over keys in JavaScript, which takes its turn in the same round; then
of the page itself from the pointer's move to the painted frames, and how soon it shows something.
Queries and keys are random; a decoded page carries smooth ones, which pack about as real ones do.
`python benchmarks/explorer.py [--quick]`; needs Chromium, its driver and selenium.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from selenium import webdriver

import vistvis
from vistvis import Attention, SiteInfo, TokenLayout
from vistvis.views.explorer import packing
from vistvis.views.explorer.front import explore
from vistvis.views.explorer.page import script

WIDTH = 64
# What is measured: sites, heads, tokens, and the limits of JavaScript and WebAssembly, ms.
CASES = (
    ("3 frames", 1, 16, 4122, 8, 3),
    ("8 frames", 1, 16, 10_992, 20, 6),
    ("every site of a small model", 24, 16, 1374, None, 40),
    ("50 frames", 1, 16, 52_050, None, 50),
)
HOVERED = 33  # ms, of the median
FIRST_PAINT = 0.5  # seconds, of the median, at any size
DECODED = ((5, 1.5), (23, 4.0))  # frames of 1041 tokens: 20 MB, 100 MB; seconds

RUN = """
const [sites, heads, count, d, rounds, columns, done] = arguments;
let seed = 1;
const random = (length) => Uint16Array.from({ length }, () => {
  seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
  return ((seed >>> 31) << 15) | ((12 + ((seed >>> 20) & 3)) << 10) | ((seed >>> 8) & 1023);
});
const shape = [1, heads, d, count];
const kernels = Array.from({ length: sites }, () => {
  const both = ["query", "key"].map((name) => [name, { dtype: "float16", shape,
    data: random(heads * d * count) }]);
  const rows = { dtype: "float32", shape: [2, 1, heads, count],
    data: new Float32Array(2 * heads * count).fill(1) };
  const header = { name: "bench", shape: [1, heads, count, count], groups: 1, scale: 0.125 };
  return new Kernel(header, { ...Object.fromEntries(both), rows });
});
function plain(one, many, out) {
  let largest = -Infinity;
  for (let n = 0; n < count; n++) {
    let sum = 0;
    for (let i = 0; i < d; i++) sum += one[i] * many[n * d + i];
    out[n] = 0.125 * sum;
    if (out[n] > largest) largest = out[n];
  }
  let total = 0;
  for (let n = 0; n < count; n++) total += out[n] = Math.exp(out[n] - largest);
  for (let n = 0; n < count; n++) out[n] /= total;
}
const each = (call) => {
  const start = performance.now();
  for (const kernel of kernels) for (let h = 0; h < heads; h++) call(kernel, h);
  return performance.now() - start;
};
const side = columns ? "query" : "key";
const ask = columns ? "column" : "row";
const token = Math.floor(count / 3);
const calls = {
  plain: (kernel, h) => plain(kernel.vector("query", 0, h, token), kernel.matrix(side, 0, h),
    new Float32Array(count)),
  js: (kernel, h) => kernel[ask](0, h, token, "js"),
  wasm: (kernel, h) => kernel[ask](0, h, token, "wasm"),
};
const times = { plain: [], js: [], wasm: [] };
for (let round = -2; round < rounds; round++) {
  for (const [name, call] of Object.entries(calls)) {
    const time = each(call);
    if (round >= 0) times[name].push(time);
  }
}
done(times);
"""

# The mouse crosses the first frame; each move waits for the frame that shows its answer.
HOVER = """
const [moves, done] = arguments;
const picture = document.querySelector(".picture");
const box = picture.getBoundingClientRect();
(async () => {
  await vistvis.ready;
  const times = [];
  for (let i = -5; i < moves; i++) {
    const start = performance.now();
    picture.dispatchEvent(new PointerEvent("pointermove", { bubbles: true,
      clientX: box.x + box.width * (i + 6) / (moves + 8), clientY: box.y + box.height / 3 }));
    await new Promise((painted) => requestAnimationFrame(() => setTimeout(painted, 0)));
    if (i >= 0) times.push(performance.now() - start);
  }
  done(times);
})();
"""


def browser() -> Any:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage"):
        options.add_argument(f"--{word}")
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    found = webdriver.Chrome(options=options, service=service)
    found.set_script_timeout(300)
    return found


def line(name: str, times: dict[str, list[float]], kernel: str, limit: float | None) -> str:
    mine = times[kernel]
    pairs = zip(mine, times["plain"], strict=True)
    ratio = statistics.median(one / other for one, other in pairs)
    said = "" if limit is None else f"  limit {limit}: {'kept' if min(mine) <= limit else 'BROKEN'}"
    return (
        f"{name:52} {kernel:6} min {min(mine):7.2f}  median {statistics.median(mine):7.2f}"
        f"  of the plain loop {ratio:5.2f}{said}"
    )


def measure_kernels(driver: Any, folder: Path, *, quick: bool) -> None:
    page = folder / "kernels.html"
    code = script() + "\nwindow.Kernel = Kernel;\n"
    page.write_text(f'<!doctype html><meta charset="utf-8"><script type="module">{code}</script>')
    for what, sites, heads, count, js, wasm in CASES[: 1 if quick else None]:
        for columns in (False, True)[: 1 if count > 5000 or sites > 1 else None]:
            driver.get(page.as_uri())
            rounds = 8 if count > 20_000 else 25
            times = driver.execute_async_script(RUN, sites, heads, count, WIDTH, rounds, columns)
            count_said = f"{sites} × " if sites > 1 else ""
            name = f"{what}, {count_said}{heads} heads, N={count}{', columns' if columns else ''}"
            for kernel, limit in (("plain", None), ("js", js), ("wasm", wasm)):
                print(line(name, times, kernel, limit), flush=True)


def measure_decoding(driver: Any, folder: Path, *, quick: bool) -> None:
    # Maxima and sums take minutes at this size and say nothing about decoding.
    packing._maximum_and_sum = lambda attention: torch.ones(2, *attention.shape[:3])
    for frames, limit in DECODED[: 1 if quick else None]:
        layout = TokenLayout(frames, (28, 37), ("camera", *["register"] * 4), 14)
        shape = (1, 16, layout.num_tokens, WIDTH)
        query, key = (torch.randn(shape).cumsum(2).div_(30).half() for _ in range(2))
        site = SiteInfo("global_block_0", query_layout=layout, key_layout=layout)
        page = explore(
            {"global_block_0": Attention(query=query, key=key, site=site)},
            folder / f"decoding {frames}.html",
        )
        size, halves = page.stat().st_size, query.nbytes + key.nbytes
        print(f"{frames} frames: {halves / 1e6:.0f} MB in halves, page {size / halves:.3f} of it")
        seconds, paints = [], []
        for _ in range(3):
            start = time.perf_counter()
            driver.get(page.as_uri())
            driver.execute_async_script(
                "const done = arguments[0]; window.vistvis.row("
                "{site: 'global_block_0', token: 7}).then(() => done(), done)"
            )
            seconds.append(time.perf_counter() - start)
            first = "return performance.getEntriesByName('first-contentful-paint')[0].startTime"
            paints.append(driver.execute_script(first) / 1000)
        kept = "kept" if min(seconds) <= limit else "BROKEN"
        print(
            f"  opened to its first row: min {min(seconds):.2f} s, median "
            f"{statistics.median(seconds):.2f} s  limit {limit}: {kept}",
            flush=True,
        )
        kept = "kept" if statistics.median(paints) <= FIRST_PAINT else "BROKEN"
        print(
            f"  first paint: min {min(paints):.2f} s, median {statistics.median(paints):.2f} s"
            f"  limit {FIRST_PAINT}: {kept}",
            flush=True,
        )


def measure_hover(driver: Any, folder: Path, *, quick: bool) -> None:
    for frames in (3, 8)[: 1 if quick else None]:
        layout = TokenLayout(frames, (37, 37), ("camera", *["register"] * 4), 14)
        shape = (1, 16, layout.num_tokens, WIDTH)
        site = SiteInfo("global_block_0", query_layout=layout, key_layout=layout)
        attention = Attention(query=torch.randn(shape), key=torch.randn(shape), site=site)
        images = torch.rand(frames, 3, *layout.image_size)
        page = explore({site.name: attention}, folder / f"hover {frames}.html", images=images)
        driver.set_window_size(1280, 900)
        driver.get(f"{page.as_uri()}#head=mean")
        times = driver.execute_async_script(HOVER, 40)
        middle = statistics.median(times)
        print(
            f"hover to painted, {frames} frames, mean of 16 heads: min {min(times):.1f} ms, median "
            f"{middle:.1f} ms  limit {HOVERED}: {'kept' if middle <= HOVERED else 'BROKEN'}",
            flush=True,
        )


def measure_size(folder: Path) -> None:
    from vistvis.models.loading import load
    from vistvis.photos.finding import find_photos

    samples = sorted(Path(__file__).parents[1].glob("vggt_adapter/samples/*.jpg"))
    photos, _ = find_photos(samples[:3])
    model = load("vggt:tiny", images=photos, device="cpu", dtype=None, size=None)
    with vistvis.capture(model.watched, names=model.names) as captured, torch.no_grad():
        model.model(model.images)
    halves = sum(2 * (one.query.numel() + one.key.numel()) for one in map(captured.get, captured))
    size = explore(captured, folder / "small.html", images=model.images).stat().st_size
    print(f"small VGGT: {halves / 1e6:.1f} MB in halves, page with pictures {size / 1e6:.1f} MB")
    print(
        f"  {size / halves:.3f} of the halves; less 150 KB {(size - 150e3) / halves:.3f}  limit 1.2"
    )


def main() -> None:
    quick = "--quick" in sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        folder, driver = Path(name), browser()
        try:
            measure_size(folder)
            measure_kernels(driver, folder, quick=quick)
            measure_hover(driver, folder, quick=quick)
            measure_decoding(driver, folder, quick=quick)
        finally:
            driver.quit()


if __name__ == "__main__":
    main()
