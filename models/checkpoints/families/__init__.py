"""What several checkpoint formats have in common: how keys tell the architecture, and the outputs
that authors have besides. `models/checkpoints/` uses these; one file a family."""
