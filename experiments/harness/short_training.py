"""Short trainings to compare many models: one recipe, no augmentation."""

from typing import NamedTuple

import jax
import optax
from flax.training.train_state import TrainState

from lstm_flax import training
from lstm_flax.data import Split
from lstm_flax.training import Batch, Keys, Metrics

EVAL_BATCH_SIZE = 500
"""Number of images evaluated at a time; no result depends on it."""


class Recipe(NamedTuple):
    """How every model is trained."""

    epochs: int
    batch_size: int
    learning_rate: float  # the peak of the one-cycle schedule
    weight_decay: float = 0.0

    def steps_per_epoch(self, train_set: Batch) -> int:
        """Return the number of train steps in an epoch."""
        return training.steps_per_epoch(len(train_set["label"]), self.batch_size)

    def optimizer(self, train_set: Batch) -> optax.GradientTransformation:
        """Return AdamW as in the MNIST experiment, with a schedule over all epochs."""
        return training.onecycle_adamw(
            self.learning_rate,
            self.epochs * self.steps_per_epoch(train_set),
            weight_decay=self.weight_decay,
            clip_norm=1.0,
        )


def on_device(split: Split) -> Batch:
    """Move a split to the device, as `lstm_flax.training` takes it."""
    return jax.device_put(split.arrays)


def train(state: TrainState, recipe: Recipe, train_set: Batch, keys: Keys) -> TrainState:
    """Train for the recipe's epochs; donates `state`."""
    steps = recipe.steps_per_epoch(train_set)
    for _ in range(recipe.epochs):
        state, _ = training.train_steps(
            state, Metrics.empty(), train_set, keys, steps, batch_size=recipe.batch_size
        )
    return state


def accuracy(state: TrainState, test_set: Batch) -> float:
    """Return the fraction of the test images that are classified correctly."""
    metrics = training.evaluate(state, test_set, batch_size=EVAL_BATCH_SIZE)
    return int(metrics.correct) / int(metrics.count)
