"""A page to draw digits on, for a trained run to read: see `__main__`."""
