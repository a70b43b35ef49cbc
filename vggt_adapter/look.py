"""The former place of `sample_views`."""

from vggt_adapter.steps import sample_views as sample_views
