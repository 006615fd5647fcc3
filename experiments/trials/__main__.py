"""Ideas to read more digits than the recipe `best` does, compared with it on held-out images.

    python -m experiments.trials [--ideas fading mixup] [--seeds 0 1 2]

Each idea is trained with several seeds on the training images but for 10,000, which are the same
for all. The test set is not used. What is trained is kept, so that the same command goes on where
it was interrupted.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import jax
import numpy as np
from flax import serialization
from tqdm import tqdm

from experiments.harness.command import command
from experiments.harness.markdown import table
from experiments.harness.output_files import replacing
from experiments.harness.short_training import on_device
from experiments.harness.study import read_splits
from experiments.harness.usage import (
    DataFlags,
    DatasetName,
    UsageError,
    check_fills_batch,
    check_numbers,
    check_seeds,
    make_folder,
    read_flags,
)
from experiments.training_run.config import RECIPES, Config, hyperparameters
from experiments.trials.ideas import IDEAS, Params
from experiments.trials.learn import Answers, answer, config_of, train
from lstm_flax import data
from lstm_flax.data import DataError
from lstm_flax.files import MIB, read_regular_file
from lstm_flax.training import Batch


@dataclasses.dataclass(frozen=True)
class Options(DataFlags):
    """The flags, with their defaults."""

    ideas: tuple[str, ...] = tuple(IDEAS)
    """Ideas to try, besides the recipe."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the trainings."""
    teachers: tuple[int, ...] = (10, 11, 12, 13, 14)
    """Seeds of the models from which the idea distilled learns."""
    epochs: int = 12
    """Passes over the training images; some ideas take several times as many."""
    held_out: int = 10_000
    """Training images that are only used to compare."""
    hidden_size: int = 256
    """Units of each of the two layers."""
    bfloat16: bool = False
    """Multiply in bfloat16 instead of float32."""
    workdir: Path = Path("runs/trials")
    """Folder of the trained parameters."""


@command(DataError)
def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not there yet and print the comparison; returns the exit status."""
    options = read_flags(Options, argv, name="trials", description=__doc__)
    check_numbers(options)
    check_seeds(options.seeds, least=2)
    check_seeds(options.teachers)
    if unknown := [name for name in options.ideas if name not in IDEAS]:
        raise UsageError(f"--ideas: {unknown[0]!r} is none of {', '.join(IDEAS)}")
    make_folder(options.workdir, "workdir")
    dataset, splits = read_splits(options, options.dataset, "train")
    kept, held_out = data.hold_out(splits["train"], options.held_out, seed=0)
    recipe = Config(
        hidden_size=options.hidden_size,
        precision="bfloat16" if options.bfloat16 else "float32",
        **RECIPES["best"] | {"epochs": options.epochs},
    )
    recipe = dataclasses.replace(recipe, dataset=cast(DatasetName, dataset))
    check_fills_batch(recipe.batch_size, len(kept.labels))
    train_set, compared = on_device(kept), on_device(held_out)
    names = [*dict.fromkeys(["recipe", *options.ideas])]
    rows, of_recipe = [], None
    for name in tqdm(names, unit=" ideas", disable=None):
        answers = [
            answer(
                IDEAS[name],
                config_of(IDEAS[name], recipe, seed),
                trained(name, seed, options, recipe, train_set),
                compared,
            )
            for seed in options.seeds
        ]
        of_recipe = of_recipe or answers
        rows.append(row(name, answers, of_recipe))
    columns = ["idea", "what it is", "correct, %", "more than the recipe", "loss"]
    print(table(columns, rows))
    return 0


def trained(name: str, seed: int, options: Options, recipe: Config, train_set: Batch) -> Params:
    """Return the parameters that an idea and a seed lead to, read if they were kept."""
    idea = IDEAS[name]
    config = config_of(idea, recipe, seed)
    told = json.dumps([hyperparameters(config), options.held_out, options.teachers])
    digest = hashlib.sha256(told.encode()).hexdigest()[:8]
    path = options.workdir / f"{name}-seed{seed}-{digest}.msgpack"
    if path.exists():
        return serialization.msgpack_restore(read_regular_file(path, 100 * MIB))
    teachers = [
        trained("recipe", of_teacher, options, recipe, train_set)
        for of_teacher in (options.teachers if idea.has_teachers else ())
    ]
    params = jax.device_get(train(idea, config, train_set, teachers))
    with replacing(path) as file:
        file.write_bytes(serialization.to_bytes(params))
    return params


def row(name: str, answers: Sequence[Answers], of_recipe: Sequence[Answers]) -> list[str]:
    """Return a row of the table: means over the seeds, the difference with its standard error.

    The difference is that of the same images and seeds. Its standard error is over the images.
    """
    correct = np.mean([each.is_correct for each in answers], axis=0)
    gain = correct - np.mean([each.is_correct for each in of_recipe], axis=0)
    error = gain.std(ddof=1) / np.sqrt(len(gain))
    loss = np.mean([each.loss for each in answers])
    difference = "" if name == "recipe" else f"{100 * gain.mean():+.3f} ± {100 * error:.3f}"
    return [name, IDEAS[name].says, f"{100 * correct.mean():.3f}", difference, f"{loss:.4f}"]


if __name__ == "__main__":
    sys.exit(main())
