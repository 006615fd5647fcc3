"""MNIST and its kin through tfds, without TensorFlow. Importing this imports tfds."""

from lstm_flax.data.datasets import DATASETS, DataError, Split, hold_out, prepare, read_split

__all__ = ["DATASETS", "DataError", "Split", "hold_out", "prepare", "read_split"]
