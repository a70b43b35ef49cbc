"""Runs on disk: a manifest, one safetensors file per site, and what is kept of the scene
(`docs/runs.md`).

`formats` is apart: single files of tensors, for the decorators.
"""

from __future__ import annotations

from vistvis.store.cleaning import clean_run as clean_run
from vistvis.store.identity import pass_id_of as pass_id_of
from vistvis.store.reader import Run as Run
from vistvis.store.reader import open_run as open_run
from vistvis.store.shelf import check_target as check_target
from vistvis.store.writer import RunWriter as RunWriter
from vistvis.store.writer import save_run as save_run
