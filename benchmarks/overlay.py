"""Overlays beside the published visTvis 0.1.1, their maps compared, and memory for an 8 GB file.

The published package is installed into a temporary folder with what it requires (torch is shared),
and runs in processes of its own. Both draw the same stored layers: dense float32 attention of
16 heads and 1370 tokens, one picture of 518×518 pixels, every head and the mean, 3 queries. They
take turns, a few layers at a time; times are sums over all layers.

    python benchmarks/overlay.py [--layers 12] [--no-large-file]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
QUERIES = [1 + 18 * 37 + 18, 1 + 5 * 37 + 30, 0]
HEADS, GRID, PATCH = 16, 37, 14
PUBLISHED = "vistvis==0.1.1"
# 8 frames of 518×518 with 5 special tokens: N = 10,992, dense float32 7.7 GB.
LARGE_FRAMES, LARGE_SPECIAL = 8, 5
LIMIT_PRIVATE = 150 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--no-large-file", action="store_true")
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, *rest = arguments.child
        print(json.dumps({"draw": child_draw, "large": child_large}[kind](*rest)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compare(folder, arguments.layers)
        if not arguments.no_large_file:
            large_file(folder)


# -- beside the published package ----------------------------------------------------------------


def compare(folder: Path, layers: int) -> None:
    from _measure import table

    prefix = install(folder / "prefix")
    make_layers(folder / "runs", layers)
    packages = {"vistvis here": ROOT}
    if prefix is None:
        print(f"\n{PUBLISHED} can't be installed here: only this package is measured\n")
    else:
        packages["published 0.1.1"] = prefix
    count = layers * (HEADS + 1) * len(QUERIES)
    rows = []
    for encoded in (True, False):
        wall, cpu = dict.fromkeys(packages, 0.0), dict.fromkeys(packages, 0.0)
        step = 2
        for number, first in enumerate(range(0, layers, step)):
            order = list(packages) if number % 2 else list(packages)[::-1]
            for package in order:
                measured = in_child(
                    packages[package],
                    "draw",
                    package,
                    str(folder),
                    json.dumps(list(range(first, min(first + step, layers)))),
                    json.dumps(encoded),
                )
                wall[package] += measured["wall"]
                cpu[package] += measured["cpu"]
        least = 6 if encoded else 10
        for package in packages:
            ratio, verdict = "", ""
            if package == "vistvis here" and prefix is not None:
                other = "published 0.1.1"
                times = cpu[other] / cpu[package], wall[other] / wall[package]
                ratio = f"{times[0]:.1f} × / {times[1]:.1f} ×"
                verdict = f"≥ {least} ×: {'met' if times[0] >= least else 'MISSED'}"
            rows.append(
                (
                    "with PNG" if encoded else "without PNG",
                    package,
                    f"{cpu[package]:.1f} s",
                    f"{wall[package]:.1f} s",
                    f"{1000 * cpu[package] / count:.1f} ms",
                    ratio,
                    verdict,
                )
            )
    header = ("", "package", "CPU", "wall", "CPU each", "faster by CPU / wall", "bar (CPU)")
    table(f"{count} overlays: {layers} layers × {HEADS} heads + mean × 3 queries", header, rows)
    sizes(folder)
    if prefix is not None:
        agreement(folder)


def sizes(folder: Path) -> None:
    from _measure import table

    rows = []
    for output in sorted(folder.glob("overlays *")):
        files = list(output.rglob("overlay_*.png"))
        if files:
            mean = sum(f.stat().st_size for f in files) / len(files)
            rows.append((output.name[9:], len(files), f"{mean / 1000:.0f} kB"))
    table("PNG files", ("package", "files", "mean size"), rows)


def agreement(folder: Path) -> None:
    """Scalar maps before the colour table: those of the published package were recorded by it."""
    import numpy as np
    from _measure import table

    sys.path.insert(0, str(ROOT))
    from vistvis.views.painting import resize, stretch

    recorded = np.load(folder / "recorded.npz")
    grids, theirs = recorded["grids"], recorded["maps"]
    ours = resize(stretch(grids), theirs.shape[-2:])
    levels = np.floor(ours * 255) - np.rint(theirs * 255)
    off = (ours - theirs) * 255
    rows = [
        ("both at 8 bits, the published resolution", f"{np.abs(levels).max():.0f}/255"),
        ("float here, 8 bits there: largest", f"{np.abs(off).max():.2f}/255"),
        ("float here, 8 bits there: mean (there it is cut off)", f"{off.mean():+.2f}/255"),
        ("values that differ by more than 1/255", f"{100 * (np.abs(off) > 1).mean():.2f} %"),
    ]
    within = np.abs(levels).max() <= 1
    rows.append(("bar: 1/255", "met" if within else "MISSED"))
    table(f"scalar maps of {len(grids)} overlays against the published ones", ("", ""), rows)


def install(prefix: Path) -> Path | None:
    """The published package and what it requires, without torch, which both share."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(prefix)]
    try:
        subprocess.run([*pip, "--no-deps", PUBLISHED], check=True, capture_output=True, timeout=300)
        (metadata,) = prefix.glob("vistvis-*.dist-info/METADATA")
        lines = metadata.read_text().splitlines()
        needs = [line.split(": ", 1)[1] for line in lines if line.startswith("Requires-Dist: ")]
        others = [need for need in needs if not need.startswith("torch")]
        subprocess.run([*pip, *others], check=True, capture_output=True, timeout=600)
    except (OSError, subprocess.SubprocessError) as error:
        print(getattr(error, "stderr", b"") or error)
        return None
    return prefix


