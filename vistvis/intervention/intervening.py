"""`intervene`: a model runs with heads knocked out, or keys cut off from queries."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

from vistvis.errors import CaptureError, InputError, SiteError
from vistvis.hooks.changed import Change, Cut
from vistvis.hooks.folding import Fold, UnreadableError
from vistvis.hooks.kernels import NAMES
from vistvis.hooks.multihead import encoder_layers
from vistvis.hooks.order import Orders
from vistvis.hooks.origins import Placing
from vistvis.hooks.patching import Forward, Listener, attach, clear
from vistvis.hooks.readings import SdpaCall
from vistvis.hooks.results import LayoutOf
from vistvis.hooks.steady import steadily
from vistvis.hooks.watching import entries, layout_of_pass
from vistvis.hooks.whose import recomputing
from vistvis.intervention.changer import Changer
from vistvis.intervention.plan import Mode, Plan, Tokens
from vistvis.models.code import reached_names
from vistvis.models.families import DISPATCHERS, MULTIHEAD, blocks_of
from vistvis.models.placing import site_info
from vistvis.models.sites import Chooser, Site, SiteList, choose_sites, find_sites
from vistvis.tokens import TokenLayout

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def intervene(
    model: nn.Module,
    sites: Chooser,
    *,
    heads: Sequence[int] | None = None,
    mode: Mode | None = None,
    cut: Sequence[tuple[int | Tokens, int | Tokens]] = (),
    cut_keys: Tokens = (),
    cut_queries: Tokens = (),
    within_frame: bool = False,
    names: Mapping[str, str] | None = None,
    layout: TokenLayout | LayoutOf | None = None,
) -> Intervention:
    """Change what chosen sites compute while the model runs, in a `with` block.

    >>> with vistvis.intervene(model, "global_block_3", heads=[0], mode="uniform"):
    ...     model(images)

    Parameters
    ----------
    model
        Any `nn.Module`; its weights are not touched, and after the block it is as it was.
    sites
        As in `capture`. Blocks of a multi-view family also go by `global_block_3`,
        `frame_block_0`, `global_*`, …, as in the VGGT front end.
    heads
        Which heads `mode` and cuts hold for; None: all.
    mode
        What a head's output `(B, h, Nq, dv)`, before the output projection, becomes. "uniform": the
        mean of the values that each query sees (of all, if nothing is masked or cut); "zero": 0;
        "mean": its own mean over the query tokens of this pass, of each batch item by itself.
    cut
        Pairs `(queries, keys)`: those queries see none of those keys. Each side is the number of a
        frame, or token numbers. What a query still sees sums to 1.
    cut_keys, cut_queries
        Tokens that no query sees; tokens that see no key.
    within_frame
        Tokens see those of their own frame alone: global blocks act as frame blocks, which stay as
        they are. Tokens of no frame see all, and are seen by all.
    names
        Dotted name → the name that a site goes by, as in `capture`.
    layout
        Which tokens belong to which frame: a layout, or a function of `(model, args, kwargs)` of
        each pass; by default what `TokenLayout.from_model` knows. Only cuts of frames need it.

    Tokens are counted as in the site's attention: absolute in a global block, within the frame in a
    frame block (there of every frame), and as in the layout where the model has reordered them. A
    query that sees no key gets an output of 0. All cuts add up, and so do interventions inside each
    other; of two modes of one head the later `with` holds. Nothing to do (`heads=[]`, no mode and
    no cut) leaves the model as it is, bit for bit.

    Only forwards in the thread that entered the block are changed. With activation checkpointing,
    run `backward()` inside the block too: it runs forwards again. A `capture` at the same time, in
    whatever order they were opened, holds the weights that the model then used, and
    `attention.site.intervened` says what was changed; with "mean" these are the weights before it.

    Returns
    -------
    A context manager, to be entered once; its `sites` are those that are changed.

    Raises
    ------
    InputError
        If an option has another value.
    SiteError
        If there is no such site, or it is not read at one call of
        `scaled_dot_product_attention`; also, from the model's forward, where that shows only then.
    IndexOutOfRange, LayoutError
        From here or from the model's forward: a head, token or frame that a site does not have,
        frames that are not known.
    CaptureError
        At the end of the block, if a site was not changed after all: it never ran, or only in
        compiled code or in another thread.

    Cost: a cut runs the kernel once for each group of queries that see the same keys, on these
    keys: less work than the whole; a copy of keys and values where they don't lie together. A mode
    adds nothing to speak of. No mask of all queries and keys is made.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"intervene needs an nn.Module, got {type(model).__name__}")
    plan = Plan.of(heads, mode, cut, cut_keys, cut_queries, within_frame)
    if plan.heads and not (mode or plan.cuts_tokens):
        raise InputError(
            'heads= says which heads, and nothing says what becomes of them: give mode="uniform", '
            '"zero" or "mean", or a cut'
        )
    every = find_sites(model)
    every = every.named(block_names(model, every) if names is None else names)
    chosen = choose_sites(every, sites)
    for site in every:
        if site in list(chosen) or (site.refused and _is_named(site, sites)):
            _check(site, every, plan)
    return Intervention(model, chosen, plan, layout)


