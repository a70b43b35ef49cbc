"""Weights from files: only the aggregator's, strictly checked, without a second copy in memory."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vggt_adapter.aggregator import Aggregator
from vggt_adapter.config import DINOV2_SIZES, VGGTConfig, ViTConfig
from vistvis.errors import CheckpointError, InputError
from vistvis.files import check_torch_archive, checked_path
from vistvis.progress import progress

METADATA_KEY = "vistvis.config"
# Looked for in a folder or on the hub, in this order.
FILE_NAMES = ("model.safetensors", "model.pt")
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class WeightsFile:
    """An open weights file: names below the aggregator and shapes; values are read one by one."""

    file: Path
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    header: Mapping[str, str] = field(default_factory=dict)

    def config(self) -> VGGTConfig:
        """The sizes of the model: from the header where it has them, else from the shapes."""
        text = self.header.get(METADATA_KEY)
        if text is None:
            return infer_config(self.shapes, file=self.file)
        try:
            return VGGTConfig.from_dict(json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"the header of {str(self.file)!r} must tell a VGGTConfig under {METADATA_KEY!r}, "
                f"tells {text[:80]!r} ({error}); give config= yourself"
            ) from error

    def fill(
        self, aggregator: Aggregator, *, dtype: torch.dtype | None, device: torch.device
    ) -> None:
        """Give an aggregator (which may be on the meta device) these weights."""
        state = aggregator.state_dict()
        self._check_names(state)
        chosen = dtype or next((self._floating(name).dtype for name in state), torch.float32)
        # All memory first, then the values: memory taken between temporary tensors left the heap
        # so full of holes that it doubled in some runs. Untouched, it costs nothing.
        weights = {
            name: torch.empty(value.shape, dtype=chosen, device=device)
            for name, value in state.items()
        }
        for name, weight in progress(weights.items(), "loading weights", unit="tensor", delay=2):
            # A copy always: what is read is a window onto the file, which others may change.
            stored = self._floating(name)
            weight.copy_(stored)
            # Both ends carry NaN and infinity over, and need no memory.
            if weight.numel() and not all(bool(end.isfinite()) for end in weight.aminmax()):
                fault = f"do not fit {chosen}" if bool(stored.isfinite().all()) else "are damaged"
                raise CheckpointError(
                    f"{name} in {str(self.file)!r} has values that are not finite: they {fault}; "
                    "fetch the file again, or use dtype=torch.float32"
                )
        # Parameters become these tensors themselves: copying into others would double the memory.
        aggregator.load_state_dict(weights, assign=True)
        aggregator.reset_buffers()

    def _check_names(self, state: Mapping[str, Tensor]) -> None:
        """One error for everything that is missing, unexpected or of another shape."""
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        problems = {
            "missing": [name for name in shapes if name not in self.shapes],
            "unexpected": [name for name in self.shapes if name not in shapes],
            "of another shape": [
                f"{name} is {self.shapes[name]}, must be {shape}"
                for name, shape in shapes.items()
                if self.shapes.get(name, shape) != shape
            ],
        }
        lines = [
            f"  {len(names)} {problem}: " + "; ".join(names)
            for problem, names in problems.items()
            if names
        ]
        if lines:
            raise CheckpointError(
                f"{str(self.file)!r} does not fit this VGGT (names below 'aggregator.'):\n"
                + "\n".join(lines)
                + "\nChoose weights of this architecture, or give the config= they were made with."
            )

    def _floating(self, name: str) -> Tensor:
        stored = self.read(name)
        if not stored.is_floating_point():
            raise CheckpointError(
                f"{str(self.file)!r} must hold floating numbers, {name} is {stored.dtype}; "
                "use the weights before they were quantised"
            )
        return stored


# -- finding the file ------------------------------------------------------------------------------


def _find(source: str | Path) -> Path:
    path = Path(os.path.expanduser(checked_path(source)))
    if path.is_file():
        return path
    if path.is_dir():
        return _in_folder(path)
    text = str(source)
    if isinstance(source, Path) or path.suffix in (".safetensors", *TORCH_SUFFIXES):
        raise CheckpointError(f"no weights at {text!r}: the file does not exist; check its path")
    if not HUB_NAME.fullmatch(text) or text.startswith("."):
        raise CheckpointError(
            f"weights are a file, a folder, or a hub name like 'facebook/VGGT-1B'; {text!r} is "
            "none of them here; check the path"
        )
    return _download(text)


def _in_folder(folder: Path) -> Path:
    for name in FILE_NAMES:
        if (folder / name).is_file():
            return folder / name
    for suffix in (".safetensors", *TORCH_SUFFIXES):
        files = sorted(folder.glob(f"*{suffix}"))
        if len(files) == 1:
            return files[0]
        if files:
            listed = ", ".join(file.name for file in files)
            raise CheckpointError(
                f"{str(folder)!r} holds several weights files ({listed}); name the one to load"
            )
    raise CheckpointError(
        f"no weights in {str(folder)!r}: it must hold {' or '.join(FILE_NAMES)}; "
        "name the file itself if it is elsewhere"
    )


def _download(name: str) -> Path:
    """The file in the hub's cache, fetched if need be."""
    import huggingface_hub
    from huggingface_hub import errors

    reasons = {
        errors.LocalEntryNotFoundError: "the hub cannot be reached and its cache has none",
        errors.EntryNotFoundError: "",  # there may be one in the other form
        errors.GatedRepoError: "its owner must grant access first (then `hf auth login`)",
        errors.RepositoryNotFoundError: "the hub has no such model, or it is private",
        Exception: "the download failed",  # such errors differ between the hub client's versions
    }
    for file_name in FILE_NAMES:
        try:
            return Path(huggingface_hub.hf_hub_download(name, file_name))
        except Exception as error:
            reason = next(text for cls, text in reasons.items() if isinstance(error, cls))
            if reason:
                first_line = next(iter(str(error).splitlines()), "")
                raise CheckpointError(
                    f"cannot get {name!r}: {reason} ({type(error).__name__}: {first_line}). With "
                    "the weights already on a disk, give their path instead of the name: "
                    "VGGT.from_pretrained('path/to/model.safetensors')"
                ) from error
    raise CheckpointError(f"{name!r} on the hub has none of {', '.join(FILE_NAMES)}")


