"""`vistvis stats`: photographs or a run in, tables and pictures out."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from zoo import VGGTLike, store_scene

import vistvis
from vistvis import SiteInfo, TokenLayout, cli
from vistvis.commands import stats
from vistvis.views import matches

SAMPLES = sorted((Path(__file__).parents[1] / "vggt_adapter" / "samples").glob("view_*.jpg"))
DRAWN = {"entropy.png", "distance.png", "sinks.png", "depth.png"}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return store_scene(tmp_path_factory.mktemp("runs") / "scene", ("a.jpg", "b.jpg"))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def printed(text: str) -> dict[str, list[str]]:
    """The lines of numbers by site."""
    lines = [line.split() for line in text.splitlines()]
    lines = [line for line in lines if len(line) == 1 + len(stats._COLUMNS)]
    return {line[0]: line[1:] for line in lines if line[0] != "entropy"}


def test_photographs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["stats", *map(str, SAMPLES)]) == 0
    out = capsys.readouterr().out
    frames = {f"frames_global_block_{block}.png" for block in range(4)}
    # The head that was trained to point is the one that points most surely.
    matches = {"matches_global_block_3.png"}
    assert files(tmp_path / "stats") == DRAWN | frames | matches | {"stats.csv", "frames.csv"}
    assert out.splitlines()[-1].endswith("--sites global_block_3   (point at a patch of it)")
    for name in files(tmp_path / "stats"):
        assert f"{Path('stats') / name}" in out
        if name.endswith(".png"):
            with Image.open(tmp_path / "stats" / name) as picture:
                assert np.asarray(picture.convert("L")).std() > 5
    shown = printed(out)
    lines = table(tmp_path / "stats" / "stats.csv")
    assert len(shown) == len({line["site"] for line in lines}) == 10
    for site, texts in shown.items():
        of = [line for line in lines if line["site"] == site]
        for text, (column, *_, digits, times) in zip(texts, stats._COLUMNS, strict=True):
            mean = times * np.mean([float(line[column]) for line in of])
            assert float(text) == pytest.approx(mean, abs=0.51 * 10.0**-digits)
    assert len({tuple(texts) for texts in shown.values()}) == 10


def test_photographs_through_a_timm_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--model", "vit_tiny_patch16_224@random", "--sites", "blocks.1?.attn"]
    assert cli.main(["stats", str(SAMPLES[0]), *words, "--out", str(out)]) == 0
    assert files(out) == DRAWN | {"stats.csv", "frames.csv"}  # single pictures: nothing to match
    *_, told, following = capsys.readouterr().out.splitlines()
    assert told.startswith("these weights are untrained")
    assert "--model vit_tiny_patch16_224@random --sites blocks.11.attn" in following


def test_a_run_gives_what_summarize_gives(
    stored: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [str(stored), "--out", str(tmp_path / "out"), "--queries", "--format", "svg"]
    assert cli.main(["stats", *words, "--sites", "global_blocks.*.attn"]) == 0
    with vistvis.open_run(stored) as run:
        summary = vistvis.summarize(run, sites="global_blocks.*.attn", queries=True, progress=False)
    assert summary.queries is not None
    wanted = {"stats": summary, "frames": summary.frames, "queries": summary.queries}
    for name, one in wanted.items():
        lines = table(tmp_path / "out" / f"{name}.csv")
        assert len(lines) == len(one)
        for column in one.columns:
            if one[column].dtype.kind == "f":
                values = [float(line[column]) for line in lines]
                assert values == pytest.approx(one[column].tolist(), rel=1e-12, nan_ok=True)
            else:
                assert [line[column] for line in lines] == [str(v) for v in one[column].tolist()]
    assert {"entropy.svg", "frames_global_blocks.0.attn.svg"} <= files(tmp_path / "out")
    assert "entropy" in (out := capsys.readouterr().out).splitlines()[0]
    assert f"next: vistvis explore {stored} --sites global_blocks." in out
    # The next takes the place of these.
    monkeypatch.setattr(stats, "_figures", lambda *_: [])
    assert cli.main(["stats", *words, "--sites", "global_blocks.0.attn"]) == 0
    assert f"{tmp_path / 'out' / 'stats.csv'}, replaced what was there" in capsys.readouterr().out


def test_another_run(stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The change is that of a scale: half as sharp has more entropy, everywhere."""
    with vistvis.open_run(stored) as run:
        softer = {
            name: vistvis.Attention(query=a.query / 2, key=a.key, site=a.site, scale=a.scale)
            for name, a in run.items()
        }
        vistvis.save_run(softer, tmp_path / "softer", images=run.images)
        rows = {name: vistvis.analysis.entropy(a).mean() for name, a in run.items()}
    more = {name: vistvis.analysis.entropy(a).mean() for name, a in softer.items()}
    out = tmp_path / "out"
    words = ["--against", str(tmp_path / "softer"), "--out", str(out), "--table", "npz"]
    assert cli.main(["stats", str(stored), *words]) == 0
    assert {"entropy_change.png", "sinks_change.png", "change.npz", "stats.npz"} <= files(out)
    text = capsys.readouterr().out
    _, changes = text.split(f"change, {tmp_path / 'softer'} less {stored}:")
    for name, texts in printed(changes).items():
        assert float(texts[0]) == pytest.approx(float(more[name] - rows[name]), rel=0.06)
        assert texts[0].startswith("+")
    with np.load(out / "change.npz") as file:
        assert (file["entropy_change"] > 0).all()
        assert file["entropy_other"] == pytest.approx(file["entropy"] + file["entropy_change"])


