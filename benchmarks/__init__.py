"""Benchmarks. Each compares variants that take turns within one run, and prints ratios."""
