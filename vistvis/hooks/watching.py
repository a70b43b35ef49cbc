"""Watching a model that runs: where passes begin and end, which site runs, what its kernels get.

What goes wrong while reading never breaks the user's forward: it is kept with the site.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from vistvis.hooks.account import Account, Outside, aside
from vistvis.hooks.dye import shapes_of
from vistvis.hooks.finishing import Cut, Finisher
from vistvis.hooks.fused import read_call
from vistvis.hooks.kernels import EARS, NAMES, KernelCall, link, listening, unlink
from vistvis.hooks.multihead import (
    MULTIHEAD_FORWARD,
    MultiheadReader,
    encoder_layers,
    fused_modules,
)
from vistvis.hooks.order import Orders
from vistvis.hooks.patching import Forward, Listener, attach, clear
from vistvis.hooks.projections import ProjectionTap
from vistvis.hooks.readings import Keeping, KernelReader, Notes
from vistvis.hooks.results import LayoutOf, Options, Pass, Results
from vistvis.hooks.settling import SiteRun
from vistvis.hooks.steady import steadily
from vistvis.hooks.tap import CompiledTap, Event, Hidden, KernelRan, KernelTap, PassBegan
from vistvis.hooks.trace import Trace, trace_pass
from vistvis.hooks.whose import Claim, exporting, recomputing, symbolic
from vistvis.models.code import reached_names
from vistvis.models.families import ENTRIES
from vistvis.models.layouts import layout_of_inputs
from vistvis.models.sites import Site, SiteList
from vistvis.models.windows import window_cutter
from vistvis.tokens import TokenLayout

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class _ThreadState(threading.local):
    """Where one thread is in the model."""

    def __init__(self) -> None:
        self.tracing = False
        self.running: tuple[object, ...] = ()  # the sites inside each other that run just now
        self.current: Pass | None = None
        self.account: Account | None = None
        self.loose: Pass | None = None
        self.depth = 0


class Watch:
    """Sits on a model and hands what its sites give to `results`, until `remove`.

    Nothing that is on the model keeps it: it goes with its capture, and what it put on the model
    with the next forward.
    """

    def __init__(
        self,
        model: nn.Module,
        every: SiteList,
        sites: SiteList,
        options: Options,
        results: Results,
    ) -> None:
        self._model, self._options, self._results = model, options, results
        self._sites = {site.name: site for site in sites}
        self._keeping = Keeping(options.keep, options.values or options.verify, options.verify)
        self._state = _ThreadState()
        self.events: list[Event] = []
        """What compiled code noted and nobody has read yet."""
        self._finisher = Finisher(options, results)
        self._outside = Outside(model, every, sites, options, results, self._keeping)
        self._orders = Orders()
        self._traces: dict[Any, Trace | str] = {}
        self._touched: dict[Any, None] = {}
        self.claim = Claim(model)
        try:
            self._attach()
        except BaseException:
            self.remove()
            raise

    def _attach(self) -> None:
        inner: nn.Module = getattr(self._model, "_orig_mod", self._model)
        link(self, inner)
        for site in self._sites.values():
            # Inside of what takes accounts aside: PyTorch's own code is read where it is bare.
            runs = _of(Watch._run_site, site)
            self._listen(site.module, runs, self._compiled(site), inside=True)
            cutter = window_cutter(inner, site.path, site.module)
            if cutter is not None:
                self._listen(cutter, _of(Watch._run_cutter, site, cutter))
        modules = {site.module: site for site in self._sites.values()}
        for layer in encoder_layers(self._model, list(modules)):
            runs = _of(Watch._run_encoder, modules[layer.self_attn])
            self._listen(layer, runs, inside=True)
        for module in self._outside.traced():
            self._listen(module, _of(Watch._run_traced, module))
        for module in fused_modules(inner):
            self._listen(module, _of(Watch._run_aside, module))
        events = self.events

        def compiled(original: Forward, args: Args, kwargs: Kwargs) -> Any:
            if not exporting():
                events.append(PassBegan(args, kwargs))
            return original(*args, **kwargs)

        self._listen(self._model, _of(Watch._run_pass, False), compiled)
        for name in entries(self._model):
            self._listen(self._model, _of(Watch._run_pass, True), method=name)
        # Last, so that the listeners above meet the modules' own forwards.
        for owner, run, name in Orders.listeners(inner, list(self._sites.values())):
            self._listen(owner, _of(_on_orders, run), method=name)

    def _listen(
        self,
        module: nn.Module,
        run: Callable[..., Any],
        compiled: Callable[..., Any] | None = None,
        *,
        method: str = "forward",
        inside: bool = False,
    ) -> None:
        # The undo comes first: an interrupt between the two leaves nothing behind.
        self._touched[module] = None
        listener = Listener(weakref.ref(self), run, compiled)
        attach(module, listener, method=method, inside=inside)

    @property
    def open(self) -> bool:
        """False ends it, whatever is still on the model."""
        return self.claim.open

    def remove(self) -> None:
        """Take everything off the model."""
        self.claim.open = False  # from here on nothing listens, whatever comes between
        for module in self._touched:
            clear(module)
        unlink(self._model)

    # -- listeners: what runs in place of a module's own method ----------------------------------

    def _compiled(self, site: Site) -> Callable[..., Any]:
        """What is noted of a site where Dynamo traces it."""
        events, name, keeping = self.events, site.name, self._keeping
        names = reached_names(site.module)
        # Wrapped kernels pass through compiled code unseen.
        wrapped = names & NAMES and "scaled_dot_product_attention" not in names
        hidden = site.source == "module" or wrapped

        def compiled(original: Forward, args: Args, kwargs: Kwargs) -> Any:
            if exporting():
                return original(*args, **kwargs)
            if hidden:
                events.append(Hidden(name))
                return original(*args, **kwargs)
            with CompiledTap(events, name, keeping.values, keeping.outputs):
                return original(*args, **kwargs)

        return compiled

    def _run_cutter(
        self, site: Site, cutter: nn.Module, original: Forward, args: Args, kwargs: Kwargs
    ) -> Any:
        """On a block that cuts windows for a site: notes the grid that it cuts."""
        if args and isinstance(args[0], Tensor):
            sizes = args[1] if len(args) > 1 else kwargs.get("input_dimensions")
            self._finisher.cuts[site.name] = Cut(cutter, tuple(args[0].shape), sizes)
        return original(*args, **kwargs)

    def _run_encoder(self, site: Site, original: Forward, args: Args, kwargs: Kwargs) -> Any:
        """On an encoder layer whose fused path skips the forward of its attention module."""
        reader = MultiheadReader(self._keeping)
        if self._idle() or not reader.can_run(original):
            return original(*args, **kwargs)

        def run() -> Any:
            out = reader.run(original, args, kwargs)
            if reader.notes.readings:
                self._finish(SiteRun(site, reader.notes))
            return out

        return self._steadily(run)

    def _run_traced(self, module: nn.Module, original: Forward, args: Args, kwargs: Kwargs) -> Any:
        """On a module that is no site, whose eager code may be attention all the same."""
        account = self._state.account
        if account is None or self._state.running:
            return original(*args, **kwargs)
        with account.tracing(module):
            return original(*args, **kwargs)

    def _run_aside(self, module: nn.Module, original: Forward, args: Args, kwargs: Kwargs) -> Any:
        """On a module that runs otherwise under a function mode: it runs without the account."""
        account = self._state.account
        if account is None:
            return original(*args, **kwargs)

        def run() -> Any:
            with aside():
                return original(*args, **kwargs)

        out = self._steadily(run)
        if not self._state.running:
            account.ran(module)
        return out

    # -- passes ----------------------------------------------------------------------------------

    def _steadily(self, run: Callable[[], Any]) -> Any:
        return steadily(run, self._state, self._orders, EARS)

    def _run_pass(self, entry: bool, original: Forward, args: Args, kwargs: Kwargs) -> Any:
        state = self._state
        # An entry method that calls `forward` (say, a decoding loop) leaves passes to it.
        inside = state.depth > 0 or (entry and state.current is not None)
        if inside or self._idle():
            return original(*args, **kwargs)
        outermost = state.current is None
        try:
            return self._steadily(partial(self._pass, entry, original, args, kwargs))
        except BaseException:
            self._results.fail()
            raise
        finally:
            if outermost:
                self._results.end()
                self._keeping.masks.clear()

    def _pass(self, entry: bool, original: Forward, args: Args, kwargs: Kwargs) -> Any:
        state, results, outer = self._state, self._results, self._state.current
        if outer is None:
            self.drain()  # what compiled passes noted before this one is not this one's
            results.begin()
            trace = self._trace(original, args, kwargs)
            if type(self._model).__name__ != "OptimizedModule":
                state.account = Account(self._outside, self._unclaimed, self._now, self._finish)
        else:
            trace = None
        mine = state.current = Pass(self._layout_of(args, kwargs), trace)
        state.depth += not entry
        account = state.account if outer is None else None
        ears = listening(self, account.hear) if account else nullcontext()
        with self._orders.passing(mine.layout), ears, account or nullcontext():
            out = original(*args, **kwargs)
        self.drain(mine)
        state.depth -= not entry
        state.current = outer
        if outer is None:
            state.account = None
        if not entry or mine.ran:
            results.commit(mine)
        return out

    def _current(self, name: str) -> Pass:
        """This thread's pass; outside of the root's forward a loose one, new if a site repeats."""
        state = self._state
        if state.current is not None and not state.current.loose:
            return state.current
        loose = state.loose
        if loose is None or name in loose.ran:
            loose = state.loose = Pass(loose=True)
            self._results.passes += 1
        return loose

    def _trace(self, original: Forward, args: Args, kwargs: Kwargs) -> Trace | str | None:
        """The dye test that `layout="trace"` asks for: once for pictures of one shape."""
        if self._options.layout != "trace":
            return None
        shapes = shapes_of((args, kwargs))
        if shapes not in self._traces:
            self._state.tracing = True
            sites = SiteList(self._sites.values())
            self._traces[shapes] = trace_pass(self._model, sites, original, args, kwargs)
            self._state.tracing = False
        return self._traces[shapes]

    def _idle(self) -> bool:
        """Whether what runs now is no pass of this capture: it is a backward pass, a dye test, an
        export, or another capture's."""
        state = self._state
        if recomputing() or state.tracing or symbolic():
            return True
        return state.current is None and not self.claim.holds()

    def _unclaimed(self) -> bool:
        """Whether a kernel call of this thread is no running site's."""
        return not self._state.running and not recomputing()

    def _now(self) -> Pass:
        return self._current("")

    def _finish(self, run: SiteRun) -> None:
        with aside():  # what is computed here is not the model's
            self._finisher.finish(run, self._current(run.site.name))

    def drain(self, into: Pass | None = None) -> None:
        """Read what compiled code noted, into a pass that is running or passes of their own."""
        if not self.events:
            return
        with self._results.lock:
            self._steadily(partial(self._drain, into))

    def _drain(self, into: Pass | None) -> None:
        events, self.events[:] = list(self.events), []
        if not self.claim.holds_compiled():
            return
        done = into or Pass()
        outer, self._state.current = self._state.current, done
        for event in events:
            if not isinstance(event, PassBegan):
                site = self._sites[event.site]
                self._finish(SiteRun(site, _notes_of(event, site, self._keeping)))
            elif into is None:
                if done.ran:
                    self._results.commit(done)
                done = self._state.current = Pass(self._layout_of(*event))
        self._state.current = outer
        if into is None:
            self._results.commit(done)

    def _run_site(self, site: Site, original: Forward, args: Args, kwargs: Kwargs) -> Any:
        if self._idle():
            return original(*args, **kwargs)
        return self._steadily(partial(self._read_site, site, original, args, kwargs))

    def _read_site(self, site: Site, original: Forward, args: Args, kwargs: Kwargs) -> Any:
        self._results.make_room(site.name)
        multihead = MultiheadReader(self._keeping)
        if multihead.can_run(original):
            out = multihead.run(original, args, kwargs)
            placing = self._orders.of(site, args, kwargs)
            self._finish(SiteRun(site, multihead.notes, placing=placing))
            return out
        sizes = _sizes(args, kwargs)
        batch = sizes[0] if sizes else None
        state, outer, mark = self._state, self._state.running, object()
        reader = KernelReader(self._keeping, site.heads, batch, site.traits.heads_at)
        notes = multihead.notes

        def hear(call: KernelCall) -> None:
            notes.take("kernel", lambda: read_call(*call, reader))

        tap = KernelTap(
            reader,
            notes,
            active=lambda: state.running[-1] is mark,
            instead={MULTIHEAD_FORWARD: multihead.multi_head_attention},
        )
        before = ProjectionTap(site.module) if self._options.projections else None
        state.running = (*outer, mark)
        with before or nullcontext(), tap, listening(self, hear):
            out = original(*args, **kwargs)
        state.running = outer
        returned = _sizes(out if isinstance(out, (tuple, list)) else (out,), {})
        placing = self._orders.of(site, args, kwargs)
        self._finish(SiteRun(site, notes, sizes, returned, before, placing))
        return out

    def _layout_of(self, args: Args, kwargs: Kwargs) -> TokenLayout | None:
        layout = self._options.layout
        return None if layout == "trace" else layout_of_pass(self._model, layout, args, kwargs)


