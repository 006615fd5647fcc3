"""A stack of LSTM layers by NVIDIA's cuDNN, behind `implementation="cudnn"`.

cuDNN takes all layers and directions in one call, and overlaps them. `jax.experimental.rnn` has
the calls; this is the operation around them, with every transformation that `lstm_layer` has. It is
defined by layers of that: they run on other platforms, under `vmap`, and in forward-mode and second
derivatives. How much cuDNN keeps for the gradients only cuDNN knows, so programs that call it are
made where JAX's CUDA plugin is installed; elsewhere those for GPUs scan.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import rnn
from jax.interpreters import ad, mlir

from lstm_flax.models.lstm_layer import (
    Operands,
    differentiate,
    is_valid_step,
    lstm_layer,
    moving_of,
    primitive,
    replaced,
)
from lstm_flax.models.precision import asked_precision

PLATFORM = "cuda"

Weights = tuple[jax.Array, jax.Array, jax.Array]
"""`(kernel_ih, kernel_hh, bias)` of one layer and direction, as in `Operands`."""


def why_not(dtype: Any) -> str | None:
    """Say in a few words why no program can call cuDNN for products in a dtype; None: it can."""
    if jnp.dtype(dtype) != jnp.float32:
        return f"products in {jnp.dtype(dtype).name}"
    if not hasattr(rnn.gpu_rnn, "compute_rnn_workspace_reserve_space_sizes"):
        return "JAX's CUDA plugin is not installed"
    return None


def lstm(
    x: jax.Array,
    h_0: jax.Array,
    c_0: jax.Array,
    layers: Sequence[Weights],
    lengths: jax.Array,
    *,
    bidirectional: bool = False,
    precision: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Layers over whole sequences, each on the output of the one below it.

    Args:
        x: float32 [batch, time, features], zero in the padding.
        h_0: float32 [layers * directions, batch, hidden_size]; so is `c_0`.
        c_0: the initial cell states.
        layers: the weights of each layer and direction.
        lengths: int32 [batch], from 0 to time.
        bidirectional: every other one of `layers` is a layer's reverse direction.
        precision: of the products; cuDNN may round to TensorFloat-32 unless it is the highest.

    Returns:
        `(outputs, h_n, c_n)`: [batch, time, hidden_size * directions], zero in the padding, and the
        final states, shaped as the initial ones.
    """
    results = forward_p.bind(
        x,
        h_0,
        c_0,
        pack(layers),
        lengths,
        num_layers=len(layers) // (1 + bidirectional),
        bidirectional=bidirectional,
        precision=precision,
        keep=False,
    )
    return tuple(results)


def pack(layers: Sequence[Weights]) -> jax.Array:
    """cuDNN's one array of weights: all kernels, transposed, then all biases, of which it has two.

    Its gates are in the order i, f, g, o too.
    """
    kernels = [kernel.T for layer in layers for kernel in layer[:2]]
    biases = [bias for *_, b in layers for bias in (b, jnp.zeros_like(b))]
    return jnp.concatenate([array.ravel() for array in (*kernels, *biases)])


# ---- What each primitive computes, by layers.


def forward(x, h_0, c_0, weights, lengths, *, num_layers, bidirectional, precision, keep):
    """`(outputs, h_n, c_n)`, and if `keep` a place for what cuDNN needs for the gradients."""
    sizes = (x.shape[-1], h_0.shape[-1], num_layers, bidirectional)
    kernels_ih, kernels_hh, *biases = rnn.unpack_lstm_weights(weights, *sizes)
    outputs, final = x, []
    for k in range(num_layers):
        inputs, outputs_of = outputs, []
        for n in range(k * (1 + bidirectional), (k + 1) * (1 + bidirectional)):
            bias = biases[0][n] + biases[1][n]
            weights_of = (kernels_ih[n].T, kernels_hh[n].T, bias)
            operands = Operands(inputs, *weights_of, h_0[n], c_0[n], lengths)
            is_reverse = bidirectional and n % 2 == 1
            output, *last = lstm_layer(operands, reverse=is_reverse, precision=precision)
            outputs_of.append(output)
            final.append(last)
        outputs = jnp.concatenate(outputs_of, axis=-1)
    h_n, c_n = (jnp.stack(states) for states in zip(*final, strict=True))
    kept = [jnp.zeros(_kept_size(x, *sizes[1:], precision), x.dtype)] if keep else []
    return outputs, h_n, c_n, *kept


def gradients(x, h_0, c_0, weights, lengths, outputs, kept, d_outputs, d_h_n, d_c_n, **static):
    """The gradients of `(x, h_0, c_0, weights)`."""

    def run(x, h_0, c_0, weights):
        return forward(x, h_0, c_0, weights, lengths, keep=False, **static)

    return jax.vjp(run, x, h_0, c_0, weights)[1]((d_outputs, d_h_n, d_c_n))


