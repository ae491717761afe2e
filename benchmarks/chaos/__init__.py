"""Faults in real processes under load: `python -m benchmarks.chaos`, or `make chaos`."""
