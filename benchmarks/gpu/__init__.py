"""Measures and checks everything on a GPU, see `__main__.py`."""
