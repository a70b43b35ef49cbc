"""The explorer at its hosts: a file, a folder over HTTP, `--serve`, a notebook."""

from __future__ import annotations

import base64
import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from zoo import VGGTLike

import vistvis
from vistvis import cli
from vistvis.views.explorer.contents import choose, gather
from vistvis.views.explorer.page import script
from vistvis.views.explorer.serving import PageServer

ROW = """
const [explorer, options, done] = arguments;
const found = explorer ? explorer.vistvis : window.vistvis;
found.row(options).then((row) => done(Array.from(row)), (error) => done(String(error)));
"""


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.rand(1, 2, 3, 28, 42)


@pytest.fixture(scope="module")
def captured(images: torch.Tensor) -> Any:
    torch.manual_seed(0)
    model = VGGTLike().eval()
    with vistvis.capture(model) as captured, torch.no_grad():
        model(images)
    return captured


@contextmanager
def running(server: Any) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def check_rows(browser: Any, captured: Any, explorer: Any = None) -> None:
    """Some rows of every site, by PyTorch from what is in float16."""
    for name, attention in captured.items():
        rounded = vistvis.Attention(
            query=attention.query.half().double(),
            key=attention.key.half().double(),
            scale=attention.scale,
        )
        for head, token in ((0, 0), (1, 5)):
            options = {"site": name, "batch": 0, "head": head, "token": token}
            row = browser.execute_async_script(ROW, explorer, options)
            assert isinstance(row, list), row
            expected = rounded.rows([token], batch=0, heads=head)[0, 0, 0]
            assert np.abs(np.array(row) - expected.numpy()).max() < 2e-6


def complaints(browser: Any) -> list[Any]:
    """What the console says, but for the icon that browsers ask servers for."""
    return [one for one in browser.get_log("browser") if "favicon" not in one["message"]]


def requests(browser: Any) -> list[str]:
    """The addresses that were asked for since the last look, pictures in the page aside."""
    found = []
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            found.append(message["params"]["request"]["url"])
    return [url for url in found if not url.startswith(("data:", "blob:"))]


def test_a_file(captured: Any, images: Any, tmp_path: Path, page: Any, chromium: Any) -> None:
    requests(chromium)
    written = vistvis.explore(captured, tmp_path / "page.html", images=images)
    check_rows(page(written), captured)
    assert complaints(chromium) == []
    assert requests(chromium) == [written.as_uri()]


def test_photographs_start_at_the_head_that_their_model_suggests(
    tmp_path: Path, page: Any, chromium: Any
) -> None:
    out = tmp_path / "page.html"
    samples = Path(__file__).parents[2] / "vggt_adapter" / "samples"
    assert cli.main(["explore", str(samples), "--out", str(out), "--no-open"]) == 0
    assert page(out).execute_script("return vistvis.state.head") == 0
    chromium.execute_script("vistvis.set({head: 'mean'})")
    time.sleep(0.5)
    link = chromium.current_url
    assert "head=mean" in link
    chromium.get("about:blank")
    chromium.get(link)
    assert chromium.execute_script("return vistvis.state.head") == "mean"


