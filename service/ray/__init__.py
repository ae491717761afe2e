"""Workers as deployments of Ray Serve, as one backend."""
