"""Compile the kernel, keep it in the user's cache folder, load it and register it with XLA.

A kept kernel is code that a process will run. So its folder and file must belong to this user and
be writable by nobody else, and its name says its SHA-256: one that was cut off or damaged is
compiled anew. Where no folder can be trusted or written to, each process compiles its own.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib
from jax.typing import DTypeLike

logger = logging.getLogger("lstm_flax")

SOURCES = sorted(Path(__file__).parent.glob("*.[ch]*"))  # kernel.cc and its headers
KERNEL = Path(__file__).with_name("kernel.cc")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread", "-w")
MORE_FLAGS = "LSTM_FLAX_CXXFLAGS"  # an environment variable, for sanitizers say
COMPILE_SECONDS = 300  # of which it needs a few

# Names of the kernel's parts, by the dtype of the products. In C++ they are `lstm_{part}_{dtype}`;
# `lstm_{part}_bfloat16_tiles` takes the place of `lstm_{part}_bfloat16`.
PARTS = ("forward", "gate_gradients", "weight_gradients", "input_gradient")
TARGET = "lstm_flax_{part}_{dtype}"
DTYPES = ("float32", "bfloat16")
TILES = "tiles"  # of bfloat16, where the processor multiplies whole ones and the system lets us


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
    """Register what the kernel has with XLA: the dtypes of the products, or why it has none.

    TILES stands beside them if the products of bfloat16 are those of whole tiles.
    """
    with _LOADING:
        return _load()


_LOADING = threading.Lock()


@functools.cache  # for threads that waited while another one loaded it
def _load() -> str | tuple[str, ...]:
    try:
        library = _library()
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        return " ".join(str(error).split())
    found = tuple(dtype for dtype in DTYPES if hasattr(library, f"lstm_forward_{dtype}"))
    has_tiles = hasattr(library, "lstm_ask_for_tiles") and library.lstm_ask_for_tiles()
    for dtype in found:
        name = f"{dtype}_{TILES}" if has_tiles and dtype == "bfloat16" else dtype
        for part in PARTS:
            function = jax.ffi.pycapsule(getattr(library, f"lstm_{part}_{name}"))
            target = TARGET.format(part=part, dtype=dtype)
            jax.ffi.register_ffi_target(target, function, platform="cpu")
    return (*found, TILES) if has_tiles else found


def _library() -> ctypes.CDLL:
    """The kernel for this source, compiler, processor and jaxlib: the one kept, or a new one.

    Raises:
        RuntimeError: there is no compiler, or it fails.
        OSError: there is nowhere to compile, or the result can't be loaded.
        ValueError: CXX or the flags have an open quote.
    """
    if sys.platform == "win32":
        raise RuntimeError("there is no kernel for Windows")
    command = _command()
    parts = (*command[:-1], _processor(), jaxlib.__version__)  # wherever the source lies
    code = b"".join(source.read_bytes() for source in SOURCES)
    key = hashlib.sha256(code + "\0".join(parts).encode()).hexdigest()[:16]
    folder = cache_folder()
    if kept := find(folder, key):
        return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory(prefix="lstm_flax_") as private:
        path = Path(private) / "kernel.so"
        _compile([*command, "-o", str(path)])
        keep(folder, key, path.read_bytes())
        return ctypes.CDLL(str(find(folder, key) or path))


def _command() -> list[str]:
    """What compiles the kernel, but for where to."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    program = shutil.which(compiler[0])
    if program is None:
        raise RuntimeError("there is no C++ compiler (c++, or what CXX names)")
    flags = (*FLAGS, *shlex.split(os.environ.get(MORE_FLAGS, "")))
    return [program, *compiler[1:], *flags, f"-I{jax.ffi.include_dir()}", str(KERNEL)]


def _compile(command: list[str]) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS
    )
    if done.returncode:
        said = done.stderr.splitlines()
        errors = [line for line in said if "error" in line]
        raise RuntimeError(f"{command[0]} failed: {[*errors, *said, 'it said nothing'][0]}")


def cache_folder() -> Path | None:
    """The folder that keeps kernels, made if need be; None if there is none to be trusted."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    try:
        # The XDG specification has relative paths ignored.
        base = Path(named) if os.path.isabs(named) else Path.home() / ".cache"
        if not base.is_absolute():
            return None
        folder = base / "lstm_flax"
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder if _is_ours(folder, stat.S_ISDIR) else None
    except (OSError, RuntimeError) as error:
        logger.info("the kernel can't be kept: %s", error)
        return None


def find(folder: Path | None, key: str) -> Path | None:
    """A kernel that was kept, is whole, and is nobody else's."""
    try:
        for path in sorted(folder.glob(f"lstm_cpu-{key}-*.so")) if folder else ():
            if _is_ours(path, stat.S_ISREG) and path.name == _name(key, path.read_bytes()):
                return path
    except OSError as error:
        logger.info("the kept kernel can't be read: %s", error)
    return None


def keep(folder: Path | None, key: str, code: bytes) -> None:
    """Write a kernel through to the disk, and only then give it its name; if that can be done."""
    if folder is None:
        return
    try:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            path = Path(scratch) / _name(key, code)
            path.touch(mode=0o600)
            with path.open("wb") as file:
                file.write(code)
                file.flush()
                os.fsync(file.fileno())
            path.replace(folder / path.name)
        names = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(names)
        finally:
            os.close(names)
    except OSError as error:
        logger.info("the kernel can't be kept: %s", error)


def _name(key: str, code: bytes) -> str:
    return f"lstm_cpu-{key}-{hashlib.sha256(code).hexdigest()}.so"


def _is_ours(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """No link, of this user, and writable by nobody else."""
    found = path.lstat()
    return is_kind(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _processor() -> str:
    """What distinguishes processors for whom code is compiled differently."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *sorted({x for x in lines if x.startswith(wanted)})])
