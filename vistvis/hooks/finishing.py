"""A site has run: what was seen becomes attention with a description, or the reason why not."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from vistvis.attention import Attention, SiteInfo
from vistvis.errors import CaptureError
from vistvis.hooks.readings import error_text
from vistvis.hooks.results import Options, Pass, Results, numbered
from vistvis.hooks.settling import SiteRun, settle
from vistvis.hooks.verify import verify_reading
from vistvis.models.placing import site_info
from vistvis.models.sites import Site
from vistvis.models.windows import window_of
from vistvis.tokens import TokenLayout


class Cut(NamedTuple):
    """What a block got that cuts windows for a site: the shape of its input, and grid sizes."""

    cutter: nn.Module
    shape: tuple[int, ...]
    sizes: Any


class Finisher(threading.local):
    """Ends runs of sites; of each thread its own, since threads see pictures of other sizes."""

    def __init__(self, options: Options, results: Results) -> None:
        self._options, self._results = options, results
        self._infos: dict[str, tuple[Any, SiteInfo]] = {}
        self.cuts: dict[str, Cut] = {}
        """By name of the site, how windows were cut for its next run."""

    def finish(self, run: SiteRun, now: Pass) -> None:
        """Hand the attention of a run to its pass or the sink, or keep why there is none."""
        name = run.site.name
        now.ran[name] = now.ran.get(name, 0) + 1
        self._results.fired[name] += 1
        try:
            if now.ran[name] > 1 and not self._options.accumulate:
                now.attention.pop(name, None)
                now.errors.pop(name, None)
                self._results.repeated.add(name)
                raise CaptureError(
                    f"ran {now.ran[name]} times in one forward pass (a shared module?); "
                    "use accumulate=True for a list"
                )
            with torch.no_grad():
                for one, attention in self._read(run, now):
                    if self._options.sink is not None:
                        self._options.sink(one, attention)
                    else:
                        now.attention.setdefault(one, []).append(attention)
        except Exception as error:  # kept for access: the user's forward goes on
            now.errors.setdefault(name, error_text(error))
        if now.loose:
            self._results.commit(now, count=False)

    def _read(self, run: SiteRun, now: Pass) -> list[tuple[str, Attention]]:
        """What a run gave, by name: of most modules one, else `name`, `name#2`, …"""
        options, results = self._options, self._results
        if isinstance(now.trace, str):
            raise CaptureError(now.trace)
        settled = settle(run, options.kernel_source)
        if run.before is not None and len(settled) > 1:
            raise CaptureError(
                f"made {len(settled)} attention kernel calls in one run, and which projections "
                'belong to which is not known; leave out rope=False and source="projection"'
            )
        outside = results.adopted.get(run.site.name) is run.site
        given = []
        for number, (reading, attention) in enumerate(settled, 1):
            site, source = self._numbered(run.site, number), reading.source
            if options.verify:
                verify_reading(reading)
            if run.before is not None:
                source, attention = "projection", run.before.attention(attention, rope=options.rope)
            attention = self._with_values(attention)
            results.sources[site.name] = source
            # One of several calls outside of sites, or a part of one, may be about any tokens.
            part = "#" in site.name or attention.shape[2] != attention.shape[3]
            known = None if outside and part else now.layout
            info = self._info(site, attention, source, known)
            if now.trace is not None:
                info = now.trace.describe(info, attention.shape)
            elif run.placing is not None:
                info = run.placing.onto(info, attention.shape)
            if reading.intervened:
                info = replace(info, intervened=reading.intervened)
            given.append((site.name, attention.with_site(info)))
        return given

    def _with_values(self, attention: Attention) -> Attention:
        """With values if and only if they were asked for; verifying needs them too."""
        if self._options.values and attention.value is None:
            raise CaptureError(
                "values=True needs the values that its weights are multiplied with, and which they "
                "are is not known; leave out values=True, or this site"
            )
        drop = attention.value is not None and not self._options.values
        return attention.replace(value=None) if drop else attention

    def _numbered(self, site: Site, number: int) -> Site:
        if number == 1:
            return site
        name, path = numbered(site.name, number), numbered(site.path, number)
        second = self._results.adopt(name, lambda: replace(site, name=name, path=path))
        self._results.fired[name] += 1
        return second

    def _info(
        self, site: Site, attention: Attention, source: str, layout: TokenLayout | None
    ) -> SiteInfo:
        cut = self.cuts.get(site.name)
        window = None if cut is None else window_of(*cut, attention)
        # The same from pass to pass, unless pictures change their size.
        key = (attention.shape, source, layout, window)
        last = self._infos.get(site.name)
        if last is None or last[0] != key:
            rope = None if self._options.rope else False
            info = site_info(
                site, attention.shape, source=source, rope=rope, layout=layout, window=window
            )
            last = self._infos[site.name] = (key, info)
        return last[1]
