"""`capture`: run a model as it is, and keep the queries and keys that reach its kernels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from vistvis.attention import Attention
from vistvis.errors import CaptureError, InputError, SiteError, VistvisWarning
from vistvis.hooks.reasons import outside_lines, why_unfired
from vistvis.hooks.results import LayoutOf, Options, ReadFrom, Results, Sink
from vistvis.hooks.watching import Watch
from vistvis.models.sites import (
    Chooser,
    Site,
    SiteList,
    choose_sites,
    find_sites,
    is_torchs,
    table,
)
from vistvis.names import few, html_table
from vistvis.tokens import TokenLayout


def capture(
    model: nn.Module,
    sites: Chooser = None,
    *,
    accumulate: bool = False,
    keep: Literal["cpu"] | None = None,
    source: ReadFrom | None = None,
    rope: bool = True,
    verify: bool = False,
    values: bool = False,
    sink: Sink | None = None,
    layout: TokenLayout | LayoutOf | Literal["trace"] | None = None,
    names: Mapping[str, str] | None = None,
    discover: bool = False,
) -> Capture:
    """Capture the attention of chosen sites while the model runs.

    Parameters
    ----------
    model
        Any `nn.Module`. It is not changed: its output is the same bit for bit, and nothing is left
        on it afterwards.
    sites
        A glob over dotted names (`*` within one part, `**` any number of parts), a list of names or
        globs, a predicate over `Site`, or None for every site that can be read, and with them what
        else a pass shows: a kernel call in code that no site's forward reaches is kept under the
        name of the module that ran, a second one of that pass as `name#2`.
    accumulate
        Keep every forward pass: `captured[name]` is then a list. Otherwise the last pass wins.
    keep
        "cpu" moves Q and K (and V) to host memory while the model runs on.
    source
        Force how sites are read: "kernel", "softmax", "module" or "projection".
    rope
        False takes queries and keys before their rotary embedding (`site.rope` is then False).
    verify
        Recompute `weights @ V` for a sample of rows and compare with what the kernel returned.
    values
        Keep what the weights are multiplied with too, as `attention.value` `(B, h_v, Nk, dv)`: of
        the kernel, before the output projection, with as few heads as the model gives it. A site
        where they can't be told is an error then.
    sink
        Called with `(name, attention)` as soon as a site has run; nothing is kept then.
    layout
        A token layout, or a function of `(model, args, kwargs)` of each pass; by default what
        `TokenLayout.from_model` knows. "trace" measures it, as `trace_layout` does, in the first
        pass with pictures of a size: some 20 to 40 forwards more.
    names
        Dotted name → the name that a site goes by, in the capture, its report, the sink and
        `site.name`; `site.path` keeps the dotted one. Look-ups and globs take either. Sites that
        are named come first, in the order of `names`.

    Returns
    -------
    A context manager and a mapping from site name to `Attention`, in model order. Its hooks are on
    from this call until `close()` or the end of the `with` block; a capture that nobody holds any
    more is over, too, and what it left on the model goes with the next forward. A pass belongs to
    the captures opened in its thread; with none there, to the one that is open. What
    `torch.export` or `torch.jit.trace` runs is no pass.

    Raises
    ------
    SiteError
        If a name or glob matches nothing, or names a site that can't be read exactly.
    InputError
        If an option has another value, or `names` gives one name to two sites.
    CaptureError
        If the model can't be captured at all (`DataParallel`, TorchScript). At access or at the end
        of the block: a site that never ran, ran twice in a pass, or made a kernel call that can't
        be turned into exact weights; a pass in a thread that opened none of several captures. With
        `sites=None`, a site that only ran twice, or that only the pass has shown, is a warning
        there.

    Cost: some 0.5 ms of Python a site and pass (measured: 1 to 3 % of a forward of VGGT on a CPU),
    and for the first of several passes the system's time to give memory for Q and K, on a CPU 2 to
    3 % more. `discover` follows every torch function outside of sites: some µs each. Memory: Q and
    K of the chosen sites (weights where eager code has only those), and V if asked for.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"capture needs an nn.Module, got {type(model).__name__}")
    asked = sites is not None
    options = Options(accumulate, keep, source, rope, verify, values, sink, layout, discover, asked)
    _check_model(model)
    every = find_sites(model).named(names or {})
    # What code does not show, a pass may.
    waits = not (every or asked or all(is_torchs(module) for module in model.modules()))
    return Capture(model, every, every if waits else choose_sites(every, sites), options)


