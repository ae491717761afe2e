"""Measures how far a model as it is served agrees with independent ways to run it."""
