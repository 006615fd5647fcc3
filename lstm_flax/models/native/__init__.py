"""An LSTM layer as one kernel in C++ for CPUs, behind `implementation="native"`.

XLA runs each time step as small products and loops that pass their results through memory, and its
matrix product is slower at these sizes than the processor allows; `kernel.cc` says what it does
instead. It is compiled on first use by the machine's own C++ compiler, for the machine's own
processor, in a few seconds, and kept in the user's cache folder.

It multiplies in float32, or in bfloat16 where the processor does. It has reverse-mode derivatives
of first order alone, and no place in what `jax.export` writes.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lstm_flax.models.native.build import BACKWARD, DTYPES, FORWARD, INPUT_GRADIENT
from lstm_flax.models.native.build import unavailable as problem

__all__ = ["BACKWARD", "DTYPES", "FORWARD", "INPUT_GRADIENT", "lstm_layer", "problem"]


@functools.partial(jax.custom_vjp, nondiff_argnames=("reverse",))
def lstm_layer(
    x: jax.Array,
    kernel_ih: jax.Array,
    kernel_hh: jax.Array,
    bias: jax.Array,
    h_0: jax.Array,
    c_0: jax.Array,
    lengths: jax.Array,
    reverse: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One layer and direction over whole sequences, as a scan of `LSTMCell` computes it.

    Args:
        x: float32 or bfloat16 [batch, time, features], zero in the padding; its dtype is that of
            the products. In bfloat16 there must be an even number of features, and of hidden units.
        kernel_ih: float32 [features, 4 * hidden_size].
        kernel_hh: float32 [hidden_size, 4 * hidden_size].
        bias: float32 [4 * hidden_size].
        h_0: [batch, hidden_size], as x.
        c_0: float32 [batch, hidden_size].
        lengths: int32 [batch], from 0 to time.
        reverse: start each sequence at its end.

    Returns:
        `(outputs, h_n, c_n)`: [batch, time, hidden_size], zero in the padding, and the final
        states, [batch, hidden_size] each; the dtypes are those of x, h_0 and c_0.
    """
    outputs, h_n, c_n, _, _ = _forward(
        x, kernel_ih, kernel_hh, bias, h_0, c_0, lengths, reverse=reverse, keep=False
    )
    return outputs, h_n, c_n


def _forward(x, kernel_ih, kernel_hh, bias, h_0, c_0, lengths, *, reverse: bool, keep: bool):
    """The layer, and what the backward pass needs if that is to be kept: gates and cell states."""
    (batch, time, _), hidden = x.shape, len(kernel_hh)
    kept = [(batch, time, 4 * hidden), (batch, time, hidden)] if keep else [(0,), (0,)]
    results = [
        jax.ShapeDtypeStruct((batch, time, hidden), x.dtype),
        jax.ShapeDtypeStruct(h_0.shape, x.dtype),
        jax.ShapeDtypeStruct(c_0.shape, jnp.float32),
        *[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in kept],
    ]
    return _call(FORWARD, x.dtype, results)(
        x, kernel_ih, kernel_hh, bias, h_0, c_0, lengths, reverse=reverse
    )


def _forward_to_differentiate(x, kernel_ih, kernel_hh, bias, h_0, c_0, lengths, reverse):
    outputs, h_n, c_n, gates, cells = _forward(
        x, kernel_ih, kernel_hh, bias, h_0, c_0, lengths, reverse=reverse, keep=True
    )
    kept = (x, kernel_ih, kernel_hh, h_0, c_0, lengths, outputs, gates, cells)
    return (outputs, h_n, c_n), kept


def _backward(reverse, kept, cotangents):
    x, kernel_ih, kernel_hh, h_0, c_0, lengths, outputs, gates, cells = kept
    weights = [kernel_ih.shape, kernel_hh.shape, gates.shape[2:]]
    results = [
        jax.ShapeDtypeStruct(gates.shape, x.dtype),
        *[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (*weights, c_0.shape)],
    ]
    gates_at = 6  # among the operands; their gradients take their place
    aliases = {"input_output_aliases": {gates_at: 0}} if x.dtype == gates.dtype else {}
    d_gates, d_ih, d_hh, d_bias, d_c_0 = _call(BACKWARD, x.dtype, results, **aliases)(
        x, kernel_hh, h_0, c_0, lengths, outputs, gates, cells, *cotangents, reverse=reverse
    )

    # XLA leaves out what nobody asks for, often both of these.
    like_x = jax.ShapeDtypeStruct(x.shape, x.dtype)
    d_x = _call(INPUT_GRADIENT, x.dtype, like_x)(d_gates, kernel_ih)
    first = jnp.maximum(lengths - 1, 0) if reverse else jnp.zeros_like(lengths)
    at_first = jnp.take_along_axis(d_gates, first[:, None, None], axis=1)[:, 0]
    kernel = kernel_hh.astype(x.dtype).astype(jnp.float32)
    d_h_0 = jnp.dot(at_first.astype(jnp.float32), kernel.T, precision=jax.lax.Precision.HIGHEST)
    return d_x, d_ih, d_hh, d_bias, d_h_0.astype(x.dtype), d_c_0, None


lstm_layer.defvjp(_forward_to_differentiate, _backward)


def _call(name: str, dtype: DTypeLike, results: Any, **options) -> Callable:
    target = name.format(jnp.dtype(dtype).name)
    return jax.ffi.ffi_call(target, results, vmap_method="sequential", **options)