def make_layers(runs: Path, layers: int) -> None:
    """Peaked, uneven attention, and a picture with the statistics of a photograph (1/f noise)."""
    import torch

    g = torch.Generator().manual_seed(0)
    tokens = 1 + GRID * GRID
    for layer in range(layers):
        coarse = torch.randn(HEADS, 16, 6, 6, generator=g)
        fine = torch.nn.functional.interpolate(coarse, size=(GRID, GRID), mode="bicubic")
        query = torch.cat([torch.zeros(HEADS, 1, 16), fine.flatten(2).mT], 1)
        folder = runs / "demo" / "attn" / f"layer_{layer}"
        folder.mkdir(parents=True)
        weights = torch.softmax(query @ query.mT * (0.3 + 0.1 * layer), -1)
        torch.save(weights.reshape(1, HEADS, tokens, tokens), folder / "attn.pt")
    (runs / "demo" / "input" / "layer_0").mkdir(parents=True)
    torch.save(noise_picture(g), runs / "demo" / "input" / "layer_0" / "input.pt")


def noise_picture(g: Any) -> Any:
    import torch

    side = GRID * PATCH
    frequency = torch.fft.fftfreq(side)[:, None] ** 2 + torch.fft.rfftfreq(side)[None] ** 2
    frequency[0, 0] = 1
    waves = torch.randn(3, *frequency.shape, dtype=torch.complex64, generator=g)
    picture = torch.fft.irfft2(waves / frequency.sqrt(), s=(side, side))
    picture = (picture - picture.mean()) / (4 * picture.std()) + 0.5
    return picture.clamp(0, 1)[None, None].contiguous()


