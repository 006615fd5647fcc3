"""Watch a trained run read digits: see `__main__`."""
