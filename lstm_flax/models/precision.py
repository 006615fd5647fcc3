"""The precision that a product has, whichever way it was asked for."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def asked_precision(precision: Any, dtype: DTypeLike) -> jax.lax.Precision:
    """Of products of this dtype: the default one or the highest, which is what kernels have.

    Args:
        precision: as in `jax.lax.dot`; None is what `jax_default_matmul_precision` says.
        dtype: of both operands.
    """
    one = jax.ShapeDtypeStruct((1, 1), dtype)
    traced = jax.make_jaxpr(partial(jnp.dot, precision=precision))(one, one)
    asked = next(e.params["precision"] for e in traced.eqns if "dot_general" in e.primitive.name)
    is_default = asked in (None, (jax.lax.Precision.DEFAULT,) * 2)
    return jax.lax.Precision.DEFAULT if is_default else jax.lax.Precision.HIGHEST