class Intervention:
    """Sits on a model between `__enter__` and `__exit__`; made by `intervene`."""

    def __init__(
        self,
        model: nn.Module,
        sites: SiteList,
        plan: Plan,
        layout: TokenLayout | LayoutOf | None,
    ) -> None:
        self._model, self._plan, self._layout = model, plan, layout
        self.sites = sites
        """The sites that are changed."""
        self.open = False
        """Whether it is in force."""
        self._thread: threading.Thread | None = None
        self._state = _State()
        self._orders = Orders()
        self._touched: dict[Any, None] = {}
        self._changed: set[str] = set()
        self._compiled: list[str] = []
        # For the forwards that a backward pass runs again, when its pass is long over.
        self._cuts: dict[tuple[str, tuple[int, int]], tuple[Cut, ...]] = {}

    def __repr__(self) -> str:
        what = self._plan.text if not self._plan.empty else "nothing"
        return f"Intervention({what}, at {len(self.sites)} sites{', open' if self.open else ''})"

    def __enter__(self) -> Intervention:
        if self._thread is not None:
            raise InputError("an intervention is entered once; call intervene again")
        self._thread = threading.current_thread()
        try:
            self.open = True
            if not self._plan.empty:
                self._attach()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self._remove()
        if error is None and not self._plan.empty:
            self._check_all_changed()

    def _check_all_changed(self) -> None:
        if self._compiled:
            raise CaptureError(
                f"site {self._compiled[0]!r} ran in compiled code, where nothing is changed: run "
                "the model that was not compiled"
            )
        missed = [site.name for site in self.sites if site.name not in self._changed]
        if missed:
            more = f" (and {len(missed) - 1} more)" if len(missed) > 1 else ""
            raise CaptureError(
                f"site {missed[0]!r}{more} did not run while it was to be changed, so nothing was: "
                "run the model inside the block and in its thread, and choose sites that it runs"
            )

    def _attach(self) -> None:
        inner: nn.Module = getattr(self._model, "_orig_mod", self._model)
        modules = [site.module for site in self.sites]
        for site in self.sites:
            compiled = partial(_note_compiled, self._compiled, site.name)
            self._listen(site.module, partial(_run_site, site), compiled)
        for layer in encoder_layers(inner, modules):
            self._listen(layer, _run_layer)
        if self._plan.cuts_tokens:
            self._listen(inner, partial(_run_pass, False))
            for name in entries(inner):
                self._listen(inner, partial(_run_pass, True), method=name)
            for owner, run, name in Orders.listeners(inner, list(self.sites)):
                self._listen(owner, partial(_run_order, run), method=name)

    def _listen(
        self,
        module: nn.Module,
        run: Callable[..., Any],
        compiled: Callable[..., Any] | None = None,
        *,
        method: str = "forward",
    ) -> None:
        # The undo comes first: an interrupt between the two leaves nothing behind.
        self._touched[module] = None
        attach(module, Listener(weakref.ref(self), run, compiled, changes=True), method=method)

    def _remove(self) -> None:
        self.open = False  # from here on nothing is changed, whatever comes between
        for module in self._touched:
            clear(module)

    # -- listeners -------------------------------------------------------------------------------

    def _is_mine(self) -> bool:
        return threading.current_thread() is self._thread or recomputing()

    def run_pass(self, entry: bool, original: Forward, args: Args, kwargs: Kwargs) -> Any:
        state, outer = self._state, (self._state.inside, self._state.layout)
        if (entry and state.inside) or not self._is_mine():
            return original(*args, **kwargs)

        def run() -> Any:
            layout = layout_of_pass(self._model, self._layout, args, kwargs)
            state.inside, state.layout = True, layout
            with self._orders.passing(layout):
                out = original(*args, **kwargs)
            state.inside, state.layout = outer
            return out

        return steadily(run, state, self._orders)

    def run_site(self, site: Site, original: Forward, args: Args, kwargs: Kwargs) -> Any:
        if not self._is_mine():
            return original(*args, **kwargs)
        placing = self._orders.of(site, args, kwargs) if self._plan.cuts_tokens else None
        changer = Changer(site, partial(self._change, site, placing, _batch(args, kwargs)))

        def run() -> Any:
            with changer:
                return original(*args, **kwargs)

        out = steadily(run)
        if not changer.calls:
            raise SiteError(
                f"site {site.name!r} ({site.type}) can't be changed: it ran without a call of "
                "scaled_dot_product_attention; let it use that (fused_attn = True, "
                'attn_implementation="sdpa")'
            )
        self._changed.add(site.name)
        return out

    def _change(
        self, site: Site, placing: Placing | None, batch: int | None, call: SdpaCall
    ) -> Change:
        """What becomes of a kernel call of a site."""
        query, key = call.query, call.key
        if query.is_nested or key.is_nested:
            raise SiteError(f"site {site.name!r} runs on nested tensors; pad the sequences instead")
        try:
            fold = Fold.of(tuple(query.shape[:-2]), site.heads, batch, site.traits.heads_at)
        except UnreadableError as error:
            raise SiteError(f"site {site.name!r} can't be changed: {error}") from error
        count = fold.shape[1]
        if site.heads not in (None, count):
            raise SiteError(
                f"site {site.name!r} has {site.heads} heads, and its kernel got {count}: which is "
                "which is not known, so it can't be changed"
            )
        self._plan.check_heads(count, site.name)
        cuts = self._cuts_of(site, placing, (fold.shape[0], count, query.shape[-2], key.shape[-2]))
        return Change(fold, self._plan.text, self._plan.modes(count), cuts)

    def _cuts_of(
        self, site: Site, placing: Placing | None, shape: tuple[int, int, int, int]
    ) -> tuple[Cut, ...]:
        if not self._plan.cuts_tokens:
            return ()
        known = site.name, shape[2:]
        if recomputing() and known in self._cuts:
            return self._cuts[known]
        layout = self._state.layout
        info = site_info(site, shape, source="kernel", rope=None, layout=layout, window=None)
        if placing is not None:
            before, info = info, placing.onto(info, shape)
            merged = shape[0] == placing.batch and shape[2] == shape[3] < placing.count
            lost = any(
                getattr(before, side) is not None and getattr(info, side) is None
                for side in ("query_layout", "key_layout")
            )
            if lost or merged:
                raise SiteError(
                    f"the tokens of site {site.name!r} were {'merged' if merged else 'moved'} "
                    "before its kernel got them, and a cut needs to know which is which; switch "
                    "that off in the model"
                )
        self._cuts[known] = self._plan.cuts(info, *shape[2:])
        return self._cuts[known]