def tangents(*arrays, moving, **static):
    """The tangents of `(outputs, h_n, c_n)`, see `lstm_layer.tangents`."""
    operands, along = arrays[:5], arrays[len(arrays) - len(moving) :]

    def move(*moved):
        return forward(*replaced(operands, moving, moved), keep=False, **static)

    return jax.jvp(move, tuple(operands[k] for k in moving), tuple(along))[1]


# ---- The same by cuDNN.


def forward_by_cudnn(x, h_0, c_0, weights, lengths, *, keep, **static):
    """`forward`; a sequence of length 0, which cuDNN may not have, is one of length 1 to it."""
    results, (*_, kept) = rnn.lstm_fwd(
        x, h_0, c_0, weights, jnp.maximum(lengths, 1), **_settings(x, h_0, **static)
    )
    is_empty = (lengths == 0)[:, None]
    outputs, h_n, c_n = results
    outputs = jnp.where(is_empty[:, :, None], 0, outputs)
    h_n, c_n = jnp.where(is_empty, h_0, h_n), jnp.where(is_empty, c_0, c_n)
    return outputs, h_n, c_n, *([kept] if keep else [])


def gradients_by_cudnn(
    x, h_0, c_0, weights, lengths, outputs, kept, d_outputs, d_h_n, d_c_n, **static
):
    """`gradients`; whatever comes in at the padding or goes out there is zero."""
    is_valid = is_valid_step(lengths, x.shape[1])[:, :, None]
    is_empty = (lengths == 0)[:, None]
    d_final = [jnp.where(is_empty, 0, d) for d in (d_h_n, d_c_n)]
    d_x, d_h_0, d_c_0, d_weights, _ = rnn.lstm_bwd(
        **_settings(x, h_0, **static),
        residuals=(x, h_0, c_0, weights, jnp.maximum(lengths, 1), outputs, kept),
        gradients=(jnp.where(is_valid, d_outputs, 0), *d_final),
    )
    d_h_0, d_c_0 = jnp.where(is_empty, d_h_n, d_h_0), jnp.where(is_empty, d_c_n, d_c_0)
    return jnp.where(is_valid, d_x, 0), d_h_0, d_c_0, d_weights


def _settings(x, h_0, *, num_layers, bidirectional, precision) -> dict[str, Any]:
    """What `jax.experimental.rnn` wants to know beside the arrays."""
    is_highest = asked_precision(precision, x.dtype) == jax.lax.Precision.HIGHEST
    return {
        "input_size": x.shape[-1],
        "hidden_size": h_0.shape[-1],
        "num_layers": num_layers,
        "dropout": 0.0,
        "bidirectional": bidirectional,
        # The high one allows TensorFloat-32; the default one is refused.
        "precision": jax.lax.Precision.HIGHEST if is_highest else jax.lax.Precision.HIGH,
    }


def _kept_size(x, hidden_size, num_layers, bidirectional, precision) -> int:
    """Of what cuDNN keeps for the gradients, in numbers."""
    allow_tf32 = asked_precision(precision, x.dtype) != jax.lax.Precision.HIGHEST
    batch, time, features = x.shape
    _, size = rnn.gpu_rnn.compute_rnn_workspace_reserve_space_sizes(
        features, hidden_size, num_layers, batch, time, 0.0, bidirectional, allow_tf32
    )
    return size


# ---- How they become primitives.


forward_p = primitive(forward, "lstm_stack")
gradients_p = primitive(gradients, "lstm_stack")
tangents_p = primitive(tangents, "lstm_stack")


def register(platform: str = PLATFORM) -> None:
    """Lower the primitives to calls of cuDNN."""
    for of, by_cudnn in ((forward_p, forward_by_cudnn), (gradients_p, gradients_by_cudnn)):
        mlir.register_lowering(of, mlir.lower_fun(by_cudnn, multiple_results=True), platform)


register()


def _linearize(operands, operands_dot, *, keep, **static):
    """`forward`'s derivative as `tangents_p`, whose transpose cuDNN knows."""
    if keep:  # of the derivative itself
        return differentiate(partial(forward, keep=keep, **static), operands, operands_dot)
    *results, kept = forward_p.bind(*operands, keep=True, **static)
    moving = moving_of(operands_dot)
    along = [operands_dot[k] for k in moving]
    moved = tangents_p.bind(*operands, results[0], kept, *along, moving=moving, **static)
    return results, moved


def _transpose(cotangents, *arrays, moving, **static):
    """Gradients of the operands at `moving`, from the cotangents of `(outputs, h_n, c_n)`."""
    known, along = arrays[: len(arrays) - len(moving)], arrays[len(arrays) - len(moving) :]
    cotangents = [ad.instantiate_zeros(cotangent) for cotangent in cotangents]
    found = gradients_p.bind(*known, *cotangents, **static)
    return [None] * len(known) + [
        found[k] if ad.is_undefined_primal(tangent) else None
        for k, tangent in zip(moving, along, strict=True)
    ]


ad.primitive_jvps[forward_p] = _linearize
ad.primitive_transposes[tangents_p] = _transpose
