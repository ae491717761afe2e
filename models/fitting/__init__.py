"""Fitting heads to labelled images on a frozen trunk: examples, features, training, report."""
