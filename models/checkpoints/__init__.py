"""From a published checkpoint file to a trunk: sources, containers, formats and strict loading."""
