"""The dye itself: bits of the places of patches, pictures that are noise where a bit is set, and
what tokens answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from vistvis.errors import CaptureError, InputError
from vistvis.hooks.steady import steadily
from vistvis.models.sites import SiteList

Run: TypeAlias = Callable[..., Any]

CONFIDENCE = 0.08
WEAKEST = 0.4
# Chance lets one wrong token in 2⁵ pass; what then claims a patch that another token has, or stands
# outside the order that the rest shows, is seen there.
CHECK_BITS = 5


class TracedTokens(NamedTuple):
    """Which patch each token at a site's input is: `(B, N)` each.

    `picture` counts over all pictures that the model got, `patch` is `row · cols + col`; both −1
    for a token that is unknown: special, mixed with others, or of no picture. `confidence` is the
    least |a₁ − a₀| / (a₁ + a₀) over all bits, with a₁ and a₀ the token's answers to noise in the
    patches that have the bit and in those that have it not.
    """

    picture: Tensor
    patch: Tensor
    confidence: Tensor


class Dye:
    """Numbers of patches, bit by bit, and pictures that are noise where a bit is set."""

    def __init__(
        self, images: Tensor, grid: tuple[int, int], patch: tuple[int, int], seed: int
    ) -> None:
        self.images, self._patch = images, patch
        self._random = torch.Generator().manual_seed(seed)
        flat = images.flatten(0, -4)
        self._spread = flat.std((-2, -1), keepdim=True).clamp_min(0.1)  # also where one is flat
        numbers = torch.cartesian_prod(*map(torch.arange, (len(flat), *grid)))
        self._numbers = numbers.view(len(flat), *grid, 3)  # picture, row, col
        self._widths = [max(1, (n - 1).bit_length()) for n in self._numbers.shape[:3]]
        shape = self._numbers.shape[:3]
        self._checks = torch.randint(2**CHECK_BITS, shape, generator=self._random)
        values = [*zip(self._numbers.unbind(-1), self._widths, strict=True)]
        values.append((self._checks, CHECK_BITS))
        self.bits = [value >> bit & 1 == 1 for value, width in values for bit in range(width)]

    def stained(self, number: int) -> tuple[Tensor, Tensor]:
        """The pictures with noise in the patches that have a bit, and with the same noise in those
        that have it not."""
        bit = self.bits[number]
        # A token of two patches always answers most to the same one. Check bits come with noise of
        # another strength in each patch, and it contradicts itself.
        checks = number >= len(self.bits) - CHECK_BITS
        strength = torch.rand(bit.shape, generator=self._random) if checks else torch.zeros(())
        strength = WEAKEST**strength
        flat = self.images.flatten(0, -4)
        noise = torch.randn(flat.shape, generator=self._random).to(flat) * self._spread
        height, width = self._patch
        made = []
        for where in (bit, ~bit):
            weight = repeat(strength * where, "p r c -> p 1 (r h) (c w)", h=height, w=width)
            out = flat.clone()
            out[..., : weight.shape[-2], : weight.shape[-1]] += noise[
                ..., : weight.shape[-2], : weight.shape[-1]
            ] * weight.to(flat)
            made.append(out.view_as(self.images))
        return made[0], made[1]

    def read(self, code: Code) -> TracedTokens:
        """The places that tokens' bits spell, −1 where they don't pass."""
        bits, at = code.bits, 0
        numbers = []
        for width in (*self._widths, CHECK_BITS):
            places = torch.arange(width)
            numbers.append((bits[..., at : at + width] << places).sum(-1))
            at += width
        picture, row, col, check = numbers
        count, rows, cols = self._numbers.shape[:3]
        known = (picture < count) & (row < rows) & (col < cols) & (code.confidence > CONFIDENCE)
        place = tuple(n.where(known, 0) for n in (picture, row, col))
        known &= self._checks[place] == check
        patch = (row * cols + col).where(known, -1)
        picture = picture.where(known, -1)
        # A patch that two tokens of a sequence claim is known of neither.
        for pictures, patches in zip(picture, patch, strict=True):
            claims = pictures * rows * cols + patches
            _, back, times = torch.unique(claims, return_inverse=True, return_counts=True)
            twice = times[back] > 1
            pictures[twice], patches[twice] = -1, -1
        return TracedTokens(picture, patch, code.confidence)


class Code:
    """The bits of a site's tokens, read one after the other."""

    def __init__(self, base: Tensor) -> None:
        self._base = base
        self._bits: list[Tensor] = []
        self.confidence = torch.ones(base.shape[:2])

    def add(self, with_bit: Tensor | None, without: Tensor | None) -> None:
        first, second = self._answer(with_bit), self._answer(without)
        total = (first + second).clamp_min(torch.finfo(torch.float32).tiny)
        self.confidence = torch.minimum(self.confidence, (first - second).abs() / total)
        self._bits.append(first > second)

    @property
    def bits(self) -> Tensor:
        return torch.stack(self._bits, -1).long()

    def _answer(self, tokens: Tensor | None) -> Tensor:
        if tokens is None or tokens.shape != self._base.shape:
            return torch.zeros_like(self.confidence)  # other tokens: nothing can be told
        answer: Tensor = torch.linalg.vector_norm(tokens.float() - self._base.float(), dim=-1)
        return answer.cpu()


