"""Walks a page: runs its Python blocks in order in one namespace, as a reader would.

    python -m guides vggt FILE        # in tests/; guides of the earlier tools are not shipped

What a reader has and a test has not (5 GB of weights, photographs, a GPU) is replaced, by the
tables below. A line of a table that the page does not need any more is an error, as is a block that
does not run and is not named with its reason.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

_PHOTOS = """
from vggt_adapter.steps import sample_views
for name, path in zip("abc", sample_views()):
    open(f"{name}.jpg", "wb").write(path.read_bytes())
"""

# Two layers of attention, for functions that the page has decorated.
_BLOCKS = """
import torch
blocks, inputs = [lambda x: torch.softmax(torch.randn(1, 2, 16, 16), -1)] * 2, None
"""

# The same stored, with the picture that they belong to.
_STORED = f"""{_BLOCKS}
from vistvis import state, visTvis_store
state.reset("demo")
run_blocks(blocks, inputs)
state.reset("demo")
visTvis_store(
    base_folder_path="./runs", identifier="demo", file_name="input.pt", folder_name="input"
)(lambda: torch.rand(1, 1, 3, 64, 64))()
"""

# A model and pictures, and a run of them under the name that the page opens.
_MODEL = f"""{_PHOTOS}
from vggt_adapter import VGGT, load_and_preprocess_images
model = VGGT.tiny()
images = load_and_preprocess_images(["a.jpg", "b.jpg", "c.jpg"], size=224)
"""
# The same captured, and once more with a head less.
_CAPTURED = f"""{_PHOTOS}
import vistvis
from vistvis.models.loading import load
loaded = load("vggt:tiny", images=["a.jpg", "b.jpg", "c.jpg"])
images, names = loaded.pictures, loaded.names
with vistvis.capture(loaded.watched, "*_blocks.**", names=names) as captured:
    loaded.model(loaded.images)
with (
    vistvis.intervene(loaded.model, "frame_block_2", heads=[1], mode="zero"),
    vistvis.capture(loaded.watched, "*_blocks.**", names=names) as other,
):
    loaded.model(loaded.images)
"""
_RUN = f"""{_MODEL}
import vistvis
from vggt_adapter import AttentionExtractor
with AttentionExtractor(model) as extractor:
    extractor.register_hooks()
    model(images)
