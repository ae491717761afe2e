"""The processes Vitrail runs as: everything in one, or gateways and workers apart."""
