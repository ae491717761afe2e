"""Workers in other processes, as one backend over gRPC."""
