"""Command lines that make little sense: exit 0, 1 with words or 2; no traceback, nothing raw.

Where a model would run there is a small one, or words that it is not there.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from vistvis import cli
from vistvis.errors import CheckpointError
from vistvis.models import loading
from vistvis.models.loading import LoadedModel

from .case import Case, Setting
from .runs import edited, stored

ODD = [
    *("", " ", ".", "..", "/", "-", "--", "-1", "0", "1", "99", "1e9", "nan", "inf", "-inf", "1.5"),
    *(
        "9" * 30,
        "9" * 5000,
        "x" * 5000,
        "\ud800",
        "a\0b",
        "a\nb",
        "\x1b]0;x\x07",
        "\u202e",
        "é",
        "*",
    ),
    *(
        "all",
        "mean",
        "interactive",
        "cls",
        "1,2",
        "0:1,2",
        "pixel:1,2",
        "pixel:,",
        "-1,-1",
        "1,2,3",
    ),
    *("s3://", "memory://x", "memory://", "nope://x", "http://[::1", "file://", "C:\\x", "a::b"),
    *(
        "zip://x::memory://y",
        "\udcff\udcfe",
        "0x10",
        "٣",
        "1_000",
        "+1",
        "~",
        "~nobody/x",
        "[",
        "[",
    ),
]


class Tiny(nn.Module):
    """One block of attention over four tokens, and no more."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.flatten(2).mT[:, :4].repeat(1, 1, 2)[..., :4]
        return self.attn(tokens, tokens, tokens, need_weights=False)[0]


def loaded(name: str, *, images: Sequence[Any], size: int | None = None, **_: Any) -> LoadedModel:
    """The small model, for pictures that are there."""
    real(name, images=images, size=size)
    pictures = torch.rand(len(images), 1, 3, 4, 4)
    model = Tiny().eval()
    return LoadedModel(model, pictures[:, 0], pictures, watched=model)


real = loading.load


def no_model(*arguments: Any, **named: Any) -> Any:
    raise CheckpointError("no models are loaded here")


def commands(setting: Setting) -> Iterator[Case]:
    folder = setting.folder / "commands"
    folder.mkdir()
    files = odd_files(folder)
    lines = list(command_lines(setting, folder, files))
    for number, line in enumerate(setting.thinned(lines)):
        yield Case(f"{number}", partial(tried, line, folder))


