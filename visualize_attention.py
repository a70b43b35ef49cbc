"""The names of the earlier `visualize_attention.py`, now from `vggt_adapter`."""

from __future__ import annotations

from vggt_adapter import VGGT as VGGT
from vggt_adapter import AttentionExtractor as AttentionExtractor
from vggt_adapter import demo_visualize_token_attention as demo_visualize_token_attention
from vggt_adapter import extract_both_attentions as extract_both_attentions
from vggt_adapter import get_attention_values as get_attention_values
from vggt_adapter import load_and_preprocess_images as load_and_preprocess_images
from vggt_adapter import visualize_attention_on_image as visualize_attention_on_image
