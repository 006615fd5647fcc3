"""The probabilities and gates of a trained classifier while it reads an image, and its mistakes."""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.harness.markdown import table
from lstm_flax import training
from lstm_flax.models import SequenceClassifier


def probabilities_by_row(model: SequenceClassifier, params: Any, image: np.ndarray) -> np.ndarray:
    """Return the class probabilities after each row of an image, [rows, classes].

    Those after row t are of the sequence that ends there: the dense layer reads the top layer's
    output of step t.

    Args:
        model: the classifier.
        params: its parameters.
        image: uint8 [rows, pixels].
    """
    return np.asarray(_probabilities_by_row(model, params, image))


@partial(jax.jit, static_argnums=0)
def _probabilities_by_row(model: SequenceClassifier, params: Any, image: jax.Array) -> jax.Array:
    rows = len(image)
    x = jnp.broadcast_to(training.to_floats(image), (rows, *image.shape))
    logits = model.apply({"params": params}, x, seq_lengths=jnp.arange(1, rows + 1))
    return jax.nn.softmax(jnp.asarray(logits))


def gates_by_row(
    model: SequenceClassifier, params: Any, image: np.ndarray
) -> list[dict[str, np.ndarray]]:
    """Return the gates of each layer after each row of an image.

    Args:
        model: the classifier; its core is an `LSTMStack`.
        params: its parameters.
        image: uint8 [rows, pixels].

    Returns:
        For each layer, from the bottom: input, forget, output, candidate and cell, each float32
        [rows, hidden_size].
    """
    gates = jax.device_get(_gates_by_row(model, params, image))
    return [gates[f"l{layer}"] for layer in range(model.core.num_layers)]


@partial(jax.jit, static_argnums=0)
def _gates_by_row(
    model: SequenceClassifier, params: Any, image: jax.Array
) -> dict[str, dict[str, jax.Array]]:
    x = training.to_floats(image[None])
    _, kept = model.apply({"params": params}, x, mutable="gates")
    return jax.tree.map(lambda values: values[0], kept["gates"]["core"])


def unit_order(cell: np.ndarray) -> np.ndarray:
    """Order units by when they are most active, so that a heat map of them shows structure.

    Args:
        cell: cell states [rows, hidden_size].

    Returns:
        Indices of the units [hidden_size]. Units whose largest cell state by magnitude is negative
        come first. Both groups are sorted by the row of that largest state, earliest first.
    """
    peak_row = np.abs(cell).argmax(0)
    peak = np.take_along_axis(cell, peak_row[None], 0)[0]
    return np.lexsort((peak_row, peak > 0))


def settled_row(probabilities: np.ndarray, label: int) -> int | None:
    """Return the row, counted from 1, from which the answer stays right; None if it ends wrong.

    Args:
        probabilities: [rows, classes], after each row.
        label: the right answer.
    """
    wrong = np.flatnonzero(probabilities.argmax(-1) != label)
    row = int(wrong[-1]) + 2 if wrong.size else 1
    return row if row <= len(probabilities) else None


def answers(probabilities: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """Yield `(first_row, last_row, answer)` of each stretch of rows with one answer, from row 1."""
    first = 1
    for answer, stretch in itertools.groupby(probabilities.argmax(-1).tolist()):
        last = first + len(list(stretch)) - 1
        yield first, last, answer
        first = last + 1


def report(probabilities: np.ndarray, label: int) -> str:
    """Return how the answer changed over the rows, as a table in Markdown and two lines."""
    rows = []
    for first, last, answer in answers(probabilities):
        stretch = probabilities[first - 1 : last, answer]
        if first == last:
            rows.append([f"{first}", f"{answer}", f"{stretch[0]:.1%}"])
        else:
            between = f"{stretch.min():.1%} to {stretch.max():.1%}"
            rows.append([f"{first} to {last}", f"{answer}", between])
    settled, final = settled_row(probabilities, label), probabilities[-1]
    right = f"from row {settled} on" if settled else "no: the last answer is wrong"
    likely = [f"{k}: {final[k]:.2%}" for k in np.argsort(-final) if final[k] >= 0.00005]
    beliefs = table(["after rows", "answer", "its probability"], rows)
    return "\n".join([beliefs, "", f"right   {right}", f"final   {', '.join(likely)}"])


class Mistakes(NamedTuple):
    """Misread images, the most confident mistakes first; each array is [mistakes]."""

    image: np.ndarray  # its index
    label: np.ndarray
    answer: np.ndarray  # the class that the model chose
    probability: np.ndarray  # of that answer, by the model
    label_probability: np.ndarray  # of the right answer, by the model

    def first(self, count: int) -> "Mistakes":
        """Return the first `count` mistakes."""
        return Mistakes(*(values[:count] for values in self))


def find_mistakes(probabilities: np.ndarray, labels: np.ndarray) -> Mistakes:
    """Find the mistakes in class probabilities [n, classes], given the labels [n]."""
    answer = probabilities.argmax(-1)
    wrong = np.flatnonzero(answer != labels)
    wrong = wrong[np.argsort(-probabilities[wrong, answer[wrong]], kind="stable")]
    return Mistakes(
        wrong,
        labels[wrong],
        answer[wrong],
        probabilities[wrong, answer[wrong]],
        probabilities[wrong, labels[wrong]],
    )
