"""An LSTM layer as one kernel in C++ for CPUs, behind `implementation="native"`.

XLA runs each time step as small products and loops that pass their results through memory, and its
matrix product is slower at these sizes than the processor allows; `lstm_cpu.cc` says what it does
instead. It is compiled on first use by the machine's own C++ compiler, for the machine's own
processor, in a few seconds, and kept in the user's cache folder.

It computes in float32. It has reverse-mode derivatives of first order alone, and no place in what
`jax.export` writes.
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

import jax
import jax.numpy as jnp
import jaxlib

SOURCE = Path(__file__).with_name("lstm_cpu.cc")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread", "-w")
COMPILE_SECONDS = 300  # of which it needs a few

# What a user sees who exports a model with the kernel in it: the name is part of JAX's message.
FORWARD = "lstm_flax's forward kernel (to export, set implementation='scan')"
BACKWARD = "lstm_flax's backward kernel (to export, set implementation='scan')"


@functools.cache
def problem() -> str | None:
    """Load the kernel, compiled if need be; returns in one line why it can't be had, or None."""
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        return str(error)
    for name, function in ((FORWARD, library.lstm_forward), (BACKWARD, library.lstm_backward)):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(function), platform="cpu")
    return None


def _compiled() -> Path:
    """The compiled kernel for this source, this processor and this jaxlib.

    Raises:
        RuntimeError: there is no compiler, or it fails.
        OSError: the cache folder can't be written.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    parts = (SOURCE.read_text(), _processor(), jaxlib.__version__, str(compiler), *FLAGS)
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
            str(SOURCE),
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
        x: float32 [batch, time, features], zero in the padding.
        kernel_ih: float32 [features, 4 * hidden_size].
        kernel_hh: float32 [hidden_size, 4 * hidden_size].
        bias: float32 [4 * hidden_size].
        h_0: float32 [batch, hidden_size], as is c_0.
        c_0: the cell state before the first step.
        lengths: int32 [batch], from 0 to time.
        reverse: start each sequence at its end.

    Returns:
        `(outputs, h_n, c_n)`: [batch, time, hidden_size], zero in the padding, and the final
        states, [batch, hidden_size] each.
    """
    outputs, h_n, c_n, _, _ = _forward(
        x, kernel_ih, kernel_hh, bias, h_0, c_0, lengths, reverse=reverse, keep=False
    )
    return outputs, h_n, c_n


def _forward(x, kernel_ih, kernel_hh, bias, h_0, c_0, lengths, *, reverse: bool, keep: bool):
    """The layer, and what the backward pass needs if that is to be kept: gates and cell states."""
    (batch, time, _), hidden = x.shape, len(kernel_hh)
    shapes = [(batch, time, hidden), h_0.shape, c_0.shape]
    shapes += [(batch, time, 4 * hidden), (batch, time, hidden)] if keep else [(0,), (0,)]
    return _call(FORWARD, shapes)(x, kernel_ih, kernel_hh, bias, h_0, c_0, lengths, reverse=reverse)


def _forward_to_differentiate(x, kernel_ih, kernel_hh, bias, h_0, c_0, lengths, reverse):
    outputs, h_n, c_n, gates, cells = _forward(
        x, kernel_ih, kernel_hh, bias, h_0, c_0, lengths, reverse=reverse, keep=True
    )
    kept = (x, kernel_ih, kernel_hh, h_0, c_0, lengths, outputs, gates, cells)
    return (outputs, h_n, c_n), kept


def _backward(reverse, kept, cotangents):
    x, kernel_ih, kernel_hh, h_0, c_0, lengths, outputs, gates, cells = kept
    results = (gates, kernel_ih, kernel_hh, gates[0, 0], c_0)
    gates_at = 6  # among the operands; their gradients take their place
    d_gates, d_ih, d_hh, d_bias, d_c_0 = _call(
        BACKWARD, [like.shape for like in results], input_output_aliases={gates_at: 0}
    )(
        x, kernel_hh, h_0, c_0, lengths, outputs, gates, cells, *cotangents, reverse=reverse
    )  # fmt: skip
    # XLA leaves out what nobody asks for, often both of these.
    exact = jax.lax.Precision.HIGHEST
    first = jnp.maximum(lengths - 1, 0) if reverse else jnp.zeros_like(lengths)
    at_first = jnp.take_along_axis(d_gates, first[:, None, None], axis=1)[:, 0]
    d_h_0 = jnp.dot(at_first, kernel_hh.T, precision=exact)
    d_x = jnp.dot(d_gates, kernel_ih.T, precision=exact)
    return d_x, d_ih, d_hh, d_bias, d_h_0, d_c_0, None


lstm_layer.defvjp(_forward_to_differentiate, _backward)


def _call(name: str, shapes: list[tuple[int, ...]], **options) -> Callable:
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.ffi.ffi_call(name, results, vmap_method="sequential", **options)
