"""Which token is which patch of which picture: measured, and said by a site's layout and order."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vistvis.attention import Attention
from vistvis.errors import IndexOutOfRange, VistvisError
from vistvis.tokens import TokenLayout

from .readings import Reading
from .witness import Call

Cell = tuple[int, int]
Readings = dict[str, list[Reading]]


def dyed(images: Tensor, patch: int, frame: int, cell: tuple[int, int]) -> Tensor:
    """The pictures with one patch of one of them replaced by noise."""
    out = images.clone()
    rows = slice(cell[0] * patch, (cell[0] + 1) * patch)
    columns = slice(cell[1] * patch, (cell[1] + 1) * patch)
    out[frame, :, rows, columns] = torch.rand_like(out[frame, :, rows, columns])
    return out


def expected_at(
    attention: Attention, side: str, frame: int, cell: Cell, *, first: int = 0
) -> tuple[int, int] | None:
    """`(batch index, captured index)` where the site says a patch is; None if it isn't there.

    `first` is the first picture of those that this run of the site got.
    """
    site = attention.site
    assert site is not None
    layout: TokenLayout = getattr(site, f"{side}_layout")
    order, batch = getattr(site, f"{side}_order"), 0
    alone = layout.frames == 1 and (attention.shape[0] > 1 or not site.first_frame)
    if site.frames_in_batch or alone:
        batch, frames = frame - first, site.frame_order
        if frames is not None:
            batch = int((frames.flatten() == frame).nonzero()[0])
        if not 0 <= batch < attention.shape[0]:
            return None
        frame = 0
    elif side == "query":
        frame -= site.first_frame
    if not 0 <= frame < layout.frames:
        return None
    token = layout.index(frame=frame, row=cell[0], col=cell[1])
    try:
        return batch, order.index(token, batch=batch) if order is not None else token
    except IndexOutOfRange:
        return None


def strongest(change: Tensor) -> tuple[int, int]:
    """The batch index and the token that answer most."""
    batch, token = divmod(int(change.argmax()), change.shape[-1])
    return batch, token


@dataclass
class Places:
    """What the dye test of one model found."""

    images: Tensor
    patch: int
    calls: list[Call]
    readings: Readings
    rerun: Callable[[Tensor], list[Call]]
    steps: bool = False
    """Each run of a site gets the next picture."""
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    values: int = 0
    """Numbers of figures that are the witness's weight between the two dyed tokens."""
    unvalued: dict[str, str] = field(default_factory=dict)
    """Site → why it gives no values for a figure."""
    answers: dict[tuple[str, int, str, int, Cell], tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows, cols = self.images.shape[-2] // self.patch, self.images.shape[-1] // self.patch
        self.cells = [(0, cols - 1), (rows - 1, 0), (rows // 2, cols // 2)]

    def probe(self) -> None:
        """Replace one patch of one picture by noise, and see which tokens answer."""
        for frame in range(len(self.images)):
            for cell in self.cells:
                other = self.rerun(dyed(self.images, self.patch, frame, cell))
                shapes = [[call.weights.shape for call in calls] for calls in (other, self.calls)]
                if shapes[0] != shapes[1]:
                    self.wrong.append(f"dyed frame {frame}, {cell}: other kernel calls")
                    continue
                for name, made in self.readings.items():
                    for run, reading in enumerate(made):
                        self._answer(name, run, reading, other, frame, cell)

    def _answer(
        self, name: str, run: int, reading: Reading, other: list[Call], frame: int, cell: Cell
    ) -> None:
        for side, change in zip(("query", "key"), reading.answers(self.calls, other), strict=True):
            layout = getattr(reading.attention.site, f"{side}_layout")
            if layout is None:
                continue
            first = run if self.steps else 0
            # Levels of a pyramid have coarser grids than the pictures.
            rows, cols = self.images.shape[-2] // self.patch, self.images.shape[-1] // self.patch
            place = cell[0] * layout.grid[0] // rows, cell[1] * layout.grid[1] // cols
            expected = expected_at(reading.attention, side, frame, place, first=first)
            if expected is None:
                continue
            got = strongest(change)
            self.answers[name, run, side, frame, cell] = got
            if got == expected:
                self.right += 1
            else:
                self.wrong.append(
                    f"{name} run {run}: {side} of frame {frame}, row {cell[0]}, col {cell[1]} is "
                    f"at {got}, said to be at {expected}"
                )

    def probe_registers(self) -> None:
        """Replace a whole picture, and see whose special tokens answer in a register block."""
        registers = {
            name: made[0]
            for name, made in self.readings.items()
            if made[0].attention.site is not None and made[0].attention.site.kind == "register"
        }
        for frame in range(len(self.images)) if registers else ():
            pictures = self.images.clone()
            pictures[frame] = torch.rand_like(pictures[frame])
            other = self.rerun(pictures)
            for name, reading in registers.items():
                site = reading.attention.site
                assert site is not None
                layout, order = site.key_layout, site.key_order
                if layout is None or order is None:
                    self.wrong.append(f"{name}: a register block without layout and order")
                    continue
                change = reading.answers(self.calls, other)[1][0]
                places = [layout.locate(int(token)) for token in order.tokens.view(-1)]
                shares = [0.0] * layout.frames
                for amount, place in zip(change.tolist(), places, strict=True):
                    shares[place.frame_idx] += amount
                special = not any(place.is_patch for place in places)
                if special and max(shares) == shares[frame]:
                    self.right += 1
                else:
                    self.wrong.append(f"{name}: frame {frame} answers {shares}")

    def check_values(self) -> None:
        """The numbers of a figure against the witness's weight between the tokens that answered."""
        from vggt_adapter import get_attention_values

        for name, made in self.readings.items():
            site = made[-1].attention.site
            assert site is not None
            if site.kind not in ("frame", "global") or not (site.query_layout and site.key_layout):
                continue
            run, attention = len(made) - 1, made[-1].attention
            weights, layout = made[-1].weights(self.calls), site.key_layout
            single = site.kind == "frame"
            for frame in range(len(self.images)):
                at = self.answers.get((name, run, "query", frame, self.cells[0]))
                if at is None:
                    continue
                row, col = self.cells[0]
                token = layout.index(frame=0 if single else frame, row=row, col=col)
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("error")
                        own = self.steps and single
                        maps = get_attention_values(
                            attention,
                            self.images[run : run + 1] if own else self.images,
                            token,
                            frame_idx=(0 if own else frame) if single else None,
                        )["attention_maps"]
                except VistvisError as error:
                    self.unvalued[name] = str(error)
                    break
                for other in [frame] if single else range(layout.frames):
                    for cell in self.cells:
                        key = self.answers.get((name, run, "key", other, cell))
                        if key is None:
                            continue
                        share = float(weights[at[0], 0, at[1], key[1]])
                        if site.key_order is not None:
                            # Merged tokens share their weight.
                            share /= len(site.key_order.originals(key[1], batch=key[0]))
                        got = float(maps[cell] if single else maps[other][cell])
                        if abs(got - share) < 1e-5:
                            self.values += 1
                        else:
                            self.wrong.append(
                                f"{name}: the figure says {got:.6f} from frame {frame}, "
                                f"{self.cells[0]} to frame {other}, {cell}; it is {share:.6f}"
                            )
