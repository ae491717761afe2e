"""Collections: embeddings of images with ids and metadata, searched by similarity."""
