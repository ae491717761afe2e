"""The processes that Vitrail runs as: a single one, or separate gateways and workers."""
