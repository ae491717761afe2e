"""Collections over HTTP: created, filled, searched and deleted."""