vistvis.save_run(extractor.captured, "runs/fern", images=images)
"""


@dataclass(frozen=True)
class Page:
    """What is replaced, run before a block, and not run, each by text that stands in the block."""

    replaced: Mapping[str, str] = field(default_factory=dict)
    before: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)


# The small model, its last pair of blocks, and a token that its pictures have.
_SMALL = {
    'VGGT.from_pretrained("facebook/VGGT-1B")': "VGGT.tiny()",
    "block_idx=23": "block_idx=3",
    "[0, 12, 23]": "[0, 1, 3]",
    "token_idx=500": "token_idx=100",
}

PAGES = {
    "README.md": Page(
        replaced={
            'VGGT.from_pretrained("facebook/VGGT-1B")': "VGGT.tiny()",
            '"c.jpg"])': '"c.jpg"], size=224)',
            "block_idx=23": "block_idx=3",
            "[0, 12, 23]": "[0, 1, 3]",
            "1750": "100",
            "weights[0, 3, 100]": "weights[0, 1, 100]",
            "heads=3": "heads=1",
            "head_idx=3": "head_idx=1",
            '"vit_small_patch14_dinov2", pretrained=True': (
                '"vit_tiny_patch16_224", img_size=(168, 224)'
            ),
        },
        before={"import torch": _PHOTOS, "from vistvis import AttentionPath": _STORED},
    ),
    "docs/vggt.md": Page(
        replaced={
            **_SMALL,
            "image_paths=image_paths,": "image_paths=image_paths, model='tiny',",
            "(image_paths, block_idx": "(image_paths, model='tiny', block_idx",
            "(image_paths)": "(image_paths, size=224)",
            "range(16)": "range(2)",
            "images, 500, head_idx": "images, 100, head_idx",
            "query_idx=500": "query_idx=100",
        },
        before={"image_paths = ": _PHOTOS},
    ),
    "docs/vistvis.md": Page(
        replaced={"query_idx=500": "query_idx=100"},
        before={
            "from vistvis import state": _BLOCKS,
            "from vistvis import AttentionPath": _STORED,
            'open_run("runs/fern")': _RUN,
        },
    ),
    "docs/runs.md": Page(
        replaced={'"blocks.11.attn"': '"aggregator.global_blocks.3.attn"'},
        before={"import vistvis": _MODEL},
    ),
    "docs/numbers.md": Page(before={"import vistvis": _CAPTURED}),
}

# The guides of the earlier tools: run where someone has them.
GUIDES = {
    "vggt": Page(
        replaced={
            "from vggt.models.vggt import VGGT": "from vggt_adapter import VGGT",
            "from vggt.utils.load_fn import": "from vggt_adapter import",
            'VGGT.from_pretrained("facebook/VGGT-1B")': "VGGT.tiny()",
            '"path/to/image1.png"': '"a.jpg"',
            '"path/to/image2.png"': '"b.jpg"',
            '"path/to/image3.png"': '"c.jpg"',
            "image_paths=image_paths,": "image_paths=image_paths, model='tiny',",
            "load_and_preprocess_images(image_paths)": (
                "load_and_preprocess_images(image_paths, size=224)"
            ),
            "block_idx=23": "block_idx=3",
            "[0, 12, 23]": "[0, 1, 3]",
            "token_idx=500": "token_idx=100",
            "range(16)": "range(2)",
            "grid_size = 37": "grid_size = 12",
            "demo_visualize_token_attention(...)": (
                "demo_visualize_token_attention(image_paths, 3, 100, model='tiny')"
            ),
        },
        before={"image_paths = [": _PHOTOS},
        skipped={
            "'attn_weights': torch.Tensor,": "a description of a dict, no code",
            "'attention_maps': np.ndarray,": "a description of a dict, no code",
            "patch_idx = token_idx - patch_start_idx  # 495": "its comment says col 12; it is 14",
            "def hook_fn(module, input, output)": "pseudo-code of a hook",
            "attn = attn_weights[0, head_idx, token_idx, patch_start_idx:]": (
                "keeps the other frames' special tokens, so that it does not reshape; "
                "TokenLayout.maps does this"
            ),
        },
    ),
    "vistvis": Page(before={"from vistvis import AttentionPath": _STORED}),
}


def blocks(text: str) -> list[str]:
    """The Python blocks of a page, those within lists too."""
    found = re.findall(r"^( *)```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for _, block in found]


def walk(text: str, page: Page, name: str) -> int:
    """Run the blocks of a page in the current folder; returns how many ran.

    AssertionError where a table names what the page does not have.
    """
    needed = {*page.replaced, *page.before, *page.skipped}
    namespace: dict[str, Any] = {}
    count = 0
    for number, block in enumerate(blocks(text)):
        if reasons := [start for start in page.skipped if start in block]:
            needed -= {*reasons}
            continue
        code = block
        for start, first in page.before.items():
            if start in block and start in needed:
                code = f"{first}\n{code}"
                needed.discard(start)
        for written, used in page.replaced.items():
            if written in code:
                code = code.replace(written, used)
                needed.discard(written)
        exec(compile(code, f"{name}, block {number}", "exec"), namespace)
        count += 1
    assert not needed, f"{name} does not have {sorted(needed)}"
    return count


if __name__ == "__main__":
    kind, file = sys.argv[1:]
    print(walk(Path(file).read_text(encoding="utf-8"), GUIDES[kind], file), "blocks ran")  # noqa: T201
