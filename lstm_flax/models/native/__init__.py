"""An LSTM layer as a kernel in C++ for CPUs, behind `implementation="native"`.

XLA runs each time step as small products and loops that pass their results through memory, and its
matrix product is slower at these sizes than the processor allows; `kernel.cc` says what it does
instead. The machine's own C++ compiler builds it at its first use, in a few seconds, for the
machine's own processor, and it stays in the user's cache folder.

It multiplies in float32, or in bfloat16 where the processor does: tile by tile with Intel's AMX, or
else by vectors. `lstm_layer.py` says what each function computes and gives it operands of the right
shapes and dtypes; the handlers in C++ check them once more.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lstm_flax.models.native.build import DTYPES, TARGET, unavailable

PLATFORM = "cpu"
CAN_BE_EXPORTED = False  # it is compiled for this machine's processor

__all__ = [
    "CAN_BE_EXPORTED",
    "DTYPES",
    "PLATFORM",
    "TARGET",
    "forward",
    "gate_gradients",
    "input_gradient",
    "is_slower",
    "unavailable",
    "weight_gradients",
    "why_not",
]


def why_not(part: str, operands: Any) -> str | None:
    """Say in a few words why a part of the layer can't run here; see `lstm_layer.Kernels`."""
    dtype = operands[0].dtype
    if dtype.name not in DTYPES:
        return f"products in {dtype.name}"
    of_hidden = {"forward": 4, "gate_gradients": 0, "weight_gradients": 1}.get(part)
    if dtype == jnp.bfloat16 and of_hidden is not None and operands[of_hidden].shape[-1] % 2:
        return "an odd hidden_size in bfloat16"
    return unavailable(dtype)


def is_slower(part: str, operands: Any) -> bool:
    """Whether XLA's own products are faster here; see `lstm_layer.Kernels`.

    The kernel packs the weights at each call, which few rows of batch and time do not earn back.
    Nor has it a second level of blocks for weights beyond all caches: with 1,024 units and a batch
    of 128 it took 1.3 to 1.7 times as long as the scan with 512 KiB of L2, and as long with 1 MiB;
    a batch of 16 took half as long. `python -m experiments.benchmark --cases grid` gave the sizes.
    """
    batch, time = operands[0].shape[:2]
    weights = operands[1].size + operands[2].size if part == "forward" else 0  # numbers
    is_hardly_used = batch * time <= (24 if weights > 1 << 20 else 12)
    return is_hardly_used or (weights > 1 << 22 and batch > 32)


def forward(x, kernel_ih, kernel_hh, bias, h_0, c_0, lengths, *, reverse, keep, **_):
    """`lstm_layer.forward` by the kernel."""
    (batch, time, _), hidden = x.shape, len(kernel_hh)
    shapes = [(batch, time, 4 * hidden), (batch, time, hidden)] if keep else [(0,), (0,)]
    results = (
        jax.ShapeDtypeStruct((batch, time, hidden), x.dtype),
        jax.ShapeDtypeStruct(h_0.shape, x.dtype),
        jax.ShapeDtypeStruct(c_0.shape, c_0.dtype),
        *[jax.ShapeDtypeStruct(shape, c_0.dtype) for shape in shapes],
    )
    x, kernel_ih = _whole_words(x, -1), _whole_words(kernel_ih, 0, x.dtype)
    operands = (x, kernel_ih, kernel_hh, bias, h_0, c_0, lengths)
    results = _call("forward", x.dtype, results, *operands, reverse=reverse)
    return tuple(results if keep else results[:3])


def gate_gradients(d_outputs, d_h_n, d_c_n, gates, cells, kernel_hh, c_0, lengths, *, reverse, **_):
    """`lstm_layer.gate_gradients` by the kernel."""
    dtype = d_outputs.dtype
    results = (
        jax.ShapeDtypeStruct(gates.shape, dtype),
        jax.ShapeDtypeStruct(c_0.shape, c_0.dtype),
    )
    # The gradients take the gates' place where they have their size.
    aliases = {"input_output_aliases": {3: 0}} if dtype == gates.dtype else {}
    operands = (kernel_hh, c_0, lengths, gates, cells, d_outputs, d_h_n, d_c_n)
    return _call("gate_gradients", dtype, results, *operands, reverse=reverse, options=aliases)


def weight_gradients(x, h_0, outputs, lengths, d_gates, *, reverse, dtype, **_):
    """`lstm_layer.weight_gradients` by the kernel."""
    features, hidden, gates = x.shape[-1], h_0.shape[-1], d_gates.shape[-1]
    x = _whole_words(x, -1)
    shapes = (x.shape[-1], gates), (hidden, gates), (gates,)
    results = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    operands = (x, h_0, outputs, lengths, d_gates)
    d_ih, d_hh, d_bias = _call("weight_gradients", x.dtype, results, *operands, reverse=reverse)
    return d_ih[:features], d_hh, d_bias


def input_gradient(d_gates, kernel_ih, **_):
    """`lstm_layer.input_gradient` by the kernel."""
    result = jax.ShapeDtypeStruct((*d_gates.shape[:2], len(kernel_ih)), d_gates.dtype)
    return _call("input_gradient", d_gates.dtype, (result,), d_gates, kernel_ih)


def _whole_words(array: jax.Array, axis: int, dtype: Any = None) -> jax.Array:
    """Pad an axis to an even size where products are in bfloat16, which go two at a time."""
    if (dtype or array.dtype) != jnp.bfloat16 or array.shape[axis] % 2 == 0:
        return array
    pads = [(0, 0)] * array.ndim
    pads[axis] = (0, 1)
    return jnp.pad(array, pads)


def _call(part: str, dtype: Any, results: Any, *operands: Any, options: Any = None, **attributes):
    target = TARGET.format(part=part, dtype=jnp.dtype(dtype).name)
    return jax.ffi.ffi_call(target, results, **(options or {}))(*operands, **attributes)
