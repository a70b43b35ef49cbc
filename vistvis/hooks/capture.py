"""`capture`: run a model as it is, and keep the queries and keys that reach its attention kernels.

    with vistvis.capture(model, "blocks.*.attn") as captured:
        model(x)
    captured["blocks.11.attn"].rows(0)

While a chosen module runs, a function mode sees the kernel calls it makes; outside of them nothing
is watched, and nothing is replayed. What goes wrong while reading never breaks the user's forward:
it is kept, and raised where the site is asked for or when the block ends.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from vistvis.attention import Attention
from vistvis.attention.site import SiteInfo, WindowInfo
from vistvis.errors import CaptureError, InputError, LayoutError, SiteError
from vistvis.hooks.kernels import (
    SDPA,
    Keeping,
    KernelTap,
    Reading,
    SdpaCall,
    error_text,
    over_tokens,
    read_sdpa,
    stack_heads,
    unpack_groups,
)
from vistvis.hooks.multihead import MULTIHEAD_FORWARD, MultiheadReader, encoder_layers
from vistvis.hooks.patching import Forward, attach, detach
from vistvis.hooks.projections import ProjectionTap
from vistvis.hooks.verify import verify_reading
from vistvis.models.sites import (
    HEAD_BY_HEAD,
    UNREADABLE,
    Chooser,
    Site,
    SiteList,
    choose_sites,
    find_sites,
    layout_from_model,
    reached_names,
)
from vistvis.models.windows import window_of, window_owner
from vistvis.tokens import TokenLayout

Describe = Callable[[SiteInfo], SiteInfo]
LayoutOf = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], "TokenLayout | None"]
Source = Literal["kernel", "softmax", "module", "projection"]

# Ways into a model besides `forward`; a call of one is a pass of its own.
_ENTRIES = ("forward_", "encode_", "get_image_", "get_text_", "get_intermediate_", "extract_")


def capture(
    model: nn.Module,
    sites: Chooser = None,
    *,
    accumulate: bool = False,
    keep: Literal["cpu"] | None = None,
    source: Source | None = None,
    rope: bool = True,
    verify: bool = False,
    sink: Callable[[str, Attention], None] | None = None,
    layout: TokenLayout | LayoutOf | None = None,
    describe: Describe | None = None,
) -> Capture:
    """Capture the attention of chosen sites while the model runs.

    Parameters
    ----------
    model
        Any `nn.Module`. It is not changed: its output is the same bit for bit, and nothing is left
        on it afterwards.
    sites
        A glob over dotted names (`*` within one part, `**` any number of parts), a list of names or
        globs, a predicate over `Site`, or None for every site that can be read.
    accumulate
        Keep every forward pass: `captured[name]` is then a list. Otherwise the last pass wins.
    keep
        "cpu" moves Q and K to host memory while the model runs on.
    source
        Force how sites are read: "kernel", "softmax", "module" or "projection".
    rope
        False takes queries and keys before their rotary embedding (`site.rope` is then False).
    verify
        Recompute `weights @ V` for a sample of rows and compare with what the kernel returned.
    sink
        Called with `(name, attention)` as soon as a site has run; nothing is kept then.
    layout
        A token layout, or a function of `(model, args, kwargs)` of each pass; by default what
        `TokenLayout.from_model` knows.
    describe
        Changes the description of a site, such as its name: `info -> info`.

    Returns
    -------
    Capture
        A context manager and a mapping from site name to `Attention`, in model order. Its hooks are
        on from this call until `close()` or the end of the `with` block.

    Raises
    ------
    SiteError
        If a name or glob matches nothing, or names a site that can't be read exactly.
    CaptureError
        If the model can't be captured at all (`DataParallel`, TorchScript). At access or at the end
        of the block: a site that never ran, ran twice in a pass, or made a kernel call that can't
        be turned into exact weights.

    Cost: some 0.5 ms of Python a site and pass (measured: 1 to 3 % of a forward of VGGT on a CPU),
    and for the first of several passes the system's time to give memory for Q and K, on a CPU 2 to
    3 % more. Memory: Q and K of the chosen sites (weights where eager code has only those).
    """
    return Capture(
        model,
        sites,
        accumulate=accumulate,
        keep=keep,
        source=source,
        rope=rope,
        verify=verify,
        sink=sink,
        layout=layout,
        describe=describe,
    )


@dataclass
class _Pass:
    """One forward of the root module: what its sites gave."""

    layout: TokenLayout | None = None
    loose: bool = False
    results: dict[str, list[Attention]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    ran: dict[str, int] = field(default_factory=dict)


@dataclass
class _Run:
    """One site while it runs."""

    site: Site


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.stack: list[_Run] = []
        self.grids: dict[str, tuple[tuple[int, ...], Any]] = {}
        self.current: _Pass | None = None
        self.loose: _Pass | None = None
        self.depth = 0


class _SiteListener:
    def __init__(self, owner: Capture, site: Site) -> None:
        self.owner, self.site = owner, site

    def around(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            if self.site.source == "module":
                self.owner._pending.append(("hidden", self.site.name, None, None))
                return original(*args, **kwargs)
            with _CompiledTap(self.owner._pending, self.site.name, self.owner._verify):
                return original(*args, **kwargs)
        return self.owner._run_site(self.site, original, args, kwargs)


class _RootListener:
    def __init__(self, owner: Capture) -> None:
        self.owner = owner

    def around(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            self.owner._pending.append(("pass", "", args, kwargs))
            return original(*args, **kwargs)
        return self.owner._run_root(original, args, kwargs)


class _OwnerListener:
    """On a block that cuts windows for a site: notes the grid that it cuts."""

    def __init__(self, owner: Capture, site: Site) -> None:
        self.owner, self.site = owner, site

    def around(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.compiler.is_compiling() and args and isinstance(args[0], torch.Tensor):
            sizes = args[1] if len(args) > 1 else kwargs.get("input_dimensions")
            self.owner._state.grids[self.site.name] = (tuple(args[0].shape), sizes)
        return original(*args, **kwargs)


class _EncoderListener:
    """On an encoder layer whose fused path skips the forward of its attention module."""

    def __init__(self, owner: Capture, site: Site) -> None:
        self.owner, self.site = owner, site

    def around(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reader = MultiheadReader(self.owner._keeping)
        if torch.compiler.is_compiling() or not reader.can_run(original):
            return original(*args, **kwargs)
        out = reader.run(original, args, kwargs)
        if reader.readings:
            self.owner._finish_safely(self.site, reader.readings, reader.problems)
        return out


class _EntryListener:
    def __init__(self, owner: Capture) -> None:
        self.owner = owner

    def around(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        return self.owner._run_entry(original, args, kwargs)


class _CompiledTap(torch.overrides.TorchFunctionMode):
    """Inside compiled code: only notes the kernel's arguments; they are read afterwards."""

    def __init__(self, pending: list[Any], name: str, values: bool) -> None:
        super().__init__()
        self.pending, self.name, self.values = pending, name, values

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is SDPA:
            call = SdpaCall(*args, **kwargs)
            kind = call.query.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            if self.values:
                self.pending.append(("kernel", self.name, call, (out, dtype)))
            else:  # values and output would be kept alive for nothing
                call = call._replace(value=call.key)
                self.pending.append(("kernel", self.name, call, (None, dtype)))
        return out


