"""Measuring which settings a model is fastest with on this machine."""
