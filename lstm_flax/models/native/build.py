"""Compile, keep and load the kernel, and register with XLA what it has."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

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


def unavailable(dtype: DTypeLike) -> str | None:
    """Load the kernel, compiled if need be; returns in one line why it can't be had, or None.

    Args:
        dtype: of the products.
    """
    found = load()
    if isinstance(found, str):
        return found
    if jnp.dtype(dtype).name in found:
        return None
    return f"this processor has no products in {jnp.dtype(dtype).name}"


@functools.cache
def load() -> str | tuple[str, ...]:
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
