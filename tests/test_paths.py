"""AttentionPath, OverlayOutputPath, StaticMetadata."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vistvis.decorators.paths import AttentionPath, StaticMetadata
from vistvis.errors import InputError, StoreError
from vistvis.views.overlay_folder import OverlayOutputPath


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def test_where_stored_layers_lie(tmp_path: Path) -> None:
    paths = AttentionPath(base_dir=str(tmp_path), experiment_name="demo")
    assert paths.attn_root == str(tmp_path / "demo" / "attn")
    assert paths.input_root == str(tmp_path / "demo" / "input")
    assert paths.attn_layer_file(3) == str(tmp_path / "demo/attn/layer_3/attn.pt")
    assert paths.input_layer_file() == str(tmp_path / "demo/input/layer_0/input.pt")
    assert paths.list_layers() == []
    for layer in (10, 2, 0):
        touch(tmp_path / f"demo/attn/layer_{layer}/attn.pt")
    touch(tmp_path / "demo/attn/layer_x/attn.pt")
    touch(tmp_path / "demo/attn/layer_007/attn.pt")
    touch(tmp_path / "demo/attn/layer_5")
    assert paths.list_layers() == [0, 2, 10]


def test_files_of_the_published_package_are_found(tmp_path: Path) -> None:
    paths = AttentionPath(base_dir=str(tmp_path), experiment_name="demo")
    doubled = touch(tmp_path / "demo/attn/layer_0/attn.pt.pt")
    assert paths.attn_layer_file(0) == str(doubled)
    touch(tmp_path / "demo/attn/layer_0/attn.pt")
    assert paths.attn_layer_file(0) == str(tmp_path / "demo/attn/layer_0/attn.pt")
    bare = AttentionPath(str(tmp_path), "demo", "attn", "input")
    assert bare.attn_layer_file(0) == str(tmp_path / "demo/attn/layer_0/attn.pt")


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert AttentionPath("~/runs", "demo").attn_root == str(tmp_path / "runs/demo/attn")
    assert OverlayOutputPath("~/o").query_frames_dir == str(tmp_path / "o/query_frames")


def test_names_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="experiment_name"):
        AttentionPath(str(tmp_path), "../demo")
    with pytest.raises(InputError, match="attn_filename"):
        AttentionPath(str(tmp_path), "demo", attn_filename="/etc/passwd")
    with pytest.raises(InputError, match="count from 0"):
        AttentionPath(str(tmp_path), "demo").attn_layer_file(-1)
    (tmp_path / "base" / "demo").mkdir(parents=True)
    (tmp_path / "base" / "demo" / "attn").symlink_to(tmp_path)
    with pytest.raises(StoreError, match="symbolic link"):
        AttentionPath(str(tmp_path / "base"), "demo").attn_layer_file(0)


def test_where_overlays_lie(tmp_path: Path) -> None:
    output = OverlayOutputPath(output_path=str(tmp_path))
    assert output.overlay_file(3, "mean", 7) == str(
        tmp_path / "layer=layer_3/head=mean/overlays/overlay_7.png"
    )
    assert output.overlay_file(3, 0, 7, 2).endswith("head=0/overlays/overlay_7_frame_2.png")
    assert output.query_file(7) == str(tmp_path / "query_frames/query_image_7.png")
    assert output.list_layers() == []
    for layer in (10, 2, "global_block_10", "global_block_9", "a/b"):
        for head in (11, "mean", 2):
            touch(Path(output.overlay_file(layer, head, 5)))
    touch(Path(output.overlay_file(2, 2, 4, 10)))
    touch(Path(output.overlay_file(2, 2, 4, 9)))
    touch(tmp_path / "layer=layer_2/head=2/overlays/overlay_x.png")
    assert output.list_layers() == [2, 10, "a/b", "global_block_9", "global_block_10"]
    assert output.list_heads(2) == [2, 11, "mean"]
    assert output.list_queries(2, 2) == [(4, 9), (4, 10), (5, None)]


@given(st.text(min_size=1, max_size=20))
def test_any_name_of_a_site_becomes_one_folder_and_back(name: str) -> None:
    from urllib.parse import unquote

    try:
        folder = Path(OverlayOutputPath("/out").layer_dir(name))
    except (InputError, UnicodeEncodeError):
        return
    assert folder.parent == Path("/out")
    assert unquote(folder.name[len("layer=") :]) == name


def test_metadata_survives_json_and_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = StaticMetadata(patch_size=14, num_special_tokens=5)
    assert StaticMetadata.from_json(metadata.to_json()) == metadata == StaticMetadata(14, 5)
    path = tmp_path / "m.yaml"
    path.write_text("patch_size: 14\nnum_special_tokens: 5\nmore: 1\n")
    assert StaticMetadata.from_yaml_file(path) == metadata
    monkeypatch.setenv("VIS_TVIS_METADATA_PATH", str(path))
    assert StaticMetadata.from_environment() == metadata
    monkeypatch.delenv("VIS_TVIS_METADATA_PATH")
    with pytest.raises(InputError, match="VIS_TVIS_METADATA_PATH"):
        StaticMetadata.from_environment()


def test_metadata_that_can_not_be(tmp_path: Path) -> None:
    for wrong in (0, -1, 1.5, "14", True, None):
        with pytest.raises(InputError, match="patch_size"):
            StaticMetadata(wrong, 0)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="num_special_tokens"):
        StaticMetadata(14, -1)
    for text in ("{", "[]", '{"patch_size": 14}'):
        with pytest.raises(InputError):
            StaticMetadata.from_json(text)
    path = tmp_path / "m.yaml"
    path.write_text("a: [")
    with pytest.raises(InputError, match=r"m\.yaml"):
        StaticMetadata.from_yaml_file(path)
    path.write_text("!!python/object/apply:os.mkdir ['x']")
    with pytest.raises(InputError, match="not YAML"):
        StaticMetadata.from_yaml_file(path)
    with pytest.raises(StoreError, match="nowhere"):
        StaticMetadata.from_yaml_file(tmp_path / "nowhere.yaml")


def test_metadata_and_pictures_make_a_layout() -> None:
    layout = StaticMetadata(14, 5).layout(20, (392, 518))
    assert (layout.grid, layout.tokens_per_frame, layout.num_tokens) == ((28, 37), 1041, 20820)
    with pytest.raises(InputError, match="393×518"):
        StaticMetadata(14, 5).layout(1, (393, 518))