def in_child(package: Path, *arguments: str) -> dict[str, Any]:
    """Run this file in a process that imports vistvis from `package`."""
    environment = {**os.environ, "PYTHONPATH": str(package), "MPLBACKEND": "Agg"}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    done = subprocess.run(
        [sys.executable, __file__, "--child", *arguments],
        env=environment,
        cwd=tempfile.gettempdir(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{arguments} failed:\n{done.stderr}")
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def child_draw(package: str, name: str, layers: str, encoded: str) -> dict[str, float]:
    """Draw some layers with whichever vistvis is importable, and say how long it took."""
    import warnings

    warnings.simplefilter("ignore")
    folder, chosen = Path(name), json.loads(layers)
    published = package.startswith("published")
    if published:
        from vistvis.static_metadata import StaticMetadata

        from vistvis import AttentionPath, run_overlay_for_reconstruction
    else:
        from vistvis import AttentionPath, StaticMetadata, run_overlay_for_reconstruction
    if not json.loads(encoded):
        leave_out_png(published)
    elif published and 0 in chosen:
        record_maps(folder)
    metadata = StaticMetadata(patch_size=PATCH, num_special_tokens=1)

    def draw(some: list[int], output: Path) -> None:
        runs = folder / f"part {package} {'-'.join(map(str, some))}"
        for part in ("attn", "input"):
            (runs / "demo" / part).mkdir(parents=True, exist_ok=True)
        for source in (*(f"attn/layer_{n}" for n in some), "input/layer_0"):
            (runs / "demo" / source).mkdir(exist_ok=True)
            for file in (folder / "runs" / "demo" / source).iterdir():
                os.link(file, runs / "demo" / source / file.name)
        run_overlay_for_reconstruction(
            AttentionPath(base_dir=str(runs), experiment_name="demo"),
            query_frame_idx=0,
            query_idx=QUERIES,
            key_frame_idx=0,
            head="all",
            output_path=str(output),
            metadata=metadata,
        )

    warm_up(folder, chosen)
    wall, cpu = time.perf_counter(), time.process_time()
    draw(chosen, folder / f"{'overlays' if json.loads(encoded) else 'nothing'} {package}")
    measured = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    shutil.rmtree(folder / f"part {package} {'-'.join(map(str, chosen))}")
    return measured


def warm_up(folder: Path, chosen: list[int]) -> None:
    """Imports that happen at the first use, and files into the cache."""
    import importlib

    for module in ("matplotlib.pyplot", "PIL.PngImagePlugin", "torch"):
        importlib.import_module(module)
    for layer in chosen:
        (folder / "runs" / "demo" / "attn" / f"layer_{layer}" / "attn.pt").read_bytes()


def leave_out_png(published: bool) -> None:
    if published:
        import PIL.Image

        PIL.Image.Image.save = lambda *_, **__: None  # type: ignore[method-assign]
    else:
        from vistvis.views import png

        png.encode_png = lambda image: b""  # type: ignore[assignment]


def record_maps(folder: Path) -> None:
    """Keep what goes into the published resizing and what comes out, for 51 overlays."""
    import atexit

    import numpy as np

    from vistvis import overlay_attention

    resize, kept = overlay_attention._resize_attention, []

    def recording(grid: Any, size: Any) -> Any:
        resized = resize(grid, size)
        if len(kept) < (HEADS + 1) * len(QUERIES):
            kept.append((grid, resized))
        return resized

    overlay_attention._resize_attention = recording

    def save() -> None:
        grids, maps = (np.stack(part) for part in zip(*kept, strict=True))
        np.savez(folder / "recorded.npz", grids=grids, maps=maps)

    atexit.register(save)


# -- memory --------------------------------------------------------------------------------------


def large_file(folder: Path) -> None:
    from _measure import megabytes, table

    tokens = LARGE_FRAMES * (LARGE_SPECIAL + GRID * GRID)
    size = HEADS * tokens * tokens * 4
    if shutil.disk_usage(folder).free < 2.2 * size:
        print(f"\nno room for a file of {size / 1e9:.1f} GB twice: memory is not measured\n")
        return
    shutil.rmtree(folder / "runs", ignore_errors=True)
    used = in_child(ROOT, "large", str(folder), str(tokens))
    limit = "met" if used["added"] <= LIMIT_PRIVATE else "MISSED"
    table(
        f"overlay from a dense .pt file of {used['bytes'] / 1e9:.2f} GB, every head and the mean",
        ("private memory before", "largest during", "added", "bar: ≤ 150 MB", "seconds"),
        [
            (
                megabytes(used["before"]),
                megabytes(used["before"] + used["added"]),
                megabytes(used["added"]),
                limit,
                f"{used['seconds']:.1f}",
            )
        ],
    )


def child_large(name: str, count: str) -> dict[str, float]:
    """Write the file, draw from it, and watch this process's private memory meanwhile."""
    import torch

    from vistvis import AttentionPath, StaticMetadata, run_overlay_for_reconstruction

    folder, tokens = Path(name), int(count)
    g = torch.Generator().manual_seed(0)
    paths = AttentionPath(str(folder), "large")
    for part in ("attn", "input"):
        (folder / "large" / part / "layer_0").mkdir(parents=True)
    # Only the query's rows are not zero; the file is written in full all the same.
    raw = folder / "raw"
    weights = torch.from_file(str(raw), shared=True, size=HEADS * tokens * tokens)
    weights = weights.reshape(1, HEADS, tokens, tokens)
    at = 2 * tokens // LARGE_FRAMES + 700
    weights[0, :, at] = torch.softmax(torch.randn(HEADS, tokens, generator=g), -1)
    torch.save(weights, paths.attn_layer_file(0))
    del weights
    raw.unlink()
    picture = noise_picture(g).expand(1, LARGE_FRAMES, -1, -1, -1).contiguous()
    torch.save(picture, paths.input_layer_file(0))
    del picture

    def draw() -> None:
        run_overlay_for_reconstruction(
            paths,
            query_frame_idx=2,
            query_idx=700,
            key_frame_idx=5,
            head="all",
            output_path=folder / "overlays large",
            metadata=StaticMetadata(PATCH, LARGE_SPECIAL),
            progress=False,
        )

    largest, done = [before := private_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            largest.append(private_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    draw()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    return {
        "bytes": Path(paths.attn_layer_file(0)).stat().st_size,
        "before": before,
        "added": max(largest) - before,
        "seconds": seconds,
    }


def private_bytes() -> int:
    """Memory that is this process's alone: written pages, and file pages nobody else has mapped."""
    with open("/proc/self/smaps_rollup") as file:
        lines = [line.split() for line in file]
    return 1024 * sum(int(p[1]) for p in lines if p[0] in ("Private_Clean:", "Private_Dirty:"))


if __name__ == "__main__":
    main()
