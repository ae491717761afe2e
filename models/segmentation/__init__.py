"""Semantic segmentation: decoders, sliding windows, and masks at the image's size."""