class Capture(Mapping[str, Attention]):
    """Captured attention by site name, in model order; made by `capture`.

    `captured[name]` is an `Attention` (a list of them with `accumulate=True`). `report()` says what
    was expected, what ran, how often, and what did not and why.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Chooser,
        *,
        accumulate: bool,
        keep: str | None,
        source: str | None,
        rope: bool,
        verify: bool,
        sink: Callable[[str, Attention], None] | None,
        layout: TokenLayout | LayoutOf | None,
        describe: Describe | None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"capture needs an nn.Module, got {type(model).__name__}")
        if keep not in (None, "cpu"):
            raise InputError(f'keep is None or "cpu", got {keep!r}')
        if source not in (None, "kernel", "softmax", "module", "projection"):
            raise InputError(
                f'source is "kernel", "softmax", "module" or "projection", got {source!r}'
            )
        _check_model(model)
        self._model = model
        self._all = find_sites(model)
        chosen = choose_sites(self._all, sites)
        self._chosen = {site.name: site for site in chosen}
        self._accumulate, self._rope, self._verify = accumulate, rope, verify
        self._source = "projection" if not rope else source
        self._sink, self._layout, self._describe = sink, layout, describe
        self._keeping = Keeping(keep, verify)
        self._pending: list[tuple[str, str, Any, Any]] = []
        self._state = _ThreadState()
        self._lock = threading.RLock()
        self._results: dict[str, list[Attention]] = {}
        self._outgoing: dict[str, list[Attention]] = {}
        self._infos: dict[str, tuple[Any, SiteInfo]] = {}
        self._errors: dict[str, str] = {}
        self._told: set[str] = set()
        self._fired: dict[str, int] = dict.fromkeys(self._chosen, 0)
        self._sources: dict[str, str] = {}
        self.passes = 0
        """How many forward passes of the model have ended."""
        self.failed_passes = 0
        """How many of them ended in an exception; what they captured is not kept."""
        self._last_failed = False
        self._owners: dict[str, nn.Module] = {}
        self._inner: nn.Module = getattr(model, "_orig_mod", model)
        self._undo: list[Callable[[], None]] = []
        self._released = False
        try:
            self._attach()
        except BaseException:
            self.remove()
            raise

    # -- life cycle ----------------------------------------------------------------------------

    def _attach(self) -> None:
        for site in self._chosen.values():
            self._listen(site.module, _SiteListener(self, site))
            owner = window_owner(self._inner, site.name, site.module)
            if owner is not None:
                self._owners[site.name] = owner
                self._listen(owner, _OwnerListener(self, site))
        modules = {site.module: site for site in self._chosen.values()}
        for layer in encoder_layers(self._model, list(modules)):
            self._listen(layer, _EncoderListener(self, modules[layer.self_attn]))
        self._listen(self._model, _RootListener(self))
        for name in _entries(self._model):
            self._listen(self._model, _EntryListener(self), name)

    def _listen(self, module: nn.Module, listener: Any, method: str = "forward") -> None:
        # The undo comes first: an interrupt between the two leaves nothing behind.
        self._undo.append(lambda: detach(module, listener, method=method))
        attach(module, listener, method=method)

    @property
    def attached(self) -> bool:
        """Whether the model is being watched."""
        return bool(self._undo)

    def remove(self) -> None:
        """Take everything off the model; what was captured stays."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def close(self) -> None:
        """Take everything off the model and let go of what was captured."""
        self.remove()
        self._results.clear()
        self._infos.clear()
        self._pending.clear()
        self._released = True

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.remove()
        if error is None:
            self._drain()
            self._raise_untold()

    def _raise_untold(self) -> None:
        untold = {name: text for name, text in self._errors.items() if name not in self._told}
        if untold:
            self._told.update(untold)
            lines = [f"site {name!r}: {text}" for name, text in list(untold.items())[:5]]
            more = f"; and {len(untold) - 5} more sites" if len(untold) > 5 else ""
            raise CaptureError("; ".join(lines) + more)
        if self.passes and not any(self._fired.values()):
            name = next(iter(self._chosen))
            raise CaptureError(
                f"none of the {len(self._chosen)} chosen sites ran in {self.passes} forward "
                f"pass(es), {name!r} for one: {self._why_unfired(name)}"
            )

    # -- while the model runs ------------------------------------------------------------------

    def _run_root(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = self._state
        if _recomputing() or state.depth > 0:
            return original(*args, **kwargs)
        return self._run_pass(original, args, kwargs)

    def _run_entry(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # An entry method that calls `forward` (say, a decoding loop) leaves passes to it.
        state = self._state
        if _recomputing() or state.depth > 0 or state.current is not None:
            return original(*args, **kwargs)
        return self._run_pass(original, args, kwargs, entry=True)

    def _run_pass(
        self,
        original: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        entry: bool = False,
    ) -> Any:
        state = self._state
        outer = state.current
        if outer is None:
            self._drain()  # what compiled passes noted before this one is not this one's
            if not self._accumulate:
                # The last pass wins. What the one before took makes room site by site: freed at
                # once, its pages went back to the system and cost their way in again.
                with self._lock:
                    self._outgoing, self._results, self._errors = self._results, {}, {}
        mine = state.current = _Pass(self._layout_of(args, kwargs))
        state.depth += not entry
        try:
            out = original(*args, **kwargs)
        except BaseException:
            self.failed_passes += 1
            self._last_failed = True
            raise
        else:
            self._drain(mine)
            if not entry or mine.ran:
                self._commit(mine)
            return out
        finally:
            state.depth -= not entry
            state.current = outer
            if outer is None:
                self._outgoing = {}
                self._keeping.masks.clear()

    def _run_site(
        self, site: Site, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if _recomputing():
            return original(*args, **kwargs)
        self._outgoing.pop(site.name, None)
        run = _Run(site)
        stack = self._state.stack
        reader = MultiheadReader(self._keeping)
        if reader.can_run(original):
            out = reader.run(original, args, kwargs)
            self._finish_safely(site, reader.readings, reader.problems)
            return out
        sizes = _sizes(args, kwargs)
        tap = KernelTap(
            heads=site.heads,
            batch=sizes[0] if sizes else None,
            keeping=self._keeping,
            active=lambda: stack[-1] is run,
            instead={MULTIHEAD_FORWARD: reader.multi_head_attention},
            heads_at=site.heads_at,
        )
        before = ProjectionTap(site.module, site.heads) if self._source == "projection" else None
        stack.append(run)
        try:
            if before is not None:
                with before, tap:
                    out = original(*args, **kwargs)
            else:
                with tap:
                    out = original(*args, **kwargs)
        finally:
            stack.pop()
        readings, problems = tap.readings + reader.readings, tap.problems + reader.problems
        readings = [over_tokens(reading, sizes) for reading in readings]
        self._finish_safely(site, readings, problems, before)
        return out

    def _finish_safely(
        self,
        site: Site,
        readings: list[Reading],
        problems: list[str],
        before: ProjectionTap | None = None,
    ) -> None:
        try:
            with torch.no_grad():
                self._finish(site, readings, problems, before)
        except Exception as error:  # kept for access: the user's forward goes on
            self._current(site.name).errors[site.name] = error_text(error)

    def _finish(
        self,
        site: Site,
        readings: list[Reading],
        problems: list[str],
        before: ProjectionTap | None = None,
    ) -> None:
        now = self._current(site.name)
        now.ran[site.name] = now.ran.get(site.name, 0) + 1
        self._fired[site.name] += 1
        if now.ran[site.name] > 1 and not self._accumulate:
            now.errors.setdefault(
                site.name,
                f"ran {now.ran[site.name]} times in one forward pass (a shared module?); "
                "use accumulate=True for a list",
            )
            now.results.pop(site.name, None)
            return
        try:
            groups = getattr(site.module, "num_key_value_groups", None)
            reading = unpack_groups(self._one(site, readings, problems), site.heads, groups)
            attention = reading.attention
            if attention is None:
                raise CaptureError(reading.error)
            if self._verify:
                verify_reading(reading)
            if before is not None:
                attention = before.attention(attention, rope=self._rope)
        except Exception as error:
            now.errors.setdefault(site.name, error_text(error))
            return
        source = "projection" if before is not None else reading.source
        self._sources[site.name] = source
        attention = attention.with_site(self._info(site, attention, source, now.layout))
        if self._sink is not None:
            self._sink(site.name, attention)
        else:
            now.results.setdefault(site.name, []).append(attention)
        if now.loose:
            self._commit(now, count=False)

    def _one(self, site: Site, readings: list[Reading], problems: list[str]) -> Reading:
        forced = {"projection": None}.get(str(self._source), self._source)
        sources = {reading.source for reading in readings}
        if forced is None and "kernel" in sources:
            readings = [reading for reading in readings if reading.source == "kernel"]
        elif forced is not None:
            readings = [reading for reading in readings if reading.source == forced]
            if not readings and sources:
                raise CaptureError(
                    f'source="{forced}" was asked for, and this module shows only '
                    f"{' and '.join(sorted(sources))}"
                )
        if problems and not any(reading.source == "kernel" for reading in readings):
            raise CaptureError(problems[0])
        if not readings:
            raise CaptureError(self._why_unseen(site))
        if site.type in HEAD_BY_HEAD and len(readings) == site.heads:
            return stack_heads(readings)
        if site.type == "DiffAttention" and len(readings) == 2:
            raise CaptureError(
                "differential attention subtracts one softmax matrix from another, and its fused "
                "path shows them apart; set its fused_attn = False to read what it uses"
            )
        if len(readings) > 1:
            raise CaptureError(
                f"made {len(readings)} attention kernel calls in one run, and which is meant is "
                "not known; choose one of its submodules if each makes one call"
            )
        return readings[0]

    def _current(self, name: str = "") -> _Pass:
        """This thread's pass; outside of the root's forward a loose one, new if a site repeats."""
        state = self._state
        if state.current is not None and not state.current.loose:
            return state.current
        loose = state.loose
        if loose is None or name in loose.ran:
            loose = _Pass(loose=True)
            state.loose = loose
            self.passes += 1
        return loose

    def _commit(self, done: _Pass, *, count: bool = True) -> None:
        with self._lock:
            self._last_failed = False
            self.passes += count
            if self._accumulate:
                for name, found in done.results.items():
                    self._results.setdefault(name, []).extend(found)
                if done.loose:
                    done.results = {}
                self._errors.update(done.errors)
            else:
                self._results, self._errors = dict(done.results), dict(done.errors)

    def _drain(self, into: _Pass | None = None) -> None:
        """Read what compiled code noted, into a pass that is running or passes of their own."""
        with self._lock:
            pending, self._pending[:] = list(self._pending), []
            if not pending:
                return
            done = into or _Pass()
            outer, self._state.current = self._state.current, done
            try:
                for what, name, call, out in pending:
                    if what == "pass":
                        if into is None:
                            if done.ran:
                                self._commit(done)
                            done = self._state.current = _Pass(self._layout_of(call, out))
                        continue
                    site = self._chosen[name]
                    if what == "hidden":
                        self._finish(site, [], [f"{site.type} can't be read in compiled code"])
                        continue
                    try:
                        output, dtype = out
                        known = (site.heads, None, self._keeping, site.heads_at, dtype)
                        readings = [read_sdpa(call, output, *known)]
                    except Exception as error:
                        readings = [Reading(None, "kernel", error=error_text(error))]
                    self._finish(site, readings, [])
                if into is None:
                    self._commit(done)
            finally:
                self._state.current = outer

    # -- what is known of sites -----------------------------------------------------------------

    def _layout_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenLayout | None:
        try:
            if isinstance(self._layout, TokenLayout):
                return self._layout
            if self._layout is not None:
                return self._layout(self._model, args, kwargs)
            for value in (*args, *kwargs.values()):
                if isinstance(value, torch.Tensor) and value.ndim in (4, 5):
                    return layout_from_model(self._model, value)
        except (LayoutError, AttributeError, TypeError, ValueError, RuntimeError, IndexError):
            return None  # nothing is known of this model: weights are exact all the same
        return None

    def _info(
        self, site: Site, attention: Attention, source: str, layout: TokenLayout | None
    ) -> SiteInfo:
        window = None
        if site.name in self._owners and site.name in self._state.grids:
            shape, sizes = self._state.grids[site.name]
            window = window_of(self._owners[site.name], shape, sizes, attention)
        # The same from pass to pass, unless pictures change their size.
        key = (attention.shape, source, layout, window)
        known = self._infos.get(site.name)
        if known is None or known[0] != key:
            rope = False if not self._rope else None
            info = site_info(site, attention.shape, source, rope, layout, window)
            info = info if self._describe is None else self._describe(info)
            known = self._infos[site.name] = (key, info)
        return known[1]

    def _why_unseen(self, site: Site) -> str:
        names = reached_names(type(site.module))
        unreadable = sorted({UNREADABLE[name] for name in names & set(UNREADABLE)})
        implementation = getattr(getattr(site.module, "config", None), "_attn_implementation", None)
        if implementation not in (None, "sdpa", "eager"):
            return (
                f"its kernel is {implementation!r}, which can't be read; load the model with "
                'attn_implementation="sdpa"'
            )
        if unreadable:
            return (
                f"ran without a kernel call that can be seen: it can call {', '.join(unreadable)}, "
                "which can't be read; switch that off"
            )
        return (
            "ran without a kernel call that can be seen (no scaled_dot_product_attention, no "
            "softmax over a product of queries and keys)"
        )

    def _why_unfired(self, name: str) -> str:
        site = self._chosen[name]
        for module in self._model.modules():
            if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
                return (
                    "the model is compiled, and its compiled code does not call the module's "
                    "forward; capture the model before torch.compile, or call "
                    "torch._dynamo.reset() first"
                )
        return (
            f"its forward was never called (another branch of the model, a fused path that skips "
            f"{site.type}, or code that calls its parts directly)"
        )

    # -- access ----------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Attention:
        self._drain()
        site = self._chosen.get(name)
        if site is None:
            choose_sites(self._all, [name])  # raises with the nearest names
            raise SiteError(
                f"site {name!r} was not chosen for this capture: it has "
                f"{', '.join(list(self._chosen)[:4])}{', …' if len(self._chosen) > 4 else ''}"
            )
        if self._released:
            raise CaptureError(f"site {name!r}: this capture was closed and let go of its data")
        if name in self._errors:
            self._told.add(name)
            raise CaptureError(f"site {name!r}: {self._errors[name]}")
        found = self._results.get(name)
        if not found:
            self._told.add(name)
            raise CaptureError(f"site {name!r} {self._why_missing(name)}")
        # With accumulate=True a list, as documented; the mapping's type says the usual case.
        return list(found) if self._accumulate else found[-1]  # type: ignore[return-value]

    def _why_missing(self, name: str) -> str:
        if self._last_failed:
            return (
                f"has nothing: the last forward pass failed ({self.failed_passes} of "
                f"{self.passes + self.failed_passes} ended in an exception)"
            )
        if not self.passes and not self._fired[name]:
            return "has nothing: the model was not run while it was captured; run it"
        if self._sink is not None and self._fired[name]:
            return "was handed to the sink and not kept"
        if self._fired[name]:
            return f"did not run in the last of {self.passes} forward passes"
        return f"did not run in {self.passes} forward passes: {self._why_unfired(name)}"

    def __iter__(self) -> Iterator[str]:
        self._drain()
        if not self._results and not self._errors and self._sink is None:
            name = next(iter(self._chosen))
            if self._released:
                raise CaptureError("this capture was closed and let go of its data")
            raise CaptureError(f"nothing was captured: site {name!r} {self._why_missing(name)}")
        return iter([n for n in self._chosen if n in self._results or n in self._errors])

    def __len__(self) -> int:
        self._drain()
        return sum(1 for n in self._chosen if n in self._results or n in self._errors)

    def __contains__(self, name: object) -> bool:
        self._drain()
        return name in self._results

    @property
    def sites(self) -> SiteList:
        """The chosen sites."""
        return SiteList(self._chosen.values())

    @property
    def nbytes(self) -> int:
        """Bytes held by everything captured."""
        return sum(a.nbytes for found in self._results.values() for a in found)

    def report(self) -> str:
        """A table: every chosen site, how often it ran, how it was read, and what went wrong."""
        self._drain()
        held = sum(1 for name in self._chosen if name in self._results)
        head = (
            f"{len(self._chosen)} sites expected, {held} captured, {self.passes} forward passes"
            + (f", {self.failed_passes} failed" if self.failed_passes else "")
            + (" (still watching)" if self.attached else "")
        )
        rows = [("site", "module", "ran", "read from", "result")]
        for name, site in self._chosen.items():
            if name in self._errors:
                result = f"error: {self._errors[name]}"
            elif name in self._results:
                found = self._results[name]
                last = "×".join(map(str, found[-1].shape))
                result = f"{len(found)} × {last}" if self._accumulate else last
            else:
                result = f"nothing: {self._why_missing(name)}"
            source = self._sources.get(name, site.source)
            rows.append((name, site.type, str(self._fired[name]), source, result))
        for site in self._all:
            if site.refused:
                rows.append((site.name, site.type, "–", "–", f"refused: {site.refused}"))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join([cell.ljust(w) for cell, w in zip(row, widths, strict=False)] + [row[4]])
            for row in rows
        ]
        return "\n".join([head, *lines])

    def __repr__(self) -> str:
        held = sum(a.nbytes for found in self._results.values() for a in found)
        return (
            f"Capture({len(self._results)} of {len(self._chosen)} sites of "
            f"{type(self._model).__name__}, {held / 2**20:.1f} MB"
            f"{', watching' if self.attached else ''})"
        )


def site_info(
    site: Site,
    shape: Sequence[int],
    source: str,
    rope: bool | None,
    layout: TokenLayout | None,
    window: WindowInfo | None,
) -> SiteInfo:
    """Describe attention of this shape `(B, h, Nq, Nk)`: which of the layouts fits which side."""
    info = SiteInfo(
        name=site.name,
        kind="window" if window else site.kind,
        block=site.block,
        module=site.type,
        rope=rope,
        source=source,
        window=window,
    )
    if layout is None:
        return info
    one = layout.frame_layout()
    batch, _, queries, keys = shape
    fits = {layout.num_tokens: layout, one.num_tokens: one}
    if site.kind in ("frame", "window") or queries != layout.num_tokens:
        fits[one.num_tokens] = one
    elif layout.frames > 1:
        fits = {layout.num_tokens: layout}
    query_layout = fits.get(queries)
    folded = query_layout is one and layout.frames > 1 and batch % layout.frames == 0
    return replace(
        info,
        query_layout=query_layout,
        key_layout=fits.get(keys),
        frames_in_batch=folded or (site.kind == "frame" and query_layout is one),
    )


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


def _entries(model: nn.Module) -> list[str]:
    names = []
    for name in dir(type(model)):
        if not name.startswith(_ENTRIES) or hasattr(nn.Module, name):
            continue
        for cls in type(model).__mro__:
            if name in cls.__dict__:
                if callable(cls.__dict__[name]) and not isinstance(cls.__dict__[name], type):
                    names.append(name)
                break
    return names


def _recomputing() -> bool:
    # Set while autograd runs a backward pass, where checkpointed blocks run a second time.
    return bool(torch._C._current_graph_task_id() != -1)


def _sizes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
    """The shape of a module's input, its first tensor of three or more dimensions; else ()."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and not value.is_nested and value.ndim >= 3:
            return tuple(value.shape)
    return ()
