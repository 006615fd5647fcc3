"""The model that the repository holds: see `model`."""
