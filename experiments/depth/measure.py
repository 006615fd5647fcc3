"""Training a model from a seed, and timing the train steps of several models in turn."""

import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState
from scipy import stats

from lstm_flax import SequenceClassifier, training
from lstm_flax.data import Split
from lstm_flax.training import Batch, Keys, Metrics

EVAL_BATCH_SIZE = 500
"""Images that are evaluated at a time; no result depends on it."""

STEPS_A_TURN = 8
"""Train steps that are timed as one."""

Name = TypeVar("Name")


class Recipe(NamedTuple):
    """How every model is trained."""

    epochs: int
    batch_size: int
    learning_rate: float  # the peak of the one-cycle schedule

    def steps_per_epoch(self, train_set: Batch) -> int:
        """Train steps in a pass over the training images."""
        return training.steps_per_epoch(len(train_set["label"]), self.batch_size)

    def optimizer(self, train_set: Batch) -> optax.GradientTransformation:
        """AdamW, as in the MNIST experiment, its schedule spanning all epochs."""
        steps = self.epochs * self.steps_per_epoch(train_set)
        return training.onecycle_adamw(self.learning_rate, steps, weight_decay=1e-2, clip_norm=1.0)


def on_device(split: Split) -> Batch:
    """A split as the arrays that training takes."""
    return {"image": jnp.asarray(split.images), "label": jnp.asarray(split.labels)}


def first_of_each_class(split: Split, size: int) -> Split:
    """A subset of `size` examples, in their order, with as many of each class as there can be."""
    place_in_class = np.empty(len(split.labels), int)
    for label in np.unique(split.labels):
        of_class = np.flatnonzero(split.labels == label)
        place_in_class[of_class] = np.arange(len(of_class))
    chosen = np.sort(np.argsort(place_in_class, kind="stable")[:size])
    return Split(split.images[chosen], split.labels[chosen])


def initial_states(
    model: SequenceClassifier,
    tx: optax.GradientTransformation,
    train_set: Batch,
    seeds: Sequence[int],
) -> list[TrainState]:
    """Untrained states, one a seed, all by one compiled program."""
    sample = training.to_floats(train_set["image"][:1])
    create = jax.jit(partial(training.create_train_state, model, tx, sample))
    return [create(Keys.from_seed(seed).init) for seed in seeds]


def train(state: TrainState, recipe: Recipe, train_set: Batch, seed: int) -> TrainState:
    """Train a state, which is given up to it, for all epochs."""
    keys, steps = Keys.from_seed(seed), recipe.steps_per_epoch(train_set)
    for _ in range(recipe.epochs):
        state, _ = training.train_steps(
            state, Metrics.zero(), train_set, keys, steps, batch_size=recipe.batch_size
        )
    return state


def accuracy(state: TrainState, test_set: Batch) -> float:
    """Fraction of all test images that are classified correctly."""
    metrics = training.evaluate(state, test_set, batch_size=EVAL_BATCH_SIZE)
    return int(metrics.correct) / int(metrics.count)


class Row(NamedTuple):
    """What was found out about one model."""

    kind: str
    layers: int
    parameters: int
    scan_seconds: float  # of a train step by `nn.scan`
    seconds: float  # of one as it trains, perhaps by a native kernel
    accuracies: list[float]  # on the test images, a seed each


class Interval(NamedTuple):
    """A mean, and between which bounds it lies with 95% confidence."""

    mean: float
    low: float
    high: float


def t_interval(values: Sequence[float]) -> Interval:
    """The mean of independent values, at least two, with its 95% interval (Student 1908)."""
    mean = float(np.mean(values))
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return Interval(mean, mean - half, mean + half)


def step_seconds(
    states: dict[Name, TrainState], recipe: Recipe, train_set: Batch, rounds: int
) -> dict[Name, float]:
    """Median seconds of a train step of each state, compile time left out.

    The states take turns, of `STEPS_A_TURN`, so that no slow moment of the machine falls to one of
    them alone.
    """
    keys = Keys.from_seed(0)
    states = {name: jax.tree.map(jnp.copy, state) for name, state in states.items()}
    seconds: dict[Name, list[float]] = {name: [] for name in states}
    for turn in range(rounds + 1):
        for name, state in states.items():
            started, step = time.perf_counter(), int(state.step)
            states[name], _ = training.train_steps(
                state, Metrics.zero(), train_set, keys, STEPS_A_TURN, batch_size=recipe.batch_size
            )
            steps = int(states[name].step) - step  # fewer where an epoch ends
            if turn > 0:  # the first one compiles
                seconds[name].append((time.perf_counter() - started) / steps)
    return {name: float(np.median(of_state)) for name, of_state in seconds.items()}
