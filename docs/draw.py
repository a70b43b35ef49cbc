"""Draw the README's pictures: what `vistvis demo` draws, as JPEG. Run it from anywhere."""

from __future__ import annotations

from pathlib import Path

from vggt_adapter.inputs import Query
from vggt_adapter.steps import ask, choose_token, load_model, load_pictures, suggested

FOLDER = Path(__file__).parent / "images"


def main() -> None:
    model = load_model("tiny", device="cpu")
    loaded = load_pictures(None, model)
    place, requested = choose_token(model, loaded)
    block, head = suggested(model, "block", -1), suggested(model, "head", 0)
    answer = ask(model, loaded, place, Query(requested, head), block_idx=block)
    for kind, figure in answer.draw(pictures=loaded.sharp()).items():
        figure.save(FOLDER / f"demo_{kind}.jpg", dpi=110)


if __name__ == "__main__":
    main()
