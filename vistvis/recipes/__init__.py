"""A figure of a paper in one call: its numbers on captured attention, and how they are drawn.

A module a paper; each says where its formula stands and what it takes from where. docs/recipes.md
lists them, with what was compared with the authors' code.
"""

from vistvis.recipes import fast_vggt as fast_vggt
from vistvis.recipes import robust_vggt as robust_vggt
from vistvis.recipes import vggt_slam2 as vggt_slam2