def test_a_folder_on_any_static_host(
    captured: Any, images: Any, tmp_path: Path, chromium: Any
) -> None:
    folder = tmp_path / "site"
    vistvis.explore(captured, folder=folder, images=images)
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with running(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as url:
        chromium.get(url)
        check_rows(chromium, captured)
        assert complaints(chromium) == []
        # One that is missing or changed is a message, and the others go on.
        first, second, *_ = sorted(folder.glob("site-*.bin"))
        first.unlink()
        second.write_bytes(second.read_bytes()[:-1] + b"?")
        chromium.execute_cdp_cmd("Network.clearBrowserCache", {})
        chromium.get(url)
        names = list(captured)
        options = {"site": names[0], "head": 0, "token": 0}
        assert "is not there (404)" in chromium.execute_async_script(ROW, None, options)
        told = chromium.execute_async_script(ROW, None, options | {"site": names[1]})
        assert "was changed or cut short" in told
        row = chromium.execute_async_script(ROW, None, options | {"site": names[2]})
        assert isinstance(row, list)
    complaints(chromium)


def test_a_folder_opened_as_a_file_says_how(captured: Any, tmp_path: Path, page: Any) -> None:
    browser = page(vistvis.explore(captured, folder=tmp_path / "site"))
    options = {"site": next(iter(captured)), "head": 0, "token": 0}
    told = browser.execute_async_script(ROW, None, options)
    assert "can't be reached; it is opened over http" in told
    complaints(browser)


def test_served(captured: Any, images: Any, chromium: Any) -> None:
    contents = gather(captured, choose(captured, None), images=images)
    with contents.spool, PageServer(contents) as server, running(server):
        chromium.get(server.url)
        check_rows(chromium, captured)
        assert complaints(chromium) == []
        assert server.server_address[0] == "127.0.0.1"

        def status(path: str, **headers: str) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
            connection.request("GET", path, headers=headers)
            with connection.getresponse() as answer:
                answer.read()
            connection.close()
            return answer.status

        site = server.base + contents.site_file(0)
        assert status(server.base) == status(site) == 200
        assert status(site, Host=f"localhost:{server.server_port}") == 200
        for host in ("example.org", f"example.org:{server.server_port}", "127.0.0.1", ""):
            assert status(site, Host=host) == 403
        outside = ["/", "/index.html", "/etc/passwd", site[1:], f"/x{site}", server.base[:-1]]
        outside += [f"{server.base}../{name}" for name in ("etc/passwd", "../../etc/passwd")]
        outside += [f"{server.base}%2e%2e/etc/passwd", f"{site}/..", f"{server.base}site-99.bin"]
        assert {status(path) for path in outside} <= {400, 404}


WIDGET = """
const [script, manifest, pictures, done] = arguments;
const handlers = [];
window.model = {
  get: (name) => ({ manifest, pictures })[name],
  on: (_, handler) => handlers.push(handler),
  asked: [],
  send: ({ site }) => window.model.asked.push(site),
  answer: (site, base64) => {
    const bytes = Uint8Array.from(atob(base64), (one) => one.charCodeAt(0));
    for (const handler of handlers) handler({ site }, [new DataView(bytes.buffer)]);
  },
};
import(URL.createObjectURL(new Blob([script], { type: "text/javascript" }))).then((module) => {
  window.cell = document.body.appendChild(document.createElement("div"));
  module.default.render({ model: window.model, el: window.cell });
  done("rendered");
}, (error) => done(String(error)));
"""


def test_a_widget_asks_its_model(captured: Any, images: Any, chromium: Any, tmp_path: Path) -> None:
    blank = tmp_path / "blank.html"
    blank.write_text("<!doctype html><title>blank</title>")
    chromium.get(blank.as_uri())
    widget = vistvis.explore(captured, images=images, static=False)
    arguments = script("widget.js"), widget.manifest, widget.pictures
    assert chromium.execute_async_script(WIDGET, *arguments) == "rendered"
    name = list(captured)[2]
    chromium.execute_script("window.row = cell.vistvis.row({ site: arguments[0], token: 5 })", name)
    until = time.monotonic() + 30
    while 2 not in chromium.execute_script("return model.asked") and time.monotonic() < until:
        time.sleep(0.1)
    data = base64.b64encode(widget._contents.site(2)).decode()
    chromium.execute_script("model.answer(2, arguments[0])", data)
    row = "window.row.then((row) => arguments[0](row.reduce((one, other) => one + other)))"
    assert chromium.execute_async_script(row) == pytest.approx(1, abs=1e-5)
    sent: list[Any] = []
    widget.send = lambda content, buffers=(): sent.append((content, buffers))
    widget._answer(widget, {"site": 1}, [])
    widget._answer(widget, {"site": "../x"}, [])
    assert sent[0] == ({"site": 1}, [widget._contents.site(1)])
    assert sent[1] == ({"site": "../x", "error": "there is no site ../x"}, ())


CELL = """
import torch, vistvis
from zoo import VGGTLike
torch.manual_seed(0)
images = torch.rand(1, 2, 3, 28, 42)
torch.manual_seed(0)
model = VGGTLike().eval()
with vistvis.capture(model) as captured, torch.no_grad():
    model(images)
vistvis.explore(captured, images=images, static={static})
"""


@contextmanager
def lab(folder: Path, cell: str) -> Iterator[str]:
    """A JupyterLab with a notebook of one cell; the address of the notebook."""
    pytest.importorskip("jupyterlab")
    notebook = {
        "cells": [
            {
                "cell_type": "code",
                "id": "one",
                "metadata": {},
                "source": cell,
                "outputs": [],
                "execution_count": None,
            }
        ],
        "metadata": {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (folder / "one.ipynb").write_text(json.dumps(notebook))
    log = folder / "lab.log"
    words = ["--no-browser", "--allow-root", "--expose-app-in-browser", "--ip=127.0.0.1"]
    words += ["--port=0", "--IdentityProvider.token=letmein", f"--ServerApp.root_dir={folder}"]
    with open(log, "w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *words],
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=folder,
        )
        try:
            until = time.monotonic() + 60
            url = ""
            while not url and time.monotonic() < until and process.poll() is None:
                found = [w for w in log.read_text().split() if w.startswith("http://127.0.0.1")]
                url = found[0].split("/lab")[0].split("/?")[0].rstrip("/") if found else ""
                time.sleep(0.2)
            assert url, log.read_text()[-2000:]
            yield f"{url}/lab/tree/one.ipynb?token=letmein"
        finally:
            process.terminate()
            process.wait(20)


def wait_for(browser: Any, code: str, *, seconds: float = 60) -> Any:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := browser.execute_script(code):
            return found
        time.sleep(0.3)
    raise AssertionError(f"never true: {code}")


RUN = """
const app = window.jupyterapp;
if (!app || !document.querySelector(".jp-CodeCell")) return false;
const kernel = app.shell.currentWidget?.sessionContext?.session?.kernel;
if (kernel?.status !== "idle") return false;
app.commands.execute("notebook:run-all-cells");
return true;
"""


def test_a_widget_in_jupyterlab(
    captured: Any, tmp_path: Path, chromium: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = Path(__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", f"{tests.parent}:{tests}")
    for variable in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    work = tmp_path / "work"
    work.mkdir()
    with lab(work, CELL.format(static=False)) as url:
        chromium.get(url)
        wait_for(chromium, RUN)
        found = "return [...document.querySelectorAll('.vistvis-cell')].find((one) => one.vistvis)"
        cell = wait_for(chromium, found)
        check_rows(chromium, captured, cell)
        chromium.get("about:blank")
        complaints(chromium)  # JupyterLab's own


def test_the_page_in_a_frame(captured: Any, images: Any, tmp_path: Path, chromium: Any) -> None:
    """What a saved notebook keeps; nothing in it reaches what is around it."""
    framed = vistvis.explore(captured, images=images, static=True)
    around = tmp_path / "around.html"
    around.write_text(f"<!doctype html><meta charset=utf-8>{framed._repr_html_()}")
    chromium.get(around.as_uri())
    chromium.switch_to.frame(0)
    try:
        wait_for(chromium, "return Boolean(window.vistvis)")
        check_rows(chromium, captured)
        assert chromium.execute_script("return origin") == "null"
        assert complaints(chromium) == []
    finally:
        chromium.switch_to.default_content()
