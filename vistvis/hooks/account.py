"""The account of a pass: kernel calls that no running site claims, laid to the module that made
them, and kept as sites of their own where nobody asked for certain ones."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vistvis.hooks.changed import changed_attention
from vistvis.hooks.flow import PRODUCTS, SOFTMAX, Flow
from vistvis.hooks.fused import read_call
from vistvis.hooks.kernels import KernelCall
from vistvis.hooks.multihead import MULTIHEAD_FORWARD, MultiheadReader
from vistvis.hooks.readings import (
    SDPA,
    Keeping,
    KernelReader,
    Notes,
    Reading,
    SdpaCall,
    autocast_dtype,
)
from vistvis.hooks.results import Call, Options, Pass, Results, numbered
from vistvis.hooks.settling import SiteRun
from vistvis.hooks.steady import function_modes, replace_modes
from vistvis.models.families import roles_of
from vistvis.models.sites import Site, SiteList, is_torchs, named_modules, names_softmax, seen_site

_KERNELS = frozenset({SDPA, changed_attention, MULTIHEAD_FORWARD})
_TRACED = frozenset({*PRODUCTS, *SOFTMAX})
Read: TypeAlias = Callable[[KernelReader], Notes]


class Owner(NamedTuple):
    """The module that was running when a kernel was called, and the shape of what it got."""

    name: str
    module: nn.Module
    sizes: tuple[int, ...] = ()


class Outside:
    """What becomes of kernel calls that no running site claims: counted, or kept as a site."""

    def __init__(
        self,
        model: nn.Module,
        every: SiteList,
        chosen: SiteList,
        options: Options,
        results: Results,
        keeping: Keeping,
    ) -> None:
        self._options, self._results, self.keeping = options, results, keeping
        self._owners = {id(module): Owner(name, module) for name, module in named_modules(model)}
        self._root = next(iter(self._owners.values()))
        self._roles = roles_of(model)
        self._chosen = {id(site.module): site for site in chosen}
        self._refused = {id(site.module) for site in every if site.refused}

    def takes(self, source: str) -> bool:
        """Whether calls read so are kept, rather than only counted."""
        options = self._options
        return not (options.asked or options.projections) and options.source in (None, source)

    def owner(self) -> Owner:
        """The innermost module of the model that runs, by what its methods call `self`.

        So a call in a plain function, in an object that a module holds, or in a method that was
        called past `__call__` is that module's. PyTorch's own classes (a softmax, a dropout) are
        parts of what calls them.
        """
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_argcount:
                values = frame.f_locals
                mine = values.get(code.co_varnames[0])
                owner = self._owners.get(id(mine))
                if owner is not None and owner.module is mine and not is_torchs(mine):
                    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
                    return owner._replace(sizes=_sizes(values.get(name) for name in names))
            frame = frame.f_back
        return self._root

    def count(self, kernel: str, owner: Owner) -> None:
        """A call that is not kept."""
        call = Call(kernel, owner.name, type(owner.module).__name__)
        with self._results.lock:
            self._results.outside[call] = self._results.outside.get(call, 0) + 1

    def count_of(self, kernel: str, module: nn.Module) -> None:
        """A call that is not kept, of a module that is known."""
        self.count(kernel, self._owners.get(id(module)) or Owner(type(module).__name__, module))

    def seen(self, kernel: str, source: str, read: Read, now: Pass) -> SiteRun | None:
        """A kernel call that is no running site's; None if it is only counted."""
        owner = self.owner()
        site = self._chosen.get(id(owner.module))
        if site is None:
            if not self.takes(source) or id(owner.module) in self._refused:
                self.count(kernel, owner)
                return None
            site = self._adopted(owner, source, now)
        # The heads may be in the batch; without the size of that, nothing is assumed.
        batch = owner.sizes[0] if owner.sizes else None
        heads = site.heads if batch is not None else None
        reader = KernelReader(self.keeping, heads, batch, site.traits.heads_at)
        return SiteRun(site, read(reader), owner.sizes)

    def ran_multihead(self, module: nn.Module) -> None:
        """An `nn.MultiheadAttention` ran; sites account for themselves."""
        if id(module) not in self._chosen:
            self.count_of("nn.MultiheadAttention", module)

    def traced(self) -> list[nn.Module]:
        """Modules that are no sites, and whose eager code is followed while they run.

        Those without parameters (a softmax, a product in a class of its own) are parts of others.
        """
        return [
            owner.module
            for key, owner in self._owners.items()
            if not (key in self._chosen or key in self._refused)
            and not is_torchs(owner.module)
            and (owner is self._root or next(owner.module.parameters(), None) is not None)
            and (self._options.discover or names_softmax(owner.module))
        ]

    def _adopted(self, owner: Owner, source: str, now: Pass) -> Site:
        """The site of a module's next call in this pass: `name`, `name#2`, …"""
        number = now.outside[owner.name] = now.outside.get(owner.name, 0) + 1
        name = numbered(owner.name, number)
        self._results.make_room(name)
        return self._results.adopt(name, lambda: seen_site(name, owner.module, source, self._roles))


