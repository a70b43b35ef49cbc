"""Writing a run: site by site in the background while the model runs, or all at once."""

from __future__ import annotations

import functools
import json
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from vistvis.attention import Attention
from vistvis.attention.checks import describe
from vistvis.errors import InputError, StoreError
from vistvis.files import checked_name, version
from vistvis.names import few
from vistvis.progress import progress as bar
from vistvis.store.background import Background
from vistvis.store.codec import check_storable
from vistvis.store.folders import folder_of, reported
from vistvis.store.ledger import Ledger, new_writer
from vistvis.store.manifest import Manifest
from vistvis.store.reader import Run, open_run
from vistvis.store.scene import scene_tensors
from vistvis.store.shelf import check_free
from vistvis.store.tensors import Encoded
from vistvis.tokens import TokenLayout


class RunWriter:
    """Write a run site by site, in the background, in the order given.

        with (
            vistvis.RunWriter("runs/fern", images=images) as writer,
            vistvis.capture(model, sink=writer) as captured,
        ):
            writer.expect(captured.sites.names)
            model(images)

    Parameters
    ----------
    path
        A folder, made where there is none, or an fsspec URL such as `s3://bucket/fern`.
    expected
        Sites that are to come, so that a run cut short can say what it lacks; or `expect` later.
    images
        What the model saw: `(S, C, H, W)` for one sequence of frames, `(B, C, H, W)` for a batch
        of single pictures, or `(B, S, C, H, W)`; a tensor or array of any dtype, kept as it is.
        Or a list of equal pictures `(H, W, C)`. C is 1 or 3.
    points, confidence, cameras
        What the model made of the scene: `(S, rows, cols, 3)` or `(S, H, W, 3)`; the same without
        3; `(S, 3, 4)`, world to camera as OpenCV has them. A leading batch of 1 is taken off.
    layout
        The token layout of the whole sequence. By default the longest key layout of the sites.
    model, metadata
        A name, and anything JSON can hold, kept with the run.
    pass_id
        What tells this forward pass from every other, as `vistvis.store.pass_id_of` gives it. An
        unfinished run in `path` of the same `pass_id` is gone on with: its sites count for this run
        without being written again. Without one only sites written to this writer count.
    resume
        Use what an earlier writer left: a run of the same `pass_id`, and files of the same content,
        which are not written twice. False begins anew.
    queue_size
        How many sites may wait for the disk before `write` waits too. They are held in memory.
    storage_options
        Passed to fsspec with a URL.

    Where `path` has a finished run, or an unfinished one of something else, that run stays readable
    until `close`, when the new one takes its place if it is whole. Memory: `queue_size + 2` sites
    at most.

    InputError if arguments are not as said; StoreError if the folder can't be written, is being
    written by someone else, or holds something that is not a run of this schema; nothing of that is
    touched, nor files beside a run that its manifest does not name. Errors of the
    background surface at the next `write` or at `close`; sites finished before stay.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        expected: Iterable[str] | None = None,
        images: Any = None,
        points: Any = None,
        confidence: Any = None,
        cameras: Any = None,
        layout: TokenLayout | None = None,
        model: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        pass_id: str | None = None,
        resume: bool = True,
        queue_size: int = 4,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        if queue_size < 1:
            raise InputError(f"queue_size is at least 1, got {queue_size}")
        manifest = Manifest(
            writer=new_writer(),
            expected=_site_names(expected or ()),
            pass_id=None if pass_id is None else str(pass_id),
            model=None if model is None else str(model),
            layout=layout,
            metadata=_plain(metadata),
            made_by=f"vistvis {version() or ''}".rstrip(),
        )
        scene = scene_tensors(
            images=images, points=points, confidence=confidence, cameras=cameras, layout=layout
        )
        self._folder = folder_of(path, storage_options)
        self._given: set[str] = set()
        self._refused: Exception | None = None  # of this side, kept for `close`
        lock = self._folder.lock()
        self._background = Background(queue_size, lock)
        self._finalizer = weakref.finalize(self, self._background.end)
        try:
            with reported(f"can't write a run in {self._folder.root}"):
                check_free(self._folder)  # first: the lock is a file too
                if lock:
                    lock.acquire()
                encoded = {name: Encoded({name: tensor}) for name, tensor in scene.items()}
                self._ledger = Ledger(self._folder, manifest, encoded, resume=resume)
            self._background.start()
        except BaseException:  # whoever keeps it has this writer too, in its traceback
            self._background.end()
            raise

    # -- the caller's side -----------------------------------------------------------------------

    def expect(self, names: Iterable[str]) -> None:
        """Announce sites that are to come, before the first of them; StoreError as `write`."""
        self._put(functools.partial(self._ledger.expect, _site_names(names)))

    def write(self, name: str, attention: Attention) -> None:
        """Hand over one site; returns at once unless `queue_size` sites are waiting already.

        Q and K are not copied before they are written. If they are written into meanwhile, that is
        noticed and the site is not stored. StoreError if a site handed over before could not be
        written, or if this one has functions of indices; InputError if `name`
        can't name a file or was written already, or `attention` is no `Attention`.
        """
        _site_names([name])
        if not isinstance(attention, Attention):
            raise InputError(
                f"{name!r} must be an Attention, got {describe(attention)}; for a tensor of "
                "weights use Attention.from_weights(tensor)"
            )
        if name in self._given:
            raise InputError(
                f"site {name!r} was written to {self._folder.root} already; a run holds one "
                "forward pass, so give each pass a run of its own"
            )
        check_storable(attention)
        self._put(functools.partial(_add, self._ledger, name, attention, _event_of(attention)))
        self._given.add(name)

    def __call__(self, name: str, attention: Attention) -> None:
        """`write` for `capture(model, sink=writer)`: errors wait for `close`."""
        self._check_process()
        # What a sink raises would break the forward pass, and be reported as the capture's error.
        try:
            self.write(name, attention)
        except Exception as error:
            self._refused = self._refused or error

    @property
    def finished(self) -> tuple[str, ...]:
        """Sites that are stored by now, those of the resumed run among them."""
        return tuple(self._ledger.manifest.sites)

    @property
    def missing(self) -> tuple[str, ...]:
        """Expected sites that are not stored yet."""
        return self._ledger.manifest.missing

    def close(self) -> None:
        """Write what is waiting and end the run.

        StoreError if something could not be written; or if the run was to replace another and is
        not whole, in which case the other stays.
        """
        self._close(orderly=True)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(self, _: Any, error: BaseException | None, traceback: Any) -> None:
        self._close(orderly=error is None)

    def __repr__(self) -> str:
        state = "closed" if self._background.closed else "open"
        done, all_of_them = len(self._ledger.manifest.sites), len(self._ledger.manifest.names)
        return f"RunWriter({self._folder.root!r}, {state}, {done} of {all_of_them} sites stored)"

    def _check_process(self) -> None:
        """A forked child has neither the thread nor the lock: what it writes would be lost."""
        if os.getpid() != self._background.process:
            raise StoreError(
                f"the writer of {self._folder.root} belongs to process "
                f"{self._background.process}, and this is {os.getpid()}, forked from it; write "
                "where the writer was opened"
            )

    def _put(self, task: Callable[[], None]) -> None:
        self._check_process()
        if not self._background.closed and (error := self._background.error):
            raise error
        if not self._background.put(task):
            raise StoreError(f"the run in {self._folder.root} is closed; open another RunWriter")

    def _close(self, *, orderly: bool) -> None:
        try:
            if orderly:
                self._check_process()
            if self._background.abandoned or os.getpid() != self._background.process:
                return
            self._background.join()  # Ctrl-C while waiting: no more than the site at hand
            if not orderly:
                return
            if error := self._background.error or self._refused:
                raise error
            self._ledger.finish()
        finally:
            self._background.end()
            self._finalizer.detach()  # it holds the error, and by its traceback this writer


def save_run(
    captured: Mapping[str, Attention],
    path: str | os.PathLike[str],
    *,
    images: Any = None,
    points: Any = None,
    confidence: Any = None,
    cameras: Any = None,
    layout: TokenLayout | None = None,
    model: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    pass_id: str | None = None,
    resume: bool = True,
    progress: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Run:
    """Store attention of one forward pass as a run, and open it.

    `captured` is any mapping of site names to `Attention`; other parameters and errors are those of
    `RunWriter`. After an error an earlier run in `path` is as it was. `progress` shows a bar.

    Cost: the bytes of Q and K (V and masks, if any) once. No dense matrix is built, and nothing of
    the run that is returned is in memory.
    """
    names = _site_names(captured)
    if not names:
        raise InputError("there is nothing to store: the mapping has no site")
    for name in names:
        if isinstance(captured[name], Attention):
            check_storable(captured[name])
    with RunWriter(
        path,
        expected=names,
        images=images,
        points=points,
        confidence=confidence,
        cameras=cameras,
        layout=layout,
        model=model,
        metadata=metadata,
        pass_id=pass_id,
        resume=resume,
        storage_options=storage_options,
    ) as writer:
        for name in bar(names, "storing", shown=progress, unit="site"):
            writer.write(name, captured[name])
    return open_run(path, storage_options=storage_options)


def _add(ledger: Ledger, name: str, attention: Attention, event: Any) -> None:
    """A task of the background, which knows nothing of the writer."""
    ledger.add(name, _on_host(attention, event), attention.check_unwritten)


def _event_of(attention: Attention) -> Any:
    if attention.device.type != "cuda":
        return None
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(attention.device))
    return event


_stream = functools.lru_cache(torch.cuda.Stream)


def _on_host(attention: Attention, event: Any) -> Attention:
    """The site in host memory. On a GPU the copy waits for Q and K, but not for what comes after
    them: it has a stream of its own, beside the model's."""
    attention = attention.detach()
    if event is None:
        return attention.cpu()
    stream: Any = _stream(attention.device)
    with torch.cuda.stream(stream):
        stream.wait_event(event)
        attention = attention.cpu()
        stream.synchronize()
    return attention


def _site_names(names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise InputError(f"names are a list, got the string {names!r}")
    result = tuple(checked_name(name, "the name of a site") for name in names)
    if len(set(result)) != len(result):
        raise InputError(f"names of sites are given twice: {few(result)}")
    return result


def _plain(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(metadata or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"metadata is what JSON can hold: {error}") from error
    return plain
