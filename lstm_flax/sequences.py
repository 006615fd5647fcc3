"""Ways to turn images [batch, height, width] of any dtype into sequences.

Images of another rank raise a ValueError.
"""

import jax
import numpy as np

from lstm_flax.arguments import check_array

PERMUTATION_SEED = 92916
"""Seed of `RandomState` for the fixed random order of the pixels. The public code of many papers on
permuted MNIST uses it, such as those on unitary and orthogonal RNNs."""


def rows(images: jax.Array) -> jax.Array:
    """Return a row per time step: [batch, height, width]."""
    check_array("images", images, ("batch", "height", "width"))
    return images


def pixels(images: jax.Array) -> jax.Array:
    """Return a pixel per time step, row after row: [batch, height * width, 1]."""
    batch, height, width = rows(images).shape
    return images.reshape(batch, height * width, 1)


def permuted_pixels(images: jax.Array) -> jax.Array:
    """Return a pixel per time step, in one random order that is the same for all images and runs.

    Neighbouring pixels are then far apart in time (Le, Jaitly and Hinton, "A Simple Way to
    Initialize Recurrent Networks of Rectified Linear Units", 2015).
    """
    sequence = pixels(images)
    order = np.random.RandomState(PERMUTATION_SEED).permutation(sequence.shape[1])
    return sequence[:, order]
