"""Photographs and videos: from what people type to upright pixels, and from pixels back to them."""
