"""Measurements of a model: the time of its train steps, and the interval of its accuracy."""

import time
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.training.train_state import TrainState
from scipy import stats

from experiments.harness.short_training import Recipe
from lstm_flax import training
from lstm_flax.data import Split
from lstm_flax.training import Batch, Keys, Metrics

STEPS_A_TURN = 8
"""Train steps in one timed turn."""

Name = TypeVar("Name")


def first_of_each_class(split: Split, size: int) -> Split:
    """Return `size` examples in their order, with the classes as equal in number as possible."""
    place_in_class = np.empty(len(split.labels), int)
    for label in np.unique(split.labels):
        of_class = np.flatnonzero(split.labels == label)
        place_in_class[of_class] = np.arange(len(of_class))
    chosen = np.sort(np.argsort(place_in_class, kind="stable")[:size])
    return Split(split.images[chosen], split.labels[chosen])


class Row(NamedTuple):
    """The results of one model."""

    kind: str
    layers: int
    parameters: int
    scan_seconds: float  # of a train step by `nn.scan`
    seconds: float  # of one as it trains, perhaps by a native kernel
    accuracies: dict[int, float]  # on the test images, by seed


class Interval(NamedTuple):
    """A mean and its 95% confidence interval."""

    mean: float
    low: float
    high: float


def t_interval(values: Sequence[float]) -> Interval:
    """Return the mean of at least two independent values and its 95% interval (Student 1908)."""
    mean = float(np.mean(values))
    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return Interval(mean, mean - half, mean + half)


def step_seconds(
    states: dict[Name, TrainState], recipe: Recipe, train_set: Batch, rounds: int
) -> dict[Name, float]:
    """Return the median seconds of a train step of each state, without compile time.

    The states take turns of `STEPS_A_TURN` steps, so that a slow moment of the machine meets all of
    them.
    """
    keys = Keys.from_seed(0)
    states = {name: jax.tree.map(jnp.copy, state) for name, state in states.items()}
    seconds: dict[Name, list[float]] = {name: [] for name in states}
    for turn in range(rounds + 1):
        for name, state in states.items():
            started, step = time.perf_counter(), int(state.step)
            states[name], _ = training.train_steps(
                state, Metrics.empty(), train_set, keys, STEPS_A_TURN, batch_size=recipe.batch_size
            )
            steps = int(states[name].step) - step  # fewer where an epoch ends
            if turn > 0:  # the first one compiles
                seconds[name].append((time.perf_counter() - started) / steps)
    return {name: float(np.median(of_state)) for name, of_state in seconds.items()}
