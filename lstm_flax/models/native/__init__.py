"""An LSTM layer as one kernel in C++ for CPUs, behind `implementation="native"`.

XLA runs each time step as small products and loops that pass their results through memory, and its
matrix product is slower at these sizes than the processor allows; `kernel.cc` says what it does
instead. It is compiled on first use by the machine's own C++ compiler, for the machine's own
processor, in a few seconds, and kept in the user's cache folder.

It multiplies in float32, or in bfloat16 where the processor does. It has reverse-mode derivatives
of first order alone, and no place in what `jax.export` writes.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
from jax.typing import DTypeLike

SOURCES = sorted(Path(__file__).parent.glob("*.[ch]*"))  # kernel.cc and its headers
KERNEL = Path(__file__).with_name("kernel.cc")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread", "-w")
COMPILE_SECONDS = 300  # of which it needs a few

# What a user sees who exports a model with the kernel in it: the name is part of JAX's message.
FORWARD = "lstm_flax's {} forward kernel (to export, set implementation='scan')"
BACKWARD = "lstm_flax's {} backward kernel (to export, set implementation='scan')"
INPUT_GRADIENT = "lstm_flax's {} input gradient kernel (to export, set implementation='scan')"
SYMBOLS = {
    FORWARD: "lstm_forward_{}",
    BACKWARD: "lstm_backward_{}",
    INPUT_GRADIENT: "lstm_input_gradient_{}",
}
DTYPES = ("float32", "bfloat16")


def problem(dtype: DTypeLike) -> str | None:
    """Load the kernel, compiled if need be; returns in one line why it can't be had, or None.

    Args:
        dtype: of the products.
    """
    found = _load()
    if isinstance(found, str):
        return found
    if jnp.dtype(dtype).name in found:
        return None
    return f"this processor has no products in {jnp.dtype(dtype).name}"


@functools.cache
def _load() -> str | tuple[str, ...]:
    """Register what the kernel has with XLA: the dtypes of the products, or why it has none."""
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return str(error)
    found = tuple(name for name in DTYPES if hasattr(library, SYMBOLS[FORWARD].format(name)))
    for dtype in found:
        for name, symbol in SYMBOLS.items():
            function = jax.ffi.pycapsule(getattr(library, symbol.format(dtype)))
            jax.ffi.register_ffi_target(name.format(dtype), function, platform="cpu")
    return found


def _compiled() -> Path:
    """The compiled kernel for this source, this processor and this jaxlib.

    Raises:
        RuntimeError: there is no compiler, or it fails.
        OSError: the cache folder can't be written.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    code = "".join(source.read_text() for source in SOURCES)
    parts = (code, _processor(), jaxlib.__version__, str(compiler), *FLAGS)
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lstm_flax"
    path = folder / f"lstm_cpu-{key}.so"
    if path.exists():
        return path
    if compiler is None:
        raise RuntimeError("there is no C++ compiler (c++, or what CXX names)")
    folder.mkdir(parents=True, exist_ok=True)
    # Under its own name only when it is whole, since several processes may start at once.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        unfinished = Path(scratch) / path.name
        command = [
            compiler,
            *FLAGS,
            f"-I{jax.ffi.include_dir()}",
            str(KERNEL),
            "-o",
            str(unfinished),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line]
            raise RuntimeError(f"{compiler} failed: {(lines or ['it said nothing'])[0]}")
        unfinished.replace(path)
    return path


def _processor() -> str:
    """What distinguishes processors for whom code is compiled differently."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *sorted({x for x in lines if x.startswith(wanted)})])


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