class Account(TorchFunctionMode):
    """Sees the torch functions of one pass; `active` says whether no site is running."""

    def __init__(
        self,
        outside: Outside,
        active: Callable[[], bool],
        now: Callable[[], Pass],
        finish: Callable[[SiteRun], None],
    ) -> None:
        super().__init__()
        self._outside, self._active, self._now, self._finish = outside, active, now, finish
        self._flows: list[Flow] = []
        self._multiheads: set[int] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # As in `KernelTap`: most calls have to leave soon, and Dynamo traces this.
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        if func not in _KERNELS and not (
            self._flows and (func in _TRACED or self._flows[-1].begun)
        ):
            return func(*args, **kwargs)
        if not self._active():
            return func(*args, **kwargs)
        if func is MULTIHEAD_FORWARD and self._outside.takes("module"):
            return self._multihead(args, kwargs)
        out = func(*args, **kwargs)
        if func is SDPA:

            def read(reader: KernelReader) -> Notes:
                notes, dtype = Notes(), autocast_dtype(out)
                notes.take("kernel", lambda: reader.sdpa(SdpaCall(*args, **kwargs), out, dtype))
                return notes

            self.saw("scaled_dot_product_attention", "kernel", read)
        elif func is changed_attention:
            self._outside.count("scaled_dot_product_attention", self._outside.owner())
        elif func is MULTIHEAD_FORWARD:
            self._outside.count("multi_head_attention_forward", self._outside.owner())
        elif self._flows:
            self._flows[-1].follow(func, args, kwargs, out)
        return out

    def hear(self, call: KernelCall) -> None:
        """A call of a kernel that is a Python function."""

        def read(reader: KernelReader) -> Notes:
            notes = Notes()
            notes.take("kernel", lambda: read_call(*call, reader))
            return notes

        if self._active():
            self.saw(call.name, "kernel", read)

    def saw(self, kernel: str, source: str, read: Read) -> None:
        """A kernel call that is no running site's."""
        with torch.no_grad():
            run = self._outside.seen(kernel, source, read, self._now())
            if run is not None:
                self._finish(run)

    def _multihead(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        reader = MultiheadReader(self._outside.keeping)
        out = reader.multi_head_attention(*args, **kwargs)
        self.saw("multi_head_attention_forward", "module", lambda _: reader.notes)
        return out

    def ran(self, module: nn.Module) -> None:
        """A module ran that the account can't look into: compiled, or with a fused path."""
        attention = getattr(module, "self_attn", module)
        if module is not attention and id(attention) in self._multiheads:
            self._multiheads.remove(id(attention))  # the layer did not take its fused path
        elif isinstance(attention, nn.MultiheadAttention):
            self._outside.ran_multihead(attention)
            if module is attention:
                self._multiheads.add(id(module))

    @contextmanager
    def tracing(self, module: nn.Module) -> Iterator[None]:
        """While a module runs whose softmax may be one of attention: its eager code is followed."""
        trace = _Trace(self)
        flow = Flow(cast(KernelReader, trace), trace, self._active)
        self._flows.append(flow)
        try:
            yield
        finally:
            self._flows.pop()
            for _ in range(flow.unmet):
                self._outside.count_of("softmax that meets no values", module)


class _Trace(Notes):
    """Notes and reader of a flow outside of sites: whose a reading is, is known when it comes."""

    def __init__(self, account: Account) -> None:
        super().__init__()
        self._account = account
        self._reader: KernelReader | None = None

    def take(self, source: str, read: Callable[[], Reading]) -> None:
        problems, self.problems = self.problems, []

        def owned(reader: KernelReader) -> Notes:
            self._reader = reader
            notes = Notes(problems=problems)
            notes.take(source, read)
            return notes

        self._account.saw(source, source, owned)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


@contextmanager
def aside() -> Iterator[None]:
    """Without any account: a function mode would switch off PyTorch's fused paths.

    Modes that others have put on stay, as they would without the account.
    """
    stack = function_modes()
    replace_modes([mode for mode in stack if not isinstance(mode, Account)])
    try:
        yield
    finally:
        replace_modes(stack)


def _sizes(values: Iterator[Any]) -> tuple[int, ...]:
    """The shape of the first tensor of three or more dimensions; else ()."""
    for value in values:
        if isinstance(value, Tensor) and not value.is_nested and value.ndim >= 3:
            return tuple(value.shape)
    return ()
