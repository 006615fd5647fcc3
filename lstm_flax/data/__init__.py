"""MNIST and similar datasets through tfds, without TensorFlow. Importing this imports tfds."""

import importlib.util

if importlib.util.find_spec("tensorflow_datasets") is None:
    raise ImportError('lstm_flax.data needs tfds: pip install "lstm_flax[data]"')

from lstm_flax.data.datasets import DATASETS, DataError, Split, hold_out, prepare, read_split

__all__ = ["DATASETS", "DataError", "Split", "hold_out", "prepare", "read_split"]
