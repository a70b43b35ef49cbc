"""Draw the README's pictures: what `vistvis demo` draws, as JPEG. Run it from anywhere."""

from __future__ import annotations

from pathlib import Path

from vggt_adapter.look import (
    choose_token,
    load_model,
    load_pictures,
    look,
    sharp_pictures,
    suggested,
)

FOLDER = Path(__file__).parent / "images"


def main() -> None:
    model = load_model("tiny", device="cpu")
    loaded = load_pictures(None, model)
    place, requested = choose_token(model, loaded)
    block, head = suggested(model, "block", -1), suggested(model, "head", 0)
    seen = look(model, loaded, place, requested=requested, block_idx=block, head_idx=head)
    for kind, figure in seen.draw(pictures=sharp_pictures(loaded)).items():
        figure.save(FOLDER / f"demo_{kind}.jpg", dpi=110)


if __name__ == "__main__":
    main()