def layout_of_pass(
    model: nn.Module, layout: TokenLayout | LayoutOf | None, args: Args, kwargs: Kwargs
) -> TokenLayout | None:
    """The layout that was given for a pass, or what is known of the model; None if nothing is."""
    if isinstance(layout, TokenLayout):
        return layout
    try:
        return (layout or layout_of_inputs)(model, args, kwargs)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError):
        return None  # nothing is known of this model: weights are exact all the same


def _of(run: Callable[..., Any], *what: Any) -> Callable[..., Any]:
    """What a listener runs: a method of the watch, with what it is about before the call."""

    def around(watch: Watch, *call: Any) -> Any:
        return run(watch, *what, *call)

    return around


def _on_orders(watch: Watch, run: Callable[..., Any], *call: Any) -> Any:
    return run(watch._orders, *call)


def _notes_of(event: KernelRan | Hidden, site: Site, keeping: Keeping) -> Notes:
    notes = Notes()
    if isinstance(event, Hidden):
        notes.problems.append(f"{site.type} can't be read in compiled code")
    else:
        reader = KernelReader(keeping, site.heads, None, site.traits.heads_at)
        notes.take("kernel", lambda: reader.sdpa(event.call, event.out, event.autocast))
    return notes


def entries(model: nn.Module) -> list[str]:
    """Methods that are ways into the model beside `forward`."""
    names = []
    for name in dir(type(model)):
        if name.startswith(ENTRIES) and not hasattr(nn.Module, name):
            method = inspect.getattr_static(type(model), name, None)
            if callable(method) and not isinstance(method, type):
                names.append(name)
    return names


def _sizes(args: Sequence[Any], kwargs: Kwargs) -> tuple[int, ...]:
    """The shape of a module's input, its first tensor of three or more dimensions; else ()."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and not value.is_nested and value.ndim >= 3:
            return tuple(value.shape)
    return ()
