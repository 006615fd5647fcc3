"""Ways to read an image as a sequence; each takes images [batch, height, width] of any dtype.

Images of another rank are a ValueError.
"""

import jax
import numpy as np

from lstm_flax.arguments import check_array

PERMUTATION_SEED = 92916
"""Of the fixed random order in which the pixels are read, for `RandomState`: the one in the public
code of many papers on permuted MNIST, those on unitary and orthogonal RNNs among them."""


def rows(images: jax.Array) -> jax.Array:
    """Row by row: [batch, height, width], a row a time step."""
    check_array("images", images, ("batch", "height", "width"))
    return images


def pixels(images: jax.Array) -> jax.Array:
    """Pixel by pixel, as one reads text: [batch, height * width, 1]."""
    batch, height, width = rows(images).shape
    return images.reshape(batch, height * width, 1)


def permuted_pixels(images: jax.Array) -> jax.Array:
    """Pixel by pixel, in one random order that is the same for all images and runs.

    What lies side by side in the image is then far apart in time (Le, Jaitly and Hinton, "A Simple
    Way to Initialize Recurrent Networks of Rectified Linear Units", 2015).
    """
    sequence = pixels(images)
    order = np.random.RandomState(PERMUTATION_SEED).permutation(sequence.shape[1])
    return sequence[:, order]
