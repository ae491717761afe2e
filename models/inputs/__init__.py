"""Inputs of models: images, clips, texts and latent vectors, and their transforms to tensors."""
