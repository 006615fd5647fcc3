"""The gradient of the loss with respect to each earlier state, exactly.

A zero is added to the state after each step, and the loss is differentiated with respect to these
zeros. That gives dL/dh_t and dL/dc_t, through everything that follows from the state of step t. The
computation is in float64, so that 784 steps of vanishing or exploding stay within range.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

from experiments.gradient_flow.models import Variant, start
from experiments.harness.short_training import Recipe, accuracy, train
from lstm_flax import (
    Keys,
    LSTMCell,
    LSTMStack,
    RNNCell,
    RNNStack,
    SequenceClassifier,
    training,
)
from lstm_flax.models.cell import RecurrentCell
from lstm_flax.models.stack import RecurrentStack
from lstm_flax.training import Batch

CELL_OF: dict[type[RecurrentStack], type[RecurrentCell]] = {
    LSTMStack: LSTMCell,
    RNNStack: RNNCell,
}


class Flow(NamedTuple):
    """The gradient's flow back through one model."""

    sequence: str  # "rows" or "pixels"
    label: str  # of the variant
    is_trained: bool
    accuracy: float  # on the test set, a fraction
    norms: dict[str, np.ndarray]  # as `mean_norms` returns them

    def relative(self, state: str) -> np.ndarray:
        """Norms as multiples of the last step's, [time]."""
        return self.norms[state] / self.norms[state][-1]


def before_and_after(
    variants: Sequence[Variant],
    sequence: str,
    datasets: dict[str, Batch],
    probe: Batch,
    keys: Keys,
    recipe: Recipe,
) -> Iterator[Flow]:
    """Follow the gradient through each variant, at initialisation and after a short training.

    Args:
        variants: what to train.
        sequence: how the datasets are read.
        datasets: "train" and "test".
        probe: digits whose gradients are followed; none of those in "train".
        keys: keys of the trainings.
        recipe: recipe of the trainings.
    """
    data, x = datasets["train"], training.to_floats(probe["image"])
    tx = recipe.optimizer(data)
    for variant in variants:

        def flow(state: TrainState, is_trained: bool, variant: Variant = variant) -> Flow:
            norms = mean_norms(variant.model, state.params, x, probe["label"])
            correct = accuracy(state, datasets["test"])
            return Flow(sequence, variant.label, is_trained, correct, norms)

        state = start(variant, tx, data, keys)
        yield flow(state, is_trained=False)
        yield flow(train(state, recipe, data, keys), is_trained=True)


def mean_norms(
    model: SequenceClassifier, params: Any, x: jax.Array, labels: jax.Array
) -> dict[str, np.ndarray]:
    """Return the norms ||dL/dh_t||, and for an LSTM ||dL/dc_t||, averaged over digits with loss L.

    Args:
        model: with one layer, an `LSTMStack` or `RNNStack`.
        params: its parameters, of any precision.
        x: [batch, time, features].
        labels: int [batch].

    Returns:
        "h" and for an LSTM "c", each float64 [time]; the last entry belongs to the last step.
    """
    with jax.enable_x64(True):
        params, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, x))
        cell = CELL_OF[type(model.core)](model.core.hidden_size, param_dtype=jnp.float64)
        gradients = jax.tree.leaves(state_gradients(cell, params, x, labels))
        norms = [np.asarray(norm(g).mean(1)) for g in gradients]
    return dict(zip("hc", norms, strict=False))


def norm(vectors: jax.Array) -> jax.Array:
    """Return the Euclidean norm along the last axis, without under- or overflow of the squares."""
    largest = jnp.abs(vectors).max(-1, keepdims=True)
    scaled = vectors / jnp.where(largest > 0, largest, 1)
    return jnp.linalg.norm(scaled, axis=-1) * largest[..., 0]


@partial(jax.jit, static_argnames="cell")
def state_gradients(cell: RecurrentCell, params: Any, x: jax.Array, labels: jax.Array) -> Any:
    """Return the gradient of each sequence's loss with respect to its state after each step.

    Args:
        cell: the cell of the layer.
        params: parameters of a `SequenceClassifier` with that layer.
        x: [batch, time, features], in the cell's dtype.
        labels: int [batch].

    Returns:
        Shaped as the cell's carry, each array [time, batch, hidden_size].
    """
    time = x.shape[1]
    zeros = jax.tree.map(
        lambda state: jnp.zeros((time, *state.shape), state.dtype),
        cell.initialize_carry(None, x[:, 0].shape),
    )
    return jax.grad(loss, argnums=4)(cell, params, x, labels, zeros)


def loss(
    cell: RecurrentCell, params: Any, x: jax.Array, labels: jax.Array, nudges: Any
) -> jax.Array:
    """Return the cross-entropy from the last `h`, summed: each sequence has its own gradient.

    Args:
        cell, params, x, labels: as for `state_gradients`.
        nudges: added to the states, shaped as the carry, each [time, batch, hidden_size].
    """

    def step(carry, inputs):
        return nudged_step(cell, params["core"]["l0"], carry, *inputs), None

    carry, _ = jax.lax.scan(
        step, cell.initialize_carry(None, x[:, 0].shape), (x.swapaxes(0, 1), nudges)
    )
    logits = cell.hidden(carry) @ params["head"]["kernel"] + params["head"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum()


def nudged_step(cell: RecurrentCell, params: Any, carry: Any, x: jax.Array, nudge: Any) -> Any:
    """Run one step of the cell, and add `nudge` to the carry that it returns.

    A nudge of `c_t` changes `h_t = o_t ⊙ tanh(c_t)` too, since the loss may read it there.
    """
    if not isinstance(cell, LSTMCell):
        return cell.apply({"params": params}, carry, x)[0] + nudge
    ((_, c), _), kept = cell.apply({"params": params}, carry, x, mutable="gates")
    c = c + nudge[1]
    return kept["gates"]["output"] * jnp.tanh(c) + nudge[0], c
