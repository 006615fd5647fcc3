"""Random image distortions, applied on the device inside the train step."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates

from lstm_flax.arguments import check, check_array


def distort(
    key: jax.Array,
    images: jax.Array,
    *,
    max_rotation: float = 0.2,
    max_shear: float = 0.2,
    max_scale: float = 0.12,
    max_shift: float = 2.0,
    strength: float = 1.0,
    elastic: float = 0.0,
    elastic_radius: float = 4.0,
    gamma: float = 1.0,
) -> jax.Array:
    """Rotate, shear, scale, shift, bend and lighten each image at random, with one interpolation.

    Args:
        key: PRNG key; the same key gives the same distortions.
        images: [batch, height, width], floating; pixels that come from outside an image are 0.
        max_rotation: radians in either direction; this and the next three are drawn uniformly.
        max_shear: radians in either direction, less than a right angle.
        max_scale: fraction, less than 1, by which height and width grow or shrink independently.
        max_shift: pixels along each axis, in either direction.
        strength: factor of the four amounts above.
        elastic: standard deviation, in pixels along each axis, of each point's own displacement
            (Simard, Steinkraus and Platt, "Best Practices for Convolutional Neural Networks",
            2003); 0 does not bend the images.
        elastic_radius: standard deviation, in pixels, of the Gaussian that smooths these moves.
        gamma: at least 1; an image's pixels, which must be at least 0, are raised to a power from
            1 / gamma to gamma, whose logarithm is drawn uniformly. 1 leaves them as they are.

    Raises:
        ValueError: the images have another rank or dtype, or an amount is out of bounds.
    """
    check_array("images", images, ("batch", "height", "width"), np.floating)
    _check_less("strength", strength, math.inf)
    for name, amount, bound in (
        ("max_rotation", max_rotation, math.inf),
        ("max_shear", max_shear, math.pi / 2),
        ("max_scale", max_scale, 1),
        ("max_shift", max_shift, math.inf),
    ):
        _check_less(name, amount, bound)
        _check_less(f"strength * {name}", strength * amount, bound)
    _check_less("elastic", elastic, math.inf)
    radius = "a finite number greater than 0"
    check("elastic_radius", elastic_radius, radius, lambda r: 0 < r < math.inf)
    check("gamma", gamma, "a finite number of at least 1", lambda g: 1 <= g < math.inf)
    batch, height, width = images.shape
    amounts = [max_rotation, max_shear, max_scale, max_scale, max_shift, max_shift]
    limits = jnp.array([strength * amount for amount in amounts], images.dtype)
    drawn = limits * jax.random.uniform(key, (batch, 6), images.dtype, -1, 1)
    rotation, shear, scale_y, scale_x, shift_y, shift_x = drawn.T[..., None, None]

    # Output pixel (y, x), seen from the centre, is read at [[a, b], [c, d]] (y, x) + shift.
    cos, sin, slant = jnp.cos(rotation), jnp.sin(rotation), jnp.tan(shear)
    a, b = (1 + scale_y) * cos, (1 + scale_x) * (cos * slant - sin)
    c, d = (1 + scale_y) * sin, (1 + scale_x) * (sin * slant + cos)

    y, x = jnp.meshgrid(
        jnp.arange(height, dtype=images.dtype) - (height - 1) / 2,
        jnp.arange(width, dtype=images.dtype) - (width - 1) / 2,
        indexing="ij",
    )
    source_y = a * y + b * x + shift_y + (height - 1) / 2
    source_x = c * y + d * x + shift_x + (width - 1) / 2
    if elastic > 0:
        noise = jax.random.normal(jax.random.fold_in(key, 1), (2, *images.shape), images.dtype)
        moved = elastic * _smoothed(noise, elastic_radius)
        source_y, source_x = source_y + moved[0], source_x + moved[1]
    images = jax.vmap(lambda image, *at: map_coordinates(image, at, order=1))(
        images, source_y, source_x
    )
    if gamma > 1:
        drawn = jax.random.uniform(jax.random.fold_in(key, 2), (batch, 1, 1), images.dtype, -1, 1)
        images = images ** jnp.asarray(gamma, images.dtype) ** drawn
    return images


def _check_less(name: str, value: float, bound: float) -> None:
    check(name, value, f"at least 0 and less than {bound:.4g}", lambda v: 0 <= v < bound)


def _smoothed(noise: jax.Array, radius: float) -> jax.Array:
    """Blur noise [..., height, width] with a Gaussian that keeps its variance."""

    def weights(size):
        at = jnp.arange(size, dtype=noise.dtype)
        gaussian = jnp.exp(-(((at[:, None] - at) / radius) ** 2) / 2)
        return gaussian / jnp.linalg.norm(gaussian, axis=1, keepdims=True)

    height, width = noise.shape[-2:]
    return jnp.einsum("yi,...ij,xj->...yx", weights(height), noise, weights(width))
