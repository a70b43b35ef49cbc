"""A figure of a paper in one call: its numbers on captured attention, and how they are drawn.

A module a paper; each says where its formula stands and what it takes from where. docs/recipes.md
lists them, with what was compared with the authors' code.
"""

from vistvis.recipes import attention_sinks as attention_sinks
from vistvis.recipes import easi3r as easi3r
from vistvis.recipes import fast_vggt as fast_vggt
from vistvis.recipes import go_to_hunt as go_to_hunt
from vistvis.recipes import robust_vggt as robust_vggt
from vistvis.recipes import sparse_vggt as sparse_vggt
from vistvis.recipes import vggt4d as vggt4d
from vistvis.recipes import vggt_geometry as vggt_geometry
from vistvis.recipes import vggt_slam2 as vggt_slam2
