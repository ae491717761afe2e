"""What several checkpoint formats share: names, preprocessing and reference outputs of a family."""
