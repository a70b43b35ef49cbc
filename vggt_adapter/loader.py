"""VGGT for the commands of vistvis that run a model: `vggt:tiny`, `vggt:facebook/VGGT-1B`, …"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vggt_adapter.extractor import checked_blocks, find_aggregator, site_names, token_layout
from vggt_adapter.inputs import ATTENTION_TYPES
from vggt_adapter.look import load_model, load_pictures
from vistvis.attention import Attention
from vistvis.errors import SiteError
from vistvis.hooks.capture import capture


@dataclass(frozen=True, eq=False)
class LoadedVGGT:
    """A model and the photographs it is to see."""

    model: nn.Module
    images: Tensor
    pictures: Tensor

    def names(self, sites: Sequence[str] | None) -> list[str]:
        """Block names that match, in the order in which the blocks run."""
        return list(self._sites(sites).values())

    def capture(
        self, sites: Sequence[str] | None, sink: Callable[[str, Attention], None]
    ) -> AbstractContextManager[Any]:
        """Hand every chosen block to `sink` under its block name while the model runs."""
        names = self._sites(sites)
        return capture(
            find_aggregator(self.model),
            list(names),
            sink=lambda site, attention: sink(names[site], attention),
            layout=token_layout,
            describe=lambda info: replace(info, name=names[info.name]),
        )

    def _sites(self, chosen: Sequence[str] | None) -> dict[str, str]:
        aggregator = find_aggregator(self.model)
        blocks = checked_blocks(aggregator, None)
        known = site_names(aggregator, blocks, list(ATTENTION_TYPES))
        if chosen is None:
            return known
        for pattern in chosen:
            if not fnmatch.filter(known.values(), pattern):
                raise SiteError(
                    f"no block matches {pattern!r}: there are frame_block_0 … "
                    f"{list(known.values())[-1]}"
                )
        return {
            site: name
            for site, name in known.items()
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in chosen)
        }


def load(
    model: str,
    *,
    device: str | None,
    dtype: str | None,
    images: Sequence[Path],
    size: int | None,
) -> LoadedVGGT:
    """The loader of the entry-point group "vistvis.models".

    Parameters
    ----------
    model
        "tiny", a name on the hub, a folder or a file.

    Raises
    ------
    InputError, CheckpointError
        If pictures can't be read or weights can't be had.
    """
    ready = load_model(model, device=device, dtype=dtype)
    loaded = load_pictures(list(images), ready, size=size)
    weight = next(ready.parameters())
    pictures = loaded.images.unsqueeze(0)
    return LoadedVGGT(ready, pictures.to(device=weight.device, dtype=weight.dtype), pictures)
