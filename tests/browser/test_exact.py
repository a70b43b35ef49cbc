"""Rows and columns from the page in Chromium against float64, written out, of stored Q and K."""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from oracle import sharpen, softmax_of
from torch import Tensor, nn

import vistvis
from vistvis import Attention, SiteInfo, TokenLayout
from vistvis.views.explorer.front import explore

ASKED = 200
TOLERANCE = 2e-6
EPS = float(np.finfo(np.float32).eps)

# All answers in one string: floats as base64, which selenium carries faster than lists.
ASK = """
const [questions, done] = arguments;
(async () => {
  const parts = [];
  for (const one of questions) {
    const ask = one.token === undefined ? window.vistvis.column : window.vistvis.row;
    parts.push(new Uint8Array((await ask(one)).buffer));
  }
  return asBase64(new Blob(parts));
})().then(done, (error) => done("error: " + error.stack));
function asBase64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = reject;
    reader.readAsDataURL(blob);
  });
}
"""


class Question(NamedTuple):
    site: str
    batch: int
    head: int
    index: int
    column: bool

    def options(self, kernel: str) -> dict[str, Any]:
        side = "key" if self.column else "token"
        where = {"site": self.site, "batch": self.batch, "head": self.head, "kernel": kernel}
        return {**where, side: self.index}


Sites = dict[str, Attention]


def vggt() -> tuple[Sites, Tensor]:
    """The bundled model on its sample views: one frame block, one global block."""
    from vistvis.models.loading import load
    from vistvis.photos.finding import find_photos

    samples = sorted(Path(__file__).parents[2].glob("vggt_adapter/samples/*.jpg"))
    photos, _ = find_photos(samples[:2])
    model = load("vggt:tiny", images=photos, device="cpu", dtype=None, size=None)
    with vistvis.capture(model.watched, names=model.names) as found, torch.no_grad():
        model.model(model.images)
    sites = {name: found[name].cpu() for name in ("frame_block_2", "global_block_3")}
    return sites, model.images


def dinov2() -> tuple[Sites, Tensor]:
    """DINOv2 ViT-S/14: real weights where `VISTVIS_DINOV2` names them, else sharpened."""
    timm = pytest.importorskip("timm")
    if path := os.environ.get("VISTVIS_DINOV2"):
        from training.dinov2 import load

        model: nn.Module = load(Path(path))
        images = torch.rand(1, 3, 224, 224)
    else:
        name = "vit_small_patch14_dinov2"
        model = timm.create_model(name, pretrained=False, img_size=112, depth=2).eval()
        images = torch.rand(2, 3, 112, 112)
    names = [name for name, one in model.named_modules() if name.endswith(".attn")][-2:]

    def captured() -> Sites:
        with vistvis.capture(model, names) as found, torch.no_grad():
            model(images)
        return {name: found[name] for name in names}

    if not path:
        modules = {name: model.get_submodule(name) for name in names}
        sharpen(modules, lambda: {name: float(a.dense().max()) for name, a in captured().items()})
    return captured(), images[:, None] if images.shape[0] > 1 else images


def made(kind: str, **more: Any) -> Attention:
    """Sharp queries and keys of a one-frame site of 6 × 7 patches and one special token."""
    layout = TokenLayout(1, (6, 7), ("cls",), 14)
    keys, heads = more.pop("keys", 43), more.get("heads", 4)
    width = more.pop("width", 16)
    query = torch.randn(2, more.pop("heads", 4), 43, width) * 2 / (width / 16) ** 0.5
    key = torch.randn(2, more.pop("key_heads", heads), keys, width)
    site = SiteInfo(kind, query_layout=layout, key_layout=layout if keys == 43 else None)
    return Attention(query=query, key=key, site=site, **more)


def masked() -> tuple[Sites, None]:
    mask = torch.rand(2, 1, 43, 43) < 0.5
    mask[1, 0, 5] = False  # a query without keys
    added = torch.where(torch.rand(4, 1, 43) < 0.3, -torch.inf, torch.randn(4, 1, 43))
    return {
        "bool": made("bool", mask=mask),
        "float": made("float", mask=added, scale=torch.tensor([0.1, 0.2, 0.3, 0.4])),
        "causal": made("causal", causal=True),
    }, None


def grouped() -> tuple[Sites, None]:
    return {
        "grouped": made("grouped", heads=6, key_heads=2),
        "cross": made("cross", keys=29, width=20),
        "wide": made("wide", width=128),
        "floats": made("floats", scale=20.0),  # rows of rounded ones lie too far apart
    }, None


