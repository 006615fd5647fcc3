"""The implementations that are compared.

A peer has a builder, which makes one function for a case and a mode, to be called repeatedly. All
peers start from the same weights, and compute in float32 without TensorFloat-32, but for cases in
bfloat16. Only a worker imports the module of a peer, so that each process has one framework.
"""

import importlib.util
import pkgutil
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmark.cases import Case

OURS = "lstm_flax"
LEARNING_RATE = 1e-3  # Adam's

Call = Callable[[], Any]
"""Inference, which returns logits [batch, classes], or a train step with Adam, which returns the
loss before the step. The result may be computed asynchronously: `Framework.wait` waits for it."""


class Unavailable(Exception):
    """A peer can't run here; the message says in one line what is missing."""


class Framework(NamedTuple):
    """What a worker needs of a framework, besides its LSTM."""

    platform: str  # "cpu", "gpu" or "tpu"
    device: str  # its name
    wait: Callable[[Any], Any]
    """Wait until an array is computed."""
    matmul: Callable[[np.ndarray, np.ndarray], Call]
    """Return a function that multiplies two float32 matrices, which are on the device already."""
    allocator_peak: Callable[[], int]
    """Return the most bytes that were ever in use, on an accelerator."""


class Peer(NamedTuple):
    """An implementation, and what it needs."""

    package: str  # the package to install, import, and report the version of
    builder: str  # MODULE:FUNCTION in this package; the module has a function `framework` too
    needs_cuda: bool = False


PEERS = {
    OURS: Peer("lstm_flax", "jax_peers:build_ours"),
    "torch": Peer("torch", "torch_peers:build_torch"),
    "onnxruntime": Peer("onnxruntime", "onnx_peer:build_onnx"),
    "keras": Peer("keras", "jax_peers:build_keras"),
    "flax.linen.RNN": Peer("flax", "jax_peers:build_linen_rnn"),
    "jax cuDNN": Peer("jax", "jax_peers:build_jax_cudnn", needs_cuda=True),
    "torch.compile": Peer("torch", "torch_peers:build_compiled", needs_cuda=True),
    "torch CUDA graph": Peer("torch", "torch_peers:build_cuda_graph", needs_cuda=True),
}

# Keras and flax.linen use JAX's default precision. Compilation is measured, so nothing may come out
# of a cache. Several processes share one GPU.
ENVIRONMENT = {
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "KERAS_BACKEND": "jax",
}


def open_peer(name: str) -> tuple[Framework, Callable[[Case, str], Call]]:
    """Start a peer's framework in this process; returns it and the peer's builder.

    Args:
        name: a name in `PEERS`, or `lstm_flax:NAME`, this project with `implementation=NAME`.

    Raises:
        Unavailable: a package or a device is missing.
    """
    base, _, implementation = name.partition(":")
    peer = PEERS[base]
    module, _, builder = peer.builder.partition(":")
    require_package(peer.package)
    backend = pkgutil.resolve_name(f"{__package__}.{module}")
    framework = backend.framework()
    if peer.needs_cuda and framework.platform != "gpu":
        raise Unavailable("needs a CUDA device")
    build = getattr(backend, builder)
    return framework, partial(build, implementation=implementation) if implementation else build


def require_package(name: str) -> None:
    """Check that a package is installed.

    Raises:
        Unavailable: it is not.
    """
    if importlib.util.find_spec(name) is None:
        raise Unavailable(f"not installed: pip install {name}")
