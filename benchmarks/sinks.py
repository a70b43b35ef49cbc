"""Do sink tokens mean something? DINOv2 ViT-S/14: are they the patches of large output norm?

Darcet et al. ("Vision Transformers Need Registers", arXiv 2309.16588) found patches of large norm
in the output of large vision transformers, which hold little of the picture and draw attention.
Here, on photographs of 518×518: recall and precision of `vistvis.analysis.sink_tokens` against the
patches whose norm behind the last block exceeds median + 5 MAD, beside chance: the share of such
patches among all, which is the precision of sinks thrown at random.

A patch counts as a sink if it is one in any head. The main answer takes the last block, whose
output it is about, and `sink_tokens` as it comes (10 times an even share); the table of all blocks
and other thresholds shows what another choice would have given.

    python benchmarks/sinks.py [--weights FILE] [PHOTO …]

FILE holds weights of timm's vit_small_patch14_dinov2, or is the ONNX file that `training/dinov2.py`
reads; default the one that VISTVIS_DINOV2 names. Photographs default to scikit-image's.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from _measure import table
from torch import Tensor

import vistvis
from vistvis.analysis import received, sink_tokens
from vistvis.models.loading import load

MODEL, SIZE, BLOCK, TIMES = "vit_small_patch14_dinov2", 518, 11, 10.0
OTHER_TIMES = (3.0, 5.0, TIMES)
PHOTOS = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png"),
    *("grass.png", "gravel.png", "hubble_deep_field.jpg", "moon.png", "motorcycle_left.png"),
    "rocket.jpg",
)


@dataclass(frozen=True)
class Found:
    """Of one photograph: patches of large norm, sinks by block and threshold, and what cls gets."""

    large: Tensor  # (P,) bool
    ratio: float  # the largest norm over the median
    sinks: dict[tuple[int, float], Tensor]  # (P,) bool
    cls_shares: list[float]  # by block, mean over heads


def large(norms: Tensor) -> Tensor:
    median = norms.median()
    return norms > median + 5 * (norms - median).abs().median()


@torch.no_grad()
def find(model: torch.nn.Module, image: Tensor) -> Found:
    outputs: list[Tensor] = []
    last = model.get_submodule(f"blocks.{BLOCK}")
    hook = last.register_forward_hook(lambda *call: outputs.append(call[-1]))
    try:
        with vistvis.capture(model) as captured:
            model(image[None])
    finally:
        hook.remove()
    norms = outputs[0][0, 1:].norm(dim=-1)  # the first token is cls
    sinks = {}
    for block, attention in enumerate(captured.values()):
        for times in OTHER_TIMES:
            keys = sink_tokens(attention, times).tokens[:, 2]
            sinks[block, times] = torch.isin(torch.arange(len(norms)) + 1, keys)
    shares = [float(received(one)[0, :, 0].mean()) for one in captured.values()]
    return Found(large(norms), float(norms.max() / norms.median()), sinks, shares)


def counts(found: list[Found], block: int, times: float) -> tuple[int, int, int]:
    """Sinks that are patches of large norm, patches of large norm, and sinks."""
    hits = sum(int((one.large & one.sinks[block, times]).sum()) for one in found)
    wanted = sum(int(one.large.sum()) for one in found)
    return hits, wanted, sum(int(one.sinks[block, times].sum()) for one in found)


def share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def report(names: list[str], found: list[Found]) -> None:
    lines = []
    for name, one in zip(names, found, strict=True):
        hits, wanted, sinks = counts([one], BLOCK, TIMES)
        chance = share(wanted, len(one.large))
        lines.append([name, wanted, f"{one.ratio:.2f}", sinks, hits, chance])
    hits, wanted, sinks = counts(found, BLOCK, TIMES)
    patches = sum(len(one.large) for one in found)
    lines.append(["all", wanted, "", sinks, hits, share(wanted, patches)])
    header = ["photograph", "large norm", "largest / median", "sinks", "both", "chance"]
    table(f"patches of large norm, and sinks of block {BLOCK} ({TIMES:g} times)", header, lines)
    print(f"recall {share(hits, wanted)}, precision {share(hits, sinks)}, ", end="")
    print(f"chance {share(wanted, patches)}; ", end="")
    print(f"{sum(bool(one.large.any()) for one in found)} of {len(found)} photographs have any")
    lines = []
    for block, _ in enumerate(found[0].cls_shares):
        cells = []
        for times in OTHER_TIMES:
            hits, wanted, sinks = counts(found, block, times)
            cells.append(f"{share(hits, wanted)} / {share(hits, sinks)} of {sinks}")
        cls = sum(one.cls_shares[block] for one in found) / len(found)
        lines.append([block, *cells, f"{cls:.0f}"])
    header = ["block", *(f"{times:g} times" for times in OTHER_TIMES), "even shares that cls gets"]
    table("recall / precision of sinks, by block and threshold", header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=os.environ.get("VISTVIS_DINOV2"))
    parser.add_argument("photos", nargs="*", type=Path)
    arguments = parser.parse_args()
    weights, photos = arguments.weights, arguments.photos
    if weights is None:
        print("left out: needs DINOv2's weights, --weights FILE (training/dinov2.py says whence)")
        return
    if not photos:
        import skimage

        photos = [Path(skimage.__file__).parent / "data" / name for name in PHOTOS]
    onnx = weights.suffix == ".onnx"
    loaded = load(f"{MODEL}@{'random' if onnx else weights}", images=photos, size=SIZE)
    if onnx:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from training import dinov2

        loaded.model.load_state_dict(dinov2.load(weights).state_dict())
    report([photo.name for photo in photos], [find(loaded.model, one) for one in loaded.images])


if __name__ == "__main__":
    main()