class _State(threading.local):
    """Where one thread is in the model."""

    def __init__(self) -> None:
        self.inside = False
        self.layout: TokenLayout | None = None


def _run_site(site: Site, owner: Intervention, *call: Any) -> Any:
    return owner.run_site(site, *call)


def _run_pass(entry: bool, owner: Intervention, *call: Any) -> Any:
    return owner.run_pass(entry, *call)


def _run_order(run: Callable[..., Any], owner: Intervention, *call: Any) -> Any:
    return run(owner._orders, *call)


def _run_layer(owner: Intervention, original: Forward, args: Args, kwargs: Kwargs) -> Any:
    """On an encoder layer whose fused path skips the forward of its attention module: not under a
    function mode."""

    def run() -> Any:
        with BaseTorchFunctionMode():
            return original(*args, **kwargs)

    return steadily(run)


def _note_compiled(
    events: list[str], name: str, original: Forward, args: Args, kwargs: Kwargs
) -> Any:
    events.append(name)
    return original(*args, **kwargs)


def _batch(args: Args, kwargs: Kwargs) -> int | None:
    """The batch of a module's input, its first tensor of three or more dimensions."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and not value.is_nested and value.ndim >= 3:
            return value.shape[0]
    return None


def block_names(model: nn.Module, sites: SiteList) -> dict[str, str]:
    """What VGGT's users call the blocks of a multi-view model, by the dotted name of their site.

    As in the front end: of a kind that fills several lists, those of the first.
    """
    names: dict[str, str] = {}
    for block, kind, number in blocks_of(model):
        inside = [site.path for site in sites if f"{site.path}.".startswith(f"{block}.")]
        name = f"{kind}_block_{number}"
        if len(inside) == 1 and name not in names.values():
            names[inside[0]] = name
    return names


def _is_named(site: Site, chooser: Chooser) -> bool:
    patterns = [chooser] if isinstance(chooser, str) else chooser
    return isinstance(patterns, Sequence) and any(map(site.matches, patterns))


def _check(site: Site, every: SiteList, plan: Plan) -> None:
    """`SiteError` if a site can't be changed; heads are checked where the site says them."""
    why = site.refused
    if site.source == "softmax":
        why = (
            "its weights are computed by eager code, not at a kernel; let it use "
            'scaled_dot_product_attention (fused_attn = True, or attn_implementation="sdpa")'
        )
    names = reached_names(site.module)
    other = sorted(names & NAMES)
    if other and not names & {"scaled_dot_product_attention", *DISPATCHERS, *MULTIHEAD}:
        why = why or (
            f"its kernel is {other[0]}; let it use scaled_dot_product_attention, the only one that "
            "can be changed"
        )
    inside = [other.name for other in _others(site, every)]
    if inside:
        why = why or f"{inside[0]!r} lies inside of it, and attends too; choose that one"
    if why:
        raise SiteError(f"site {site.name!r} ({site.type}) can't be changed: {why}")
    if site.heads is not None:
        plan.check_heads(site.heads, site.name)


def _others(site: Site, every: SiteList) -> Iterator[Site]:
    inside = {id(module) for module in site.module.modules()} - {id(site.module)}
    return (other for other in every if id(other.module) in inside)
