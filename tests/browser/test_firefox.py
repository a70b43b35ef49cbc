"""The page in Firefox, spoken to over its own WebDriver BiDi socket: no driver is needed."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vistvis
from vistvis import Attention, SiteInfo, TokenLayout

LAYOUT = TokenLayout(2, (5, 6), ("camera",), 14)
COUNT = LAYOUT.num_tokens


@pytest.fixture(scope="module")
def firefox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """`firefox(method, parameters)` asks a headless Firefox, and gives its result."""
    websocket = pytest.importorskip("websocket", reason="websocket-client comes with selenium")
    binary = shutil.which("firefox") or shutil.which("firefox-esr")
    if binary is None:
        pytest.skip("Firefox is not installed")
    home = tmp_path_factory.mktemp("firefox")
    words = [binary, "--headless", "--profile", str(home), "--remote-debugging-port", "0"]
    said = home / "said"
    with said.open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, env={"HOME": str(home)})
    try:
        end = time.monotonic() + 60
        while not (found := re.search(r"WebDriver BiDi listening on (ws://\S+)", said.read_text())):
            assert time.monotonic() < end, said.read_text()
            assert process.poll() is None, said.read_text()
            time.sleep(0.1)
        socket = websocket.create_connection(
            f"{found[1]}/session", timeout=60, suppress_origin=True
        )
        numbers = itertools.count(1)
        events: list[Any] = []

        def ask(method: str, **parameters: Any) -> Any:
            number = next(numbers)
            socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
            while (answer := json.loads(socket.recv())).get("id") != number:
                events.append(answer)
            assert answer["type"] == "success", answer
            return answer["result"]

        ask.events = events  # type: ignore[attr-defined]
        ask("session.new", capabilities={})
        ask("session.subscribe", events=["log.entryAdded", "network.beforeRequestSent"])
        yield ask
        socket.close()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Attention, Path]:
    torch.manual_seed(0)
    query, key = (2.5 * torch.randn(1, 2, COUNT, 16) for _ in range(2))
    site = SiteInfo("global", "global", query_layout=LAYOUT, key_layout=LAYOUT)
    attention = Attention(query=query.half(), key=key.half(), site=site)
    points = torch.randn(2, 5, 6, 3)
    path = tmp_path_factory.mktemp("page") / "page.html"
    images = torch.rand(2, 3, *LAYOUT.image_size)
    vistvis.explore({"global": attention}, path, images=images, points=points)
    return attention, path


def test_rows_are_exact_and_the_page_is_painted(firefox: Any, made: tuple[Attention, Path]) -> None:
    attention, path = made
    (context,) = firefox("browsingContext.getTree")["contexts"]
    target = {"context": context["context"]}
    firefox("browsingContext.navigate", url=path.as_uri(), wait="complete", **target)

    def run(code: str) -> Any:
        result = firefox(
            "script.evaluate",
            expression=f"(async () => JSON.stringify(await (async () => {{ {code} }})()))()",
            target=target,
            awaitPromise=True,
        )
        assert result["type"] == "success", result
        return json.loads(result["result"]["value"])

    assert run("await vistvis.ready; return vistvis.sites.map((one) => one.name)") == ["global"]
    exact = Attention(query=attention.query.double(), key=attention.key.double())
    for kernel, token in itertools.product(("js", "wasm"), (0, 7, COUNT - 1)):
        asked = f"{{site: 'global', head: 1, token: {token}, key: {token}, kernel: '{kernel}'}}"
        row = run(f"return [...await vistvis.row({asked})]")
        column = run(f"return [...await vistvis.column({asked})]")
        rows, columns = (
            given(token, batch=0, heads=1).flatten().numpy()
            for given in (exact.rows, exact.columns)
        )
        logits = float(exact.logits(token, batch=0, heads=1).abs().max())
        more = 4 * np.finfo(np.float32).eps * logits if kernel == "wasm" else 0
        assert rows.max() > 0.3  # near-uniform rows would hide mistakes
        assert np.abs(np.array(row) - rows).max() <= 2e-6 + more
        assert np.abs(np.array(column) - columns).max() <= 2e-6 + more
    # Another query is painted otherwise, without an error and without a request.
    pixels = "return [...document.querySelector('figure canvas').getContext('2d')"
    pixels += ".getImageData(0, 0, 6, 5).data]"
    run("vistvis.set({head: 0, token: 8, norm: 'linear'}); return 0")
    time.sleep(0.5)
    before = run(pixels)
    run("vistvis.set({token: 30}); return 0")
    time.sleep(0.5)
    assert run(pixels) != before
    assert run("return document.querySelector('.message').textContent") == ""
    asked_for = [
        one["params"]["request"]["url"]
        for one in firefox.events
        if one.get("method") == "network.beforeRequestSent"
    ]
    assert [url for url in asked_for if not url.startswith(("file:", "data:", "blob:"))] == []
    errors = [
        one["params"]["text"]
        for one in firefox.events
        if one.get("method") == "log.entryAdded" and one["params"]["level"] == "error"
    ]
    assert errors == []