# -- reading it ------------------------------------------------------------------------------------


@contextmanager
def open_weights(source: str | Path) -> Iterator[WeightsFile]:
    """Open a file, the one file of a folder, or one of the hub; see `load_checkpoint`."""
    file = _find(source)
    if file.suffix in TORCH_SUFFIXES:
        yield _open_torch(file)
        return
    from safetensors import SafetensorError, safe_open

    with _unharmed(file, SafetensorError, OSError, ValueError):
        handle = safe_open(file, framework="pt", device="cpu")
    with handle as opened:
        prefix = _prefix(list(opened.keys()), file)
        shapes = {
            name.removeprefix(prefix): tuple(opened.get_slice(name).get_shape())
            for name in opened.keys()  # noqa: SIM118 - no mapping, though it has keys
            if name.startswith(prefix)
        }

        def read(name: str) -> Tensor:
            with _unharmed(file, SafetensorError, OSError, ValueError, RuntimeError):
                value: Tensor = opened.get_tensor(prefix + name)
            return value

        yield WeightsFile(file, shapes, read, opened.metadata() or {})


def _open_torch(file: Path) -> WeightsFile:
    _check_sums(file)
    with _unharmed(file, Exception):  # unpickling garbage can raise anything
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    for key in ("model", "state_dict"):  # as training scripts nest it
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{str(file)!r} must hold a state dict, holds a {type(loaded).__name__}; save "
            "model.state_dict()"
        )
    tensors = {k: v for k, v in loaded.items() if isinstance(k, str) and _is_plain(v)}
    prefix = _prefix(list(tensors), file)
    mine = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return WeightsFile(file, {k: tuple(v.shape) for k, v in mine.items()}, mine.__getitem__)


