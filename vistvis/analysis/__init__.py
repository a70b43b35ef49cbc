"""Numbers about attention, exact and without the matrix: streamed over blocks of rows."""

from vistvis.analysis.blocks import rollout as rollout
from vistvis.analysis.layouts import distance as distance
from vistvis.analysis.layouts import frame_mass as frame_mass
from vistvis.analysis.layouts import special_mass as special_mass
from vistvis.analysis.likeness import similarity as similarity
from vistvis.analysis.matching import correspondence as correspondence
from vistvis.analysis.matching import match_rate as match_rate
from vistvis.analysis.products import cost_volume as cost_volume
from vistvis.analysis.products import gram as gram
from vistvis.analysis.products import logits as logits
from vistvis.analysis.rows import effective_rank as effective_rank
from vistvis.analysis.rows import entropy as entropy
from vistvis.analysis.rows import received as received
from vistvis.analysis.rows import sink_tokens as sink_tokens
from vistvis.analysis.rows import top_keys as top_keys
from vistvis.analysis.rows import top_mass as top_mass
from vistvis.analysis.summary import Summary as Summary
from vistvis.analysis.summary import summarize as summarize
from vistvis.analysis.table import Table as Table
from vistvis.analysis.values import sink_kinds as sink_kinds
from vistvis.analysis.values import weighted_values as weighted_values