def odd_files(folder: Path) -> dict[str, str]:
    """Files and folders that are not what they should be, by a word for each."""
    from PIL import Image

    run = stored(folder / "run")
    Image.new("RGB", (8, 6), (9, 99, 199)).save(folder / "photo.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes((folder / "photo.png").read_bytes()[:50])
    (folder / "text.jpg").write_text("no picture")
    (folder / "page.pdf").write_bytes(b"%PDF-1.4\n")
    (folder / "p.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    os.mkfifo(folder / "fifo.png")
    (folder / "nowhere").symlink_to("gone")
    (folder / "loop").symlink_to("loop")
    (folder / "folder").mkdir()
    (folder / "w.safetensors").write_bytes(b"\xff" * 40)
    (folder / "w.pt").write_bytes(b"\x80\x04junk")
    for name, change in {
        "raw": lambda data: data.update(model="\x1b[2J\nx", metadata={"\x07k": "\u202ev\ud800"}),
        "cut": lambda data: data.update(closed=False, expected=["site_9", *data["expected"]]),
        "no": lambda data: b"{}",
        "deep": lambda data: b"[" * 200_000,
    }.items():
        shutil.copytree(run, folder / f"run {name}")
        edited(folder / f"run {name}" / "manifest.json", change)
    shutil.copytree(run, folder / "run damaged")
    for path in (folder / "run damaged" / "sites").glob("site_[01]*"):
        path.write_bytes(path.read_bytes()[:-1])
    for name in ("attn", "input"):
        (folder / "layers" / name / "layer_0").mkdir(parents=True)
        (folder / "layers" / name / "layer_0" / f"{name}.pt").write_bytes(b"PK\x03\x04junk")
    names = [p.name for p in sorted(folder.iterdir())]
    return {name: str(folder / name) for name in [*names, "missing"]}


def command_lines(setting: Setting, folder: Path, files: dict[str, str]) -> Iterator[list[str]]:
    """Products of commands, files and odd values."""
    out, photo, run = str(folder / "out"), files["photo.png"], files["run"]
    yield from (
        [],
        ["--help"],
        ["help"],
        ["-V"],
        ["nope"],
        ["infos", run],
        [""],
        ["\ud800"],
        ["-x"],
    )
    whole = {
        "info": [run],
        "overlay": [run, "-o", out, "-q", "1"],
        "pdf": [out],
        "store": [photo, "--model", "tiny@random", "--out", out],
        "vit": [photo, "--model", "tiny@random", "--out", out],
        "demo": [photo, "--out", out],
    }
    words = {
        "info": "--check --json",
        "overlay": "-o -q --query-frame -k --head -l --batch --patch-size --special-tokens --alpha "
        "--cmap --attn-file --input-file --pdf",
        "pdf": "--dpi",
        "store": "--model --out --sites --size --device --dtype --anew",
        "vit": "-m -w -b --site -q --size --norm --device --dtype -o --sites",
        "demo": "-m -b --head --pixel --token --types --norm --size --mode --device -o",
    }
    options = {name: text.split() for name, text in words.items()}
    for name, plain in whole.items():
        yield from ([name], [name, "--help"], [name, *plain], [name, *plain, *plain])
        for position, value in itertools.product(range(len(plain)), [*files.values(), *ODD]):
            if not plain[position].startswith("-"):
                yield [name, *plain[:position], value, *plain[position + 1 :]]
        for option in options[name]:
            yield [name, *plain, option]
            for value in ODD:
                yield [name, *plain, option, value]
                yield [name, *plain, f"{option}={value}"]
    for value in files.values():
        yield from (["info", value, "--check"], ["info", value, "--json"])
        yield ["overlay", value, "-o", out, "-q", "0", "--patch-size", "2", "--special-tokens", "0"]
    random = setting.random("commands")
    for _ in range(setting.count(600)):
        name = random.choice(list(whole))
        pool = [*options[name], *options[name], *files.values(), *ODD, *whole[name]]
        yield [name, *random.choices(pool, k=random.randint(0, 7))]


def tried(line: list[str], folder: Path) -> None:
    """One command line, in a folder of its own, without a terminal."""
    # As Python opens them: what can't be written is an error on the one, escaped on the other.
    out, err = (
        io.TextIOWrapper(io.BytesIO(), "utf-8", errors=how)
        for how in ("strict", "backslashreplace")
    )
    shutil.rmtree(folder / "work", ignore_errors=True)
    (folder / "work").mkdir()
    before, here = {path.name for path in folder.iterdir()}, Path.cwd()
    with contextlib.ExitStack() as stack:
        for target, value in stand_ins().items():
            stack.enter_context(mock.patch(target, value))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(os.chdir, here)
        os.chdir(folder / "work")
        try:
            code: Any = cli.main(line)
        except SystemExit as end:
            code = end.code
        except Exception as error:
            raise AssertionError(f"{line!r:.900}: a traceback") from error
        for stream in (out, err):
            stream.flush()
    said = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    text = "".join(said)
    assert code in (0, 1, 2), f"{line!r:.300}: exit {code}"
    assert code == 0 or text.strip(), f"{line!r:.300}: exit {code} without a word"
    assert "Traceback" not in text, f"{line!r:.300}: a traceback is printed"
    raw = {sign for sign in text if not sign.isprintable() and sign not in "\n\r\t"}
    assert not raw, f"{line!r:.300}: printed raw {raw}"
    if "--json" in line and code == 0 and said[0].startswith("{"):
        json.loads(said[0])
    gone = before - {path.name for path in folder.iterdir()}
    assert not gone, f"{line!r:.300}: removed {gone}"
    shutil.rmtree(folder / "out", ignore_errors=True)


def stand_ins() -> dict[str, Any]:
    importlib.import_module("vggt_adapter.demo")
    return {
        "vistvis.models.loading.load": loaded,
        "vistvis.models.loading.load_timm": lambda *_, **__: None,
        "vggt_adapter.steps.load_model": no_model,
    }
