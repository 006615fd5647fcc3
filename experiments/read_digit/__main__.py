"""Watch a trained run read one digit, row by row, and see which digits it gets wrong.

    python -m experiments.read_digit [--workdir runs/mnist_lstm] [--index 0] [--mistakes 12] [...]

Draws three figures, each with its data beside it as CSV:

- read_digit: the image, and beside each row the class probabilities after that row
- gates: the gates and the cell state of every unit of every layer, after each row
- mistakes: the digits that it misreads, the most confident mistakes first
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.harness.command import command
from experiments.harness.study import Figures, read_splits
from experiments.harness.usage import (
    DataPlaces,
    Folder,
    UsageError,
    check_numbers,
    check_packages,
    printable,
    read_flags,
)
from experiments.pretrained.model import is_pretrained, restore_or_pretrained
from experiments.read_digit.reading import (
    find_mistakes,
    gates_by_row,
    probabilities_by_row,
    report,
    settled_row,
)
from experiments.training_run.console import warn
from experiments.training_run.restored import RestoredRun, classify, restore_row_reader
from experiments.training_run.run_files import RunFilesError, figures_path
from lstm_flax.checkpoints import CheckpointError
from lstm_flax.data import DataError, Split

PRETRAINED_FIGURES = Path("runs/pretrained")
"""Folder of the figures about the pretrained model."""


@dataclasses.dataclass(frozen=True)
class Options(DataPlaces):
    """The flags, with their defaults."""

    workdir: Folder | None = None
    """Folder of the trained run, which may still be training; None is runs/mnist_lstm, or the
    pretrained model without it."""
    index: int = 0
    """Which test image to read, counted from 0."""
    mistakes: int = 12
    """Number of misread test images to show; 0 shows none."""
    figures: Path | None = None
    """Folder of the figures; None is the folder figures in the workdir, or runs/pretrained."""


@command(RunFilesError, CheckpointError, DataError)
def main(argv: Sequence[str] | None = None) -> int:
    """Read a digit from a command line; returns the exit status."""
    options = read_flags(Options, argv, name="read_digit", description=__doc__)
    check_numbers(options, "index", "mistakes")
    check_packages("figures", "matplotlib")  # before the run is restored, which takes seconds
    run(options)
    return 0


def run(options: Options) -> None:
    """Restore the run, read the digit and find the mistakes; print and draw the results."""
    trained = restore_or_pretrained(options.workdir, restore_row_reader)
    # Who has no run yet may have no MNIST either.
    asked = "auto" if is_pretrained(trained) else trained.config.dataset
    dataset, splits = read_splits(options, asked, "test")
    if is_pretrained(trained) and dataset != trained.config.dataset:
        warn(f"the pretrained model was trained on the digits of {dataset}; it knows them")
    test = splits["test"]
    if options.index >= len(test.labels):
        raise UsageError(
            f"--index must be less than {len(test.labels)}, the number of test images of "
            f"{dataset}, but is {options.index}"
        )
    drawn = Figures(options.figures or default_figures(trained))
    show_reading(trained, dataset, test, options.index, drawn)
    if options.mistakes:
        show_mistakes(trained, dataset, test, options.mistakes, drawn)
    print(f"\n{drawn}")


def default_figures(trained: RestoredRun) -> Path:
    """Return where the figures about a run go: nothing is written beside the pretrained model."""
    return PRETRAINED_FIGURES if is_pretrained(trained) else figures_path(trained.config.workdir)


def show_reading(
    trained: RestoredRun, dataset: str, test: Split, index: int, drawn: Figures
) -> None:
    """Print and draw how the run reads a test image."""
    from experiments.read_digit import figures  # needs matplotlib

    image, label = test.images[index], int(test.labels[index])
    title = f"Test image {index} of {dataset}, a {label}"
    probabilities = probabilities_by_row(trained.model, trained.params, image)
    layers = gates_by_row(trained.model, trained.params, image)
    settled = settled_row(probabilities, label)
    print(f"{title}; read by step {trained.step} of {printable(trained.config.workdir)}\n")
    print(report(probabilities, label))
    figures.draw_reading(image, label, probabilities, settled, title, drawn.path("read_digit.png"))
    figures.draw_gates(image, layers, settled, title, drawn.path("gates.png"))


def show_mistakes(
    trained: RestoredRun, dataset: str, test: Split, at_most: int, drawn: Figures
) -> None:
    """Print how many test images the run misreads, and draw the worst."""
    from experiments.read_digit import figures  # needs matplotlib

    mistakes = find_mistakes(classify(trained, test.images), test.labels)
    wrong = len(mistakes.image)
    are = "is" if wrong == 1 else "are"
    summary = f"{wrong:,} of {len(test.labels):,} test images {are} misread"
    print(f"\n{summary}")
    if mistakes.image.size:
        title = f"{dataset}: {summary}; the most confident mistakes"
        worst = mistakes.first(at_most)
        figures.draw_mistakes(test.images, worst, title, drawn.path("mistakes.png"))


if __name__ == "__main__":
    sys.exit(main())