def _is_plain(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.is_meta or value.is_nested:
        return False
    return value.layout == torch.strided


def _check_sums(file: Path) -> None:
    """Every record against its CRC-32, which torch writes but does not check."""
    faults = (OSError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError)
    with _unharmed(file, *faults):
        check_torch_archive(file)
        with zipfile.ZipFile(file) as archive:
            wrong = archive.testzip()
    if wrong is not None:
        raise CheckpointError(
            f"{str(file)!r} cannot be read: its record {wrong!r} does not match its checksum; "
            "fetch the file again"
        )


def _prefix(names: list[str], file: Path) -> str:
    """What stands before the aggregator's own names ("aggregator." in published files)."""
    ends = [name for name in names if name.endswith("aggregator.camera_token")]
    if len(ends) == 1:
        return ends[0].removesuffix("camera_token")
    if not ends and any(name.startswith("aggregator.") for name in names):
        return "aggregator."
    if not ends and "camera_token" in names:
        return ""
    seen = ", ".join(names[:3]) or "nothing"
    raise CheckpointError(
        f"{str(file)!r} must hold one VGGT aggregator (aggregator.camera_token, …); it holds "
        f"{len(names)} tensors: {seen}…; choose another file"
    )


def infer_config(shapes: Mapping[str, tuple[int, ...]], *, file: Path | None = None) -> VGGTConfig:
    """The sizes of an aggregator from the shapes of its tensors (names without "aggregator.").

    Shapes do not tell the heads of the patch embedding: they are those of the DINOv2 of its width.
    CheckpointError if a tensor that tells a size is missing, or sizes contradict each other.
    """
    where = "the weights" if file is None else repr(str(file))

    def shape(pattern: str, dimensions: int) -> tuple[int, ...]:
        for name, value in shapes.items():
            if re.fullmatch(pattern, name) and len(value) == dimensions:
                return value
        raise CheckpointError(
            f"{where} must have a tensor like {pattern.replace(chr(92), '')!r} with {dimensions} "
            "dimensions, to tell the model's sizes; choose another file, or give config="
        )

    def count(pattern: str) -> int:
        numbers = (re.match(pattern, name) for name in shapes)
        return 1 + max((int(number[1]) for number in numbers if number), default=-1)

    width = shape("camera_token", 4)[-1]
    head = shape(r"(frame|global)_blocks\.\d+\.attn\.q_norm\.weight", 1)[0]
    hidden = shape(r"(frame|global)_blocks\.\d+\.mlp\.fc1\.weight", 2)[0]
    sizes: dict[str, Any] = {
        "embed_dim": width,
        "depth": count(r"(?:frame|global)_blocks\.(\d{1,9})\."),
        "num_heads": width // max(head, 1),
        "mlp_ratio": hidden / max(width, 1),
        "num_register_tokens": shape("register_token", 4)[2],
    }
    if "patch_embed.pos_embed" not in shapes:
        patch = shape(r"patch_embed\.proj\.weight", 4)[-1]
        side = 37  # a convolution takes any size; the usual grid
        sizes["patch_embed"] = "conv"
    else:
        patch = shape(r"patch_embed\.patch_embed\.proj\.weight", 4)[-1]
        side = round((shape(r"patch_embed\.pos_embed", 3)[1] - 1) ** 0.5)
        hidden = shape(r"patch_embed\.blocks\.\d+\.mlp\.fc1\.weight", 2)[0]
        registers = shapes.get("patch_embed.register_tokens", (1, 0, width))
        heads = {wide: heads for wide, _, heads in DINOV2_SIZES.values()}
        if width not in heads:
            raise CheckpointError(
                f"the heads of the patch embedding in {where} cannot be told from shapes: it is "
                f"{width} wide, and DINOv2 has {', '.join(map(str, heads))}; give config="
            )
        sizes["patch_embed"] = ViTConfig(
            depth=count(r"patch_embed\.blocks\.(\d{1,9})\."),
            num_heads=heads[width],
            mlp_ratio=hidden / width,
            num_register_tokens=registers[1] if len(registers) == 3 else 0,
        )
    try:
        return VGGTConfig(**sizes, img_size=side * patch, patch_size=patch)
    except InputError as error:
        raise CheckpointError(f"the shapes in {where} contradict each other: {error}") from error


@contextmanager
def _unharmed(file: Path, *faults: type[Exception]) -> Iterator[None]:
    """Turns such errors while a file is read into a CheckpointError."""
    try:
        yield
    except MemoryError:
        raise
    except faults as error:
        first_line = next(iter(str(error).splitlines()), "")
        hint = "fetch the file again, or use the .safetensors form"
        if type(error).__name__ == "UnpicklingError":
            hint = "it may be damaged, or hold code, which is never run: use the .safetensors form"
        raise CheckpointError(
            f"{str(file)!r} cannot be read as weights ({type(error).__name__}: {first_line}); "
            f"{hint}"
        ) from error
