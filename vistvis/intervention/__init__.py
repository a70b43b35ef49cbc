"""Changing what a model's attention computes while it runs: heads knocked out, keys cut off."""

from vistvis.intervention.intervening import Intervention as Intervention
from vistvis.intervention.intervening import intervene as intervene
