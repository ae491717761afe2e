"""Segmentation: decoders, sliding windows, and masks of an image's own size."""
