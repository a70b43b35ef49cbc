"""Runs on disk: a manifest, one safetensors file per site, and the images (`docs/runs.md`).

`formats` is apart: single files of tensors, for the decorators.
"""

from __future__ import annotations

from vistvis.store.reader import Run as Run
from vistvis.store.reader import open_run as open_run
from vistvis.store.writer import RunWriter as RunWriter
from vistvis.store.writer import save_run as save_run
