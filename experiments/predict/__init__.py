"""Pictures in, digits out: see `__main__`."""
