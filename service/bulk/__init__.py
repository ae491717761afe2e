"""Running a model over many images, to Parquet, on this machine or on a Ray cluster."""
