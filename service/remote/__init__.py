"""Workers in other processes, as one backend: gRPC out, errors back, nothing accepted lost."""
