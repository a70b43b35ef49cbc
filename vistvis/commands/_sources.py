"""What commands read: photographs, stored runs, models with their weights."""

from __future__ import annotations

import argparse
import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vistvis.errors import CheckpointError, InputError
from vistvis.names import harmless

if TYPE_CHECKING:
    from torch import Tensor

    from vistvis.models.loading import LoadedModel
    from vistvis.photos.photo import Photo, SeenPhoto

# How long the hub of weights may take to answer.
HUB_SECONDS = 4.0


def is_run(text: str) -> bool:
    """Whether an argument means a stored run: a folder or fsspec URL that holds a manifest."""
    if "://" not in text:
        return Path(text).expanduser().joinpath("manifest.json").is_file()
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(text)
        return bool(system.exists(f"{path}/manifest.json"))
    except Exception:  # each file system has errors of its own, and such a place holds no run
        return False


def run_among(texts: Sequence[str], model: str | None, *, done: str) -> str | None:
    """The stored run that is meant, or None where these are photographs; InputError for both.

    `done` is what the command does, for the message.
    """
    stored = next((text for text in texts if is_run(text)), None)
    if stored is not None and len(texts) > 1:
        raise InputError(f"one run or photographs are {done}, got {stored} among {len(texts)}")
    if stored is not None and model:
        raise InputError("--model goes with photographs; a run holds what its model gave")
    return stored


def photos_of(texts: Sequence[str], arguments: argparse.Namespace) -> list[Photo]:
    """The photos that are meant, judged before a model is loaded; prints what is to be told."""
    from vistvis.photos.finding import find_photos

    for text in texts:
        if "://" not in text and is_run(text):
            raise InputError(f"{text} is a stored run, and photographs are meant; see vistvis info")
    photos, lines = find_photos(texts, every=arguments.every)
    for line in lines:
        print(harmless(line))
    return photos


def say_crops(photos: Sequence[SeenPhoto]) -> None:
    """Print what the model does not see of its photos."""
    from vistvis.photos.photo import crop_lines

    for line in crop_lines(photos):
        print(harmless(line))


def plays(photos: Sequence[Photo]) -> bool:
    """Whether these are the frames of a video, which a movie shows one after the other."""
    return all(photo.time is not None for photo in photos)


def sharp_pictures(loaded: LoadedModel) -> Tensor:
    """What the model saw, `(B, S, 3, H, W)`, with more pixels where there are more."""
    import torch

    sharp = loaded.sharp()
    if sharp is None:
        return loaded.pictures
    pixels = torch.from_numpy(sharp).permute(0, 3, 1, 2)
    return pixels.reshape(*loaded.pictures.shape[:2], *pixels.shape[1:])


def check_size(size: int | None, patch: int) -> None:
    """InputError for a width that is no whole number of patches."""
    if size is not None and size % patch:
        near = max(patch, round(size / patch) * patch)
        raise InputError(f"--size {size}: the model's patches are {patch} pixels wide; use {near}")


def load(model: str, arguments: argparse.Namespace, photos: Sequence[Photo]) -> LoadedModel:
    """`models.loading.load` with the options of `add_place`."""
    from vistvis.models import loading

    with from_hub(model):
        return loading.load(
            model,
            images=photos,
            device=arguments.device,
            dtype=arguments.dtype,
            size=arguments.size,
        )


@contextlib.contextmanager
def from_hub(model: str) -> Iterator[None]:
    """While the weights of a model are loaded, which may come from the hub.

    Where it does not answer, only its cache on the disk is asked: its client would go on trying for
    half a minute. Then a CheckpointError says how weights are had without it.
    """
    front, colon, rest = model.rpartition(":")
    if "@" in model or rest == "tiny" or Path(rest).expanduser().exists():
        yield
        return
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE or hub_answers(constants.ENDPOINT):
        yield
        return
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    except CheckpointError as error:
        causes = errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled
        if not isinstance(error.__cause__, causes):
            raise
        local = f"{model}@FILE; untrained: {model}@random"
        if colon or "/" in model:
            local = f"{front or 'vggt'}:FILE; {front or 'vggt'}:tiny is bundled"
        raise CheckpointError(
            f"--model {model}: {constants.ENDPOINT} can't be reached, and the cache on this disk "
            f"has no such weights; with the weights in a file, --model {local}"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = False


def hub_answers(endpoint: str, *, seconds: float = HUB_SECONDS) -> bool:
    """Whether a connection can be opened; through a proxy nothing is known, which counts as yes."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies

    address = urlsplit(endpoint)
    if address.scheme in (proxies := getproxies()) or "all" in proxies:
        return True
    opened = threading.Event()

    def connect() -> None:
        port = address.port or (80 if address.scheme == "http" else 443)
        with contextlib.suppress(OSError):
            socket.create_connection((address.hostname or "", port), timeout=seconds).close()
            opened.set()
        done.set()

    done = threading.Event()
    # In a thread of its own: looking up a name has no time limit.
    threading.Thread(target=connect, daemon=True).start()
    done.wait(seconds)
    return opened.is_set()
