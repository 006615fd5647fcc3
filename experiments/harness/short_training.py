"""Short trainings, by which experiments compare many models: one recipe, no augmentation."""

from typing import NamedTuple

import jax
import optax
from flax.training.train_state import TrainState

from lstm_flax import training
from lstm_flax.data import Split
from lstm_flax.training import Batch, Keys, Metrics

EVAL_BATCH_SIZE = 500
"""Images that are evaluated at a time; no result depends on it."""


class Recipe(NamedTuple):
    """How every model is trained."""

    epochs: int
    batch_size: int
    learning_rate: float  # the peak of the one-cycle schedule
    weight_decay: float = 0.0

    def steps_per_epoch(self, train_set: Batch) -> int:
        """Train steps in a pass over the training images."""
        return training.steps_per_epoch(len(train_set["label"]), self.batch_size)

    def optimizer(self, train_set: Batch) -> optax.GradientTransformation:
        """AdamW, as in the MNIST experiment, its schedule spanning all epochs."""
        return training.onecycle_adamw(
            self.learning_rate,
            self.epochs * self.steps_per_epoch(train_set),
            weight_decay=self.weight_decay,
            clip_norm=1.0,
        )


def on_device(split: Split) -> Batch:
    """A split on the device, as training takes it."""
    return jax.device_put(split.arrays)


def train(state: TrainState, recipe: Recipe, train_set: Batch, keys: Keys) -> TrainState:
    """Train to the recipe's end; the state is given up to the call."""
    steps = recipe.steps_per_epoch(train_set)
    for _ in range(recipe.epochs):
        state, _ = training.train_steps(
            state, Metrics.zero(), train_set, keys, steps, batch_size=recipe.batch_size
        )
    return state


def accuracy(state: TrainState, test_set: Batch) -> float:
    """Fraction of all test images that are classified correctly."""
    metrics = training.evaluate(state, test_set, batch_size=EVAL_BATCH_SIZE)
    return int(metrics.correct) / int(metrics.count)
