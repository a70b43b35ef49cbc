"""`find_sites`: what a model's code shows, and with an example what a pass shows beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import nn

from vistvis.hooks.results import Options, Results
from vistvis.hooks.watching import Watch
from vistvis.models import sites
from vistvis.models.sites import SiteList

Example: TypeAlias = "Callable[[], Any] | tuple[Any, ...] | Mapping[str, Any] | Any"


def find_sites(model: nn.Module, *, example: Example = None) -> SiteList:
    """List the attention modules of a model, in the order of `model.named_modules()`.

    Each with its name, kind ("self", "cross", "window", "frame", "global"), heads where the module
    says, and how queries and keys will be read, or why they can't be. It prints as a table.

    `example` is what the model takes: one argument, a tuple of them, a dict by keyword, or a
    function of nothing that runs the model. With it, one forward without gradients lists also the
    modules that were seen calling kernels outside of those (`name`, and `name#2` for the second
    call of that pass): what `capture` keeps with `sites=None`.

    Raises what the model raises.

    Cost: looks at every module's class once; with an example one forward, of which nothing is kept.
    """
    every = sites.find_sites(model)
    if example is None:
        return every
    readable = SiteList(site for site in every if not site.refused)
    options = Options(sink=lambda name, attention: None)
    results = Results(readable.names, accumulate=False)
    watch = Watch(model, every, readable, options, results)
    try:
        with torch.no_grad():
            if isinstance(example, tuple):
                model(*example)
            elif isinstance(example, Mapping):
                model(**example)
            elif callable(example):
                example()
            else:
                model(example)
    finally:
        watch.remove()
    seen = [
        replace(
            site,
            source=results.sources.get(name, site.source),
            refused=results.errors.get(name, ""),
        )
        for name, site in results.adopted.items()
    ]
    order = {name: place for place, (name, _) in enumerate(sites.named_modules(model))}
    return SiteList(sorted([*every, *seen], key=lambda site: order[site.path.partition("#")[0]]))