class Capture(Mapping[str, Attention]):
    """Captured attention by site name, in model order; made by `capture`.

    A site that could not be read is in the mapping too, and raises the reason; but for one that ran
    several times in a pass and was not asked for: that one only raises it when it is looked up.
    """

    def __init__(
        self, model: nn.Module, every: SiteList, chosen: SiteList, options: Options
    ) -> None:
        self._model, self._every, self._options = model, every, options
        self._chosen = {site.name: site for site in chosen}
        self._names = {site.path: site.name for site in chosen}
        self._results = Results(self._chosen, accumulate=options.accumulate)
        self._told: set[str] = set()
        self._released = False
        self._watch = Watch(model, every, chosen, options, self._results)

    # -- life cycle ------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Whether the model is being watched."""
        return self._watch.open

    def remove(self) -> None:
        """Take everything off the model; what was captured stays."""
        self._watch.remove()

    def close(self) -> None:
        """Take everything off the model and let go of what was captured."""
        self.remove()
        self._watch.events.clear()
        self._results.attention.clear()
        self._released = True

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.remove()
        if error is None:
            self._watch.drain()
            self._raise_untold()

    def _check_clear(self) -> None:
        if self._watch.claim.unclear:
            self._told.add("")
            raise CaptureError(self._watch.claim.unclear)

    def _raise_untold(self) -> None:
        if "" not in self._told:
            self._check_clear()
        errors, fired = self._results.errors, self._results.fired
        untold = {n: text for n, text in errors.items() if n not in self._told}
        if untold:
            self._told.update(untold)
            lines = [f"site {name!r}: {text}" for name, text in list(untold.items())[:5]]
            more = f"; and {len(untold) - 5} more sites" if len(untold) > 5 else ""
            # A head that iterates, and that nobody asked for, does not spoil the rest.
            rest = any(count and name not in errors for name, count in fired.items())
            soft = self._results.repeated | self._results.adopted.keys()
            if self._options.asked or not rest or not untold.keys() <= soft:
                raise CaptureError("; ".join(lines) + more)
            warnings.warn("; ".join(lines) + more, VistvisWarning, stacklevel=3)
        if self.passes and not any(fired.values()):
            raise CaptureError(self._why_nothing())

    # -- the mapping -----------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Attention:
        self._watch.drain()
        site = self._site(name)
        if self._released:
            raise CaptureError(f"site {name!r}: this capture was closed and let go of its data")
        self._check_clear()
        if site.name in self._results.errors:
            self._told.add(site.name)
            raise CaptureError(f"site {name!r}: {self._results.errors[site.name]}")
        passes = self._results.attention.get(site.name)
        if not passes:
            self._told.add(site.name)
            raise CaptureError(f"site {name!r} {self._why_missing(site)}")
        # With accumulate=True a list, as documented; the mapping's type says the usual case.
        return list(passes) if self._options.accumulate else passes[-1]  # type: ignore[return-value]

    def __iter__(self) -> Iterator[str]:
        names = self._held()
        self._check_clear()
        if not names and self._options.sink is None:
            if self._released:
                raise CaptureError("this capture was closed and let go of its data")
            raise CaptureError(f"nothing was captured: {self._why_nothing()}")
        return iter(names)

    def __len__(self) -> int:
        return len(self._held())

    def __contains__(self, name: object) -> bool:
        return self._names.get(str(name), name) in self._held()

    def _held(self) -> list[str]:
        """Sites that gave something in what is kept: attention, or a reason why there is none."""
        self._watch.drain()
        results = self._results
        names = [n for n in self._sites if n in results.attention or n in results.errors]
        # Heads that iterate, and that nobody asked for, are told of, and don't spoil a walk.
        rest = [n for n in names if n not in results.repeated]
        return names if self._options.asked else rest or names

    def _site(self, name: object) -> Site:
        if not isinstance(name, str):
            some = few(list(self._chosen))
            raise InputError(f"a site is named by a string, got {name!r}; there are {some}")
        site = self._sites.get(self._names.get(name, name))
        if site is None:
            choose_sites(self._every, [name])  # raises with the nearest names
            raise SiteError(
                f"site {name!r} was not chosen for this capture: it has "
                f"{', '.join(list(self._chosen)[:4])}{', …' if len(self._chosen) > 4 else ''}"
            )
        return site

    @property
    def _sites(self) -> dict[str, Site]:
        """The chosen sites, then those that only a pass has shown."""
        return {**self._chosen, **self._results.adopted}

    def _outside(self) -> list[str]:
        return outside_lines(self._model, self._results.outside, self._every)

    def _why_nothing(self) -> str:
        """Why no site has anything, and what was seen outside of them."""
        fired = any(self._results.fired.values())
        if self._chosen and (fired or not self.passes):
            site = next(iter(self._chosen.values()))
            return f"site {site.name!r} {self._why_missing(site)}"
        if not self.passes and not self.failed_passes:
            return "the model was not run while it was captured; run it"
        if self._chosen:
            site = next(iter(self._chosen.values()))
            why = (
                f"none of the {len(self._chosen)} chosen sites ran in {self.passes} forward "
                f"pass(es), {site.name!r} for one: {why_unfired(self._model, site)}"
            )
        else:
            why = (
                f"no kernel call that can be read in {self.passes} forward pass(es), and no module "
                "whose own code reaches one"
                + ("" if self._options.discover else "; discover=True looks into all code")
            )
        return "; ".join([why, *self._outside()])

    def _why_missing(self, site: Site) -> str:
        fired = self._results.fired[site.name]
        if self._results.last_failed:
            return (
                f"has nothing: the last forward pass failed ({self.failed_passes} of "
                f"{self.passes + self.failed_passes} ended in an exception)"
            )
        if not self.passes and not fired:
            return "has nothing: the model was not run while it was captured; run it"
        if self._options.sink is not None and fired:
            return "was handed to the sink and not kept"
        if fired:
            return f"did not run in the last of {self.passes} forward passes"
        return f"did not run in {self.passes} forward passes: {why_unfired(self._model, site)}"

    @property
    def passes(self) -> int:
        """How many forward passes of the model have ended."""
        return self._results.passes

    @property
    def failed_passes(self) -> int:
        """How many of them ended in an exception; what they captured is not kept."""
        return self._results.failed_passes

    @property
    def sites(self) -> SiteList:
        """The chosen sites, and those that only a pass has shown."""
        return SiteList(self._sites.values())

    @property
    def nbytes(self) -> int:
        """Bytes held by everything captured."""
        return sum(one.nbytes for held in self._results.attention.values() for one in held)

    def report(self) -> str:
        """A table: every site, how often it ran, how it was read, and what went wrong.

        Below it, what was seen outside: every kernel call of the passes is in one or the other.
        """
        self._watch.drain()
        results = self._results
        head = (
            f"{len(self._chosen)} sites expected, "
            + (f"{len(results.adopted)} more seen, " if results.adopted else "")
            + f"{len(results.attention)} captured, "
            f"{self.passes} forward passes"
            + (f", {self.failed_passes} failed" if self.failed_passes else "")
            + (" (still watching)" if self.attached else "")
            + (f"\n{self._watch.claim.unclear}" if self._watch.claim.unclear else "")
        )
        return "\n".join([head, table(self._rows()), *self._outside()])

    def _rows(self) -> Sequence[tuple[str, ...]]:
        """Every site, and what came of it."""
        self._watch.drain()
        results = self._results
        rows = [("site", "module", "ran", "read from", "result")]
        for name, site in self._sites.items():
            if name in results.errors:
                outcome = f"error: {results.errors[name]}"
            elif name in results.attention:
                passes = results.attention[name]
                last = "×".join(map(str, passes[-1].shape))
                outcome = f"{len(passes)} × {last}" if self._options.accumulate else last
            else:
                outcome = f"nothing: {self._why_missing(site)}"
            source = results.sources.get(name, site.source)
            rows.append((name, site.type, str(results.fired[name]), source, outcome))
        for site in self._every:
            if site.refused:
                rows.append((site.name, site.type, "–", "–", f"refused: {site.refused}"))
        return rows

    def __repr__(self) -> str:
        return (
            f"Capture({len(self._results.attention)} of {len(self._sites)} sites of "
            f"{type(self._model).__name__}, {self.nbytes / 2**20:.1f} MB"
            f"{', watching' if self.attached else ''})"
        )

    def _repr_html_(self) -> str:
        return html_table(self._rows(), caption=repr(self))


def _check_model(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(model).__name__} is TorchScript, which shows no kernel call; capture the "
            "Python model that it was made from"
        )
    for name, module in model.named_modules():
        if isinstance(module, nn.DataParallel):
            raise CaptureError(
                f"{name or 'the model'} is nn.DataParallel, which runs on copies of the model; "
                "capture its .module on one device, or use DistributedDataParallel"
            )
