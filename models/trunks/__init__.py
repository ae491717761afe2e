"""Trunks: backbones with their weights, shared between models; the unit of batching."""
