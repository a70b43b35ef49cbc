"""Collects the training photographs: unpacks the Debian packages of photos.csv, shrinks pictures.

    python training/photos.py --packages DIR_OF_DEBS --out PHOTOS

`DIR_OF_DEBS` holds the .deb files of the packages named in photos.csv (`apt-get download …`).
Writes PHOTOS/{train,validation,test}/*.png, longest side at most 1600.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import tempfile
from pathlib import Path

from PIL import Image
from tqdm import tqdm

HERE = Path(__file__).resolve().parent


def collect(packages: Path, out: Path, *, longest: int = 1600) -> int:
    """Writes every picture of photos.csv into its split's folder; returns how many."""
    rows = list(csv.DictReader((HERE / "photos.csv").open(encoding="utf-8")))
    with tempfile.TemporaryDirectory() as scratch:
        for package in sorted({row["package"] for row in rows}):
            found = sorted(packages.glob(f"{package}_*.deb"))
            if not found:
                raise SystemExit(
                    f"no {package}_*.deb in {packages}: run `apt-get download {package}` there"
                )
            subprocess.run(["dpkg-deb", "-x", found[-1], Path(scratch, package)], check=True)
        for row in tqdm(rows, desc="photographs"):
            matches = [
                path
                for path in sorted(Path(scratch, row["package"]).rglob("*"))
                if path.as_posix().endswith("/" + row["file"])
            ]
            if len(matches) != 1:
                raise SystemExit(f"{row['file']}: {len(matches)} matches in {row['package']}")
            picture = Image.open(matches[0]).convert("RGB")
            picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
            name = Path(row["file"])
            stem = name.parts[0] if "contents" in name.parts else name.stem
            target = out / row["split"] / f"{row['package']}-{stem}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.save(target, compress_level=1)
    return len(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    print(f"{collect(arguments.packages, arguments.out)} photographs in {arguments.out}")
