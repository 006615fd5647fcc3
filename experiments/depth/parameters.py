"""The compared models, and how many parameters they have: by formula, and counted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lstm_flax import GRUStack, LSTMStack, RNNStack, SequenceClassifier

FEATURES = 28
NUM_CLASSES = 10

KINDS: dict[str, Callable[..., Any]] = {"RNN": RNNStack, "GRU": GRUStack, "LSTM": LSTMStack}
"""The stacks by name, from the fewest gates to the most."""

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
"""Blocks of the fused kernels, the candidate's among them."""

PARTS = {"kernel_ih": "input to hidden", "kernel_hh": "hidden to hidden", "bias": "bias"}
"""What a layer's parameters are for, by the beginning of their names."""


def make_model(
    kind: str, num_layers: int, hidden_size: int, implementation: str = "auto"
) -> SequenceClassifier:
    """A classifier of images, read row by row by a stack of one kind."""
    stack = KINDS[kind](hidden_size, num_layers, implementation=implementation)
    return SequenceClassifier(stack, NUM_CLASSES)


def formula(kind: str, num_layers: int, hidden_size: int) -> int:
    """The parameters of `make_model`, without making one.

    A layer of H units that reads F features has G (H (F + H) + H) parameters, G being the number
    of gates, and one bias a unit and gate; PyTorch keeps two, which only ever act as their sum. A
    GRU has H more, the bias inside its reset gate's product. The dense layer has 10 (H + 1).
    """
    sizes = [FEATURES, *[hidden_size] * num_layers]
    layers = [GATES[kind] * (hidden_size * (size + hidden_size) + hidden_size) for size in sizes]
    inside_reset = hidden_size if kind == "GRU" else 0
    head = NUM_CLASSES * (hidden_size + 1)
    return sum(layers[:num_layers]) + num_layers * inside_reset + head


def count(kind: str, num_layers: int, hidden_size: int) -> dict[str, dict[str, int]]:
    """Count the parameters of `make_model`.

    Returns:
        By place, "layer 1" at the bottom and "dense layer" at the end, and by what they are for.
    """
    model = make_model(kind, num_layers, hidden_size)
    sample = jnp.zeros((1, 1, FEATURES))
    params = jax.eval_shape(model.init, jax.random.key(0), sample)["params"]
    places = {
        f"layer {k + 1}": {
            part: sum(leaf.size for name, leaf in layer.items() if name.startswith(beginning))
            for beginning, part in PARTS.items()
        }
        for k, layer in enumerate(params["core"][f"l{k}"] for k in range(num_layers))
    }
    head = sum(leaf.size for leaf in params["head"].values())
    return places | {"dense layer": {"dense layer": head}}


def total(places: dict[str, dict[str, int]]) -> int:
    """The sum over all places and parts."""
    return sum(sum(parts.values()) for parts in places.values())
