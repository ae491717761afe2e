"""What models take: images, clips, texts and latent vectors, and the transforms to tensors."""
