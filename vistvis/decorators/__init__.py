"""The visTvis front end: decorators that store what a function returns, and overlays of that."""

from __future__ import annotations

from vistvis.decorators.decorate import visTvis_layer_counter as visTvis_layer_counter
from vistvis.decorators.decorate import visTvis_store as visTvis_store
