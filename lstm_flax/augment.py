"""Random image distortions, drawn and applied on the device inside the train step."""

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates


def random_affine(
    key: jax.Array,
    images: jax.Array,
    *,
    max_rotation: float = 0.2,
    max_shear: float = 0.2,
    max_scale: float = 0.12,
    max_shift: float = 2.0,
) -> jax.Array:
    """Rotate, shear, scale and shift each image by amounts of its own, drawn uniformly.

    Args:
        key: PRNG key; the same key gives the same distortions.
        images: [batch, height, width], floating; what moves in from outside is 0.
        max_rotation: radians, either way.
        max_shear: radians, either way.
        max_scale: fraction by which height and width, each by itself, grow or shrink.
        max_shift: pixels along each axis, either way.
    """
    batch, height, width = images.shape
    limits = jnp.array(
        [max_rotation, max_shear, max_scale, max_scale, max_shift, max_shift], images.dtype
    )
    drawn = limits * jax.random.uniform(key, (batch, 6), images.dtype, -1, 1)
    rotation, shear, scale_y, scale_x, shift_y, shift_x = drawn.T

    # Output pixel (y, x), seen from the centre, is read at [[a, b], [c, d]] (y, x) + shift.
    cos, sin, slant = jnp.cos(rotation), jnp.sin(rotation), jnp.tan(shear)
    a, b = (1 + scale_y) * cos, (1 + scale_x) * (cos * slant - sin)
    c, d = (1 + scale_y) * sin, (1 + scale_x) * (sin * slant + cos)

    y, x = jnp.meshgrid(
        jnp.arange(height, dtype=images.dtype) - (height - 1) / 2,
        jnp.arange(width, dtype=images.dtype) - (width - 1) / 2,
        indexing="ij",
    )

    def warp(image, a, b, c, d, shift_y, shift_x):
        source_y = a * y + b * x + shift_y + (height - 1) / 2
        source_x = c * y + d * x + shift_x + (width - 1) / 2
        return map_coordinates(image, [source_y, source_x], order=1)

    return jax.vmap(warp)(images, a, b, c, d, shift_y, shift_x)
