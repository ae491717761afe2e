"""Vitrail's own REST routes."""
