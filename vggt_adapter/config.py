"""The sizes of a VGGT aggregator: what a checkpoint's shapes follow from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar

from vistvis.errors import InputError

Config = TypeVar("Config", "ViTConfig", "VGGTConfig")

# VGGT's own: pixels along the side of a picture, and of a patch.
IMAGE_SIZE, PATCH_SIZE = 518, 14


@dataclass(frozen=True)
class ViTConfig:
    """A DINOv2-style vision transformer used as patch embedding.

    Its width and the grid of its positional embedding are the whole model's (`embed_dim`,
    `img_size`), because its patch tokens go straight into the frame and global blocks.

    Attributes
    ----------
    depth, num_heads, mlp_ratio
        Its own, as in `VGGTConfig`; `depth` counts blocks.
    num_register_tokens
        Beside the cls token; 0 for a DINOv2 without registers.
    """

    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    num_register_tokens: int = 4

    def __post_init__(self) -> None:
        _check_sizes(self)


# A checkpoint's header may say anything: a model of 100,000 blocks would take minutes to be made,
# before its weights are seen to be missing.
_SIZES = (
    ("img_size", 1, 1_000_000),
    ("patch_size", 1, 1_000_000),
    ("embed_dim", 1, 1_000_000),
    ("num_heads", 1, 1_000_000),
    ("depth", 0, 1_000),
    ("num_register_tokens", 0, 1_000_000),
)
_LARGEST = 1e6

DINOV2_SIZES: dict[str, tuple[int, int, int]] = {  # width, depth, heads
    "vits14": (384, 12, 6),
    "vitb14": (768, 12, 12),
    "vitl14": (1024, 24, 16),
}
DINOV2_NAMES = tuple(f"dinov2_{size}{end}" for size in DINOV2_SIZES for end in ("", "_reg"))


@dataclass(frozen=True)
class VGGTConfig:
    """The sizes of an aggregator; the defaults are those of facebook/VGGT-1B.

    Attributes
    ----------
    img_size, patch_size
        Pixels along one side of the square that the positional embedding was made for (it is
        resized to the grid of other images), and of a patch.
    embed_dim
        Width C of all blocks.
    depth
        Pairs of one frame block and one global block.
    num_heads
        Heads h of each; C / h must be a multiple of 4, because the rotary embedding turns pairs of
        channels separately for y and x.
    mlp_ratio
        Hidden width of a block's MLP over C.
    num_register_tokens
        Of a frame, beside its camera token.
    patch_embed
        "conv" (one convolution), a `ViTConfig`, or one of the names of DINOv2:
        dinov2_vits14, dinov2_vitb14, dinov2_vitl14, each also with `_reg` (4 registers).
    rope_frequency
        Base of the rotary position embedding.
    init_values
        Initial scale of the residual branches (LayerScale).

    InputError if sizes do not fit each other.
    """

    img_size: int = IMAGE_SIZE
    patch_size: int = PATCH_SIZE
    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_register_tokens: int = 4
    patch_embed: ViTConfig | Literal["conv"] | str | Mapping[str, Any] = "dinov2_vitl14_reg"
    rope_frequency: float = 100.0
    init_values: float = 0.01

    def __post_init__(self) -> None:
        _check_sizes(self)
        if self.img_size % self.patch_size:
            raise InputError(
                f"img_size must be a multiple of patch_size, got {self.img_size} and "
                f"{self.patch_size}; use {self.img_size // self.patch_size * self.patch_size}"
            )
        if self.embed_dim % (4 * self.num_heads):
            raise InputError(
                "embed_dim must be a multiple of 4 · num_heads (rotary embedding in two "
                f"dimensions), got embed_dim={self.embed_dim}, num_heads={self.num_heads}; "
                f"use {-(-self.embed_dim // (4 * self.num_heads)) * 4 * self.num_heads} wide blocks"
            )
        # Frozen: the normal form replaces what was given, so that equal sizes compare equal.
        object.__setattr__(self, "patch_embed", self._vit())

    def _vit(self) -> ViTConfig | Literal["conv"]:
        given = self.patch_embed
        if given == "conv":
            return "conv"
        if isinstance(given, str):
            given = self._named(given)
        elif isinstance(given, Mapping):
            given = _made(ViTConfig, given)
        if not isinstance(given, ViTConfig):
            raise InputError(
                "patch_embed must be 'conv', a ViTConfig, a dict of its values or one of "
                f"{', '.join(DINOV2_NAMES)}; got {given!r}"
            )
        if self.embed_dim % given.num_heads:
            raise InputError(
                f"embed_dim must be a multiple of the patch embedding's heads, got "
                f"{self.embed_dim} and {given.num_heads} heads; choose a divisor of it"
            )
        return given

    def _named(self, name: str) -> ViTConfig:
        if name not in DINOV2_NAMES:
            raise InputError(
                f"patch_embed must be 'conv', a ViTConfig or one of {', '.join(DINOV2_NAMES)}; "
                f"got {name!r}"
            )
        _, size, *registers = name.split("_")
        width, depth, heads = DINOV2_SIZES[size]
        if width != self.embed_dim:
            raise InputError(
                f"{name} is {width} wide and the blocks are embed_dim={self.embed_dim}: both "
                f"must be equal; use embed_dim={width}, or a ViTConfig of your own"
            )
        return ViTConfig(depth=depth, num_heads=heads, num_register_tokens=4 if registers else 0)

    @property
    def vit(self) -> ViTConfig | None:
        """The patch embedding's transformer; None where it is one convolution."""
        return self.patch_embed if isinstance(self.patch_embed, ViTConfig) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> VGGTConfig:
        """Back from `to_dict`. Raises InputError for a name that is no size."""
        return _made(cls, values)


def _made(cls: type[Config], values: Mapping[str, Any]) -> Config:
    if not isinstance(values, Mapping):
        raise InputError(f"a {cls.__name__} is made of a dict, got {type(values).__name__}")
    names = [field.name for field in fields(cls)]
    unknown = sorted(map(repr, set(values) - set(names)))
    if unknown:
        raise InputError(
            f"{cls.__name__} has no {', '.join(unknown)}; its values are {', '.join(names)}"
        )
    try:
        return cls(**values)
    except TypeError as error:  # a value is missing
        raise InputError(f"{cls.__name__}: {error}") from error


def _check_sizes(config: ViTConfig | VGGTConfig) -> None:
    for name, least, most in _SIZES:
        value = getattr(config, name, least)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or not least <= value <= most:
            raise InputError(f"{name} must be an integer from {least} to {most}, got {value!r}")
    for name in ("mlp_ratio", "rope_frequency", "init_values"):
        value = getattr(config, name, 1.0)
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not real or not 0 <= value <= _LARGEST:
            raise InputError(f"{name} must be a number from 0 to {_LARGEST:g}, got {value!r}")
