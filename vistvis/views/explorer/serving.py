"""A page and its sites at an address of this machine alone."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from vistvis.views.explorer.contents import Contents
from vistvis.views.explorer.page import page_parts

_HOST = "127.0.0.1"


class PageServer(ThreadingHTTPServer):
    """Serves one page at `url` once `serve_forever` runs; closed at the end of a `with` block.

    Paths are looked up among those of the page, so that no file of the disk can be asked for. They
    begin with a secret, which other users of the machine do not know, and `Host` has to be this
    address: a page elsewhere can't reach it by a name of its own.
    """

    daemon_threads = True

    def __init__(self, contents: Contents) -> None:
        super().__init__((_HOST, 0), _Handler)
        self.base = f"/{secrets.token_urlsafe(16)}/"
        self.hosts = {f"{host}:{self.server_port}" for host in (_HOST, "localhost")}
        self._contents, self._lock = contents, threading.Lock()
        self.answers: dict[str, tuple[str, Callable[[], Iterator[bytes]]]] = {
            self.base: ("text/html; charset=utf-8", self._page)
        }
        for number in range(len(contents.places)):
            path = self.base + contents.site_file(number)
            self.answers[path] = "application/octet-stream", partial(self._site, number)

    @property
    def url(self) -> str:
        return f"http://{_HOST}:{self.server_port}{self.base}"

    def _page(self) -> Iterator[bytes]:
        return (part.encode() for part in page_parts(self._contents, with_sites=False))

    def _site(self, number: int) -> Iterator[bytes]:
        with self._lock:
            data = self._contents.site(number)
        yield data


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = 30

    def do_GET(self) -> None:  # the name that http.server looks for
        if self.headers.get("Host") not in self.server.hosts:
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        found = self.server.answers.get(self.path)
        if found is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        kind, parts = found
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        try:
            for part in parts():
                self.wfile.write(part)
        except ConnectionError:  # the reader left
            self.close_connection = True

    def version_string(self) -> str:
        return "vistvis"

    def log_message(self, *_: Any) -> None:
        """Nothing: the address with its secret would stand in the terminal at every request."""
