"""Runs on disk: a manifest, one safetensors file per site, and the images.

`RunWriter` and `save_run` write, `open_run` reads. Parts: `tensors` (one file), `codec`
(`Attention` as tensors and facts), `formats` (single files, for the decorators), `folders` (local
or behind a URL), `manifest` (what a run says about itself), `ledger` (a run that is being written),
`writer`, `reader`.
"""

from __future__ import annotations

from vistvis.store.reader import Run as Run
from vistvis.store.reader import open_run as open_run
from vistvis.store.writer import RunWriter as RunWriter
from vistvis.store.writer import save_run as save_run
