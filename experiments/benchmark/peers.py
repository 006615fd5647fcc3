"""The implementations that are compared.

Each has a builder, which makes, for a case and a mode, one function to call again and again. All
start from the same weights, in float32 without short cuts such as TensorFloat-32. What a peer needs
is imported only where it is built, in that peer's own process.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from experiments.benchmark import jax_peers, onnx_peer, torch_peers
from experiments.benchmark.cases import Case
from experiments.benchmark.framework import Call, Framework, Unavailable

OURS = "lstm_flax"


class Peer(NamedTuple):
    """An implementation, and what it takes to have it."""

    package: str  # to install, import, and report the version of
    framework: Callable[[], Framework]
    build: Callable[[Case, str], Call]
    needs_cuda: bool = False


def open_peer(name: str) -> tuple[Peer, Framework]:
    """Find a peer by its name, with its framework started.

    `lstm_flax:NAME` is this project with `implementation=NAME`.

    Raises:
        Unavailable: it is not installed, or there is no device for it.
    """
    peer = find_peer(name)
    if importlib.util.find_spec(peer.package) is None:
        raise Unavailable(f"not installed: pip install {peer.package}")
    framework = peer.framework()
    if peer.needs_cuda and framework.platform != "gpu":
        raise Unavailable("needs a CUDA device")
    return peer, framework


def find_peer(name: str) -> Peer:
    """The peer of this name."""
    base, _, implementation = name.partition(":")
    peer = PEERS[base]
    if not implementation:
        return peer
    return peer._replace(build=partial(jax_peers.build_ours, implementation=implementation))


# What is left to JAX's default, as in Keras and flax.linen, is full float32 too. Compilation is
# part of what is measured, so nothing may come out of a cache. Several processes share one GPU.
ENVIRONMENT = {
    "JAX_DEFAULT_MATMUL_PRECISION": "highest",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "KERAS_BACKEND": "jax",
}

_jax = partial(Peer, framework=jax_peers.jax_framework)
_torch = partial(Peer, framework=torch_peers.torch_framework)
_compiled = partial(torch_peers.build_torch, how="compile")
_graph = partial(torch_peers.build_torch, how="graph")

PEERS = {
    OURS: _jax("lstm_flax", build=jax_peers.build_ours),
    "torch": _torch("torch", build=torch_peers.build_torch),
    "onnxruntime": Peer("onnxruntime", onnx_peer.onnx_framework, onnx_peer.build_onnx),
    "keras": _jax("keras", build=jax_peers.build_keras),
    "flax.linen.RNN": _jax("flax", build=jax_peers.build_linen_rnn),
    "jax cuDNN": _jax("jax", build=jax_peers.build_jax_cudnn, needs_cuda=True),
    "torch.compile": _torch("torch", build=_compiled, needs_cuda=True),
    "torch CUDA graph": _torch("torch", build=_graph, needs_cuda=True),
}
