"""OpenAI's embeddings interface."""
