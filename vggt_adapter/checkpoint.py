"""Weights from files: only the aggregator's, strictly checked, without a second copy in memory."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from vggt_adapter.config import DINOV2_SIZES, VGGTConfig, ViTConfig
from vggt_adapter.model import VGGT
from vistvis.errors import CheckpointError, InputError

WEIGHTS = Path(__file__).parent / "weights"
TINY = "vggt_tiny"
TINY_UNTRAINED = VGGTConfig(embed_dim=128, depth=4, num_heads=4, patch_embed="conv")
METADATA_KEY = "vistvis.config"
# Looked for in a folder or on the hub, in this order.
FILE_NAMES = ("model.safetensors", "model.pt")
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
# What the shapes of a patch embedding's blocks can't tell: every DINOv2 has heads this wide.
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class _Source:
    """An open weights file: what it holds is known, its values are read one by one."""

    file: Path
    shapes: Mapping[str, tuple[int, ...]]  # names below the aggregator, as in its state dict
    read: Callable[[str], Tensor]
    config: VGGTConfig | None = None


def load_checkpoint(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    config: VGGTConfig | None = None,
) -> VGGT:
    """A VGGT with weights from a file, a folder or the Hugging Face hub, in eval mode.

    Only the aggregator's tensors are read, one at a time: beside the loaded model never more than
    one tensor is in memory, also where the type changes. The sizes follow from the tensors'
    shapes, so a model of any size loads.

    Parameters
    ----------
    source
        A `.safetensors` or `.pt` file, a folder with one, or a name on the hub such as
        "facebook/VGGT-1B" (about 5 GB, kept in the hub's cache; non-commercial licence).
    dtype
        Type of the weights; None: as stored.
    device
        Where the weights go; None: the CPU.
    config
        Needed only where shapes do not tell the sizes: a transformer of another width than
        DINOv2's as patch embedding, in a file that `save_checkpoint` did not write.

    A `.pt` file is read without running any code in it, and checked against its own checksums,
    which reads it whole.

    Raises
    ------
    CheckpointError
        If the weights cannot be found or read, or names or shapes differ from the model's: one
        error lists all that is missing, unexpected or of another shape.
    InputError
        If there is no such device here, or dtype is no floating type.
    """
    place = _device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(
            f"dtype must be a floating torch type such as torch.bfloat16, got {dtype!r}"
        )
    file = _find(source)
    with _open(file) as opened:
        sizes = config or opened.config or infer_config(opened.shapes, file=file)
        with torch.device("meta"), _Unfilled():
            model = VGGT(sizes)
        wanted = model.aggregator.state_dict()
        _check_names(wanted, opened, file)
        weights = _read_all(wanted, opened, dtype=dtype, device=place)
    # Parameters become the tensors themselves: a copy into waiting ones would double the memory.
    model.aggregator.load_state_dict(weights, assign=True)
    model.aggregator.reset_buffers()
    model.trained = True
    return model.eval()


def save_checkpoint(model: VGGT, file: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write a model's weights, and its sizes in the file's header, as `.safetensors`.

    Written beside the target and then renamed: a reader never sees half a file.

    Raises
    ------
    InputError
        If the name does not end in `.safetensors`.
    """
    from safetensors.torch import save_file

    target = Path(file)
    if target.suffix != ".safetensors":
        raise InputError(f"weights are written as .safetensors, got {str(target)!r}; rename it")
    weights = {
        f"aggregator.{name}": value.detach().to(device="cpu", dtype=dtype).contiguous()
        for name, value in model.aggregator.state_dict().items()
    }
    metadata = {"format": "pt", METADATA_KEY: json.dumps(model.config.to_dict())}
    handle, waiting = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    os.close(handle)
    try:
        save_file(weights, waiting, metadata=metadata)
        os.chmod(waiting, 0o644)  # mkstemp's own is for its owner's eyes only
        os.replace(waiting, target)
    except BaseException:
        Path(waiting).unlink(missing_ok=True)
        raise
    return target


def load_tiny(
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    folder: str | Path | None = None,
) -> VGGT:
    """The small VGGT that comes with the package.

    Where its trained weights are in the package, they are loaded, after a check of their SHA-256
    against the description beside them; else the weights are random (always the same ones) and
    `model.trained` is False. `model.default` holds the description's suggestions of what to look
    at, such as the block; empty for random weights.

    Parameters
    ----------
    dtype
        Type of the weights; None: float32, whatever they are stored as.
    device
        Where the weights go; None: the CPU.
    folder
        Where to look instead of the package's own folder.

    Raises
    ------
    CheckpointError
        If the weights in the package are damaged or their description is missing.
    """
    home = WEIGHTS if folder is None else Path(folder)
    file, description = home / f"{TINY}.safetensors", home / f"{TINY}.json"
    place, dtype = _device(device), dtype or torch.float32
    if not file.exists():
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the CPU's alone; fork_rng puts it back
            model = VGGT(TINY_UNTRAINED)
        return model.to(device=place, dtype=dtype).eval()
    try:
        told = json.loads(description.read_text(encoding="utf-8"))
        config, promised = VGGTConfig.from_dict(told["config"]), told["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{description.name} must stand beside {file.name} and tell its config and sha256: "
            f"{type(error).__name__}: {error}; install the package again"
        ) from error
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != promised:
        raise CheckpointError(
            f"{str(file)!r} must have the SHA-256 {promised}, has {digest}: it was changed or "
            "damaged; install the package again"
        )
    model = load_checkpoint(file, dtype=dtype, device=place, config=config)
    model.default = dict(told.get("default", {}))
    return model


# -- finding the file ------------------------------------------------------------------------------


def _find(source: str | Path) -> Path:
    path = Path(source).expanduser()
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
        found = sorted(folder.glob(f"*{suffix}"))
        if len(found) == 1:
            return found[0]
        if found:
            listed = ", ".join(file.name for file in found)
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

    for file_name in FILE_NAMES:
        try:
            return Path(huggingface_hub.hf_hub_download(name, file_name))
        except errors.LocalEntryNotFoundError as error:
            raise _no_hub(
                name, "the hub cannot be reached and its cache has none", error
            ) from error
        except errors.EntryNotFoundError:
            continue
        except errors.GatedRepoError as error:
            raise _no_hub(
                name, "its owner must grant access first (then `hf auth login`)", error
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise _no_hub(name, "the hub has no such model, or it is private", error) from error
        except Exception as error:  # transport errors differ between the hub client's versions
            raise _no_hub(name, "the download failed", error) from error
    raise CheckpointError(f"{name!r} on the hub has none of {', '.join(FILE_NAMES)}")


def _no_hub(name: str, reason: str, error: Exception) -> CheckpointError:
    first_line = next(iter(str(error).splitlines()), "")
    return CheckpointError(
        f"cannot get {name!r}: {reason} ({type(error).__name__}: {first_line}). With the weights "
        "already on a disk, give their path instead of the name: "
        "VGGT.from_pretrained('path/to/model.safetensors')"
    )


class _Unfilled(TorchFunctionMode):
    """Skips the random filling of new modules.

    On the meta device there is nothing to fill, and torch takes seconds to do it: its random
    functions there are written in Python and import its compiler.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


# -- reading it ------------------------------------------------------------------------------------


@contextmanager
def _open(file: Path) -> Iterator[_Source]:
    if file.suffix in TORCH_SUFFIXES:
        yield _open_torch(file)
        return
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(file, error) from error
    with handle as opened:
        prefix = _prefix(list(opened.keys()), file)
        shapes = {
            name.removeprefix(prefix): tuple(opened.get_slice(name).get_shape())
            for name in opened.keys()  # noqa: SIM118 - no mapping, though it has keys
            if name.startswith(prefix)
        }

        def read(name: str) -> Tensor:
            try:
                value: Tensor = opened.get_tensor(prefix + name)
            except (SafetensorError, OSError, ValueError, RuntimeError) as error:
                raise _damaged(file, error) from error
            return value

        yield _Source(file, shapes, read, _told_config(opened.metadata(), file))


def _open_torch(file: Path) -> _Source:
    _check_sums(file)
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError:
        raise
    except Exception as error:  # unpickling garbage can raise anything
        raise _damaged(file, error) from error
    for key in ("model", "state_dict"):  # as training scripts nest it
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{str(file)!r} must hold a state dict, holds a {type(loaded).__name__}; save "
            "model.state_dict()"
        )
    tensors = {k: v for k, v in loaded.items() if isinstance(k, str) and isinstance(v, Tensor)}
    prefix = _prefix(list(tensors), file)
    mine = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return _Source(file, {k: tuple(v.shape) for k, v in mine.items()}, mine.__getitem__)


def _check_sums(file: Path) -> None:
    """Every record against its CRC-32, which torch writes but does not check."""
    try:
        with zipfile.ZipFile(file) as archive:
            wrong = archive.testzip()
    except (OSError, zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        raise _damaged(file, error) from error
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


def _told_config(metadata: Mapping[str, str] | None, file: Path) -> VGGTConfig | None:
    text = (metadata or {}).get(METADATA_KEY)
    if text is None:
        return None
    try:
        return VGGTConfig.from_dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"the header of {str(file)!r} must tell a VGGTConfig under {METADATA_KEY!r}, tells "
            f"{text[:80]!r} ({error}); give config= yourself"
        ) from error


def infer_config(shapes: Mapping[str, tuple[int, ...]], *, file: Path | None = None) -> VGGTConfig:
    """The sizes of an aggregator from the shapes of its tensors (names without "aggregator.").

    Shapes do not tell the heads of the patch embedding: they are those of the DINOv2 of its width.

    Raises
    ------
    CheckpointError
        If a tensor that tells a size is missing, or sizes contradict each other.
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
        found = (re.match(pattern, name) for name in shapes)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    width = shape("camera_token", 4)[-1]
    head = shape(r"(frame|global)_blocks\.\d+\.attn\.q_norm\.weight", 1)[0]
    hidden = shape(r"(frame|global)_blocks\.\d+\.mlp\.fc1\.weight", 2)[0]
    sizes: dict[str, Any] = {
        "embed_dim": width,
        "depth": count(r"(?:frame|global)_blocks\.(\d+)\."),
        "num_heads": width // max(head, 1),
        "mlp_ratio": hidden / max(width, 1),
        "num_register_tokens": shape("register_token", 4)[2],
    }
    if "patch_embed.pos_embed" in shapes:
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
            depth=count(r"patch_embed\.blocks\.(\d+)\."),
            num_heads=heads[width],
            mlp_ratio=hidden / width,
            num_register_tokens=registers[1] if len(registers) == 3 else 0,
        )
        sizes["img_size"] = side * patch
    else:
        patch = shape(r"patch_embed\.proj\.weight", 4)[-1]
        sizes["patch_embed"] = "conv"
        sizes["img_size"] = 37 * patch  # a convolution takes any size; the usual grid
    try:
        return VGGTConfig(**sizes, patch_size=patch)
    except InputError as error:
        raise CheckpointError(f"the shapes in {where} contradict each other: {error}") from error


def _check_names(wanted: Mapping[str, Tensor], opened: _Source, file: Path) -> None:
    """One error for everything that is missing, unexpected or of another shape."""
    missing = [name for name in wanted if name not in opened.shapes]
    unexpected = [name for name in opened.shapes if name not in wanted]
    wrong = [
        f"{name} is {opened.shapes[name]}, must be {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in opened.shapes and opened.shapes[name] != tuple(value.shape)
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": wrong}
    if any(problems.values()):
        lines = [
            f"  {len(names)} {kind}: " + "; ".join(names)
            for kind, names in problems.items()
            if names
        ]
        raise CheckpointError(
            f"{str(file)!r} does not fit this VGGT (names below 'aggregator.'):\n"
            + "\n".join(lines)
            + "\nChoose weights of this architecture, or give the config= they were made with."
        )


def _read_all(
    wanted: Mapping[str, Tensor],
    opened: _Source,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
) -> dict[str, Tensor]:
    chosen = dtype or next((_floating(name, opened).dtype for name in wanted), torch.float32)
    # All places first, then the values: places made between temporary tensors left the heap so
    # full of holes that memory doubled in some runs. Untouched, they cost nothing.
    weights = {
        name: torch.empty(value.shape, dtype=chosen, device=device)
        for name, value in wanted.items()
    }
    for name in tqdm(wanted, desc="loading weights", unit="tensor", delay=2, leave=False):
        # A copy always: what is read is a window onto the file, which others may change.
        stored = _floating(name, opened)
        value = weights[name].copy_(stored)
        # Both ends carry NaN and infinity over, and need no memory.
        if value.numel() and not all(bool(end.isfinite()) for end in value.aminmax()):
            fault = f"do not fit {chosen}" if bool(stored.isfinite().all()) else "are damaged"
            raise CheckpointError(
                f"{name} in {str(opened.file)!r} has values that are not finite: they {fault}; "
                "fetch the file again, or use dtype=torch.float32"
            )
    return weights


def _floating(name: str, opened: _Source) -> Tensor:
    stored = opened.read(name)
    if not stored.is_floating_point():
        raise CheckpointError(
            f"{str(opened.file)!r} must hold floating numbers, {name} is {stored.dtype}; "
            "use the weights before they were quantised"
        )
    return stored


def _damaged(file: Path, error: Exception) -> CheckpointError:
    first_line = next(iter(str(error).splitlines()), "")
    hint = "fetch the file again, or use the .safetensors form"
    if type(error).__name__ == "UnpicklingError":
        hint = "it may be damaged, or hold code, which is never run: use the .safetensors form"
    return CheckpointError(
        f"{str(file)!r} cannot be read as weights ({type(error).__name__}: {first_line}); {hint}"
    )


def _device(device: torch.device | str | None) -> torch.device:
    try:
        place = torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device must be like 'cpu' or 'cuda', got {device!r}") from error
    if place.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if found <= (place.index or 0):
            raise InputError(
                f"device {str(place)!r} was asked for, and torch finds {found} CUDA devices here; "
                "use device='cpu'"
            )
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' was asked for and is not available; use device='cpu'")
    return place
