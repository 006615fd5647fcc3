"""The cost and the benefit of depth and gates: RNN, GRU and LSTM of one to three layers.

    python -m experiments.depth [--dataset mnist] [--figures runs/depth] [...]

For each kind and number of layers, this measures the parameters (counted and by formula), the time
of a train step, and the test accuracy (mean and 95% interval over seeds). It prints a table in
Markdown and draws two figures, each with its data beside it as CSV.

To finish in minutes, the 27 trainings use 4,000 training images instead of 60,000, 128 units
instead of 256, and no augmentation. All models share one recipe, which is tuned for none of them:
each may do better with its own. With three seeds the intervals are wide. All seeds share one test
set, so the intervals leave out the error of its finite size. A run takes 13 minutes on 2 CPU cores
that other work shares. The models take turns when they are timed.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from experiments.depth.measure import Row, first_of_each_class, step_seconds, t_interval
from experiments.depth.parameters import KINDS, count, formula, make_model, total
from experiments.harness import markdown
from experiments.harness.command import command
from experiments.harness.short_training import Recipe, accuracy, on_device, train
from experiments.harness.study import Figures, read_splits
from experiments.harness.usage import (
    DataFlags,
    UsageError,
    check_fills_batch,
    check_numbers,
    check_seeds,
    counted,
    print_status,
    read_flags,
)
from lstm_flax import training
from lstm_flax.data import DataError
from lstm_flax.training import Batch, Keys, create_train_state


@dataclasses.dataclass(frozen=True)
class Options(DataFlags):
    """The flags, with their defaults."""

    layers: tuple[int, ...] = (1, 2, 3)
    """Numbers of layers to compare."""
    hidden_size: int = 128
    """Units of each layer."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds, at least two; each model is trained once with each."""
    epochs: int = 12
    """Passes over the training images."""
    batch_size: int = 128
    """Images per step."""
    learning_rate: float = 4e-3
    """Peak of AdamW's one-cycle learning rate, the same for all models."""
    train_images: int = 4000
    """Training images, the first ones of each class; the same for all seeds."""
    rounds: int = 15
    """Turns of each model when train steps are timed; the table has the median."""
    figures: Path = Path("runs/depth")
    """Folder of the figures."""


@command(DataError)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison from a command line; returns the exit status."""
    options = read_flags(Options, argv, name="depth", description=__doc__)
    check(options)
    run(options, Figures(options.figures))
    return 0


def check(options: Options) -> None:
    """Check the flags before anything is computed.

    Raises:
        UsageError: a flag's value can't be used.
    """
    check_numbers(options)
    if not options.layers or min(options.layers) < 1:
        raise UsageError("--layers must be numbers of at least 1")
    check_seeds(options.seeds, least=2)  # a single seed has no interval


def run(options: Options, drawn: Figures) -> None:
    """Train, time and count all models; print and draw the results."""
    from experiments.depth import figures  # needs matplotlib

    dataset, splits = read_splits(options, options.dataset, "train", "test")
    test, chosen = splits["test"], first_of_each_class(splits["train"], options.train_images)
    check_fills_batch(options.batch_size, len(chosen.labels))
    print(
        f"{dataset}: {len(chosen.labels):,} training and {len(test.labels):,} test images; "
        f"{counted(options.hidden_size, 'unit')}, {counted(options.epochs, 'epoch')}, "
        f"{counted(len(options.seeds), 'seed')}\n",
        flush=True,
    )
    rows = compare(options, on_device(chosen), on_device(test))
    print(table(rows, options.hidden_size))

    test_images = f"{len(test.labels):,} images of {dataset}"
    figures.draw_results(rows, test_images, drawn.path("depth.png"))
    deepest = max(options.layers)
    places = count("LSTM", deepest, options.hidden_size)
    figures.draw_parameters(rows, places, options.hidden_size, drawn.path("depth_parameters.png"))
    print(f"\n{drawn}")


def compare(options: Options, train_set: Batch, test_set: Batch) -> list[Row]:
    """Time and train all models, kind by kind, each from few layers to many."""
    recipe = Recipe(options.epochs, options.batch_size, options.learning_rate, weight_decay=1e-2)
    names = [(kind, layers) for kind in KINDS for layers in sorted(set(options.layers))]
    tx, keys = recipe.optimizer(train_set), [Keys.from_seed(seed) for seed in options.seeds]
    sample = training.to_floats(train_set["image"][: options.batch_size])
    states = {
        (kind, layers): [
            create_train_state(make_model(kind, layers, options.hidden_size), tx, sample, of.init)
            for of in keys
        ]
        for kind, layers in names
    }
    timed = {(*name, "auto"): of_name[0] for name, of_name in states.items()}
    for kind, layers in names:
        if make_model(kind, layers, options.hidden_size).core.why_not_native(sample) is None:
            scanning = make_model(kind, layers, options.hidden_size, "scan")
            timed[kind, layers, "scan"] = states[kind, layers][0].replace(apply_fn=scanning.apply)
    print_status(f"timing {counted(len(timed), 'model')}, after compiling them")
    seconds = step_seconds(timed, recipe, train_set, options.rounds)

    print_status(f"training {counted(len(names) * len(keys), 'model')}")
    rows = []
    for kind, layers in tqdm(names, unit=" models", disable=None):
        trained = (
            train(state, recipe, train_set, of)
            for state, of in zip(states.pop((kind, layers)), keys, strict=True)
        )
        rows.append(
            Row(
                kind,
                layers,
                total(count(kind, layers, options.hidden_size)),
                seconds.get((kind, layers, "scan"), seconds[kind, layers, "auto"]),
                seconds[kind, layers, "auto"],
                {
                    seed: accuracy(state, test_set)
                    for seed, state in zip(options.seeds, trained, strict=True)
                },
            )
        )
    return rows


def table(rows: Sequence[Row], hidden_size: int) -> str:
    """Return all results in Markdown, a line per model."""
    header = [
        "",
        "layers",
        "parameters",
        "by formula",
        "ms a train step, scan",
        "ms, as trained",
        "test accuracy, %, 95% interval",
    ]
    lines = []
    for row in rows:
        mean, low, high = (f"{100 * value:.2f}" for value in t_interval([*row.accuracies.values()]))
        lines.append(
            [
                row.kind,
                f"{row.layers}",
                f"{row.parameters:,}",
                f"{formula(row.kind, row.layers, hidden_size):,}",
                f"{1000 * row.scan_seconds:.1f}",
                f"{1000 * row.seconds:.1f}",
                f"{mean} ({low} to {high})",
            ]
        )
    return markdown.table(header, lines)


if __name__ == "__main__":
    sys.exit(main())
