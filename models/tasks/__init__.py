"""What models can be asked: one file a task. Needs no torch."""