def test_a_run_without_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model, images = VGGTLike().eval(), torch.rand(1, 3, 3, 28, 42)
    with vistvis.capture(model) as captured, torch.no_grad():
        model(images)
    vistvis.save_run(captured, tmp_path / "run")
    monkeypatch.setattr(stats, "_MOST_FRAMED", 1)
    monkeypatch.setattr(stats, "_BACK", 99.0)  # untrained: some head has to point
    assert cli.main(["stats", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "no matches drawn: the run has no pictures; store it with images=" in out
    assert "matrices of frames: 1 of 2 sites; --sites chooses others" in out
    assert not [name for name in files(tmp_path / "out") if name.startswith("matches")]
    # And one whose pictures are those of other frames.
    vistvis.save_run(captured, tmp_path / "other", images=images[:, :2])
    assert cli.main(["stats", str(tmp_path / "other"), "--out", str(tmp_path / "out")]) == 0
    assert "no matches drawn: the sites saw 3 frames, images have 2" in capsys.readouterr().out


def test_the_head_that_points_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two sites with three heads each one points: the other are even, or point and not back."""
    layout = TokenLayout(2, (2, 3))
    even = torch.full((1, 3, 12, 12), 1 / 12)
    lost, pointing = even.clone(), even.clone()
    lost[:, 0] = torch.eye(12)[[6] * 6 + [5] * 6]  # all point at one patch, which leads elsewhere
    pointing[:, 1] = 0.7 * torch.eye(12)[[*range(6, 12), *range(6)]] + 0.3 / 12
    info = {"kind": "global", "query_layout": layout, "key_layout": layout}
    sites = {
        name: vistvis.Attention.from_weights(weights, site=SiteInfo(name, **info))
        for name, weights in {"a": lost, "b": pointing}.items()
    }
    vistvis.save_run(sites, tmp_path / "run", images=torch.rand(2, 3, 28, 42))
    drawn: dict[str, Any] = {}
    draw = matches.match_lines

    def match_lines(*args: Any, **options: Any) -> Any:
        drawn.update(options, found=args[2])
        return draw(*args, **options)

    monkeypatch.setattr(matches, "match_lines", match_lines)
    assert cli.main(["stats", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "matches_b.png" in files(tmp_path / "out")
    assert drawn["head"] == 1
    assert drawn["found"].confidence[0, 1].tolist() == pytest.approx([0.725 / 0.85] * 6)
    assert capsys.readouterr().out.splitlines()[-1].endswith("--sites b   (point at a patch of it)")


def test_frames_that_come_one_by_one(tmp_path: Path) -> None:
    """With cached keys the queries of frame 0 are those of a later picture: no pair is known."""
    one, both = TokenLayout(1, (2, 3)), TokenLayout(2, (2, 3))
    weights = (0.9 * torch.eye(12)[6:] + 0.1 / 12)[None, None]
    options = {"kind": "global", "query_layout": one, "key_layout": both}
    site = SiteInfo("second", first_frame=1, **options)
    made = {"second": vistvis.Attention.from_weights(weights, site=site)}
    vistvis.save_run(made, tmp_path / "run", images=torch.rand(2, 3, 28, 42))
    assert cli.main(["stats", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "frames_second.png" in files(tmp_path / "out")
    assert not [name for name in files(tmp_path / "out") if name.startswith("matches")]


def test_sites_that_say_nothing_of_their_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(1)
    made = {"plain": vistvis.Attention(query=torch.randn(1, 2, 9, 4), key=torch.randn(1, 2, 9, 4))}
    vistvis.save_run(made, tmp_path / "run")
    assert cli.main(["stats", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert files(tmp_path / "out") == {"stats.csv", "entropy.png", "sinks.png", "depth.png"}
    lines = capsys.readouterr().out.splitlines()
    assert "distance" not in lines[0]
    assert lines[2].split()[0] == "plain"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["RUN", "--sites", "global_block.*"], "no site 'global_block.*'"),
        (["RUN", "--against", "HERE"], "no run in"),
        (["RUN", "PHOTO"], "one run or photographs are summarized"),
    ],
)
def test_wrong_words(
    words: list[str],
    text: str,
    stored: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"RUN": str(stored), "PHOTO": str(SAMPLES[0]), "HERE": str(tmp_path)}
    argv = [given.get(word, word) for word in words]
    assert cli.main(["stats", *argv, "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert text in err
    assert not (tmp_path / "out").exists()


def test_a_damaged_run(stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(stored, tmp_path / "run"))
    next(iter(sorted((run / "sites").iterdir()))).write_bytes(b"")
    assert cli.main(["stats", str(run), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_parquet_without_pyarrow(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stats.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        cli.main(["stats", "x.jpg", "--table", "parquet"])
    assert "parquet needs pyarrow: pip install pyarrow, or take csv" in capsys.readouterr().err


def test_sites_spread_over_depth() -> None:
    names = [f"b{n}" for n in range(24)]
    assert stats._spread(names, 6) == ["b0", "b5", "b9", "b14", "b18", "b23"]
    assert stats._spread(names[:3], 6) == names[:3]
    assert stats._spread(names, 1) == ["b0"]
