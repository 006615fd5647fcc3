"""Experiments that compose the library; each is run as `python -m experiments.NAME`."""
