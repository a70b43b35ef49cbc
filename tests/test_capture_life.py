"""How captures end, and whose a pass is: drops, threads, exports, interrupts."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from interrupts import Model, images, tries
from torch import nn

from vistvis import capture
from vistvis.errors import CaptureError
from vistvis.hooks.whose import Claim


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def held(model: nn.Module) -> list[list[str]]:
    return [sorted(module.__dict__) for module in model.modules()]


# -- dropped without close() ---------------------------------------------------------------------


def test_a_dropped_capture_is_freed_and_leaves_with_the_next_forward(model: Model) -> None:
    before, x = held(model), images()
    plain = model(x)
    captured = capture(model)
    model(x)
    query = weakref.ref(captured["attn"].query)
    gone = weakref.ref(captured)
    gc.disable()
    try:
        del captured
        assert gone() is None
        assert query() is None  # at once, without the collector
    finally:
        gc.enable()
    assert torch.equal(model(x), plain)
    assert held(model) == before


def test_a_dropped_capture_does_not_keep_its_model() -> None:
    model = Model().eval()
    gone = weakref.ref(model)
    captured = capture(model)
    model(images())
    del captured, model
    gc.collect()
    assert gone() is None


def test_a_dropped_capture_takes_nothing_of_another(model: Model) -> None:
    before, x = held(model), images()
    dropped = capture(model)
    with capture(model) as captured:
        del dropped
        model(x)
        assert captured["attn"].shape == (1, 2, 5, 5)
    assert held(model) == before


# -- threads -------------------------------------------------------------------------------------


def in_thread(run: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def test_two_threads_that_watch_one_model_get_their_own_inputs(model: Model) -> None:
    reads, wrong = 400, []
    start = threading.Barrier(2)

    def work(seed: int) -> None:
        with capture(model, "attn") as captured, torch.no_grad():
            start.wait()
            for number in range(reads):
                x = images(seed * reads + number)
                model(x)
                expected = model.attn.qkv(x)[0, :, :4]
                for _ in range(2):
                    if not torch.equal(captured["attn"].query[0, 0], expected):
                        wrong.append(number)
            assert captured.passes == reads
            start.wait()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong  # of 1,600


def test_the_only_capture_gets_passes_of_all_threads(model: Model) -> None:
    with capture(model) as captured:
        in_thread(lambda: model(images()))
        assert captured["attn"].shape == (1, 2, 5, 5)


def test_captures_of_one_thread_all_get_its_passes(model: Model) -> None:
    with capture(model, "attn") as first, capture(model, "mha") as second:
        model(images())
    assert len(first) == len(second) == 1


@pytest.mark.parametrize("site", ["attn", "mha"])
def test_whose_a_pass_is_must_be_known(model: Model, site: str) -> None:
    plain = model(images())
    first = capture(model, site)
    second = in_thread(lambda: capture(model))
    assert torch.equal(in_thread(lambda: model(images())), plain)
    for captured in (first, second):
        with pytest.raises(CaptureError, match="none of the 2 captures"):
            captured[site]
        with pytest.raises(CaptureError, match="open each capture in the thread"):
            list(captured)
        assert captured.passes == 0
        assert "none of the 2 captures" in captured.report()
        captured.close()
    second = in_thread(lambda: capture(model))
    with pytest.raises(CaptureError, match="none of the 2"), capture(model, site):
        in_thread(lambda: model(images()))
    second.close()


def test_a_module_inside_counts_as_the_same_model(model: Model) -> None:
    inner = in_thread(lambda: capture(model.attn))
    with capture(model) as captured:
        model(images())
        assert captured.passes == 1
    assert inner.passes == 0
    model(images())
    assert next(iter(inner.values())).shape == (1, 2, 5, 5)
    inner.close()


# -- exports -------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_is_no_pass(model: Model, strict: bool) -> None:
    plain = torch.export.export(model, (images(),), strict=strict)
    with capture(model) as captured:
        watched = torch.export.export(model, (images(),), strict=strict)
        with pytest.raises(CaptureError, match="was not run"):
            captured["attn"]
    assert captured.passes == 0
    assert str(watched.graph) == str(plain.graph)
    assert torch.equal(watched.module()(images()), plain.module()(images()))


def test_fake_tensors_are_no_pass(model: Model) -> None:
    with capture(model) as captured:
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            model(torch.empty(1, 5, 8))
        assert captured.passes == 0


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_jit_trace_is_no_pass(model: Model) -> None:
    plain = torch.jit.trace(model, images(), check_trace=False)
    with capture(model) as captured:
        watched = torch.jit.trace(model, images(), check_trace=False)
    assert captured.passes == 0
    assert torch.equal(watched(images()), plain(images()))


def test_a_watched_model_is_not_scripted(model: Model) -> None:
    before = held(model)
    with capture(model):
        for module in (model, model.blocks, nn.Sequential(model.mha)):
            with pytest.raises(CaptureError, match="close the capture first"):
                torch.jit.script(module)
    assert held(model) == before
    left = capture(model.mha)
    del left
    torch.jit.script(model.mha)


# -- interrupts ----------------------------------------------------------------------------------


def test_an_interrupt_leaves_nothing_that_works_on() -> None:
    left = {name: attempt() for name, attempt in tries(step=149)}
    assert len(left) > 100
    assert not any(left.values()), [what for what in left.items() if what[1]]


def test_a_capture_whose_model_is_gone_is_nobodys_rival() -> None:
    """Modules of a later model may lie where those of an earlier one lay."""
    kept = []
    for _ in range(20):
        with ThreadPoolExecutor(1) as elsewhere:
            kept.append(elsewhere.submit(Claim, Model()).result())
        assert kept[-1].holds()  # in this thread, where none was opened