def inputs_of(sites: SiteList, run: Run, images: Tensor) -> dict[str, Tensor]:
    """Tokens `(B, N, C)` at the input of each site, of its first run."""
    seen: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.is_floating_point() and 2 <= value.ndim <= 4:
                tokens = value[None] if value.ndim == 2 else value
                tokens = rearrange(tokens, "b r c w -> b (r c) w") if value.ndim == 4 else tokens
                seen.setdefault(name, tokens.detach().clone())
                return

    handles: list[Any] = []

    def listen() -> None:
        for site in sites:
            hook = partial(note, site.name)
            handles.append(site.module.register_forward_pre_hook(hook, with_kwargs=True))
        with torch.no_grad():
            run(images)

    def leave() -> None:
        for handle in handles:
            handle.remove()

    try:
        steadily(listen)
        leave()
    except BaseException:
        leave()
        raise
    return seen


def check_repeats(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    for name, tokens in first.items():
        if name not in second or not torch.equal(tokens, second[name]):
            raise CaptureError(
                f"site {name!r} got other numbers when the model ran on the same pictures again, "
                "so answers to noise mean nothing; call model.eval(), and fix what is random"
            )


def patch_size_of(model: nn.Module) -> tuple[int, int]:
    """The kernel of the first convolution over pictures whose kernels do not overlap."""
    for module in model.modules():
        if not isinstance(module, nn.Conv2d) or module.in_channels != 3:
            continue
        if module.kernel_size == module.stride and module.kernel_size[0] > 1:
            return module.kernel_size[0], module.kernel_size[1]
    raise InputError(
        f"{type(model).__name__} has no convolution that cuts pictures into patches; pass "
        "patch_size="
    )


def _is_picture(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.is_floating_point()
        and value.ndim in (4, 5)
        and value.shape[-3] == 3
    )


def pictures_of(value: Any) -> Iterator[Tensor]:
    if _is_picture(value):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from pictures_of(one)
    elif isinstance(value, dict):
        yield from pictures_of(list(value.values()))


def shapes_of(value: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of all pictures among inputs."""
    return tuple(tuple(one.shape) for one in pictures_of(value))


def with_pictures(value: Any, pictures: Iterator[Tensor]) -> Any:
    """The same containers with other pictures in them."""
    if _is_picture(value):
        return next(pictures)
    if isinstance(value, (tuple, list)):
        return type(value)(with_pictures(one, pictures) for one in value)
    if isinstance(value, dict):
        return {key: with_pictures(one, pictures) for key, one in value.items()}
    return value