def windowed() -> tuple[Sites, None]:
    weights = torch.softmax(torch.randn(2, 3, 43, 43) * 3, -1)
    site = made("weights").site
    return {
        "windows": made("windows", segments=[0, 9, 10, 30]),
        "causal windows": made("causal windows", segments=[0, 16], causal=True),
        "weights": Attention.from_weights(weights, site=site),
    }, None


MODELS: dict[str, Callable[[], tuple[Sites, Any]]] = {
    one.__name__: one for one in (vggt, dinov2, masked, grouped, windowed)
}


class Case(NamedTuple):
    sites: Sites
    questions: list[Question]
    answers: dict[str, list[np.ndarray[Any, Any]]]
    oracle: Callable[..., Tensor]


@pytest.fixture(scope="module", params=MODELS)
def case(
    request: pytest.FixtureRequest, chromium: Any, tmp_path_factory: pytest.TempPathFactory
) -> Case:
    """One page of one model, and its answers to all questions from both kernels."""
    torch.manual_seed(0)
    sites, images = MODELS[request.param]()
    path = tmp_path_factory.mktemp("exact") / "page.html"
    explore(sites, path, images=images)
    text = path.read_text()
    start = text.index(">", text.index('id="vistvis-manifest"')) + 1
    manifest = json.loads(text[start : text.index("</script>", start)])
    dtypes = {one["name"]: one.get("dtype") for one in manifest["sites"]}
    assert set(dtypes) == set(sites)
    chromium.get(path.as_uri())
    generator = np.random.default_rng(0)
    names, questions = list(sites), []
    for number in range(2 * ASKED):
        name = names[int(generator.integers(len(names)))]
        batch, heads, queries, keys = sites[name].shape
        side = keys if number % 2 else queries
        b, h, at = (int(generator.integers(n)) for n in (batch, heads, side))
        questions.append(Question(name, b, h, at, bool(number % 2)))
    answers = {}
    for kernel in ("js", "wasm"):
        said = chromium.execute_async_script(ASK, [one.options(kernel) for one in questions])
        assert not said.startswith("error"), said
        flat, parts = np.frombuffer(base64.b64decode(said), np.float32), []
        for one in questions:
            count = sites[one.site].shape[2 if one.column else 3]
            parts.append(flat[:count])
            flat = flat[count:]
        assert not len(flat)
        answers[kernel] = parts

    @cache
    def oracle(name: str, b: int, h: int, *, masks: bool = True) -> Tensor:
        """One head's matrix of the stored halves (or floats), in float64."""
        attention = sites[name]
        if attention.weights is not None:
            return attention.weights[b, h].double()
        dtype = getattr(torch, dtypes[name])
        key_head = h // attention.groups
        query, key = attention.query[b, h].to(dtype), attention.key[b, key_head].to(dtype)
        mask = attention.mask
        if mask is not None:
            mask = mask.expand(attention.shape)[b, h][None]
        if attention.segments is not None:
            of = torch.searchsorted(attention.segments, torch.arange(len(query)), right=True)
            mask = (of[:, None] == of)[None]
        scale = attention.scale
        scale = float(scale.flatten()[h]) if isinstance(scale, Tensor) else scale
        return softmax_of(
            query[None],
            key[None],
            mask=mask if masks else None,
            causal=attention.causal and masks,
            scale=scale,
        )[0]

    return Case(sites, questions, answers, oracle)


def line(matrix: Tensor, one: Question, shift: int = 0) -> np.ndarray[Any, Any]:
    at = (one.index + shift) % matrix.shape[1 if one.column else 0]
    return (matrix[:, at] if one.column else matrix[at]).numpy()


def largest_logit(attention: Attention) -> float:
    if attention.weights is not None:
        return 0.0
    logits = attention.logits(None)
    return float(logits[logits.isfinite()].abs().max())


@pytest.mark.parametrize("kernel", ["js", "wasm"])
def test_rows_and_columns_are_exact(case: Case, kernel: str) -> None:
    sharpest = dict.fromkeys(case.sites, 0.0)
    logits = {name: largest_logit(attention) for name, attention in case.sites.items()}
    for one, answer in zip(case.questions, case.answers[kernel], strict=True):
        expected = line(case.oracle(one.site, one.batch, one.head), one)
        # A float32 sum rounds with the logits; the stored maxima of columns are float32 too.
        more = 4 * EPS * logits[one.site] if kernel == "wasm" else 0.0
        assert np.abs(answer - expected).max() <= TOLERANCE + more, one
        sharpest[one.site] = max(sharpest[one.site], float(expected.max()))
    assert min(sharpest.values()) > 0.05, sharpest  # near-uniform rows would hide mistakes


def test_both_kernels_ran(case: Case) -> None:
    """Float32 sums round otherwise than float64 ones: equal answers would be of one kernel."""
    plain = [a.weights is None and a.mask is None for a in case.sites.values()]
    pairs = zip(case.answers["js"], case.answers["wasm"], strict=True)
    if any(plain):
        assert any(not np.array_equal(js, wasm) for js, wasm in pairs)


