"""`vistvis grid`: photographs or a run in, one picture out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from zoo import store_scene

import vistvis
from vistvis import cli
from vistvis.models.loading import load

SAMPLES = sorted((Path(__file__).parents[1] / "vggt_adapter" / "samples").glob("view_*.jpg"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_scene(tmp_path_factory.mktemp("runs") / "scene", "ab")


def test_photographs_through_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    photos = [str(photo) for photo in SAMPLES[:2]]
    words = ["--model", "vggt:tiny", "--query", "1:r5,c4", "--format", "png,pdf"]
    assert cli.main(["grid", *photos, *words, "--sites", "*_block_1", "--head", "mean"]) == 0
    out = capsys.readouterr().out.splitlines()
    stem = "grid/view_1_vggt-tiny_1-r5-c4_-_block_1_head-mean"
    assert out[:2] == [f"wrote {stem}.png", f"wrote {stem}.pdf"]
    assert out[2].startswith("next: vistvis store PHOTO … --model vggt:tiny")
    with Image.open(f"{stem}.png") as picture:
        assert picture.width > 500


def test_it_draws_what_plot_draws(stored: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "scene.png"
    words = ["--query", "1:r1,c2", "--width", "4", "--head", "0", "mean", "--out", str(out)]
    assert cli.main(["grid", str(stored), *words]) == 0
    with vistvis.open_run(stored) as run:
        figure = vistvis.plot(run, "1:r1,c2", heads=[0, "mean"], width=4.0, names=["a", "b"])
    assert figure.texts[0].get_text().startswith("small, untrained weights, query: ")
    with Image.open(out) as drawn, Image.open(figure.save(tmp_path / "b.png")) as expected:
        assert drawn.tobytes() == expected.tobytes()
    # Another format beside the file that was named.
    assert cli.main(["grid", str(stored), "--out", str(out), "--format", "png,svg"]) == 0
    assert sorted(file.name for file in out.parent.iterdir()) == ["scene.png", "scene.svg"]


def test_pixels_count_in_the_photo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of photographs, and of a run that was stored of them: a pixel names the patch over it."""
    monkeypatch.chdir(tmp_path)
    shots = tmp_path / "shots"
    shots.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (90, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(shots / "high.png")  # VGGT sees the middle third
    model = ["--model", "vggt:tiny", "--sites", "global_block_1"]
    geometry = load("vggt:tiny", images=[shots]).photos[0].geometry
    assert geometry is not None
    x, y = geometry.to_original(3.5 * 14 - 0.5, 5.5 * 14 - 0.5)
    query = f"0:{x:.2f},{y:.2f}px"
    assert cli.main(["store", "shots", *model, "--out", "run"]) == 0
    for number, words in enumerate((["shots", *model], ["run"])):
        for place, text in enumerate((query, "0:r5,c3")):
            out = f"{number}{place}.png"
            assert cli.main(["grid", *words, "--head", "0", "-q", text, "-o", out]) == 0
        one, other = (Path(f"{number}{place}.png").read_bytes() for place in (0, 1))
        assert one == other
    assert "of 90 pixels ('high.png')" in capsys.readouterr().out
    assert cli.main(["grid", "run", "--query", "0:1,1px"]) == 2
    assert "was cropped away; the model sees" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["PHOTO"], "photographs need a model that sees them: --model vggt:tiny"),
        (["RUN", "PHOTO"], "one run or photographs are drawn"),
        (["RUN", "--model", "vggt:tiny"], "--model goes with photographs"),
        (["RUN", "--head", "9"], "--head 9: the model has heads 0…3"),
        (["RUN", "--head", "first"], "argument --head: "),
        (["RUN", "--query", "0:3,4px"], "name a grid cell"),
        (["RUN", "--query", "3:middle"], "there is no frame 3"),
        (["RUN", "--sites", "blok*"], "no site 'blok*'"),
        (["RUN", "--batch", "3"], "batch 3 is outside 0…0"),
        (["RUN", "--width", "-1"], "argument --width: "),
        (["RUN", "--width", "1.9"], "from 2 to 40 inches"),
        (["RUN", "--out", "PHOTO"], "is a file, and a folder is meant"),
        (["nowhere.jpg", "--model", "vggt:tiny"], "no file 'nowhere.jpg'"),
    ],
)
def test_wrong_words_are_told_in_one_line(
    words: list[str], told: str, stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    meant = {"RUN": str(stored), "PHOTO": str(SAMPLES[0])}
    try:
        code = cli.main(["grid", *(meant.get(word, word) for word in words)])
    except SystemExit as end:
        code = int(str(end.code))
    out, err = capsys.readouterr()
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert told in err
