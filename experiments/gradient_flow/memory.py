"""Test accuracy as a function of how long ago the digit was: blank rows come after it."""

from collections.abc import Sequence

from experiments.gradient_flow.models import Variant, as_rows, start
from experiments.harness import short_training
from experiments.harness.short_training import Recipe, train
from lstm_flax import Keys
from lstm_flax.data import Split

BLANK_ROWS = (0, 14, 28, 56, 112)
"""Rows between the digit's last row and the output that is classified."""


def accuracies(
    variants: Sequence[Variant],
    splits: dict[str, Split],
    blank: int,
    seeds: Sequence[int],
    recipe: Recipe,
) -> dict[str, list[float]]:
    """Train on digits with `blank` empty rows after them, each variant once a seed.

    Returns:
        By the variant's label, the test accuracy of each seed, as a fraction.
    """
    datasets = {name: as_rows(split, blank) for name, split in splits.items()}
    tx = recipe.optimizer(datasets["train"])

    def accuracy(variant: Variant, seed: int) -> float:
        keys = Keys.from_seed(seed)
        state = start(variant, tx, datasets["train"], keys)
        state = train(state, recipe, datasets["train"], keys)
        return short_training.accuracy(state, datasets["test"])

    return {variant.label: [accuracy(variant, seed) for seed in seeds] for variant in variants}