@pytest.mark.parametrize("mistake", ["swapped heads", "dropped mask", "a token off"])
def test_mistakes_are_seen(case: Case, mistake: str) -> None:
    seen: set[str] = set()
    could: set[str] = set()
    for one, answer in zip(case.questions, case.answers["js"], strict=True):
        attention = case.sites[one.site]
        heads, masks, shift = attention.shape[1], True, 0
        head = (one.head + 1) % heads if mistake == "swapped heads" else one.head
        if mistake == "dropped mask":
            hidden = attention.mask is not None or attention.segments is not None
            if not (hidden or (attention.weights is None and attention.causal)):
                continue
            masks = False
        if mistake == "a token off":
            shift = 1
        could.add(one.site)
        wrong = line(case.oracle(one.site, one.batch, head, masks=masks), one, shift)
        if np.abs(answer - wrong).max() > 1e-3:
            seen.add(one.site)
    assert seen == could


def tampered(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of the page's first site, and make the manifest's checksum fit again."""
    text = path.read_text()
    tag = text.index('id="vistvis-manifest"')
    start = text.index(">", tag) + 1
    end = text.index("</script>", start)
    manifest = json.loads(text[start:end])
    change(manifest["sites"][0])
    data = json.dumps(manifest)
    head = f'id="vistvis-manifest" data-crc32="{zlib.crc32(data.encode())}">'
    path.write_text(text[:tag] + head + data + text[end:])


LIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "checksum": (lambda h: h.update(crc32=1), "changed or cut short"),
    "missing": (lambda h: h["tensors"].pop("rows"), "it has no rows"),
    "other shape": (lambda h: h["tensors"]["key"].update(shape=[2, 4, 15, 43]), "its key is"),
    "more tokens": (lambda h: h.update(shape=[2, 4, 44, 43]), "its query is"),
    "no shape": (lambda h: h.update(shape=[2, 4, -1, 43]), "its shape is not"),
    "huge": (
        lambda h: [
            h.update(shape=[2, 4, 43, 2**40]),
            h["tensors"]["key"].update(shape=[2, 4, 16, 2**40]),
        ],
        "its key is too short",
    ),
    "longer": (
        lambda h: [
            h.update(shape=[2, 4, 43, 44]),
            h["tensors"]["key"].update(shape=[2, 4, 16, 44]),
        ],
        "shorter than its shape says",
    ),
    "shorter": (
        lambda h: [
            h.update(shape=[2, 4, 43, 42]),
            h["tensors"]["key"].update(shape=[2, 4, 16, 42]),
        ],
        "longer than its shape says",
    ),
    "outside": (lambda h: h["tensors"]["key"].update(start=10**9), "outside of its data"),
    "dtype": (lambda h: h["tensors"]["key"].update(dtype="int8"), "its key is no tensor"),
    "scale": (lambda h: h.update(scale=[1.0]), "its scale is no number"),
}


@pytest.mark.parametrize("without_workers", [False, True])
def test_lies_are_messages(chromium: Any, tmp_path: Path, without_workers: bool) -> None:
    page = explore({"plain <b>": made("plain")}, tmp_path / "page.html")
    original = page.read_text()
    script = "Object.defineProperty(window, 'Worker', {value: undefined})"
    if without_workers:
        added = chromium.execute_cdp_cmd(
            "Page.addScriptToEvaluateOnNewDocument", {"source": script}
        )
    try:
        for what, (change, message) in {"nothing": (lambda h: None, ""), **LIES}.items():
            page.write_text(original)
            tampered(page, change)
            chromium.get(page.as_uri())
            said = chromium.execute_async_script(
                "const done = arguments[0]; window.vistvis.row({site: 'plain <b>', token: 3})"
                ".then((row) => done(row.length), (error) => done(error.message))"
            )
            if what == "nothing":
                assert said == 43
            else:
                assert isinstance(said, str), what
                assert "plain <b>" in said
                assert message in said, (what, said)
    finally:
        if without_workers:
            chromium.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_where_wasm_cannot_run_it_is_javascript(chromium: Any, tmp_path: Path) -> None:
    page = explore({"plain": made("plain")}, tmp_path / "page.html")
    script = "Object.defineProperty(window, 'WebAssembly', {value: undefined})"
    added = chromium.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": script})
    try:
        chromium.get(page.as_uri())
        js, wasm = (
            chromium.execute_async_script(ASK, [Question("plain", 1, 2, 3, False).options(kernel)])
            for kernel in ("js", "wasm")
        )
        assert not js.startswith("error")
        assert js == wasm
    finally:
        chromium.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)
