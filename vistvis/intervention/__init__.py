"""Changing what a model's attention computes while it runs: heads knocked out, keys cut off."""

from vistvis.intervention.intervening import Intervention as Intervention
from vistvis.intervention.intervening import intervene as intervene
from vistvis.intervention.knockout import Knockout as Knockout
from vistvis.intervention.knockout import KnockoutTable as KnockoutTable
from vistvis.intervention.knockout import Rates as Rates
from vistvis.intervention.knockout import knockout_table as knockout_table
from vistvis.intervention.truth import Truth as Truth
from vistvis.intervention.truth import truth_of_scene as truth_of_scene
