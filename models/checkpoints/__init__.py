"""Checkpoint files to trunks: sources, containers, formats, and strict loading."""
