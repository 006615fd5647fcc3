"""A trained run, watched while it reads: see `__main__`."""
