"""The models that are compared, how they read a digit, and how they start."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import optax
from flax.training.train_state import TrainState

from experiments.harness.short_training import on_device
from lstm_flax import Keys, LSTMStack, RNNStack, SequenceClassifier, training
from lstm_flax.data import Split
from lstm_flax.training import Batch

CLASSES = 10


class Variant(NamedTuple):
    """A model with its own way to start.

    Variants of one model differ in their parameters alone, and share what is compiled for it.
    """

    label: str  # in tables and legends
    model: SequenceClassifier
    adjust: Callable[[Any], Any]  # from the model's initial parameters to the variant's


def all_variants(hidden_size: int) -> list[Variant]:
    """What is compared; gain 1 and forget bias 1 are this project's defaults."""
    return [*rnns(hidden_size, 0.5, 1, 1.5), *lstms(hidden_size, 0, 1, 3)]


def rnns(hidden_size: int, *gains: float) -> list[Variant]:
    """One layer of a vanilla RNN, whose recurrent kernel starts as `gain` times an orthogonal one.

    Each step back multiplies the gradient by that kernel and by tanh', which is at most one: below
    a gain of one it must vanish, above it may explode (Pascanu, Mikolov and Bengio, "On the
    difficulty of training recurrent neural networks", 2013).
    """
    model = SequenceClassifier(RNNStack(hidden_size), CLASSES)

    def scale(gain: float, params: Any) -> Any:
        layer = params["core"]["l0"]
        return _with_layer(params, layer | {"kernel_hh": gain * layer["kernel_hh"]})

    return [Variant(f"RNN, gain {gain:g}", model, partial(scale, gain)) for gain in gains]


def lstms(hidden_size: int, *forget_biases: float) -> list[Variant]:
    """One LSTM layer, whose forget gate's bias starts at `forget_bias`.

    The path along the cell state multiplies the gradient by the forget gate, at first σ(bias), or
    0.50, 0.73 and 0.95 for 0, 1 and 3. The path through `h` adds to that: near the zero state,
    where the other gates are 1/2 and `h = c / 2`, a step back is

        dc_t/dc_{t-1} = σ(bias) + W_g / 4

    and as W_g starts orthogonal, the largest factors are 0.75, 0.98 and 1.20.
    """
    model = SequenceClassifier(LSTMStack(hidden_size), CLASSES)
    forget = slice(hidden_size, 2 * hidden_size)  # in the order i, f, g, o

    def fill(bias: float, params: Any) -> Any:
        layer = params["core"]["l0"]
        return _with_layer(params, layer | {"bias": layer["bias"].at[forget].set(bias)})

    return [Variant(f"LSTM, forget bias {b:g}", model, partial(fill, b)) for b in forget_biases]


def _with_layer(params: Any, layer: Any) -> Any:
    return params | {"core": {"l0": layer}}


def as_rows(split: Split, blank: int = 0) -> Batch:
    """Digits as 28 rows of 28 pixels, uint8 [n, 28 + blank, 28], `blank` empty rows at the end."""
    images = np.pad(split.images, ((0, 0), (0, blank), (0, 0)))
    return on_device(Split(images, split.labels))


def as_pixels(split: Split) -> Batch:
    """Digits as 784 single pixels, row by row, uint8 [n, 784, 1]."""
    images = split.images.reshape(len(split.images), -1, 1)
    return on_device(Split(images, split.labels))


def start(
    variant: Variant, tx: optax.GradientTransformation, data: Batch, keys: Keys
) -> TrainState:
    """The state of a training at step 0."""
    sample = training.to_floats(data["image"][:1, :1])  # one step: compiled once for all lengths
    state = training.create_train_state(variant.model, tx, sample, keys.init)
    params = variant.adjust(state.params)
    return state.replace(params=params, opt_state=tx.init(params))
