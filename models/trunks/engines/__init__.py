"""Engines: how a trunk's passes are run. One file each, found by being in this package."""
