"""VGGT without its heads: the model whose attention is looked at, made, loaded and saved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vggt_adapter.aggregator import Aggregator
from vggt_adapter.checkpoint import METADATA_KEY, open_weights
from vggt_adapter.config import VGGTConfig
from vistvis.devices import device_of
from vistvis.errors import CheckpointError, InputError
from vistvis.files import atomic_file

WEIGHTS = Path(__file__).parent / "weights"
TINY = "vggt_tiny"
TINY_UNTRAINED = VGGTConfig(embed_dim=128, depth=4, num_heads=4, patch_embed="conv")


class VGGT(nn.Module):
    """Made with `VGGT.from_pretrained("facebook/VGGT-1B")`, `VGGT.tiny()` (small, comes with the
    package) or `VGGT.from_config(...)` (any size, random weights).

    Attributes
    ----------
    config, aggregator
        The `VGGTConfig` and the `Aggregator` of these sizes;
        `model.aggregator.frame_blocks[3].attn` is one attention module.
    trained
        False where the weights are random.
    default
        What is worth looking at first (such as the block), as the weights' description tells it.
    """

    def __init__(self, config: VGGTConfig | None = None) -> None:
        super().__init__()
        self.config = config or VGGTConfig()
        self.aggregator = Aggregator(self.config)
        self.trained = False
        self.default: dict[str, Any] = {}

    def forward(
        self, images: Tensor, *, pairs: Sequence[int] | None = None
    ) -> tuple[list[Tensor], int]:
        """Aggregate the tokens of some frames of one scene.

        InputError for images of another shape or type, or a pair that does not exist.

        Parameters
        ----------
        images
            (S, 3, H, W) or (B, S, 3, H, W), values in [0, 1], H and W multiples of the patch size.
        pairs
            Which pairs of blocks to return the output of; None: all. All blocks run anyway;
            fewer outputs save S · P · 2C numbers each.

        Returns
        -------
        tokens
            Of each pair (B, S, P, 2C): the frame block's output beside the global block's.
        patch_start_idx
            Special tokens at the start of each frame; `tokens[-1][:, :, patch_start_idx:]` are
            the patches, grid row after grid row.
        """
        return self.aggregator(images, pairs=pairs)  # type: ignore[no-any-return]

    @classmethod
    def from_config(cls, config: VGGTConfig | None = None, **sizes: Any) -> VGGT:
        """A model with random weights (seed: `torch.manual_seed`), of the sizes of `VGGTConfig`.

        `VGGT.from_config(embed_dim=128, depth=4, num_heads=4, patch_embed="conv")`. InputError if
        a size is unknown or sizes do not fit each other, or both forms are mixed.
        """
        if config is not None and sizes:
            raise InputError(
                f"give a VGGTConfig or single sizes, not both; got a config and {sorted(sizes)}: "
                "use dataclasses.replace(config, …)"
            )
        return cls(config or VGGTConfig.from_dict(sizes))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        config: VGGTConfig | None = None,
    ) -> VGGT:
        """The published weights, or your own; see `vggt_adapter.load_checkpoint`."""
        return load_checkpoint(source, dtype=dtype, device=device, config=config)

    @classmethod
    def tiny(
        cls, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> VGGT:
        """The small VGGT that comes with the package, trained; in float32 by default."""
        return load_tiny(dtype=dtype, device=device)


def load_checkpoint(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    config: VGGTConfig | None = None,
) -> VGGT:
    """A VGGT with weights from a file, a folder or the Hugging Face hub, in eval mode.

    Only the aggregator's tensors are read, one at a time: beside the loaded model never more than
    one tensor is in memory, also where the type changes. A model of any size loads. A `.pt` file is
    read without running any code in it, and checked against its own checksums, which reads it
    whole.

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

    CheckpointError if the weights cannot be found or read, or names or shapes differ from the
    model's: one error lists all that is missing, unexpected or of another shape. InputError if
    there is no such device here, or dtype is no floating type.
    """
    device = device_of(device or "cpu")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(
            f"dtype must be a floating torch type such as torch.bfloat16, got {dtype!r}"
        )
    with open_weights(source) as weights:
        with torch.device("meta"), _Unfilled():
            model = VGGT(config or weights.config())
        weights.fill(model.aggregator, dtype=dtype, device=device)
    model.trained = True
    return model.eval()


def save_checkpoint(model: VGGT, file: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write a model's weights, and its sizes in the file's header, as `.safetensors`.

    The file is whole or not there; InputError if its name does not end in `.safetensors`.
    """
    from vistvis.store.tensors import Encoded

    target = Path(file)
    if target.suffix != ".safetensors":
        raise InputError(f"weights are written as .safetensors, got {str(target)!r}; rename it")
    weights = {
        f"aggregator.{name}": value.to(dtype=dtype)
        for name, value in model.aggregator.state_dict().items()
    }
    metadata = {"format": "pt", METADATA_KEY: json.dumps(model.config.to_dict())}
    with atomic_file(target) as stream:
        stream.writelines(Encoded(weights, metadata).pieces())
    return target


def load_tiny(
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    folder: str | Path | None = None,
) -> VGGT:
    """The small VGGT that comes with the package, in float32 unless `dtype` is given.

    Where its trained weights are in the package (or `folder`), they are loaded, after a check of
    their SHA-256 against the description beside them: CheckpointError if they are damaged or it is
    missing. Else the weights are random, always the same ones.
    """
    home = WEIGHTS if folder is None else Path(folder)
    file, description = home / f"{TINY}.safetensors", home / f"{TINY}.json"
    device, dtype = device_of(device or "cpu"), dtype or torch.float32
    if not file.exists():
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the CPU's alone; fork_rng puts it back
            model = VGGT(TINY_UNTRAINED)
        return model.to(device=device, dtype=dtype).eval()
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
    model = load_checkpoint(file, dtype=dtype, device=device, config=config)
    model.default = dict(told.get("default", {}))
    return model


class _Unfilled(TorchFunctionMode):
    """Skips the random filling of new modules.

    On the meta device torch takes seconds to fill nothing: its random functions there are written
    in Python and import its compiler.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
