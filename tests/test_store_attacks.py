"""What must not hurt: names that lead elsewhere, damage and forgery, full and closed disks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from vistvis import Attention, TokenLayout
from vistvis.errors import InputError, StoreError, VistvisError
from vistvis.store import RunWriter, open_run, save_run
from vistvis.store import folders as folders_module
from vistvis.store.records import sealed

ROOT = Path(__file__).parents[1]


def captured(count: int = 3, *, seed: int = 0, tokens: int = 9) -> dict[str, Attention]:
    made = torch.Generator().manual_seed(seed)

    def one() -> Attention:
        shape = (1, 2, tokens, 4)
        return Attention(
            query=torch.randn(shape, generator=made), key=torch.randn(shape, generator=made)
        )

    return {f"block_{number}": one() for number in range(count)}


def check(path: Path, given: dict[str, Attention]) -> None:
    """The run in `path` holds exactly `given`."""
    run = open_run(path)
    run.check()
    assert list(run) == list(given)
    for name, wanted in given.items():
        assert torch.equal(run[name].query, wanted.query)  # type: ignore[arg-type]
        assert torch.equal(run[name].key, wanted.key)  # type: ignore[arg-type]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_run(
        captured(), tmp_path / "run", images=torch.zeros(1, 3, 4, 4), layout=TokenLayout(1, (3, 3))
    )
    return tmp_path / "run"


def edit(run: Path, change: Any) -> None:
    path = run / "manifest.json"
    data = json.loads(path.read_text())
    del data["crc32"]
    change(data)
    path.write_bytes(sealed(data))


def file_of(run: Path, what: str) -> Path:
    """The file that the manifest names for a site, or for the images."""
    data = json.loads((run / "manifest.json").read_text())
    return run / (data["images"] if what == "images" else data["sites"][what])["file"]


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "/etc/x", "a/b", "a\\b", "a\0b", "C:x", " ", "x" * 241, 7, None],
)
def test_names_of_sites_that_are_refused(tmp_path: Path, name: Any) -> None:
    given = captured(1)["block_0"]
    with pytest.raises(InputError, match="the name of a site is"):
        save_run({name: given}, tmp_path / "run")
    with RunWriter(tmp_path / "run") as writer:
        with pytest.raises(InputError, match="the name of a site is"):
            writer.write(name, given)
        with pytest.raises(InputError, match="the name of a site is"):
            writer.expect([name])
    assert {p.name for p in tmp_path.rglob("*")} - {".lock"} == {"manifest.json", "run"}


@pytest.mark.parametrize("path", ["", "a\0b", b"bytes"])
def test_paths_that_are_refused(path: Any) -> None:
    for call in (open_run, RunWriter):
        with pytest.raises(StoreError, match="a folder or at an fsspec URL"):
            call(path)


@pytest.mark.parametrize("what", ["sites", "block_1", "manifest.json"])
def test_links_that_lead_out_are_refused(run: Path, tmp_path: Path, what: str) -> None:
    what = file_of(run, what).relative_to(run).as_posix() if what == "block_1" else what
    outside = tmp_path / "outside"
    shutil.move(run / what, outside)
    (run / what).symlink_to(outside)
    with pytest.raises(StoreError, match="symbolic link"):
        open_run(run)["block_1"]
    before = sorted((p, p.stat().st_mtime_ns) for p in (outside, *outside.rglob("*")))
    # A link in the place of a file that is written anew anyway is replaced, not followed.
    with contextlib.suppress(StoreError):
        save_run(captured(seed=1), run)
    assert sorted((p, p.stat().st_mtime_ns) for p in (outside, *outside.rglob("*"))) == before


def test_the_folder_itself_may_be_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    check(tmp_path / "link", captured())
    save_run(captured(seed=1), tmp_path / "link")
    check(run, captured(seed=1))


@pytest.mark.parametrize(
    "file",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sites/../../outside.safetensors",
        "sites/..\\..\\outside.safetensors",
        "sites/a/b.safetensors",
        "sites/block_0.safetensors\0",
        "sites/.safetensors",
        "manifest.json",
        "images.safetensors",
        "",
        7,
        None,
        ["sites/block_0.safetensors"],
    ],
)
def test_a_manifest_cannot_lead_elsewhere(run: Path, file: Any) -> None:
    for key in ("sites", "images"):
        copy = run.with_name(f"copy-{key}")
        shutil.copytree(run, copy)
        if key == "sites" or file != "images.safetensors":
            edit(
                copy,
                lambda data, key=key: (
                    data["sites"]["block_0"] if key == "sites" else data["images"]
                ).update(file=file),
            )
            with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
                open_run(copy)


# -- manifests ------------------------------------------------------------------------------------


def test_a_newer_schema(run: Path) -> None:
    edit(run, lambda data: data.update(schema=3, made_by="vistvis 9"))
    text = (run / "manifest.json").read_bytes()
    with pytest.raises(StoreError, match=r"manifest\.json has schema version 3.*update vistvis"):
        open_run(run)
    with pytest.raises(StoreError, match=r"schema version 3.*Nothing was written"):
        save_run(captured(seed=1), run)
    assert (run / "manifest.json").read_bytes() == text
    edit(run, lambda data: data.update(schema=2))
    check(run, captured())


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b"7", b'{"name": "app"}', b"[" * 100_000],
)
def test_what_is_no_manifest(run: Path, text: bytes) -> None:
    (run / "manifest.json").write_bytes(text)
    for call in (lambda: open_run(run), lambda: save_run(captured(), run)):
        with pytest.raises(StoreError, match=r"manifest\.json is (damaged|not the manifest)"):
            call()
    assert (run / "manifest.json").read_bytes() == text


def mutations(data: Any, number: random.Random) -> Any:
    """A copy in which one value, somewhere, is something else."""
    data = json.loads(json.dumps(data))
    spots: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in list(items):
            spots.append((value, key))
            if isinstance(inner, (dict, list)):
                walk(inner)

    walk(data)
    holder, key = number.choice(spots)
    strange = [None, True, -1, 0, 10**30, 1.5, "", "x", "../x", [], {}, [1], {"a": 1}, "F64", "ff"]
    if isinstance(holder, dict) and number.random() < 0.3:
        del holder[key]
    else:
        holder[key] = number.choice(strange)
    return data


def test_a_forged_manifest_gives_an_error_or_a_run(run: Path) -> None:
    number = random.Random(0)
    sound = json.loads((run / "manifest.json").read_text())
    del sound["crc32"]
    refused = 0
    for _ in range(400):
        (run / "manifest.json").write_bytes(sealed(mutations(sound, number)))
        try:
            found = open_run(run)
            for name in found:
                found[name].rows(0)
            _ = found.images, repr(found)
        except VistvisError:
            refused += 1
    assert 200 < refused < 400


# -- damaged files --------------------------------------------------------------------------------

FILES = ["block_1", "images"]


def touch(run: Path) -> None:
    opened = open_run(run)
    opened["block_1"].rows(0)
    _ = opened.images


@pytest.mark.parametrize("file", FILES)
def test_every_truncation_is_noticed_at_open(run: Path, file: str) -> None:
    path = file_of(run, file)
    data = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 64, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(StoreError, match=rf"{path.name} is damaged"):
            open_run(run)
    path.write_bytes(data + b"\0")
    with pytest.raises(StoreError, match=rf"{path.name} is damaged"):
        open_run(run)
    path.unlink()
    with pytest.raises(StoreError, match=rf"{path.name} is not there"):
        open_run(run)
    path.mkdir()
    with pytest.raises(StoreError, match=path.name):
        open_run(run)


@pytest.mark.parametrize("file", FILES)
def test_every_flipped_bit_is_noticed_at_the_first_touch(run: Path, file: str) -> None:
    path = file_of(run, file)
    data = path.read_bytes()
    for place in range(0, len(data), 3):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(StoreError, match=rf"{path.name} is damaged"):
            touch(run)
    path.write_bytes(data)
    touch(run)


def test_swapped_files_are_noticed(run: Path) -> None:
    one, two = (file_of(run, f"block_{number}") for number in (0, 1))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(StoreError, match=r"block_1-\w{8}\.safetensors is damaged"):
        open_run(run)["block_1"]


def test_damage_that_happens_after_opening(run: Path) -> None:
    opened = open_run(run)
    path = file_of(run, "block_1")
    os.truncate(path, 200)
    with pytest.raises(StoreError, match=r"block_1-\w{8}\.safetensors is damaged"):
        opened["block_1"]
    path.unlink()
    with pytest.raises(StoreError, match=r"block_1-\w{8}\.safetensors"):
        opened["block_1"]


def test_what_is_sound_beside_damage_opens_when_asked_for(run: Path) -> None:
    os.truncate(file_of(run, FILES[0]), 200)
    os.truncate(file_of(run, FILES[1]), 20)
    opened = open_run(run, strict=False)
    assert opened.sites == ("block_0", "block_2")
    assert opened.missing == ("block_1",)
    assert f"{file_of(run, FILES[0])} is damaged" in opened.damaged["block_1"]
    assert torch.equal(opened["block_2"].query, captured()["block_2"].query)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=r"block_1-\w{8}\.safetensors is damaged"):
        opened["block_1"]
    with pytest.raises(StoreError, match=r"images-\w{8}\.safetensors is damaged"):
        _ = opened.images


def test_nothing_is_unpickled(run: Path, tmp_path: Path) -> None:
    """A pickle in the place of a site, with a manifest forged to match it."""
    mark = tmp_path / "tricked"

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {mark}",)

    path = file_of(run, FILES[0])
    for data in (pickle.dumps(Evil()), b"PK\x03\x04" + pickle.dumps(Evil())):
        path.write_bytes(data)
        size, crc = folders_module.LocalFolder(run).write(f"sites/{path.name}", [data])

        def forge(manifest: Any, size: int = size, crc: int = crc) -> None:
            manifest["sites"]["block_1"].update(bytes=size, crc32=f"{crc:08x}")

        edit(run, forge)
        with pytest.raises(StoreError, match=r"block_1-\w{8}\.safetensors is damaged"):
            open_run(run)
    assert not mark.exists()


def test_a_file_that_is_sound_but_does_not_fit(run: Path) -> None:
    """Everything agrees but the tensors with each other: still no wrong weights."""
    tensors = {"query": torch.ones(1, 3, 9, 4), "key": torch.ones(1, 2, 9, 4)}
    data = safetensors.torch.save(tensors)
    size, crc = folders_module.LocalFolder(run).write(
        f"sites/{file_of(run, FILES[0]).name}", [data]
    )

    def forge(manifest: Any) -> None:
        manifest["sites"]["block_1"].update(
            bytes=size,
            crc32=f"{crc:08x}",
            tensors={n: {"dtype": "F32", "shape": list(t.shape)} for n, t in tensors.items()},
        )

    edit(run, forge)
    with pytest.raises(StoreError, match=r"block_1-\w{8}\.safetensors does not fit"):
        open_run(run)["block_1"]


# -- disks that refuse ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(1, 13))
@pytest.mark.parametrize("before", [False, True])
def test_a_disk_that_is_full_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, before: bool
) -> None:
    path, first, second = tmp_path / "run", captured(), captured(seed=1)
    if before:
        save_run(first, path)
    calls, real = 0, folders_module.os.fsync

    def full(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(folders_module.os, "fsync", full)
    with pytest.raises(StoreError, match=r"No space left.*free some space") as caught:
        save_run(second, path)
    assert str(path) in str(caught.value)
    monkeypatch.setattr(folders_module.os, "fsync", real)
    assert not list(path.rglob("*.part"))
    if before:
        check(path, first)
    elif (path / "manifest.json").exists():
        opened = open_run(path)
        opened.check()
        assert {*opened.sites, *opened.missing} == set(second)
    check_resumed(path, second)


def check_resumed(path: Path, given: dict[str, Attention]) -> None:
    save_run(given, path)
    check(path, given)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("a small file system can't be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(tiny_disk: Path) -> None:
    first, large = captured(2), captured(8, seed=1, tokens=900)
    save_run(first, tiny_disk / "run")
    with pytest.raises(StoreError, match="No space left"):
        save_run(large, tiny_disk / "run")
    check(tiny_disk / "run", first)
    # What the first run did not need is given back by the next one that fits.
    check_resumed(tiny_disk / "run", captured(3, seed=2))
    with pytest.raises(StoreError, match="No space left"):
        save_run(large, tiny_disk / "new")
    opened = open_run(tiny_disk / "new")
    opened.check()
    assert opened.missing


def test_a_disk_that_can_only_be_read(tiny_disk: Path) -> None:
    given = captured(2)
    save_run(given, tiny_disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    check(tiny_disk / "run", given)
    for name in ("run", "new"):
        with pytest.raises(StoreError, match=rf"{name}.*Read-only file system"):
            save_run(captured(seed=1), tiny_disk / name)
    check(tiny_disk / "run", given)


def test_a_folder_that_may_not_be_written() -> None:
    code = """
    import os, sys
    from test_store_attacks import captured, check
    from vistvis.errors import StoreError
    from vistvis.store import save_run
    base = sys.argv[1]
    save_run(captured(), f"{base}/run")
    for folder in (f"{base}/run/sites", f"{base}/run", base):
        os.chmod(folder, 0o555)
    if os.getuid() == 0:  # whom modes do not bind
        os.setuid(65534)
    for name in ("run", "new"):
        try:
            save_run(captured(seed=1), f"{base}/{name}")
        except StoreError as error:
            print("refused:", error)
    check(f"{base}/run", captured())
    print("intact")
    """
    # Not in tmp_path, the way to which is closed to other users.
    base = Path(tempfile.mkdtemp())
    try:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), str(base)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        )
    finally:
        for folder in (base, base / "run", base / "run/sites"):
            folder.chmod(0o755)
        shutil.rmtree(base)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    for line, name in zip(lines, ("run", "new"), strict=False):
        assert line.startswith(f"refused: can't write a run in {base}/{name}: Permission denied")
    assert lines[-1] == "intact"


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    path, first = tmp_path / "run", captured()
    save_run(first, path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(StoreError, match="File too large"):
            save_run(captured(tokens=2000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check(path, first)


@pytest.mark.parametrize("where", ["file", "file/run"])
def test_a_file_in_the_way(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="file"):
        save_run(captured(), tmp_path / where)
    with pytest.raises(StoreError, match="no run in"):
        open_run(tmp_path / where)
    assert (tmp_path / "file").read_text() == "mine"


# -- two writers ----------------------------------------------------------------------------------


def test_a_second_writer_in_this_process(tmp_path: Path) -> None:
    given = captured()
    with RunWriter(tmp_path / "run", expected=given) as writer:
        with pytest.raises(StoreError, match=r"run is being written by someone else"):
            RunWriter(tmp_path / "run")
        for name, value in given.items():
            writer.write(name, value)
    check(tmp_path / "run", given)
    save_run(captured(seed=1), tmp_path / "run")  # the lock is free again


def test_a_second_writer_in_another_process(tmp_path: Path) -> None:
    code = """
    import sys
    from vistvis.store import RunWriter
    writer = RunWriter(sys.argv[1])
    print("writing", flush=True)
    sys.stdin.read()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"writing\n"
        with pytest.raises(StoreError, match=r"run is being written by someone else"):
            save_run(captured(), tmp_path / "run")
        other.kill()  # the system lets go of its lock
        other.wait()
        save_run(captured(), tmp_path / "run")
    check(tmp_path / "run", captured())


def test_a_lock_left_lying_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").write_text("12345")
    save_run(captured(), tmp_path / "run")
    check(tmp_path / "run", captured())


def test_a_writer_that_can_not_begin_lets_go(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/manifest.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(StoreError, match="not the manifest"):
            RunWriter(tmp_path / "run")
    (tmp_path / "run/manifest.json").unlink()
    with contextlib.closing(RunWriter(tmp_path / "run")):
        pass
