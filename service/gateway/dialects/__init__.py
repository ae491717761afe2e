"""Other servers' interfaces for embeddings, each under a prefix, so that their clients work."""
