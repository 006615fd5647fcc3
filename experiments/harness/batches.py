"""Arrays computed in batches of one size."""

from collections.abc import Callable

import numpy as np


def in_batches(
    compute: Callable[[np.ndarray], np.ndarray], images: np.ndarray, batch_size: int
) -> np.ndarray:
    """Return `compute` of all images [n, ...], of which it sees `batch_size` at a time.

    The last batch is filled up, so that all batches are compiled once and computed in the same way.
    """
    filled = np.arange(-(-len(images) // batch_size) * batch_size) % len(images)
    batches = filled.reshape(-1, batch_size)
    return np.concatenate([compute(images[batch]) for batch in batches])[: len(images)]
