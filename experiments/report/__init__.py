"""Report on trained runs, side by side on one page: see `__main__`."""
